"""An ensemble as files that need no run: a bundle, and for small ensembles one program."""

from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from networks import Branch, save_classifier
from networks.files import write_safetensors
from networks.temporaries import appearing

from .combine import combine_unrolled
from .gating import static_gate
from .lazy_specialists import specialist_folder
from .patterns import SharedIndex, set_patterns
from .predictions import softmax, working_dtype
from .settings import EnsembleSettings
from .sharing import shared_names
from .specialist_ensemble import GROUPS, SpecialistEnsemble

# Beyond so many specialists a program that runs all of them, and solves for all at once, is the
# wrong tool.
LARGEST_PROGRAM = 16
# Nodes of a program that torch's exporter rewrites for ONNX.  It takes minutes over the steps of
# Newton's method, unrolled (some 3,000 nodes), and onnxruntime optimises what it opens anyway.
MOST_OPTIMISED = 1000


class BundleSizes(TypedDict):
    """tensors: how many the specialists have.  shared: not stored again.  bytes: of all files."""

    tensors: int
    shared: int
    bytes: int


def export_bundle(ensemble: SpecialistEnsemble, directory: str | Path) -> BundleSizes:
    """Write `directory`, laid out as a run is, for SpecialistEnsemble.load.

    It holds model.json and safetensors of every network, and ensemble.json.  A specialist's tensors
    that equal the generalist's are stored once, with the generalist.

    Parameters
    ----------
    ensemble : SpecialistEnsemble
    directory : path
        Made where it does not exist.

    Returns
    -------
    dict
        "tensors": how many tensors the specialists have.  "shared": how many of them were not
        stored again.  "bytes": the size of the directory.
    """
    root = Path(directory)
    (root / "clusters").mkdir(parents=True, exist_ok=True)
    save_classifier(ensemble.generalist, root / "generalist")
    ensemble.groups.save(root / GROUPS)
    shared = {str(m): _save_specialist(ensemble, m, root) for m in ensemble.specialists}
    settings = EnsembleSettings(
        gate=ensemble.gate,
        max_specialists=ensemble.max_specialists,
        combine=ensemble.combine,
        temperatures=ensemble.temperatures,
        weights=None if ensemble.weights is None else [float(w) for w in ensemble.weights],
        skipped=ensemble.skipped,
        missing=ensemble.missing,
        shared=shared,
        shortlist=ensemble.shortlist,
    )
    settings.save(root)
    return BundleSizes(
        tensors=sum(len(ensemble.specialists[m].state_dict()) for m in ensemble.specialists),
        shared=sum(map(len, shared.values())),
        bytes=sum(path.stat().st_size for path in root.rglob("*") if path.is_file()),
    )


def _save_specialist(ensemble: SpecialistEnsemble, m: int, root: Path) -> list[str]:
    """Write specialist m's own tensors.  Returns the names of those that are the generalist's."""
    specialist = ensemble.specialists[m]
    if isinstance(specialist, Branch):  # none of its tensors is the generalist's
        save_classifier(specialist, specialist_folder(root, m))
        return []
    folder = specialist_folder(root, m)
    folder.mkdir(parents=True, exist_ok=True)
    shared = shared_names(ensemble.generalist, specialist)
    left_out = set(shared)
    own = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in specialist.state_dict().items()
        if name not in left_out
    }
    write_safetensors(own, folder / "model.safetensors")
    specialist.spec.save(folder / "model.json")
    return shared


