"""The method, stage by stage.  Hinton, Vinyals & Dean 2015, section 5, and back into one network.

    generalist -> measure -> cluster -> route -> specialist 0 ... M-1 -> combine -> students -> evaluate -> report
                                   \\-> controls: what the same examples do for the generalist alone

`measure` and everything fitted (groups, early stopping, temperatures) read val; test is read by `evaluate` alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from clustering import (
    ClassGroups,
    PredictionStatistics,
    captured_confusion,
    captured_unlabelled,
    forecast,
    forecast_table,
    group_classes,
)
from ensemble import fit_shift
from networks import (
    DustbinHead,
    fit_residual_row,
    freeze_norm,
    lazy_logits,
    merge_grown_head,
    set_trainable,
    specialise,
)
from pipeline.config import Schedule, Student, UserError
from pipeline.store import Stage, read_json, write_json

from ..core.losses import dustbin_shift
from ..core.objectives import (
    Objective,
    classify,
    distil,
    learn_priors,
    specialise_fully,
    specialise_in,
)
from ..data.orders import weighted
from ..data.routing import open_routed
from ..data.routing import route as route_samples
from ..data.streams import Source, TrainingStream, balanced, shuffled
from ..session import Session, read_summary, save_summary
from .evaluate import evaluate_all, fit_weight, validate_classifier, validate_specialist
from .targets import store_targets, stored_targets, views_of
from .teachers import check_members, find_teacher, perturbation

ROUTED_TOP = 10  # the generalist's most probable classes, kept for every val example
VAL_EXAMPLES_PER_CLASS = 10  # fewer than this, and `measure` reads training data instead


def generalist(session: Session, stage: Stage) -> None:
    """One network learns all classes, on all ranks; where classes are added, their rows alone."""
    schedule, adds = session.config.train, session.run.old is not None
    with session.attempt(stage) as attempt:
        network = session.given_generalist()
        if network is None or adds:
            stream, objective = generalist_task(session, schedule)
            steps = count_steps(schedule, session.shards("train").num_samples)
            network, summary = session.train(
                attempt,
                network if adds else session.fresh_network(),
                objective,
                stream,
                schedule,
                steps,
                validate_classifier(session),
            )
            network = merge_grown_head(network) if adds else network
        else:
            summary = {
                "seconds": 0.0,
                "examples_seen": 0,
                "peak_memory_bytes": 0,
                "steps": 0,
                "best_step": 0,
                "val": validate_classifier(session)(network),
            }
        session.save(attempt, network, summary)


def member(session: Session, stage: Stage, index: int) -> None:
    """The generalist's lesson again, from another seed: one more of a deep ensemble."""
    schedule, seed = session.config.train, session.seed("member", index)
    with session.attempt(stage) as attempt:
        stream, objective = generalist_task(session, schedule, seed)
        steps = count_steps(schedule, session.shards("train").num_samples)
        network, summary = session.train(
            attempt,
            session.fresh_network(seed=seed),
            objective,
            stream,
            schedule,
            steps,
            validate_classifier(session),
        )
        session.save(attempt, network, summary)


def measure(session: Session, stage: Stage) -> None:
    """The generalist's predictions on val: their covariance is all that clustering needs."""
    with session.attempt(stage) as attempt:
        network = session.load(session.run.generalist)
        shards = session.measuring_shards(VAL_EXAMPLES_PER_CLASS)
        statistics = PredictionStatistics(session.num_classes, top_k=session.config.clusters.top_k)

        def predict(batch, count=True):
            logits = lazy_logits(network, batch.inputs)
            top = logits.summary(max(ROUTED_TOP, statistics.top_k or 0))
            if count and statistics.exact:
                statistics.update(logits.materialize().softmax(1), batch.labels)
            elif count:
                k = statistics.top_k
                statistics.update(top.indices[:, :k], top.probabilities[:, :k], batch.labels)
            return {
                "top": top.indices[:, :ROUTED_TOP].int(),
                "top_probability": top.probabilities[:, :ROUTED_TOP],
                "labels": batch.labels,
            }

        try:
            found = session.measured(shards, predict)
        except ValueError as mistake:  # of the statistics: NaN, say
            raise UserError(f"the generalist's predictions cannot be counted: {mistake}") from None
        if shards is not session.shards("val"):
            found = session.measured(
                session.shards("val"), lambda batch: predict(batch, count=False)
            )
        statistics.save(attempt.path(f"statistics-{session.ranks.rank}.npz"))
        session.barrier()
        if session.ranks.is_main:
            merged = PredictionStatistics.load(attempt.path("statistics-0.npz"))
            for rank in range(1, session.ranks.world_size):
                merged.merge(PredictionStatistics.load(attempt.path(f"statistics-{rank}.npz")))
            merged.save(attempt.path("statistics.npz"))
            np.savez(attempt.path("predictions.npz"), **found)


