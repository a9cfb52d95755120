"""Many opinions, one distribution: a generalist's and its specialists' predictions, combined."""

from importlib import import_module

_HOMES = {
    "combine_kl": "combine",
    "combine_kl_sparse": "sparse",
    "gate": "gating",
    "COMBINERS": "pooling",
    "fit_weights": "fitting",
    "fit_temperature": "fitting",
    "fit_temperatures": "fitting",
    "fit_shift": "fitting",
    "SpecialistEnsemble": "specialist_ensemble",
    "EnsembleOutput": "specialist_ensemble",
    "DeepEnsemble": "deep_ensemble",
    "load_ensemble": "deep_ensemble",
    "EnsembleProgram": "export",
    "export_bundle": "export",
    "export_program": "export",
    "export_onnx": "export",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
