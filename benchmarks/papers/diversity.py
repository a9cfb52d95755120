"""How much of a deep ensemble's diversity a BatchEnsemble keeps, by what moves its training inputs.

    python -m benchmarks.papers.diversity --to runs/papers/diversity --write
    python -m benchmarks.papers.diversity --quick  seconds, no result

Nam et al. 2021, "Diversity matters when learning from ensembles", their table of CIFAR-10, on a
small net and a part of the data: the 50,000 training images of shared/data/cifar10 (re-encoded) are
split, of each class alike, into TRAIN to learn from, 5,000 val and 10,000 test. The rest is not
used, and the 1,000 that the set calls test are measured too.  Nothing is augmented and T = 1:
teachers have memorised train, agree on it and nowhere else, which is what ODS is for.

One run for each seed: four networks, and four BatchEnsembles of four members that learn one-to-one
from them, alike in all but `perturb`.  Read from the finished run besides (--figures prints it
alone): ensembles of two and of three, how far members are apart by confidence (their Figure 3), and
whether a direction that one teacher gives moves the others (their Figure 6).
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ensemble import fit_temperature
from networks import Classifier, load_classifier, member_log_probabilities
from pipeline.config import Data
from pipeline.graph import open_run
from pipeline.store import Stage, read_json, write_json
from trainer.core import metrics
from trainer.core.perturbations import perturb
from trainer.data import ShardSet, open_shards
from trainer.data.authoring.splitting import split_by_class, write_splits
from trainer.distributed.ranks import autocast

from . import lab

TITLE = "Diversity: a BatchEnsemble learns from four networks (Nam et al. 2021)"
SOURCE = lab.DATA / "cifar10"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# A mosaic is 25 rows x 40 columns of 32 x 32. There are 50 of train and, the last, one of test.
ROWS, COLUMNS, SIDE = 25, 40, 32
PER_MOSAIC = ROWS * COLUMNS
TRAIN, SHARES = 2_500, {"test": 0.2, "val": 0.1}  # of 50,000
GIVEN = "given"  # the split of the set's own test images
STUDENTS = {"plain": "none", "gaussian": "gaussian", "ods": "ods", "conf_ods": "conf_ods"}
NAMES = {
    "DE-1": "single",
    "DE-2": "DE-2",
    "DE-3": "DE-3",
    "DE-4": "DE-4",
    "plain": "BE-4 distilled",
    "gaussian": "+ Gaussian",
    "ods": "+ ODS",
    "conf_ods": "+ ConfODS",
}
HEADER = ["", "ACC %", "NLL", "Brier", "ECE", "cNLL", "cBrier", "cECE", "DEE", "pairwise KL", "MU"]
MEMBERS = 4
CONFIDENCE_BINS = 5
MOVED = 2_000  # examples of train, and of test, that Figure 6's rows are measured on

MODEL = {
    "name": "convnet",
    "embedding": 0,
    "options": {"channels": [16, 32, 64, 128], "kernel": [5, 3, 3, 3]},
}
SCHEDULE = {
    "batch_size": 128,
    "optimizer": "adamw",
    "learning_rate": 0.004,
    "weight_decay": 0.02,
    "warmup": 0.1,
    "schedule": "cosine",
    "beta2": 0.99,
    "checkpoint_every": 2000,
    "log_every": 100,
}
EPOCHS = STUDENT_EPOCHS = 60
# The paper's of CIFAR-100 and TinyImageNet. Of CIFAR-10 its T is 4.
TEMPERATURE, HARD, SIZE = 1.0, 0.1, 1 / 255


@dataclass(frozen=True)
class Form:
    """How much is done: images to learn from, those that are moved, and of a network's depth."""

    train: int = TRAIN
    moved: int = MOVED
    quick: bool = False


FULL, QUICK = Form(), Form(train=100, moved=20, quick=True)


# The data


def pictures(source: Path = SOURCE) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 32, 32, 3] and int64 [n] of all mosaics, the set's own test last."""
    tiles = []
    for file in sorted(source.glob("cifar10_*.webp")):
        mosaic = np.asarray(Image.open(file).convert("RGB"))
        rows = mosaic.reshape(ROWS, SIDE, COLUMNS, SIDE, 3).swapaxes(1, 2)
        tiles.append(rows.reshape(-1, SIDE, SIDE, 3))
    labels = np.fromfile(source / "labels.u8", np.uint8).astype(np.int64)
    return np.concatenate(tiles), labels


