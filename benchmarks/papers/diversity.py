"""How much of a deep ensemble's diversity a BatchEnsemble keeps, by what moves the inputs it is distilled on.

    python -m benchmarks.papers.diversity --to runs/papers/diversity --write

Nam et al. 2021, "Diversity matters when learning from ensembles", their table of CIFAR-10, on a small net and a part of
the data: the 50,000 training images of shared/data/cifar10 (re-encoded) are split, of each class alike, into TRAIN to
learn from, 5,000 val and 10,000 test; the rest is not used, and the 1,000 that the set calls test are measured too.
Nothing is augmented and T = 1: teachers know train by heart, agree on it and nowhere else, which is what ODS is for.
One run for each seed: four networks, and four BatchEnsembles of four members that learn one-to-one from them, alike in
all but `perturb`.  Read from the finished run besides (--figures prints it alone): ensembles of two and of three, how
far members are apart by confidence (their Figure 3), and whether a direction that one teacher gives moves the others
(their Figure 6).
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from statistics import mean

import numpy as np

from pipeline.store import read_json, write_json

from .lab import DATA, arguments, conditions, finished, shards, spread, table, write_section

TITLE = "Diversity: a BatchEnsemble learns from four networks (Nam et al. 2021)"
SOURCE = DATA / "cifar10"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
MOSAICS, PER_MOSAIC = 51, 1000  # 50 of train and one of test, each 25 rows x 40 columns of 32 x 32
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
TEMPERATURE, HARD, SIZE = (
    1.0,
    0.1,
    1 / 255,
)  # the paper's of CIFAR-100 and TinyImageNet; of CIFAR-10 T = 4


def pictures() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [51000, 32, 32, 3] and int64 [51000], train first."""
    from PIL import Image

    tiles = []
    for number in range(MOSAICS):
        mosaic = np.asarray(Image.open(SOURCE / f"cifar10_{number:02d}.webp").convert("RGB"))
        tiles.append(mosaic.reshape(25, 32, 40, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3))
    labels = np.fromfile(SOURCE / "labels.u8", np.uint8).astype(np.int64)
    return np.concatenate(tiles), labels


def parts(labels: np.ndarray) -> dict[str, np.ndarray]:
    """ids of train, val, test and GIVEN.  labels: [51000]; the split is the same for every seed."""
    from trainer.data.authoring.splitting import split_by_class

    own = len(labels) - PER_MOSAIC
    unused = 1 - TRAIN / own - sum(SHARES.values())
    found = split_by_class(labels[:own], SHARES | {"unused": round(unused, 6)}, seed=0)
    del found["unused"]
    return found | {GIVEN: np.arange(own, len(labels))}


def make(place: Path) -> None:
    """Shards of what parts() names."""
    from PIL import Image

    from trainer.data.authoring.splitting import write_splits

    images, labels = pictures()

    def sample(number: int) -> dict:
        file = io.BytesIO()
        Image.fromarray(images[number]).save(file, "png")
        return {"png": file.getvalue(), "cls": b"%d" % labels[number]}

    write_splits(place, CLASSES, parts(labels), sample, {"command": "benchmarks.papers.diversity"})


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
    moved = {
        name: student | {"perturb": kind, "perturb_size": SIZE} for name, kind in STUDENTS.items()
    }
    return {
        "seed": seed,
        "model": MODEL,
        "train": SCHEDULE | {"epochs": EPOCHS},
        "data": {split: str(data) for split in ("train", "val", "test")}
        | {"mean": [0.491, 0.482, 0.447], "std": [0.247, 0.243, 0.262]},
        "ensemble": {"kind": "deep", "members": MEMBERS},
        "students": moved,
        "controls": {"enabled": False},
        "launch": {"processes": 1, "pool": 1},
        "engine": {"device": "cpu", "precision": "bf16"},
    }


