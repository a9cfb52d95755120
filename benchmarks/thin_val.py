"""By which predictions to find groups where val has few examples a class.

    OMP_NUM_THREADS=1 python -m benchmarks.thin_val [--sets naics clinc150 omniglot]
        [--seeds 0 1]
    python -m benchmarks.thin_val --quick       made-up classes, in seconds

Of each class 30 % of the examples are test's, --val examples val's, and the others train's.  A
small network is trained on train, and groups are found by its predictions, without labels:

    val       on val
    train     on train as it is
    views     on train as augmented for training
    both      on val and train together
    crossed   on train, by two networks of as many steps, each of the half that it has not
              seen
    naics_known and clinc150_known: the same networks without dropout, augmentation
              and label smoothing, which know nearly all of train

Each is judged by the share of the network's errors on test, and on val, whose classes share a
group, the figure of docs/clustering.md.  A minute of one core for each set and seed.  The last
line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import mean
from typing import cast

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.characters.omniglot import pictures
from benchmarks.papers import lab
from clustering import PredictionStatistics, captured_confusion, group_classes, predictions_to_keep

TEST = 0.3  # of each class
BINS, DROPPED = 2048, 0.2  # of hashed n-grams. The share that a training view is without
CLASSES_PER_GROUP, FEWEST_GROUPS = 60, 8
OVERLAPS = (1, 2)
BATCH, MEASURED = 128, 1024
OMNIGLOT = 800  # characters


@dataclass(frozen=True)
class Task:
    """Examples, and how a small network learns them.

    x: float [N, D] or pictures uint8 [N, side, side].  y: int64 [N], of C classes.  width: of the
    last hidden layer.  known: no augmentation, dropout or smoothing.
    """

    x: Tensor
    y: Tensor
    num_classes: int
    width: int
    steps: int
    learning_rate: float
    smoothing: float = 0.0
    known: bool = False

    @property
    def is_pictures(self) -> bool:
        return self.x.ndim == 3


@dataclass(frozen=True)
class Part:
    """Examples of a split."""

    x: Tensor
    y: Tensor


# The sets


def naics() -> Task:
    source = lab.DATA / "naics" / "2017_NAICS_Index_File.csv.gz"
    lab.require(source)
    with gzip.open(source, "rt", encoding="cp1252") as file:
        rows = [row for row in csv.DictReader(file) if row["NAICS17"] != "******"]
    texts = [row["INDEX ITEM DESCRIPTION"] for row in rows]
    return of_texts(texts, [row["NAICS17"] for row in rows], width=64, steps=900, smoothing=0.1)


def clinc150() -> Task:
    source = lab.DATA / "clinc150" / "data_oos_plus.json.gz"
    lab.require(source)
    with gzip.open(source) as file:
        splits = json.load(file)
    pairs = [pair for split in ("train", "val", "test") for pair in splits[split]]
    texts, labels = zip(*pairs, strict=True)
    return of_texts(list(texts), list(labels), width=48, steps=400)


def omniglot() -> Task:
    lab.require(lab.DATA / "omniglot")
    drawn = torch.from_numpy(pictures()[:OMNIGLOT])
    y = torch.arange(len(drawn)).repeat_interleave(drawn.shape[1])
    return Task(drawn.flatten(0, 1), y, len(drawn), width=48, steps=900, learning_rate=1e-2)


def of_texts(
    texts: list[str], labels: list[str], width: int, steps: int, smoothing: float = 0.0
) -> Task:
    """Letter n-grams, hashed and scaled to unit length."""
    from sklearn.feature_extraction.text import HashingVectorizer

    hashed = HashingVectorizer(
        analyzer="char_wb", ngram_range=(2, 4), n_features=BINS, alternate_sign=False
    )
    counts = cast(csr_matrix, hashed.transform(texts))
    x = torch.from_numpy(counts.toarray().astype(np.float32)) * 10
    names, y = np.unique(labels, return_inverse=True)
    return Task(x, torch.from_numpy(y), len(names), width, steps, 5e-3, smoothing)


def made_up() -> Task:
    """Classes in look-alike fours, with noise."""
    rng = np.random.default_rng(0)
    classes, examples = 32, 16
    centres = rng.normal(size=(classes // 4, 24)).repeat(4, 0) + 0.4 * rng.normal(
        size=(classes, 24)
    )
    y = np.arange(classes).repeat(examples)
    x = centres[y] + 0.7 * rng.normal(size=(len(y), 24))
    return Task(torch.from_numpy(x).float(), torch.from_numpy(y), classes, 16, 60, 1e-2)


def known(make: Callable[[], Task]) -> Callable[[], Task]:
    return lambda: replace(make(), known=True, smoothing=0.0)


SETS: dict[str, Callable[[], Task]] = {
    "naics": naics,
    "naics_known": known(naics),
    "clinc150": clinc150,
    "clinc150_known": known(clinc150),
    "omniglot": omniglot,
    "made_up": made_up,
}


# The network


class Network(nn.Module):
    """One hidden layer over vectors, or three convolutions over pictures. Then the classes."""

    def __init__(self, task: Task):
        super().__init__()
        if task.is_pictures:
            self.trunk = nn.Sequential(
                *(block for sizes in ((1, 4), (4, 8), (8, 16)) for block in convolution(*sizes)),
                nn.Flatten(),
                nn.LazyLinear(task.width),
                nn.BatchNorm1d(task.width),
            )
        else:
            dropout = nn.Dropout(0.0 if task.known else 0.3)
            self.trunk = nn.Sequential(nn.LazyLinear(task.width), nn.ReLU(), dropout)
        self.head = nn.Linear(task.width, task.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


def convolution(inputs: int, outputs: int) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, 3, padding=1)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]


def view(x: Tensor, generator: torch.Generator) -> Tensor:
    """A training view: vectors without some of their numbers, pictures turned and moved."""
    if x.ndim == 2:
        return x * (torch.rand(x.shape, generator=generator) >= DROPPED)
    turned, scaled, sheared, across, down = (
        torch.rand(5, len(x), generator=generator) * 2 - 1
    ) * torch.tensor([0.12, 0.09, 0.12, 0.09, 0.09])[:, None]
    rows = [
        torch.stack([(1 + scaled) * turned.cos(), sheared - turned.sin(), across], 1),
        torch.stack([turned.sin(), (1 + scaled) * turned.cos(), down], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [len(x), 1, *x.shape[1:]], align_corners=False)
    return F.grid_sample(x[:, None].float(), grid, align_corners=False)[:, 0]


def inputs(x: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is not None:
        x = view(x, generator)
    return x if x.ndim == 2 else (x[:, None].float() / 255 - 0.1) / 0.3


def trained(task: Task, part: Part, seed: int) -> Network:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    views = None if task.known else generator
    network = Network(task)
    network(inputs(part.x[:2], None))  # the lazy layers' sizes
    optimizer = torch.optim.AdamW(network.parameters(), task.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, task.learning_rate, total_steps=task.steps, pct_start=0.1
    )
    for _ in range(task.steps):
        rows = torch.randint(len(part.x), (BATCH,), generator=generator)
        logits = network(inputs(part.x[rows], views))
        loss = F.cross_entropy(logits, part.y[rows], label_smoothing=task.smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.inference_mode()
def predictions(network: Network, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """float [n, C]"""
    return torch.cat([network(inputs(rows, generator)).softmax(1) for rows in x.split(MEASURED)])


# The question


def split(task: Task, seed: int, val: int) -> dict[str, Part]:
    """train, val and test, class by class. val: examples of each class at most."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[np.ndarray]] = {"train": [], "val": [], "test": []}
    for label in range(task.num_classes):
        own = rng.permutation(np.flatnonzero(task.y.numpy() == label))
        tested = round(TEST * len(own))
        rows["test"].append(own[:tested])
        rows["val"].append(own[tested : tested + val])
        rows["train"].append(own[tested + val :])
    parts = {name: torch.from_numpy(np.concatenate(each)) for name, each in rows.items()}
    return {name: Part(task.x[each], task.y[each]) for name, each in parts.items()}


