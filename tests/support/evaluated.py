"""Runs that no training made: the files that evaluate and earlier stages leave, written as the stages write them."""

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


def answers(probabilities, labels):
    """What evaluate keeps of probabilities [n, C]."""
    top5 = np.argsort(-probabilities, axis=1, kind="stable")[:, :5].astype(np.int32)
    return {
        "ids": np.arange(len(labels)),
        "labels": np.asarray(labels, np.int64),
        "top5": top5,
        "top5_probability": np.take_along_axis(probabilities, top5, 1).astype(np.float32),
        "label_probability": probabilities[np.arange(len(labels)), labels].astype(np.float32),
    }


def evaluation(name, probabilities, labels, cost, temperature=None, further=None):
    """temperature: what a fit on val might have found; further: more keys of the row."""

    def judged(p):
        found, target = answers(p, labels), np.eye(p.shape[1])[labels]
        bins = reliability(found["top5_probability"][:, 0], found["top5"][:, 0] == labels)
        return (
            found,
            bins,
            summarise(
                labels,
                found["top5"],
                found["top5_probability"],
                found["label_probability"],
                ((p - target) ** 2).sum(axis=1),
            ),
        )

    found, bins, row = judged(probabilities)
    said = {"name": name, "reliability": bins}
    if temperature is not None:
        scaled = probabilities ** (1 / temperature)
        _, said["reliability_calibrated"], after = judged(
            scaled / scaled.sum(axis=1, keepdims=True)
        )
        row |= {
            "temperature": temperature,
            **{f"c{key}": after[key] for key in ("nll", "brier", "ece")},
        }
    return {**said, "row": {**row, **(further or {}), "cost": cost}}, found


