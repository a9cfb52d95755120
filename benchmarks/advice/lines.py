"""One line of truth.jsonl: what each lever and each short training gives, of a set and seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.store import read_json

from . import gains

HELD_OUT = ("val", "test")
SINGLE = {  # lever -> network
    "train_on": "on",
    "train_on_full_rate": "on_full",
    "wider": "wide",
    "grown": "grown_half",
    "average_student": "student",
    "average_student_on": "student_on",
    "average_student_mixed": "student_mixed_on",
}
SPECIALISTS = ("copies", "branches")
JOINED = (*SPECIALISTS, "rerank")
FULL = {"G", "second", *SINGLE.values()}


class Kept:
    """The log-probabilities below TO/SET/seed-S, float32."""

    def __init__(self, root: Path):
        self.root = root
        with np.load(root / "labels.npz") as labels:
            self.labels = {split: labels[split] for split in HELD_OUT}
        self.general = self.log_p("networks/G")
        self.general_calibrated, self.temperature = self.calibrated(self.general)

    def log_p(self, place: str) -> dict[str, np.ndarray]:
        return {
            split: np.load(self.root / place / f"{split}.npy").astype(np.float32)
            for split in HELD_OUT
        }

    def cost(self, place: str) -> dict:
        return read_json(self.root / place / "cost.json")

    def calibrated(self, log_p: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], float]:
        """log p of the true class at the temperature that fits val, and that temperature."""
        temperature = gains.temperature_of(log_p["val"], self.labels["val"])
        at_label = {
            split: gains.label_log_p(log_p[split], self.labels[split], temperature)
            for split in HELD_OUT
        }
        return at_label, temperature

    def gains(self, log_p: dict[str, np.ndarray], calibrate: bool = True) -> dict[str, dict]:
        """Of val and test. calibrate: NLL also where both have a temperature fitted on val."""
        row = {
            split: gains.gain(log_p[split], self.general[split], self.labels[split])
            for split in HELD_OUT
        }
        if calibrate:
            own, _ = self.calibrated(log_p)
            for split in HELD_OUT:
                lower = gains.mean_and_error(own[split] - self.general_calibrated[split])
                row[split] |= gains.nats_below(*lower, prefix="calibrated_")
        return row

    def joined(self, name: str, other: dict[str, np.ndarray], calibrate: bool = True) -> dict:
        """With the generalist: val's weight is cross-fitted, test's fitted on val."""
        join, y = gains.JOINS[name], self.labels
        weight = gains.fitted_weight(join, self.general["val"], other["val"], y["val"])
        log_p = {
            "val": gains.cross_fitted(join, self.general["val"], other["val"], y["val"]),
            "test": join.join(self.general["test"], other["test"], weight),
        }
        return self.gains(log_p, calibrate) | {"weight": weight}


def line_of(name: str, seed: int, root: Path) -> dict:
    """The line of truth.jsonl."""
    kept = Kept(root)
    return {
        "set": name,
        "seed": seed,
        "generalist": generalist_of(kept),
        "lever": levers_of(kept),
        "short": short_of(kept),
    }


def generalist_of(kept: Kept) -> dict:
    cost = kept.cost("networks/G")
    with np.load(kept.root / "networks/G/train.npz") as train:
        row = {
            "train_top1": round(100 * float(train["correct"].mean()), 2),
            "train_nll": round(-float(train["log_p"].mean(dtype=np.float64)), 4),
        }
    for split in HELD_OUT:
        labels, log_p = kept.labels[split], kept.general[split]
        row[f"{split}_n"] = len(labels)
        row[f"{split}_top1"] = round(100 * float(gains.correct(log_p, labels).mean()), 2)
        row[f"{split}_nll"] = round(gains.nll(log_p, labels), 4)
        at_label = kept.general_calibrated[split]
        row[f"{split}_calibrated_nll"] = round(-float(at_label.mean(dtype=np.float64)), 4)
    row["temperature"] = round(kept.temperature, 4)
    return row | {"classes": kept.general["val"].shape[1]} | cost


def levers_of(kept: Kept) -> dict[str, dict]:
    general, second = kept.cost("networks/G"), kept.cost("networks/second")
    rows: dict[str, dict] = {}

    def add(name: str, gained: dict, cost: dict) -> None:
        keys = ("training", "multiplications", "parameters", "seconds")
        rows[name] = gained | {key: cost[key] for key in keys if key in cost}

    for name, network in SINGLE.items():
        if (kept.root / "networks" / network / "cost.json").exists():
            cost = kept.cost(f"networks/{network}")
            if name.startswith("average_student"):
                cost["training"] += second["training"]
            add(name, kept.gains(kept.log_p(f"networks/{network}")), cost)
    other = kept.log_p("networks/second")
    both = second | {
        "multiplications": general["multiplications"] + second["multiplications"],
        "parameters": general["parameters"] + second["parameters"],
    }
    plain = {split: gains.arithmetic(kept.general[split], other[split], 0.5) for split in HELD_OUT}
    add("average", kept.gains(plain), both)
    add("second_alone", kept.gains(other), second)
    for name in gains.JOINS:
        add(name if name != "average" else "average_fitted", kept.joined(name, other), both)
    rows["average"]["residual_correlation"] = gains.residual_correlation(
        kept.general["val"], other["val"], kept.labels["val"]
    )
    for name in JOINED:
        if (kept.root / name / "cost.json").exists():
            add(name, kept.gains(kept.log_p(name)), kept.cost(name))
    for name in SPECIALISTS:
        if name in rows:
            members = read_json(kept.root / name / "clusters" / "groups.json")["members"]
            for split in HELD_OUT:
                p, y = kept.general[split], kept.labels[split]
                rows[name][split]["ceiling"] = round(gains.ceiling(p, y, members), 3)
    return rows


def short_of(kept: Kept) -> dict[str, dict]:
    """Of each short network: alone. Of a second one also joined with the generalist.

    "same_age": of a wider one, over the fresh one of as many steps. Of another fresh one, what the
    two joined are over one of them, the mean of both.
    """
    rows = {}
    for folder in sorted((kept.root / "networks").iterdir()):
        if folder.name in FULL or not (folder / "cost.json").exists():
            continue
        log_p, cost = kept.log_p(f"networks/{folder.name}"), kept.cost(f"networks/{folder.name}")
        row = kept.gains(log_p) | {key: cost[key] for key in ("share", "training", "seconds")}
        if folder.name.startswith(("a_", "b_")):
            row |= {name: kept.joined(name, log_p, calibrate=False) for name in gains.JOINS}
            row["residual_correlation"] = gains.residual_correlation(
                kept.general["val"], log_p["val"], kept.labels["val"]
            )
        if folder.name.startswith(("wide_", "b_")):
            family, _, tag = folder.name.partition("_")
            row["same_age"] = SAME_AGE[family](kept, kept.log_p(f"networks/a_{tag}"), log_p)
        rows[folder.name] = row
    return rows


def over_fresh(kept: Kept, fresh: dict, wide: dict) -> dict[str, dict]:
    """val and test of the wide one over the fresh one, and "pair", the two joined."""
    over = {split: gains.gain(wide[split], fresh[split], kept.labels[split]) for split in HELD_OUT}
    return over | {"pair": of_pair(kept, fresh, wide)}


def of_pair(kept: Kept, first: dict, second: dict) -> dict[str, dict]:
    """{"average", "geometric"} -> val and test: the mean of the gains over either one."""

    def over_both(join: gains.Join, split: str) -> dict[str, float]:
        log_p, y = join.join(first[split], second[split], 0.5), kept.labels[split]
        pair = [gains.gain(log_p, each[split], y) for each in (first, second)]
        return {key: round(sum(each[key] for each in pair) / 2, 4) for key in pair[0]}

    return {
        name: {split: over_both(gains.JOINS[name], split) for split in HELD_OUT}
        for name in ("average", "geometric")
    }


SAME_AGE = {"wide": over_fresh, "b": of_pair}
