"""Render glyphs of fonts into labelled shards: a data set with many confusable classes for machines without one.

A class is a character, or several that every face draws alike (Latin A, Greek Alpha).  Each glyph is drawn once; an
image is a random distortion of one face's drawing, its randomness a pure function of (seed, split, character, k).
"""

from __future__ import annotations

import errno
import glob
import hashlib
import multiprocessing
import os
import platform
import re
import shutil
import signal
import struct
import threading
import unicodedata
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn import functional as F
from typer import Option

from pipeline.config import UserError
from pipeline.store import write_json

from ..tars import index_path
from ..writing import MANIFEST, ShardWriter, write_manifest

SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
DEJAVU = [
    f"DejaVu{family}{style}.ttf"
    for family, slanted in (("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic"))
    for style in ("", "-Bold", f"-{slanted}", f"-Bold{slanted}")
]
# Latin, IPA, Greek, Cyrillic, Armenian, Georgian, currency signs, letterlike symbols and number forms, arrows.
DEFAULT_RANGES = [
    (0x21, 0x24F),
    (0x250, 0x2AF),
    (0x370, 0x3FF),
    (0x400, 0x52F),
    (0x531, 0x58F),
    (0x10A0, 0x10FF),
    (0x20A0, 0x20BF),
    (0x2100, 0x218F),
    (0x2190, 0x21FF),
]
DEFAULT_MIN_FACES = 5
WORTH_A_PROCESS = 20_000  # images that take about as long as starting a process
PER_SHARD = 10_000
CHUNK = 2048  # images distorted together; the same whatever the number of processes
NOISE_BANK = 1 << 20  # places where an image's noise may start
SPLIT = re.compile(r"[A-Za-z0-9_]+")
SIDE = 28  # shift and elastic are given in pixels of an image of this side


@dataclass(frozen=True)
class Distortion:
    """How far images differ from the drawing; U(a) is uniform on [-a, a], pixels are those of a 28 x 28 image.

    rotation: U, degrees.  shear: U.  scale: U around 1, for each axis.  shift: U, pixels.
    elastic: standard deviation, in pixels, of the control points' displacement, bicubic between them.
    grid: control points along a side.  contrast: ink is between 1 - contrast and 1, paper between 0 and contrast / 2.
    noise: the mean over images of its standard deviation (full ink is 1), which lies between 0 and twice that.
    """

    rotation: float = 6.0
    shear: float = 0.1
    scale: float = 0.1
    shift: float = 1.0
    elastic: float = 0.6
    grid: int = 5
    contrast: float = 0.3
    noise: float = 0.04

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not 0 <= value < float("inf"):
                raise UserError(f"{name} = {value}: must be 0 or more")
        if self.grid < 2 or self.scale >= 1 or self.contrast > 1:
            raise UserError(
                f"grid = {self.grid}, scale = {self.scale}, contrast = {self.contrast}: must be >= 2, < 1, <= 1"
            )

    def times(self, strength: float) -> Distortion:
        """Every amplitude multiplied by `strength`."""
        if not strength >= 0:
            raise UserError(f"strength = {strength}: must be 0 or more")
        values = asdict(self)
        scaled = {name: value * strength for name, value in values.items() if name != "grid"}
        return Distortion(**values | scaled | {"contrast": min(1.0, scaled["contrast"])})


class Face(NamedTuple):
    path: str
    index: int  # within a collection


@dataclass
class Glyphs:
    """Drawings of classes.

    drawings: uint8 [N, S, S].  Class c has count[c] of them, from first[c] on, one per face that draws it.
    characters: those of each class, in order of code point.  left_out: those asked for that too few faces draw.
    """

    drawings: np.ndarray
    first: np.ndarray
    count: np.ndarray
    characters: list[str]
    left_out: str

    @property
    def codes(self) -> np.ndarray:
        """int64 [C]: the code point that stands for each class."""
        return np.array([ord(characters[0]) for characters in self.characters])

    @property
    def class_names(self) -> list[str]:
        return [class_name(characters[0]) for characters in self.characters]


