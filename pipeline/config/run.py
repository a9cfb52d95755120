"""The whole config: what a file may say, and what the trainer reads."""

from __future__ import annotations

import json

from pydantic import Field, model_validator

from ..choices import MEANS, NOT_OF_RERANKERS
from .base import Section
from .checks import check_all
from .schedule import (
    DEFAULT_SCHEDULE,
    DEFAULT_TRAIN,
    Rerank,
    ResolvedRerank,
    ResolvedSpecialists,
    ResolvedStudent,
    ResolvedTrain,
    Specialists,
    Student,
    Train,
    resolve,
)
from .sections import (
    Advise,
    Clusters,
    Controls,
    Data,
    Engine,
    Ensemble,
    Extend,
    Generalist,
    Launch,
    Model,
    Route,
)
from .slurm import Slurm


class ConfigFile(Section):
    """What a TOML file says. `resolve` fills in what it leaves out."""

    # of every draw: weights, order, augmentation, sampling
    seed: int = Field(default=0, ge=0, lt=2**31)
    data: Data = Data()
    model: Model = Model()
    train: Train = Train()
    generalist: Generalist = Generalist()
    extend: Extend = Extend()
    clusters: Clusters = Clusters()
    route: Route = Route()
    specialists: Specialists = Specialists()
    controls: Controls = Controls()
    ensemble: Ensemble = Ensemble()
    rerank: Rerank = Rerank()
    students: dict[str, Student] = {}
    advise: Advise = Advise()
    engine: Engine = Engine()
    launch: Launch = Launch()
    slurm: Slurm = Slurm()

    def resolve(self) -> Config:
        """The config with nothing left to inherit.

        Raises ValueError (or pydantic's ValidationError, one) where sections disagree.
        """
        train = resolve(self.train, DEFAULT_SCHEDULE, ResolvedTrain)
        students = {}
        for name, student in self.students.items():
            if student.balance:
                raise ValueError(
                    f"students.{name}.balance: students learn at natural frequencies; leave it out"
                )
            settled = {"balance": 0.0, "mean": student.mean or self._mean_of(student)}
            students[name] = resolve(student.model_copy(update=settled), train, ResolvedStudent)
        sections = {key: getattr(self, key) for key in ConfigFile.model_fields}
        sections["train"] = train
        # Of a sharded head, which no branch has.
        unsampled = train.model_copy(update={"negatives": None})
        base = unsampled if self.specialists.kind == "branch" else train
        sections["specialists"] = resolve(self.specialists, base, ResolvedSpecialists)
        able = {key: getattr(DEFAULT_SCHEDULE, key) for key in NOT_OF_RERANKERS}
        sections["rerank"] = resolve(self.rerank, train.model_copy(update=able), ResolvedRerank)
        sections["students"] = students
        return Config(**sections)

    def _mean_of(self, student: Student) -> str:
        """What a student that says no mean learns of several teachers."""
        of_deep = student.teacher == "ensemble" and self.ensemble.kind == "deep"
        if of_deep and self.ensemble.combine in MEANS:
            return self.ensemble.combine
        return "arithmetic"


class Config(ConfigFile):
    """What the trainer and the launcher read. `Config()` holds the defaults.

    `load_config` explains errors. `Config.model_validate(values)` takes the same nested tables.
    """

    train: ResolvedTrain = DEFAULT_TRAIN
    specialists: ResolvedSpecialists = resolve(Specialists(), DEFAULT_SCHEDULE, ResolvedSpecialists)
    rerank: ResolvedRerank = resolve(Rerank(), DEFAULT_SCHEDULE, ResolvedRerank)
    students: dict[str, ResolvedStudent] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_tables(cls, values):
        if not values or isinstance(values.get("train"), ResolvedTrain):
            return values
        config = ConfigFile.model_validate(values).resolve()
        return {key: getattr(config, key) for key in cls.model_fields}

    @model_validator(mode="after")
    def _agree(self):
        check_all(self)
        if not self.controls.learning_rates:
            peak = self.specialists.learning_rate
            rates = [peak / 3, peak, peak * 3]
            self.controls = self.controls.model_copy(update={"learning_rates": rates})
        return self

    @property
    def is_deep(self) -> bool:
        """Whether the ensemble is the mean of generalists, each of which can teach by itself."""
        return self.ensemble.kind == "deep"

    @property
    def has_specialists(self) -> bool:
        """Whether classes are grouped for specialists: an ensemble of generalists has none."""
        return self.ensemble.kind == "specialists"

    @property
    def has_rerankers(self) -> bool:
        """Whether the further networks are trained on the generalist's shortlists."""
        return self.ensemble.kind == "rerank"

    def dump(self) -> dict:
        """Plain JSON-able values, absent ones left out. Loads back to an equal Config."""
        return json.loads(self.model_dump_json(exclude_none=True, by_alias=True))
