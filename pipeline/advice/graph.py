"""The stages of `referral advise`: on the way to the groups, pilots in rounds, and the advice.

A run without groups (a deep ensemble, a shortlist's, re-rankers') gets them in a variant of its
config: the same generalist, and specialists.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import TYPE_CHECKING

from ..config import Config, UserError, load_config
from ..label_set import num_classes
from ..stages import KINDS
from ..store import Stage
from .halving import ROUNDS, round_shares
from .levers import FAMILIES, LEVERS, OF_KIND, Family, left_out, overridden

if TYPE_CHECKING:
    from ..graph import RunDirectory

GENERALISTS = ("seed", "data", "model", "train", "generalist")  # sections that every pilot reads


class AdviceGraph:
    """What `referral advise` does in a run. A function of its config and of its label set.

    asked: the run that is advised on.  run: the same, or its variant that has groups. Pilots are
    trained in this one.
    """

    def __init__(self, run: RunDirectory):
        self.asked = run
        self.num_classes, self.source = num_classes(run.config)
        self.run = run
        if not run.method.has_groups:
            self.run = type(run)(run.root, with_groups(run.config, self.num_classes))
            self.run.advice = self  # a pilot, which has this run, asks what it is a pilot for

    # Levers and families

    @cached_property
    def not_possible(self) -> dict[str, str]:
        """{lever: why it is excluded}, by this run, its data or advise.levers."""
        reasons = {name: self._why_not(name) for name in LEVERS}
        return {name: why for name, why in reasons.items() if why}

    def _why_not(self, lever: str) -> str:
        config = self.asked.config
        if config.extend.run:
            return "extend.run inherits its generalist, which learned from other examples"
        if lever == "stop":
            return ""
        if config.advise.levers and lever not in config.advise.levers:
            return "advise.levers leaves it out"
        try:
            self.run_with(lever).method.check(self.num_classes, self.source)
        except UserError as error:
            return str(error).removeprefix("config: ")
        grouped = any(FAMILIES[name].needs_groups for name in LEVERS[lever].families)
        if grouped and self.num_classes is not None and self.num_classes < 4:
            return f"{self.num_classes} classes do not make two groups"
        return ""

    @cached_property
    def levers(self) -> list[str]:
        """The levers that the advice is about, `stop` among them."""
        return [name for name in LEVERS if name not in self.not_possible]

    @cached_property
    def families(self) -> list[Family]:
        """The families that are piloted: each says what some lever is worth."""
        wanted = {self.family_of(lever) for lever in self.levers}
        return [family for family in FAMILIES.values() if family.name in wanted]

    @property
    def costs(self) -> dict[str, float]:
        """{family: cost of a share of the generalist's steps, over that share of its compute}."""
        return {family.name: family.cost for family in self.families}

    @property
    def may_go_on(self) -> list[str]:
        """The families of which the better half has a second round."""
        return [family.name for family in self.families if family.tells_more]

    def family_of(self, lever: str) -> str | None:
        """The family whose pilots say what a lever is worth. None for `stop`."""
        classes = self.num_classes or 0
        families = LEVERS[lever].families
        return next((name for name in families if classes >= FAMILIES[name].classes), None)

    def config_with(self, lever: str, entry: dict | None = None) -> Config:
        """The config of a run that goes on with a lever.

        entry: the lever's in advice.json.
        Raises UserError where the run's own settings exclude it.
        """
        values = self.asked.config.dump()
        changes = LEVERS[lever].overrides(values, entry or {})
        if changes.get("specialists.kind"):
            values["clusters"] = self.run.config.dump()["clusters"]
        return load_config(None, (), overridden(values, changes))

    def run_with(self, lever: str) -> RunDirectory:
        """The run as it would be with a lever: its stages, their keys and its sections."""
        return type(self.asked)(self.asked.root, self.config_with(lever))

    # Stages

    @property
    def generalist(self) -> Stage:
        return self.run.generalist

    @property
    def diagnosis(self) -> Stage:
        return self.run.diagnosis

    @cached_property
    def rounds(self) -> list[list[Stage]]:
        """The pilots of each round. One waits for all of the round before."""
        rounds: list[list[Stage]] = []
        for number in range(ROUNDS):
            before = rounds[-1] if rounds else []
            rounds.append([self._pilot(family, number, before) for family in self.families])
        return rounds

    @property
    def pilots(self) -> list[Stage]:
        return [stage for stages in self.rounds for stage in stages]

    def _pilot(self, family: Family, number: int, before: list[Stage]) -> Stage:
        """A pilot reads the config of the run that would go on with its lever."""
        lever = next(name for name in self.levers if self.family_of(name) == family.name)
        advise = self.asked.config.advise
        inputs = [*before, self.diagnosis] if before else [self.generalist]
        if family.needs_groups and not before:
            inputs = [self.run.route if family.name == "copies" else self.run.cluster]
        extra = {
            "family": family.name,
            "round": number,
            "budget": advise.budget,
            "families": [each.name for each in self.families],
        }
        if family.name == "wide":
            extra["own_model"] = self.asked.config.controls.model
        if family.name == "second":
            extra["shortlist"] = self.asked.config.ensemble.shortlist
        return self.run_with(lever).stage(
            "pilot",
            inputs,
            pilot_name(family.name, number),
            sections=(*GENERALISTS, *family.sections),
            kind=dataclasses.replace(KINDS["pilot"], schedule=family.schedule),
            **extra,
        )

    @cached_property
    def advice(self) -> Stage:
        """The keys of [advise] that change no pilot enter this stage's key alone."""
        advise = self.asked.config.advise
        return self.run.stage(
            "advice",
            [self.diagnosis, *self.pilots],
            levers=self.levers,
            scarce=advise.scarce,
            limit=advise.limit,
            workers=advise.workers,
        )

    @cached_property
    def stages(self) -> list[Stage]:
        """Every stage of an advice, in an order in which each stands behind its inputs."""
        groups = [self.run.measure, self.run.cluster, self.diagnosis]
        if any(family.name == "copies" for family in self.families):
            groups.append(self.run.route)
        return [self.generalist, *groups, *self.pilots, self.advice]

    def planned_share(self, stage: Stage) -> float:
        """About how much of the generalist's training a pilot costs, if it is not dropped."""
        family, number = parse_pilot(str(stage.address))
        shares = round_shares(self.costs, self.asked.config.advise.budget, self.may_go_on)
        return self.costs[family] * shares[number]

    def check(self) -> None:
        """Raises UserError where there is nothing to advise on."""
        if self.asked.config.extend.run:
            raise UserError(
                f"extend.run = {self.asked.config.extend.run}: an advice is about a generalist "
                "that its run trains or was given whole; ask it of that run"
            )
        if not self.families:
            reasons = [f"{name} ({why})" for name, why in self.not_possible.items()]
            raise UserError(f"there is nothing to advise on: {'; '.join(reasons)}")


def pilot_name(family: str, number: int) -> str:
    """The address of a pilot: FAMILY-ROUND."""
    return f"{family}-{number}"


def parse_pilot(name: str) -> tuple[str, int]:
    """(family, round) of a pilot's address."""
    family, _, number = name.rpartition("-")
    return family, int(number)


def with_groups(config: Config, classes: int | None) -> Config:
    """The config of a run of specialists of the same generalist, and without students.

    classes: of the label set. A group has two at least.
    """
    values = config.dump()
    shortlist = config.ensemble.shortlist
    changes = left_out("ensemble", (*OF_KIND, "members"))
    changes |= {"ensemble.kind": "specialists", "students": {}}
    if shortlist is not None and shortlist >= config.ensemble.gate:
        changes["ensemble.shortlist"] = shortlist
    if classes is not None:
        changes["clusters.num_groups"] = min(config.clusters.num_groups, max(1, classes // 2))
    return load_config(None, (), overridden(values, changes))
