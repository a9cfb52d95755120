"""Hydra, Tran et al. 2020: one body and fifty heads, each learns one member of an ensemble.

    python -m benchmarks.papers.hydra --to runs/papers/hydra --write
    python -m benchmarks.papers.hydra --to runs/papers/hydra --regression
        --write  one minute
    python -m benchmarks.papers.hydra --quick [--regression]  seconds, no result

MNIST, one run per seed: MEMBERS small conv nets. Then, all of one trunk and for as many steps, a
student of their mean, Hydra (the student of half the time grows heads [100, 100, 10], phase two)
and a Prior Network.  The 60,000 training examples less 5,001 (val) are learned from. Test is only
evaluated.

--regression: curves of one input, ten members and a Hydra of ten heads, by the KL of Gaussians. The
variance that they state, split into its two parts.
"""

from __future__ import annotations

import argparse
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.in_memory import InMemory
from networks.members import MemberHeads
from pipeline.config import Engine, ResolvedSchedule
from trainer.core.distillation import gaussian_kl
from trainer.core.loop import Trainer, TrainingFiles, TrainingTask
from trainer.core.objectives import Objective
from trainer.data.streams import Batch, Source, TrainingStream, shuffled
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
TEMPERATURE = 2.0  # of distillation and Hydra. Chosen, as all of this, on val of seed 100
# Epochs of the Hinton head and of the heads. The other students train for both.
PHASE_ONE, PHASE_TWO = 2, 12
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