def cluster(session: Session, stage: Stage) -> None:
    """Groups of classes that the generalist confuses.  No labels are needed to find them."""
    config = session.config.clusters
    with session.attempt(stage) as attempt:
        if not session.ranks.is_main:
            return
        try:
            statistics = PredictionStatistics.load(session.run.measure.path("statistics.npz"))
            if session.run.groups_file:
                groups = ClassGroups.load(session.run.groups_file)
            elif session.run.old:
                groups = extend_groups(session)
            else:
                rows = (
                    session.load(session.run.generalist).head.weight
                    if config.method == "classifier"
                    else None
                )
                groups = group_classes(
                    statistics,
                    config.num_groups,
                    method=config.method,
                    capacity=config.capacity,
                    overlap=config.overlap,
                    coverage=config.coverage,
                    seed=session.config.seed,
                    classifier_rows=rows,
                )
        except ValueError as mistake:
            raise UserError(f"[clusters] {mistake}") from None
        if groups.num_classes != session.num_classes:
            raise UserError(
                f"clusters.groups_file = {session.run.groups_file} is for {groups.num_classes} classes, "
                f"the data has {session.num_classes}"
            )
        groups.save(attempt.path("groups.json"))
        share, chance = captured_confusion(groups, statistics.confusion)
        unlabelled, unlabelled_chance = captured_unlabelled(groups, statistics)
        foretold = forecast(groups, statistics)
        skipped = [m for m, row in enumerate(foretold) if row["gain"] < config.min_gain]
        if session.run.old:  # what is there costs nothing, and somebody must know the new classes
            skipped = read_json(session.run.old / "clusters" / "summary.json")["skipped"]
        if len(skipped) == len(groups):
            raise UserError(
                f"clusters.min_gain = {config.min_gain} leaves no group a specialist; the best forecast is "
                f"{max(row['gain'] for row in foretold):.4f}"
            )
        write_json(
            attempt.path("summary.json"),
            {
                "captured": no_nan(share),
                "chance": chance,
                "captured_unlabelled": no_nan(unlabelled),
                "chance_unlabelled": unlabelled_chance,
                "sizes": [len(members) for members in groups.members],
                "forecast": foretold,
                "skipped": skipped,
            },
        )
        session.say(
            "%d groups of %d to %d classes, %.2f per class, hold %.1f %% of the generalist's errors on val "
            "(chance %.1f %%); without labels %.1f %% were expected",
            len(groups),
            groups.sizes.min(),
            groups.sizes.max(),
            groups.sizes.sum() / groups.num_classes,
            100 * share,
            100 * chance,
            100 * unlabelled,
        )
        for line in forecast_table(foretold, skipped):
            session.say("%s", line)
        session.say(
            "gain: share of val that a perfect specialist would put right; shared errors count in every group"
        )
        if skipped:
            session.say(
                "%d of %d groups are forecast to gain less than clusters.min_gain = %g: no specialist",
                len(skipped),
                len(groups),
                config.min_gain,
            )


