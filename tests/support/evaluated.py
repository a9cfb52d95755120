"""Runs that no training made.

They have the files that evaluate and earlier stages leave, written as the stages write them.
"""

import json
from dataclasses import dataclass

import numpy as np
import pytest

from pipeline.config import Config
from pipeline.graph import RunDirectory
from pipeline.store import write_json
from trainer.core.metrics import reliability, summarise

HOSTILE = [
    "<script>alert(1)</script>",
    "</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><script>alert(2)</script>",
    "{{ 7 * 7 }}",
    "👩‍🚀 emoji",
    "שלום עולם",
    "\u202eoverride",
    "nul\x00 bell\x07",
    "lone \ud800 surrogate",
    "  ",
    "' onmouseover='alert(3)",
    "]]><!--",
    "&lt;b&gt;",
    "javascript:alert(4)",
    "x" * 5000,
]


@dataclass
class Images:
    """What the report needs of a ShardSet."""

    pixels: np.ndarray
    labels: np.ndarray
    class_names: list

    @property
    def input_shape(self):
        return self.pixels.shape[1:]

    @property
    def input_dtype(self):
        return str(self.pixels.dtype)

    def inputs(self, ids):
        return self.pixels[ids]


def kept_predictions(probabilities, labels):
    """What evaluate keeps of probabilities [n, C]."""
    top5 = np.argsort(-probabilities, axis=1, kind="stable")[:, :5].astype(np.int32)
    return {
        "ids": np.arange(len(labels)),
        "labels": np.asarray(labels, np.int64),
        "top5": top5,
        "top5_probability": np.take_along_axis(probabilities, top5, 1).astype(np.float32),
        "label_probability": probabilities[np.arange(len(labels)), labels].astype(np.float32),
    }


def measured(probabilities, labels):
    """(what evaluate keeps, the bins of a reliability diagram, the metrics of a row)."""
    kept = kept_predictions(probabilities, labels)
    confidence, right = kept["top5_probability"][:, 0], kept["top5"][:, 0] == labels
    targets = np.eye(probabilities.shape[1])[labels]
    metrics = summarise(
        labels,
        kept["top5"],
        kept["top5_probability"],
        kept["label_probability"],
        ((probabilities - targets) ** 2).sum(axis=1),
    )
    return kept, reliability(confidence, right), metrics


def evaluation(name, probabilities, labels, cost, temperature=None, further=None):
    """The JSON and the arrays that evaluate writes of one row.

    temperature: as if fitted on val. further: more keys of the row.
    """
    kept, bins, row = measured(probabilities, labels)
    content = {"name": name, "reliability": bins}
    if temperature is not None:
        scaled = probabilities ** (1 / temperature)
        scaled /= scaled.sum(axis=1, keepdims=True)
        scaled_kept, content["reliability_calibrated"], calibrated = measured(scaled, labels)
        row |= {f"c{key}": calibrated[key] for key in ("nll", "brier", "ece")}
        row["temperature"] = temperature
        kept["calibrated_label_probability"] = scaled_kept["label_probability"]
    content["row"] = row | (further or {}) | {"cost": cost}
    return content, kept


def cost(examples):
    return {
        "seconds": examples / 9000,
        "examples_seen": examples,
        "peak_memory_bytes": 412 * 2**20,
    }


COSTS = {
    "ensemble": 3_840_000,
    "control_wall": 2_150_000,
    "control_compute": 3_840_000,
    "student_hard": 3_000_000,
    "main": 4_840_000,
    "wide": 5_000_000,
}
STEPS = {"generalist": 8000, "member": 8000, "student": 4000}
WALL_LOSSES = {"control_wall-0": 1.3, "control_wall-1": 1.2, "control_wall-2": 1.4}


