"""`referral export`: a finished run as files that need no run.

OUT holds generalist/, specialists/, clusters/, ensemble.json and students/NAME/ (safetensors and
JSON, laid out as in the run), programs/ with --programs or --onnx, export.json and a model card.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ensemble import (
    DeepEnsemble,
    ShortlistEnsemble,
    SpecialistEnsemble,
    ensemble_program,
    export_bundle,
    export_onnx,
    export_program,
    load_ensemble,
)
from networks import Branch, Classifier, ModelSpec, load_classifier, save_classifier
from networks.integrity import OTHER_FORM, OUT_OF_MEMORY, write_checksums
from networks.temporaries import sweep, temporary_beside
from pipeline.config import UserError
from pipeline.extras import EXTRAS, require
from pipeline.failures import cannot_write
from pipeline.files import sync_tree, write_text
from pipeline.graph import RunDirectory, open_run
from pipeline.results import read_results
from pipeline.store import Stage, read_json, write_json
from pipeline.trust import FUNCTION, HELP, check_trusted
from pipeline.usage import Parser

from ..stages.networks import builders_of
from .model_card import CARD_FILE, UNKNOWN, Card, check_license

SCHEMA = 1
SUMMARY_FILE = "export.json"
# Every probability of an export is within this of the run's.
TOLERANCE = 1e-5
ROWS = 16  # random inputs that are compared
TRACED_ROWS = 3
LEAST_WIDTH = 16  # rows that a network of indices has at least, where its options do not say


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    run = open_run(args.directory)
    check_trusted(run, args.trust, (FUNCTION,))
    with_ensemble, students = selected(run, args.what)
    check_target(args.to, run.root, args.force)
    check_license(args.license)
    suffixes = [name for name, chosen in (("pt2", args.programs), ("onnx", args.onnx)) if chosen]
    if args.onnx:
        check_onnx()
    with put_in_place(args.to) as unfinished:
        export = Export(unfinished, builders_of(run.config))
        if with_ensemble:
            export.ensemble(load_run_ensemble(run, export.builders), suffixes)
        for name, stage in students.items():
            with as_user_errors():
                network = load_classifier(
                    stage.folder("model.json", "model.safetensors"), builders=export.builders
                )
            export.student(name, network, suffixes)
        write_summary(unfinished, run, export)
        write_card(unfinished, run, with_ensemble, list(students), args.license)
        write_checksums(unfinished)
        sync_tree(unfinished)
    size = sum(path.stat().st_size for path in args.to.rglob("*") if path.is_file()) / 2**20
    print(
        f"{args.to} is ready: {size:.2f} MiB, "
        f"all within {TOLERANCE:g} of the run on {ROWS} random inputs"
    )
    print(f"next: {shlex.join(['referral', 'predict', str(args.to)])} FILES")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "referral export",
        "Write a finished run as files that need no run: networks, groups and how they are joined, "
        "as safetensors and JSON laid out as in the run.",
        "referral export runs/mine --to exported/ --what student:main --onnx",
    )
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
        help="also write torch.export programs (.pt2) of every network, and of a small ensemble "
        "as a whole: raw inputs in, probabilities out",
    )
    parser.add_argument(
        "--onnx",
        action="store_true",
        help="also write these programs as ONNX; needs the packages " + ", ".join(EXTRAS["onnx"]),
    )
    parser.add_argument(
        "--license",
        default=UNKNOWN,
        metavar="ID",
        help="what README.md, the model card, says of the license, e.g. apache-2.0 [unknown]",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace what an earlier export wrote to OUT"
    )
    parser.add_argument("--trust", action="store_true", help=HELP)
    return parser


def write_summary(directory: Path, run: RunDirectory, export: Export) -> None:
    summary = {
        "schema": SCHEMA,
        "run": str(run.root.resolve()),
        "torch": torch.__version__,
        "rows": ROWS,
        "largest_difference": export.differences,
    }
    write_json(directory / SUMMARY_FILE, summary)


def write_card(
    directory: Path, run: RunDirectory, with_ensemble: bool, students: list[str], license: str
) -> None:
    """README.md, with the figures of results.json where the run's report is done."""
    folder = "generalist" if with_ensemble else f"students/{students[0]}"
    results = None
    if run.report.done() is not None:
        results = read_results(run.report.path("results.json"))
    rows = ["ensemble", "generalist"] if with_ensemble else []
    programs = sorted(path.name for path in directory.glob("programs/*"))
    card = Card(
        run=run.root.resolve().name,
        spec=ModelSpec.load(directory / folder / "model.json"),
        rows=[*rows, *(f"student {name}" for name in students)],
        results=results,
        seed=run.config.seed,
        programs=programs,
        license=license,
    )
    write_text(directory / CARD_FILE, card.text())


