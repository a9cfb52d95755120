"""What a first config depends on, read from the shards."""

from __future__ import annotations

import glob
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pipeline.config import Data, UserError

from ..data.authoring.split_names import split_called
from ..data.fetching import FetchDir
from ..data.label_files import class_counts
from ..data.orders import generator
from ..data.patterns import URL, braces, expand
from ..data.shards import ShardSet, open_shards
from ..data.writing import MANIFEST, read_manifest, recorded_rules

InputKind = Literal["pictures", "text", "numbers"]

SPLITS = ("train", "val", "test")
TEXT_DECODERS = {"txt": "trainer.data.decoding:ngram_bag"}
LONG_TEXT_DECODERS = {"txt": "trainer.data.decoding:hashed_ngrams"}
LONG_TEXTS = 0.1  # with a larger share of texts that do not fit into a bag, texts are counted whole
SAMPLE = 2_000  # training examples that mean and std are computed of, at most
SAMPLE_BYTES = 256 * 2**20  # and what they may take, decoded
MOST_CHANNELS = 16  # an array [C, H, W] of more is no picture
MOST_COLUMNS = 4_096  # of vectors: beyond, one mean and one std serve all columns
# Columns are alike where their scales are within this factor and their means this close, in std.
ALIKE_SCALES = 3.0
ALIKE_MEANS = 1.0
FLAT = 1e-7  # a std below this share of the mean is rounding: the column is constant
FLAT_SHARE = 0.5  # pictures with so many pixels of one value are drawings, not photographs