def make_up_pictures(source: Path, mosaics: int = 2) -> None:
    """Mosaics of random pictures, each class of a colour of its own."""
    source.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 160, (len(CLASSES), 1, 1, 3))
    labels = np.arange(mosaics * PER_MOSAIC) % len(CLASSES)
    for index, part in enumerate(labels.reshape(mosaics, ROWS, COLUMNS)):
        tiles = colours[part] + rng.integers(0, 96, (ROWS, COLUMNS, SIDE, SIDE, 3))
        mosaic = tiles.swapaxes(1, 2).reshape(ROWS * SIDE, COLUMNS * SIDE, 3).astype(np.uint8)
        Image.fromarray(mosaic).save(source / f"cifar10_{index:02d}.webp", method=0)
    labels.astype(np.uint8).tofile(source / "labels.u8")


def parts(labels: np.ndarray, train: int = TRAIN) -> dict[str, np.ndarray]:
    """ids of train, val, test and GIVEN. The split is the same for every seed."""
    own = len(labels) - PER_MOSAIC
    unused = 1 - train / own - sum(SHARES.values())
    ids = split_by_class(labels[:own], SHARES | {"unused": round(unused, 6)}, seed=0)
    del ids["unused"]
    return ids | {GIVEN: np.arange(own, len(labels))}


def make(path: Path, source: Path = SOURCE, train: int = TRAIN) -> None:
    """Shards of what parts() names."""
    lab.require(source)
    images, labels = pictures(source)

    def sample(index: int) -> dict:
        file = io.BytesIO()
        Image.fromarray(images[index]).save(file, "png")
        return {"png": file.getvalue(), "cls": b"%d" % labels[index]}

    made_by = {"command": "benchmarks.papers.diversity"}
    write_splits(path, CLASSES, parts(labels, train), sample, made_by)


def make_up(path: Path) -> None:
    """Shards of made-up pictures."""
    source = path.with_name("cifar10")
    make_up_pictures(source)
    make(path, source, QUICK.train)


# The run


def config_of(data: Path, seed: int) -> dict:
    """Four networks, and a BatchEnsemble for each of STUDENTS, alike in all but `perturb`."""
    student = {
        "start": "scratch",
        "network": "batch_ensemble",
        "temperature": TEMPERATURE,
        "hard_weight": HARD,
        "soft_weight": 1 - HARD,
        "epochs": STUDENT_EPOCHS,
    }
    students = {
        name: student | {"perturb": kind, "perturb_size": SIZE} for name, kind in STUDENTS.items()
    }
    scale = {"mean": [0.491, 0.482, 0.447], "std": [0.247, 0.243, 0.262]}
    return {
        "seed": seed,
        "model": MODEL,
        "train": SCHEDULE | {"epochs": EPOCHS},
        "data": dict.fromkeys(("train", "val", "test"), str(data)) | scale,
        "ensemble": {"kind": "deep", "members": MEMBERS},
        "students": students,
        "controls": {"enabled": False},
        "launch": {"processes": 1, "pool": 1},
        "engine": {"device": "cpu", "precision": "bf16"},
    }


def quick(config: dict) -> dict:
    """The same stages in seconds: a shallow net, few steps."""
    small = {"channels": [4, 8], "kernel": [5, 3]}
    students = {name: student | {"epochs": 3} for name, student in config["students"].items()}
    return config | {
        "model": MODEL | {"options": small},
        "train": SCHEDULE | {"epochs": 4, "batch_size": 50},
        "students": students,
    }


# What was measured


class Predictions(NamedTuple):
    """log_p: members' log-probabilities [K, n, C].  labels: int64 [n]."""

    log_p: Tensor
    labels: Tensor


def evaluate(val: Predictions, test: Predictions) -> dict:
    """A row as results.json has them: the mean of the members, its temperature fitted on val."""

    def mixed(log_p: Tensor) -> Tensor:
        return log_p.logsumexp(0) - math.log(len(log_p))

    temperature = fit_temperature(mixed(val.log_p), val.labels)
    logits = mixed(test.log_p)
    row = single_metrics(logits, test.labels)
    calibrated = single_metrics(logits / temperature, test.labels)
    row["temperature"] = temperature
    row |= {f"c{key}": calibrated[key] for key in ("nll", "brier", "ece")}
    if len(test.log_p) > 1:
        kl = metrics.pairwise_kl(test.log_p)
        mu = metrics.model_uncertainty(test.log_p.exp())
        row["members"] = {
            "pairwise_kl": float(kl.double().mean()),
            "mu": float(mu.double().mean()),
        }
    return row


