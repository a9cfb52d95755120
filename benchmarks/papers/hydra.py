"""Hydra, Tran et al. 2020: one body and fifty heads, each of which learns one member of an ensemble of fifty.

    python -m benchmarks.papers.hydra --to runs/papers/hydra --write
    python -m benchmarks.papers.hydra --to runs/papers/hydra --regression --write      one minute

MNIST, one run per seed: MEMBERS small conv nets; then, all of one trunk and for as many steps, a student of their mean,
Hydra (the student of half the time grows heads [100, 100, 10], phase two) and a Prior Network.  The 60,000 training
examples less 5,001 (val) are learned from; test is only evaluated.  --regression: curves of one input, ten members and
a Hydra of ten heads, by the KL of Gaussians; the variance that they state, split into its two parts.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.in_memory import InMemory
from networks.members import MemberHeads
from pipeline.config import Engine, Schedule
from trainer.core.distillation import gaussian_kl
from trainer.core.loop import Trainer, TrainingFiles, TrainingTask
from trainer.core.objectives import Objective
from trainer.data.streams import Source, TrainingStream, shuffled
from trainer.distributed.ranks import Ranks, process_group
from trainer.engines import build_engine

from . import lab

TITLE = "Hydra on MNIST (Tran et al. 2020)"
MEMBERS = 50
MEMBER = {
    "name": "convnet",
    "width": 8,
    "depth": 2,
    "embedding": 64,
    "options": {"kernel": 5, "activation": "relu"},
}
STUDENT = {
    "name": "benchmarks.papers.hydra:trunk",
    "options": {"channels": [16, 32], "hidden": [100, 100]},
}
HEAD_BLOCKS = 2  # [100, 100, 10] with the linear layer
EPOCHS = 3  # of a member
TEMPERATURE = 2.0  # of distillation and Hydra; chosen, as all of this, on val of seed 100
PHASE_ONE, PHASE_TWO = (
    2,
    12,
)  # epochs of the Hinton head and of the heads; the other students train for both
RATE, RATE_OF_HEADS = 4e-3, 1e-2
PAPER = {  # accuracy, NLL, Brier less one, MU
    "ensemble": (0.9851, 0.0439, -0.9780, 9.97e-6),
    "prior": (0.9842, 0.0521, -0.9285, 0.1158),
    "distill": (0.9843, 0.0497, -0.9764, None),
    "hydra": (0.9857, 0.0465, -0.9776, 2.28e-5),
}
NAMES = {
    "generalist": "one member",
    "ensemble": f"ensemble of {MEMBERS}",
    "prior": "Prior Network",
    "distill": f"distillation, T = {TEMPERATURE:g}",
    "distill_1": "distillation, T = 1",
    "hydra": f"Hydra, heads [100, 100, 10], T = {TEMPERATURE:g}",
}


def trunk(shape, channels=(16, 32), hidden=(100, 100), kernel: int = 5) -> nn.Sequential:
    """Convolutions of stride 2 (with batch norm), then hidden layers; each one block, a ReLU at its end."""
    blocks, features, size = OrderedDict(), shape[0], shape[1:]
    for number, out in enumerate(channels, 1):
        blocks[f"stage{number}"] = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(features, out, kernel, stride=2, padding=kernel // 2, bias=False),
                norm=nn.BatchNorm2d(out),
                relu=nn.ReLU(inplace=True),
            )
        )
        features, size = out, [(length + 2 * (kernel // 2) - kernel) // 2 + 1 for length in size]
    features *= math.prod(size)
    for number, units in enumerate(hidden, 1):
        first = OrderedDict(flatten=nn.Flatten()) if number == 1 else OrderedDict()
        blocks[f"hidden{number}"] = nn.Sequential(
            first
            | OrderedDict(
                linear=nn.Linear(features, units),
                relu=nn.ReLU(),
            )
        )
        features = units
    return nn.Sequential(blocks)


def config_of(shards: Path, seed: int) -> dict:
    """Ensemble and students; inputs are always seen alike, so that the members answer each once for all students."""
    both = {"start": "scratch", "epochs": PHASE_ONE + PHASE_TWO, "model": STUDENT}
    soft = {"temperature": TEMPERATURE}
    return {
        "seed": seed,
        "model": MEMBER,
        "controls": {"enabled": False},
        "data": {
            **dict.fromkeys(("train", "val", "test"), str(shards)),
            "mean": [0.13],
            "std": [0.31],
        },
        "train": {
            "epochs": EPOCHS,
            "batch_size": 256,
            "learning_rate": RATE,
            "warmup": 0.1,
            "beta2": 0.99,
            "checkpoint_every": 5000,
            "keep": 1,
            "log_every": 200,
        },
        "ensemble": {"kind": "deep", "members": MEMBERS},
        "students": {
            "prior": both | {"method": "prior"},
            "distill_1": both,
            "distill": both | soft,
            "hinton": both | soft | {"epochs": PHASE_ONE},
            "hydra": both
            | soft
            | {
                "start": "hinton",
                "network": "hydra",
                "head_blocks": HEAD_BLOCKS,
                "epochs": PHASE_TWO,
                "learning_rate": RATE_OF_HEADS,
            },
        },
        "launch": {"processes": 1},
        "engine": {"device": "cpu", "precision": "bf16"},
    }


def quick(config: dict) -> dict:
    """Every stage in a few minutes: a look, no result."""
    students = {name: {**student, "epochs": 0.3} for name, student in config["students"].items()}
    return config | {
        "train": config["train"] | {"epochs": 0.3},
        "students": students,
        "ensemble": config["ensemble"] | {"members": 3},
    }


def row_of(results: dict, name: str) -> dict:
    return results[name] if name in ("generalist", "ensemble") else results["students"][name]


def mu_of(row: dict) -> float | None:
    return row["members"]["mu"] if "members" in row else None


def table_of(results: list[dict]) -> str:
    """All rows, ours above the paper's."""
    lines = []
    for name, words in NAMES.items():
        rows = [row_of(each, name) for each in results]
        mus = [mu_of(row) for row in rows]
        lines.append(
            [
                words,
                lab.spread([row["top1"] for row in rows], 4),
                lab.spread([row["nll"] for row in rows], 4),
                lab.spread([row["brier"] - 1 for row in rows], 4),
                "-" if None in mus else lab.spread(mus, 5),
                lab.spread([row["ece"] for row in rows], 4),
                lab.spread([row["cnll"] for row in rows], 4),
            ]
        )
        if name in PAPER:
            top1, nll, brier, mu = PAPER[name]
            lines.append(
                [
                    f"{words}: the paper",
                    top1,
                    nll,
                    brier,
                    "-" if mu is None else f"{mu:.3g}",
                    "-",
                    "-",
                ]
            )
    return lab.table(
        ["", "accuracy", "NLL", "Brier less one", "MU", "ECE", "calibrated NLL"], lines
    )


