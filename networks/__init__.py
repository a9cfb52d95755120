"""Build a network from model.json and safetensors: trunks, heads, dustbins, preprocessing.

Nothing of the other packages.  Names are imported when they are first used: importing networks, or
networks.choices, imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adoption import Adoption, adopt_weights
    from .branches import Branch, BranchedClassifier, branch_off, load_branch
    from .builders import builtin_options, declared_options
    from .candidates import candidates_of, cross_entropy_among
    from .classifier import Classifier, build_classifier, lazy_logits, parameter_count
    from .counting import multiplications
    from .drawing import draw_classes
    from .files import load_classifier, save_classifier
    from .freezing import freeze_norm, set_layer_decay, set_trainable
    from .gathered_rows import top_k
    from .growing import add_classes, match_classes, merge_grown_head, remap_specialist
    from .heads import DustbinHead
    from .linear_logits import Summary
    from .members import RankOne, mean_log_probabilities, member_log_probabilities
    from .multiplying import batch_ensemble, hydra
    from .pictures import PictureRules, read_picture
    from .reading import read_inputs
    from .residual_row import ResidualRow, fit_residual_row
    from .sizing import count_multiplications, scale, widened_to
    from .spec import InputSpec, ModelSpec, named_by
    from .specialising import specialise
    from .widening import widen

_MODULE_OF = {
    "Branch": "branches",
    "BranchedClassifier": "branches",
    "branch_off": "branches",
    "load_branch": "branches",
    "InputSpec": "spec",
    "ModelSpec": "spec",
    "named_by": "spec",
    "PictureRules": "pictures",
    "read_picture": "pictures",
    "read_inputs": "reading",
    "builtin_options": "builders",
    "declared_options": "builders",
    "candidates_of": "candidates",
    "cross_entropy_among": "candidates",
    "draw_classes": "drawing",
    "build_classifier": "classifier",
    "Classifier": "classifier",
    "lazy_logits": "classifier",
    "parameter_count": "classifier",
    "multiplications": "counting",
    "DustbinHead": "heads",
    "Summary": "linear_logits",
    "ResidualRow": "residual_row",
    "fit_residual_row": "residual_row",
    "member_log_probabilities": "members",
    "mean_log_probabilities": "members",
    "RankOne": "members",
    "count_multiplications": "sizing",
    "scale": "sizing",
    "widened_to": "sizing",
    "specialise": "specialising",
    "match_classes": "growing",
    "add_classes": "growing",
    "merge_grown_head": "growing",
    "remap_specialist": "growing",
    "hydra": "multiplying",
    "batch_ensemble": "multiplying",
    "set_layer_decay": "freezing",
    "set_trainable": "freezing",
    "freeze_norm": "freezing",
    "widen": "widening",
    "top_k": "gathered_rows",
    "save_classifier": "files",
    "load_classifier": "files",
    "Adoption": "adoption",
    "adopt_weights": "adoption",
}
__all__ = [
    "Adoption",
    "Branch",
    "BranchedClassifier",
    "Classifier",
    "DustbinHead",
    "InputSpec",
    "ModelSpec",
    "PictureRules",
    "RankOne",
    "ResidualRow",
    "Summary",
    "add_classes",
    "adopt_weights",
    "batch_ensemble",
    "branch_off",
    "build_classifier",
    "builtin_options",
    "candidates_of",
    "count_multiplications",
    "cross_entropy_among",
    "declared_options",
    "draw_classes",
    "fit_residual_row",
    "freeze_norm",
    "hydra",
    "lazy_logits",
    "load_branch",
    "load_classifier",
    "match_classes",
    "mean_log_probabilities",
    "member_log_probabilities",
    "merge_grown_head",
    "multiplications",
    "named_by",
    "parameter_count",
    "read_inputs",
    "read_picture",
    "remap_specialist",
    "save_classifier",
    "scale",
    "set_layer_decay",
    "set_trainable",
    "specialise",
    "top_k",
    "widen",
    "widened_to",
]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f".{_MODULE_OF[name]}", __name__)
    except ModuleNotFoundError as error:
        text = f"{error}, which {__name__}.{name} needs; `referral doctor` says what to install"
        raise ModuleNotFoundError(text, name=error.name) from None
    return getattr(module, name)