def single_metrics(logits: Tensor, labels: Tensor) -> dict:
    """top-1, NLL, Brier's score, ... of [n, C]."""
    p = logits.softmax(1)
    top = p.topk(5, dim=1)
    one_hot = torch.nn.functional.one_hot(labels, p.shape[1])
    squares = (p - one_hot).square().sum(1)
    p_label = p.gather(1, labels[:, None])[:, 0]
    return dict(metrics.summarise(labels, top.indices, top.values, p_label, squares))


def with_equivalents(rows: dict[str, dict]) -> dict[str, dict]:
    """The rows with DEE among DE-1 ... DE-4. math.inf beyond."""
    sizes = [rows[f"DE-{m}"]["cnll"] for m in range(1, MEMBERS + 1)]
    return {
        name: row | {"dee": metrics.deep_ensemble_equivalent(row["cnll"], sizes)}
        for name, row in rows.items()
    }


def measured(data: Path, run: Path, form: Form = FULL) -> dict:
    """What the run does not say by itself, and what it needs its networks for. Kept beside it.

    {"test": rows, "given": rows, "train": rows, "by_confidence": {name: bins},
    "moved": {split: {kind: metrics}}}
    """
    file = run.with_name(f"{run.name}-measured.json")
    results = read_json(run / "results.json")
    if file.exists():
        kept = read_json(file)
        if kept["of"] == results:
            return kept
    networks, predictions = predict_all(data, run)
    rows = {}
    for split in ("test", GIVEN, "train"):
        of_split = {
            name: evaluate(predictions["val"][name], predictions[split][name]) for name in NAMES
        }
        rows[split] = with_equivalents(of_split)
    check_against(results, rows["test"])
    log_p = {name: each.log_p for name, each in predictions["test"].items()}
    apart = {
        "by_confidence": by_confidence(log_p),
        "moved": moved(data, networks, form.moved),
    }
    write_json(file, {"of": results, **rows, **apart})
    return {"of": results, **rows, **apart}


def opened(data: Path, split: str) -> ShardSet:
    return open_shards(str(data), Data(), split)


def predict_all(
    data: Path, run: Path
) -> tuple[list[Classifier], dict[str, dict[str, Predictions]]]:
    """The four networks. {split: {name of NAMES: what it predicts}}."""
    stages = open_run(run)

    def load(stage: Stage) -> Classifier:
        return load_classifier(stage.path("model.safetensors").parent)

    networks = [load(stage) for stage in (stages.generalist, *stages.members)]
    students = {name: load(stages.students[name]) for name in STUDENTS}
    predictions: dict[str, dict[str, Predictions]] = {}
    in_precision = autocast(stages.config.engine, torch.device("cpu"))  # as the run measured
    for split in ("val", "test", GIVEN, "train"):
        shards = opened(data, split)
        raw = torch.from_numpy(shards.inputs(np.arange(len(shards))))
        labels = torch.from_numpy(shards.labels.astype(np.int64))
        with in_precision:
            single = torch.cat([log_probabilities(network, raw) for network in networks])
            of_students = {name: log_probabilities(each, raw) for name, each in students.items()}
        log_p = {f"DE-{m}": single[:m] for m in range(1, MEMBERS + 1)} | of_students
        predictions[split] = {name: Predictions(each, labels) for name, each in log_p.items()}
    return networks, predictions


@torch.inference_mode()
def log_probabilities(network: Classifier, raw: Tensor) -> Tensor:
    """[K, n, C] of the network's members."""
    parts = [member_log_probabilities(network.eval(), part) for part in raw.split(500)]
    return torch.cat(parts, 1)


def check_against(results: dict, rows: dict) -> None:
    """Raises SystemExit where results.json has other metrics of a network: an oracle for both."""
    pairs = [
        ("DE-1", results["generalist"]),
        (f"DE-{MEMBERS}", results["ensemble"]),
        *results["students"].items(),
    ]
    for name, row in pairs:
        for key in ("top1", "nll", "brier", "ece", "cnll", "cbrier", "cece"):
            if not math.isclose(row[key], rows[name][key], rel_tol=2e-3, abs_tol=2e-4):
                raise SystemExit(
                    f"{name}: {key} is {row[key]} in results.json and {rows[name][key]} here"
                )


def by_confidence(log_p: dict[str, Tensor]) -> dict[str, list[dict]]:
    """Of the ensemble and each student: pairwise KL by the confidence of the members' mean."""
    bins = {}
    for name in (f"DE-{MEMBERS}", *STUDENTS):
        confidence = log_p[name].exp().mean(0).amax(1)
        kl = metrics.pairwise_kl(log_p[name])
        bins[name] = metrics.by_confidence(confidence, kl, CONFIDENCE_BINS)
    return bins


