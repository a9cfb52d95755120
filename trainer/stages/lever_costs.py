"""What each lever of an advice takes, were it pulled in full: training, and what an answer takes.

Training is counted in multiplications, as a share of the generalist's own: three times a network's
for each example that it learns from, once for a pass without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensemble import DeepEnsemble, ShortlistEnsemble
from networks import (
    Branch,
    Classifier,
    branch_off,
    build_classifier,
    multiplications,
    parameter_count,
)
from networks.cutting import cut_at
from pipeline.advice.document import Amounts
from pipeline.advice.levers import STUDENT
from pipeline.config import ResolvedSpecialists

from ..core.latency import latencies_ms
from ..session import Session
from .grouping import groups_of, skipped_groups
from .networks import builders_of, load_network
from .pilots.group_answers import val_predictions
from .pilots.groups import (
    branches_section,
    copies_section,
    dearest,
    full_steps,
    with_section,
)
from .pilots.networks import (
    BACKWARD,
    PART_OF_RERANKER,
    cost_of_reranking,
    shortlist_length,
    whole_cost,
    whole_examples,
    wider_spec,
)
from .training import branch_steps, count_steps

PAIRED = 2  # generalists
LATENCY_INPUTS = 64  # of val, that latency is measured on
BRANCHES_COUNTED = 16  # groups, at most. The others cost what these do on average


@dataclass(frozen=True)
class Answered:
    """What an answer takes, the generalist in it."""

    multiplications: float
    parameters: float
    latency_ms: float


class LeverCosts:
    """The amounts of every lever for one generalist.

    workers: that train side by side.  piloted: measured.json of the last pilot of branches, where
    there was one: a run that goes on with them trains branches of that shape, for as long.
    """

    def __init__(self, session: Session, workers: int, piloted: Mapping[str, Any] | None = None):
        self.session = session
        self.workers = workers
        self.piloted = piloted or {}
        self.generalist = load_network(session, session.run.generalist).eval()
        self.own_multiplications = multiplications(self.generalist, self.generalist.zero_input())
        self.whole = whole_cost(session, self.generalist)

    def amounts(self, lever: str) -> Amounts:
        """Raises ValueError, with the reason, for one that this generalist does not allow."""
        training, wall_clock, answered = COSTS[lever](self)
        return Amounts(
            training=training,
            wall_clock=wall_clock,
            multiplications=answered.multiplications,
            parameters=answered.parameters,
            latency_ms=answered.latency_ms,
        )

    # What an answer takes

    @cached_property
    def raw(self) -> Tensor:
        """Inputs of val."""
        val = self.session.shards("val")
        ids = np.unique(np.linspace(0, len(val) - 1, min(len(val), LATENCY_INPUTS)).astype(int))
        return torch.as_tensor(val.inputs(ids)).to(self.session.ranks.device)

    def latency(self, answer: Callable[[Tensor], object], raw: Tensor | None = None) -> float:
        return latencies_ms(answer, self.raw if raw is None else raw, [1])["1"]

    def of_network(self, network: Classifier) -> Answered:
        network = network.eval()
        return Answered(
            multiplications(network, network.zero_input()),
            parameter_count(network),
            self.latency(lambda raw: network(raw).softmax(1)),
        )

    @cached_property
    def generalists(self) -> Answered:
        return self.of_network(self.generalist)

    @cached_property
    def wide(self) -> Classifier:
        """A network of the shape that `wider` trains. Its weights are nobody's."""
        spec = wider_spec(self.session, self.generalist)
        with torch.random.fork_rng(devices=[]):
            network = build_classifier(spec, builders_of(self.session.config))
        return network.to(self.session.ranks.device)

    def pair(self) -> Answered:
        """Two generalists averaged. The second has the first one's shape."""
        ensemble = DeepEnsemble([self.generalist, self.generalist])
        return Answered(
            ensemble.multiplications(),
            2 * self.generalists.parameters,
            self.latency(ensemble.probabilities),
        )

    def on_shortlist(self, length: int) -> Answered:
        ensemble = ShortlistEnsemble([self.generalist, self.generalist], length)
        return Answered(
            ensemble.multiplications(),
            2 * self.generalists.parameters,
            self.latency(ensemble.probabilities),
        )

    # Specialists

    @cached_property
    def asked(self) -> float:
        """How many specialists an example of val asks, on average."""
        top = val_predictions(self.session)["top"][:, : self.session.config.ensemble.gate]
        return float(sum(np.isin(top, own).any(axis=1).mean() for own in self.groups.values()))

    @cached_property
    def groups(self) -> Mapping[int, np.ndarray]:
        """The classes of each group that gets a specialist."""
        skipped = skipped_groups(self.session)
        members = groups_of(self.session).members
        return {m: classes for m, classes in enumerate(members) if m not in skipped}

    @cached_property
    def branch_section(self) -> ResolvedSpecialists:
        section = branches_section(self.session.config.specialists, self.generalist)
        return section.model_copy(update={"model": self.piloted.get("model", section.model)})

    @cached_property
    def examples_of_branch(self) -> int:
        """Examples that each branch sees. All are trained at once, for as many steps."""
        if self.piloted:
            return max(self.piloted["full_seen"])
        section, counts = self.branch_section, self.session.shards("train").class_counts
        own = [int(counts[classes].sum()) for classes in self.groups.values()]
        return branch_steps(section, own) * section.batch_size

    @cached_property
    def fresh_branches(self) -> list[Branch]:
        """Fresh branches of some groups."""
        section, every = self.branch_section, list(self.groups.values())
        places = np.linspace(0, len(every) - 1, min(len(every), BRANCHES_COUNTED)).astype(int)
        with torch.random.fork_rng(devices=[]):
            return [
                branch_off(self.generalist, every[place], section.embedding, section.blocks)
                for place in places
            ]

    @cached_property
    def at_cut(self) -> Tensor:
        """What branches read of one example."""
        cut = cut_at(self.generalist.trunk, self.branch_section.blocks)
        with torch.inference_mode():
            return cut.body(self.generalist.preprocess(self.raw))

    def of_branch(self, branch: Branch) -> Answered:
        """What a branch takes beside the generalist."""
        own = torch.zeros(1, len(branch.classes), device=self.at_cut.device)
        branch = branch.eval()
        return Answered(
            multiplications(branch, self.at_cut[:1], own, own[:, 0]),
            parameter_count(branch),
            self.latency(lambda at_cut: branch(at_cut, own, own[:, 0]), self.at_cut),
        )

    def side_by_side(self, jobs: list[float]) -> float:
        """Time of independent jobs on the workers: at least the longest, and an equal share."""
        return max(max(jobs), sum(jobs) / self.workers)


