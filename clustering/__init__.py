"""Which classes does the generalist confuse?  Statistics of its predictions, groups, what they capture."""

from importlib import import_module

_HOMES = {
    "ClassGroups": "groups",
    "PredictionStatistics": "statistics",
    "group_classes": "grouping",
    "captured_confusion": "judging",
    "captured_unlabelled": "judging",
    "forecast": "judging",
    "forecast_table": "judging",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
