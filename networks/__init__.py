"""Build a network from model.json and safetensors: trunks, heads, dustbins, preprocessing.  Nothing of ours."""

from importlib import import_module

_HOMES = {
    "InputSpec": "spec",
    "ModelSpec": "spec",
    "builtin_options": "builders",
    "build_classifier": "classifier",
    "Classifier": "classifier",
    "parameter_count": "classifier",
    "DustbinHead": "heads",
    "lazy_logits": "heads",
    "Summary": "linear_logits",
    "fit_residual_row": "residual_row",
    "member_log_probabilities": "members",
    "mean_log_probabilities": "members",
    "RankOne": "members",
    "specialise": "surgery",
    "match_classes": "surgery",
    "add_classes": "surgery",
    "merge_grown_head": "surgery",
    "remap_specialist": "surgery",
    "hydra": "surgery",
    "batch_ensemble": "surgery",
    "set_trainable": "surgery",
    "freeze_norm": "surgery",
    "widen": "surgery",
    "save_classifier": "files",
    "load_classifier": "files",
    "adopt_weights": "files",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