def extend_groups(session: Session) -> ClassGroups:
    """The old run's groups, and one of the new classes with the old ones that the generalist confuses them with most.

    It is as large as the largest old group, or has as many old classes as new ones where that is more, unless
    extend.companions says how many.
    """
    groups, place = (
        ClassGroups.load(session.run.old / "clusters" / "groups.json"),
        session.old_classes(),
    )
    new, count = (
        np.setdiff1d(np.arange(session.num_classes), place),
        session.config.extend.companions,
    )
    if count is None:
        count = max(int(groups.sizes.max()) - len(new), len(new))
    confused = confusion_with(session, new)
    companions = place[np.argsort(-confused[place], kind="stable")[:count]]
    session.say(
        "%d new classes, in a group with the %d of the %d old ones that they are confused with most: %.1f %% "
        "of what they are confused with",
        len(new),
        len(companions),
        len(place),
        100 * confused[companions].sum() / max(confused.sum(), 1e-30),
    )
    return ClassGroups(
        [*(place[members] for members in groups.members), np.r_[new, companions]],
        session.num_classes,
    )


def route(session: Session, stage: Stage) -> None:
    """All groups' samples in one pass, so that no specialist reads the whole to keep a part."""
    config, done = session.config.route, session.skipped() | set(range(session.run.num_inherited))
    with session.attempt(stage) as attempt:
        groups = {m: members for m, members in enumerate(session.groups().members) if m not in done}
        if session.ranks.is_main:
            train = session.shards("train")
            lost = route_samples(
                train, groups, attempt.directory, config.mode, config.max_bytes, session.say
            )
            session.losses.add(train, lost)


def specialist(session: Session, stage: Stage, index: int) -> None:
    """The generalist again, asked one group's classes and a dustbin: half its batch from the group, half from the
    rest."""
    schedule, members = session.config.specialists, session.groups().members[index]
    with session.attempt(stage) as attempt:
        if index in session.skipped():
            session.say(
                "group %d is forecast to gain less than clusters.min_gain: no specialist", index
            )
            save_summary(
                attempt,
                {"skipped": True, "seconds": 0.0, "examples_seen": 0, "peak_memory_bytes": 0},
            )
            return
        if index < session.run.num_inherited:
            network, summary = session.inherited_specialist(index)
            summary["new_rows_shift"] = calibrate_new_class_bias(session, network, members)
            session.save(attempt, network, summary)
            return
        lesson = specialist_task(session, index, members)
        judge = validate_specialist(session, members)
        network, summary = session.train(
            attempt,
            lesson.network,
            lesson.objective,
            lesson.stream,
            schedule,
            lesson.steps,
            judge.loss,
        )
        if schedule.trains_all_rows:  # the same answers, and no more rows are asked than before
            network = specialise(network, members, "preserving")
        summary |= {
            "classes": len(members),
            **lesson.facts,
            "temperature": judge.temperature(network),
        }
        session.save(attempt, network, summary)


def calibrate_new_class_bias(session: Session, network, members: np.ndarray) -> float | None:
    """Raise the biases of an old specialist's rows of the new classes by what fits best the val examples that the
    generalist refers to it; what it says of its members among themselves stays.  Changes the network.

    These rows are the generalist's, and read features that were learnt without them, on which they come out too low.
    None, and no change, where it has no such rows or is referred no example of a new class.
    """
    head = network.eval().head
    if not isinstance(head, DustbinHead) or head.kept is not None:
        return None
    new = torch.ones(session.num_classes, dtype=torch.bool)
    new[torch.from_numpy(session.old_classes())] = False
    new = new.to(head.bias.device)
    rows = new[head.row_classes]

    def ask(batch):
        logits = F.linear(
            network.trunk(network.preprocess(batch.inputs)), head.weight, head.bias
        ).float()
        either = [logits[:, ~rows].logsumexp(1), logits[:, rows].logsumexp(1)]
        return {"logits": torch.stack(either, 1), "labels": new[batch.labels].long()}

    found = session.measured(
        session.shards("val"), ask, ids=validate_specialist(session, members).ids
    )
    if not found["labels"].any():
        return None
    shift = fit_shift(torch.from_numpy(found["logits"]), torch.from_numpy(found["labels"]), [1])
    with torch.no_grad():
        head.bias[rows] += shift
    return shift


