"""What the papers' tables share: data, resumable runs, means over seeds, a section of the page.

Every experiment is a run of `referral`: its config is what a user would write, and a run that is
done costs nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import cast

import numpy as np
import tomli_w
import torch
import torch.nn.functional as F

from pipeline import results as of_runs
from pipeline.config import load_config, save_config
from pipeline.graph import RunDirectory
from pipeline.store import read_json, write_json

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("REFERRAL_DATA", ROOT.parent / "shared" / "data"))
PAGE = ROOT / "docs" / "papers.md"
SEEDS = (0, 1, 2)
# glibc would give each step's large buffers back to the system and ask for them anew: a fifth of
# the time, measured.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "OMP_NUM_THREADS": "1",
}
MISTAKE = 2  # exit code of what the user can put right


# The command line


def arguments(
    description: str | None, page: Path = PAGE, to: str = "runs/papers"
) -> argparse.ArgumentParser:
    """The options that all tables share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--to", type=Path, default=Path(to), help=f"runs and data go below it ({to})"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="0 1 2; of a quick look 0")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of every run"
    )
    parser.add_argument("--write", action="store_true", help=f"put the table into docs/{page.name}")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="all of it in seconds on made-up data, below TO/quick: a rehearsal, no result",
    )
    return parser


def parsed(parser: argparse.ArgumentParser, words: list[str] | None = None) -> argparse.Namespace:
    """The arguments. A quick look begins afresh below TO/quick, with one seed, never written."""
    options = parser.parse_args(words)
    if options.quick and options.write:
        parser.error("--quick's metrics mean nothing: leave out --write")
    if options.quick:
        options.to = options.to / "quick"
        shutil.rmtree(options.to, ignore_errors=True)
    if options.seeds is None:
        options.seeds = [SEEDS[0]] if options.quick else list(SEEDS)
    options.to.mkdir(parents=True, exist_ok=True)
    return options


def command_line(module: str, words: list[str] | None = None) -> str:
    """The command that was given. words: its arguments, by default this process's."""
    return shlex.join(["python", "-m", module, *(words or sys.argv[1:])])


def require(source: Path) -> None:
    """Exits with one line and code 2 where real data are absent."""
    if not source.exists():
        message = f"{source} is absent; REFERRAL_DATA names the directory of the real data"
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(MISTAKE)


# Runs


def referral(*words: str | Path | float, environment: Mapping[str, str] = ENVIRONMENT) -> None:
    """A command of referral's, its output shown. Exits with its code if it fails.

    environment: what is set beside this process's own.
    """
    command = [sys.executable, "-P", "-m", "launch.cli", *map(str, words)]
    code = subprocess.run(command, env={**os.environ, **environment}, cwd=ROOT).returncode
    if code:
        raise SystemExit(code)


def shards(path: Path, make: Callable[[Path], object]) -> Path:
    """`path` with the shards that make(path) writes. A manifest says that they are complete."""
    if not (path / "manifest.json").is_file():
        make(path)
    return path.resolve()


def finished(
    config: dict,
    path: Path,
    settings: Iterable[str] = (),
    in_process: bool = False,
    environment: Mapping[str, str] = ENVIRONMENT,
) -> dict:
    """results.json of the run of `config` at `path`, which is started or resumed until done.

    settings: KEY=VALUE as of `referral run --set`.  in_process: all stages in this process.
    environment: of its processes, beside this one's.
    """
    path.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f"{path.name}.toml")
    file.write_text(tomli_w.dumps(config), encoding="utf-8")
    if in_process:
        run_in_process(file, path, list(settings))
    else:
        words = [word for setting in settings for word in ("--set", setting)]
        command = ["run", file.resolve(), "--run", path.resolve(), *words]
        referral(*command, environment=environment)
    return read_json(path / "results.json")


def run_in_process(file: Path, path: Path, settings: list[str], only: Iterable[str] = ()) -> None:
    """What `referral run` does with a process for each job, in this one.

    A quick look has some twenty jobs of a tenth of a second, and each process would import torch.
    only: the kinds of stages, instead of all.
    """
    from trainer.__main__ import in_a_row
    from trainer.distributed.ranks import process_group
    from trainer.session import Session
    from trainer.stages import run_together

    config = load_config(file, settings)
    path.mkdir(parents=True, exist_ok=True)
    save_config(config, path / "config.toml")
    run, only = RunDirectory(path, config), set(only)
    with process_group(config.engine) as ranks:
        session = Session(run, ranks)
        due = [s for s in run.stages if not s.is_done and (not only or s.name in only)]
        for alike in in_a_row(due):
            run_together(session, alike)


def once(path: Path, work: Callable[[], dict]) -> dict:
    """What `work` returns, kept at `path` as JSON and not computed again."""
    if not path.exists():
        write_json(path, work())
    return read_json(path)


def seconds(run: Path) -> float:
    """What the finished stages of a run took, one after the other."""
    done = (path for path in run.rglob("DONE") if path.parent.parent.name != "attempts")
    return sum(read_json(path)["seconds"] for path in done)


