"""Render glyphs of fonts into labelled shards: many confusable classes for machines without data.

A class is a character, or several that every face draws alike (Latin A, Greek Alpha).  Each glyph
is drawn once.  An image is a random distortion of one face's drawing. Its randomness is a pure
function of (seed, split, character, k).

`glyph_fonts` finds and draws faces, `glyph_classes` decides which characters become classes,
`glyph_drawing` distorts, and this module makes the shards.
"""

from __future__ import annotations

import glob
import multiprocessing
import os
import platform
import re
import shutil
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import UserError
from pipeline.failures import cannot_write
from pipeline.store import write_json

from ..tars import index_path
from ..writing import MANIFEST, ShardWriter, write_manifest
from .glyph_classes import (
    Advance,
    Glyphs,
    class_name,
    default_characters,
    draw_glyphs,
    merged_classes,
)
from .glyph_drawing import SIDE, Distortion, distort, num_uniform, png, random_uniform
from .glyph_fonts import find_faces

__all__ = [
    "Distortion",
    "Glyphs",
    "PlannedShard",
    "ShardMaker",
    "class_name",
    "plan_shards",
    "render_glyphs",
]

DEFAULT_MIN_FACES = 5
IMAGES_PER_CLASS = {"train": 200, "val": 40, "test": 20}
WORTH_A_PROCESS = 20_000  # images that take about as long as starting a process
PER_SHARD = 10_000
CHUNK = 2048  # images distorted together. The same whatever the number of processes
NOISE_BANK = 1 << 20  # offsets where an image's noise may start
SPLIT = re.compile(r"[A-Za-z0-9_]+")


class PlannedShard(NamedTuple):
    """One shard to render.  classes, k: int64 [n], each image's class and its number within it."""

    split: str
    number: int
    classes: np.ndarray
    k: np.ndarray


def render_glyphs(
    out: str | Path,
    fonts: Sequence[str | Path] | None = None,
    classes: int | str | None = None,
    size: int = SIDE,
    per_class: dict[str, int] | None = None,
    seed: int = 0,
    distortion: Distortion | None = None,
    min_faces: int | None = None,
    processes: int = 1,
    progress: bool = True,
    force: bool = False,
) -> Glyphs:
    """Write shards of gray PNG images, manifest.json and merged.json into the new directory `out`.

    `out` appears only when complete, and does not depend on `processes`.

    Parameters
    ----------
    out : path
    fonts : sequence of paths, optional
        Files or directories of fonts. None takes matplotlib's DejaVu faces.
    classes : int or str, optional
        The characters. N, the first N classes, or None, all that the fonts draw (with DejaVu: of
        DEFAULT_RANGES).
    size : int
        Side of the images in pixels.
    per_class : {split: images of each class}, optional
        None is IMAGES_PER_CLASS.
    seed : int
    distortion : Distortion, optional
    min_faces : int, optional
        A character counts if so many faces draw it. None is 5 with DejaVu, else 1.
    processes : int
        At most so many. Small sets take fewer.
    progress : bool
        Show a bar on stderr.
    force : bool
        Replace `out` if it holds shards.

    Returns
    -------
    Glyphs
        The drawings that the images were made of.

    Raises
    ------
    UserError
        For a font that is none, fonts that draw none of the classes, counts below 1, and an `out`
        that is not empty or cannot be written.
    """
    out = Path(os.path.abspath(out))
    distortion = distortion or Distortion()
    per_class = dict(IMAGES_PER_CLASS if per_class is None else per_class)
    _check_numbers(per_class, size, processes, min_faces)
    _check_out(out, force)
    faces = find_faces(fonts)
    min_faces = min_faces or _default_min_faces(fonts)
    made_by = {
        "command": "referral shards glyphs",
        "seed": seed,
        "size": size,
        "per_class": per_class,
        "distortion": asdict(distortion),
        "min_faces": min_faces,
        "fonts": [Path(face.path).name for face in faces],
    }
    unfinished = _unfinished_path(out)
    limit = classes if isinstance(classes, int) else None
    with _progress_bar(progress) as advance:
        characters = _requested_characters(classes, fonts)
        glyphs = draw_glyphs(faces, characters, size, min_faces, limit, advance)
        if not isinstance(classes, str):
            glyphs.left_out = ""
        with _written(unfinished, out):
            splits = _write_shards(
                unfinished, glyphs, size, per_class, seed, distortion, processes, advance
            )
            write_manifest(unfinished, glyphs.class_names, splits, made_by)
            write_json(unfinished / "merged.json", merged_classes(glyphs))
            _put_in_place(unfinished, out, force)
    return glyphs


