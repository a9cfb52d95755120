"""What one network learns from another, on photographs: self-distillation, and ODS's Jacobians.

    python -m benchmarks.papers.one_to_one --to runs/papers/one_to_one --write
    python -m benchmarks.papers.one_to_one --quick  seconds, no result

Two runs for each seed, on the 2,500 training images of CIFAR-10 that `diversity` takes:

augmented: flips and crops, T = 4.  Allen-Zhu & Li 2020, their experiments: a network, an ensemble
    of four, a student of each, and a network that learns from labels for as long.
memorised: no augmentation, T = 1.  Nam et al. 2021, section 3.2: a student that learns at x + eps,
    where ODS draws eps, also matches its teacher's Jacobian at x.  Students differ in `perturb`
    alone. How far their Jacobians are from the teacher's is measured on train and on test.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from networks import Classifier, load_classifier
from pipeline.graph import open_run

from . import diversity, lab

TITLE = "One network learns from another (Allen-Zhu & Li 2020, Nam et al. 2021)"
MEMBERS = 4
KINDS = {"plain": "none", "gaussian": "gaussian", "ods": "ods"}
AUGMENTED = {
    "generalist": "one network",
    "ensemble": f"ensemble of {MEMBERS}",
    "self": "student of one other network: self-distillation",
    "of_ensemble": "student of the ensemble",
    "labels": "a second network on labels, for as long",
}
MEMORISED = {
    "plain": "student of one network",
    "gaussian": "+ Gaussian",
    "ods": "+ ODS",
    "labels": "a second network on labels",
}
SPLITS = ("train", "test")


# The runs


def student(**keys) -> dict:
    """From fresh weights, for as long as its teacher."""
    schedule = {"start": "scratch", "epochs": diversity.STUDENT_EPOCHS}
    return schedule | keys


def augmented(data: Path, seed: int) -> dict:
    """Four networks, students of one and of all, and a network on labels."""
    soft = {"temperature": 4.0, "hard_weight": 0.1, "soft_weight": 0.9}
    config = diversity.config_of(data, seed)
    config["data"] |= {"augment": "flip-crop"}
    config["ensemble"] = {"kind": "deep", "members": MEMBERS}
    config["students"] = {
        "self": student(teacher="generalist", **soft),
        "of_ensemble": student(teacher="ensemble", **soft),
        "labels": student(method="hard"),
    }
    return config


def memorised(data: Path, seed: int) -> dict:
    """One network, and its students, which differ in `perturb` alone."""
    soft = {
        "teacher": "generalist",
        "temperature": diversity.TEMPERATURE,
        "hard_weight": diversity.HARD,
        "soft_weight": 1 - diversity.HARD,
        "perturb_size": diversity.SIZE,
    }
    config = diversity.config_of(data, seed)
    config["ensemble"] = {"kind": "deep", "members": 1}
    config["students"] = {name: student(perturb=kind, **soft) for name, kind in KINDS.items()}
    config["students"]["labels"] = student(method="hard")
    return config


# Jacobians


def jacobian(network: Classifier, raw: Tensor) -> Tensor:
    """d log-probabilities / d pixels in 0..1, of uint8 [B, ...]: float32 [B, C, D]."""
    x = (raw.float() * network.spec.input.scale).requires_grad_()
    log_p = network.eval()(x / network.spec.input.scale).float().log_softmax(1)
    # Rows do not mix in eval mode, so the gradient of a sum over rows holds each row's own.
    rows = [
        torch.autograd.grad(log_p[:, c].sum(), x, retain_graph=True)[0].flatten(1)
        for c in range(log_p.shape[1])
    ]
    return torch.stack(rows, 1).detach()


def jacobian_distance(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """How far Jacobians [B, C, D] are from a teacher's, for each example: two tensors [B].

    relative: ||J_s - J_t|| / ||J_t||, Frobenius norms. 1 where J_s is 0.
    cosine: of the two, as vectors of C D numbers.
    """
    s, t = student.flatten(1).double(), teacher.flatten(1).double()
    norm = t.norm(dim=1)
    return {
        "relative": (s - t).norm(dim=1) / norm,
        "cosine": (s * t).sum(1) / (s.norm(dim=1) * norm),
    }


def distances(data: Path, run: Path, count: int) -> dict[str, dict[str, dict[str, float]]]:
    """{split: {student: {"relative": median, "cosine": mean}}} over `count` images of a split."""
    stages = open_run(run)

    def load(stage) -> Classifier:
        return load_classifier(stage.path("model.safetensors").parent)

    teacher = load(stages.generalist)
    students = {name: load(stages.students[name]) for name in MEMORISED}
    measured: dict[str, dict[str, dict[str, float]]] = {}
    for split in SPLITS:
        raw = torch.from_numpy(diversity.opened(data, split).inputs(np.arange(count)))
        parts = raw.split(250)
        of_teacher = [jacobian(teacher, part) for part in parts]
        measured[split] = {}
        for name, network in students.items():
            each = [
                jacobian_distance(jacobian(network, part), t)
                for part, t in zip(parts, of_teacher, strict=True)
            ]
            joined = {key: torch.cat([row[key] for row in each]) for key in each[0]}
            measured[split][name] = {
                "relative": float(joined["relative"].median()),
                "cosine": float(joined["cosine"].mean()),
            }
    return measured


# Tables


def spread_of(rows: list[dict], key: str, scale: float = 1.0, digits: int = 4) -> str:
    return lab.spread([scale * row[key] for row in rows], digits)


def rows_named(results: list[dict], name: str) -> list[dict]:
    """One row per seed: the generalist's, the ensemble's or a student's."""
    named = [lab.named_rows(of_seed) for of_seed in results]
    return [of_seed[name] if name in of_seed else of_seed[f"student {name}"] for of_seed in named]