def learning(steps, top1, seed=0):
    """metrics.jsonl of a network that reaches `top1`."""
    noise = np.random.default_rng(seed)
    lines = []
    for step in range(50, steps + 1, 50):
        done = step / steps
        lines.append(
            {
                "step": step,
                "loss": 7 * np.exp(-4 * done) + 0.9 + 0.05 * noise.normal(),
                "lr": 1e-3,
                "examples": 256 * step,
                "seconds": step / 30,
                "samples_per_s": 9e3,
                "steps": steps,
            }
        )
        if step % (max(steps // 500, 1) * 50) == 0:
            val_top1, val_loss = top1 * (1 - np.exp(-5 * done)), 3 * np.exp(-2 * done)
            lines.append({"step": step, "val/top1": val_top1, "val/loss": val_loss})
    return "".join(json.dumps(line) + "\n" for line in lines)


def add_specialists(evaluations, labels, groups, active, missing, conditional):
    """What evaluate writes of specialists beside the ensemble's row."""
    m = len(groups)
    content, arrays = evaluations["ensemble"]
    predicted = evaluations["generalist"][1]["top5"][:, 0]
    if active is None:
        active = np.stack([np.isin(predicted, classes) for classes in groups], axis=1)
    arrays["active"] = active
    wrong, sharing = predicted != labels, np.zeros(len(labels), bool)
    for classes in groups:
        sharing |= np.isin(labels, classes) & np.isin(predicted, classes)
    conditional = conditional or [
        (0.7 + 0.2 * i / m, 0.7 + 0.2 * i / m + 0.03 * np.sin(i + 1) + 0.02) for i in range(m)
    ]
    content["specialists"] = [
        {
            "index": i,
            "classes": len(classes),
            "routed": int(active[:, i].sum()),
            "n": int(np.isin(labels, classes).sum()),
            "conditional_before": conditional[i][0],
            "conditional_after": conditional[i][1],
            "gain": 0.002,
            "cost": cost(153_600),
        }
        for i, classes in enumerate(groups)
        if i not in missing
    ]
    content["clusters"] = {
        "captured_confusion": float(sharing[wrong].mean()) if wrong.any() else None,
        "chance": 0.1,
        "captured_unlabelled": 0.6,
        "sizes": [len(classes) for classes in groups],
    }
    content["missing"] = list(missing)


def write_manifest(shards, class_names, train_counts):
    """Training examples of each class, in two shards."""
    counts = dict(zip(class_names, map(int, train_counts), strict=True))
    first = {name: count // 2 for name, count in counts.items()}
    second = {name: count - count // 2 for name, count in counts.items()}
    train = {
        "samples": sum(counts.values()),
        "shards": [
            {"name": "train-0.tar", "class_counts": first},
            {"name": "train-1.tar", "class_counts": second},
        ],
    }
    manifest = {"schema": 1, "classes": class_names, "splits": {"train": train}}
    write_json(shards / "manifest.json", manifest)


def make_config(shards, groups, students, student_keys, controls, sizes, seed):
    def student(name):
        model = {"width": 8} if name == "wide" else {}
        return {"model": model, **student_keys.get(name, {})}

    splits = ("train", "val", "test")
    return Config.model_validate(
        {
            "seed": seed,
            "data": {split: f"{shards}/{split}-{{000000..000001}}.tar" for split in splits},
            "train": {"steps": 8000},
            "clusters": {"num_groups": max(len(groups), 1), "overlap": 2},
            "specialists": {"steps": 600},
            "ensemble": {"kind": "deep", "members": len(sizes)} if sizes else {},
            "students": {name: student(name) for name in students},
            "controls": {"enabled": controls},
        }
    )


def write_training(attempt, stage):
    """metrics.jsonl and summary.json of a stage that trains a network."""
    steps = STEPS.get(stage.name, 7200 if "compute" in stage.place else 600)
    index = sum(map(ord, stage.place))
    attempt.path("metrics.jsonl").write_text(learning(steps, 0.6 + index % 7 / 100, index))
    val = {"loss": WALL_LOSSES.get(stage.place.split("/")[-1], 1.0), "top1": 0.6}
    summary = {**cost(256 * steps), "steps": steps, "best_step": steps, "val": val}
    write_json(attempt.path("summary.json"), summary)


def write_clusters(attempt, groups, num_classes):
    groups = [list(map(int, classes)) for classes in groups]
    content = {"schema": 1, "num_classes": num_classes, "members": groups}
    write_json(attempt.path("groups.json"), content)
    sizes = [len(classes) for classes in groups]
    summary = {
        "captured": 0.55,
        "chance": 0.1,
        "captured_unlabelled": 0.6,
        "chance_unlabelled": 0.1,
        "sizes": sizes,
        "forecast": [{"classes": size, "gain": 0.012 + 0.004 * i} for i, size in enumerate(sizes)],
        "skipped": [],
    }
    write_json(attempt.path("summary.json"), summary)


ENVIRONMENT = {
    "commit": "0123abc",
    "machine": {"host": "<b>host</b>", "processor": "Xeon", "cores": 2, "gpus": []},
    "packages": {"torch": "2.13.0", "python": "3.12.1"},
}


def make_run(
    root,
    labels,
    probabilities,
    groups,
    *,
    train_counts=None,
    controls=True,
    students=("main", "wide"),
    active=None,
    missing=(),
    conditional=None,
    names=None,
    seed=0,
    temperatures=None,
    further=None,
    sizes=None,
    student_keys=None,
):
    """A finished run below `root`. probabilities: name -> [n, C] for every row that it shall have.

    temperatures, further: by name, see `evaluation`. sizes: makes it one of a deep ensemble of so
    many members.
    """
    temperatures, further = temperatures or {}, further or {}
    labels = np.asarray(labels)
    num_classes = probabilities["generalist"].shape[1]
    shards = root / "shards"
    shards.mkdir(parents=True)
    if train_counts is not None:
        class_names = names or [f"class-{c}" for c in range(num_classes)]
        write_manifest(shards, class_names, train_counts)
    config = make_config(shards, groups, students, student_keys or {}, controls, sizes, seed)
    run = RunDirectory(root / "run", config)
    run.root.mkdir()
    write_json(run.root / "environment.json", ENVIRONMENT)

    evaluations = {}
    for name, p in probabilities.items():
        of_row = cost(COSTS.get(name, 2_000_000))
        fitted = temperatures.get(name)
        p = np.asarray(p, float)
        evaluations[name] = evaluation(name, p, labels, of_row, fitted, further.get(name))
    if sizes:
        evaluations["ensemble"][0]["sizes"] = sizes
    else:
        add_specialists(evaluations, labels, groups, active, missing, conditional)

    absent = {run.report, *(run.specialists[index] for index in missing)}
    for stage in run.stages:
        if stage in absent:
            continue
        attempt = stage.begin()
        if stage.name in ("generalist", "member", "specialist", "control", "student"):
            write_training(attempt, stage)
        if stage.name == "generalist":
            write_json(attempt.path("model.json"), {"schema": 1, "class_names": names})
        if stage.name == "cluster":
            write_clusters(attempt, groups, num_classes)
        if stage.name == "evaluate":
            for name, (content, arrays) in evaluations.items():
                write_json(attempt.path(f"{name}.json"), content)
                np.savez(attempt.path(f"{name}.npz"), **arrays)
        attempt.finish()
    return run


def one_hot(predicted, num_classes, sure=0.9):
    """[n, C]: `sure` on the predicted class, the rest spread evenly."""
    p = np.full((len(predicted), num_classes), (1 - sure) / (num_classes - 1))
    p[np.arange(len(predicted)), predicted] = sure
    return p


# Ten examples, six classes. Groups {0, 1, 2} and {2, 3}. 4 and 5 are covered by nobody, 2 by both
# specialists.
LABELS = [0, 0, 1, 1, 2, 2, 3, 3, 4, 5]
GROUPS = [[0, 1, 2], [2, 3]]
PREDICTED = {
    "generalist": [0, 1, 1, 0, 3, 2, 3, 2, 4, 0],  # errors at 1, 3, 4, 7, 9
    "ensemble": [0, 0, 1, 0, 2, 2, 3, 2, 4, 4],  # right at 1 and 4 besides
    "control_wall": [0, 1, 1, 1, 3, 2, 3, 2, 4, 0],  # 4 errors
    "control_compute": [0, 0, 1, 1, 2, 2, 3, 2, 4, 0],  # 2 errors: beats the ensemble
    "student_hard": [0, 1, 1, 0, 3, 2, 3, 2, 4, 0],  # 5
    "main": [0, 0, 1, 0, 3, 2, 3, 2, 4, 0],  # 4: half of the gain
    "wide": [0, 0, 1, 0, 2, 2, 3, 2, 4, 0],  # 3: all of it
}
TRAIN_COUNTS = [10, 20, 30, 40, 50, 60]


@pytest.fixture
def make_hand_worked():
    def make(root, only=tuple(PREDICTED), **more):
        probabilities = {name: one_hot(PREDICTED.get(name, PREDICTED["main"]), 6) for name in only}
        return make_run(
            root,
            LABELS,
            probabilities,
            GROUPS,
            train_counts=TRAIN_COUNTS,
            names=HOSTILE[:6],
            **more,
        )

    return make


# A deep ensemble of three, whose calibrated NLL is 1.0, 0.8 and 0.7. A student of 0.9 is worth one
# and a half.
SIZES = [
    {"size": 1, "top1": 0.5, "nll": 1.3, "cnll": 1.0, "temperature": 1.4},
    {"size": 2, "top1": 0.6, "nll": 1.0, "cnll": 0.8, "temperature": 1.2},
    {"size": 3, "top1": 0.7, "nll": 0.9, "cnll": 0.7, "temperature": 1.1},
]
OF_DEEP = {
    "generalist": {"cnll": 1.0, "dee": 1.0, "dee_beyond": False},
    "ensemble": {
        "cnll": 0.7,
        "dee": 3.0,
        "dee_beyond": False,
        "members": {"count": 3, "mu": 0.25, "pairwise_kl": 0.5, "disagreement": 0.375},
    },
    "main": {"cnll": 0.9, "dee": 1.5, "dee_beyond": False},
    "heads": {
        "cnll": 0.65,
        "dee": None,
        "dee_beyond": True,
        "members": {"count": 3, "mu": 0.125, "pairwise_kl": 0.0625, "disagreement": 0.1},
        "ood_auroc": {"confidence": 0.75, "entropy": 0.8, "mu": 0.9},
    },
}


@pytest.fixture
def deep(tmp_path):
    """A deep ensemble's run of the same ten examples, with a Hydra among its students."""
    names = {
        "generalist": "generalist",
        "ensemble": "ensemble",
        "student_hard": "student_hard",
        "main": "main",
        "heads": "wide",
    }
    probabilities = {name: one_hot(PREDICTED[of], 6) for name, of in names.items()}
    return make_run(
        tmp_path,
        LABELS,
        probabilities,
        [],
        train_counts=TRAIN_COUNTS,
        names=HOSTILE[:6],
        students=("main", "heads"),
        temperatures=dict.fromkeys(names, 1.25),
        further=OF_DEEP,
        sizes=SIZES,
        student_keys={"heads": {"network": "hydra", "start": "main", "perturb": "ods"}},
    )


@pytest.fixture
def hand_worked(tmp_path, make_hand_worked):
    return make_hand_worked(tmp_path)


def glyph_images(num_classes, per_class, seed=0, size=32):
    """Characters of DejaVu Sans, shaken: uint8 [n, 1, size, size], labels, names."""
    import matplotlib
    from PIL import ImageFont

    path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    points = letters(path, num_classes)
    font, random = ImageFont.truetype(path, 22), np.random.default_rng(seed)
    pixels = [shaken(chr(point), font, size, random) for point in points for _ in range(per_class)]
    labels = np.repeat(np.arange(len(points)), per_class)
    order = random.permutation(len(labels))
    return Images(np.stack(pixels)[order, None], labels[order], [chr(p) for p in points])


def letters(font_file, count):
    """The code points of `count` letters that a font has, evenly spaced."""
    import unicodedata

    from fontTools.ttLib import TTFont

    points = sorted(TTFont(font_file).getBestCmap())
    points = [point for point in points if unicodedata.category(chr(point))[0] == "L"]
    return points[:: max(1, 2400 // count)][:count]


def shaken(character, font, size, random):
    """A character turned, moved and with noise on it: uint8 [size, size]."""
    from PIL import Image, ImageDraw

    picture = Image.new("L", (size, size), 0)
    middle = (size / 2, size / 2)
    ImageDraw.Draw(picture).text(middle, character, fill=255, font=font, anchor="mm")
    picture = picture.rotate(random.uniform(-9, 9), Image.Resampling.BILINEAR)
    moved = np.roll(np.asarray(picture, np.int16), random.integers(-2, 3, 2), (0, 1))
    return np.clip(moved + random.normal(0, 9, moved.shape), 0, 255).astype(np.uint8)


def look_alike_groups(means, count):
    """Overlapping groups of classes that lie beside each other on two axes of their means."""
    axis = np.linalg.svd(means - means.mean(0), full_matrices=False)[0]
    first = np.array_split(np.argsort(axis[:, 0]), count)
    second = np.array_split(np.argsort(axis[:, 1]), count)
    return [np.union1d(a, b[: len(b) // 2]) for a, b in zip(first, second, strict=True)]


def glyph_run(root, num_classes=80, per_class=6, num_groups=5, names=None, seed=0, **more):
    """A run on glyphs whose confusions are those of their pixels, and its pictures."""
    images = glyph_images(num_classes, per_class, seed)
    random, labels = np.random.default_rng(seed), images.labels
    flat = images.pixels.reshape(len(labels), -1).astype(float)
    flat = (flat - flat.mean()) / flat.std()
    means = np.stack([flat[labels == c].mean(axis=0) for c in range(num_classes)])
    similar = flat @ means.T / flat.shape[1]
    groups = look_alike_groups(means, num_groups)

    def predict(noise, shift=0.0):
        logits = 14 * (similar + noise * random.normal(size=similar.shape))
        logits[np.arange(len(labels)), labels] += shift
        p = np.exp(logits - logits.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)

    base = predict(0.085)

    def better(fraction):
        p = base ** (1 - fraction) * predict(0.06, 0.3) ** fraction
        return p / p.sum(1, keepdims=True)

    probabilities = {
        "generalist": base,
        "ensemble": better(0.45),
        "control_wall": better(0.03),
        "control_compute": better(0.2),
        "student_hard": better(0.1),
        "main": better(0.3),
        "wide": better(0.4),
    }
    if names is not None:
        images.class_names = (names + images.class_names)[:num_classes]
    counts = random.integers(20, 200, num_classes)
    more = {"train_counts": counts, "names": images.class_names} | more
    return make_run(root, labels, probabilities, groups, **more), images


@pytest.fixture
def glyphs(tmp_path):
    return glyph_run(tmp_path, names=HOSTILE)