def _default_min_faces(fonts: Sequence[str | Path] | None) -> int:
    return DEFAULT_MIN_FACES if fonts is None else 1


def _requested_characters(
    classes: int | str | None, fonts: Sequence[str | Path] | None
) -> str | None:
    if isinstance(classes, str):
        return classes
    return default_characters() if fonts is None else None


def _write_shards(
    directory: Path,
    glyphs: Glyphs,
    size: int,
    per_class: dict[str, int],
    seed: int,
    distortion: Distortion,
    processes: int,
    advance: Advance,
) -> dict[str, dict]:
    """Render all shards into `directory`.  Returns the manifest's {split: entry}."""
    num_classes = len(glyphs.count)
    plan: list[PlannedShard] = []
    for split, count in per_class.items():
        plan += plan_shards(split, num_classes, count, seed)
    splits: dict[str, dict] = {split: {"samples": 0, "shards": []} for split in per_class}
    total = num_classes * sum(per_class.values())
    done = 0
    processes = max(1, min(processes, total // WORTH_A_PROCESS))
    drawn = (glyphs.drawings, glyphs.first, glyphs.count, glyphs.codes)
    options = (glyphs.class_names, size, seed, distortion)
    with _shard_makers(processes, directory, *drawn, *options) as make_all:
        for shard, entry in zip(plan, make_all(plan), strict=True):
            splits[shard.split]["shards"].append(entry)
            splits[shard.split]["samples"] += entry["samples"]
            done += entry["samples"]
            advance("rendering", done, total)
    return splits


def plan_shards(split: str, num_classes: int, per_class: int, seed: int) -> list[PlannedShard]:
    """Each of the split's shards, the classes mixed."""
    total = num_classes * per_class
    order = np.random.default_rng([seed, zlib.crc32(split.encode())]).permutation(total)
    parts = [order[start : start + PER_SHARD] for start in range(0, total, PER_SHARD)]
    return [
        PlannedShard(split, number, part % num_classes, part // num_classes)
        for number, part in enumerate(parts)
    ]


class ShardMaker:
    """Renders whole shards: (split, number, classes [n], k [n]) -> the shard's manifest entry.

    drawings, first, count, codes: as in Glyphs.
    """

    def __init__(
        self,
        drawings: np.ndarray,
        directory: Path,
        first: np.ndarray,
        count: np.ndarray,
        codes: np.ndarray,
        class_names: list[str],
        size: int,
        seed: int,
        distortion: Distortion,
    ):
        self.drawings = drawings
        self.directory = directory
        self.first, self.count = first, count
        self.codes = codes
        self.class_names = class_names
        self.size = size
        self.seed = seed
        self.distortion = distortion
        # Noise is a window of one long sequence, at a random offset: draws of its own for each
        # pixel cost too much.
        generator = torch.Generator().manual_seed(seed)
        self.bank = torch.randn(NOISE_BANK + size**2, generator=generator)

    def __call__(self, split: str, number: int, classes: np.ndarray, k: np.ndarray) -> dict:
        workplace = self.directory / f".{split}-{number:06d}"
        with ShardWriter(workplace, split, self.class_names, len(classes)) as writer:
            for start in range(0, len(classes), CHUNK):
                chunk = slice(start, start + CHUNK)
                self._write(writer, split, classes[chunk], k[chunk])
        [entry] = writer.facts["shards"]
        made = workplace / entry["name"]
        shard = self.directory / f"{split}-{number:06d}.tar"
        os.rename(index_path(made), index_path(shard))
        os.rename(made, shard)
        workplace.rmdir()
        return entry | {"name": shard.name}

    def _write(self, writer: ShardWriter, split: str, classes: np.ndarray, k: np.ndarray) -> None:
        # PNG wants a filter byte before each row of pixels. 0 is none.
        rows = F.pad(self.images(split, classes, k), (1, 0)).numpy()
        for label, copy, row in zip(classes.tolist(), k.tolist(), rows, strict=True):
            key = f"{split}-{self.codes[label]:05x}-{copy:05d}"
            image = png(row.tobytes(), self.size)
            writer.write({"__key__": key, "cls": str(label).encode(), "png": image})

    def images(self, split: str, classes: np.ndarray, k: np.ndarray) -> Tensor:
        """uint8 [n, size, size]: image k of each class."""
        codes = self.codes[classes]
        u = random_uniform(self.seed, split, codes, k, num_uniform(self.distortion) + 2)
        # Every face in turn, from one that differs between classes and splits.
        start = random_uniform(self.seed, f"{split}/face", codes, np.zeros(len(codes)), 1)[:, 0]
        face = (k + (start * self.count[classes]).astype(np.int64)) % self.count[classes]
        drawings = torch.from_numpy(self.drawings[self.first[classes] + face])
        offset = torch.from_numpy((u[:, -1] * NOISE_BANK).astype(np.int64))
        windows = self.bank.as_strided((NOISE_BANK, self.size**2), (1, 1))[offset]
        noise = windows * torch.from_numpy(u[:, -2:-1] * np.float32(2 * self.distortion.noise))
        noise = noise.view(-1, self.size, self.size)
        return distort(drawings, u[:, :-2], noise, self.size, self.distortion)


# Processes

_maker: ShardMaker | None = None  # a worker's own

MakeAll = Callable[[Sequence[PlannedShard]], Iterator[dict]]


def _start_worker(drawings: Path, *arguments: Any) -> None:
    global _maker
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at once and silently. The parent clears up
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _maker = ShardMaker(np.load(drawings, mmap_mode="r"), *arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(shard: PlannedShard) -> dict:
    assert _maker is not None
    return _maker(*shard)


@contextmanager
def _shard_makers(
    processes: int, directory: Path, drawings: np.ndarray, *arguments: Any
) -> Iterator[MakeAll]:
    """A function from the list of shards to their manifest entries, in order.

    arguments: of ShardMaker, behind the directory.
    """
    if processes == 1:
        make = ShardMaker(drawings, directory, *arguments)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
        try:
            yield lambda plan: (make(*shard) for shard in plan)
        finally:
            torch.set_num_threads(threads)
        return
    shared = directory / ".drawings.npy"
    np.save(shared, drawings)
    # Not fork: torch's threads do not survive one.
    context = multiprocessing.get_context("spawn")
    initargs = (shared, directory, *arguments)
    with ProcessPoolExecutor(processes, context, _start_worker, initargs) as pool:
        try:
            yield lambda plan: pool.map(_work, plan)
        finally:
            pool.shutdown(cancel_futures=True)
    shared.unlink()


# The output directory


def _unfinished_path(out: Path) -> Path:
    """A name beside `out` for this process.

    Removes what dead processes of this machine left there.
    """
    mark = f".{out.name}.unfinished-{platform.node()}-"
    for left in out.parent.glob(f"{glob.escape(mark)}*"):
        pid = left.name.removeprefix(mark).removesuffix(".old")
        if pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(left, ignore_errors=True)
    return out.with_name(f"{mark}{os.getpid()}")


@contextmanager
def _written(unfinished: Path, out: Path) -> Iterator[None]:
    """Make the directory `unfinished`, and remove it in the end.  Errors become the user's."""
    try:
        unfinished.mkdir(parents=True)
        yield
    except OSError as error:
        raise cannot_write(out, error) from None
    except BrokenProcessPool:
        raise UserError(
            "a rendering process died, perhaps for want of memory; try --processes 1"
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _put_in_place(unfinished: Path, out: Path, force: bool) -> None:
    old = out.with_name(f"{unfinished.name}.old")
    if force and out.exists():
        os.rename(out, old)
    os.rename(unfinished, out)  # also onto an empty directory
    shutil.rmtree(old, ignore_errors=True)


# Checks


def _check_numbers(
    per_class: dict[str, int], size: int, processes: int, min_faces: int | None
) -> None:
    if not per_class:
        raise UserError("no split to render; give images per class for train, val or test")
    for split, count in per_class.items():
        if not SPLIT.fullmatch(split):
            raise UserError(f"split {split!r}: use letters, digits and '_'")
        if count < 1:
            raise UserError(f"{split} = {count} images per class: must be at least 1")
    if not 8 <= size <= 1024:
        raise UserError(f"size = {size}: must be from 8 to 1024")
    if processes < 1:
        raise UserError(f"processes = {processes}: must be at least 1")
    if min_faces is not None and min_faces < 1:
        raise UserError(f"min_faces = {min_faces}: must be at least 1")


def _check_out(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a new directory")
    try:
        filled = out.exists() and any(out.iterdir())
    except OSError as error:
        raise UserError(f"{out}: cannot be read: {error.strerror}") from None
    if filled and not force:
        raise UserError(f"{out} is not empty; give a new directory, or --overwrite to replace it")
    if filled and not (out / MANIFEST).exists():
        raise UserError(
            f"{out} holds no shards ({MANIFEST}), so --overwrite does not replace it; "
            "give a new directory"
        )
    parent = next(path for path in out.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{out}: cannot be made: no permission to write in {parent}")


@contextmanager
def _progress_bar(shown: bool) -> Iterator[Advance]:
    """A function (what, done, of) that moves a progress bar on stderr."""
    from rich import progress

    from pipeline.terminal import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        tasks = {}

        def advance(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=of)
            bar.update(tasks[what], completed=done)

        yield advance