def augmented_table(results: list[dict]) -> str:
    """results: results.json of each seed."""
    one = rows_named(results, "generalist")
    lines = []
    for name, words in AUGMENTED.items():
        rows = rows_named(results, name)
        leads = [
            100 * (row["top1"] - of_one["top1"]) for row, of_one in zip(rows, one, strict=True)
        ]
        lead = lab.spread(leads, 2) if rows != one else ""
        metrics = [spread_of(rows, key) for key in ("nll", "cnll")]
        lines.append([words, spread_of(rows, "top1", 100, 2), lead, *metrics])
    header = ["", "top-1, %", "points above one network", "NLL", "calibrated NLL"]
    return lab.table(header, lines)


def memorised_table(results: list[dict], distant: list[dict]) -> str:
    """results: results.json of each seed.  distant: `distances` of each seed."""
    one = rows_named(results, "generalist")
    lines = [
        [
            "the teacher, one network",
            *["-"] * 4,
            spread_of(one, "top1", 100, 2),
            spread_of(one, "cnll"),
        ]
    ]
    for name, words in MEMORISED.items():
        cells = [
            spread_of([of_seed[split][name] for of_seed in distant], key, digits=3)
            for split in SPLITS
            for key in ("relative", "cosine")
        ]
        rows = rows_named(results, name)
        lines.append([words, *cells, spread_of(rows, "top1", 100, 2), spread_of(rows, "cnll")])
    header = [
        "",
        *(f"{split}: {key}" for split in SPLITS for key in ("distance", "cosine")),
        "top-1, %",
        "calibrated NLL",
    ]
    return lab.table(header, lines)


def verdicts(results: list[dict], distant: list[dict]) -> list[str]:
    """What the papers say, seed by seed."""
    one, alone, labels = (rows_named(results, name) for name in ("generalist", "self", "labels"))
    rivals = {"one network": one, "a second one on labels": labels}
    count = len(results)
    lines = []
    for words, rival in rivals.items():
        wins = sum(a["top1"] > b["top1"] for a, b in zip(alone, rival, strict=True))
        lines.append(f"Self-distillation is more accurate than {words}: {wins} of {count} seeds.")
    for rival in ("plain", "gaussian"):
        for split in SPLITS:
            nearer = sum(
                of_seed[split]["ods"]["relative"] < of_seed[split][rival]["relative"]
                for of_seed in distant
            )
            lines.append(
                f"With ODS the Jacobian is nearer to the teacher's than {NAMED[rival]}, "
                f"on {split}: {nearer} of {count} seeds."
            )
    return lines


NAMED = {"plain": "without", "gaussian": "with Gaussian noise"}


def text_of(
    of_augmented: list[dict], of_memorised: list[dict], distant: list[dict], count: int
) -> str:
    """The page's section, but for its conditions."""
    n = of_augmented[0]["generalist"]["n"]
    judged = verdicts(of_augmented, distant)
    return "\n\n".join(
        [
            f"Augmented, T = 4. Test: {n:,} images that were held out of train.",
            augmented_table(of_augmented),
            "Memorised, T = 1. The distance is the Frobenius norm of the difference between a\n"
            "student's Jacobian and its teacher's, over the norm of the teacher's: the median of\n"
            f"{count:,} images. Jacobians are of the log-probabilities by the pixels.",
            memorised_table(of_memorised, distant),
            "\n".join(f"* {line}" for line in judged),
        ]
    )


def measure(options: argparse.Namespace) -> tuple[list[dict], list[dict], list[dict], int]:
    """Results of both runs and the Jacobians' distances, one per seed. How many images of these."""
    form = diversity.QUICK if options.quick else diversity.FULL
    data = lab.shards(options.to / "data", diversity.make_up if form.quick else diversity.make)
    results: dict[str, list[dict]] = {"augmented": [], "memorised": []}
    distant = []
    for seed in options.seeds:
        for name, make in (("augmented", augmented), ("memorised", memorised)):
            config = make(data, seed)
            if form.quick:
                config = diversity.quick(config)
            run = options.to / f"{name}-{seed}"
            results[name].append(lab.finished(config, run, options.set, in_process=form.quick))
        file = options.to / f"jacobians-{seed}.json"
        path = options.to / f"memorised-{seed}"
        distant.append(lab.once(file, lambda path=path: distances(data, path, form.moved)))
    return results["augmented"], results["memorised"], distant, form.moved


def main(words: list[str] | None = None) -> None:
    options = lab.parsed(lab.arguments(__doc__), words)
    command = lab.command_line("benchmarks.papers.one_to_one", words)
    of_augmented, of_memorised, distant, count = measure(options)
    text = text_of(of_augmented, of_memorised, distant, count)
    text = f"{text}\n\n{lab.conditions(options.seeds, command)}"
    print(text)
    if options.write:
        lab.write_section(TITLE, text)
    rows = {name: rows_named(of_augmented, name) for name in AUGMENTED}
    top1 = {name: [row["top1"] for row in of] for name, of in rows.items()}
    judged = verdicts(of_augmented, distant)
    lab.print_json({"top1": top1, "jacobians": distant, "verdicts": judged}, options, command)


if __name__ == "__main__":
    main()