def crossed(task: Task, train: Part, seed: int) -> Tensor:
    """Predictions on train of networks that have not seen the examples."""
    first = torch.from_numpy(np.random.default_rng(seed).permutation(len(train.y)) % 2 == 0)
    p = torch.empty(len(train.y), task.num_classes)
    for half in (first, ~first):
        network = trained(task, Part(train.x[~half], train.y[~half]), seed + 100)
        p[half] = predictions(network, train.x[half])
    return p


def measure(name: str, task: Task, seed: int, val: int) -> list[dict]:
    """A row for each source of predictions and each overlap."""
    start = time.perf_counter()
    parts = split(task, seed, val)
    network = trained(task, parts["train"], seed)
    p = {each: predictions(network, part.x) for each, part in parts.items()}
    labels = {each: part.y for each, part in parts.items()}
    views = predictions(network, parts["train"].x, torch.Generator().manual_seed(seed))
    sources = {
        "val": [p["val"]],
        "train": [p["train"]],
        "views": [views],
        "both": [p["val"], p["train"]],
        "crossed": [crossed(task, parts["train"], seed)],
    }
    accuracy = {each: (p[each].argmax(1) == labels[each]).float().mean().item() for each in p}
    confusion = {each: statistics_of([p[each]], labels[each]).confusion for each in ("val", "test")}
    num_groups = max(FEWEST_GROUPS, round(task.num_classes / CLASSES_PER_GROUP))
    rows = []
    for source, given in sources.items():
        statistics = statistics_of(given)
        for overlap in OVERLAPS:
            groups = group_classes(statistics, num_groups, overlap=overlap, seed=seed)
            share, chance = captured_confusion(groups, confusion["test"])
            row = {"set": name, "seed": seed, "source": source, "overlap": overlap}
            row |= {"test": share, "chance": chance}
            row["val"] = captured_confusion(groups, confusion["val"])[0]
            rows.append(row | {f"top1_{each}": value for each, value in accuracy.items()})
            print(json.dumps(rows[-1]), flush=True)
    print(f"{name}, seed {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return rows


def statistics_of(given: list[Tensor], labels: Tensor | None = None) -> PredictionStatistics:
    num_classes = given[0].shape[1]
    statistics = PredictionStatistics(num_classes, predictions_to_keep(num_classes))
    for p in given:
        statistics.update(p, labels=labels)
    return statistics


def show(rows: list[dict]) -> list[dict]:
    """Print and return the means over seeds."""
    means = []
    for key in dict.fromkeys((row["set"], row["overlap"], row["source"]) for row in rows):
        same = [row for row in rows if (row["set"], row["overlap"], row["source"]) == key]
        figures = [name for name in same[0] if name not in ("set", "overlap", "source", "seed")]
        row = dict(zip(("set", "overlap", "source"), key, strict=True)) | {"seeds": len(same)}
        means.append(row | {name: round(mean(each[name] for each in same), 4) for name in figures})
    header = [name for name in means[0] if name != "seeds"]
    print(lab.table(header, [[row[name] for name in header] for row in means]))
    return means


def main(argv: list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="benchmarks.thin_val", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=[*SETS][:-1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--val", type=int, default=2, help="examples of each class in val")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.quick:
        args.sets, args.seeds = ["made_up"], [0]
    rows = []
    for name in args.sets:
        task = SETS[name]()
        for seed in args.seeds:
            rows += measure(name, task, seed, args.val)
    result = {"val_per_class": args.val, "torch": torch.__version__, "rows": show(rows)}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
