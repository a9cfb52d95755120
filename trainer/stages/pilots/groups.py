"""Pilots of specialists: copies of the generalist, and branches of it, for a few groups alone.

The groups are those that perfect specialists would correct most in.  What their specialists answer
is measured on the val examples that the generalist refers to them. Elsewhere it answers itself.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from networks import (
    Branch,
    Classifier,
    branch_off,
    freeze_norm,
    load_branch,
    load_classifier,
    multiplications,
    specialise,
)
from networks.cutting import Cut, cut_at
from networks.heads import DustbinHead
from pipeline.advice.levers import FAMILIES
from pipeline.config import ResolvedSpecialists
from pipeline.config.schedule import GENERALIST as START
from pipeline.store import Attempt, Stage, read_json

from ...core.loop import TrainingTask
from ...core.objectives import classify
from ...core.progress import peak_memory
from ...data.routing import routed_ids
from ...data.streams import Source, TrainingStream, balanced, shuffled
from ...session import Session
from ..branches import BranchFeatures, BranchWork, branch_trainer, fresh_branch, own_counts
from ..features import row_bytes, row_shapes
from ..grouping import groups_of, skipped_groups
from ..networks import builders_of, load_network
from ..specialist import mixture_of, own_examples, task_from
from ..training import branch_steps, loss_of, specialist_steps, train_network
from .forms import GENERALIST, Answers, measured_forms
from .group_answers import joined_answers, referred_ids, val_predictions, with_form
from .group_features import Extraction, extract, plan_extraction
from .healing import by_ceiling, healed, mixture_log_prior, pilot_batch, share_a_group
from .networks import BACKWARD, ROUNDING, compressed, whole_cost
from .outcome import Outcome
from .rounds import read_record

OF_COPIES = 1  # groups: one in full says more than several that have just begun
OF_BRANCHES = 4  # groups, at most
ENOUGH = 2 / 3  # of a specialist's examples, after which it is not restarted for the rest
CONTROL = "control"
EMBEDDING = 64  # of branches, at least, where the config has copies
PASSES = 0.5  # of what branches may cost, for features, where they cannot be trained in full
MEMORY = 2**31  # bytes of features, at most
NO_ERRORS = "the generalist makes no error on val between classes of one group"


@dataclass(frozen=True)
class Chosen:
    """The groups of a round.

    begun: examples that each one's network has seen.  tried: groups of earlier rounds, done.
    number: of the round.  finished: whether these are done, too, and no others are left.
    """

    groups: list[int]
    begun: list[int]
    tried: list[int]
    number: int
    finished: bool = False

    @property
    def goes_on(self) -> bool:
        return any(self.begun)


def choose(session: Session, previous: Stage | None, most: int) -> Chosen:
    """The groups with the highest ceilings, or the round before's where these are not done.

    If these are done, the next ones. If there are none, the same, with nothing left to train.
    """
    summary = read_json(session.run.cluster.path("summary.json"))
    gains = [row["gain"] for row in summary["forecast"]]
    ranked = by_ceiling(gains, skipped_groups(session))
    record: dict[str, Any] = {} if previous is None else read_record(previous)
    number = record.get("round", -1) + 1
    tried, done = record.get("tried", []), False
    if "groups" in record:  # otherwise nothing was possible
        done = is_done(record["seen"], record["full_seen"])
        if not done:
            return Chosen(record["groups"], record["seen"], tried, number)
        tried = [*tried, *record["groups"]]
    further = [m for m in ranked if m not in tried][:most]
    if done and not further:
        return Chosen(record["groups"], record["seen"], record["tried"], number, finished=True)
    return Chosen(further, [0] * len(further), tried, number)


def is_done(seen: Sequence[int], full: Sequence[int]) -> bool:
    """Whether networks are so far that a warm restart had too few steps to anneal again."""
    return all(some >= ENOUGH * whole for some, whole in zip(seen, full, strict=True))


# Copies


def copies(session: Session, attempt: Attempt, share: float, previous: Stage | None) -> Outcome:
    """A copy for one group, as [specialists] says, and a control.

    The control is the generalist trained on, all classes, on the examples of the group and as many
    others as the specialist sees, for as long.  Each of the two has half the compute.
    """
    session = with_section(session, copies_section(session.config.specialists))
    chosen = choose(session, previous, OF_COPIES)
    if not chosen.groups:
        return Outcome.not_possible(NO_ERRORS)
    generalist = load_network(session, session.run.generalist)
    members = members_of(session, chosen)
    batch = session.config.specialists.batch_size
    full = [steps * batch for steps in full_steps(session, members)]
    paid = FAMILIES["copies"].cost * share * whole_cost(session, generalist)
    each = paid / (OF_COPIES + 1)
    affordable = max(1, int(each / dearest(session, generalist) + ROUNDING))
    wanted = [0] * len(full)
    if not chosen.finished:
        wanted = [min(affordable, left) for left in less(full, chosen.begun)]
        session = with_section(session, smaller_batches(session, affordable, min(full)))
    networks = CopiesOfRound(session, attempt, generalist, chosen, previous)
    for m, count in zip(chosen.groups, wanted, strict=True):
        networks.train_copy(m, members[m], count)
    networks.train_control(np.unique(np.concatenate(list(members.values()))), max(wanted))
    special = [networks.folded(m, classes) for m, classes in members.items()]
    answers = answers_of_groups(session, generalist, special, members, "copies")
    ids = referred_ids(session, list(members.values()))
    answers = with_control(session, generalist, networks.trained[CONTROL], ids, answers)
    return outcome_of(
        previous,
        networks.trained,
        networks.summaries,
        networks.paid / whole_cost(session, generalist),
        answers,
        figures(session, answers, "copies", chosen, members)
        | lengths(add(chosen.begun, networks.seen), full)
        | {"batch_size": session.config.specialists.batch_size},
    )


def smaller_batches(session: Session, examples: int, full: int) -> ResolvedSpecialists:
    """[specialists] with batches of which a pilot's examples make more steps.

    Its few examples in batches of a whole training are too few steps to get anywhere.  The rate is
    that of the smaller batch: by the square root, as Adam's noise scales (Malladi et al. 2022).

    examples: of each network.  full: of the shortest whole training.
    """
    section = session.config.specialists
    parts = session.ranks.world_size * section.accumulation
    batch = pilot_batch(section.batch_size, examples, full // section.batch_size, parts)
    rate = section.learning_rate * math.sqrt(batch / section.batch_size)
    return section.model_copy(update={"batch_size": batch, "learning_rate": rate})


def copies_section(section: ResolvedSpecialists) -> ResolvedSpecialists:
    """[specialists] of copies of the generalist, whatever the run's own specialists are."""
    own: dict[str, Any] = {"from": START}
    if section.is_branch:
        own |= {"kind": "copy", "blocks": 0, "model": {}, "views": 0}
    return ResolvedSpecialists.model_validate({**section.model_dump(by_alias=True), **own})