def class_name(character: str) -> str:
    """`A U+0041 LATIN CAPITAL LETTER A`."""
    return f"{character} U+{ord(character):04X} {unicodedata.name(character, '')}".rstrip()


def render_glyphs(
    out: str | Path,
    fonts: list[str | Path] | None = None,
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
    """Write shards of gray size x size PNG images, manifest.json and merged.json into the new directory `out`.

    fonts: files or directories of fonts; None takes matplotlib's DejaVu faces.
    classes: the characters; N, the first N classes; or None, all that the fonts draw (with DejaVu: of DEFAULT_RANGES).
    per_class: images of each class, by split; None is {"train": 200, "val": 40, "test": 20}.
    min_faces: a character counts if so many faces draw it; None is 5 with DejaVu, else 1.
    force: replace `out` if it holds shards.  `out` appears only when complete, and does not depend on `processes`.
    Raises UserError for a font that is none, fonts that draw none of the classes, counts below 1, and an `out` that
    is not empty or cannot be written.
    """
    out, distortion = Path(os.path.abspath(out)), distortion or Distortion()
    per_class = {"train": 200, "val": 40, "test": 20} if per_class is None else dict(per_class)
    _check_numbers(per_class, size, processes, min_faces)
    _check_out(out, force)
    faces = find_faces(fonts)
    characters = classes if isinstance(classes, str) else None
    if characters is None and fonts is None:
        codes = (code for low, high in DEFAULT_RANGES for code in range(low, high + 1))
        characters = "".join(chr(code) for code in codes if _is_symbol(code))
    limit = classes if isinstance(classes, int) else None
    min_faces = min_faces or (DEFAULT_MIN_FACES if fonts is None else 1)
    made_by = {
        "command": "referral shards glyphs",
        "seed": seed,
        "size": size,
        "per_class": per_class,
    }
    made_by |= {"distortion": asdict(distortion), "min_faces": min_faces}
    made_by |= {"fonts": [Path(face.path).name for face in faces]}
    unfinished = _place_to_work(out)
    with _bar(progress) as advance:
        glyphs = draw_glyphs(faces, characters, size, min_faces, limit, advance)
        if not isinstance(classes, str):
            glyphs.left_out = ""
        processes = max(
            1, min(processes, len(glyphs.count) * sum(per_class.values()) // WORTH_A_PROCESS)
        )
        try:
            unfinished.mkdir(parents=True)
            drawn = glyphs.drawings, glyphs.first, glyphs.count, glyphs.codes
            plan = [
                shard
                for split, count in per_class.items()
                for shard in plan_shards(split, len(glyphs.count), count, seed)
            ]
            splits = {split: {"samples": 0, "shards": []} for split in per_class}
            total, done = sum(len(classes) for _, _, classes, _ in plan), 0
            with _shard_makers(
                processes, unfinished, *drawn, glyphs.class_names, size, seed, distortion
            ) as make_all:
                for (split, *_), facts in zip(plan, make_all(plan), strict=True):
                    splits[split]["shards"].append(facts)
                    splits[split]["samples"] += facts["samples"]
                    done += facts["samples"]
                    advance("rendering", done, total)
            write_manifest(unfinished, glyphs.class_names, splits, made_by)
            write_json(unfinished / "merged.json", merged(glyphs))
            _put_in_place(unfinished, out, force)
        except OSError as mistake:
            raise UserError(f"{out}: cannot be written: {mistake.strerror or mistake}") from None
        except BrokenProcessPool:
            raise UserError(
                "a rendering process died, perhaps for want of memory; try --processes 1"
            ) from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return glyphs


def merged(glyphs: Glyphs) -> list[dict]:
    """The classes of several characters: [{"class": index, "name", "characters": [names of all]}]."""
    return [
        {
            "class": index,
            "name": class_name(characters[0]),
            "characters": [class_name(c) for c in characters],
        }
        for index, characters in enumerate(glyphs.characters)
        if len(characters) > 1
    ]


def find_faces(fonts: list[str | Path] | None = None) -> list[Face]:
    """The faces in font files, in directories of them, and in collections; None: matplotlib's DejaVu faces.

    Raises UserError for a path that is absent or no font.
    """
    if fonts is None:
        from matplotlib import get_data_path

        return [Face(str(Path(get_data_path(), "fonts", "ttf", name)), 0) for name in DEJAVU]
    paths = []
    for font in map(Path, fonts):
        if font.is_dir():
            inside = sorted(path for path in font.rglob("*") if path.suffix.lower() in SUFFIXES)
            if not inside:
                raise UserError(f"{font}: no font files ({', '.join(SUFFIXES)}) in this directory")
            paths += inside
        elif font.exists():
            paths.append(font)
        else:
            raise UserError(f"{font}: no such font file")
    if not paths:
        raise UserError("no fonts: give font files or directories of them")
    return [Face(str(path), index) for path in paths for index in range(_num_faces(path))]


def draw_glyphs(
    faces: list[Face],
    characters: str | None,
    size: int,
    min_faces: int,
    limit: int | None = None,
    advance=None,
) -> Glyphs:
    """Draw each of `characters` (None: whatever the faces have) with every face, and merge those that look the same.

    Two characters are one class if at least `min_faces` faces draw both, and all that do draw the same pixels.
    limit: keep the first so many classes.  Raises UserError if no class is left, or fewer than `limit`.
    """
    # As large as the image with a margin of 1/7: distortions then move little ink off the canvas.
    side = -(-size * 8 // 7)
    codes = (
        sorted({ord(c) for c in characters if not c.isspace()}) if characters is not None else None
    )
    drawn: dict[int, dict[int, tuple[bytes, np.ndarray]]] = {}
    for number, face in enumerate(faces):
        for code, digest, drawing in _draw_face(face, codes, side):
            drawn.setdefault(code, {})[number] = (digest, drawing)
        if advance:
            advance("drawing", number + 1, len(faces))
    groups = merge_identical(
        {code: {f: d for f, (d, _) in by.items()} for code, by in drawn.items()}, min_faces
    )
    if limit is not None and len(groups) < limit:
        raise UserError(
            f"classes = {limit}: at least {min_faces} faces draw only {len(groups)} different glyphs"
        )
    groups = groups[:limit]
    if len(groups) < 2:
        what = f"{len(codes)} characters" if codes is not None else "their characters"
        raise UserError(
            f"{_list_faces(faces)}: of {what} {len(groups)} are drawn by at least {min_faces} of these faces; "
            "two classes are needed"
        )
    drawings, counts = [], []
    for group in groups:
        by_face = {
            face: drawing for code in reversed(group) for face, (_, drawing) in drawn[code].items()
        }
        drawings += [by_face[face] for face in sorted(by_face)]
        counts.append(len(by_face))
    kept = {code for group in groups for code in group}
    left_out = "".join(chr(code) for code in codes or () if code not in kept)
    count = np.array(counts)
    return Glyphs(
        np.stack(drawings),
        np.cumsum(count) - count,
        count,
        ["".join(map(chr, group)) for group in groups],
        left_out,
    )


def merge_identical(digests: dict[int, dict[int, bytes]], min_faces: int) -> list[list[int]]:
    """Groups of codes that look the same.  digests[code][face]: a fingerprint of the drawing.

    Codes drawn by fewer than min_faces faces are left out.  Groups and their codes are in ascending order.
    """
    groups: list[list[int]] = []
    looks: list[dict[int, bytes]] = []  # of each group, over all faces that draw one of its codes
    with_drawing: dict[tuple[int, bytes], list[int]] = {}
    for code in sorted(digests):
        own = digests[code]
        if len(own) < min_faces:
            continue
        candidates = dict.fromkeys(
            group for item in own.items() for group in with_drawing.get(item, ())
        )
        for group in candidates:
            shared = own.keys() & looks[group].keys()
            if len(shared) >= min_faces and all(own[face] == looks[group][face] for face in shared):
                break
        else:
            group = len(groups)
            groups.append([])
            looks.append({})
        groups[group].append(code)
        for face, digest in own.items():
            looks[group][face] = digest
            alike = with_drawing.setdefault((face, digest), [])
            if group not in alike:
                alike.append(group)
    return groups


def distort(
    drawings: Tensor, uniform: np.ndarray, noise: Tensor, size: int, distortion: Distortion
) -> Tensor:
    """uint8 drawings [B, S, S], ink 255 on 0 -> uint8 images [B, size, size].

    uniform: float32 [B, num_uniform(distortion)] in [0, 1).  noise: [B, size, size], added; full ink is 1.
    """
    u = torch.from_numpy(uniform)
    spread, rest = u[:, :8], u[:, 8:]
    both_ways = spread * 2 - 1
    angle = both_ways[:, 0] * (distortion.rotation * np.pi / 180)
    shear = both_ways[:, 1] * distortion.shear
    scale_x, scale_y = (1 + both_ways[:, 2:4] * distortion.scale).unbind(1)
    shift = both_ways[:, 4:6] * (distortion.shift * 2 / SIDE)  # grid_sample's unit is half a side
    cos, sin = angle.cos(), angle.sin()
    rows_x = torch.stack([cos * scale_x, (shear - sin) * scale_x, shift[:, 0]], 1)
    rows_y = torch.stack([sin * scale_y, cos * scale_y, shift[:, 1]], 1)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    plane = torch.stack([x.flatten(), y.flatten(), torch.ones(size * size)])
    field = torch.stack([rows_x @ plane, rows_y @ plane], -1)  # [B, size * size, 2]
    if distortion.elastic:
        # Box and Muller: two independent normals, the two directions of a control point.
        radius = (-2 * torch.log1p(-rest[:, 0::2])).sqrt() * (distortion.elastic * 2 / SIDE)
        turn = rest[:, 1::2] * (2 * np.pi)
        between = _bicubic(distortion.grid, size)
        field += torch.stack([(radius * turn.cos()) @ between, (radius * turn.sin()) @ between], -1)
    ink = drawings[:, None].float() / 255
    images = F.grid_sample(
        ink, field.view(-1, size, size, 2), mode="bilinear", align_corners=False
    )[:, 0]
    full = 1 - spread[:, 6, None, None] * distortion.contrast
    paper = spread[:, 7, None, None] * (distortion.contrast / 2)
    images = paper + images * (full - paper)
    images += noise
    return (images.clamp_(0, 1) * 255).round_().byte()


def random_uniform(
    seed: int, split: str, codes: np.ndarray, k: np.ndarray, draws: int
) -> np.ndarray:
    """float32 [B, draws] in [0, 1): each number is a hash of (seed, split, codes[b], k[b], draw)."""
    start = hashlib.blake2b(f"{seed}/{split}".encode(), digest_size=8).digest()
    start = np.frombuffer(start, np.uint64)
    image = _mix(_mix(start + codes.astype(np.uint64)) + k.astype(np.uint64))
    draw = _mix(np.arange(1, draws + 1, dtype=np.uint64))
    return (_mix(image[:, None] ^ draw) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def num_uniform(distortion: Distortion) -> int:
    """Random numbers of one image's geometry and contrast."""
    return 8 + 2 * distortion.grid**2


def png(image: bytes, size: int) -> bytes:
    """A gray PNG of size rows, each a zero byte and `size` pixels.

    Ours and not Pillow's, which takes longer than all the rest of the rendering.  Small images are stored uncompressed:
    in a tar they take the same two blocks of 512 bytes either way.
    """
    header = struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0)
    body = zlib.compress(image, 0 if len(image) < 950 else 1)
    parts = [(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


class ShardMaker:
    """Renders whole shards: (split, number, classes [n], k [n]) -> the shard's entry of the manifest."""

    def __init__(
        self,
        drawings,
        directory: Path,
        first,
        count,
        codes,
        class_names,
        size,
        seed,
        distortion: Distortion,
    ):
        self.drawings, self.first, self.count, self.codes = drawings, first, count, codes
        self.directory, self.class_names = directory, class_names
        self.size, self.seed, self.distortion = size, seed, distortion
        # Noise is a window of one long sequence, at a random place: draws of its own for each pixel cost too much.
        self.bank = torch.randn(NOISE_BANK + size**2, generator=torch.Generator().manual_seed(seed))

    def __call__(self, split: str, number: int, classes: np.ndarray, k: np.ndarray) -> dict:
        workplace = self.directory / f".{split}-{number:06d}"
        with ShardWriter(
            workplace, split, self.class_names, samples_per_shard=len(classes)
        ) as writer:
            for start in range(0, len(classes), CHUNK):
                labels, copies = classes[start : start + CHUNK], k[start : start + CHUNK]
                rows = F.pad(
                    self.images(split, labels, copies), (1, 0)
                ).numpy()  # PNG's filter byte of a row: none
                for label, copy, row in zip(labels.tolist(), copies.tolist(), rows, strict=True):
                    key = f"{split}-{self.codes[label]:05x}-{copy:05d}"
                    image = png(row.tobytes(), self.size)
                    writer.write({"__key__": key, "cls": str(label).encode(), "png": image})
        [facts] = writer.facts["shards"]
        made, shard = workplace / facts["name"], self.directory / f"{split}-{number:06d}.tar"
        os.rename(index_path(made), index_path(shard))
        os.rename(made, shard)
        workplace.rmdir()
        return facts | {"name": shard.name}

    def images(self, split: str, classes: np.ndarray, k: np.ndarray) -> Tensor:
        """uint8 [n, size, size]"""
        codes = self.codes[classes]
        u = random_uniform(self.seed, split, codes, k, num_uniform(self.distortion) + 2)
        # Every face in turn, from one that differs between classes and splits.
        start = random_uniform(self.seed, f"{split}/face", codes, np.zeros(len(codes)), 1)[:, 0]
        face = (k + (start * self.count[classes]).astype(np.int64)) % self.count[classes]
        drawings = torch.from_numpy(self.drawings[self.first[classes] + face])
        place = torch.from_numpy((u[:, -1] * NOISE_BANK).astype(np.int64))
        windows = self.bank.as_strided((NOISE_BANK, self.size**2), (1, 1))[place]
        noise = windows * torch.from_numpy(u[:, -2:-1] * np.float32(2 * self.distortion.noise))
        return distort(
            drawings, u[:, :-2], noise.view(-1, self.size, self.size), self.size, self.distortion
        )


_worker: ShardMaker | None = None


def _start_worker(drawings: Path, *arguments) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at once and silently; the parent clears up
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker = ShardMaker(np.load(drawings, mmap_mode="r"), *arguments)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(shard: tuple) -> dict:
    return _worker(*shard)


@contextmanager
def _shard_makers(processes: int, directory: Path, drawings: np.ndarray, *arguments):
    """A function: list of shards to make -> iterator of their entries of the manifest, in order."""
    if processes == 1:
        make, threads = ShardMaker(drawings, directory, *arguments), torch.get_num_threads()
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
    with ProcessPoolExecutor(
        processes, context, _start_worker, (shared, directory, *arguments)
    ) as pool:
        try:
            yield lambda plan: pool.map(_work, plan)
        finally:
            pool.shutdown(cancel_futures=True)
    shared.unlink()


def plan_shards(split: str, num_classes: int, per_class: int, seed: int) -> list[tuple]:
    """(split, number, classes [n], k [n]) of each of the split's shards, the classes mixed."""
    total = num_classes * per_class
    order = np.random.default_rng([seed, zlib.crc32(split.encode())]).permutation(total)
    parts = [order[start : start + PER_SHARD] for start in range(0, total, PER_SHARD)]
    return [
        (split, number, part % num_classes, part // num_classes)
        for number, part in enumerate(parts)
    ]


def _place_to_work(out: Path) -> Path:
    """A name beside `out` for this process; what dead processes of this machine left there is removed."""
    mark = f".{out.name}.unfinished-{platform.node()}-"
    for left in out.parent.glob(f"{glob.escape(mark)}*"):
        number = left.name.removeprefix(mark).removesuffix(".old")
        if number.isdecimal() and not Path("/proc", number).exists():
            shutil.rmtree(left, ignore_errors=True)
    return out.with_name(f"{mark}{os.getpid()}")


def _put_in_place(unfinished: Path, out: Path, force: bool) -> None:
    old = out.with_name(f"{unfinished.name}.old")
    if force and out.exists():
        os.rename(out, old)
    os.rename(unfinished, out)  # also onto an empty directory
    shutil.rmtree(old, ignore_errors=True)


def _num_faces(path: Path) -> int:
    from fontTools.ttLib import TTCollection, TTLibError

    try:
        if path.suffix.lower() in (".ttc", ".otc"):
            return len(TTCollection(path, lazy=True).fonts)
        with _open_face(Face(str(path), 0)) as font:
            font.getBestCmap()
        return 1
    except OSError as mistake:
        raise UserError(f"{path}: cannot be read: {mistake.strerror or mistake}") from None
    except (TTLibError, KeyError, AssertionError, struct.error):
        raise UserError(f"{path}: not a font ({', '.join(SUFFIXES)})") from None


def _open_face(face: Face):
    from fontTools.ttLib import TTFont

    collection = face.path.lower().endswith((".ttc", ".otc"))
    return TTFont(face.path, lazy=True, fontNumber=face.index if collection else -1)


def _draw_face(
    face: Face, codes: list[int] | None, side: int
) -> Iterator[tuple[int, bytes, np.ndarray]]:
    """(code, fingerprint, uint8 [side, side]) of each code (None: all) that the face has ink for.

    Drawn at twice the size and averaged: the baseline at 0.7 of the height, the ink centred, so c and C differ in size.
    """
    from PIL import Image, ImageDraw, ImageFont

    with _open_face(face) as font:
        has = set(font.getBestCmap() or ())
    codes = (
        sorted(code for code in has if _is_symbol(code))
        if codes is None
        else [code for code in codes if code in has]
    )
    large = 2 * side
    basic = ImageFont.Layout.BASIC  # the same with and without libraqm
    try:
        pen = ImageFont.truetype(
            face.path, round(large * 0.72), index=face.index, layout_engine=basic
        )
    except OSError:
        raise UserError(f"{face.path}: cannot be drawn; outline fonts are needed") from None
    for code in codes:
        left, top, right, bottom = pen.getbbox(chr(code), anchor="ls")
        if right <= left or bottom <= top:
            continue
        canvas = Image.new("L", (large, large))
        place = ((large - left - right) / 2, round(large * 0.7))
        ImageDraw.Draw(canvas).text(place, chr(code), fill=255, font=pen, anchor="ls")
        pixels = np.asarray(canvas)
        if pixels.max() < 128:
            continue
        drawing = pixels.reshape(side, 2, side, 2).mean((1, 3)).round().astype(np.uint8)
        yield code, hashlib.blake2b(pixels.tobytes(), digest_size=16).digest(), drawing


def _list_faces(faces: list[Face]) -> str:
    names = list(dict.fromkeys(Path(face.path).name for face in faces))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_symbol(code: int) -> bool:
    """A letter, number, punctuation mark or symbol that stands alone: nothing combining, modifying or invisible."""
    category = unicodedata.category(chr(code))
    return category[0] in "LNPS" and category != "Lm"


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's step (Steele, Lea, Flood 2014) on uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _bicubic(grid: int, size: int) -> Tensor:
    """[grid * grid, size * size]: each control point's share in the displacement of each pixel."""
    points = torch.eye(grid * grid).view(-1, 1, grid, grid)
    return F.interpolate(points, size=(size, size), mode="bicubic", align_corners=True).view(
        grid * grid, -1
    )


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
    except OSError as mistake:
        raise UserError(f"{out}: cannot be read: {mistake.strerror}") from None
    if filled and not force:
        raise UserError(f"{out} is not empty; give a new directory, or --overwrite to replace it")
    if filled and not (out / MANIFEST).exists():
        raise UserError(
            f"{out} holds no shards ({MANIFEST}), so --overwrite does not replace it; give a new directory"
        )
    parent = next(path for path in out.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{out}: cannot be made: no permission to write in {parent}")


@contextmanager
def _bar(shown: bool):
    """A function (what, done, of) that moves a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        tasks = {}

        def advance(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=of)
            bar.update(tasks[what], completed=done)

        yield advance


def read_classes(text: str | None) -> int | str | None:
    """What --classes says: a number, the characters of a text file, or the characters themselves."""
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    try:
        if Path(text).is_file():
            return Path(text).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{text}: not a UTF-8 text file") from None
    except OSError as mistake:
        if mistake.errno != errno.ENAMETOOLONG:
            raise UserError(f"{text}: cannot be read: {mistake.strerror}") from None
    if text.endswith(".txt"):
        raise UserError(f"{text}: no such file of characters")
    return text


def add_glyphs_command(app: typer.Typer) -> None:
    """Add `glyphs` to a typer application."""
    default = Distortion()

    @app.command()
    def glyphs(
        out: Annotated[Path, Option(help="the new directory")],
        fonts: Annotated[
            list[Path] | None,
            Option(
                help="font file or directory of fonts; repeat for more [DejaVu]", show_default=False
            ),
        ] = None,
        classes: Annotated[
            str | None, Option(help="the characters, a text file of them, or N: the first N")
        ] = None,
        size: Annotated[int, Option(help="side of the images in pixels")] = SIDE,
        train: Annotated[int, Option(help="images per class; likewise --val and --test")] = 200,
        val: Annotated[int, Option()] = 40,
        test: Annotated[int, Option()] = 20,
        min_faces: Annotated[
            int | None, Option(help="faces that must draw a character [5; with --fonts 1]")
        ] = None,
        strength: Annotated[float, Option(help="multiplies all the distortions that follow")] = 1.0,
        rotation: Annotated[float, Option(help="degrees")] = default.rotation,
        shear: Annotated[float, Option()] = default.shear,
        scale: Annotated[float, Option()] = default.scale,
        shift: Annotated[
            float, Option(help="pixels of a 28 x 28 image; likewise --elastic")
        ] = default.shift,
        elastic: Annotated[float, Option()] = default.elastic,
        contrast: Annotated[float, Option()] = default.contrast,
        noise: Annotated[float, Option()] = default.noise,
        seed: Annotated[int, Option(min=0)] = 0,
        processes: Annotated[int | None, Option(help="[one per core]")] = None,
        overwrite: Annotated[
            bool, Option("--overwrite", "--force", help="replace the shards in --out")
        ] = False,
    ) -> None:
        """Render a labelled data set of glyph images from fonts: shards, manifest.json, merged.json."""
        distortion = Distortion(
            rotation, shear, scale, shift, elastic, default.grid, contrast, noise
        ).times(strength)
        per_class = {"train": train, "val": val, "test": test}
        processes = processes if processes is not None else len(os.sched_getaffinity(0))
        made = render_glyphs(
            out,
            fonts,
            read_classes(classes),
            size,
            per_class,
            seed,
            distortion,
            min_faces,
            processes,
            force=overwrite,
        )
        several = sum(len(characters) > 1 for characters in made.characters)
        images = ", ".join(
            f"{split} {count * len(made.characters):,}" for split, count in per_class.items()
        )
        print(
            f"{out}: {len(made.characters)} classes, {several} of several characters (merged.json); images: {images}"
        )
        if made.left_out:
            shown = made.left_out[:40] + ("..." if len(made.left_out) > 40 else "")
            print(
                f"left out, because too few faces draw them: {len(made.left_out)} characters: {shown}"
            )
