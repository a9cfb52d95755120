"""Small data sets, each with a generalist of some 20 seconds on one core.

A set says how its shards are made, what the config of a run on them has, and how its levers are
set: the settings are those of the examples and benchmarks that the data come from, with fewer
classes or examples.  The splits are the same for every seed. A seed is one of networks.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import places
from benchmarks.characters import data as drawings
from benchmarks.characters import omniglot
from benchmarks.papers import diversity, lab
from benchmarks.rerank import naics as write_naics
from launch.demo import GLYPHS
from pipeline.config import Data
from trainer.data.authoring.arrays import write_arrays
from trainer.data.authoring.splitting import split_by_class, write_splits
from trainer.data.shards import open_shards
from trainer.data.writing import read_manifest

MADE_BY = {"command": "benchmarks.advice"}
SPLITS = ("train", "val", "test")
BF16 = {"precision": "bf16", "device": "cpu"}
FP32 = {"precision": "fp32", "device": "cpu"}


@dataclass(frozen=True)
class Set:
    """make: writes the shards to a directory.  config: of the generalist's run, without the data's
    places.  copies, branches: [clusters] and [specialists].  rerank: [rerank], where it is asked.
    is_new: whether no constant of pipeline.advice.extrapolation was fitted to it.
    """

    make: Callable[[Path], object]
    config: dict
    clusters: dict
    copies: dict
    branches: dict
    rerank: dict = field(default_factory=dict)
    shards: str = ""  # of another set, that has the same
    is_new: bool = False


# How each is made

GLYPH_CLASSES = 400
CHARACTERS, PER_CHARACTER = 800, {"seen": {"train": 70, "val": 7, "test": 14}, "unseen": {}}
OMNIGLOT, LATE_OMNIGLOT = slice(0, 600), slice(600, 1000)
DRAWERS = {"train": slice(0, 12), "val": slice(12, 16), "test": slice(16, 20)}
CIFAR_SHARES = {"val": 0.1, "test": 0.2}  # of 50,000
PLACES = 2000
MNIST = {"train": 5_000, "val": 10_000}  # of 60,000
VECTOR = 128  # numbers


def glyphs(out: Path) -> None:
    """The demo's, fewer classes."""
    counts = [word for split, count in GLYPHS.items() for word in (f"--{split}", count)]
    lab_trainer("shards", "glyphs", "--out", out, "--classes", GLYPH_CLASSES, *counts)


def lab_trainer(*words: object) -> None:
    from trainer.__main__ import main

    code = main([str(word) for word in words])
    if code:
        raise SystemExit(code)


def characters(out: Path) -> None:
    """OUT/seen. The unseen fonts are not asked about."""
    drawings.make(out, CHARACTERS, per_class=PER_CHARACTER)


def some_omniglot(out: Path) -> None:
    write_omniglot(out, OMNIGLOT)


def late_omniglot(out: Path) -> None:
    write_omniglot(out, LATE_OMNIGLOT)


def write_omniglot(out: Path, classes: slice) -> None:
    lab.require(omniglot.SOURCE)
    drawn = omniglot.pictures()[classes]
    inputs = {split: np.concatenate(drawn[:, drawers]) for split, drawers in DRAWERS.items()}
    labels = {
        split: np.arange(len(drawn)).repeat(drawers.stop - drawers.start)
        for split, drawers in DRAWERS.items()
    }
    write_arrays(inputs, labels, out, {}, 0, MADE_BY)


def cifar10(out: Path) -> None:
    lab.require(diversity.SOURCE)
    images, labels = diversity.pictures()
    own = len(labels) - diversity.PER_MOSAIC
    ids = split_by_class(labels[:own], CIFAR_SHARES, seed=0)

    def sample(index: int) -> dict:
        file = io.BytesIO()
        Image.fromarray(images[index]).save(file, "png")
        return {"png": file.getvalue(), "cls": b"%d" % labels[index]}

    write_splits(out, diversity.CLASSES, ids, sample, MADE_BY)


def some_places(out: Path) -> None:
    """Names of some places, drawn."""
    every = places.geonames()
    drawn = np.random.default_rng(0).permutation(sorted(every))[:PLACES]
    places.write_shards(out, {name: every[name] for name in sorted(drawn.tolist())})


def clinc150(out: Path) -> None:
    """The set's own splits, without what is out of scope."""
    source = lab.DATA / "clinc150" / "data_oos_plus.json.gz"
    lab.require(source)
    with gzip.open(source) as file:
        parts = json.load(file)
    texts, labels = {}, {}
    for split in SPLITS:
        texts[split] = np.array([text for text, _ in parts[split]])
        labels[split] = np.array([intent for _, intent in parts[split]])
    write_arrays(texts, labels, out, {}, 0, MADE_BY)


