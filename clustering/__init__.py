"""Which classes does the generalist confuse?  Statistics of its predictions, and groups of classes.

The names are imported when they are first read, so that `import clustering` loads nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .absent import group_trained_classes
    from .choices import METHODS
    from .grouping import group_classes, method_inputs
    from .groups import ClassGroups
    from .judging import GroupForecast, captured_confusion, captured_unlabelled, forecast
    from .statistics import PredictionStatistics, covariance_fits, predictions_to_keep
    from .tables import forecast_table

_MODULE_OF = {
    "METHODS": "choices",
    "ClassGroups": "groups",
    "GroupForecast": "judging",
    "PredictionStatistics": "statistics",
    "captured_confusion": "judging",
    "captured_unlabelled": "judging",
    "covariance_fits": "statistics",
    "forecast": "judging",
    "forecast_table": "tables",
    "group_classes": "grouping",
    "group_trained_classes": "absent",
    "method_inputs": "grouping",
    "predictions_to_keep": "statistics",
}
__all__ = [
    "METHODS",
    "ClassGroups",
    "GroupForecast",
    "PredictionStatistics",
    "captured_confusion",
    "captured_unlabelled",
    "covariance_fits",
    "forecast",
    "forecast_table",
    "group_classes",
    "group_trained_classes",
    "method_inputs",
    "predictions_to_keep",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f".{_MODULE_OF[name]}", __name__)
    except ModuleNotFoundError as error:
        text = f"{error}, which {__name__}.{name} needs; `referral doctor` says what to install"
        raise ModuleNotFoundError(text, name=error.name) from None
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