def cost(examples, seconds=None):
    return {
        "seconds": seconds or examples / 9000,
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
            lines.append(
                {
                    "step": step,
                    "val/top1": top1 * (1 - np.exp(-5 * done)),
                    "val/loss": 3 * np.exp(-2 * done),
                }
            )
    return "".join(json.dumps(line) + "\n" for line in lines)


def add_specialists(files, labels, members, active, missing, conditional):
    """What evaluate says of specialists beside the ensemble's row."""
    m = len(members)
    if active is None:
        predicted = files["generalist"][1]["top5"][:, 0]
        active = np.stack([np.isin(predicted, group) for group in members], axis=1)
    files["ensemble"][1]["active"] = active
    predicted = files["generalist"][1]["top5"][:, 0]
    wrong, sharing = predicted != labels, np.zeros(len(labels), bool)
    for group in members:
        sharing |= np.isin(labels, group) & np.isin(predicted, group)
    sizes = [len(group) for group in members]
    conditional = conditional or [
        (0.7 + 0.2 * i / m, 0.7 + 0.2 * i / m + 0.03 * np.sin(i + 1) + 0.02) for i in range(m)
    ]
    files["ensemble"][0].update(
        specialists=[
            {
                "index": i,
                "classes": sizes[i],
                "routed": int(active[:, i].sum()),
                "n": int(np.isin(labels, group).sum()),
                "conditional_before": conditional[i][0],
                "conditional_after": conditional[i][1],
                "gain": 0.002,
                "cost": cost(153_600),
            }
            for i, group in enumerate(members)
            if i not in missing
        ],
        clusters={
            "captured_confusion": float(sharing[wrong].mean()) if wrong.any() else None,
            "chance": 0.1,
            "captured_unlabelled": 0.6,
            "sizes": sizes,
        },
        missing=list(missing),
    )


def make_run(
    root,
    labels,
    probabilities,
    members,
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
    """A finished run below `root`; probabilities: name -> [n, C] for every row that it shall have.

    temperatures, further: by name, see `evaluation`.  sizes: makes it one of a deep ensemble of so many members.
    """
    temperatures, further, student_keys = temperatures or {}, further or {}, student_keys or {}
    labels = np.asarray(labels)
    num_classes, shards = probabilities["generalist"].shape[1], root / "shards"
    shards.mkdir(parents=True)
    if train_counts is not None:
        called = names or [f"class-{c}" for c in range(num_classes)]
        halves = [
            {name: int(n) // 2 for name, n in zip(called, train_counts, strict=True)},
            {name: int(n) - int(n) // 2 for name, n in zip(called, train_counts, strict=True)},
        ]
        write_json(
            shards / "manifest.json",
            {
                "schema": 1,
                "classes": called,
                "splits": {
                    "train": {
                        "samples": int(sum(train_counts)),
                        "shards": [
                            {"name": f"train-{i}.tar", "class_counts": half}
                            for i, half in enumerate(halves)
                        ],
                    }
                },
            },
        )
    config = Config.model_validate(
        {
            "seed": seed,
            "data": {
                split: f"{shards}/{split}-{{000000..000001}}.tar"
                for split in ("train", "val", "test")
            },
            "train": {"steps": 8000},
            "clusters": {"num_groups": max(len(members), 1), "overlap": 2},
            "specialists": {"steps": 600},
            "ensemble": {"kind": "deep", "members": len(sizes)} if sizes else {},
            "students": {
                name: {
                    "model": {"width": 8} if name == "wide" else {},
                    **student_keys.get(name, {}),
                }
                for name in students
            },
            "controls": {"enabled": controls},
        }
    )
    run = RunDirectory(root / "run", config)
    run.root.mkdir()
    write_json(
        run.root / "environment.json",
        {
            "commit": "0123abc",
            "machine": {"host": "<b>host</b>", "processor": "Xeon", "cores": 2, "gpus": []},
            "packages": {"torch": "2.13.0", "python": "3.12.1"},
        },
    )
    files = {}
    for name, p in probabilities.items():
        files[name] = evaluation(
            name,
            np.asarray(p, float),
            labels,
            cost(COSTS.get(name, 2_000_000)),
            temperatures.get(name),
            further.get(name),
        )
    if sizes:
        files["ensemble"][0]["sizes"] = sizes
    else:
        add_specialists(files, labels, members, active, missing, conditional)
    for stage in run.stages:
        if stage.name == "report" or (
            stage.name == "specialist" and int(stage.place[-3:]) in missing
        ):
            continue
        attempt = stage.begin()
        if stage.name in ("generalist", "member", "specialist", "control", "student"):
            usual = 7200 if "compute" in stage.place else 600
            steps = {"generalist": 8000, "member": 8000, "student": 4000}.get(stage.name, usual)
            index = sum(map(ord, stage.place))
            attempt.path("metrics.jsonl").write_text(learning(steps, 0.6 + index % 7 / 100, index))
            write_json(
                attempt.path("summary.json"),
                {
                    **cost(256 * steps),
                    "steps": steps,
                    "best_step": steps,
                    "val": {
                        "loss": {
                            "control_wall-0": 1.3,
                            "control_wall-1": 1.2,
                            "control_wall-2": 1.4,
                        }.get(stage.place.split("/")[-1], 1.0),
                        "top1": 0.6,
                    },
                },
            )
        if stage.name == "generalist":
            write_json(attempt.path("model.json"), {"schema": 1, "class_names": names})
        if stage.name == "cluster":
            write_json(
                attempt.path("groups.json"),
                {
                    "schema": 1,
                    "num_classes": num_classes,
                    "members": [list(map(int, group)) for group in members],
                },
            )
            group_sizes = [len(group) for group in members]
            forecast = [
                {"classes": size, "gain": 0.012 + 0.004 * i} for i, size in enumerate(group_sizes)
            ]
            write_json(
                attempt.path("summary.json"),
                {
                    "captured": 0.55,
                    "chance": 0.1,
                    "captured_unlabelled": 0.6,
                    "chance_unlabelled": 0.1,
                    "sizes": group_sizes,
                    "forecast": forecast,
                    "skipped": [],
                },
            )
        if stage.name == "evaluate":
            for name, (said, arrays) in files.items():
                write_json(attempt.path(f"{name}.json"), said)
                np.savez(attempt.path(f"{name}.npz"), **arrays)
        attempt.finish()
    return run


def one_hot(predicted, num_classes, sure=0.9):
    """[n, C]: `sure` on the predicted class, the rest spread evenly."""
    p = np.full((len(predicted), num_classes), (1 - sure) / (num_classes - 1))
    p[np.arange(len(predicted)), predicted] = sure
    return p


# Ten examples, six classes.  Groups {0, 1, 2} and {2, 3}; 4 and 5 are covered by nobody, 2 by both specialists.
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


# A deep ensemble of three, whose calibrated NLL is 1.0, 0.8 and 0.7; a student of 0.9 is worth one and a half.
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
    import unicodedata

    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    from fontTools.ttLib import TTFont

    points = sorted(TTFont(path).getBestCmap())
    points = [p for p in points if unicodedata.category(chr(p))[0] == "L"][
        :: max(1, 2400 // num_classes)
    ][:num_classes]
    font, random = ImageFont.truetype(path, 22), np.random.default_rng(seed)
    pixels = np.zeros((num_classes * per_class, 1, size, size), np.uint8)
    for c, point in enumerate(points):
        for i in range(per_class):
            picture = Image.new("L", (size, size), 0)
            ImageDraw.Draw(picture).text(
                (size / 2, size / 2), chr(point), fill=255, font=font, anchor="mm"
            )
            picture = picture.rotate(random.uniform(-9, 9), Image.Resampling.BILINEAR)
            shaken = np.roll(np.asarray(picture, np.int16), random.integers(-2, 3, 2), (0, 1))
            pixels[c * per_class + i, 0] = np.clip(
                shaken + random.normal(0, 9, shaken.shape), 0, 255
            )
    labels = np.repeat(np.arange(len(points)), per_class)
    order = random.permutation(len(labels))
    return Images(pixels[order], labels[order], [chr(p) for p in points])


def glyph_run(root, num_classes=80, per_class=6, num_groups=5, names=None, seed=0, **more):
    """A run on glyphs whose confusions are those of their pixels, and its pictures."""
    images = glyph_images(num_classes, per_class, seed)
    random, labels = np.random.default_rng(seed), images.labels
    flat = images.pixels.reshape(len(labels), -1).astype(float)
    flat = (flat - flat.mean()) / flat.std()
    means = np.stack([flat[labels == c].mean(axis=0) for c in range(num_classes)])
    similar = flat @ means.T / flat.shape[1]
    axis = np.linalg.svd(means - means.mean(0), full_matrices=False)[0]
    groups = np.array_split(np.argsort(axis[:, 0]), num_groups)
    second = np.array_split(np.argsort(axis[:, 1]), num_groups)
    members = [np.union1d(a, b[: len(b) // 2]) for a, b in zip(groups, second, strict=True)]

    def answer(noise, shift=0.0):
        logits = 14 * (similar + noise * random.normal(size=similar.shape))
        logits[np.arange(len(labels)), labels] += shift
        p = np.exp(logits - logits.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)

    base = answer(0.085)

    def better(share):
        p = base ** (1 - share) * answer(0.06, 0.3) ** share
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
    run = make_run(
        root, labels, probabilities, members, train_counts=counts, names=images.class_names, **more
    )
    return run, images


@pytest.fixture
def glyphs(tmp_path):
    return glyph_run(tmp_path, names=HOSTILE)