def verdicts(results: list[dict]) -> list[str]:
    """What is asked of Hydra, seed by seed."""
    said = []
    for each in results:
        rows = {name: row_of(each, name) for name in NAMES}
        off = {
            name: abs(mu_of(rows[name]) - mu_of(rows["ensemble"])) for name in ("hydra", "prior")
        }
        said.append(
            {
                "an accuracy of at least .985": rows["hydra"]["top1"] >= 0.985,
                "an NLL within 10 % of the ensemble's": rows["hydra"]["nll"]
                <= 1.1 * rows["ensemble"]["nll"],
                "an NLL below distillation's": rows["hydra"]["nll"] < rows["distill"]["nll"],
                "an NLL below that of distillation at T = 1 too": rows["hydra"]["nll"]
                < rows["distill_1"]["nll"],
                "an MU nearer to the ensemble's than the Prior Network's": off["hydra"]
                < off["prior"],
            }
        )
    return [
        f"Hydra has {words}: {sum(each[words] for each in said)} of {len(said)} seeds."
        for words in said[0]
    ]


def classification(asked) -> None:
    make = quick if asked.quick else lambda config: config
    shards = lab.shards(asked.to / "shards", lab.mnist)
    places = [asked.to / f"mnist-{seed}" for seed in asked.seeds]
    results = [
        lab.finished(make(config_of(shards, seed)), place, asked.set)
        for seed, place in zip(asked.seeds, places, strict=True)
    ]
    minutes = sum(lab.seconds(place) for place in places) / 60
    took = f"{minutes:.0f} minutes in all, one process at a time beside others' work."
    lines = "\n".join(f"* {line}" for line in verdicts(results))
    text = "\n\n".join(
        [table_of(results), lines, f"{lab.conditions(asked.seeds, command())} {took}"]
    )
    print(text)
    if asked.write:
        lab.write_section(TITLE, text)


