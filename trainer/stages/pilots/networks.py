"""Pilots that train whole networks: the generalist on, a second or wider one, and a re-ranker.

T is the number of steps that [train] says. A share of it is trained by the same schedule
compressed, so that it anneals too.  Costs are counted in forward multiplications: training on an
example takes three times a network's own, a pass without gradients once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ensemble.shortlist import ARITHMETIC, GEOMETRIC
from networks import (
    Classifier,
    ModelSpec,
    build_classifier,
    load_classifier,
    multiplications,
    top_k,
    widen,
)
from pipeline.advice.levers import FAMILIES
from pipeline.config import ResolvedRerank, UserError
from pipeline.config.schedule import Resolved
from pipeline.store import Attempt, Stage

from ...core.loop import TrainingTask
from ...core.objectives import rerank
from ...data.streams import Batch
from ...engines.sharded import DistributedComm
from ...session import Session
from ..control_rows import PAIR, scaled_to
from ..networks import builders_of, fresh_network, load_network
from ..rerank import by_rows, start_of_reranker
from ..training import (
    generalist_task,
    labelled_stream,
    log_prior_of,
    train_network,
)
from .forms import measured_forms
from .measuring import Join
from .outcome import Outcome
from .rounds import better_form, read_record, whole_steps

SECOND = 1  # the number of the member that a pilot of a second network is the beginning of
SHORTLIST = 100  # classes, unless ensemble.shortlist says otherwise
PART_OF_RERANKER = 0.5  # of the generalist's steps, that a re-ranker is trained for
BACKWARD = 3  # times the multiplications forward that training takes
ROUNDING = 1e-6  # of a step: shares are quotients of whole numbers of steps


def pilot_on(session: Session, attempt: Attempt, share: float, previous: Stage | None) -> Outcome:
    """The generalist's weights, trained on."""
    generalist = load_network(session, session.run.generalist)
    network = load_network(session, session.run.generalist)
    if previous is not None:
        network = load_pilot(session, previous, "on")
    steps = steps_of(session, share)
    seed = session.seed("pilot on", round_of(previous))
    network, summary = train_on(session, attempt, network, seed, steps)
    return Outcome(
        {"on": network},
        share_so_far(session, previous, [summary]),
        spent(session, generalist, [(network, summary)]),
        [summary],
        measured_forms(session, generalist, {"on": network}, {"on": "on"}),
    )


def pilot_second(
    session: Session, attempt: Attempt, share: float, previous: Stage | None
) -> Outcome:
    """The beginning of the member that a deep ensemble, or the row `average`, would train."""
    generalist = load_network(session, session.run.generalist)
    seed = session.seed("member", SECOND)
    if previous is None:
        network = fresh_network(session, seed=seed)
    else:
        network = load_pilot(session, previous, "second")
        seed = session.seed("pilot second", round_of(previous))
    steps = steps_of(session, share)
    network, summary = train_on(session, attempt, network, seed, steps)
    answers = measured_forms(
        session, generalist, {"second": network}, {"alone": "second"}, joins_of_second(session)
    )
    return Outcome(
        {"second": network},
        share_so_far(session, previous, [summary]),
        spent(session, generalist, [(network, summary)]),
        [summary],
        answers,
        {"residual_correlation": answers.residual_correlation("alone")},
    )


def joins_of_second(session: Session) -> dict[str, Join]:
    """How a second network can be joined: by both means over all classes, and on a shortlist."""
    return {
        "average": Join("second", ARITHMETIC),
        "geometric": Join("second", GEOMETRIC),
        "shortlist": Join("second", GEOMETRIC, shortlist_length(session)),
    }


def shortlist_length(session: Session) -> int:
    """How many classes a second generalist is asked about, at most all.

    The run that is advised on says it: its variant with groups, which trains the pilots, asks none.
    """
    config = session.run.advice.asked.config.ensemble
    length = config.shortlist if config.asks_shortlists and config.shortlist else SHORTLIST
    return min(length, session.num_classes)


