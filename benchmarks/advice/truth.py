"""One set and one seed: every network and lever, trained in full and in short, and what each gives.

Below TO/SET/seed-S:

    networks/NAME/        the network, cost.json, NAME's val.npy and test.npy: log p,
                          float16 [N, C]
    copies, branches, rerank/    runs of `referral`, and beside them the same three files
    labels.npz            val and test

Every network is measured with the weights that it ends with.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ensemble import SpecialistEnsemble
from networks import (
    Classifier,
    load_classifier,
    multiplications,
    parameter_count,
    save_classifier,
    widen,
    widened_to,
)
from networks.widening import WIDENABLE
from pipeline.config import load_config, save_config
from pipeline.graph import RunDirectory
from pipeline.store import read_json, write_json
from trainer.__main__ import in_a_row
from trainer.core.loop import Trainer, TrainingFiles, TrainingTask
from trainer.core.objectives import Objective
from trainer.core.perturbations import mix_bags
from trainer.data.streams import Batch
from trainer.distributed.ranks import Ranks, process_group
from trainer.engines import build_engine
from trainer.session import Session
from trainer.stages import run_together
from trainer.stages.joining import load_ensemble
from trainer.stages.networks import fresh_network, load_network
from trainer.stages.training import count_steps, generalist_task

from .sets import SETS, SPLITS, Set, shards_of

HELD_OUT = ("val", "test")
SHARES = {"020": 0.02, "045": 0.045, "070": 0.07, "150": 0.15}
FULL_RATE = ("070", "150")  # shares at which the generalist is trained on at the peak rate, too
ROUND_0, ROUND_1 = 0.0225, 0.045
ON_RATE = 1 / 3  # of the peak, as benchmarks.places trains on
TIMES_WIDER = 2  # multiplications
GROWN_SHARE = 0.5
TRAIN_MEASURED = 5000
MIXED_SHARE = 0.5  # of mix_bags, as students have it
MOST_NUMBERS = 2e7  # N C of an array


@dataclass(frozen=True)
class Work:
    """One set and seed."""

    name: str
    seed: int
    to: Path  # TO/SET/seed-S
    shards: Path
    one: Set
    ranks: Ranks

    def config(self, kind: str) -> dict:
        """Of a run: copies, branches or rerank. The generalist is the same in all."""
        base: dict = {key: dict(value) for key, value in self.one.config.items()}
        base["data"] = base.get("data", {}) | dict.fromkeys(SPLITS, str(self.shards))
        base["train"] |= {"checkpoint_every": 10**6, "log_every": 100}
        base |= {"seed": self.seed, "controls": {"enabled": False}, "launch": {"processes": 1}}
        if kind == "rerank":
            steps = max(1, base["train"]["steps"] // 2)
            return base | {
                "ensemble": {"kind": "rerank", "members": 2},
                "rerank": self.one.rerank | {"steps": steps},
            }
        specialists = self.one.copies if kind == "copies" else self.one.branches
        specialists = specialists | {"kind": {"copies": "copy", "branches": "branch"}[kind]}
        return base | {"clusters": self.one.clusters, "specialists": specialists}

    def run(self, kind: str) -> RunDirectory:
        """The run of a lever. Its cache is all seeds'."""
        root, cache = self.to / kind, self.to.parent / "cache"
        config = load_config(None, [], self.config(kind))
        root.mkdir(parents=True, exist_ok=True)
        cache.mkdir(exist_ok=True)
        if not (root / "cache").exists():
            (root / "cache").symlink_to(cache.resolve(), target_is_directory=True)
        save_config(config, root / "config.toml")
        return RunDirectory(root, config)


def do_stages(session: Session, but: tuple[str, ...], only: tuple[str, ...] = ()) -> None:
    """The stages of a run that are not done, in order."""
    due = [
        stage
        for stage in session.run.stages
        if not stage.is_done and stage.name not in but and (not only or stage.name in only)
    ]
    for alike in in_a_row(due):
        run_together(session, alike)


def adopt(run: RunDirectory, source: RunDirectory, only: tuple[str, ...] = ()) -> None:
    """What another run has done already, under the same keys, is not done again.

    only: stages of these names. Of all names where there are none.
    """
    keys = {stage.place: stage.key for stage in run.stages}
    for stage in sorted(source.stages, key=lambda stage: len(stage.place)):  # one holds another
        if only and stage.name not in only:
            continue
        own = run.root / stage.place
        if stage.is_done and keys.get(stage.place) == stage.key and not (own / "DONE").exists():
            shutil.copytree(stage.directory, own, symlinks=True, dirs_exist_ok=True)