@dataclass(frozen=True)
class DataSummary:
    """What a data set is, as far as a first config depends on it.

    Attributes
    ----------
    name : str
        As the user knows it.
    patterns : {split: str}
        What data.train, data.val and data.test say.
    examples : {split: int}
    num_classes : int
    smallest, largest : int
        Examples in train of the rarest class that has some, and of the most frequent one.
    present : int
        Classes with examples in train.
    kind : InputKind
        pictures [C, H, W], texts, or numbers of any shape.
    extensions : tuple of str
        Of the inputs' members.
    shape : tuple of int
    dtype : str
        Of one decoded input.
    mean, std : tuple of float
        Of inputs as the network reads them (uint8 scaled to 0..1): one value, or one per entry of
        the first axis.
    sampled : int
        Training examples that mean and std were computed of.
    constant : tuple of int
        Columns that have one value throughout the sample. Their std is 1.
    gray : bool
        Whether all channels are equal in the sample.
    drawn : bool
        Whether most of each picture has one value: letters, signs, sketches.
    decoders : {extension: function}
        What data.decoders needs to say.
    cut : float
        Of texts that become bags of indices: the share that fill theirs, so that more may be lost.
    label, input : str
        What data.label and data.input need to say.
    reading_s : float
        Seconds that reading and decoding one example took.
    """

    name: str
    patterns: Mapping[str, str]
    examples: Mapping[str, int]
    num_classes: int
    smallest: int
    largest: int
    present: int
    kind: InputKind
    extensions: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    sampled: int = 0
    constant: tuple[int, ...] = ()
    gray: bool = False
    drawn: bool = False
    decoders: Mapping[str, str] = field(default_factory=dict)
    label: str = "cls"
    input: str = ""
    reading_s: float = 0.0
    cut: float = 0.0

    @property
    def is_bags(self) -> bool:
        """Whether the inputs are texts as bags of indices."""
        return self.decoders == TEXT_DECODERS

    @property
    def bytes_decoded(self) -> int:
        """Bytes of all splits."""
        return sum(self.examples.values()) * self.bytes_of_one

    @property
    def bytes_of_one(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    @property
    def split_bytes(self) -> int:
        """Bytes of the largest split, decoded."""
        return max(self.examples.values()) * self.bytes_of_one


# Where the splits are


@dataclass(frozen=True)
class Shards:
    """A set of shards with a manifest: where it lies, and what the manifest says.

    chosen: a pattern of some of its training shards, where the user named those alone.
    """

    place: str
    manifest: dict
    chosen: str = ""

    @property
    def made_by(self) -> dict:
        return self.manifest.get("made_by") or {}


def find_shards(place: str) -> Shards | None:
    """The shards with a manifest that `place` names. None where there is no manifest.

    place: a directory or its URL, or a pattern of tars in one.
    Raises UserError for a manifest that cannot be read.
    """
    directory = place.rstrip("/") if len(place) > 1 else place
    chosen = ""
    if ".tar" in os.path.basename(directory) and not os.path.isdir(directory):
        chosen = place
        directory = os.path.dirname(braces(directory.split("::")[0])[0]) or "."
    if place.startswith("pipe:"):
        return None
    if directory.startswith(URL):
        manifest = FetchDir(Data()).manifest(f"{directory}/{MANIFEST}", optional=True)
    else:
        manifest = read_manifest(directory)
    return Shards(directory, manifest, chosen) if manifest else None


def patterns_of(shards: Shards) -> dict[str, str]:
    """{split: what data.SPLIT says}, of the splits that there are, whatever they are called."""
    patterns: dict[str, str] = {}
    for name, entry in shards.manifest["splits"].items():
        split = name if name in SPLITS else split_called(name)
        if split is None or split in patterns:
            continue
        names = [shard["name"] for shard in entry["shards"]]
        if split == "train" and shards.chosen and _chooses_some(shards.chosen, names):
            patterns[split] = shards.chosen
        elif name == split:
            patterns[split] = shards.place
        else:
            patterns[split] = "::".join(f"{glob.escape(shards.place)}/{name}" for name in names)
    return {split: patterns[split] for split in SPLITS if split in patterns}


def _chooses_some(pattern: str, names: list[str]) -> bool:
    """Whether a pattern means some of these shards and no other.

    Raises UserError where it means some of them and others too.
    """
    meant = {shard.entry["name"] for shard in expand(pattern, Data(), "train") if shard.entry}
    if meant >= set(names):
        return False
    if meant <= set(names):
        return True
    raise UserError(f"{pattern} means shards of several splits; name their directory instead")


def check_splits(
    shards: Shards, patterns: Mapping[str, str], needed: Sequence[str] = SPLITS
) -> None:
    """Raises UserError, with the command that helps, where a split that is needed is missing."""
    missing = [split for split in needed if split not in patterns]
    if not missing:
        return
    there = ", ".join(shards.manifest["splits"]) or "none"
    raise UserError(
        f"{shards.place} has no {' and no '.join(missing)} split (it has {there}): a run needs "
        f"train, val and test; {_remedy(shards, missing)}"
    )


def _remedy(shards: Shards, missing: list[str]) -> str:
    """The command that takes the missing splits of train."""
    if "train" in missing:
        return "call the tars to learn from train-000000.tar, ... and run `referral shards index`"
    if _has_no_pair(shards):
        return "no class of train has two examples, so none can be held out: bring these splits"
    made_by = shards.made_by
    again = _made_again(shards)
    fractions = [word for split in missing for word in (f"--{split}", "0.1")]
    if again:
        words = [*again, "--out", shards.place, *fractions, "--overwrite"]
    else:
        words = ["from-webdataset", f"{shards.place}/*.tar", "--out", f"{shards.place}-split"]
        words += fractions
        for option in ("label", "input"):
            if made_by.get(option, "cls") != "cls":
                words += [f"--{option}", made_by[option]]
    return f"`referral shards {shlex.join(words)}` takes them of train"


def _has_no_pair(shards: Shards) -> bool:
    """Whether no class has two examples in train. False where the manifest lies elsewhere."""
    if shards.place.startswith(URL) or "train" not in shards.manifest["splits"]:
        return False
    return class_counts(shards.place, shards.manifest, "train").max(initial=0) < 2


def _made_again(shards: Shards) -> list[str]:
    """The `shards` command that wrote them, by the manifest. [] where it does not say all."""
    made_by = shards.made_by
    command = made_by.get("command", "").removeprefix("shards ")
    files = made_by.get("files", [])
    if command == "folder" and "directory" in made_by:
        return ["folder", made_by["directory"], *_picture_options(shards)]
    if command == "arrays" and files:
        return ["arrays", *files]
    if command == "table" and len(files) == 1:
        named = {option: made_by.get(option) for option in ("text", "label")}
        options = [(f"--{option}", column) for option, column in named.items() if column]
        return ["table", *files, *(word for option in options for word in option)]
    return []


def _picture_options(shards: Shards) -> list[str]:
    """--size and --gray, by the rules that the manifest records."""
    rules = recorded_rules(shards.manifest)
    options = []
    if rules and rules.size:
        options += ["--size", str(rules.size[0])]
    if rules and rules.channels == 1:
        options.append("--gray")
    return options


# What the inputs are


def summarise(shards: Shards, name: str = "", needed: Sequence[str] = SPLITS) -> DataSummary:
    """Open all splits and look at a sample of train.

    needed: the splits that there must be.
    Raises UserError where a split is missing or unreadable.
    """
    patterns = patterns_of(shards)
    check_splits(shards, patterns, needed)
    data = _data_of(shards)
    opened = {split: open_shards(pattern, data, split) for split, pattern in patterns.items()}
    train = opened["train"]
    counts = train.class_counts[train.class_counts > 0]
    if len(counts) < 2:
        raise UserError(
            f"{shards.place}: train has examples of {len(counts)} class; at least 2 are needed"
        )
    kind = kind_of(train)
    cut = 0.0
    if kind == "text":
        cut = float((sample_of(train)[:, -1] >= 0).mean())
        if cut > LONG_TEXTS:
            data = data.model_copy(update={"decoders": LONG_TEXT_DECODERS})
            train, cut = open_shards(patterns["train"], data, "train"), 0.0
    began = time.perf_counter()
    inputs = sample_of(train)
    reading_s = (time.perf_counter() - began) / len(inputs)
    mean, std, constant = moments(scaled(inputs), kind)
    return DataSummary(
        name=name or shards.place,
        patterns=patterns,
        examples={split: len(each) for split, each in opened.items()},
        num_classes=train.num_classes,
        smallest=int(counts.min()),
        largest=int(counts.max()),
        present=len(counts),
        kind=kind,
        extensions=tuple(train.input_extensions),
        shape=tuple(train.input_shape),
        dtype=str(train.input_dtype),
        mean=mean,
        std=std,
        sampled=len(inputs),
        constant=constant,
        gray=kind == "pictures" and is_gray(inputs),
        drawn=kind == "pictures" and is_drawn(inputs),
        decoders=data.decoders,
        label=data.label,
        input=data.input,
        reading_s=reading_s,
        cut=cut,
    )


def _data_of(shards: Shards) -> Data:
    """[data] as the shards have to be read: `shards index` leaves members as they are."""
    made_by = shards.made_by
    data = Data()
    if made_by.get("command") == "shards index":
        data = Data(label=made_by.get("label", "cls"), input=made_by.get("input", ""))
    train = open_shards(patterns_of(shards)["train"], data, "train")
    if "txt" in train.input_extensions:
        data = data.model_copy(update={"decoders": TEXT_DECODERS})
    return data


def kind_of(train: ShardSet) -> InputKind:
    if "txt" in train.input_extensions:
        return "text"
    shape = train.input_shape
    is_picture = len(shape) == 3 and shape[0] <= MOST_CHANNELS and min(shape[1:]) > 1
    return "pictures" if is_picture else "numbers"


def sample_of(train: ShardSet) -> np.ndarray:
    """[n, ...]: a random sample of the training inputs. The same one every time."""
    size = int(np.prod(train.input_shape)) * train.input_dtype.itemsize
    count = max(1, min(len(train), SAMPLE, SAMPLE_BYTES // max(size, 1)))
    ids = np.sort(generator(0, 6).permutation(len(train))[:count])
    return train.inputs(ids)


def scaled(inputs: np.ndarray) -> np.ndarray:
    """Inputs as the network reads them before mean and std: uint8 over 255, others as is."""
    factor = 1 / 255 if inputs.dtype == np.uint8 else 1.0
    return inputs.astype(np.float32) * np.float32(factor)


def moments(
    inputs: np.ndarray, kind: InputKind
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]]:
    """(mean, std, constant columns) of inputs [n, ...].

    Pictures have one value per channel.  Vectors have one per column where columns differ in scale
    or place, so that none drowns the others, else, as everything else, one for all.
    """
    per_entry = kind == "pictures" or (
        kind == "numbers" and inputs.ndim == 2 and inputs.shape[1] <= MOST_COLUMNS
    )
    if not per_entry:
        return _overall(inputs)
    axes = (0, *range(2, inputs.ndim))
    mean = inputs.mean(axes, dtype=np.float64)
    std = inputs.std(axes, dtype=np.float64)
    flat = std <= FLAT * np.maximum(np.abs(mean), 1e-12)
    if flat.all():
        raise UserError(
            "all inputs of the sample are one and the same: there is nothing to learn from them"
        )
    if kind == "numbers" and _alike(mean, std, flat):
        return _overall(inputs)
    std = np.where(flat, 1.0, std)
    return _rounded(mean, std), _rounded(std, std), tuple(np.flatnonzero(flat).tolist())


def _alike(mean: np.ndarray, std: np.ndarray, flat: np.ndarray) -> bool:
    """Whether one mean and std serve all columns."""
    if flat.any():
        return False
    typical = float(np.median(std))
    spread = float(mean.max() - mean.min())
    return bool(std.max() <= ALIKE_SCALES * std.min() and spread <= ALIKE_MEANS * typical)


def _overall(inputs: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]]:
    mean, std = inputs.mean(dtype=np.float64), inputs.std(dtype=np.float64)
    if std <= FLAT * max(abs(mean), 1e-12):
        raise UserError(
            "all inputs of the sample are one and the same: there is nothing to learn from them"
        )
    scale = np.array([std])
    return _rounded(np.array([mean]), scale), _rounded(scale, scale), ()


def _rounded(values: np.ndarray, std: np.ndarray) -> tuple[float, ...]:
    """Round to a thousandth of the std, so that a mean far from 0 keeps what tells apart."""
    decimals = 3 - np.floor(np.log10(std)).astype(int)
    pairs = zip(values.tolist(), decimals.tolist(), strict=True)
    return tuple(round(value, places) for value, places in pairs)


def is_gray(inputs: np.ndarray) -> bool:
    """Whether pictures [n, C, H, W] show no colour."""
    return bool((inputs == inputs[:, :1]).all())


def is_drawn(inputs: np.ndarray) -> bool:
    """Whether in the typical picture most pixels have one value, as paper behind ink has."""
    shares = []
    for picture in inputs[:200]:
        _, counts = np.unique(picture[0], return_counts=True)
        shares.append(counts.max() / picture[0].size)
    return float(np.median(shares)) >= FLAT_SHARE
