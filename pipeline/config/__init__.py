"""The run's configuration: TOML in, checked values out.  No torch here: login nodes read it.

`load_config` reads a file.  `Schedule`, `Specialists` and `Student` are what a file may say,
where an absent key is inherited. The classes named Resolved... are what the trainer reads.
"""

from .base import Section, UserError
from .loading import flat, load_config, read_toml, save_config
from .run import Config, ConfigFile
from .schedule import (
    DEFAULT_SCHEDULE,
    NAME,
    Rerank,
    ResolvedRerank,
    ResolvedSchedule,
    ResolvedSpecialists,
    ResolvedStudent,
    ResolvedTrain,
    Schedule,
    Specialists,
    Student,
    check_batch_size,
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
from .slurm import Resources, Slurm

__all__ = [
    "DEFAULT_SCHEDULE",
    "NAME",
    "Advise",
    "Clusters",
    "Config",
    "ConfigFile",
    "Controls",
    "Data",
    "Engine",
    "Ensemble",
    "Extend",
    "Generalist",
    "Launch",
    "Model",
    "Rerank",
    "ResolvedRerank",
    "ResolvedSchedule",
    "ResolvedSpecialists",
    "ResolvedStudent",
    "ResolvedTrain",
    "Resources",
    "Route",
    "Schedule",
    "Section",
    "Slurm",
    "Specialists",
    "Student",
    "UserError",
    "check_batch_size",
    "flat",
    "load_config",
    "read_toml",
    "save_config",
]