# What is measured


def log_p_of(session: Session, split: str, answer: Callable[[Tensor], Tensor]) -> np.ndarray:
    """float32 [N, C] of a function raw inputs -> log-probabilities."""
    values = session.measured(session.shards(split), lambda batch: {"p": answer(batch.inputs)})
    return values["p"]


def of_network(network: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda raw: network(raw).float().log_softmax(1)


def keep(session: Session, folder: Path, answer: Callable[[Tensor], Tensor], cost: dict) -> None:
    """val.npy, test.npy and, last, cost.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in HELD_OUT:
        log_p = log_p_of(session, split, answer)
        assert log_p.size <= MOST_NUMBERS, log_p.shape
        np.save(folder / f"{split}.npy", log_p.clip(-6e4).astype(np.float16))
    write_json(folder / "cost.json", cost)


# Networks


class Networks:
    """The networks of one set and seed, each made once."""

    def __init__(self, work: Work, session: Session):
        self.work, self.session = work, session
        self.train = session.config.train
        self.steps = count_steps(self.train, session.shards("train").num_samples)
        self.generalist = load_network(session, session.run.generalist)
        self.own = multiplications(self.generalist, self.generalist.zero_input())
        self.is_widenable = self.generalist.spec.builder in WIDENABLE
        self.wide_spec = widened_to(self.generalist.spec, TIMES_WIDER * self.own)

    def folder(self, name: str) -> Path:
        return self.work.to / "networks" / name

    def load(self, name: str) -> Classifier:
        return load_classifier(self.folder(name))

    def fresh(self, seed: int, wide: bool = False) -> Classifier:
        if not wide:
            return fresh_network(self.session, seed=seed)
        options = self.wide_spec.options
        own = {key: options[key] for key in ("width", "depth", "embedding") if key in options}
        own["options"] = {k: v for k, v in options.items() if k not in (*own, "dropout")}
        return fresh_network(self.session, own_model=own, seed=seed)

    def make(
        self,
        name: str,
        start: Callable[[], Classifier],
        share: float,
        seed: int,
        rate: float = 1.0,
        teachers: list[str] | None = None,
        mixed: bool = False,
        before: str = "",
    ) -> None:
        """Train and measure a network, unless it is there.

        share: of the generalist's steps.  rate: of its peak.  teachers: whose mean it learns.
        mixed: whether bags are mixed before teachers and student see them.
        before: the network whose cost counts for this one too.
        """
        folder = self.folder(name)
        if (folder / "cost.json").exists():
            return
        steps = max(1, round(share * self.steps))
        schedule = self.train.model_copy(
            update={"learning_rate": rate * self.train.learning_rate, "validate_every": 0}
        )
        network = start()
        torch.manual_seed(seed)  # of dropout
        task = generalist_task(self.session, network, schedule, None, seed, steps)  # pyright: ignore
        if teachers:
            taught = mean_of([self.load(each) for each in teachers], mixed)
            task = replace(task, objective=taught)
        trained, seconds = train(self.session, task)
        save_classifier(trained, folder)
        own = multiplications(trained, trained.zero_input())
        passes = len(teachers or []) * self.own * steps / (3 * self.steps * self.own)
        training = steps * own / (self.steps * self.own) + passes
        if before:
            training += read_json(self.folder(before) / "cost.json")["training"]
        cost = {
            "steps": steps,
            "share": steps / self.steps,
            "training": training,
            "multiplications": own,
            "parameters": parameter_count(trained),
            "seconds": seconds,
        }
        keep(self.session, folder, of_network(trained), cost)
        print(f"  {name}: {steps} steps, {seconds:.1f} s", flush=True)

    def make_all(self) -> None:
        """In an order in which the full levers come first."""
        seed_of = self.session.seed
        second, third = seed_of("member", 1), seed_of("member", 2)
        wide_seed, on_seed = seed_of("control wider", 0), seed_of("control", 0)

        def grown() -> Classifier:
            generator = torch.Generator().manual_seed(wide_seed)
            return widen(self.load("G"), self.wide_spec, generator)

        # Those of each share and round.
        forms: dict[str, tuple[Callable[[], Classifier], int, float]] = {
            "a": (lambda: self.fresh(second), second, 1.0),
            "b": (lambda: self.fresh(third), third, 1.0),
            "wide": (lambda: self.fresh(wide_seed, wide=True), wide_seed, 1.0),
            "on": (lambda: self.load("G"), on_seed, ON_RATE),
        }
        if self.is_widenable:
            forms["grown"] = (grown, wide_seed, ON_RATE)
        student = seed_of("student", 0)
        teachers = ["G", "second"]
        self.make("second", forms["a"][0], 1, second)
        self.make("wide", forms["wide"][0], 1, wide_seed)
        self.make("student", lambda: self.fresh(student), 1, student, teachers=teachers)
        self.make("on_full", forms["on"][0], 1, on_seed)
        self.make("student_on", forms["on"][0], 1, student, teachers=teachers)
        if self.generalist.spec.input.is_indices:
            mixed = ("student_mixed_on", forms["on"][0], 1, student)
            self.make(*mixed, teachers=teachers, mixed=True)
        if self.work.one.is_new:  # the rest is what constants are fitted to
            return
        self.make("on", forms["on"][0], 1, on_seed, ON_RATE)
        if self.is_widenable:
            self.make("grown_half", grown, GROWN_SHARE, wide_seed, ON_RATE)
        self.make_short(forms)

    def make_short(self, forms: dict[str, tuple[Callable[[], Classifier], int, float]]) -> None:
        """Those of each share and round, of each form."""
        start, on_seed, _ = forms["on"]
        for tag, share in SHARES.items():
            for name, (fresh, seed, rate) in forms.items():
                self.make(f"{name}_{tag}", fresh, share, seed, rate)
            if tag in FULL_RATE:
                self.make(f"on_full_{tag}", start, share, on_seed)
        for name, (fresh, seed, rate) in forms.items():
            self.make(f"{name}_r0", fresh, ROUND_0, seed, rate)
            again = lambda name=name: self.load(f"{name}_r0")  # noqa: E731
            self.make(f"{name}_r1", again, ROUND_1, seed + 1, rate, before=f"{name}_r0")


def mean_of(teachers: list[Classifier], mixed: bool = False) -> Objective:
    """Learn the arithmetic mean of some networks' distributions, soft targets at T = 1 alone.

    mixed: of bags that are mixed first, as `perturb = "mix_bags"` does.
    """

    def objective(network: nn.Module, batch: Batch) -> Tensor:
        inputs = mix_bags(batch.inputs, MIXED_SHARE) if mixed else batch.inputs
        with torch.no_grad():
            p = torch.stack([each(inputs).float().softmax(1) for each in teachers]).mean(0)
        log_p = network(inputs).float().log_softmax(1)
        return -(p * log_p).sum(1).mean()

    return objective


def train(session: Session, task: TrainingTask) -> tuple[Classifier, float]:
    """The trained network, and seconds of this process's CPU time."""
    began = time.process_time()
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(build_engine(session.config.engine, session.ranks)) as engine,
        session.ranks.watching(),
    ):
        files = TrainingFiles(Path(folder) / "checkpoints", Path(folder) / "metrics.jsonl")
        network, _ = Trainer(task, engine, session.ranks, files).train()
    assert isinstance(network, Classifier)
    return network, time.process_time() - began


