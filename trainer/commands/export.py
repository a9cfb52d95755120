"""`referral export`: a finished run as files that need no run.

OUT holds generalist/, specialists/, clusters/, ensemble.json and students/NAME/ (safetensors and JSON, laid out as in
the run), programs/ with --programs or --onnx, and export.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ensemble import (
    DeepEnsemble,
    EnsembleProgram,
    SpecialistEnsemble,
    export_bundle,
    export_onnx,
    export_program,
    load_ensemble,
)
from networks import Classifier, ModelSpec, load_classifier, save_classifier
from pipeline.config import UserError
from pipeline.graph import RunDirectory, open_run
from pipeline.store import Stage, read_json, write_json

from ..stages.networks import builders_of

SCHEMA = 1
FACTS = "export.json"
# An export answers as the run does, every probability within this.
TOLERANCE = 1e-5
ROWS = 16


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="referral export", description=__doc__)
    parser.add_argument("directory", metavar="DIR", type=Path, help="a finished run")
    parser.add_argument(
        "--to", required=True, metavar="OUT", type=Path, help="the directory to write"
    )
    parser.add_argument(
        "--what", default="all", metavar="ensemble | student:NAME | all", help="all is the default"
    )
    parser.add_argument(
        "--programs",
        action="store_true",
        help="also torch.export programs (.pt2) of every network, "
        "and of a small ensemble as a whole: raw inputs in, probabilities out",
    )
    parser.add_argument(
        "--onnx", action="store_true", help="the same as ONNX; needs pip install 'referral[onnx]'"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace what an earlier export wrote to OUT"
    )
    args = parser.parse_args(argv)

    run = open_run(args.directory)
    with_ensemble, students = chosen(run, args.what)
    check_place(args.to, run.root, args.force)
    kinds = [kind for kind, wanted in (("pt2", args.programs), ("onnx", args.onnx)) if wanted]
    if args.onnx:
        check_onnx()
    with put_in_place(args.to) as unfinished:
        export = Export(unfinished, builders_of(run.config))
        if with_ensemble:
            export.ensemble(loaded_ensemble(run, export.builders), kinds)
        for name, stage in students.items():
            with users_mistakes():
                network = load_classifier(stage.path("model.json").parent, builders=export.builders)
            export.student(name, network, kinds)
        write_json(
            unfinished / FACTS,
            {
                "schema": SCHEMA,
                "run": str(run.root.resolve()),
                "torch": torch.__version__,
                "rows": ROWS,
                "largest_difference": export.differences,
            },
        )
    size = sum(path.stat().st_size for path in args.to.rglob("*") if path.is_file()) / 2**20
    print(
        f"{args.to} is ready: {size:.2f} MiB, all within {TOLERANCE:g} of the run on {ROWS} random inputs"
    )
    return 0


def chosen(run: RunDirectory, what: str) -> tuple[bool, dict[str, Stage]]:
    """Whether the ensemble is wanted, and which students.  UserError for a stage of them that is not done."""
    kind, _, name = what.partition(":")
    if (kind, bool(name)) not in {("ensemble", False), ("all", False), ("student", True)}:
        raise UserError(f"--what {what}: write ensemble, student:NAME or all")
    if kind == "student" and name not in run.students:
        raise UserError(
            f"--what {what}: this run's students are {', '.join(run.students) or 'none'}"
        )
    students = {"ensemble": {}, "student": {name: run.students.get(name)}, "all": run.students}[
        kind
    ]
    groups = [run.cluster] if run.method.has_groups else []
    needed = [] if kind == "student" else [run.generalist, *groups, run.ensemble]
    for stage in [*needed, *students.values()]:
        check_done(run, stage)
    return kind != "student", students


def check_done(run: RunDirectory, stage: Stage) -> None:
    # DONE alone counts: where the run's data are no longer in their place its config hashes to something else.
    if stage.done() is None:
        raise UserError(
            f"{run.root}: stage {stage.place} is not done; `referral run --run {run.root}` goes on with it"
        )


def check_place(out: Path, root: Path, force: bool) -> None:
    """UserError unless `out` may be written: absent, empty, or (with --force) an earlier export."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--to {out} is a file; name a directory")
    if not any(out.iterdir()):
        return
    if not force:
        raise UserError(
            f"--to {out} is not empty; name another directory, or replace an earlier export with --force"
        )
    if not (out / FACTS).is_file() or root.resolve().is_relative_to(out.resolve()):
        raise UserError(
            f"--to {out} holds something other than an export (no {FACTS}); --force does not delete that"
        )