# What to export


def selected(run: RunDirectory, what: str) -> tuple[bool, dict[str, Stage]]:
    """Whether to export the ensemble, and which students.

    UserError for a stage of them that is not done.
    """
    kind, _, name = what.partition(":")
    if (kind, bool(name)) not in {("ensemble", False), ("all", False), ("student", True)}:
        raise UserError(f"--what {what}: write ensemble, student:NAME or all")
    if kind == "student" and name not in run.students:
        known = ", ".join(run.students) or "none"
        raise UserError(f"--what {what}: this run's students are {known}")

    students = dict(run.students)
    if kind == "student":
        students = {name: run.students[name]}
    elif kind == "ensemble":
        students = {}
    with_ensemble = kind != "student"
    needed = []
    if with_ensemble:
        needed.append(run.generalist)
        if run.method.has_groups:
            needed.append(run.cluster)
        needed.append(run.ensemble)
    for stage in [*needed, *students.values()]:
        check_done(run, stage)
    return with_ensemble, students


def check_done(run: RunDirectory, stage: Stage) -> None:
    # DONE alone counts: the config of a run whose data were moved hashes to something else.
    if stage.done() is None:
        reason = f" ({stage.lacks})" if stage.lacks else ""
        raise UserError(
            f"{run.root}: stage {stage.place} is not done{reason}; "
            f"`referral run --run {shlex.quote(str(run.root))}` resumes the run"
        )


def load_run_ensemble(
    run: RunDirectory, builders: dict[str, Callable]
) -> SpecialistEnsemble | DeepEnsemble | ShortlistEnsemble:
    missing = read_json(run.ensemble.path("ensemble.json")).get("missing")
    with as_user_errors():
        ensemble = load_ensemble(run.root, builders=builders, allow_missing=bool(missing))
    if ensemble.missing:
        names = ", ".join(map(str, ensemble.missing))
        print(f"without specialists {names}, which this run continued without")
    return ensemble


@contextlib.contextmanager
def as_user_errors(of: str | Path = "") -> Iterator[None]:
    """Turn what the libraries say about files that they are given into one line for the user.

    of: a run or a bundle, to be named. Its networks fail in here where another error is raised.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        text = str(error).replace("allow_missing=True", "--allow-missing")
        raise UserError(text if str(of) in text else f"{of}: {text}") from None
    except OTHER_FORM as error:
        text = " ".join(str(error).split())
        if not of or any(words in text for words in OUT_OF_MEMORY):
            raise
        raise UserError(
            f"{of}: its networks cannot be asked about these inputs "
            f"({type(error).__name__}: {text[:200]})"
        ) from None


# Where to


def check_target(out: Path, root: Path, force: bool) -> None:
    """UserError unless `out` may be written: absent, empty, or (with --force) an earlier export."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--to {out} is a file; name a directory")
    if not any(out.iterdir()):
        return
    if not force:
        raise UserError(
            f"--to {out} is not empty; name another directory, "
            "or replace an earlier export with --force"
        )
    is_export = (out / SUMMARY_FILE).is_file()
    holds_run = root.resolve().is_relative_to(out.resolve())
    if not is_export or holds_run:
        raise UserError(
            f"--to {out} holds something other than an export (no {SUMMARY_FILE}); "
            "--force does not delete that"
        )


