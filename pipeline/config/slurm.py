"""[slurm]: what each kind of job asks a cluster for."""

from __future__ import annotations

import datetime
import re

from pydantic import Field, field_validator, model_validator

from .base import Section

TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
OURS = ("--array", "--dependency", "--output", "--wrap", "--parsable")  # what referral itself says


class Resources(Section):
    """What Slurm is asked for.

    An absent key is taken from [slurm.default]. Where that has none, the site decides.
    """

    # machines of one job
    nodes: int | None = Field(default=None, gt=0)
    # on each node
    gpus: int | None = Field(default=None, ge=0)
    # on each node
    cpus: int | None = Field(default=None, gt=0)
    # memory of each node, such as "32G"
    memory: str | None = None
    # "90" (minutes), "HH:MM:SS", "DAYS-HH:MM:SS"
    time: str | None = None
    # partition, by sbatch's name
    partition: str | None = Field(default=None, min_length=1)
    # features that the nodes must have
    constraint: str | None = Field(default=None, min_length=1)
    # quality of service, by sbatch's name
    qos: str | None = Field(default=None, min_length=1)
    # account that is charged
    account: str | None = Field(default=None, min_length=1)
    # further options of sbatch. Those of [slurm.default] and the job's own
    extra: list[str] = []

    @field_validator("time", "memory", mode="before")
    @classmethod
    def _bare(cls, value):
        """TOML without quotes: 90 is a number, 04:00:00 a time of day."""
        if isinstance(value, (int, datetime.time)) and not isinstance(value, bool):
            return str(value)
        return value

    @field_validator("time")
    @classmethod
    def _time(cls, value):
        if value is not None and not TIME.fullmatch(value):
            raise ValueError('write minutes, "HH:MM:SS" or "DAYS-HH:MM:SS"')
        return value

    @field_validator("memory")
    @classmethod
    def _memory(cls, value):
        if value is not None and not re.fullmatch(r"[0-9]+[KMGT]?", value):
            raise ValueError('write a number and K, M, G or T, without B: "16G"')
        return value

    @field_validator("extra")
    @classmethod
    def _extra(cls, value):
        for option in value:
            if not re.match(r"--[a-z]", option):
                raise ValueError(
                    f'{option!r} is no long option of sbatch; write it as one word: "--name=value"'
                )
            if option.partition("=")[0] in OURS:
                raise ValueError(f"{option} is what referral itself says to sbatch")
        return value

    @property
    def seconds(self) -> int | None:
        """The time limit."""
        match = TIME.fullmatch(self.time or "")
        if match is None:
            return None
        days, first, second, third = (int(part or 0) for part in match.groups())
        if match[1] is not None:  # days-hours[:minutes[:seconds]]
            return days * 86400 + first * 3600 + second * 60 + third
        if match[4] is not None:  # hours:minutes:seconds
            return first * 3600 + second * 60 + third
        return first * 60 + second  # minutes[:seconds]


class Slurm(Section):
    """`referral run --on slurm`: what each kind of job asks for."""

    # how many specialists train at the same time
    throttle: int | None = Field(default=None, gt=0)
    # seconds before its time limit at which a job is asked for a checkpoint
    signal_s: int = Field(default=120, gt=0)
    default: Resources = Resources()
    generalist: Resources = Resources()
    members: Resources = Resources()
    clusters: Resources = Resources()
    specialists: Resources = Resources()
    ensemble: Resources = Resources()
    controls: Resources = Resources()
    students: Resources = Resources()
    report: Resources = Resources()

    @model_validator(mode="after")
    def _sound(self):
        for name in type(self).model_fields:
            section = getattr(self, name)
            if not isinstance(section, Resources):
                continue
            if section.seconds is not None and section.seconds <= 2 * self.signal_s:
                raise ValueError(
                    f'slurm.{name}.time = "{section.time}": a job is asked for a checkpoint '
                    f"slurm.signal_s = {self.signal_s} s before its end; "
                    "give it more than twice that"
                )
        return self

    def resources(self, name: str) -> Resources:
        """The resources of one kind of job, with [slurm.default] where it says nothing."""
        own = getattr(self, name, Resources())
        inherited = {
            key: value
            for key, value in self.default.model_dump().items()
            if getattr(own, key) is None
        }
        extra = [*self.default.extra, *own.extra]
        return own.model_copy(update={**inherited, "extra": extra})