Costed = tuple[float, float, Answered]  # training, wall clock, an answer


def stop(costs: LeverCosts) -> Costed:
    return 0.0, 0.0, costs.generalists


def train_on(costs: LeverCosts) -> Costed:
    return 1.0, 1.0, costs.generalists


def wider(costs: LeverCosts) -> Costed:
    answered = costs.of_network(costs.wide)
    training = answered.multiplications / costs.own_multiplications
    return training, training, answered


def average(costs: LeverCosts) -> Costed:
    return 1.0, 1.0, costs.pair()


def shortlist(costs: LeverCosts) -> Costed:
    return 1.0, 1.0, costs.on_shortlist(shortlist_length(costs.session))


def average_student(costs: LeverCosts) -> Costed:
    """A second generalist, then a student. Both answer what it sees, or once what is stored."""
    run = costs.session.run.advice.run_with("average_student")
    student, train = run.config.students[STUDENT], costs.session.shards("train").num_samples
    seen = count_steps(student, train) * student.batch_size
    answered = seen if run.targets_for(STUDENT) is None else train * (student.views or 1)
    whole = whole_examples(costs.session)
    training = 1.0 + seen / whole + PAIRED * answered / (BACKWARD * whole)
    return training, training, costs.generalists


def rerank(costs: LeverCosts) -> Costed:
    """The shortlists of all training examples, and half the generalist's steps."""
    session, section = costs.session, costs.session.config.rerank
    k = min(section.k, session.num_classes)
    found = costs.own_multiplications
    of_example = cost_of_reranking(costs.generalist, costs.generalist, k, section.random) - found
    lists = len(session.shards("train")) * found
    learned = PART_OF_RERANKER * whole_examples(session) * of_example
    training = (lists + learned) / costs.whole
    return training, training, costs.on_shortlist(k)


def copies(costs: LeverCosts) -> Costed:
    session = with_section(costs.session, copies_section(costs.session.config.specialists))
    steps = full_steps(session, costs.groups)
    of_step = dearest(session, costs.generalist) * session.config.specialists.batch_size
    jobs = [count * of_step / costs.whole for count in steps]
    own = costs.generalists
    answered = Answered(
        own.multiplications * (1 + costs.asked),
        own.parameters * (1 + len(costs.groups)),
        own.latency_ms * (1 + costs.asked),
    )
    return sum(jobs), costs.side_by_side(jobs), answered


def branches(costs: LeverCosts) -> Costed:
    """Features of all examples first, then every group's steps."""
    session = with_section(costs.session, costs.branch_section)
    section, train = session.config.specialists, session.shards("train")
    each = [costs.of_branch(branch) for branch in costs.fresh_branches]
    mean = Answered(*(float(np.mean(values)) for values in zip(*map(_values, each), strict=True)))
    views = section.views_of(session.config.data.augment)
    passes = views * len(train) + len(session.shards("val"))
    features = passes * costs.own_multiplications / costs.whole
    learned = costs.examples_of_branch * BACKWARD * mean.multiplications / costs.whole
    jobs = [learned] * len(costs.groups)
    own = costs.generalists
    answered = Answered(
        own.multiplications + costs.asked * mean.multiplications,
        own.parameters + len(costs.groups) * mean.parameters,
        own.latency_ms + costs.asked * mean.latency_ms,
    )
    return features + sum(jobs), features + costs.side_by_side(jobs), answered


def _values(answered: Answered) -> tuple[float, float, float]:
    return answered.multiplications, answered.parameters, answered.latency_ms


COSTS: dict[str, Callable[[LeverCosts], Costed]] = {
    "stop": stop,
    "train_on": train_on,
    "wider": wider,
    "average": average,
    "shortlist": shortlist,
    "average_student": average_student,
    "rerank": rerank,
    "copies": copies,
    "branches": branches,
}