def full_steps(session: Session, members: Mapping[int, np.ndarray]) -> list[int]:
    """Steps that each group's specialist takes in a run."""
    counts = session.shards("train").class_counts
    schedule = session.config.specialists
    return [specialist_steps(schedule, int(counts[own].sum())) for own in members.values()]


class CopiesOfRound:
    """The networks of one round, trained one after the other, and what that costs.

    trained: by name.  seen: examples of this round, by group.  paid: multiplications.
    """

    def __init__(
        self,
        session: Session,
        attempt: Attempt,
        generalist: Classifier,
        chosen: Chosen,
        previous: Stage | None,
    ):
        self.session = session
        self.attempt = attempt
        self.generalist = generalist
        self.chosen = chosen
        self.previous = previous if chosen.goes_on else None
        self.trained: dict[str, Classifier] = {}
        self.seen: list[int] = []
        self.summaries: list[dict] = []
        self.paid = 0

    def train_copy(self, m: int, classes: np.ndarray, examples: int) -> None:
        """The specialist of a group, for so many further examples."""
        name, begun = name_of(m), self._earlier(name_of(m))
        if not examples:
            assert begun is not None, "only what is done takes no step"
            self.trained[name] = begun
            self.seen.append(0)
            return
        steps = self._steps(examples)
        self.seen.append(steps * self.session.config.specialists.batch_size)
        paced = with_section(self.session, compressed(self.session.config.specialists, steps))
        train = paced.shards("train")
        seed = paced.seed(f"pilot copies {self.chosen.number}", m)
        mixture = mixture_of(paced, classes, train, routed_ids(train.labels, classes), seed)
        task, _ = task_from(paced, self.generalist, classes, mixture, None, begun)
        self._train(name, task, asks_teacher(paced.config.specialists))

    def train_control(self, classes: np.ndarray, examples: int) -> None:
        """The generalist on so many examples of all these groups and others."""
        network = self._earlier(CONTROL)
        if not examples:
            assert network is not None, "only what is done takes no step"
            self.trained[CONTROL] = network
            return
        if network is None:
            network = copy.deepcopy(self.generalist)
        seed = self.session.seed(f"pilot control {self.chosen.number}", 0)
        task = control_task(self.session, network, classes, self._steps(examples), seed)
        self._train(CONTROL, task, with_teacher=False)

    def _steps(self, examples: int) -> int:
        return max(1, examples // self.session.config.specialists.batch_size)

    def folded(self, m: int, classes: np.ndarray) -> Classifier:
        """A group's specialist as it joins: with one row for all other classes."""
        network = self.trained[name_of(m)]
        if self.session.config.specialists.trains_all_rows:
            return specialise(network, classes, "preserving")
        return network

    def _earlier(self, name: str) -> Classifier | None:
        if self.previous is None:
            return None
        directory = self.previous.path(name)
        return load_classifier(
            directory, self.session.ranks.device, builders_of(self.session.config)
        )

    def _train(self, name: str, task: TrainingTask, with_teacher: bool) -> None:
        part = name if self.summaries else ""  # the first one's progress is the stage's
        torch.manual_seed(task.stream.seed)  # of dropout
        network, summary = train_network(self.session, self.attempt, task, part)
        of_example = training_cost(network, self.generalist if with_teacher else None)
        self.paid += of_example * summary["examples_seen"]
        self.trained[name] = network
        self.summaries.append(summary)


def control_task(
    session: Session, network: Classifier, classes: np.ndarray, steps: int, seed: int
) -> TrainingTask:
    """All classes, from batches that are made as a specialist of `classes` has them."""
    schedule = compressed(session.config.specialists, steps)
    train = session.shards("train")
    inside = np.isin(train.labels, classes)
    batch = schedule.batch_size
    own = own_examples(schedule, not inside.all())
    order = balanced(train.labels, seed, schedule.balance, np.flatnonzero(inside))
    sources = [Source(train, order, own)]
    if own < batch:
        sources.append(Source(train, shuffled(np.flatnonzero(~inside), seed + 1), batch - own))
    log_prior = mixture_log_prior(train.class_counts, classes, own / batch, schedule.balance)
    objective = classify(
        schedule.label_smoothing,
        torch.as_tensor(log_prior, dtype=torch.float32),
        loss=loss_of(schedule),
    )
    stream = TrainingStream(sources, seed, session.augmentation())
    workers = session.workers
    # Its batches are not natural ones, as a specialist's are not.
    freeze_norm(network.requires_grad_(True), schedule.freeze_norm)
    return TrainingTask(network, objective, stream, schedule, steps, workers=workers)


# Branches


def branches(session: Session, attempt: Attempt, share: float, previous: Stage | None) -> Outcome:
    """Branches for one to four groups, from features of the examples that they need alone.

    They are as many as can be trained as long as a run's, and one where not even that one can.
    """
    generalist = load_network(session, session.run.generalist)
    section = branches_section(session.config.specialists, generalist)
    session = with_section(session, section)
    chosen = choose(session, previous, OF_BRANCHES)
    if not chosen.groups:
        return Outcome.not_possible(NO_ERRORS)
    try:
        cut = cut_at(generalist.trunk, section.blocks)
        branch_off(generalist, [0], section.embedding, section.blocks)
    except ValueError as error:
        return Outcome.not_possible(str(error))
    budget = FAMILIES["branches"].cost * share * whole_cost(session, generalist)
    training = BranchesOfRound(session, attempt, generalist, cut, chosen, previous)
    training.train(budget)
    members = {m: groups_of(session).members[m] for m in training.groups}
    special = [training.trained[name_of(m)] for m in members]
    answers = answers_of_groups(session, generalist, special, members, "branches")
    chosen = dataclasses.replace(chosen, groups=training.groups)
    full = [training.full * section.batch_size] * len(training.groups)
    seen = [training.steps * section.batch_size] * len(training.groups)
    return outcome_of(
        previous,
        training.trained,
        training.summaries,
        training.paid / whole_cost(session, generalist),
        answers,
        figures(session, answers, "branches", chosen, members)
        | lengths(seen, full)
        | {"model": section.model, **training.notes},
    )


class BranchesOfRound:
    """The branches of one round, trained at once, and what that and their features cost.

    groups: that get one, the first of those chosen where compute is short.  steps: that each has
    behind it, of `full`, those of a run's.  trained: by name.  paid: multiplications.
    """

    def __init__(
        self,
        session: Session,
        attempt: Attempt,
        generalist: Classifier,
        cut: Cut,
        chosen: Chosen,
        previous: Stage | None,
    ):
        self.session = session
        self.attempt = attempt
        self.generalist = generalist
        self.cut = cut
        self.chosen = chosen
        self.previous = previous if chosen.goes_on else None
        self.groups = chosen.groups
        self.full = branch_steps(session.config.specialists, own_counts(session))
        self.steps = chosen.begun[0] // session.config.specialists.batch_size
        self.trained: dict[str, Branch] = {}
        self.summaries: list[dict] = []
        self.notes: dict[str, Any] = {}
        self.paid = 0

    def train(self, budget: float) -> None:
        """Train as long as `budget` multiplications allow. Does nothing if all is done."""
        if self.chosen.finished:
            self.trained = {name_of(m): self._earlier(m) for m in self.groups}
            return
        session, generalist = self.session, self.generalist
        of_pass = multiplications(generalist, generalist.zero_input())
        wanted = self._wanted(budget, of_pass)
        self.groups = wanted.groups
        kept = extract(session, generalist, self.cut, wanted)
        began = time.monotonic()
        work = [self._work(kept, m) for m in self.groups]
        starts = [self._start(each) for each in work]
        of_step = sum(map(self._step_cost, starts))
        features = wanted.passes * of_pass
        steps = max(1, min(self.full - self.steps, int((budget - features) / of_step)))
        trainer = branch_trainer(session, generalist, kept, work, starts, steps)
        earlier = trainer.progress[0].seconds
        with session.ranks.watching():
            trainer.train()
        self.trained = {name_of(m): trainer.trained(i) for i, m in enumerate(self.groups)}
        self.steps += trainer.step
        self.paid = features + of_step * trainer.step
        self.notes = {"views": wanted.views, "features_of": len(wanted.train)}
        examples = trainer.step * session.config.specialists.batch_size
        self.summaries = [
            {
                "seconds": round(earlier + time.monotonic() - began, 3),
                "examples_seen": examples * len(work),
                "peak_memory_bytes": peak_memory(session.ranks),
                "steps": trainer.step,
            }
        ]

    def _wanted(self, budget: float, of_pass: int) -> Extraction:
        """Whose features are worth having for so many multiplications."""
        members = members_of(self.session, self.chosen)
        section = self.session.config.specialists
        # One branch that is nearly done says more than two that have hardly begun: W2 starts at 0.
        fewest = len(members) if self.chosen.goes_on else 1
        memory = MEMORY / row_bytes(row_shapes(self.generalist, self.cut))
        in_full, left = 0, []
        for classes in members.values():
            branch = branch_off(self.generalist, classes, section.embedding, section.blocks)
            in_full += self._step_cost(branch) * (self.full - self.steps)
            left.append(min((budget - in_full) / of_pass, memory))
        otherwise = min(PASSES * budget / of_pass, memory)
        return plan_extraction(self.session, members, left, otherwise, fewest)

    def _work(self, kept: BranchFeatures, m: int) -> BranchWork:
        part = "" if m == self.groups[0] else name_of(m)  # the first one's progress is the stage's
        if self.session.ranks.is_main and not part:
            self.attempt.publish_growing("metrics.jsonl")
        return BranchWork(
            self.session,
            self.generalist,
            kept,
            m,
            self.session.seed(f"pilot branches {self.chosen.number}", m),
            self.attempt.stage.checkpoints / part,
            self.attempt.path(str(Path(part, "metrics.jsonl"))),
        )

    def _start(self, work: BranchWork) -> Branch:
        if self.previous is not None:
            return self._earlier(work.index)
        return fresh_branch(self.session, self.generalist, work)

    def _earlier(self, m: int) -> Branch:
        assert self.previous is not None, "only what goes on has an earlier round"
        directory = self.previous.path(name_of(m))
        return load_branch(directory, self.session.ranks.device, builders_of(self.session.config))

    def _step_cost(self, branch: Branch) -> int:
        """Multiplications of a step: three times the branch's, and the generalist's own rows."""
        raw = self.generalist.preprocess(self.generalist.zero_input())
        own = torch.zeros(1, len(branch.classes), device=raw.device)
        with torch.no_grad():
            at_cut = self.cut.body(raw)
        forward = multiplications(branch, at_cut, own, own[:, 0])
        rows = len(branch.classes) * self.generalist.linear_head.in_features
        return (BACKWARD * forward + rows) * self.session.config.specialists.batch_size


def branches_section(section: ResolvedSpecialists, generalist: Classifier) -> ResolvedSpecialists:
    """[specialists] of branches, whatever the run's own specialists are."""
    if section.is_branch:
        return section
    features = generalist.linear_head.in_features
    own = {
        "kind": "branch",
        "from": START,
        "model": {"embedding": max(EMBEDDING, features)},
        "dustbin": "preserving",
        "dustbin_rows": None,
        "soft_weight": 1.0,
        "hard_negatives": 0.0,
        "trainable": "all",
        "freeze_norm": True,
        "ema": 0.0,
        "negatives": None,
    }
    return ResolvedSpecialists.model_validate({**section.model_dump(by_alias=True), **own})


# What both share


def with_section(session: Session, section: ResolvedSpecialists) -> Session:
    """The session, but for what [specialists] says. The run and its stages are the same."""
    changed = copy.copy(session)
    changed.config = session.config.model_copy(update={"specialists": section})
    return changed


def name_of(m: int) -> str:
    """What a group's network is called among those of a pilot."""
    return f"group-{m:03d}"


def members_of(session: Session, chosen: Chosen) -> dict[int, np.ndarray]:
    members = groups_of(session).members
    return {m: members[m] for m in chosen.groups}


def less(full: Sequence[int], begun: Sequence[int]) -> list[int]:
    return [whole - done for whole, done in zip(full, begun, strict=True)]


def add(begun: Sequence[int], further: Sequence[int]) -> list[int]:
    return [done + more for done, more in zip(begun, further, strict=True)]


def asks_teacher(section: ResolvedSpecialists) -> bool:
    """Whether the generalist answers each batch beside a copy that learns."""
    return section.trains_all_rows and section.dustbin == "full"


def training_cost(network: Classifier, teacher: Classifier | None) -> int:
    """Multiplications of training on an example."""
    own = multiplications(network, network.zero_input())
    if isinstance(network.head, DustbinHead):  # no layer that is counted
        own += network.head.weight.numel()
    asked = 0 if teacher is None else multiplications(teacher, teacher.zero_input())
    return BACKWARD * own + asked


def dearest(session: Session, generalist: Classifier) -> int:
    """The cost of training a copy or the control on an example, whichever is more."""
    with_teacher = asks_teacher(session.config.specialists)
    return training_cost(generalist, generalist if with_teacher else None)


def answers_of_groups(
    session: Session,
    generalist: Classifier,
    specialists: Sequence[Classifier | Branch],
    members: Mapping[int, np.ndarray],
    form: str,
) -> Answers:
    """The generalist on val, and `form`: the same joined by the specialists of a few groups."""
    answers = measured_forms(session, generalist, {}, {})
    of_groups = list(members.values())
    ids = referred_ids(session, of_groups)
    joined = joined_answers(session, generalist, specialists, of_groups, ids)
    return with_form(answers, form, joined["ids"], joined)


def with_control(
    session: Session,
    generalist: Classifier,
    control: Classifier,
    ids: np.ndarray,
    answers: Answers,
) -> Answers:
    """The control in place of the generalist on the same examples as the specialists."""
    measured = measured_forms(session, generalist, {CONTROL: control}, {CONTROL: CONTROL}, ids=ids)
    kinds = ("correct", "log_p", "brier")
    values = {kind: getattr(measured, kind)[CONTROL] for kind in kinds}
    return with_form(answers, CONTROL, measured.ids, values)


def figures(
    session: Session, answers: Answers, form: str, chosen: Chosen, members: Mapping[int, np.ndarray]
) -> dict[str, Any]:
    """What measured.json says of the groups: their ceilings, and what of these is healed."""
    predictions = val_predictions(session)
    kept = np.isin(predictions["ids"], answers.ids)
    labels, predicted = predictions["labels"][kept], predictions["top"][kept, 0]
    classes = session.num_classes
    possible = share_a_group(labels, predicted, list(members.values()), classes)
    skipped = skipped_groups(session)
    every = [own for m, own in enumerate(groups_of(session).members) if m not in skipped]
    before, after = answers.correct[GENERALIST], answers.correct[form]
    ratio, error = healed(before, after, possible)
    return {
        "groups": chosen.groups,
        "tried": chosen.tried,
        "referred": len(referred_ids(session, list(members.values()))),
        "ceiling": float(possible.mean()),
        "ceiling_all": float(share_a_group(labels, predicted, every, classes).mean()),
        "healed": ratio,
        "healed_se": error,
    }


def lengths(seen: Sequence[int], full: Sequence[int]) -> dict[str, Any]:
    """What measured.json says of how far each group's specialist is, in examples."""
    return {
        "seen": list(seen),
        "full_seen": list(full),
        "full_share": sum(seen) / sum(full),
    }


def outcome_of(
    previous: Stage | None,
    networks: Mapping[str, Classifier | Branch],
    trainings: list[dict],
    spent: float,
    answers: Answers,
    more: dict[str, Any],
) -> Outcome:
    """A round's outcome. Its share is of compute: specialists' steps are others."""
    earlier = 0.0 if previous is None else read_record(previous)["share"]
    return Outcome(dict(networks), earlier + spent, spent, trainings, answers, more)
