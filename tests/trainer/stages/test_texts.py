"""A run on texts as bags of indices, and what does not go together with them."""

import json

import numpy as np
import pytest
import torch
from running import run_all
from toy import toy_config, write_toy

from networks import ModelSpec
from pipeline.config import UserError, load_config
from trainer.commands.check import check
from trainer.commands.export import Probabilities, evaluate, random_inputs
from trainer.commands.shards import main as shards
from trainer.data.shards import ShardWriter
from trainer.data.writing import write_manifest
from trainer.distributed.ranks import ALONE
from trainer.session import Session
from trainer.stages.networks import fresh_network, load_network
from trainer.stages.student import live_objective, student_stream
from trainer.stages.teachers import Teacher

CLASSES = [f"{first}{second}" for first in ("ab", "op", "xy") for second in ("cd", "qr")]
BAGS = "data.decoders={txt='trainer.data.decoding:ngram_bag'}"
BAG_NETWORK = (
    "model={name='embedding_bag', embedding=8, dropout=0.2}",
    "train.learning_rate=0.03",
    "train.steps=20",
    "specialists.steps=2",
    "clusters.num_groups=2",
    "controls.enabled=false",
    "students={}",
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Shards of short texts: a class's own word among others."""
    out = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    splits = {}
    for split, each in (("train", 20), ("val", 5), ("test", 5)):
        with ShardWriter(out, split, CLASSES) as writer:
            for number in range(each * len(CLASSES)):
                label = number % len(CLASSES)
                text = f"{CLASSES[label]} {rng.integers(100)}".encode()
                files = {"txt": text, "cls": str(label).encode()}
                writer.write({"__key__": f"{number:04d}", **files})
        splits[split] = writer.facts
    write_manifest(out, CLASSES, splits, {"command": "test"})
    return out


def mistake(tmp_path, data, *overrides):
    session = Session(run_all(tmp_path / "run", toy_config(data, *overrides), []), ALONE)
    with pytest.raises(UserError) as error:
        fresh_network(session)
    return str(error.value)


def test_generalist_and_specialists_learn_texts_whatever_mean_and_std_say(texts, tmp_path):
    scaled = ("data.mean=[0.5]", "data.std=[0.25]")
    config = toy_config(texts, BAGS, *BAG_NETWORK, *scaled)
    stages = ("generalist", "measure", "cluster", "route", "specialist")
    run = run_all(tmp_path / "run", config, stages)
    assert all(stage.is_done for stage in run.specialists)
    written = json.loads((run.root / "generalist/model.json").read_text())["input"]
    assert (written["dtype"], written["mean"], written["std"]) == ("int32", [0.0], [1.0])
    network = load_network(Session(run, ALONE), run.generalist)
    val = Session(run, ALONE).shards("val")
    with torch.no_grad():
        answers = network(torch.from_numpy(val.inputs(np.arange(len(val))))).argmax(1)
    assert (answers.numpy() == val.labels).mean() > 0.9


def test_exports_are_compared_on_indices_that_the_network_has(texts, tmp_path):
    session = Session(run_all(tmp_path / "run", toy_config(texts, BAGS, *BAG_NETWORK), []), ALONE)
    network = fresh_network(session)
    raw = random_inputs(network.spec)
    assert raw.dtype == torch.int32 and 0 < int(raw.max()) < 8192 and int(raw.min()) == -1
    assert evaluate(Probabilities(network), raw).shape == (len(raw), len(CLASSES))


def test_bags_and_their_network_go_together(texts, tmp_path):
    words = "embedding_bag and the decoder ngram_bag go together"
    message = mistake(tmp_path / "mlp", texts, BAGS)
    assert message.startswith("[model] mlp reads numbers") and words in message
    pictures = write_toy(tmp_path / "pictures")
    message = mistake(tmp_path / "shape", pictures, *BAG_NETWORK)
    assert "embedding_bag takes indices [L]; the input shape is [1," in message
    counts = "data.decoders={txt='trainer.data.decoding:hashed_ngrams'}"
    message = mistake(tmp_path / "counts", texts, counts, *BAG_NETWORK)
    assert message.startswith("[model] embedding_bag reads int32 indices; the inputs are float32")
    assert words in message


def test_whole_numbers_of_arrays_stay_numbers(tmp_path):
    x = np.arange(240, dtype=np.int32).reshape(60, 4)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(60) % 3)
    shards(["arrays", str(tmp_path / "a.npz"), "--out", str(tmp_path / "s")])
    config = toy_config(tmp_path / "s", "clusters.num_groups=1")
    spec: ModelSpec = fresh_network(Session(run_all(tmp_path / "run", config, []), ALONE)).spec
    assert spec.input.dtype == "float32"