def moved(data: Path, networks: list[Classifier], count: int = MOVED) -> dict[str, dict[str, dict]]:
    """{split: {kind: effect_of}}: what each perturbation does to the teachers.

    Means over the teacher that gives the direction.
    """
    effects: dict[str, dict[str, dict]] = {}
    for split in ("train", "test"):
        raw = torch.from_numpy(opened(data, split).inputs(np.arange(count)))
        effects[split] = {}
        for kind in STUDENTS.values():
            drawn = [effect_of(kind, giver, networks, raw) for giver in range(MEMBERS)]
            effects[split][kind] = {key: mean(row[key] for row in drawn) for key in drawn[0]}
    return effects


def effect_of(kind: str, giver: int, networks: list[Classifier], raw: Tensor) -> dict[str, float]:
    """What a perturbation along teacher `giver`'s direction does to all teachers.

    own, others: KL of a teacher's prediction from that of the clean input, of the one that gave the
    direction and of those that did not.  apart, apart_others: pairwise KL between all teachers, and
    between the others alone.
    """
    scale = networks[0].spec.input.scale

    @torch.no_grad()
    def predict(x: Tensor) -> Tensor:
        return torch.cat([member_log_probabilities(network, x / scale) for network in networks])

    gives: list[Callable[[Tensor], Tensor]] = [lambda x: networks[giver](x / scale)]
    generator = torch.Generator().manual_seed(giver)
    clean = predict(raw.float() * scale)
    parts = [
        perturb(kind, part.float() * scale, SIZE, TEMPERATURE, gives, generator)
        for part in raw.split(500)
    ]
    after = predict(torch.cat(parts))
    shift = (clean.exp() * (clean - after)).sum(-1).mean(-1)  # [K]
    others = [m for m in range(MEMBERS) if m != giver]
    return {
        "own": float(shift[giver]),
        "others": float(shift[others].mean()),
        "apart": float(metrics.pairwise_kl(after).mean()),
        "apart_others": float(metrics.pairwise_kl(after[others]).mean()),
    }


# Tables


def table_row(name: str, rows: list[dict]) -> list[str]:
    """rows: of each seed."""
    cells = [NAMES[name], lab.spread([100 * row["top1"] for row in rows], 2)]
    for key in ("nll", "brier", "ece", "cnll", "cbrier", "cece"):
        cells.append(lab.spread([row[key] for row in rows], 4))
    cells.append(equivalents([row["dee"] for row in rows]))
    if "members" not in rows[0]:
        return [*cells, "–", "–"]
    for key in ("pairwise_kl", "mu"):
        cells.append(lab.spread([row["members"][key] for row in rows], 3))
    return cells


def equivalents(dees: list[float | None]) -> str:
    """DEE of each seed. ">4" beyond."""
    values = list(map(beyond, dees))
    if any(map(math.isinf, values)):
        return ", ".join(metrics.format_equivalent(dee, MEMBERS) for dee in values)
    return lab.spread(values, 2)


def beyond(dee: float | None) -> float:
    """JSON has no infinity: null is beyond the largest ensemble."""
    return math.inf if dee is None else dee


def verdicts(rows: list[dict[str, dict]]) -> list[str]:
    """Lower cNLL and higher DEE than plain distillation and than Gaussian noise, seed by seed."""
    lines = []
    for name in ("ods", "conf_ods"):
        for rival in ("plain", "gaussian"):
            lower = [of_seed[rival]["cnll"] - of_seed[name]["cnll"] for of_seed in rows]
            wins = sum(gain > 0 for gain in lower)
            higher = sum(beyond(row[name]["dee"]) > beyond(row[rival]["dee"]) for row in rows)
            pair = f"{NAMES[name].strip('+ ')} against {NAMES[rival].strip('+ ')}"
            lines.append(
                f"* {pair}: cNLL lower by {lab.spread(lower, 4)} ({wins} of {len(rows)} seeds), "
                f"DEE higher at {higher} of {len(rows)}."
            )
    return lines


