"""`referral demo`: the main job on glyph images that it renders itself."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path

from pipeline.config import Config, UserError, load_config
from pipeline.config.loading import apply_override
from pipeline.store import read_json, write_json

from .calling import TRAINER, call_trainer

SPLITS = ("train", "val", "test")

# A network so small, and trained until more training no longer helps: the regime in which
# specialists pay (docs/demo.md).
DEMO = """
[data]
mean = [0.157]
std = [0.275]

[model]
name = "convnet"
width = 12
depth = 2
embedding = 24
options = { kernel = [5, 3], stride = [3, 2], padding = "valid" }

[train]
steps = 4000
batch_size = 512
learning_rate = 1e-2
beta2 = 0.99
weight_decay = 0.0
log_every = 100
checkpoint_every = 500
validate_every = 1000

[clusters]
num_groups = 24
overlap = 2

[specialists]
steps = 300
learning_rate = 5e-3
log_every = 25
validate_every = 100
per_job = 6

[controls]
rows = ["average", "shortlist"]  # what pilots advise, beside the specialists

[launch]
side_by_side = ["members", "specialists", "controls", "students"]  # small networks: a core each

[students.main]
steps = 4000
learning_rate = 1e-2
temperature = 2.0
answers_mass = 0.0  # 32 classes and an even tail: at T = 2 better on val than the whole answer
soft_weight = 0.3
hard_weight = 0.7
validate_every = 1000

[students.wide]
steps = 3000
learning_rate = 1e-2
temperature = 2.0
answers_mass = 0.0  # 32 classes and an even tail: at T = 2 better on val than the whole answer
soft_weight = 0.3
hard_weight = 0.7
validate_every = 1000
model = { width = 24, embedding = 48 }
"""

QUICK = [
    "train.steps=300",
    "train.validate_every=100",
    "clusters.num_groups=6",
    "specialists.steps=40",
    "specialists.validate_every=0",
    "specialists.per_job=3",
    "students.main.steps=100",
    "students.wide.steps=100",
    "controls.rows=[]",
]

# Options of `referral shards glyphs`: images of each class and split.
GLYPHS = {"train": "60", "val": "20", "test": "20"}
QUICK_GLYPHS = {"classes": "200"}


QUICK_MEANS_LITTLE = (
    "These figures mean little: so few classes and steps only show that every stage runs. The "
    "demo itself takes about 10 minutes on 2 cores"
)


def whole_demo(root: Path) -> str:
    """The command of the demo itself, of another run, since RUN/data is another one."""
    beside = root.with_name(f"{root.name}-whole")
    return shlex.join(["referral", "demo", "--run", str(beside)])


def demo_config(root: Path, seed: int, quick: bool, overrides: list[str]) -> Config:
    """The demo's config with its data in RUN/data."""
    base = tomllib.loads(DEMO)
    base["seed"] = seed
    base["data"] |= {split: str(root / "data") for split in SPLITS}
    if quick:
        for override in QUICK:
            apply_override(base, override)
    return load_config(None, overrides, base)


def announcement(root: Path, quick: bool) -> str:
    if quick:
        return (
            f"{root}: only a look at every stage, about a minute on 2 cores; "
            "fewer classes and steps than the demo, so its metrics mean little"
        )
    return (
        f"{root}: renders glyphs, trains a generalist, asks small pilots what pays, then trains a "
        "specialist for each group of classes that it confuses, controls and students; about "
        "8 minutes on 2 cores"
    )


def has_glyphs(root: Path, seed: int, quick: bool) -> bool:
    """Whether RUN/data is there and complete.

    Raises UserError if it was made with other options.
    """
    data = root / "data"
    if not is_complete(data):
        return False
    made_with, options = _read(data / "demo.json"), glyph_options(seed, quick)
    if made_with != options:
        raise UserError(
            f"{data} was made with {_words(made_with)}, not with {_words(options)}; "
            "choose another --run, or remove it"
        )
    return True


def glyph_options(seed: int, quick: bool) -> dict[str, str]:
    options = {"seed": str(seed), **GLYPHS}
    if quick:
        options |= QUICK_GLYPHS
    return options


def make_glyphs(root: Path, seed: int, quick: bool, trainer: list[str] | None = None) -> None:
    """Render RUN/data.  Exits with the renderer's code if it fails."""
    data, options = root / "data", glyph_options(seed, quick)
    command = [*(trainer or TRAINER), "shards", "glyphs", "--out", str(data)]
    for key, value in options.items():
        command += [f"--{key}", value]
    code = call_trainer([*command, "--overwrite"])
    if code:
        raise SystemExit(code)
    write_json(data / "demo.json", options)


def is_complete(data: Path) -> bool:
    """Whether every shard that the manifest names is there in full."""
    manifest = _read(data / "manifest.json")
    if not manifest or not set(SPLITS) <= set(manifest["splits"]):
        return False
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    return all(_size(data / shard["name"]) == shard["bytes"] for shard in shards)


def _words(options: dict | None) -> str:
    """Options as they are written on a command line."""
    if not options:
        return "other options"
    return " ".join(f"--{key} {value}" for key, value in options.items())


def _read(path: Path):
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