class TrainingTask(NamedTuple):
    network: torch.nn.Module
    objective: Objective
    stream: TrainingStream
    steps: int
    facts: dict  # for summary.json


def specialist_task(session: Session, index: int, members: np.ndarray) -> TrainingTask:
    """Whom a specialist starts from, what it sees and what it is asked."""
    schedule, general = session.config.specialists, session.shards("train")
    inside, inside_ids = open_routed(session.run.route.path(f"{index:03d}"), general)
    outside_ids = np.flatnonzero(~np.isin(general.labels, members))
    natural = len(inside_ids) / general.num_samples
    seed, batch = session.seed("specialist", index), schedule.batch_size
    own = min(max(1, round(schedule.fraction * batch)), batch - 1) if len(outside_ids) else batch
    sources = [Source(inside, balanced(inside.labels, seed, schedule.balance, inside_ids), own)]
    shift, others_prior = 0.0, None  # where S_m is every class nothing falls into the dustbin
    if len(outside_ids):
        order = shuffled(outside_ids, seed + 1)
        if schedule.hard_negatives:
            shares, others_prior = hard_negatives(session, members)
            order = weighted(general.labels, seed + 1, shares, outside_ids)
        sources.append(Source(general, order, batch - own))
        shift = dustbin_shift(natural, own / batch)
    facts = {"natural_share": natural, "shift": shift}
    log_prior = balanced_log_prior(general.class_counts[members], schedule.balance)
    network = session.load(session.run.generalist)
    torch.manual_seed(seed)
    if schedule.trains_all_rows:
        teacher = session.load(session.run.generalist) if schedule.dustbin == "full" else None
        objective = specialise_fully(
            teacher,
            members,
            session.num_classes,
            shift,
            log_prior,
            others_prior,
            schedule.soft_weight,
        )
    else:
        kept, rest = dustbin_rows(session, network, members)
        torch.manual_seed(seed)
        network = specialise(network, members, schedule.dustbin, kept, rest)
        objective = specialise_in(
            members, session.num_classes, shift, schedule.label_smoothing, log_prior
        )
        if rest is not None:
            facts["dustbin"] = {"rows": len(kept), "kl": rest.kl, "rms": rest.rms}
    freeze_norm(set_trainable(network, schedule.trainable), schedule.freeze_norm)
    stream = TrainingStream(sources, seed, session.config.data.augment)
    return TrainingTask(
        network, objective, stream, specialist_steps(schedule, len(inside_ids)), facts
    )


def confusion_with(session: Session, members: np.ndarray) -> np.ndarray:
    """float [C]: how much the generalist confuses each class with those of a group, by what it says alone; 0 for
    members."""
    expected = PredictionStatistics.load(
        session.run.measure.path("statistics.npz")
    ).expected_confusion
    confused = np.asarray(
        expected[members].sum(axis=0) + expected[:, members].sum(axis=1), float
    ).ravel()
    confused[members] = 0
    return confused


