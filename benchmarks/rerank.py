"""What a re-ranker costs to train, and what it gives on real texts.

    OMP_NUM_THREADS=1 python -m benchmarks.rerank [--to runs/rerank] [--seed N]
        [--set KEY=VALUE]
    python -m benchmarks.rerank --only steps|texts
    python -m benchmarks.rerank --quick          seconds, made-up names, no result

1. Steps of 256 examples, of a bag of 8,192 bins and 64 numbers an embedding: a generalist's, which
   have all C logits, and a re-ranker's, with shortlists of 50 classes (at random, the worst case:
   lists share few rows) and with 1,024 or no drawn ones, and the pass that finds the shortlists.
   Medians of the process's own CPU time, because a shared machine's clock says little. The forms
   take turns.
2. NAICS: which of 1,055 codes does a phrase mean?  By the product's path: a generalist, a second
   one asked about its shortlists, and a re-ranker of as many steps.  So few classes are all read
   by a batch's shortlists, and so a re-ranker costs no less than a generalist here.

The last line is one JSON object: {"steps": [...], "seed", "n", "rows": {...}}.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import places
from benchmarks.papers import lab
from networks import Classifier, InputSpec, ModelSpec, build_classifier, top_k
from networks.row_head import RowHead
from pipeline.config import DEFAULT_SCHEDULE, Engine
from pipeline.store import read_json
from trainer.core.objectives import classify, rerank
from trainer.data.streams import Batch
from trainer.distributed.ranks import Ranks, process_group
from trainer.engines import build_engine
from trainer.engines.sharded import DistributedComm

CLASSES = (1_055, 26_386, 200_000)
BATCH, BINS, EMBEDDING, LISTED, DRAWN, LENGTH = 256, 8192, 64, 50, 1024, 48
STEPS = 1200
CONFIG: dict = {
    "data": {"decoders": {"txt": "trainer.data.decoding:ngram_bag"}},
    "model": {
        "name": "embedding_bag",
        "width": BINS,
        "embedding": EMBEDDING,
        "dropout": 0.2,
    },
    "train": {"steps": STEPS, "batch_size": 256, "learning_rate": 3e-2, "weight_decay": 0.01},
    "rerank": {"k": 20, "random": 128},
    "controls": {"enabled": False},
}
KINDS = {"second": "shortlist", "rerank": "rerank"}
QUICK = ["train.steps=30", "rerank.steps=20", "rerank.k=10", "rerank.random=8"]
Step = Callable[[], object]


# Steps


def batches(classes: int) -> list[tuple[Batch, Tensor]]:
    """Made-up examples and their shortlists."""
    generator = torch.Generator().manual_seed(0)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    made = []
    for _ in range(4):
        lists = [torch.randperm(classes, generator=generator)[:LISTED] for _ in range(BATCH)]
        bags = draw(BINS, BATCH, LENGTH).int()
        source = torch.zeros(BATCH, dtype=torch.int64)
        batch = Batch(bags, draw(classes, BATCH), torch.arange(BATCH), source)
        made.append((batch, torch.stack(lists)))
    return made


def fresh(classes: int) -> Classifier:
    torch.manual_seed(0)
    options = {"width": BINS, "embedding": EMBEDDING, "dropout": 0.2}
    return build_classifier(
        ModelSpec("embedding_bag", classes, InputSpec((LENGTH,), "int32"), options)
    )


def steps_of(ranks: Ranks, classes: int, drawn: int | None) -> Step:
    """One optimizer step. drawn: of a re-ranker, None of a generalist."""
    network, examples, turn = fresh(classes), batches(classes), [0]
    objective = classify()
    if drawn is not None:
        network.head = head = RowHead(network.linear_head)
        lists = {id(batch): listed for batch, listed in examples}
        objective = rerank(
            lambda batch: lists[id(batch)],
            drawn,
            classes,
            comm=lambda batch: DistributedComm(bounds=()).of(batch.labels, even=True),
            head=head,
        )
    engine = build_engine(Engine(device="cpu"), ranks, by_rows=drawn is not None)
    module = engine.prepare(network, DEFAULT_SCHEDULE)

    def step() -> None:
        batch, _ = examples[turn[0] % len(examples)]
        turn[0] += 1
        engine.backward(objective(module, batch))
        engine.step(1e-3)

    return step


def search_of(classes: int) -> Step:
    """One batch of the pass that finds the shortlists."""
    network, batch = fresh(classes).eval(), batches(classes)[0][0]

    def search() -> None:
        with torch.inference_mode():
            top_k(network(batch.inputs), LISTED)

    return search


def measured_steps(classes: int, rounds: int) -> dict:
    """Examples a second of CPU time of each form. ratio: a re-ranker's to a generalist's."""
    with process_group(Engine(device="cpu")) as ranks:
        forms: dict[str, Step] = {
            "generalist": steps_of(ranks, classes, None),
            "rerank": steps_of(ranks, classes, DRAWN),
            "rerank, none drawn": steps_of(ranks, classes, 0),
            "shortlists": search_of(classes),
        }
        taken: dict[str, list[float]] = {name: [] for name in forms}
        for round_ in range(rounds + 2):
            for name, form in forms.items():
                began = time.process_time()
                form()
                if round_ >= 2:  # the first two are warm-up
                    taken[name].append(time.process_time() - began)
        forms.clear()
    rates = {name: round(BATCH / statistics.median(each)) for name, each in taken.items()}
    ratio = round(rates["rerank"] / rates["generalist"], 2)
    said = ", ".join(f"{name} {rate:,}" for name, rate in rates.items())
    print(f"{classes:,} classes, examples a second: {said}; {ratio} x", flush=True)
    return {"classes": classes, "examples_per_s": rates, "ratio": ratio}


# Texts


def naics(out: Path) -> None:
    source = lab.DATA / "naics" / "2017_NAICS_Index_File.csv.gz"
    lab.require(source)
    columns = ["--text", "INDEX ITEM DESCRIPTION", "--label", "NAICS17", "--drop", "******"]
    words = ["--encoding", "cp1252", *columns, "--val", "0.15", "--test", "0.15"]
    lab.referral("shards", "table", source, "--out", out, *words)


def made_up(out: Path) -> None:
    places.write_shards(out, places.made_up())


def rows_of(given: argparse.Namespace, settings: list[str]) -> tuple[int, dict[str, dict]]:
    """(test examples, a row for each kind). Both train the same generalist."""
    shards = lab.shards(given.to / "data", made_up if given.quick else naics)
    data = CONFIG["data"] | dict.fromkeys(("train", "val", "test"), str(shards))
    rows: dict[str, dict] = {}
    count = 0
    for name, kind in KINDS.items():
        run = given.to / f"{name}-{given.seed}"
        ensemble = {"kind": kind, "members": 2}
        config = CONFIG | {"seed": given.seed, "data": data, "ensemble": ensemble}
        results = lab.finished(config, run, settings, in_process=given.quick)
        count = results["generalist"]["n"]
        rows["generalist"] = row_of(results["generalist"], run, "generalist")
        rows[name] = row_of(results["ensemble"], run, "members/001")
        rows[name]["shortlist"] = read_json(run / "ensemble.json")["shortlist"]
    return count, rows


def row_of(measured: dict, run: Path, place: str) -> dict:
    """What the answer is worth, and what the network at `place` took, its shortlists with it."""
    summary = read_json(run / place / "summary.json")
    seconds, lists = summary["seconds"], run / "shortlists" / "summary.json"
    if lists.exists() and place != "generalist":
        seconds += read_json(lists)["seconds"]
    return {
        "top1": measured["top1"],
        "nll": measured["nll"],
        "trained_on": summary["examples_seen"],
        "seconds": round(seconds, 1),
    }


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, default=Path("runs/rerank"), help="(runs/rerank)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each form (15)")
    parser.add_argument("--only", choices=("steps", "texts"), help="one of the two parts")
    parser.add_argument("--quick", action="store_true", help="made-up names, below TO/quick")
    given = parser.parse_args(words)
    settings, classes = given.set, CLASSES
    if given.quick:
        given.to, settings, classes = given.to / "quick", [*QUICK, *given.set], (1000,)
        given.rounds = 3
        shutil.rmtree(given.to, ignore_errors=True)
    given.to.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    result: dict = {}
    if given.only != "texts":
        result["steps"] = [measured_steps(each, given.rounds) for each in classes]
    if given.only != "steps":
        result["seed"] = given.seed
        result["n"], result["rows"] = rows_of(given, settings)
        for name, row in result["rows"].items():
            print(f"{name:12} " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