def judge(val: tuple, test: tuple) -> dict:
    """A row as results.json has them.  val, test: (members' log-probabilities [K, n, C], labels int64 [n])."""
    import torch

    from ensemble import fit_temperature
    from trainer.core.metrics import model_uncertainty, pairwise_kl, summarise

    def mixed(log_p):
        return log_p.logsumexp(0) - math.log(len(log_p))

    def figures(log_p):
        p, labels = log_p.softmax(1), test[1]
        top = p.topk(5, dim=1)
        error = (p - torch.nn.functional.one_hot(labels, p.shape[1])).square().sum(1)
        return summarise(labels, top.indices, top.values, p.gather(1, labels[:, None])[:, 0], error)

    temperature = fit_temperature(mixed(val[0]), val[1])
    row, after = figures(mixed(test[0])), figures(mixed(test[0]) / temperature)
    row |= {
        "temperature": temperature,
        **{f"c{key}": after[key] for key in ("nll", "brier", "ece")},
    }
    if len(test[0]) > 1:
        apart = {"pairwise_kl": pairwise_kl(test[0]), "mu": model_uncertainty(test[0].exp())}
        row["members"] = {key: float(value.double().mean()) for key, value in apart.items()}
    return row


def with_equivalents(rows: dict[str, dict]) -> dict[str, dict]:
    """The rows with DEE among DE-1 ... DE-4; math.inf beyond."""
    from trainer.core.metrics import deep_ensemble_equivalent

    sizes = [rows[f"DE-{m}"]["cnll"] for m in range(1, MEMBERS + 1)]
    return {
        name: row | {"dee": deep_ensemble_equivalent(row["cnll"], sizes)}
        for name, row in rows.items()
    }


def measured(place: Path, run: Path) -> dict:
    """What the run at `run` does not say by itself, and what it needs its networks for; kept beside it.

    {"test": rows, "given": rows, "train": rows, "by_confidence": {name: bins}, "moved": {split: {kind: figures}}}
    """
    kept = run.with_name(f"{run.name}-measured.json")
    done = read_json(run / "results.json")
    if kept.exists() and read_json(kept)["of"] == done:
        return read_json(kept)
    networks, log_p, labels = answers(place, run)
    rows = {}
    for split in ("test", GIVEN, "train"):
        own = {name: (log_p["val"][name], labels["val"]) for name in log_p["val"]}
        other = {name: (log_p[split][name], labels[split]) for name in log_p[split]}
        rows[split] = with_equivalents({name: judge(own[name], other[name]) for name in NAMES})
    check_against(done, rows["test"])
    found = {
        "of": done,
        **rows,
        "by_confidence": by_confidence(log_p["test"]),
        "moved": moved(place, networks),
    }
    write_json(kept, found)
    return found


def opened(place: Path, split: str):
    from pipeline.config import Data
    from trainer.data import open_shards

    return open_shards(str(place), Data(), split)


def answers(place: Path, run: Path):
    """The four networks; {split: {name: [K, n, C]}}, log-probabilities; {split: labels}."""
    import torch

    from networks import load_classifier, member_log_probabilities
    from pipeline.graph import open_run

    stages = open_run(run)
    of = lambda stage: load_classifier(stage.path("model.safetensors").parent)  # noqa: E731
    networks = [of(stage) for stage in (stages.generalist, *stages.members)]
    students = {name: of(stages.students[name]) for name in STUDENTS}
    log_p, labels = {}, {}
    for split in ("val", "test", GIVEN, "train"):
        data = opened(place, split)
        raw, labels[split] = (
            torch.from_numpy(data.inputs(np.arange(len(data)))),
            torch.from_numpy(data.labels),
        )

        def ask(network, raw=raw):
            with torch.inference_mode():
                return torch.cat(
                    [member_log_probabilities(network.eval(), part) for part in raw.split(500)], 1
                )

        each = torch.cat([ask(network) for network in networks])
        log_p[split] = {f"DE-{m}": each[:m] for m in range(1, MEMBERS + 1)}
        log_p[split] |= {name: ask(network) for name, network in students.items()}
    return networks, log_p, labels


def check_against(results: dict, rows: dict) -> None:
    """Raises SystemExit where results.json says something else of the same network: an oracle for both."""
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


def by_confidence(log_p: dict) -> dict[str, list[dict]]:
    """Of the ensemble and each student: the members' pairwise KL in bins of the confidence of their mean."""
    from trainer.core.metrics import by_confidence, pairwise_kl

    found = {}
    for name in (f"DE-{MEMBERS}", *STUDENTS):
        confidence = log_p[name].exp().mean(0).amax(1)
        found[name] = by_confidence(confidence, pairwise_kl(log_p[name]), CONFIDENCE_BINS)
    return found


