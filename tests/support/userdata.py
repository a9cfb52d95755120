"""Data as new users bring them: six kinds, small, each learnable in seconds."""

import gzip
import io
import json
import struct
from pathlib import Path

import numpy as np
from PIL import Image
from shardsets import write_tar

CLASSES = 5
EACH = 24  # examples of a class


def labels(each: int = EACH) -> np.ndarray:
    return np.repeat(np.arange(CLASSES), each)


def pictures(channels: int, each: int = EACH, seed: int = 0) -> list[Image.Image]:
    """A pattern for each class, and noise: 40 x 40."""
    fixed = np.random.default_rng(1).integers(0, 256, (CLASSES, 5, 5, channels))
    random = np.random.default_rng(seed)
    made = []
    for label in labels(each):
        pattern = fixed[label].astype(np.uint8).squeeze()
        pixels = np.asarray(Image.fromarray(pattern).resize((40, 40)), float)
        noisy = pixels + random.normal(0, 30, pixels.shape)
        made.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    return made


def picture_folder(root: Path, channels: int) -> Path:
    """root/CLASS/NUMBER.png, of many sizes."""
    random = np.random.default_rng(2)
    for number, (label, picture) in enumerate(zip(labels(), pictures(channels), strict=True)):
        directory = root / f"class {label}"
        directory.mkdir(parents=True, exist_ok=True)
        width, height = random.integers(28, 60, 2).tolist()
        picture.resize((width, height)).save(directory / f"{number}.png")
    return root


def text_table(path: Path) -> Path:
    random = np.random.default_rng(3)
    words = np.array([[f"word{label}{n}" for n in range(6)] for label in range(CLASSES)])
    rows = [f"{' '.join(random.choice(words[label], 4))},topic {label}" for label in labels()]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path


def vectors(path: Path) -> Path:
    """float32 columns of very different scales, one of them constant."""
    random = np.random.default_rng(4)
    x = random.normal(0, 1, (CLASSES, 9))[labels()] + random.normal(0, 0.5, (len(labels()), 9))
    x = x * 10.0 ** np.linspace(-3, 3, 9)
    x[:, 4] = 7
    np.savez(path, x=x.astype(np.float32), y=labels())
    return path


def webdataset(root: Path, splits: tuple[str, ...] = ("train", "validation", "test")) -> Path:
    """SPLIT-00000-of-00002.tar with KEY.jpg and KEY.json, as exporters of parquet write them."""
    root.mkdir(parents=True, exist_ok=True)
    for seed, split in enumerate(splits):
        each = EACH if split == "train" else 5
        shown = zip(labels(each).tolist(), pictures(3, each, seed), strict=True)
        files = []
        for number, (label, picture) in enumerate(shown):
            jpeg = io.BytesIO()
            picture.resize((24, 24)).save(jpeg, "jpeg")
            about = {"label": label, "caption": "no label"}
            files.append((f"{number:05d}.jpg", jpeg.getvalue()))
            files.append((f"{number:05d}.json", json.dumps(about).encode()))
        half = len(files) // 4 * 2
        write_tar(root / f"{split}-00000-of-00002.tar", files[:half])
        write_tar(root / f"{split}-00001-of-00002.tar", files[half:])
    return root


def idx_files(root: Path) -> Path:
    """As MNIST's: train and t10k, pictures and labels, gzipped."""
    root.mkdir(parents=True, exist_ok=True)
    for seed, (split, each) in enumerate({"train": EACH, "t10k": 5}.items()):
        x = np.stack([np.asarray(p.resize((28, 28))) for p in pictures(1, each, seed)])
        y = labels(each).astype(np.uint8)
        heads = (struct.pack(">HBBIII", 0, 8, 3, *x.shape), struct.pack(">HBBI", 0, 8, 1, len(y)))
        for kind, head, array in zip(("images-idx3", "labels-idx1"), heads, (x, y), strict=True):
            with gzip.open(root / f"{split}-{kind}-ubyte.gz", "wb") as file:
                file.write(head + array.tobytes())
    return root