def confidence_table(by_seed: list[dict]) -> str:
    """Pairwise KL by confidence, all seeds' examples together."""
    rows = []
    for name in (f"DE-{MEMBERS}", *STUDENTS):
        all_bins = [of_seed["by_confidence"][name] for of_seed in by_seed]
        total = sum(each["count"] for bins in all_bins for each in bins)
        cells = []
        for index in range(CONFIDENCE_BINS):
            own = [bins[index] for bins in all_bins]
            count = sum(each["count"] for each in own)
            kl = sum(each["count"] * each["value"] for each in own) / max(count, 1)
            cells.append(f"{kl:.3f} ({count / total:.0%})")
        rows.append([NAMES[name], *cells])
    ends = [index / CONFIDENCE_BINS for index in range(CONFIDENCE_BINS + 1)]
    header = [f"({low:g}, {high:g}]" for low, high in zip(ends, ends[1:], strict=False)]
    return lab.table(["", *header], rows)


def moved_table(by_seed: list[dict]) -> str:
    rows = []
    for split in ("train", "test"):
        for kind in STUDENTS.values():
            own = [of_seed["moved"][split][kind] for of_seed in by_seed]
            keys = ("own", "others", "apart", "apart_others")
            rows.append(
                [f"{split}, {kind}", *(f"{mean(row[key] for row in own):.4f}" for key in keys)]
            )
    header = [
        "inputs",
        "answer moves: the giver's",
        "the others'",
        "pairwise KL: all",
        "the others",
    ]
    return lab.table(header, rows)


def figures_text(by_seed: list[dict], form: Form = FULL) -> str:
    return "\n\n".join(
        [
            "Pairwise KL of the members (nats, mean over the test examples in the bin, in brackets "
            "the share of examples) by the confidence of the members' mean, as in the paper's "
            "Figure 3:",
            confidence_table(by_seed),
            f"What moves the teachers (paper's Figure 6), {form.moved:,} inputs, not augmented. "
            "First the KL of a teacher's answer to the moved input from its answer to the clean "
            "one, where it gave the direction and where another did. Then the teachers' pairwise "
            "KL on the moved inputs, of all four and of the three that did not give the direction:",
            moved_table(by_seed),
        ]
    )


def text_of(by_seed: list[dict], results: list[dict], form: Form = FULL) -> str:
    """The page's section, but for its conditions.  by_seed, results: of each seed."""
    rows = [rows_of(*of_seed) for of_seed in zip(by_seed, results, strict=True)]
    given = [of_seed[GIVEN] for of_seed in by_seed]
    accuracies = []
    for name in NAMES:
        top1 = [100 * of_seed["train"][name]["top1"] for of_seed in by_seed]
        accuracies.append(f"{NAMES[name]} {lab.spread(top1, 1)} %")
    return "\n\n".join(
        [
            f"Test: {results[0]['generalist']['n']:,} images that were held out of train.",
            main_table(rows),
            "\n".join(verdicts(rows)),
            "The same on the set's own 1,000 test images:",
            main_table(given),
            "\n".join(verdicts(given)),
            f"Accuracy on the training images, not augmented: {', '.join(accuracies)}.",
            figures_text(by_seed, form),
        ]
    )


def main_table(rows: list[dict[str, dict]]) -> str:
    """rows: of each seed, by name."""
    lines = [table_row(name, [of_seed[name] for of_seed in rows]) for name in NAMES]
    return lab.table(HEADER, lines)


def rows_of(measured: dict, results: dict) -> dict[str, dict]:
    """results.json's rows, and those of ensembles of two and three from what was measured."""
    rows = {
        "DE-1": results["generalist"],
        f"DE-{MEMBERS}": results["ensemble"],
        **results["students"],
    }
    return {name: rows.get(name, measured["test"][name]) for name in NAMES}


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = lab.arguments(__doc__)
    parser.add_argument(
        "--figures",
        action="store_true",
        help="print the figures of runs that are done, and no more",
    )
    return lab.parsed(parser, words)


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    form = QUICK if options.quick else FULL
    command = f"python -m benchmarks.papers.diversity --to {options.to}"
    data = lab.shards(options.to / "data", make_up if form.quick else make)
    runs = {seed: options.to / f"seed-{seed}" for seed in options.seeds}
    results = []
    if not options.figures:
        for seed, run in runs.items():
            config = config_of(data, seed)
            if form.quick:
                config = quick(config)
            results.append(lab.finished(config, run, options.set, in_process=form.quick))
    by_seed = [measured(data, run, form) for run in runs.values()]
    if options.figures:
        print(figures_text(by_seed, form))
    else:
        text = f"{text_of(by_seed, results, form)}\n\n{lab.conditions(options.seeds, command)}"
        print(text)
        if options.write:
            lab.write_section(TITLE, text)
    rows = [rows_of(of_seed, of_seed["of"]) for of_seed in by_seed]
    lab.print_json({"rows": rows, "verdicts": verdicts(rows)}, options, command)


if __name__ == "__main__":
    main()