@contextlib.contextmanager
def put_in_place(out: Path) -> Iterator[Path]:
    """A directory beside `out` to write in. It becomes `out` if the block ends without an error.

    What a killed export left is removed first.  An earlier export that is replaced has a name that
    everybody sees meanwhile: a kill between the two renames leaves it there.
    """
    out = out.absolute()
    unfinished = temporary_beside(out)
    earlier = out.with_name(f"{out.name}.earlier-{os.getpid()}")
    sweep(out.parent, recursive=False)
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise cannot_write(out, error, option="--to") from None
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
    for name in EXTRAS["onnx"]:
        require(name, "--onnx")


# Writing, and comparing what was written


class Export:
    """Writes below `root`, and compares what was written with the networks that it was made of.

    Each comparison prints one line. differences: {what: the largest difference of a probability on
    ROWS random inputs}.
    """

    def __init__(self, root: Path, builders: dict[str, Callable]):
        self.root, self.builders = root, builders
        self.differences: dict[str, float] = {}

    def ensemble(
        self,
        ensemble: SpecialistEnsemble | DeepEnsemble | ShortlistEnsemble,
        suffixes: list[str],
    ) -> None:
        if isinstance(ensemble, ShortlistEnsemble):
            self._shortlist_ensemble(ensemble, suffixes)
        elif isinstance(ensemble, DeepEnsemble):
            self._deep_ensemble(ensemble, suffixes)
        else:
            self._specialist_ensemble(ensemble, suffixes)

    def _deep_ensemble(self, ensemble: DeepEnsemble, suffixes: list[str]) -> None:
        ensemble.save(self.root)
        raw = random_inputs(ensemble.generalist.spec)
        loaded = DeepEnsemble.load(self.root, builders=self.builders)
        self.compare("bundle", ensemble.probabilities(raw), loaded.probabilities(raw))
        for index, network in enumerate(ensemble.networks):
            self.programs(f"member-{index:03d}", Probabilities(network), raw, suffixes)

    def _shortlist_ensemble(self, ensemble: ShortlistEnsemble, suffixes: list[str]) -> None:
        """The bundle, and one program of the whole."""
        ensemble.save(self.root)
        raw = random_inputs(ensemble.generalist.spec)
        loaded = ShortlistEnsemble.load(self.root, builders=self.builders)
        expected = ensemble.probabilities(raw)
        self.compare("bundle", expected, loaded.probabilities(raw))
        for suffix in suffixes:
            self.program("ensemble", ensemble.program, expected, raw, suffix)

    def _specialist_ensemble(self, ensemble: SpecialistEnsemble, suffixes: list[str]) -> None:
        with as_user_errors():
            summary = export_bundle(ensemble, self.root)
        raw = random_inputs(ensemble.generalist.spec)
        loaded = SpecialistEnsemble.load(
            self.root, allow_missing=bool(ensemble.missing), builders=self.builders
        )
        expected = ensemble.probabilities(raw)
        self.compare("bundle", expected, loaded.probabilities(raw))
        if summary["shared"]:
            print(
                f"  {summary['shared']} of the specialists' {summary['tensors']} tensors "
                "are the generalist's"
            )
        if suffixes:
            self._programs_of(ensemble, expected, raw, suffixes)

    def _programs_of(
        self, ensemble: SpecialistEnsemble, expected: Tensor, raw: Tensor, suffixes: list[str]
    ) -> None:
        """Programs of every network, and of the ensemble as a whole where it can be one."""
        temperatures = ensemble.temperatures
        generalist = Probabilities(ensemble.generalist, temperatures[0])
        self.programs("generalist", generalist, raw, suffixes)
        for m in ensemble.specialists:
            specialist = ensemble.specialists[m]
            if isinstance(specialist, Branch):  # no program without its generalist
                continue
            network = Probabilities(specialist, temperatures[1 + m])
            self.programs(f"specialist-{m:03d}", network, raw, suffixes)
        try:
            programs = {suffix: ensemble_program(ensemble, suffix == "onnx") for suffix in suffixes}
        except ValueError as reason:
            print(f"the ensemble as a whole is not among the programs: {reason}")
            return
        for suffix, program in programs.items():
            self.program("ensemble", program, expected, raw, suffix)

    def student(self, name: str, network: Classifier, suffixes: list[str]) -> None:
        directory = self.root / "students" / name
        save_classifier(network, directory)
        loaded = load_classifier(directory, builders=self.builders)
        raw = random_inputs(network.spec)
        expected = evaluate(Probabilities(network), raw)
        self.compare(f"students/{name}", expected, evaluate(Probabilities(loaded), raw))
        self.programs(f"student-{name}", Probabilities(network), raw, suffixes)

    def programs(self, name: str, module: nn.Module, raw: Tensor, suffixes: list[str]) -> None:
        for suffix in suffixes:
            self.program(name, module, evaluate(module, raw), raw, suffix)

    def program(
        self, name: str, module: nn.Module, expected: Tensor, raw: Tensor, suffix: str
    ) -> None:
        """Write a program, and compare it on all rows.

        It is traced at fewer rows: the batch size must not be part of the program.
        """
        path = self.root / "programs" / f"{name}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        if suffix == "onnx":
            write, read = export_onnx, run_onnx
        else:
            write, read = export_program, run_program
        try:
            with quiet():
                write(module, raw[:TRACED_ROWS], path)
        # torch raises what it likes about a user's network that cannot be traced.
        except Exception as error:
            first_line = next(iter(str(error).strip().splitlines()), "")
            raise UserError(
                f"torch cannot make {path.name} of {name}: {type(error).__name__}: {first_line}; "
                "leave out the programs"
            ) from error
        self.compare(f"programs/{path.name}", expected, read(path, raw))

    def compare(self, what: str, expected: Tensor, exported: Tensor) -> None:
        difference = float((expected - exported).abs().max())
        if not difference <= TOLERANCE:  # nor NaN
            raise UserError(
                f"{what} differs from the run's networks by {difference:.1e} on {len(expected)} "
                f"random inputs; {TOLERANCE:g} is allowed: nothing was written. Export without it"
            )
        self.differences[what] = difference
        print(f"{what:32} largest difference {difference:.1e}", flush=True)