# Levers of the pipeline


def make_generalist(work: Work, session: Session) -> Networks:
    do_stages(session, (), ("generalist",))
    made = Networks(work, session)
    folder = made.folder("G")
    if not (folder / "cost.json").exists():
        summary = read_json(session.run.generalist.path("summary.json"))
        network = made.generalist
        save_classifier(network, folder)
        cost = {
            "steps": made.steps,
            "share": 1.0,
            "training": 1.0,
            "multiplications": made.own,
            "parameters": parameter_count(network),
            "seconds": summary["seconds"],
        }
        keep(session, folder, of_network(network), cost)
        on_train(session, network, folder)
        val, test = (session.shards(split).labels for split in HELD_OUT)
        np.savez(work.to / "labels.npz", val=val, test=test)
    return made


def on_train(session: Session, network: Classifier, folder: Path) -> None:
    """train.npz: what the generalist says of some training examples, as they are."""
    shards = session.shards("train")
    n = min(TRAIN_MEASURED, len(shards))
    ids = np.linspace(0, len(shards) - 1, n).astype(np.int64)

    def measure(batch: Batch) -> dict[str, Tensor]:
        log_p = network(batch.inputs).float().log_softmax(1)
        return {
            "correct": log_p.argmax(1) == batch.labels,
            "log_p": log_p.gather(1, batch.labels[:, None])[:, 0],
        }

    found = session.measured(shards, measure, ids=ids)
    np.savez(folder / "train.npz", ids=ids, correct=found["correct"], log_p=found["log_p"])


