"""An ensemble as files that need no run: a bundle, and for small ensembles one program of fixed shape."""

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from networks import save_classifier

from .newton import Membership, factors, pattern_masses
from .patterns import set_patterns
from .specialist_ensemble import GROUPS, SCHEMA, SETTINGS, SpecialistEnsemble, specialist_folder

# Beyond so many specialists a program that runs all of them, and solves for all at once, is the wrong tool.
LARGEST_PROGRAM = 16
PROGRAM_STEPS = 16


def export_bundle(ensemble: SpecialistEnsemble, directory) -> dict:
    """Write `directory`, laid out as a run is, for SpecialistEnsemble.load: model.json and safetensors of every
    network, ensemble.json.

    A specialist's tensors that equal the generalist's are stored once, with the generalist.
    Returns {"tensors", "shared", "bytes"}: how many tensors the specialists have, how many of them were not stored
    again, the size.
    """
    from safetensors.torch import save_file

    root = Path(directory)
    (root / "clusters").mkdir(parents=True, exist_ok=True)
    save_classifier(ensemble.generalist, root / "generalist")
    ensemble.groups.save(root / GROUPS)
    common = ensemble.generalist.state_dict()
    shared, count = {}, 0
    for m in ensemble.specialists:
        specialist, folder = ensemble.specialists[m], specialist_folder(root, m)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = specialist.state_dict()
        count += len(tensors)
        shared[str(m)] = [
            name
            for name, tensor in tensors.items()
            if name in common
            and common[name].shape == tensor.shape
            and torch.equal(common[name], tensor.to(common[name].device))
        ]
        own = {
            name: t.detach().cpu().contiguous().clone()
            for name, t in tensors.items()
            if name not in set(shared[str(m)])
        }
        unfinished = folder / f".model.safetensors.{os.getpid()}"
        save_file(own, unfinished, metadata={"format": "pt"})
        os.replace(unfinished, folder / "model.safetensors")
        specialist.spec.save(folder / "model.json")
    weights = ensemble.weights
    facts = {
        "schema": SCHEMA,
        "gate": ensemble.gate,
        "max_specialists": ensemble.max_specialists,
        "combine": ensemble.combine,
        "temperatures": ensemble.temperatures,
        "weights": None if weights is None else [float(w) for w in weights],
        "skipped": ensemble.skipped,
        "missing": ensemble.missing,
        "shared": shared,
    }
    unfinished = root / f".{SETTINGS}.{os.getpid()}"
    unfinished.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, root / SETTINGS)
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    return {"tensors": count, "shared": sum(map(len, shared.values())), "bytes": size}


