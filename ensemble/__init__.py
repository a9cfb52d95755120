"""Many predictions, one distribution: a generalist's and its specialists', combined."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .choices import COMBINERS, Combiner, combiner
    from .combine import combine_kl
    from .deep_ensemble import DeepEnsemble, load_ensemble
    from .export import (
        EnsembleProgram,
        export_bundle,
        export_onnx,
        export_program,
    )
    from .fitting import fit_shift, fit_temperature, fit_temperatures, fit_weights
    from .gating import gate
    from .mean_logits import MeanLogits
    from .programs import ensemble_program
    from .ranking import prediction_columns
    from .settings import EnsembleSettings
    from .shortlist import generalised_mean, join_on_shortlist
    from .shortlist_ensemble import ShortlistEnsemble
    from .shortlist_kl import combine_kl_on_shortlist
    from .sparse import combine_kl_sparse
    from .specialist_ensemble import EnsembleOutput, SpecialistEnsemble

__all__ = [
    "COMBINERS",
    "Combiner",
    "DeepEnsemble",
    "EnsembleOutput",
    "EnsembleProgram",
    "EnsembleSettings",
    "MeanLogits",
    "ShortlistEnsemble",
    "SpecialistEnsemble",
    "combine_kl",
    "combine_kl_on_shortlist",
    "combine_kl_sparse",
    "combiner",
    "ensemble_program",
    "export_bundle",
    "export_onnx",
    "export_program",
    "fit_shift",
    "fit_temperature",
    "fit_temperatures",
    "fit_weights",
    "gate",
    "generalised_mean",
    "join_on_shortlist",
    "load_ensemble",
    "prediction_columns",
]

# Where each name is defined. Its module is imported when the name is first used.
_HOMES = {
    "combine_kl": "combine",
    "combine_kl_sparse": "sparse",
    "combine_kl_on_shortlist": "shortlist_kl",
    "gate": "gating",
    "MeanLogits": "mean_logits",
    "COMBINERS": "choices",
    "Combiner": "choices",
    "combiner": "choices",
    "fit_weights": "fitting",
    "fit_temperature": "fitting",
    "fit_temperatures": "fitting",
    "fit_shift": "fitting",
    "SpecialistEnsemble": "specialist_ensemble",
    "EnsembleOutput": "specialist_ensemble",
    "EnsembleSettings": "settings",
    "DeepEnsemble": "deep_ensemble",
    "ShortlistEnsemble": "shortlist_ensemble",
    "generalised_mean": "shortlist",
    "join_on_shortlist": "shortlist",
    "load_ensemble": "deep_ensemble",
    "prediction_columns": "ranking",
    "EnsembleProgram": "export",
    "ensemble_program": "programs",
    "export_bundle": "export",
    "export_program": "export",
    "export_onnx": "export",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f".{_HOMES[name]}", __name__)
    except ModuleNotFoundError as error:
        text = f"{error}, which {__name__}.{name} needs; `referral doctor` says what to install"
        raise ModuleNotFoundError(text, name=error.name) from None
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