class Probabilities(nn.Module):
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
def evaluate(module: nn.Module, raw: Tensor) -> Tensor:
    return module.eval()(raw)


def random_inputs(spec: ModelSpec, rows: int = ROWS) -> Tensor:
    """Raw inputs [rows, *shape].

    Their contrast grows, so that they are not all taken for the same class.
    """
    generator = torch.Generator().manual_seed(0)
    shape = spec.input.shape
    if spec.input.is_indices:
        return random_indices(spec, rows, generator)
    of_each_row = [1] * len(shape)
    contrast = torch.linspace(0.1, 1, rows).view(-1, *of_each_row)
    noise = torch.randn(rows, *shape, generator=generator) * contrast
    noise = noise + torch.randn(rows, *of_each_row, generator=generator) * contrast
    if spec.input.dtype == "uint8":
        return (128 + 64 * noise).clamp(0, 255).to(torch.uint8)
    per_channel = (-1, *[1] * (len(shape) - 1))
    mean = torch.tensor(spec.input.mean).view(per_channel)
    std = torch.tensor(spec.input.std).view(per_channel)
    return (mean + std * noise) / spec.input.scale


def random_indices(spec: ModelSpec, rows: int, generator: torch.Generator) -> Tensor:
    """int32 [rows, *shape], with more padding in every row."""
    highest = spec.options.get("width", LEAST_WIDTH)
    indices = torch.randint(highest, (rows, *spec.input.shape), generator=generator)
    padded = torch.rand(rows, *spec.input.shape, generator=generator)
    share = torch.linspace(0, 1, rows).view(-1, *[1] * len(spec.input.shape))
    return indices.masked_fill(padded < share, -1).int()


def run_program(path: Path, raw: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.export.load(path).module()(raw)


def run_onnx(path: Path, raw: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"raw": raw.numpy()})[0])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's exporters: they report progress on stdout, and warn of their own matters."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