def few_mnist(out: Path) -> None:
    """5,000 of the training pictures to learn from, 10,000 others are val. The set's own test."""
    source = lab.DATA / "mnist"
    lab.require(source)
    inputs, labels = {}, {}
    for split, name in (("train", "train"), ("test", "t10k")):
        inputs[split] = idx(next(source.glob(f"{name}-images*"))).reshape(-1, 28, 28)
        labels[split] = idx(next(source.glob(f"{name}-labels*"))).astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels["train"]))
    chosen = {
        "train": order[: MNIST["train"]],
        "val": order[MNIST["train"] : sum(MNIST.values())],
    }
    x = {split: inputs["train"][ids] for split, ids in chosen.items()} | {"test": inputs["test"]}
    y = {split: labels["train"][ids] for split, ids in chosen.items()} | {"test": labels["test"]}
    write_arrays(x, y, out, {}, 0, MADE_BY)


def idx(path: Path) -> np.ndarray:
    """uint8, flat, of an idx .gz."""
    with gzip.open(path) as file:
        content = file.read()
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])


def vectors(out: Path) -> None:
    """NAICS as frozen vectors: tf-idf of character n-grams, and its largest singular vectors."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    phrases = out.with_name("naics")
    lab.shards(phrases, write_naics)
    texts, labels = {}, {}
    for split in SPLITS:
        opened = open_shards(str(phrases), Data(decoders=RAW), split)
        ids = np.arange(len(opened))
        texts[split] = [files["txt"].decode() for files in opened.raw(ids)]
        labels[split] = np.array(opened.class_names)[opened.labels]
    tf_idf = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, min_df=2)
    svd = TruncatedSVD(VECTOR, random_state=0)
    of_train = svd.fit_transform(tf_idf.fit_transform(texts["train"]))
    scale = of_train.std()
    x = {"train": of_train / scale}
    x |= {split: svd.transform(tf_idf.transform(texts[split])) / scale for split in ("val", "test")}
    x = {split: each.astype(np.float32) for split, each in x.items()}
    write_arrays(x, labels, out, {}, 0, MADE_BY)


RAW = {"txt": "trainer.data.decoding:ngram_bag"}

# How each is learned

DISTINCT = {"validate_every": 50, "patience": 3}
CHARACTER_CONFIG = {
    "data": {"mean": [0.24], "std": [0.33]},
    "model": {"name": "convnet", "width": 4, "depth": 3, "embedding": 8},
    "train": {
        "steps": 1600,
        "batch_size": 256,
        "learning_rate": 1e-2,
        "beta2": 0.99,
        "weight_decay": 0.0,
    },
    "engine": BF16,
}
CHARACTER_SPECIALISTS = {
    "clusters": {"num_groups": 12, "overlap": 2},
    "copies": {"steps": 160, "learning_rate": 2e-2, "validate_every": 40, "patience": 9},
    "branches": {"steps": 160, "learning_rate": 1e-2, "model": {"embedding": 64}},
    "rerank": {"k": 20, "random": 128},
}


def characters_of(embedding: int) -> Set:
    config = CHARACTER_CONFIG | {"model": CHARACTER_CONFIG["model"] | {"embedding": embedding}}
    return Set(characters, config, **CHARACTER_SPECIALISTS, shards="characters/seen")


BAG = {"name": "embedding_bag", "width": 8192, "embedding": 64, "dropout": 0.2}
BAG_DATA = {"data": {"decoders": {"txt": "trainer.data.decoding:ngram_bag"}}}


def gentle(peak: float, steps: int, **keys: object) -> dict:
    """A tenth of the peak, and the best step on val, the start among the candidates."""
    watched = {"validate_every": max(1, steps // 6), "patience": 3}
    return {"steps": steps, "learning_rate": peak / 10, **watched, **keys}


SETS: dict[str, Set] = {
    "naics": Set(
        write_naics,
        BAG_DATA
        | {
            "model": BAG,
            "train": {
                "steps": 1200,
                "batch_size": 256,
                "learning_rate": 3e-2,
                "weight_decay": 0.01,
            },
            "engine": FP32,
        },
        clusters={"num_groups": 16},
        copies=gentle(3e-2, 90),
        branches=gentle(3e-2, 150, model={"embedding": 64, "dropout": 0.2}),
        rerank={"k": 20, "random": 128},
    ),
    "clinc150": Set(
        clinc150,
        {
            "data": {
                "decoders": {"txt": "trainer.data.decoding:hashed_ngrams"},
                "mean": [0.0],
                "std": [0.1],
            },
            "model": {"name": "mlp", "width": 64, "depth": 1, "dropout": 0.3},
            "train": {"steps": 3000, "batch_size": 128, "learning_rate": 3e-3},
            "engine": FP32,
        },
        clusters={"num_groups": 8},
        copies=gentle(5e-3, 200),
        branches=gentle(1e-2, 200, model={"embedding": 64, "dropout": 0.2}),
    ),
    "glyphs": Set(
        glyphs,
        {
            "data": {"mean": [0.157], "std": [0.275]},
            "model": {
                "name": "convnet",
                "width": 12,
                "depth": 2,
                "embedding": 24,
                "options": {"kernel": [5, 3], "stride": [3, 2], "padding": "valid"},
            },
            "train": {
                "steps": 1600,
                "batch_size": 512,
                "learning_rate": 1e-2,
                "beta2": 0.99,
                "weight_decay": 0.0,
            },
            "engine": FP32,
        },
        clusters={"num_groups": 12, "overlap": 2},
        copies={"steps": 160, "learning_rate": 5e-3, "validate_every": 40, "patience": 9},
        branches={"steps": 160, "learning_rate": 1e-2, "model": {"embedding": 48}},
    ),
    "chars8": characters_of(8),
    "chars32": characters_of(32),
    "cifar10": Set(
        cifar10,
        {
            "data": {
                "mean": [0.491, 0.482, 0.447],
                "std": [0.247, 0.243, 0.262],
                "augment": "flip-crop",
            },
            "model": {
                "name": "convnet",
                "embedding": 0,
                "options": {"channels": [8, 16, 32, 64], "kernel": [5, 3, 3, 3]},
            },
            "train": {
                "steps": 1200,
                "batch_size": 128,
                "learning_rate": 0.004,
                "weight_decay": 0.02,
                "warmup": 0.1,
                "beta2": 0.99,
            },
            "engine": BF16,
        },
        clusters={"num_groups": 3, "overlap": 2},
        copies=gentle(1e-2, 400),
        branches=gentle(1e-2, 400, model={"embedding": 64}),
    ),
    "places": Set(
        some_places,
        BAG_DATA
        | {
            "model": BAG,
            "train": {
                "steps": 1000,
                "batch_size": 256,
                "learning_rate": 3e-2,
                "weight_decay": 0.01,
            },
            "engine": FP32,
        },
        clusters={"num_groups": 16},
        copies=gentle(3e-2, 90, dustbin_rows=1000),
        branches=gentle(3e-2, 150, model={"embedding": 64, "dropout": 0.2}),
        rerank={"k": 50, "random": 256},
    ),
    "omniglot": Set(
        some_omniglot,
        {
            "data": {
                "mean": [0.12],
                "std": [0.31],
                "augment": "benchmarks.characters.omniglot:distort",
            },
            "model": {"name": "convnet", "width": 8, "depth": 3, "embedding": 16},
            "train": {
                "steps": 1200,
                "batch_size": 256,
                "learning_rate": 1e-2,
                "beta2": 0.99,
                "weight_decay": 0.0,
            },
            "engine": BF16,
        },
        clusters={"num_groups": 12, "overlap": 2},
        copies={"steps": 100, "learning_rate": 1e-2, "validate_every": 25, "patience": 9},
        branches={"steps": 100, "learning_rate": 1e-2, "model": {"embedding": 48}},
        rerank={"k": 20, "random": 128},
    ),
    "mnist": Set(
        few_mnist,
        {
            "data": {"mean": [0.0], "std": [1.0]},
            "model": {"name": "mlp", "width": 256, "depth": 2, "dropout": 0.2},
            "train": {"steps": 1500, "batch_size": 256, "learning_rate": 2e-3},
            "engine": FP32,
        },
        clusters={"num_groups": 3, "overlap": 2},
        copies=gentle(5e-3, 500),
        branches=gentle(1e-2, 500, model={"embedding": 64, "dropout": 0.2}),
    ),
    "vectors": Set(
        vectors,
        {
            "data": {"mean": [0.0], "std": [1.0]},
            "model": {"name": "mlp", "width": 256, "depth": 1, "dropout": 0.3},
            "train": {"steps": 2000, "batch_size": 256, "learning_rate": 3e-3},
            "engine": FP32,
        },
        clusters={"num_groups": 16},
        copies=gentle(5e-3, 150),
        branches=gentle(1e-2, 150, model={"embedding": 64, "dropout": 0.2}),
        rerank={"k": 20, "random": 128},
    ),
}

# Sets that came later.  What the fit says of training on was settled with `narrow` in sight.  No
# constant comes from the others.
SETS |= {
    "clinc_bag": Set(
        clinc150,
        BAG_DATA
        | {
            "model": {"name": "embedding_bag", "width": 8192, "embedding": 32, "dropout": 0.2},
            "train": {
                "steps": 1200,
                "batch_size": 128,
                "learning_rate": 3e-2,
                "weight_decay": 0.01,
            },
            "engine": FP32,
        },
        clusters={"num_groups": 8},
        copies=gentle(3e-2, 100),
        branches=gentle(3e-2, 150, model={"embedding": 32, "dropout": 0.2}),
        shards="clinc150",
        is_new=True,
    ),
    "narrow": Set(
        vectors,
        {
            "data": {"mean": [0.0], "std": [1.0]},
            "model": {"name": "mlp", "width": 24, "depth": 1},
            "train": {"steps": 2500, "batch_size": 256, "learning_rate": 3e-3},
            "engine": FP32,
        },
        clusters={"num_groups": 16},
        copies={"steps": 150, "learning_rate": 2e-3, "validate_every": 30, "patience": 9},
        branches={"steps": 150, "learning_rate": 3e-3, "model": {"embedding": 64}},
        rerank={"k": 20, "random": 128},
        shards="vectors",
    ),
    "late_omniglot": Set(
        late_omniglot,
        {
            "data": {"mean": [0.12], "std": [0.31]},
            "model": {"name": "convnet", "width": 12, "depth": 3, "embedding": 32},
            "train": {
                "steps": 800,
                "batch_size": 256,
                "learning_rate": 5e-3,
                "beta2": 0.99,
                "weight_decay": 0.0,
            },
            "engine": BF16,
        },
        clusters={"num_groups": 10, "overlap": 2},
        copies={"steps": 80, "learning_rate": 3e-3, "validate_every": 20, "patience": 9},
        branches={"steps": 100, "learning_rate": 5e-3, "model": {"embedding": 48}},
        is_new=True,
    ),
    "cifar10_plain": Set(
        cifar10,
        {
            "data": {"mean": [0.491, 0.482, 0.447], "std": [0.247, 0.243, 0.262]},
            "model": {
                "name": "convnet",
                "embedding": 0,
                "options": {"channels": [12, 24, 48, 96], "kernel": [5, 3, 3, 3]},
            },
            "train": {
                "steps": 1000,
                "batch_size": 128,
                "learning_rate": 0.004,
                "weight_decay": 0.02,
                "warmup": 0.1,
                "beta2": 0.99,
            },
            "engine": BF16,
        },
        clusters={"num_groups": 3, "overlap": 2},
        copies=gentle(1e-2, 300),
        branches=gentle(1e-2, 300, model={"embedding": 64}),
        shards="cifar10",
        is_new=True,
    ),
}


def shards_of(name: str, to: Path) -> Path:
    """The directory of a set's shards, which are made where they are absent."""
    one = SETS[name]
    base = to / "shards" / (one.shards.partition("/")[0] or name)
    inner = base / one.shards.partition("/")[2]
    if not complete(inner):
        base.parent.mkdir(parents=True, exist_ok=True)
        one.make(base)
    return inner.resolve()


def complete(path: Path) -> bool:
    manifest = read_manifest(path)
    return manifest is not None and set(SPLITS) <= set(manifest["splits"])


# A quick look

QUICK = "digits"
REAL = [*SETS]  # in the order in which they are asked


def digits(out: Path) -> None:
    """scikit-learn's, a few of them."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = (np.asarray(pixels) * 15).astype(np.uint8).reshape(-1, 8, 8)[:600]
    y = np.asarray(labels)[:600]
    write_arrays({"train": x}, {"train": y}, out, {"val": 0.25, "test": 0.25}, 0, MADE_BY)


SETS[QUICK] = Set(
    digits,
    {
        "data": {"mean": [0.3], "std": [0.35]},
        "model": {"name": "mlp", "width": 8, "depth": 1},
        "train": {"steps": 40, "batch_size": 32, "learning_rate": 1e-2},
        "engine": FP32,
    },
    clusters={"num_groups": 3},
    copies={"steps": 6, "learning_rate": 1e-3},
    branches={"steps": 6, "learning_rate": 1e-3, "model": {"embedding": 4}},
    rerank={"k": 5, "random": 3},
)