# The regression form ------------------------------------------------------------------------------------------------

CURVES_TITLE = "Hydra's regression (Tran et al. 2020)"
CURVES, EXAMPLES = 10, 400
REACH = (
    6.0  # teacher and Hydra meet on inputs in [-REACH, REACH]; the members have seen 1 <= |x| <= 4
)
REGIONS = {
    "data, 1 to 4": (1, 4),
    "the gap, 0 to 1": (0, 1),
    "outside, 4 to 6": (4, REACH),
}  # of |x|
LESSON = Schedule(
    batch_size=100,
    optimizer="adamw",
    learning_rate=0.01,
    schedule="cosine",
    warmup=0.05,
    weight_decay=0.0,
    momentum=0.9,
    beta2=0.99,
    label_smoothing=0.0,
    ema=0.0,
    accumulation=1,
    clip_norm=1.0,
    balance=0.0,
    validate_every=0,
    patience=0,
    checkpoint_every=100_000,
    keep=1,
    log_every=500,
)
MEMBER_STEPS, HYDRA_STEPS = 2000, 6000


def curve(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of y at x: sin(2 x) + x / 2, and noise of 0.1 + 0.05 |x|."""
    return np.sin(2 * x) + x / 2, 0.1 + 0.05 * np.abs(x)


def examples(seed: int, count: int = EXAMPLES) -> np.ndarray:
    """[count, 2] of x and y; x even on 1 <= |x| <= 4."""
    draw = np.random.default_rng([seed, 7])
    x = draw.uniform(1, 4, count) * draw.choice([-1, 1], count)
    mean, deviation = curve(x)
    return np.stack([x, mean + deviation * draw.normal(size=count)], axis=1)


def gaussian_network(heads: int) -> nn.Sequential:
    """[B, 1] -> [heads, B, 2], mean and log variance; each member on its own is 1-50-50-2."""
    body = nn.Sequential(nn.Linear(1, 50), nn.ReLU())
    return nn.Sequential(
        body,
        MemberHeads(
            [nn.Sequential(nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 2)) for _ in range(heads)]
        ),
    )


def likelihood() -> Objective:
    """-log N(y; mean, variance) less its constant, of rows (x, y)."""

    def objective(network, batch) -> Tensor:
        mean, log_variance = network(batch.inputs[:, :1])[0].chunk(2, -1)
        return (
            log_variance + (batch.inputs[:, 1:] - mean).square() * (-log_variance).exp()
        ).mean() / 2

    return objective


def follow(answers: Tensor) -> Objective:
    """Head k learns row k of answers [K, n, 2], the members' mean and log variance at each input."""

    def objective(network, batch) -> Tensor:
        return gaussian_kl(*answers[:, batch.ids].chunk(2, -1), *network(batch.inputs).chunk(2, -1))

    return objective


def fitted(
    network,
    objective: Objective,
    rows: np.ndarray,
    steps: int,
    seed: int,
    place: Path,
    ranks: Ranks,
):
    """The network after its lesson; a lesson that ended is read from its last checkpoint."""
    points = InMemory(rows.astype(np.float32), np.zeros(len(rows), np.int64))
    stream = TrainingStream([Source(points, shuffled(len(rows), seed), LESSON.batch_size)], seed)
    place.mkdir(parents=True, exist_ok=True)
    task = TrainingTask(network, objective, stream, LESSON, steps)
    files = TrainingFiles(place / "checkpoints", place / "metrics.jsonl")
    with closing(build_engine(Engine(device="cpu"), ranks)) as engine:
        network, _ = Trainer(task, engine, ranks, files).train()
    return network


def variance_parts(answers: Tensor) -> dict[str, Tensor]:
    """Members' [K, n, 2] -> {"total", "aleatoric", "epistemic"}: [n], the variance of their even mixture.

    aleatoric: the mean of the members' variances, the noise; epistemic: the variance of their means.
    """
    mean, variance = answers[..., 0].double(), answers[..., 1].double().exp()
    aleatoric, epistemic = variance.mean(0), mean.var(0, correction=0)
    return {"total": aleatoric + epistemic, "aleatoric": aleatoric, "epistemic": epistemic}


def mixture_nll(answers: Tensor, y: Tensor) -> float:
    """Mean -log (1/K sum_k N(y; mean_k, variance_k)) of [K, n, 2] and [n], nats."""
    mean, log_variance = answers.double().unbind(-1)
    log_p = (
        -(math.log(2 * math.pi) + log_variance + (y - mean).square() * (-log_variance).exp()) / 2
    )
    return float(-(log_p.logsumexp(0) - math.log(len(answers))).mean())


def curves(seed: int, place: Path, ranks: Ranks) -> dict:
    """One seed's figures: of ensemble and Hydra, each region's variances and the NLL of new examples."""
    members = []
    for index in range(CURVES):
        torch.manual_seed(1000 * seed + index)
        members.append(
            fitted(
                gaussian_network(1),
                likelihood(),
                examples(seed),
                MEMBER_STEPS,
                1000 * seed + index,
                place / f"member-{index}",
                ranks,
            )
        )

    @torch.no_grad()
    def together(x):
        return torch.cat([member(x) for member in members])

    inputs = np.linspace(-REACH, REACH, 4001)[:, None]
    answers = together(torch.from_numpy(inputs).float())
    torch.manual_seed(1000 * seed + 999)
    student = fitted(
        gaussian_network(CURVES), follow(answers), inputs, HYDRA_STEPS, seed, place / "hydra", ranks
    )
    between = torch.linspace(-REACH, REACH, 1200, dtype=torch.float64)[
        :, None
    ].float()  # inputs that it has not seen
    new = torch.from_numpy(examples(seed + 10_000, 4000))
    found = {}
    with torch.no_grad():
        for name, ask in (("ensemble", together), ("hydra", student)):
            parts, size = variance_parts(ask(between)), between[:, 0].abs()
            found[name] = {
                region: {
                    key: float(value[(size >= low) & (size <= high)].mean())
                    for key, value in parts.items()
                }
                for region, (low, high) in REGIONS.items()
            } | {"nll": mixture_nll(ask(new[:, :1].float()), new[:, 1])}
    return found


def table_of_variances(found: Iterable[dict]) -> str:
    """Each region's variances, ensemble and Hydra beside each other, and the NLL of new examples."""
    found = list(found)

    def line(words: str, of) -> list[str]:
        return [
            words,
            *(lab.spread([of(each[name]) for each in found], 4) for name in ("ensemble", "hydra")),
        ]

    lines = [
        line(f"{region}: {key}", lambda row, region=region, key=key: row[region][key])
        for region in REGIONS
        for key in ("total", "aleatoric", "epistemic")
    ]
    lines.append(line("NLL of new examples", lambda row: row["nll"]))
    return lab.table(
        ["variance, by the size of x", f"ensemble of {CURVES}", f"Hydra of {CURVES} heads"], lines
    )


def regression(asked) -> None:
    found = []
    with process_group(Engine(device="cpu")) as ranks:
        for seed in asked.seeds:
            place = asked.to / f"curves-{seed}"
            found.append(
                lab.once(
                    place / "figures.json",
                    lambda seed=seed, place=place: curves(seed, place, ranks),
                )
            )
    text = "\n\n".join([table_of_variances(found), lab.conditions(asked.seeds, command())])
    print(text)
    if asked.write:
        lab.write_section(CURVES_TITLE, text)


def command() -> str:
    return shlex.join(["python", "-m", "benchmarks.papers.hydra", *sys.argv[1:]])


def main() -> None:
    parser = lab.arguments(__doc__)
    parser.add_argument("--quick", action="store_true", help="a look at every stage: no result")
    parser.add_argument(
        "--regression", action="store_true", help="curves of one input instead of MNIST"
    )
    asked = parser.parse_args()
    (regression if asked.regression else classification)(asked)


if __name__ == "__main__":
    main()
