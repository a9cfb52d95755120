"""What the papers' tables share: data, runs that go on where they stopped, means over seeds, a section of the page.

Every experiment is a run of `referral`: its config is what a user would write, and a run that is done costs nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import tomli_w
import torch
import torch.nn.functional as F

from pipeline.store import read_json, write_json

DATA = Path(os.environ.get("REFERRAL_DATA", Path(__file__).parents[3] / "shared" / "data"))
PAGE = Path(__file__).parents[2] / "docs" / "papers.md"
# glibc would give each step's large buffers back to the system and ask for them anew: a fifth of the time, measured.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "OMP_NUM_THREADS": "1",
}


def arguments(description: str, seeds=(0, 1, 2), page: Path = PAGE) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--to",
        type=Path,
        default=Path("runs/papers"),
        help="runs and data go below it (runs/papers)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of every run"
    )
    parser.add_argument("--write", action="store_true", help=f"put the table into docs/{page.name}")
    return parser


def referral(*words: str) -> None:
    """A command of referral's, its output shown; ends this program with its exit code if it fails."""
    command = [sys.executable, "-m", "launch.cli", *map(str, words)]
    code = subprocess.run(
        command, env=os.environ | ENVIRONMENT, cwd=Path(__file__).parents[2]
    ).returncode
    if code:
        raise SystemExit(code)


def shards(place: Path, make: Callable[[Path], None]) -> Path:
    """`place` with the shards that make(place) writes there; a manifest says that they are complete."""
    if not (place / "manifest.json").is_file():
        make(place)
    return place.resolve()


def finished(config: dict, place: Path, settings: Iterable[str] = ()) -> dict:
    """results.json of the run of `config` at `place`, which is run, or gone on with, until it is done."""
    place.mkdir(parents=True, exist_ok=True)
    written = place.with_name(f"{place.name}.toml")
    written.write_text(tomli_w.dumps(config), encoding="utf-8")
    words = [word for setting in settings for word in ("--set", setting)]
    referral("run", str(written.resolve()), "--run", str(place.resolve()), *words)
    return json.loads((place / "results.json").read_text(encoding="utf-8"))


def mnist(place: Path) -> None:
    """Shards of shared/data/mnist; a twelfth of each class of train is held out, 5,001 val."""
    files = sorted((DATA / "mnist").glob("*-ubyte.gz"))
    referral("shards", "arrays", *files, "--out", place, "--val", 1 / 12, "--test", 0)


def once(place: Path, work: Callable[[], dict]) -> dict:
    """What `work` finds, kept at `place` as JSON and not sought again."""
    if not place.exists():
        write_json(place, work())
    return read_json(place)


def affine(
    inputs: np.ndarray, uniforms: np.ndarray, turn: float, stretch: float, move: float
) -> np.ndarray:
    """Pictures uint8 [n, c, H, W], each turned by up to `turn` degrees, stretched and sheared by up to `stretch`, moved
    by up to `move` of a side; what comes in is 0.  uniforms: [n, 7]."""
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


def seconds(run: Path) -> float:
    """What the finished stages of a run took, one after the other."""
    done = (path for path in run.rglob("DONE") if path.parent.parent.name != "attempts")
    return sum(json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in done)


def errors(row: dict) -> float:
    """Test errors, a count."""
    return round((1 - row["top1"]) * row["n"])


def spread(values: Iterable[float], digits: int = 3) -> str:
    """mean +- sample deviation"""
    values = list(values)
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def table(header: list[str], rows: list[list]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def conditions(seeds: Iterable[int], command: str) -> str:
    """Machine, seeds, commit and command, for under a table."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=PAGE.parent
    )
    return (
        f"Seeds {', '.join(map(str, seeds))}; {processor()}, {len(os.sched_getaffinity(0))} cores, one thread each; "
        f"commit {commit.stdout.strip()}; `{command}`."
    )


def processor() -> str:
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ()
    ):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_section(title: str, text: str, page: Path = PAGE) -> None:
    """Replace the section `## title` of the page, or add it.  What a person wrote below a `### ` in it stays."""
    old = (
        page.read_text(encoding="utf-8")
        if page.exists()
        else "# The papers' tables, ours beside them\n"
    )
    parts = old.split("\n## ")
    body = f"{title}\n\n{text.strip()}\n"
    place = next((k for k, part in enumerate(parts) if part.splitlines()[0] == title), None)
    if place is None:
        parts.append(body)
    else:
        _, heading, by_hand = parts[place].partition("\n### ")
        parts[place] = body + heading + by_hand
    page.write_text("\n## ".join(part.rstrip("\n") + "\n" for part in parts), encoding="utf-8")
