"""`referral init DATA [--out CONFIG.toml]`: write a first config for data of your own.

DATA is a directory of shards, or raw data: a directory per class, npz, npy, idx, csv, parquet or
tar files.  Of raw data the shards are made first, by the `referral shards` command that is
printed.  Nothing is trained.  Every key of the config says why it has its value.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.config import Config, UserError, load_config
from pipeline.files import write_text
from pipeline.redaction import shown
from pipeline.usage import Parser

from ..data.writing import MANIFEST
from ..distributed.ranks import choose_device
from ..proposal.data_summary import DataSummary, Shards, find_shards, summarise
from ..proposal.document import document
from ..proposal.estimate import in_words, run_seconds, seconds_per_example
from ..proposal.raw_data import shards_command, written
from ..proposal.settings import Hardware, Setting, propose
from ..stages.networks import fresh_network
from .check import check, look_only
from .needs import free_memory, gib
from .shards import make as make_shards


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    check_target(args.out, args.force)
    shards = find_shards(args.data) or shards_of_raw(args.data, args.shards, args.force)
    run = args.run or Path("runs") / args.out.stem
    summary = summarise(shards)
    hardware = this_hardware()
    settings = propose(summary, hardware)
    config = config_of(settings)
    seconds = checked(config, summary, hardware, run)
    command = shlex.join(["referral", "init", *argv])
    header = header_of(command, summary, hardware, args.out, run, seconds)
    write_config(args.out, document(header, settings))
    print(f"{args.out}: {described(summary)}; every key says why it has its value")
    print(f"all of it at once: {command_of('run', args.out, run)}")
    print(f"next: {command_of('advise', args.out, run)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "referral init",
        "Write a first config for data of your own, with a reason beside every key; train nothing."
        "\n\nShards of raw data are made first, by the `referral shards` command that is printed.",
        "referral init shards/ --out mine.toml",
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        help="shards; or raw data: a directory per class, npz, npy, idx, csv, parquet or tar files",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("config.toml"),
        metavar="CONFIG.toml",
        help="the config to write [config.toml]",
    )
    parser.add_argument(
        "--run", type=Path, metavar="DIR", help="the run that its header names [runs/CONFIG]"
    )
    parser.add_argument(
        "--shards", type=Path, metavar="DIR", help="where the shards of raw data go [DATA-shards]"
    )
    parser.add_argument("--force", action="store_true", help="replace CONFIG.toml and the shards")
    return parser


# Shards


def shards_of_raw(place: str, out: Path | None, force: bool) -> Shards:
    """Make shards of raw data. The command is printed.  Raises UserError where that fails."""
    target = out or Path(f"{data_name(place)}-shards")
    if (target / MANIFEST).exists() and not force:
        raise UserError(
            f"{target} holds shards already: referral init {shlex.quote(str(target))} takes them; "
            "--force makes them anew"
        )
    words = shards_command(place, str(target))
    if force:
        words.append("--overwrite")
    print(f"{place} holds no shards yet: {written(words)}", flush=True)
    try:
        make_shards(words)
    except UserError as error:
        then = shlex.join(["referral", "init", str(target)])
        raise UserError(f"{error} (that was `{written(words)}`; after it: {then})") from None
    shards = find_shards(str(target))
    assert shards is not None, target
    return shards


def data_name(place: str) -> str:
    """What shards and config of raw data are called: photos of data/photos/, mnist of mnist.npz."""
    name = Path(place.split("::")[0]).name or Path(place).absolute().name
    stem = name.split(".")[0].split("{")[0].split("*")[0].rstrip("-_")
    return stem or "data"


# The machine, and the config on it


def this_hardware() -> Hardware:
    gpus = tuple(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count()))
    device = torch.device("cuda" if gpus else "cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Hardware(cores or 1, free_memory(device), gpus)


def config_of(settings: Sequence[Setting]) -> Config:
    """The settings as `referral run` reads them."""
    return load_config(None, [], values_of(settings))


def values_of(settings: Sequence[Setting]) -> dict:
    """The settings as tables in tables."""
    values: dict = {}
    for setting in settings:
        *sections, key = setting.key.split(".")
        table = values
        for section in sections:
            table = table.setdefault(section, {})
        table[key] = setting.value
    return values


def checked(config: Config, summary: DataSummary, hardware: Hardware, run: Path) -> float:
    """Check the config as `referral prepare` does. Returns the seconds that a run may take."""
    ranks = config.launch.processes or 1
    for warning in check(config, ranks, run):
        print(shown(f"warning: {warning}"), file=sys.stderr)
    device = choose_device(config.engine)
    network = fresh_network(look_only(config, device))
    of_one = seconds_per_example(network, config.train.batch_size // ranks, device)
    return run_seconds(config, summary, of_one, len(hardware.gpus) or hardware.cores)


# The file


def check_target(path: Path, force: bool) -> None:
    """Raises UserError where the config cannot be written."""
    if path.is_dir():
        raise UserError(f"--out {path} is a directory; name a file, e.g. {path / 'config.toml'}")
    if path.exists() and not force:
        raise UserError(f"{path} exists; --force replaces it, --out names another file")


def write_config(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error.strerror}") from None
    load_config(path)


def command_of(name: str, out: Path, run: Path) -> str:
    return shlex.join(["referral", name, str(out), "--run", str(run)])


def header_of(
    command: str, data: DataSummary, hardware: Hardware, out: Path, run: Path, seconds: float
) -> list[str]:
    """The first lines: what this is for, the commands, the machine, the time, the data."""
    machine = f"{hardware.cores} cores"
    if hardware.gpus:
        machine += f", {len(hardware.gpus)} x {hardware.gpus[0]}"
    sizes = f"{data.smallest:,} to {data.largest:,}"
    if data.smallest == data.largest:
        sizes = f"{data.smallest:,}"
    lines = [
        f"{data.name}: {described(data)}.",
        "",
        f"  {command_of('advise', out, run)}",
        f"  {command_of('run', out, run)}",
        f"  {command_of('run', out, run)} --dry-run",
        "",
        f"Written by: {command}",
        f"Data: {sizes} training examples in a class",
    ]
    if data.present < data.num_classes:
        absent = data.num_classes - data.present
        lines.append(f"  {absent} classes have no training example: nothing is learnt about them")
    memory = f"{gib(hardware.memory)} of memory free"
    lines += [
        f"Hardware: {machine}, {memory}",
        f"Time: {in_words(seconds)} for all networks, a rough estimate from a few timed steps",
        "These values are a starting point. docs/recipe.md says what to try next.",
    ]
    return lines


def described(data: DataSummary) -> str:
    """1,055 classes of texts: 14,051 train, 3,003 val, 3,003 test."""
    counts = ", ".join(f"{count:,} {split}" for split, count in data.examples.items())
    return f"{data.num_classes:,} classes of {kind_in_words(data)}: {counts}"


def kind_in_words(data: DataSummary) -> str:
    if data.kind == "text":
        return "texts"
    if data.kind == "numbers":
        return f"{data.dtype} {list(data.shape)}"
    channels, height, width = data.shape
    colour = f"pictures of {channels} channels"
    if channels == 1:
        colour = "gray pictures"
    elif channels == 3:
        colour = "gray pictures in three channels" if data.gray else "colour pictures"
    return f"{colour}, {height} x {width}"
