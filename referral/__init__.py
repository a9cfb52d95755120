"""The public names of clustering, ensemble and networks in one place.

    from referral import ClassGroups, SpecialistEnsemble, combine_kl

Each is imported when it is first read: `import referral` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from pipeline.version import VERSION as __version__

if TYPE_CHECKING:
    from clustering import (
        ClassGroups,
        PredictionStatistics,
        captured_confusion,
        captured_unlabelled,
        group_classes,
    )
    from ensemble import (
        DeepEnsemble,
        EnsembleOutput,
        ShortlistEnsemble,
        SpecialistEnsemble,
        combine_kl,
        combine_kl_on_shortlist,
        combine_kl_sparse,
        export_bundle,
        export_onnx,
        export_program,
        fit_shift,
        fit_temperature,
        fit_temperatures,
        fit_weights,
        gate,
        generalised_mean,
        join_on_shortlist,
        load_ensemble,
        prediction_columns,
    )
    from networks import (
        BranchedClassifier,
        Classifier,
        InputSpec,
        ModelSpec,
        adopt_weights,
        build_classifier,
        load_branch,
        load_classifier,
        multiplications,
        parameter_count,
        read_inputs,
        read_picture,
        save_classifier,
        specialise,
        widen,
    )

_NAMES_OF = {
    "clustering": (
        "ClassGroups",
        "PredictionStatistics",
        "captured_confusion",
        "captured_unlabelled",
        "group_classes",
    ),
    "ensemble": (
        "DeepEnsemble",
        "EnsembleOutput",
        "ShortlistEnsemble",
        "SpecialistEnsemble",
        "combine_kl",
        "combine_kl_on_shortlist",
        "combine_kl_sparse",
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
    ),
    "networks": (
        "BranchedClassifier",
        "Classifier",
        "InputSpec",
        "ModelSpec",
        "adopt_weights",
        "build_classifier",
        "load_branch",
        "load_classifier",
        "multiplications",
        "parameter_count",
        "read_inputs",
        "read_picture",
        "save_classifier",
        "specialise",
        "widen",
    ),
}
__all__ = [
    "BranchedClassifier",
    "ClassGroups",
    "Classifier",
    "DeepEnsemble",
    "EnsembleOutput",
    "InputSpec",
    "ModelSpec",
    "PredictionStatistics",
    "ShortlistEnsemble",
    "SpecialistEnsemble",
    "adopt_weights",
    "build_classifier",
    "captured_confusion",
    "captured_unlabelled",
    "combine_kl",
    "combine_kl_on_shortlist",
    "combine_kl_sparse",
    "export_bundle",
    "export_onnx",
    "export_program",
    "fit_shift",
    "fit_temperature",
    "fit_temperatures",
    "fit_weights",
    "gate",
    "generalised_mean",
    "group_classes",
    "join_on_shortlist",
    "load_branch",
    "load_classifier",
    "load_ensemble",
    "multiplications",
    "parameter_count",
    "prediction_columns",
    "read_inputs",
    "read_picture",
    "save_classifier",
    "specialise",
    "widen",
    "__version__",
]
_HOMES = {name: room for room, names in _NAMES_OF.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
