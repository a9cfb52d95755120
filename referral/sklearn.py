"""ReferralClassifier: a run as scikit-learn's estimators are used.

    from referral.sklearn import ReferralClassifier

It is imported when it is first read: it needs torch and scikit-learn, which login nodes lack.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.estimator import ReferralClassifier

__all__ = ["ReferralClassifier"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("trainer.estimator"), name)


def __dir__() -> list[str]:
    return __all__