def pilot_wide(session: Session, attempt: Attempt, share: float, previous: Stage | None) -> Outcome:
    """A network of about twice the generalist's multiplications: fresh, and grown from it.

    In the first round both share the family's compute, half of it each. The more promising one has
    all of it in the next.  A network larger than that (controls.model) takes fewer steps.
    """
    generalist = load_network(session, session.run.generalist)
    more: dict = {}
    try:
        if previous is None:
            seed = session.seed("control wider", 0)
            networks = wider_networks(session, generalist, seed, more)
        else:
            name = better_form(read_record(previous))
            seed = session.seed("pilot wide", round_of(previous))
            networks = {name: load_pilot(session, previous, name)}
    except ValueError as error:
        return Outcome.not_possible(str(error))
    trained, summaries = {}, []
    for name, network in networks.items():
        cost = BACKWARD * multiplications(network, network.zero_input())
        paid = FAMILIES["wide"].cost * share * whole_cost(session, generalist) / cost
        examples = min(paid, share * whole_examples(session)) / len(networks)
        steps = steps_of(session, examples / whole_examples(session))
        part = name if trained else ""  # the first one's progress is the stage's
        trained[name], summary = train_on(session, attempt, network, seed, steps, part)
        summaries.append(summary)
    costs = list(zip(trained.values(), summaries, strict=True))
    return Outcome(
        trained,
        share_so_far(session, previous, summaries),
        spent(session, generalist, costs),
        summaries,
        measured_forms(session, generalist, trained, {name: name for name in trained}),
        more,
    )


def wider_networks(
    session: Session, generalist: Classifier, seed: int, more: dict
) -> dict[str, Classifier]:
    """A fresh network, `scratch`, and `grown` where the generalist can be widened to its shape.

    more: is told why it cannot.  ValueError for a network that has no width.
    """
    builders = builders_of(session.config)
    spec = wider_spec(session, generalist)
    torch.manual_seed(seed)
    networks = {"scratch": build_classifier(spec, builders).to(session.ranks.device)}
    try:
        networks["grown"] = widen(generalist, spec, torch.Generator().manual_seed(seed))
    except ValueError as error:
        more["grown_not_possible"] = str(error)
    return networks


def wider_spec(session: Session, generalist: Classifier) -> ModelSpec:
    """The spec of controls.model, or the generalist's own with wider layers."""
    if session.config.controls.model:
        return fresh_network(session, own_model=session.config.controls.model).spec
    target = PAIR * multiplications(generalist, generalist.zero_input())
    return scaled_to(session, generalist.spec, target)


def pilot_rerank(
    session: Session, attempt: Attempt, share: float, previous: Stage | None
) -> Outcome:
    """A re-ranker, trained on shortlists that are found of the examples that it sees alone."""
    if session.config.engine.precision == "fp16":
        return Outcome.not_possible(
            'engine.precision = "fp16": rows of a re-ranker\'s head are stepped without loss '
            'scaling; take "bf16"'
        )
    generalist = load_network(session, session.run.generalist).requires_grad_(False)
    seed = session.seed("member", SECOND)
    if previous is None:
        network = start_of_reranker(session, seed)
    else:
        network = load_pilot(session, previous, "rerank")
        seed = session.seed("pilot rerank", round_of(previous))
    section = session.config.rerank
    k = min(section.k, session.num_classes)
    cost = cost_of_reranking(network, generalist, k, section.random)
    paid = FAMILIES["rerank"].cost * share * whole_cost(session, generalist) / cost
    examples = min(paid, PART_OF_RERANKER * share * whole_examples(session))
    steps = max(1, int(examples / section.batch_size))
    try:
        task = rerank_task(session, generalist, network, section, k, seed, steps)
    except UserError as error:  # a network that has nothing but its head to learn
        return Outcome.not_possible(str(error))
    torch.manual_seed(seed)
    network, summary = train_network(session, attempt, task)
    joins = {"rerank": Join("rerank", GEOMETRIC, k)}
    return Outcome(
        {"rerank": network},
        share_so_far(session, previous, [summary]),
        summary["examples_seen"] * cost / whole_cost(session, generalist),
        [summary],
        measured_forms(session, generalist, {"rerank": network}, {}, joins),
    )