class EnsembleProgram(nn.Module):
    """The whole ensemble with shapes that do not depend on the data: every specialist runs on every row, the gate only
    weighs.

    forward(raw [B, ...]) -> q [B, C].  portable: of products and sums alone, for ONNX; a larger graph.  Benign opinions
    need 3 steps; absurdly conflicting ones (probabilities that underflow) may need more than PROGRAM_STEPS.
    Raises ValueError for more than LARGEST_PROGRAM specialists, and for another combiner than eq. 5.
    """

    def __init__(self, ensemble: SpecialistEnsemble, portable: bool = False):
        super().__init__()
        numbers = list(ensemble.specialists)
        if len(numbers) > LARGEST_PROGRAM:
            raise ValueError(
                f"{len(numbers)} specialists are too many for one program ({LARGEST_PROGRAM}); export the bundle"
            )
        if ensemble.combine != "kl":
            raise ValueError(f"combine = {ensemble.combine!r} has no program; only kl has")
        self.generalist, self.portable = ensemble.generalist, portable
        self.specialists = nn.ModuleList(ensemble.specialists[m] for m in numbers)
        self.n, self.limit = ensemble.gate, ensemble.max_specialists
        self.temperatures = [
            ensemble.temperatures[0],
            *[ensemble.temperatures[1 + m] for m in numbers],
        ]
        weights = (
            [1.0] * (1 + len(ensemble.groups.members))
            if ensemble.weights is None
            else list(map(float, ensemble.weights))
        )
        self.weights = [weights[0], *[weights[1 + m] for m in numbers]]
        classes, device = ensemble.groups.num_classes, ensemble.device
        members = [torch.tensor(ensemble.groups.members[m], device=device) for m in numbers]
        holds = torch.zeros(classes, len(numbers), device=device)
        for m, inside in enumerate(members):
            holds[inside, m] = 1
            self.register_buffer(f"members_{m}", inside, persistent=False)
        self.register_buffer("holds", holds, persistent=False)
        self.complete = [len(inside) == classes for inside in members]
        pattern = torch.zeros(classes, dtype=torch.int64)
        self.solver = None
        if numbers:
            patterns = set_patterns(ensemble.groups, tuple(numbers))
            pattern[torch.from_numpy(patterns.union[0])] = torch.from_numpy(patterns.union[1])
            self.register_buffer(
                "outside", torch.from_numpy(patterns.outside).to(device), persistent=False
            )
            self.register_buffer(
                "counts", torch.from_numpy(patterns.counts).to(device), persistent=False
            )
        self.register_buffer("pattern", pattern.to(device), persistent=False)

    def forward(self, raw: Tensor) -> Tensor:
        logits = self.generalist(raw)
        g = torch.softmax(logits / self.temperatures[0], 1)
        if not len(self.specialists):
            return g
        asked = self._gate(torch.softmax(logits, 1)).double()
        a, bins = self.weights[0] * g, []
        for m, specialist in enumerate(self.specialists):
            p = torch.softmax(specialist(raw) / self.temperatures[1 + m], 1)
            inside, dustbin = p[:, :-1], p[:, -1].double()
            if self.complete[m]:
                inside, dustbin = (
                    inside / inside.sum(1, keepdim=True).clamp(min=1e-30),
                    torch.zeros_like(dustbin),
                )
            weight = self.weights[1 + m] * asked[:, m]
            a = a.index_add(
                1, self.get_buffer(f"members_{m}"), inside * weight[:, None].to(g.dtype)
            )
            bins.append(dustbin * weight)
        d = torch.stack(bins, 1)
        A = torch.zeros(
            g.shape[0], self.counts.shape[0], dtype=torch.float64, device=g.device
        ).index_add(1, self.pattern, a.double())
        mass = A.sum(1, keepdim=True) + d.sum(1, keepdim=True)
        members = Membership(self.outside, self.counts)
        Y = pattern_masses(A / mass, d / mass, members, 0.0, PROGRAM_STEPS, self.portable)
        factor, even = factors(A / mass, Y, members)
        factor = factor / mass
        return a * factor.to(g.dtype).index_select(1, self.pattern) + even.to(g.dtype).index_select(
            1, self.pattern
        )

    def _gate(self, p: Tensor) -> Tensor:
        top = p.topk(self.n, dim=1).indices
        asked = self.holds[top].amax(1)
        if self.limit is None or self.limit >= len(self.specialists):
            return asked
        mass = torch.where(asked > 0, p @ self.holds, -1.0)
        kept = mass.topk(self.limit, dim=1).indices
        return asked * torch.zeros_like(asked).scatter(1, kept, 1.0)


def export_program(module: nn.Module, example: Tensor, path) -> Path:
    """torch.export of a network or an EnsembleProgram, with any batch size, saved at `path` (.pt2).  example: raw
    inputs, 2 rows or more."""
    path = Path(path)
    module = module.eval()
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.pt2")
    torch.export.save(program, unfinished)
    os.replace(unfinished, path)
    return path


def export_onnx(module: nn.Module, example: Tensor, path) -> Path:
    """The same as ONNX.  Needs the extra `onnx`; ValueError names it where it is absent."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as missing:
        raise ValueError(
            f"{missing.name} is not installed; pip install 'referral[onnx]' brings it"
        ) from None
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.onnx")
    with torch.no_grad():
        torch.onnx.export(
            module.eval(),
            (example,),
            str(unfinished),
            input_names=["raw"],
            output_names=["probabilities"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            external_data=False,
        )
    os.replace(unfinished, path)
    return path