def hard_negatives(session: Session, members: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
    """(weights [C] of the other classes' examples, log of their share over the natural one [C], 0 for members).

    A share of them is drawn in proportion to the confusion with the group, the rest at natural frequencies.
    """
    share = session.config.specialists.hard_negatives
    counts = session.shards("train").class_counts.astype(float)
    counts[members] = 0
    natural, confused = counts / counts.sum(), confusion_with(session, members) * (counts > 0)
    confused = confused / confused.sum() if confused.any() else natural
    weights = (1 - share) * natural + share * confused
    ratio = np.divide(weights, natural, out=np.ones_like(natural), where=natural > 0)
    return weights, torch.as_tensor(np.log(ratio), dtype=torch.float32)


def dustbin_rows(session: Session, generalist, members: np.ndarray):
    """(classes, ResidualRow): the classes outside `members` whose rows a specialist keeps, those it is confused with most,
    and the row for the rest, fitted on val; (None, None) where it keeps all."""
    count = session.config.specialists.dustbin_rows
    if count is None or len(members) + count >= session.num_classes:
        return None, None
    confused = confusion_with(session, members)
    confused[members] = -1
    kept = np.sort(np.argsort(-confused, kind="stable")[:count])

    def features(batch):
        return {"features": generalist.trunk(generalist.preprocess(batch.inputs))}

    x = torch.from_numpy(session.measured(session.shards("val"), features)["features"]).to(
        session.ranks.device
    )
    rest = fit_residual_row(generalist.head, x, members, kept)
    session.say(
        "dustbin: %d rows and one fitted to %d classes; on half of val KL %.2g from all rows, its logit's "
        "error %.2g",
        count,
        session.num_classes - len(members) - count,
        rest.kl,
        rest.rms,
    )
    return kept, rest


def combine(session: Session, stage: Stage) -> None:
    """The joint opinion, eq. 5: what it needs beside the networks, fitted on val.  A deep ensemble's is the mean."""
    config = session.config.ensemble
    with session.attempt(stage) as attempt:
        if session.config.is_deep:
            facts = {"schema": 1, "kind": "deep", "members": config.members}
        else:
            facts = fit_ensemble_settings(session)
        session.write_json(attempt.path("ensemble.json"), facts)
    session.write_json(session.run.root / "ensemble.json", facts)


def fit_ensemble_settings(session: Session) -> dict:
    config = session.config.ensemble
    absent = [m for m, each in enumerate(session.run.specialists) if not each.is_done]
    if absent and not config.allow_missing:
        raise UserError(
            f"specialists {absent} are missing; `referral retry`, or set ensemble.allow_missing = true"
        )
    facts = {
        "schema": 1,
        "gate": config.gate,
        "max_specialists": config.max_specialists,
        "combine": config.combine,
        "temperatures": session.temperatures() if config.temperatures else None,
        "weights": None,
        "skipped": sorted(session.skipped()),
        "missing": absent,
    }
    if config.fit_weight:
        facts["weights"] = fit_weight(session, session.ensemble(facts))
    return facts


def answers(session: Session, stage: Stage, name: str) -> None:
    """A teacher's answers to what is always seen alike, once for all students that learn from them."""
    readers = {
        key: each
        for key, each in session.config.students.items()
        if session.run.answers_for(key) is not None
        and session.run.answers_for(key).place == stage.place
    }
    student = next(iter(readers.values()))
    temperatures = sorted({1.0, *(each.temperature for each in readers.values())} - {math.inf})
    with session.attempt(stage) as attempt:
        store_targets(
            session,
            find_teacher(session, student),
            attempt,
            session.run.augment_of(student),
            views_of(session, student.views),
            temperatures,
        )


def control(session: Session, stage: Stage, name: str) -> None:
    """The honest comparison: the generalist itself goes on, without groups.  See README, "Controls"."""
    config = session.config
    with session.attempt(stage) as attempt:
        network = session.load(session.run.generalist)
        if name == "student_hard":
            schedule = config.students["main"]
            network, stream, steps = student_task(session, "main", schedule, transfer=False)
            objective = classify(schedule.label_smoothing, negatives=schedule.negatives)
        else:
            walls = {
                key: each
                for key, each in session.run.controls.items()
                if key.startswith("control_wall")
            }
            lessons = session.specialist_steps()
            if name == "control_compute":
                best = min(walls, key=lambda key: read_summary(walls[key])["val"]["loss"])
                rate, steps = read_summary(walls[best])["learning_rate"], sum(lessons)
            else:
                rate, steps = config.controls.learning_rates[list(walls).index(name)], max(lessons)
            # As many times as one specialist: val is larger than the examples that a specialist is eval_model on.
            every = config.specialists.validate_every * steps // max(lessons)
            schedule = config.specialists.model_copy(
                update={"learning_rate": rate, "patience": 0, "validate_every": every}
            )
            stream, objective = generalist_task(
                session, schedule, seed=session.seed("control", steps)
            )
        network, summary = session.train(
            attempt, network, objective, stream, schedule, steps, validate_classifier(session)
        )
        session.save(attempt, network, summary | {"learning_rate": schedule.learning_rate})


def student(session: Session, stage: Stage, name: str) -> None:
    """One network learns what its teacher says: generalist and specialists together (section 8's open end), say."""
    schedule = session.config.students[name]
    with session.attempt(stage) as attempt:
        network, stream, steps = student_task(
            session, name, schedule, transfer=schedule.learns_from_teacher
        )
        objective = {"hard": hard_objective, "prior": prior_objective, "distill": soft_objective}[
            schedule.method
        ](session, name, network, stream)
        network, summary = session.train(
            attempt, network, objective, stream, schedule, steps, validate_classifier(session)
        )
        if schedule.bias_correction:
            summary["bias_shift"] = correct_bias(session, network, left_out(session, schedule))
        session.save(attempt, network, summary)


def hard_objective(session: Session, name: str, network, stream):
    schedule = session.config.students[name]
    return classify(schedule.label_smoothing, negatives=schedule.negatives)


def prior_objective(session: Session, name: str, network, stream):
    return learn_priors()


def soft_objective(session: Session, name: str, network, stream):
    """Answers that are stored, or a teacher who answers as inputs come, perturbed where the student says so."""
    schedule, stored = session.config.students[name], session.run.answers_for(name)
    if stored is not None:
        teach = stored_targets(stored.path(""), session, stream.sources, stream.views)
        count = read_json(stored.path("train/answers.json"))["members"]
        check_members(name, schedule, count, network.num_members)
        return distil(teach, schedule)
    teacher = find_teacher(session, schedule)
    check_members(name, schedule, teacher.num_members, network.num_members)
    move = (
        None
        if schedule.perturb == "none"
        else perturbation(name, schedule, teacher, network.spec.input)
    )
    return distil(lambda batch: teacher.answer(batch.inputs), schedule, move)


def correct_bias(session: Session, network, classes: np.ndarray) -> float:
    """Raise the biases of `classes`, which the network was not shown, by what fits val best.  Section 3 of the paper
    did so by hand."""

    def ask(batch):
        return {"logits": lazy_logits(network, batch.inputs).materialize(), "labels": batch.labels}

    found = session.measured(session.shards("val"), ask)
    shift = fit_shift(torch.from_numpy(found["logits"]), torch.from_numpy(found["labels"]), classes)
    with torch.no_grad():
        network.head.bias[torch.from_numpy(classes).to(network.head.bias.device)] += shift
    session.say(
        "the biases of %d classes that were left out are raised by %.2f", len(classes), shift
    )
    return shift


def evaluate(session: Session, stage: Stage) -> None:
    """Generalist, ensemble, controls and students on test: the only reader of that split."""
    with session.attempt(stage) as attempt:
        evaluate_all(session, attempt)


def report(session: Session, stage: Stage) -> None:
    """results.json and report.html, published in RUN."""
    from ..report.page import write_report

    with session.attempt(stage) as attempt:
        if session.ranks.is_main:
            write_report(
                session.run,
                attempt.directory,
                session.shards("test"),
                session.shards("train").class_counts,
            )
    if session.ranks.is_main:
        session.publish_report(stage)


STAGES = {
    "generalist": generalist,
    "member": member,
    "measure": measure,
    "cluster": cluster,
    "route": route,
    "specialist": specialist,
    "combine": combine,
    "answers": answers,
    "control": control,
    "student": student,
    "evaluate": evaluate,
    "report": report,
}


def generalist_task(session: Session, schedule: Schedule, seed: int | None = None):
    """All classes: the stream and the objective, the prior of a balanced stream carried through the loss."""
    shards, seed = session.shards("train"), session.config.seed if seed is None else seed
    order = balanced(shards.labels, seed, schedule.balance)
    log_prior = (
        balanced_log_prior(shards.class_counts, schedule.balance) if schedule.balance else None
    )
    stream = TrainingStream(
        [Source(shards, order, schedule.batch_size)], seed, session.config.data.augment
    )
    return stream, classify(schedule.label_smoothing, log_prior, schedule.negatives)


def balanced_log_prior(class_counts: np.ndarray, exponent: float) -> torch.Tensor:
    """float32 [C]: log of each class's share in a stream balanced by `exponent` over its natural share, 0 where
    absent."""
    natural = class_counts / class_counts.sum()
    sampled = np.where(class_counts > 0, np.power(np.maximum(natural, 1e-12), 1 - exponent), 0)
    sampled = sampled / sampled.sum()
    ratio = np.where(class_counts > 0, sampled / np.maximum(natural, 1e-12), 1)
    return torch.as_tensor(np.log(ratio), dtype=torch.float32)


def student_task(session: Session, name: str, schedule: Student, transfer: bool = True):
    """A student's network, stream and number of steps.  Its twin with hard labels has the same, but for unlabelled
    inputs.

    An epoch is one of its part of train.  The stream's sources are train and, where [data] names them, the transfer
    inputs that only a teacher can say something of.
    """
    train, seed = session.shards("train"), session.seed("student", 0)
    ids = transfer_set(session, schedule)
    sets, counts = [(train, ids)], [schedule.batch_size]
    if transfer and session.config.data.transfer:
        further = session.shards("transfer")
        sets.append((further, np.arange(further.num_samples)))
        share = schedule.transfer_share
        if share is None:
            share = len(further) / (len(ids) + len(further))
        unlabelled = round(share * schedule.batch_size)
        counts = [schedule.batch_size - unlabelled, unlabelled]
    sources = [
        Source(shards, shuffled(wanted, seed + number), count)
        for number, ((shards, wanted), count) in enumerate(zip(sets, counts, strict=True))
        if count
    ]
    augment = session.run.augment_of(schedule)
    views = views_of(session, schedule.views) if augment != "none" else None
    stream = TrainingStream(sources, seed, augment, views)
    return session.student_network(name, schedule), stream, count_steps(schedule, len(ids))


def transfer_set(session: Session, schedule: Student) -> np.ndarray:
    """ids of train that a student sees: `share` of each class, at least one example; none of the classes left out."""
    labels, absent = session.shards("train").labels, left_out(session, schedule)
    ids = np.flatnonzero(~np.isin(labels, absent))
    if not len(ids):
        raise UserError("leave_out leaves no example to learn from")
    if schedule.share == 1:
        return ids
    shuffle = np.random.default_rng(session.seed("share", 0)).permutation(ids)
    place = shuffle[np.argsort(labels[shuffle], kind="stable")]  # by class, in random order
    _, first, counts = np.unique(labels[place], return_index=True, return_counts=True)
    taken = np.maximum(1, np.round(schedule.share * counts)).astype(int)
    return np.sort(np.concatenate([place[a : a + n] for a, n in zip(first, taken, strict=True)]))


def left_out(session: Session, schedule: Student) -> np.ndarray:
    names = {name: index for index, name in enumerate(session.class_names)}
    unknown = [name for name in schedule.leave_out if name not in names]
    if unknown:
        raise UserError(
            f"leave_out = {unknown[0]!r} is no class; classes are called like {session.class_names[:3]}"
        )
    return np.array(sorted(names[name] for name in schedule.leave_out), np.int64)


def no_nan(share: float) -> float | None:
    """JSON has no NaN: a share of no errors at all is null."""
    return None if math.isnan(share) else share


def count_steps(schedule: Schedule, examples: int) -> int:
    if schedule.steps is not None:
        return schedule.steps
    if schedule.epochs is None:
        raise UserError("train.steps or train.epochs is missing: say how long to train")
    return max(1, math.ceil(schedule.epochs * examples / schedule.batch_size))


def specialist_steps(schedule: Schedule, examples: int) -> int:
    """An epoch of a specialist is one pass over its own classes, which fill `fraction` of each batch."""
    return count_steps(schedule, math.ceil(examples / schedule.fraction))