@contextlib.contextmanager
def put_in_place(out: Path) -> Iterator[Path]:
    """A directory beside `out` to write in; it becomes `out` if the block ends without an error."""
    out = out.absolute()
    unfinished, earlier = (
        out.with_name(f".{out.name}.{os.getpid()}.{word}") for word in ("unfinished", "earlier")
    )
    try:
        unfinished.mkdir(parents=True)
    except OSError as mistake:
        raise UserError(f"--to {out}: cannot be written: {mistake.strerror}") from None
    try:
        yield unfinished
        if out.exists():
            os.replace(out, earlier)
        os.replace(unfinished, out)
    except BaseException:
        if earlier.exists() and not out.exists():
            os.replace(earlier, out)
        raise
    finally:
        for directory in (unfinished, earlier):
            shutil.rmtree(directory, ignore_errors=True)


def check_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"--onnx needs {name}, which is not installed; pip install 'referral[onnx]' brings it"
            )


def loaded_ensemble(
    run: RunDirectory, builders: dict[str, Callable]
) -> SpecialistEnsemble | DeepEnsemble:
    absent = read_json(run.ensemble.path("ensemble.json")).get("missing")
    with users_mistakes():
        ensemble = load_ensemble(run.root, builders=builders, allow_missing=bool(absent))
    if ensemble.missing:
        print(
            f"without specialists {', '.join(map(str, ensemble.missing))}, which this run went on without"
        )
    return ensemble


@contextlib.contextmanager
def users_mistakes() -> Iterator[None]:
    """What the libraries say about files that they are given, as one line for the user."""
    try:
        yield
    except ValueError as mistake:
        raise UserError(str(mistake).replace("allow_missing=True", "--allow-missing")) from None