class EnsembleProgram(nn.Module):
    """The whole ensemble with shapes that do not depend on the data.

    Every specialist runs on every row. The gate only weighs.  forward(raw [B, ...]) -> q [B, C].

    Parameters
    ----------
    ensemble : SpecialistEnsemble
        The program stays on its device.
    portable : bool
        Solve by products and sums alone, as ONNX needs it. The graph is larger then.

    Raises
    ------
    ValueError
        For more than LARGEST_PROGRAM specialists, and for another combiner than eq. 5.

    Notes
    -----
    newton.UNROLLED_STEPS steps are taken.  Absurdly conflicting predictions (probabilities that
    underflow) may need more.
    """

    index: SharedIndex | None
    membership: Tensor
    special_weights: Tensor

    def __init__(self, ensemble: SpecialistEnsemble, portable: bool = False):
        super().__init__()
        numbers = list(ensemble.specialists)
        if len(numbers) > LARGEST_PROGRAM:
            raise ValueError(
                f"{len(numbers)} specialists are too many for one program ({LARGEST_PROGRAM}); "
                "export the bundle"
            )
        if ensemble.combine != "kl":
            raise ValueError(f"combine = {ensemble.combine!r} has no program; only kl has")
        weights = ensemble.all_weights
        self.portable = portable
        self.generalist = ensemble.generalist
        self.specialists = nn.ModuleList(ensemble.specialists[m] for m in numbers)
        self.gate = ensemble.gate
        self.max_specialists = ensemble.max_specialists
        self.general_temperature = ensemble.temperatures[0]
        self.temperatures = [ensemble.temperatures[1 + m] for m in numbers]
        self.general_weight = float(weights[0])

        groups = ensemble.groups
        membership = torch.zeros(groups.num_classes, len(numbers))
        for column, m in enumerate(numbers):
            membership[torch.tensor(groups.members[m]), column] = 1
        self.register_buffer("membership", membership.to(ensemble.device), persistent=False)
        special_weights = [float(weights[1 + m]) for m in numbers]
        self.register_buffer(
            "special_weights",
            torch.tensor(special_weights, dtype=torch.float64, device=ensemble.device),
            persistent=False,
        )
        self.index = None
        if numbers:
            dtype = working_dtype(next(ensemble.generalist.parameters()).dtype)
            patterns = set_patterns(groups, tuple(numbers))
            self.index = patterns.on(ensemble.device, dtype, groups.num_classes)
            # Made now: while a program is traced, what is made and kept is a placeholder.
            _ = self.index.outside_all

    def forward(self, raw: Tensor) -> Tensor:
        logits = self.generalist(raw)
        p_general = softmax(logits, self.general_temperature)
        if self.index is None:
            return p_general
        p_special = [
            softmax(specialist(raw), temperature)
            for specialist, temperature in zip(self.specialists, self.temperatures, strict=True)
        ]
        active = static_gate(softmax(logits, 1.0), self.membership, self.gate, self.max_specialists)
        return combine_unrolled(
            p_general,
            p_special,
            self.general_weight,
            active.double() * self.special_weights,
            self.index,
            self.portable,
        )


def export_program(module: nn.Module, example: Tensor, path: str | Path) -> Path:
    """torch.export of a network or an EnsembleProgram, with any batch size.

    Parameters
    ----------
    module : nn.Module
        Put into eval mode.
    example : Tensor [B, ...]
        Raw inputs, 2 rows or more.
    path : path
        Where to save it (.pt2).

    Returns
    -------
    Path
        `path`.
    """
    path = Path(path)
    module = module.eval()
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
    with appearing(path, ".pt2") as unfinished:
        torch.export.save(program, unfinished)
    return path


def export_onnx(module: nn.Module, example: Tensor, path: str | Path) -> Path:
    """Export a network or an EnsembleProgram as ONNX, with any batch size.

    Parameters
    ----------
    module, example, path
        As in `export_program`.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    ValueError
        Where the packages of the extra `onnx` are not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{error.name} is not installed; pip install onnx onnxscript onnxruntime"
        ) from None
    path = Path(path)
    batch = torch.export.Dim("batch", min=1)
    with appearing(path, ".onnx") as unfinished, torch.no_grad():
        program = torch.export.export(module.eval(), (example,), dynamic_shapes=({0: batch},))
        torch.onnx.export(
            program,
            (),
            str(unfinished),
            input_names=["raw"],
            output_names=["probabilities"],
            optimize=len(program.graph.nodes) <= MOST_OPTIMISED,
            external_data=False,
            dynamic_shapes=({0: "batch"},),
        )
    return path
