"""What an ensemble of many specialists holds and takes to answer rows of a huge label set.

    OMP_NUM_THREADS=1 python -m benchmarks.many_specialists [--classes C]
        [--groups M] [--rows N] [--kind copy|branch]
    python -m benchmarks.many_specialists --quick          seconds, no result

Made-up networks: a generalist of 64 numbers an embedding, and specialists in two memberships.
Copies keep the rows of 100 other classes and one for the rest.  Branches have an embedding of 64
numbers, too.  A specialist has the checksums of its files beside it, as a stage leaves them.  Each
form runs in a process of its own and gives the metrics' numbers of every row (top 5,
log-probability of the label, sum of squares):

    generalist   the generalist alone
    whole        every specialist read at first, with all classes' names, and rows of C
                 numbers, as before there were listed rows
    listed       specialists read when rows need them, and rows that list some classes

CPU seconds are the process's own, without its start. Peak memory is what its resident set grows by
(Linux).  Then, in one process and by turns, after a round that does not count:

    ratio           "listed" over "generalist" and the specialists' own multiplications,
                    of trunks and heads on the rows that ask them, without reading them
    without_reading the same, where the specialists are held already

as medians over the rounds, of CPU seconds.  The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clustering import ClassGroups
from ensemble import EnsembleSettings, SpecialistEnsemble
from ensemble.lazy_specialists import LazySpecialists, load_specialist, specialist_folder
from ensemble.listed_ensemble import Wanted
from networks import (
    Branch,
    Classifier,
    InputSpec,
    ModelSpec,
    branch_off,
    build_classifier,
    checksums,
    lazy_logits,
    load_branch,
    load_classifier,
    save_classifier,
)
from trainer.core.dense_logits import dense_log_probabilities
from trainer.distributed.ranks import collect_seldom
from trainer.session import measuring_batch

NUMBERS, KEPT, TOP, T = 64, 100, 5, 1.3
MIB = 2**20
Form = Callable[[Path, Tensor, Tensor], Tensor]  # directory, raw, labels -> log p of the labels


# Networks


def write_networks(root: Path, classes: int, groups: int, kind: str) -> None:
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    names = tuple(f"class number {c}" for c in range(classes))
    inputs = InputSpec((NUMBERS,), "float32")
    options = {"width": NUMBERS, "depth": 1}
    spec = ModelSpec("mlp", classes, inputs, options, class_names=names)
    generalist = build_classifier(spec).eval()
    with torch.no_grad():
        generalist.linear_head.weight.mul_(8)
    halves = [np.array_split(random.permutation(classes), groups) for _ in range(2)]
    members = [np.union1d(*pair) for pair in zip(*halves, strict=True)]
    save_classifier(generalist, root / "generalist")
    (root / "clusters").mkdir()
    ClassGroups(members, classes).save(root / "clusters" / "groups.json")
    for m, own in enumerate(members):
        if kind == "copy":
            others = np.setdiff1d(random.choice(classes, KEPT + 4 * len(own)), own)[:KEPT]
            specialist = copy_of(generalist, own, others)
        else:
            specialist = branch_off(generalist, own.tolist())
            torch.nn.init.normal_(specialist.correction.weight, std=0.05)
        save_specialist(specialist, specialist_folder(root, m))
    EnsembleSettings(weights=[1.0, *[2.0] * groups]).save(root)


def copy_of(generalist: Classifier, own: np.ndarray, kept: np.ndarray) -> Classifier:
    """It has moved a little from the generalist's rows of its classes."""
    head = {"kind": "dustbin", "members": own.tolist(), "rows": "kept", "kept": kept.tolist()}
    network = build_classifier(replace(generalist.spec, head=head, class_names=()))
    network.trunk.load_state_dict(generalist.trunk.state_dict())
    rows = torch.from_numpy(np.concatenate([own, kept]))
    linear = generalist.linear_head
    with torch.no_grad():
        weight, bias = network.head.get_parameter("weight"), network.head.get_parameter("bias")
        weight[:-1] = linear.weight[rows] + 0.05 * torch.randn(len(rows), NUMBERS)
        bias[:-1] = linear.bias[rows]
        weight[-1], bias[-1] = linear.weight.mean(0), float(np.log(linear.out_features))
    return network