# Data


def mnist(path: Path, source: Path = DATA / "mnist") -> None:
    """Shards of MNIST's files. A twelfth of each class of train is held out, 5,001 val."""
    require(source)
    files = sorted(source.glob("*-ubyte.gz"))
    referral("shards", "arrays", *files, "--out", path.resolve(), "--val", 1 / 12, "--test", 0)


def made_up_mnist(path: Path, train: int = 480, test: int = 120) -> None:
    """The same of random pictures, each class a pattern of its own."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 160, (10, 28, 28))
    inputs, labels = {}, {}
    for split, count in (("train", train), ("test", test)):
        labels[split] = np.arange(count) % 10
        noise = rng.integers(0, 96, (count, 28, 28))
        inputs[split] = (patterns[labels[split]] + noise).astype(np.uint8)
    source = path.with_name("pictures.npz")
    arrays = {f"x_{split}": x for split, x in inputs.items()}
    arrays |= {f"y_{split}": y for split, y in labels.items()}
    np.savez(source, **arrays)
    referral("shards", "arrays", source.resolve(), "--out", path.resolve(), "--val", 1 / 12)


def affine(
    inputs: np.ndarray, uniforms: np.ndarray, turn: float, stretch: float, move: float
) -> np.ndarray:
    """Pictures uint8 [n, c, H, W], each turned, stretched, sheared and moved. What comes in is 0.

    turn: degrees at most.  stretch: of stretching and shearing.  move: of a side.
    uniforms: [n, 7], 0..1. .5 leaves a picture as it is.
    """
    u = torch.from_numpy(uniforms).float() * 2 - 1
    angle = u[:, 0] * math.radians(turn)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    stretched = torch.eye(2) + stretch * u[:, 1:5].view(-1, 2, 2)
    shift = 2 * move * u[:, 5:7, None]  # affine_grid's unit is half a side
    grid = F.affine_grid(
        torch.cat([turned @ stretched, shift], 2), list(inputs.shape), align_corners=False
    )
    moved = F.grid_sample(torch.from_numpy(inputs).float(), grid, align_corners=False)
    return moved.round().to(torch.uint8).numpy()


# Tables


def named_rows(results: dict) -> dict[str, dict]:
    """Every row of results.json under its name."""
    return cast(dict[str, dict], of_runs.named_rows(cast(of_runs.Results, results)))


def errors(row: dict) -> int:
    """Test errors, a count."""
    return of_runs.errors(cast(of_runs.Row, row))


def share_of_gain(row: dict, results: dict) -> float | None:
    """How much of the ensemble's gain over the generalist a row keeps, in top-1 errors."""
    return of_runs.share_of_gain(cast(of_runs.Row, row), cast(of_runs.Results, results))


def spread(values: Iterable[float], digits: int = 3) -> str:
    """mean ± sample deviation"""
    values = list(values)
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(header: list[str], rows: Iterable[list]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# Conditions


def conditions(seeds: Iterable[int], command: str) -> str:
    """Machine, seeds, commit and command, for under a table."""
    return (
        f"Seeds {', '.join(map(str, seeds))}. {processor()}, {cores()} cores, one thread each, "
        f"commit {commit()}: `{command}`."
    )


def print_json(measured: dict, options: argparse.Namespace, command: str) -> None:
    """The last line of every program: what was measured, and where, as one JSON object."""
    given = {key: getattr(options, key) for key in ("quick", "seeds", "seed") if key in options}
    where = {**given, **machine(), "command": command}
    print(json.dumps(without_nan({**measured, "conditions": where})), flush=True)


def machine() -> dict:
    """Where something was measured, and by what code."""
    return {"machine": processor(), "cores": cores(), "threads": 1, "commit": commit()}


def compared_rows(results: dict) -> dict[str, dict]:
    """Of each row of results.json what tables compare."""
    keys = ("n", "top1", "nll", "cnll")
    return {name: {key: row[key] for key in keys} for name, row in named_rows(results).items()}


def without_nan(value):
    """The same with null for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {str(key): without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def cores() -> int:
    return len(os.sched_getaffinity(0))


def commit() -> str:
    return output_of(["git", "rev-parse", "--short", "HEAD"])


def output_of(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def processor() -> str:
    """What /proc/cpuinfo calls it, where there is one."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_section(title: str, text: str, page: Path = PAGE) -> None:
    """Replace the section `## title` of the page, or add it.

    What a person wrote below a `### ` in it stays.
    """
    old = "# The papers' tables, ours beside them\n"
    if page.exists():
        old = page.read_text(encoding="utf-8")
    parts = old.split("\n## ")
    body = f"{title}\n\n{text.strip()}\n"
    titles = [part.splitlines()[0] for part in parts]
    if title in titles:
        index = titles.index(title)
        _, heading, by_hand = parts[index].partition("\n### ")
        parts[index] = body + heading + by_hand
    else:
        parts.append(body)
    page.write_text("\n## ".join(part.rstrip("\n") + "\n" for part in parts), encoding="utf-8")