def moved(place: Path, networks: list) -> dict[str, dict[str, dict[str, float]]]:
    """{split: {kind: ...}}: what a perturbation does to the teachers, a mean over the one that gives the direction.

    own, others: KL of a teacher's answer from its answer to the clean input, of the one that gave the direction and of
    those that did not; apart_own, apart_others: pairwise KL between all teachers, and between the others alone.
    """
    import torch

    from networks import member_log_probabilities
    from trainer.core.metrics import pairwise_kl
    from trainer.core.perturbations import perturb

    scale = networks[0].spec.input.scale

    def ask(x):
        with torch.no_grad():
            return torch.cat([member_log_probabilities(network, x / scale) for network in networks])

    def shift(clean, after):
        return (clean.exp() * (clean - after)).sum(-1).mean(-1)  # [K]

    found = {}
    for split in ("train", "test"):
        raw = torch.from_numpy(opened(place, split).inputs(np.arange(MOVED)))
        clean, found[split] = ask(raw.float() * scale), {}
        for kind in STUDENTS.values():
            drawn = []
            for giver in range(MEMBERS):
                draw = torch.Generator().manual_seed(giver)
                given_by = [lambda x, network=networks[giver]: network(x / scale)]
                x = torch.cat(
                    [
                        perturb(kind, part.float() * scale, SIZE, TEMPERATURE, given_by, draw)
                        for part in raw.split(500)
                    ]
                )
                after = ask(x)
                others = [m for m in range(MEMBERS) if m != giver]
                far = shift(clean, after)
                drawn.append(
                    {
                        "own": float(far[giver]),
                        "others": float(far[others].mean()),
                        "apart": float(pairwise_kl(after).mean()),
                        "apart_others": float(pairwise_kl(after[others]).mean()),
                    }
                )
            found[split][kind] = {key: mean(row[key] for row in drawn) for key in drawn[0]}
    return found


def table_row(name: str, rows: list[dict]) -> list[str]:
    """rows: of each seed."""
    cells = [NAMES[name], spread([100 * row["top1"] for row in rows], 2)]
    cells += [
        spread([row[key] for row in rows], 4)
        for key in ("nll", "brier", "ece", "cnll", "cbrier", "cece")
    ]
    cells.append(equivalents([row["dee"] for row in rows]))
    for key in ("pairwise_kl", "mu"):
        cells.append(
            spread([row["members"][key] for row in rows], 3) if "members" in rows[0] else "–"
        )
    return cells


def equivalents(found: list[float | None]) -> str:
    """DEE of each seed; ">4" beyond."""
    from trainer.core.metrics import format_equivalent

    each = [format_equivalent(math.inf if dee is None else dee, MEMBERS) for dee in found]
    if any(dee is None or math.isinf(dee) for dee in found):
        return ", ".join(each)
    return spread(found, 2)


def verdicts(rows: list[dict[str, dict]]) -> list[str]:
    """The bar: lower cNLL and higher DEE than plain distillation and than Gaussian noise, seed by seed."""
    lines = []
    for name in ("ods", "conf_ods"):
        for rival in ("plain", "gaussian"):
            lower = [each[rival]["cnll"] - each[name]["cnll"] for each in rows]
            worth = [beyond(each[name]["dee"]) > beyond(each[rival]["dee"]) for each in rows]
            lines.append(
                f"* {NAMES[name].strip('+ ')} against {NAMES[rival].strip('+ ')}: cNLL lower by {spread(lower, 4)} "
                f"({sum(gain > 0 for gain in lower)} of {len(rows)} seeds), DEE higher at {sum(worth)} of {len(rows)}."
            )
    return lines


def beyond(dee: float | None) -> float:
    """JSON has no infinity: null is beyond the largest ensemble."""
    return math.inf if dee is None else dee