class Export:
    """Writes below `root`, and compares what was written with the networks that it was made of, one line each.

    differences: {what: the largest difference of a probability on ROWS random inputs}.
    """

    def __init__(self, root: Path, builders: dict[str, Callable]):
        self.root, self.builders, self.differences = root, builders, {}

    def ensemble(self, ensemble: SpecialistEnsemble | DeepEnsemble, kinds: list[str]) -> None:
        if isinstance(ensemble, DeepEnsemble):
            return self.deep(ensemble, kinds)
        with users_mistakes():
            facts = export_bundle(ensemble, self.root)
        raw = random_inputs(ensemble.generalist.spec)
        again = SpecialistEnsemble.load(
            self.root, allow_missing=bool(ensemble.missing), builders=self.builders
        )
        self.compare("bundle", ensemble.probabilities(raw), again.probabilities(raw))
        if facts["shared"]:
            print(
                f"  {facts['shared']} of the specialists' {facts['tensors']} tensors are the generalist's"
            )
        if not kinds:
            return
        T = ensemble.temperatures
        self.programs("generalist", Answer(ensemble.generalist, T[0]), raw, kinds)
        for m in ensemble.specialists:
            self.programs(
                f"specialist-{m:03d}", Answer(ensemble.specialists[m], T[1 + m]), raw, kinds
            )
        try:
            whole = {kind: EnsembleProgram(ensemble, portable=kind == "onnx") for kind in kinds}
        except ValueError as reason:
            print(f"the ensemble as a whole is not among the programs: {reason}")
            return
        for kind, program in whole.items():
            self.program("ensemble", program, ensemble.probabilities(raw), raw, kind)

    def deep(self, ensemble: DeepEnsemble, kinds: list[str]) -> None:
        ensemble.save(self.root)
        raw = random_inputs(ensemble.generalist.spec)
        again = DeepEnsemble.load(self.root, builders=self.builders)
        self.compare("bundle", ensemble.probabilities(raw), again.probabilities(raw))
        for index, network in enumerate(ensemble.networks):
            self.programs(f"member-{index:03d}", Answer(network), raw, kinds)

    def student(self, name: str, network: Classifier, kinds: list[str]) -> None:
        place, raw = self.root / "students" / name, random_inputs(network.spec)
        save_classifier(network, place)
        again = load_classifier(place, builders=self.builders)
        self.compare(f"students/{name}", answers(Answer(network), raw), answers(Answer(again), raw))
        self.programs(f"student-{name}", Answer(network), raw, kinds)

    def programs(self, name: str, answer: nn.Module, raw: Tensor, kinds: list[str]) -> None:
        for kind in kinds:
            self.program(name, answer, answers(answer, raw), raw, kind)

    def program(
        self, name: str, module: nn.Module, expected: Tensor, raw: Tensor, kind: str
    ) -> None:
        """Traced at 3 rows and asked about all of them: the batch size must not be part of the program."""
        path = self.root / "programs" / f"{name}.{kind}"
        path.parent.mkdir(exist_ok=True)
        write, read = {"pt2": (export_program, run_program), "onnx": (export_onnx, run_onnx)}[kind]
        try:
            with quiet():
                write(module, raw[:3], path)
        except (
            Exception
        ) as refusal:  # torch raises what it likes about a user's network that cannot be traced
            said = f"{type(refusal).__name__}: {str(refusal).strip().splitlines()[0] if str(refusal).strip() else ''}"
            raise UserError(
                f"torch cannot make {path.name} of {name}: {said}; leave out the programs"
            ) from refusal
        self.compare(f"programs/{path.name}", expected, read(path, raw))

    def compare(self, what: str, expected: Tensor, found: Tensor) -> None:
        difference = float((expected - found).abs().max())
        if not difference <= TOLERANCE:  # nor NaN
            raise UserError(
                f"{what} differs from the run's networks by {difference:.1e} on {len(expected)} random inputs; "
                f"{TOLERANCE:g} is allowed: nothing was written. Export without it"
            )
        self.differences[what] = difference
        print(f"{what:32} largest difference {difference:.1e}", flush=True)


class Answer(nn.Module):
    """raw -> softmax(logits / temperature), [B, C], of a network with members the mean of theirs.

    A specialist's [B, |S_m| + 1] is then what combine_kl reads.
    """

    def __init__(self, network: nn.Module, temperature: float = 1.0):
        super().__init__()
        self.network, self.temperature = network, temperature

    def forward(self, raw: Tensor) -> Tensor:
        p = torch.softmax(self.network(raw).float() / self.temperature, -1)
        return p.mean(0) if p.dim() == 3 else p


@torch.no_grad()
def answers(module: nn.Module, raw: Tensor) -> Tensor:
    return module.eval()(raw)


def random_inputs(spec: ModelSpec, rows: int = ROWS) -> Tensor:
    """Raw inputs [rows, *shape] of growing contrast, so that they are not all taken for the same class."""
    generator = torch.Generator().manual_seed(0)
    shape = spec.input.shape
    contrast = torch.linspace(0.1, 1, rows).view(-1, *[1] * len(shape))
    noise = torch.randn(rows, *shape, generator=generator) * contrast
    noise = noise + torch.randn(rows, *[1] * len(shape), generator=generator) * contrast
    if spec.input.dtype == "uint8":
        return (128 + 64 * noise).clamp(0, 255).to(torch.uint8)
    per_entry = (-1, *[1] * (len(shape) - 1))
    mean, std = (torch.tensor(x).view(per_entry) for x in (spec.input.mean, spec.input.std))
    return (mean + std * noise) / spec.input.scale


def run_program(path: Path, raw: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.export.load(path).module()(raw)


def run_onnx(path: Path, raw: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"raw": raw.numpy()})[0])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch's exporters report their progress on stdout, and warn of what is theirs."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