def save_specialist(network: Classifier | Branch, folder: Path) -> None:
    save_classifier(network, folder)
    # As a stage writes it, so that what is read is compared.
    files = checksums.entries_of(folder, lambda name: True)
    (folder / checksums.DONE).write_text(json.dumps({"files": files}))


# Forms


def by_generalist(root: Path, raw: Tensor, labels: Tensor) -> Tensor:
    network = load_classifier(root / "generalist")
    parts = []
    for rows, own in batches(raw, labels, network.spec.num_classes):
        logits = lazy_logits(network, rows)
        parts.append(logits.summary(TOP, own).log_label)
        logits.scale_by_temperature(T).summary(TOP, own)
    return torch.cat(parts)


def by_whole_rows(root: Path, raw: Tensor, labels: Tensor) -> Tensor:
    generalist = load_classifier(root / "generalist")
    groups, settings = read_joint(root)
    specialists = {}
    for m in range(len(groups)):
        folder = specialist_folder(root, m)
        spec = ModelSpec.load(folder / "model.json")
        read = load_branch if spec.head["kind"] == "branch" else load_classifier
        specialists[m] = read(folder)
        names = tuple(map("".join, generalist.spec.class_names))  # each file had its own
        specialists[m].spec = replace(specialists[m].spec, class_names=names)
    ensemble = SpecialistEnsemble(
        generalist, specialists, groups, weights=settings.weights, sparse=False
    )
    parts = []
    for rows, own in batches(raw, labels, groups.num_classes):
        logits = dense_log_probabilities(ensemble.forward_with_details(rows).q)
        parts.append(logits.summary(TOP, own).log_label)
        logits.scale_by_temperature(T).summary(TOP, own)
    return torch.cat(parts)


def by_listed_rows(root: Path, raw: Tensor, labels: Tensor) -> Tensor:
    return ask(read_ensemble(root), raw, labels)


def read_ensemble(root: Path) -> SpecialistEnsemble:
    """Its specialists are read when rows need them."""
    generalist = load_classifier(root / "generalist")
    groups, settings = read_joint(root)

    def load(m: int) -> Classifier | Branch:
        return load_specialist(specialist_folder(root, m), generalist, (), "cpu", None)

    specialists = LazySpecialists(load, range(len(groups)), generalist=generalist)
    ensemble = SpecialistEnsemble(
        generalist, specialists, groups, weights=settings.weights, sparse=True
    )
    ensemble.learn_cut(ModelSpec.load(specialist_folder(root, 0) / "model.json"))
    return ensemble


def ask(ensemble: SpecialistEnsemble, raw: Tensor, labels: Tensor) -> Tensor:
    parts, start = [], 0
    for answers in ensemble.ask_in_blocks(raw, Wanted(TOP, (1.0, 1 / T)), labels):
        q = answers.join(ensemble.weights)
        own = labels[start : start + len(q.values)]
        start += len(own)
        parts.append(q.summary(TOP, own).log_label)
        q.summary(TOP, own, T)
    return torch.cat(parts)


FORMS: dict[str, Form] = {
    "generalist": by_generalist,
    "whole": by_whole_rows,
    "listed": by_listed_rows,
}


def read_joint(root: Path) -> tuple[ClassGroups, EnsembleSettings]:
    return ClassGroups.load(root / "clusters" / "groups.json"), EnsembleSettings.load(root)