def confidence_table(found: list[dict]) -> str:
    """Pairwise KL by confidence, all seeds' examples together."""
    rows = []
    for name in (f"DE-{MEMBERS}", *STUDENTS):
        bins, cells = [each["by_confidence"][name] for each in found], []
        for number in range(CONFIDENCE_BINS):
            own = [each[number] for each in bins]
            count, every = (
                sum(b["count"] for b in own),
                sum(b["count"] for each in bins for b in each),
            )
            cells.append(
                f"{sum(b['count'] * b['value'] for b in own) / max(count, 1):.3f} ({count / every:.0%})"
            )
        rows.append([NAMES[name], *cells])
    edges = [
        f"({b / CONFIDENCE_BINS:g}, {(b + 1) / CONFIDENCE_BINS:g}]" for b in range(CONFIDENCE_BINS)
    ]
    return table(["", *edges], rows)


def moved_table(found: list[dict]) -> str:
    rows = []
    for split in ("train", "test"):
        for kind in STUDENTS.values():
            own = [each["moved"][split][kind] for each in found]
            cells = [
                f"{mean(row[key] for row in own):.4f}"
                for key in ("own", "others", "apart", "apart_others")
            ]
            rows.append([f"{split}, {kind}", *cells])
    header = [
        "inputs",
        "answer moves: the giver's",
        "the others'",
        "pairwise KL: all",
        "the others",
    ]
    return table(header, rows)


def figures_text(found: list[dict]) -> str:
    return "\n\n".join(
        [
            "Pairwise KL of the members (nats, mean over the test examples in the bin; in brackets the share of examples) "
            "by the confidence of the members' mean, as in the paper's Figure 3:",
            confidence_table(found),
            f"What moves the teachers (paper's Figure 6), {MOVED:,} inputs, not augmented: KL of a teacher's answer to the "
            "moved input from its answer to the clean one, where it gave the direction and where another did; and the "
            "teachers' pairwise KL on the moved inputs, of all four and of the three that did not give the direction:",
            moved_table(found),
        ]
    )


def text_of(found: list[dict], results: list[dict]) -> str:
    """The page's section, but for its conditions.  found, results: of each seed."""
    rows = [rows_of(one, result) for one, result in zip(found, results, strict=True)]
    main = table(HEADER, [table_row(name, [each[name] for each in rows]) for name in NAMES])
    small = table(
        HEADER, [table_row(name, [each[GIVEN][name] for each in found]) for name in NAMES]
    )
    fitted = ", ".join(
        f"{NAMES[name]} {spread([100 * each['train'][name]['top1'] for each in found], 1)} %"
        for name in NAMES
    )
    return "\n\n".join(
        [
            f"Test: {results[0]['generalist']['n']:,} images that were held out of train.",
            main,
            "\n".join(verdicts(rows)),
            "The same on the set's own 1,000 test images:",
            small,
            "\n".join(verdicts([each[GIVEN] for each in found])),
            f"Accuracy on the training images, not augmented: {fitted}.",
            figures_text(found),
        ]
    )


def rows_of(found: dict, results: dict) -> dict[str, dict]:
    """results.json's rows where it has them, and ensembles of two and three from what was measured."""
    rows = {
        "DE-1": results["generalist"],
        f"DE-{MEMBERS}": results["ensemble"],
        **results["students"],
    }
    return {name: rows.get(name, found["test"][name]) for name in NAMES}


def run_all(
    place: Path, seeds: list[int], settings: list[str], data: Path
) -> tuple[list[dict], list[dict]]:
    found, results = [], []
    for seed in seeds:
        run = place / f"seed-{seed}"
        results.append(finished(config_of(data, seed), run, settings))
        found.append(measured(data, run))
    return found, results


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--figures",
        action="store_true",
        help="print the figures of runs that are done, and no more",
    )
    options = parser.parse_args(argv)
    if not SOURCE.is_dir():
        raise SystemExit(
            f"{SOURCE} is not there; REFERRAL_DATA names the directory that holds cifar10/"
        )
    place = options.to
    data = shards(place / "data", make)
    if options.figures:
        print(figures_text([measured(data, place / f"seed-{seed}") for seed in options.seeds]))
        return
    found, results = run_all(place, options.seeds, options.set, data)
    text = text_of(found, results)
    command = f"python -m benchmarks.papers.diversity --to {place}"
    text += f"\n\n{conditions(options.seeds, command)}"
    print(text)
    if options.write:
        write_section(TITLE, text)


if __name__ == "__main__":
    main()