def test_students_of_bags_learn_from_live_teachers_about_the_bags_that_they_see(texts, tmp_path):
    """Nothing is dropped inside the network, so that both see the same n-grams."""
    network = "model={name='embedding_bag', embedding=8}"
    students = {
        "same": {"start": "scratch", "learning_rate": 0.03},
        "more": {"start": "scratch", "learning_rate": 0.03, "augment_share": 0.6},
        "few": {"start": "scratch", "steps": 3, "augment_share": 0.6, "views": 2},
        "views": {"start": "scratch", "steps": 3, "views": 2},
    }
    base = toy_config(texts, BAGS, *BAG_NETWORK, network).dump()
    base["data"] |= {"augment": "drop_ngrams", "augment_share": 0.3}
    base["ensemble"] = {"kind": "deep", "members": 2, "combine": "geometric"}
    base["students"] = students
    run = run_all(tmp_path / "run", load_config(None, ["train.steps=40"], base))
    session = Session(run, ALONE)
    config = run.config.students
    assert config["same"].mean == "geometric"
    assert run.targets_for("same") is None and run.targets_for("more") is None
    stored = [run.targets_for(name).directory.name for name in ("few", "views")]
    assert stored[1] == "ensemble-2-views" and stored[0].startswith("ensemble-2-views-")
    dropped = {}
    for name in ("same", "more"):
        stream, _ = student_stream(session, config[name], True)
        batch = stream.batch(0)
        plain = session.shards("train").read(batch.ids.numpy())[0]
        dropped[name] = 1 - (batch.inputs.numpy() >= 0).sum() / (plain >= 0).sum()
    assert abs(dropped["same"] - 0.3) < 0.05 and abs(dropped["more"] - 0.6) < 0.05
    results = json.loads((run.root / "results.json").read_text())
    assert results["students"]["same"]["top1"] > 0.8


def test_a_teacher_is_asked_about_the_bags_that_were_mixed_for_the_student(texts, tmp_path):
    network = "model={name='embedding_bag', embedding=8}"
    base = toy_config(texts, BAGS, *BAG_NETWORK, network).dump()
    base["ensemble"] = {"kind": "deep", "members": 2, "combine": "geometric"}
    mixed = {"start": "scratch", "learning_rate": 0.03, "perturb": "mix_bags"}
    base["students"] = {"main": mixed, "both": mixed | {"hard_weight": 0.1}}
    run = run_all(tmp_path / "run", load_config(None, ["train.steps=40"], base))
    assert run.targets == {}
    results = json.loads((run.root / "results.json").read_text())["students"]
    assert results["main"]["top1"] > 0.8 and results["both"]["top1"] > 0.8
    assert "at inputs moved by n-grams of other examples" in (run.root / "report.html").read_text()
    session = Session(run, ALONE)
    stream, _ = student_stream(session, run.config.students["main"], True)
    network, asked, seen = fresh_network(session), [], []
    network.trunk.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    teacher = Teacher(lambda raw: asked.append(raw) or torch.full((1, len(raw), 6), 1 / 6), 1)
    objective = live_objective("main", run.config.students["main"], teacher, network)
    batch = stream.batch(0)
    objective(network, batch)
    assert torch.equal(asked[0], seen[0]) and not torch.equal(asked[0], batch.inputs)


def test_bags_are_mixed_of_bags_alone(tmp_path):
    students = ["students.main.perturb=mix_bags", "students.main.start=scratch"]
    config = toy_config(write_toy(tmp_path / "toy"), *students, "controls.enabled=false")
    with pytest.raises(UserError, match='perturb = "mix_bags" is of bags of indices'):
        check(config, 1)