def batches(raw: Tensor, labels: Tensor, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = measuring_batch(classes)
    return zip(raw.split(size), labels.split(size), strict=True)


# Measured


def inputs_of(root: Path, rows: int) -> tuple[Tensor, Tensor]:
    """(inputs, labels)"""
    classes = ModelSpec.load(root / "generalist" / "model.json").num_classes
    generator = torch.Generator().manual_seed(1)
    raw = torch.randn(rows, NUMBERS, generator=generator)
    return raw, torch.randint(classes, (rows,), generator=generator)


def measure(root: Path, form: str, rows: int) -> dict:
    """One form, in this process."""
    raw, labels = inputs_of(root, rows)
    before, start = begin_peak(), time.process_time()
    with torch.inference_mode():
        log_label = FORMS[form](root, raw, labels)
    return {
        "cpu_s": round(time.process_time() - start, 3),
        "peak_mib": round((peak() - before) / MIB, 1),
        "nll": -float(log_label.double().mean()),
    }


def rows_of_specialists(ensemble: SpecialistEnsemble, raw: Tensor) -> list[tuple[int, Tensor]]:
    """The numbers of the specialists that some row asks, and the rows."""
    wanted = Wanted(TOP, (1.0,))
    active = torch.cat([answers.active for answers in ensemble.ask_in_blocks(raw, wanted)])
    return [(m, active[:, m].nonzero()[:, 0]) for m in active.any(0).nonzero()[:, 0].tolist()]


def multiply(ensemble: SpecialistEnsemble, raw: Tensor, asked: list[tuple[int, Tensor]]) -> None:
    """What the specialists themselves compute. A branch reads logits, whichever they are."""
    for m, rows in asked:
        network = ensemble.specialists[m]
        if isinstance(network, Branch):
            own = torch.zeros(len(rows), len(network.classes))
            network(ensemble.generalist.trunk(raw[rows]), own, own[:, 0])
        else:
            network(raw[rows])


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure_ratios(root: Path, rows: int, rounds: int) -> dict:
    """In this process: what `listed` takes of its bound, the median over the rounds."""
    raw, labels = inputs_of(root, rows)
    found: dict[str, list[float]] = {"ratio": [], "without_reading": []}
    with torch.inference_mode():
        held = read_ensemble(root)
        asked = rows_of_specialists(held, raw)
        for _ in range(1 + rounds):
            bound = cpu_seconds(lambda: by_generalist(root, raw, labels))
            bound += cpu_seconds(lambda: multiply(held, raw, asked))
            reading = cpu_seconds(lambda: by_listed_rows(root, raw, labels))
            again = cpu_seconds(lambda: ask(held, raw, labels))
            found["ratio"].append(reading / bound)
            found["without_reading"].append(again / bound)
    return {name: round(statistics.median(each[1:]), 3) for name, each in found.items()}


def begin_peak() -> int:
    """The resident set's bytes. From here on `peak` is of what comes."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak() -> int:
    return resident("VmHWM")


def resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise AssertionError(f"no {name} in /proc/self/status")


def measured_alone(root: Path, rows: int, *options: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.many_specialists", "--of", str(root)]
    command += ["--rows", str(rows), *options]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--classes", type=int, default=20_000)
    parser.add_argument("--groups", type=int, default=400)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--kind", choices=["copy", "branch"], default="copy")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--form", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.of:
        torch.set_flush_denormal(True)  # as the trainer's processes do
        collect_seldom()
        if args.form:
            print(json.dumps(measure(args.of, args.form, args.rows)))
        else:
            print(json.dumps(measure_ratios(args.of, args.rows, args.rounds)))
        return
    if args.quick:
        args.classes, args.groups, args.rows, args.rounds = 1000, 10, 300, 1
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_networks(root, args.classes, args.groups, args.kind)
        results = {}
        for form in args.forms:
            results[form] = measured_alone(root, args.rows, "--form", form)
            print(f"{form:12}", results[form], flush=True)
        ratios = measured_alone(root, args.rows, "--rounds", str(args.rounds))
        print(ratios, flush=True)
    shape = {"classes": args.classes, "groups": args.groups, "rows": args.rows}
    shape["kind"] = args.kind
    print(json.dumps({**shape, "forms": results, **ratios}))


if __name__ == "__main__":
    main()
