"""The former address of `pipeline.config`, for programs that were written against it."""

from pipeline.config import (
    Config,
    Data,
    Engine,
    Schedule,
    Student,
    UserError,
    load_config,
    save_config,
)

__all__ = [
    "Config",
    "Data",
    "Engine",
    "Schedule",
    "Student",
    "UserError",
    "load_config",
    "save_config",
]
