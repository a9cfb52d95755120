"""A toy data set, as shards with a manifest: 24 classes in 6 look-alike quadruples, 8 x 8 gray."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image

from pipeline.config import Config, load_config
from trainer.data.shards import ShardWriter, write_manifest

NUM_CLASSES, LOOK_ALIKES = 24, 4


def images(labels: np.ndarray, seed: int, noise: float = 40.0) -> np.ndarray:
    """uint8 [n, 8, 8]: a pattern for each quadruple, a fainter one for each class, and noise."""
    fixed, random = np.random.default_rng(0), np.random.default_rng(seed)
    families = fixed.normal(128, 60, (NUM_CLASSES // LOOK_ALIKES, 8, 8))
    own = fixed.normal(0, 18, (NUM_CLASSES, 8, 8))
    patterns = families[labels // LOOK_ALIKES] + own[labels]
    noisy = patterns + random.normal(0, noise, patterns.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def write_unlabelled(directory: Path, count: int = 10) -> Path:
    """More toy images, without labels: no cls file at all."""
    labels = np.repeat(np.arange(NUM_CLASSES), count)
    directory.mkdir(parents=True)
    with wds.ShardWriter(f"{directory}/transfer-%06d.tar", maxcount=150, verbose=0) as writer:
        for k, image in enumerate(images(labels, 9)):
            writer.write({"__key__": f"{k:06d}", "png": encode_png(image)})
    return directory


def encode_png(image: np.ndarray) -> bytes:
    png = io.BytesIO()
    Image.fromarray(image).save(png, format="png")
    return png.getvalue()


def write_toy(
    directory: Path,
    per_class: dict[str, int] | None = None,
    names: list[str] | None = None,
    per_shard: int = 300,
) -> Path:
    """Shards of train, val and test in `directory`."""
    per_class = per_class or {"train": 40, "val": 12, "test": 12}
    names = names or [f"class {c}" for c in range(NUM_CLASSES)]
    splits = {}
    for seed, (split, count) in enumerate(per_class.items(), start=1):
        labels = np.repeat(np.arange(NUM_CLASSES), count)
        with ShardWriter(directory, split, names, samples_per_shard=per_shard) as writer:
            for k, image in enumerate(images(labels, seed)):
                label = str(labels[k]).encode()
                writer.write({"__key__": f"{k:06d}", "png": encode_png(image), "cls": label})
        splits[split] = writer.facts
    write_manifest(directory, names, splits)
    return directory


def toy_config(data: Path, *overrides: str) -> Config:
    """Everything once, in seconds: an MLP generalist, 6 groups, controls, a student."""
    base = {
        "data": {split: str(data) for split in ("train", "val", "test")},
        "model": {"name": "mlp", "width": 24, "depth": 1},
        "train": {
            "steps": 60,
            "batch_size": 96,
            "learning_rate": 0.01,
            "checkpoint_every": 20,
            "log_every": 10,
        },
        "clusters": {"num_groups": 6, "overlap": 1},
        "specialists": {"steps": 30, "learning_rate": 0.003},
        "students": {"main": {"steps": 30, "learning_rate": 0.003}},
        "launch": {"processes": 1, "pool": 2},
        "engine": {"device": "cpu"},
    }
    return load_config(None, list(overrides), base)