def trunk(
    shape: Sequence[int],
    channels: Sequence[int] = (16, 32),
    hidden: Sequence[int] = (100, 100),
    kernel: int = 5,
) -> nn.Sequential:
    """Convolutions of stride 2 with batch norm, then hidden layers. Each a block with a ReLU."""
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    features, *size = shape
    for stage, out in enumerate(channels, 1):
        conv = nn.Conv2d(features, out, kernel, stride=2, padding=kernel // 2, bias=False)
        blocks[f"stage{stage}"] = _block(
            conv=conv, norm=nn.BatchNorm2d(out), relu=nn.ReLU(inplace=True)
        )
        features = out
        size = [(length + 2 * (kernel // 2) - kernel) // 2 + 1 for length in size]
    features *= math.prod(size)
    for layer, units in enumerate(hidden, 1):
        linear = nn.Linear(features, units)
        if layer == 1:
            block = _block(flatten=nn.Flatten(), linear=linear, relu=nn.ReLU())
        else:
            block = _block(linear=linear, relu=nn.ReLU())
        blocks[f"hidden{layer}"] = block
        features = units
    return nn.Sequential(blocks)


def _block(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def config_of(shards: Path, seed: int) -> dict:
    """Ensemble and students.

    Inputs are always seen alike, so that the members predict each once for all students.
    """
    both = {"start": "scratch", "epochs": PHASE_ONE + PHASE_TWO, "model": STUDENT}
    soft = {"temperature": TEMPERATURE}
    grown = {
        "start": "hinton",
        "network": "hydra",
        "head_blocks": HEAD_BLOCKS,
        "epochs": PHASE_TWO,
        "learning_rate": RATE_OF_HEADS,
    }
    data = {**dict.fromkeys(("train", "val", "test"), str(shards)), "mean": [0.13], "std": [0.31]}
    return {
        "seed": seed,
        "model": MEMBER,
        "controls": {"enabled": False},
        "data": data,
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
            "hydra": both | soft | grown,
        },
        "launch": {"processes": 1},
        "engine": {"device": "cpu", "precision": "bf16"},
    }


def quick(config: dict) -> dict:
    """Every stage in seconds: a look, no result."""
    students = {name: {**student, "epochs": 0.3} for name, student in config["students"].items()}
    return config | {
        "train": config["train"] | {"epochs": 0.3, "batch_size": 64},
        "students": students,
        "ensemble": config["ensemble"] | {"members": 3},
    }


def row_of(results: dict, name: str) -> dict:
    return results[name] if name in ("generalist", "ensemble") else results["students"][name]


def mu_of(row: dict) -> float | None:
    """Model uncertainty. None of a single network."""
    return row["members"]["mu"] if "members" in row else None


def table_of(results: list[dict]) -> str:
    """All rows, ours above the paper's."""
    lines = []
    for name, words in NAMES.items():
        rows = [row_of(of_seed, name) for of_seed in results]
        mus = [mu for mu in map(mu_of, rows) if mu is not None]
        lines.append(
            [
                words,
                lab.spread([row["top1"] for row in rows], 4),
                lab.spread([row["nll"] for row in rows], 4),
                lab.spread([row["brier"] - 1 for row in rows], 4),
                lab.spread(mus, 5) if mus else "-",
                lab.spread([row["ece"] for row in rows], 4),
                lab.spread([row["cnll"] for row in rows], 4),
            ]
        )
        if name in PAPER:
            top1, nll, brier, mu = PAPER[name]
            written = "-" if mu is None else f"{mu:.3g}"
            lines.append([f"{words}: the paper", top1, nll, brier, written, "-", "-"])
    header = ["", "accuracy", "NLL", "Brier less one", "MU", "ECE", "calibrated NLL"]
    return lab.table(header, lines)


def bars_of(results: dict) -> dict[str, bool]:
    """What is asked of Hydra, and whether one seed meets it."""
    rows = {name: row_of(results, name) for name in NAMES}
    hydra, distilled = rows["hydra"], rows["distill"]
    mu = {name: row_of(results, name)["members"]["mu"] for name in ("ensemble", "hydra", "prior")}
    off = {name: abs(mu[name] - mu["ensemble"]) for name in ("hydra", "prior")}
    return {
        "an accuracy of at least .985": hydra["top1"] >= 0.985,
        "an NLL within 10 % of the ensemble's": hydra["nll"] <= 1.1 * rows["ensemble"]["nll"],
        "an NLL below distillation's": hydra["nll"] < distilled["nll"],
        "an NLL below that of distillation at T = 1 too": hydra["nll"] < rows["distill_1"]["nll"],
        "an MU nearer to the ensemble's than the Prior Network's": off["hydra"] < off["prior"],
    }


def verdicts(results: list[dict]) -> list[str]:
    """How many seeds meet each of the bars."""
    met = [bars_of(of_seed) for of_seed in results]
    return [
        f"Hydra has {words}: {sum(bars[words] for bars in met)} of {len(met)} seeds."
        for words in met[0]
    ]


def classification(options: argparse.Namespace, command: str) -> None:
    shards = lab.shards(options.to / "shards", lab.made_up_mnist if options.quick else lab.mnist)
    runs = {seed: options.to / f"mnist-{seed}" for seed in options.seeds}
    results = []
    for seed, run in runs.items():
        config = config_of(shards, seed)
        if options.quick:
            config = quick(config)
        results.append(lab.finished(config, run, options.set, in_process=options.quick))
    minutes = sum(map(lab.seconds, runs.values())) / 60
    took = f"{minutes:.0f} minutes in all, one process at a time beside others' work."
    lines = verdicts(results)
    foot = f"{lab.conditions(options.seeds, command)} {took}"
    text = "\n\n".join([table_of(results), "\n".join(f"* {line}" for line in lines), foot])
    print(text)
    if options.write:
        lab.write_section(TITLE, text)
    rows = {
        name: [row_of(of_seed, name) | {"mu": mu_of(row_of(of_seed, name))} for of_seed in results]
        for name in NAMES
    }
    lab.print_json({"rows": rows, "verdicts": lines}, options, command)


# The regression form

CURVES_TITLE = "Hydra's regression (Tran et al. 2020)"
CURVES, EXAMPLES = 10, 400
# Teacher and Hydra meet on inputs in [-REACH, REACH]. The members have seen 1 <= |x| <= 4.
REACH = 6.0
REGIONS = {"data, 1 to 4": (1, 4), "the gap, 0 to 1": (0, 1), "outside, 4 to 6": (4, REACH)}
PARTS = ("total", "aleatoric", "epistemic")
SCHEDULE = ResolvedSchedule(
    batch_size=100,
    learning_rate=0.01,
    weight_decay=0.0,
    beta2=0.99,
    clip_norm=1.0,
    checkpoint_every=100_000,
    keep=1,
    log_every=500,
)


class Steps(NamedTuple):
    member: int
    hydra: int


STEPS, QUICK_STEPS = Steps(2000, 6000), Steps(20, 40)


def curve(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of y at x: sin(2 x) + x / 2, and noise of 0.1 + 0.05 |x|."""
    return np.sin(2 * x) + x / 2, 0.1 + 0.05 * np.abs(x)


def examples(seed: int, count: int = EXAMPLES) -> np.ndarray:
    """[count, 2] of x and y. x even on 1 <= |x| <= 4."""
    rng = np.random.default_rng([seed, 7])
    x = rng.uniform(1, 4, count) * rng.choice([-1, 1], count)
    mean, deviation = curve(x)
    return np.stack([x, mean + deviation * rng.normal(size=count)], axis=1)


def gaussian_network(heads: int) -> nn.Sequential:
    """[B, 1] -> [heads, B, 2], mean and log variance. Each member on its own is 1-50-50-2."""

    def head() -> nn.Module:
        return nn.Sequential(nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 2))

    body = nn.Sequential(nn.Linear(1, 50), nn.ReLU())
    return nn.Sequential(body, MemberHeads([head() for _ in range(heads)]))


def likelihood() -> Objective:
    """-log N(y, mean, variance) less its constant, of rows (x, y)."""

    def objective(network: nn.Module, batch: Batch) -> Tensor:
        mean, log_variance = network(batch.inputs[:, :1])[0].chunk(2, -1)
        squares = (batch.inputs[:, 1:] - mean).square()
        return (log_variance + squares * (-log_variance).exp()).mean() / 2

    return objective


def follow(members: Tensor) -> Objective:
    """Head k learns row k of [K, n, 2], the members' mean and log variance at each input."""

    def objective(network: nn.Module, batch: Batch) -> Tensor:
        mean, log_variance = members[:, batch.ids].chunk(2, -1)
        return gaussian_kl(mean, log_variance, *network(batch.inputs).chunk(2, -1))

    return objective


def fit(
    network: nn.Module,
    objective: Objective,
    rows: np.ndarray,
    steps: int,
    seed: int,
    path: Path,
    ranks: Ranks,
) -> nn.Module:
    """The trained network. A training that ended is read from its last checkpoint in `path`."""
    points = InMemory(rows.astype(np.float32), np.zeros(len(rows), np.int64))
    source = Source(points, shuffled(len(rows), seed), SCHEDULE.batch_size)
    task = TrainingTask(network, objective, TrainingStream([source], seed), SCHEDULE, steps)
    path.mkdir(parents=True, exist_ok=True)
    files = TrainingFiles(path / "checkpoints", path / "metrics.jsonl")
    with closing(build_engine(Engine(device="cpu"), ranks)) as engine:
        network, _ = Trainer(task, engine, ranks, files).train()
    return network


def variance_parts(members: Tensor) -> dict[str, Tensor]:
    """The variance of the members' even mixture: [K, n, 2] -> {"total", ...}: [n].

    aleatoric: the mean of the members' variances, the noise.
    epistemic: the variance of their means.
    """
    mean, variance = members[..., 0].double(), members[..., 1].double().exp()
    aleatoric, epistemic = variance.mean(0), mean.var(0, correction=0)
    return {"total": aleatoric + epistemic, "aleatoric": aleatoric, "epistemic": epistemic}


def mixture_nll(members: Tensor, y: Tensor) -> float:
    """Mean -log (1/K sum_k N(y, mean_k, variance_k)) of [K, n, 2] and [n], nats."""
    mean, log_variance = members.double().unbind(-1)
    squares = (y - mean).square() * (-log_variance).exp()
    log_p = -(math.log(2 * math.pi) + log_variance + squares) / 2
    return float(-(log_p.logsumexp(0) - math.log(len(members))).mean())


def curves(seed: int, path: Path, ranks: Ranks, steps: Steps = STEPS) -> dict:
    """One seed's metrics of ensemble and Hydra: regions' variances, the NLL of new examples."""
    members = []
    for index in range(CURVES):
        own = 1000 * seed + index
        torch.manual_seed(own)
        network = gaussian_network(1)
        place = path / f"member-{index}"
        members.append(fit(network, likelihood(), examples(seed), steps.member, own, place, ranks))

    @torch.no_grad()
    def ensemble(x: Tensor) -> Tensor:
        return torch.cat([member(x) for member in members])

    inputs = np.linspace(-REACH, REACH, 4001)[:, None]
    teach = follow(ensemble(torch.from_numpy(inputs).float()))
    torch.manual_seed(1000 * seed + 999)
    student = gaussian_network(CURVES)
    hydra = fit(student, teach, inputs, steps.hydra, seed, path / "hydra", ranks)
    new = torch.from_numpy(examples(seed + 10_000, 4000))
    with torch.no_grad():
        return {"ensemble": judge_curve(ensemble, new), "hydra": judge_curve(hydra, new)}


def judge_curve(predict: Callable[[Tensor], Tensor], new: Tensor) -> dict:
    """Each region's variances, between inputs that Hydra has seen, and the NLL of `new`."""
    between = torch.linspace(-REACH, REACH, 1200, dtype=torch.float64)[:, None].float()
    parts, size = variance_parts(predict(between)), between[:, 0].abs()
    metrics: dict = {}
    for region, (low, high) in REGIONS.items():
        inside = (size >= low) & (size <= high)
        metrics[region] = {key: float(value[inside].mean()) for key, value in parts.items()}
    return metrics | {"nll": mixture_nll(predict(new[:, :1].float()), new[:, 1])}


def table_of_variances(metrics: Sequence[dict]) -> str:
    """Each region's variances of ensemble and Hydra, and the NLL of new examples."""

    def line(words: str, values_of: Callable[[str], list[float]]) -> list[str]:
        return [words, *(lab.spread(values_of(name), 4) for name in ("ensemble", "hydra"))]

    lines = []
    for region in REGIONS:
        for part in PARTS:
            lines.append(
                line(
                    f"{region}: {part}",
                    lambda name, region=region, part=part: [
                        of_seed[name][region][part] for of_seed in metrics
                    ],
                )
            )
    lines.append(
        line("NLL of new examples", lambda name: [of_seed[name]["nll"] for of_seed in metrics])
    )
    header = ["variance, by the size of x", f"ensemble of {CURVES}", f"Hydra of {CURVES} heads"]
    return lab.table(header, lines)


def regression(options: argparse.Namespace, command: str) -> None:
    steps = QUICK_STEPS if options.quick else STEPS
    metrics = {}
    with process_group(Engine(device="cpu")) as ranks:
        for seed in options.seeds:
            path = options.to / f"curves-{seed}"
            metrics[seed] = lab.once(
                path / "figures.json",
                lambda seed=seed, path=path: curves(seed, path, ranks, steps),
            )
    table = table_of_variances(list(metrics.values()))
    text = "\n\n".join([table, lab.conditions(options.seeds, command)])
    print(text)
    if options.write:
        lab.write_section(CURVES_TITLE, text)
    lab.print_json({"curves": metrics}, options, command)


def main(words: list[str] | None = None) -> None:
    parser = lab.arguments(__doc__)
    parser.add_argument(
        "--regression", action="store_true", help="curves of one input instead of MNIST"
    )
    options = lab.parsed(parser, words)
    command = lab.command_line("benchmarks.papers.hydra", words)
    if options.regression:
        regression(options, command)
    else:
        classification(options, command)


if __name__ == "__main__":
    main()