def rerank_task(
    session: Session,
    generalist: Classifier,
    network: Classifier,
    section: ResolvedRerank,
    k: int,
    seed: int,
    steps: int,
) -> TrainingTask:
    """As in trainer.stages.rerank, but for where shortlists come from, and how long it is."""
    schedule = compressed(section, steps)
    objective = rerank(
        shortlists_on_the_fly(generalist, k),
        section.random,
        session.num_classes,
        comm=lambda batch: DistributedComm(bounds=()).of(batch.labels, even=True),
        head=by_rows(network),
        log_prior=log_prior_of(session, schedule),
    )
    stream = labelled_stream(session, schedule, seed)
    return TrainingTask(network, objective, stream, schedule, steps, workers=session.workers)


def shortlists_on_the_fly(generalist: Classifier, k: int) -> Callable[[Batch], Tensor]:
    """batch -> the generalist's k likeliest classes of each input as the re-ranker sees it."""

    @torch.no_grad()
    def shortlists(batch: Batch) -> Tensor:
        return top_k(generalist.eval()(batch.inputs).float(), k)[1]

    return shortlists


def cost_of_reranking(network: Classifier, generalist: Classifier, k: int, random: int) -> int:
    """Multiplications of training a re-ranker on one example, the generalist's answer included.

    Of its head it reads the rows of the label, of the shortlist and of what is drawn.
    """
    classes, features = network.linear_head.weight.shape
    whole = multiplications(network, network.zero_input())
    rows = min(1 + k, classes) + min(random, classes)
    asked = whole - classes * features + rows * features
    return BACKWARD * asked + multiplications(generalist, generalist.zero_input())


# What all of them share


def load_pilot(session: Session, previous: Stage, name: str) -> Classifier:
    """A network of an earlier round's pilot."""
    directory = previous.path(name)
    return load_classifier(directory, session.ranks.device, builders_of(session.config))


def round_of(previous: Stage | None) -> int:
    """The number of the round that follows."""
    return 0 if previous is None else read_record(previous)["round"] + 1


def train_on(
    session: Session,
    attempt: Attempt,
    network: Classifier,
    seed: int,
    steps: int,
    part: str = "",
) -> tuple[Classifier, dict]:
    """The network after so many steps of [train], compressed, and the summary of its training."""
    schedule = compressed(session.config.train, steps)
    task = generalist_task(session, network, schedule, None, seed, steps)
    torch.manual_seed(seed)  # of dropout
    return train_network(session, attempt, task, part)


def compressed(schedule: Resolved, steps: int) -> Resolved:
    """The schedule, compressed to so many steps.

    It ends where it ends: a best step that is chosen on val would be measured on what chose it.
    """
    length = {"steps": steps, "epochs": None, "validate_every": 0, "patience": 0}
    return schedule.model_copy(update=length)


def steps_of(session: Session, share: float) -> int:
    """A share of the generalist's steps. At least 1."""
    return max(1, int(share * whole_steps(session) + ROUNDING))


def whole_examples(session: Session) -> int:
    """What the generalist sees in its T steps."""
    return whole_steps(session) * session.config.train.batch_size


def whole_cost(session: Session, generalist: Classifier) -> int:
    """Multiplications of the generalist's training, by which all costs are divided."""
    own = multiplications(generalist, generalist.zero_input())
    return BACKWARD * own * whole_examples(session)


def spent(
    session: Session, generalist: Classifier, trained: list[tuple[Classifier, dict]]
) -> float:
    """What trainings have cost, as a share of the generalist's."""
    counts = [
        BACKWARD * multiplications(network, network.zero_input()) * summary["examples_seen"]
        for network, summary in trained
    ]
    return sum(counts) / whole_cost(session, generalist)


def share_so_far(session: Session, previous: Stage | None, summaries: list[dict]) -> float:
    """The share of the generalist's steps that each network has taken in all rounds."""
    earlier = 0.0 if previous is None else read_record(previous)["share"]
    return earlier + summaries[0]["examples_seen"] / whole_examples(session)