def joined(work: Work, made: Networks, run: RunDirectory) -> tuple[Session, float]:
    """A run up to its ensemble, from the same generalist, and seconds of this process's CPU."""
    adopt(run, made.session.run)
    session = Session(run, work.ranks)
    began = time.process_time()
    do_stages(session, ("evaluate", "report"))
    return session, time.process_time() - began


def specialists(work: Work, made: Networks, kind: str) -> None:
    """Copies or branches, joined."""
    run = work.run(kind)
    folder = work.to / kind
    if (folder / "cost.json").exists():
        return
    session, seconds = joined(work, made, run)
    ensemble = load_ensemble(session)
    assert isinstance(ensemble, SpecialistEnsemble)
    active: list[Tensor] = []

    def answer(raw: Tensor) -> Tensor:
        details = ensemble.forward_with_details(raw)
        active.append(details.active)
        return details.q.float().clamp_min(1e-30).log()

    cost = {"training": training_of(made, session, ensemble, kind), "seconds": seconds}
    for split in HELD_OUT:
        active.clear()
        log_p = log_p_of(session, split, answer)
        np.save(folder / f"{split}.npy", log_p.clip(-6e4).astype(np.float16))
    cost["multiplications"] = ensemble.multiplications(torch.cat(active))
    cost["parameters"] = ensemble.parameters()
    summaries = [read_json(stage.path("summary.json")) for stage in run.specialists]
    cost["steps"] = sum(each.get("steps", 0) for each in summaries)
    cost["groups"] = len(summaries)
    cost["kept"] = len(ensemble.specialists)
    cost["captured"] = read_json(run.root / "clusters" / "summary.json")
    write_json(folder / "cost.json", cost)
    print(f"  {kind}: {seconds:.1f} s", flush=True)


def training_of(made: Networks, session: Session, ensemble: SpecialistEnsemble, kind: str) -> float:
    """What the specialists' steps took, as a share of the generalist's, their features with it."""
    whole = 3 * made.steps * made.train.batch_size * made.own
    raw, total = made.generalist.zero_input(), 0.0
    for m, stage in enumerate(session.run.specialists):
        examples = read_json(stage.path("summary.json"))["examples_seen"]
        if kind == "copies":
            each = made.own
        elif m in ensemble.specialists:
            each = ensemble._own_multiplications(m, raw)
        else:
            each = 0
        total += 3 * examples * each
    if kind == "branches":
        views = session.config.specialists.views_of(session.config.data.augment)
        total += views * session.shards("train").num_samples * made.own
    return total / whole


def rerank(work: Work, made: Networks) -> None:
    folder = work.to / "rerank"
    if not work.one.rerank or (folder / "cost.json").exists():
        return
    run = work.run("rerank")
    session, seconds = joined(work, made, run)
    ensemble = load_ensemble(session)
    whole = 3 * made.steps * made.train.batch_size
    lists = session.shards("train").num_samples
    cost = {
        "training": 0.5 + lists / whole,
        "seconds": seconds,
        "multiplications": ensemble.multiplications(),  # pyright: ignore
        "parameters": ensemble.parameters(),
        "steps": session.config.rerank.steps,
    }
    answer = lambda raw: ensemble.probabilities(raw).float().clamp_min(1e-30).log()  # noqa: E731
    keep(session, folder, answer, cost)
    print(f"  rerank: {seconds:.1f} s", flush=True)


@contextmanager
def opened(name: str, seed: int, to: Path) -> Iterator[tuple[Work, Session]]:
    one = SETS[name]
    shards = shards_of(name, to)
    config = load_config(None, [], {**one.config})
    with process_group(config.engine) as ranks:
        work = Work(name, seed, to / name / f"seed-{seed}", shards, one, ranks)
        work.to.mkdir(parents=True, exist_ok=True)
        yield work, Session(work.run("copies"), ranks)


def make(name: str, seed: int, to: Path) -> Path:
    """All of a set and seed. Returns its directory."""
    with opened(name, seed, to) as (work, session):
        made = make_generalist(work, session)
        made.make_all()
        for kind in ("copies", "branches"):
            specialists(work, made, kind)
        rerank(work, made)
        return work.to
