"""Students of every kind, of a deep ensemble's run: their teachers, inputs, metrics and costs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from running import run_all
from toy import NUM_CLASSES, toy_config, write_toy, write_unlabelled

from ensemble import SpecialistEnsemble, load_ensemble
from networks import load_classifier, mean_log_probabilities, member_log_probabilities
from pipeline.config import UserError, load_config
from pipeline.graph import RunDirectory
from pipeline.store import read_json
from trainer.commands import export as exporting
from trainer.commands import predict as predicting
from trainer.commands.check import check
from trainer.core.distillation import TopKTargets
from trainer.data.augment import Views, find_augment
from trainer.data.shards import open_shards
from trainer.data.streams import Source, TrainingStream, shuffled
from trainer.session import measuring_batch
from trainer.stages.stored_targets import restored, rows_by_mass
from trainer.stages.student import transfer_set
from trainer.stages.targets import warnings

STUDENTS = {
    "main": {"temperature": 4.0},
    "geometric": {"mean": "geometric", "temperature": 2.0},
    "matching": {"temperature": float("inf")},
    "hinton": {"start": "scratch", "hard_weight": 0.1},
    "hydra": {"start": "hinton", "network": "hydra", "head_blocks": 1},
    "batch": {
        "start": "scratch",
        "network": "batch_ensemble",
        "perturb": "ods",
        "hard_weight": 0.1,
        "soft_weight": 0.9,
    },
    "conf": {"start": "scratch", "network": "batch_ensemble", "perturb": "conf_ods"},
    "noise": {"perturb": "gaussian"},
    "prior": {"method": "prior", "start": "scratch"},
    "again": {"teacher": "main", "start": "scratch"},
    "few": {"share": 0.25, "teacher": "generalist"},
    "narrow": {
        "leave_out": ["class 3", "class 7"],
        "bias_correction": True,
        "start": "scratch",
        "steps": 100,
    },
    "narrow_before": {"leave_out": ["class 3", "class 7"], "start": "scratch", "steps": 100},
    "views": {"augment": "shift", "views": 2},
    "labels": {"method": "hard", "start": "scratch", "network": "hydra", "members": 2},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("students")
    data, ood = write_toy(root / "data"), write_unlabelled(root / "ood")
    short = {"steps": 30, "learning_rate": 0.003}
    base = toy_config(data).dump()
    base["data"]["ood"] = f"{ood}/transfer-{{000000..000001}}.tar"
    base["students"] = {name: short | keys for name, keys in STUDENTS.items()}
    base["ensemble"] = {"kind": "deep", "members": 3}
    return run_all(root / "run", load_config(None, [], base))


def row(run, name):
    return read_json(run.evaluate.path(f"{name}.json"))["row"]


def network_of(stage):
    return load_classifier(stage.path("model.safetensors").parent)


def stored_targets(stage, split, row):
    """What a stage `targets` stored in a row: probabilities [M, C]."""
    members = read_json(stage.path(f"{split}/answers.json"))["members"]
    count = len(np.load(stage.path(f"{split}/counts.npy"))) // members
    read = rows_by_mass(stage.path(split), NUM_CLASSES, members, count)
    return restored(read(np.array([row])), NUM_CLASSES, "cpu").spread()


def test_the_generalist_is_the_first_of_a_deep_ensemble_and_the_others_have_other_seeds(run):
    assert [stage.place for stage in run.members] == ["members/001", "members/002"]
    networks = [network_of(stage) for stage in (run.generalist, *run.members)]
    firsts = [next(network.parameters()).detach() for network in networks]
    assert not any(torch.allclose(firsts[a], firsts[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_a_run_without_groups_has_no_stage_of_them(run):
    names = "generalist member ensemble targets student control evaluate report"
    assert {stage.name for stage in run.stages} == set(names.split())
    expected = {"schema": 1, "kind": "deep", "members": 3}
    assert read_json(run.root / "ensemble.json") == expected


def test_an_ensembles_metrics_are_given_by_size_from_the_generalist_to_the_whole(run):
    sizes = read_json(run.evaluate.path("ensemble.json"))["sizes"]
    assert [each["size"] for each in sizes] == [1, 2, 3]
    generalist, ensemble = row(run, "generalist"), row(run, "ensemble")
    assert sizes[0]["nll"] == pytest.approx(generalist["nll"], rel=1e-5)
    assert sizes[0]["cnll"] == pytest.approx(generalist["cnll"], rel=1e-4)
    assert sizes[2]["nll"] == pytest.approx(ensemble["nll"], rel=1e-5)
    assert ensemble["dee"] == 3 and ensemble["members"]["count"] == 3


def test_an_ensemble_of_one_is_its_generalist_and_has_no_diversity(tmp_path):
    base = toy_config(write_toy(tmp_path / "data")).dump()
    base["ensemble"] = {"kind": "deep", "members": 1}
    alone = run_all(tmp_path / "run", load_config(None, ["train.steps=5"], base))
    generalist, ensemble = row(alone, "generalist"), row(alone, "ensemble")
    assert ensemble["nll"] == pytest.approx(generalist["nll"], rel=1e-5)
    for each in (generalist, ensemble):
        assert "members" not in each and "dee" not in each
    assert "dee" not in read_json(alone.root / "results.json")["ensemble"]


def test_the_ensembles_row_is_the_mean_of_its_members(run):
    test = open_shards(run.config.data.test, run.config.data, "test")
    inputs = torch.from_numpy(test.read(np.arange(len(test)))[0])
    networks = [network_of(stage) for stage in (run.generalist, *run.members)]
    with torch.no_grad():
        p_MBC = torch.stack([network(inputs).softmax(1) for network in networks])
    p = p_MBC[:, np.arange(len(test)), test.labels]
    nll = row(run, "ensemble")["nll"]
    assert nll == pytest.approx(float(-p.mean(0).log().mean()), rel=1e-5)
    assert nll < float(-p.log().mean())  # Jensen


def test_every_row_has_calibrated_and_out_of_distribution_metrics(run):
    for name in ("generalist", "ensemble", *STUDENTS, "student_hard"):
        metrics = row(run, name)
        auroc = metrics["ood_auroc"]
        assert metrics["temperature"] > 0 and metrics["cnll"] > 0, name
        assert 0 <= metrics["cece"] <= 1, name
        assert 0 <= auroc["confidence"] <= 1 and 0 <= auroc["entropy"] <= 1, name
    assert row(run, "prior")["members"]["mu"] > 0 and "mu" in row(run, "prior")["ood_auroc"]


@pytest.mark.parametrize(
    "name, members", [("hydra", 3), ("batch", 3), ("conf", 3), ("labels", 2), ("main", 1)]
)
def test_a_student_has_as_many_members_as_its_teacher_or_as_configured(run, name, members):
    network = network_of(run.students[name])
    assert network.num_members == members
    assert ("members" in row(run, name)) == (members > 1)
    if members > 1:
        inputs = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        each = member_log_probabilities(network, inputs)
        assert each.shape == (members, 2, NUM_CLASSES)
        assert not torch.allclose(each[0], each[1])  # they learned from different members
        mean = mean_log_probabilities(network, inputs).exp()
        assert torch.allclose(mean, each.exp().mean(0), atol=1e-6)


def test_students_with_one_teacher_and_one_view_share_its_stored_predictions(run):
    assert run.targets_for("main").place == run.targets_for("hydra").place == "targets/ensemble"
    assert run.targets_for("batch") is None and run.targets_for("prior") is None
    of_views = "ensemble-2-views-" + run.targets_for("views").place[-4:]
    assert sorted(run.targets) == ["ensemble", of_views, "generalist", "main"]


def test_an_even_tail_of_a_thousandth_outweighs_the_top_class_at_a_temperature_of_2():
    """3,000 classes of 1e-3 in all: sqrt(3,000 x 1e-3) = 1.732 beside sqrt(.999) = .9995.

    That is .634 of the sum.
    """
    log_value, log_tail = torch.tensor([[0.999]]).log(), torch.tensor([1e-3]).log()
    top = TopKTargets(torch.tensor([[0]]), log_value, log_tail, 3001)
    assert float(1 - top.log_parts(2.0)[0, 0].exp()) == pytest.approx(0.634, abs=1e-3)


def test_a_temperature_at_which_the_stored_targets_are_far_from_the_teacher_is_named():
    assert warnings(3755, 1.5, 0.09) == []
    (line,) = warnings(3755, 2.0, 0.6)
    assert line.startswith(
        "warning: at T = 2 what is kept of the 3,755 classes is 0.6 nats "
        "from what the teacher predicts"
    )


def test_stored_predictions_are_those_of_the_members(run):
    stage = run.targets["ensemble"]
    summary = read_json(stage.path("train/answers.json"))
    assert (summary["members"], summary["most"], summary["views"]) == (3, 24, None)
    assert summary["mean_classes"] == 24
    assert 0 <= summary["truncation_kl"]["1"] < 1e-5  # float16, nothing is left out
    shards = open_shards(run.config.data.train, run.config.data, "train")
    inputs = torch.from_numpy(shards.read(np.array([5]))[0])
    stored = stored_targets(stage, "train", 5)
    with torch.no_grad():
        for k, member in enumerate((run.generalist, *run.members)):
            expected = network_of(member)(inputs).softmax(1)
            torch.testing.assert_close(stored[k], expected, atol=2e-3, rtol=1e-2)


def test_stored_predictions_of_views_say_of_which_views(run):
    stage = next(stage for name, stage in run.targets.items() if "views" in name)
    summary = read_json(stage.path("train/answers.json"))
    assert summary["views"] == 2 and summary["augment"] == "shift"
    assert isinstance(summary["views_seed"], int)
    shards = open_shards(run.config.data.train, run.config.data, "train")
    assert len(np.load(stage.path("train/counts.npy"))) == 2 * 3 * len(shards)
    views = Views(2, summary["views_seed"])
    stream = TrainingStream([Source(shards, shuffled(len(shards), 1), 96)], 0, "shift", views)
    batch = stream.batch(13)  # in the second pass: 13 x 96 > 960
    assert set(batch.view.tolist()) == {1}
    k = 3  # any sample of the batch
    stored = stored_targets(stage, "train", int(batch.ids[k]) * 2 + int(batch.view[k]))
    with torch.no_grad():
        expected = network_of(run.members[0])(batch.inputs[k : k + 1]).softmax(1)
    torch.testing.assert_close(stored[1], expected, atol=2e-3, rtol=1e-2)
    assert find_augment("shift").numbers == 2


def test_a_view_is_of_its_sample_whatever_the_batch_and_the_rank():
    views, ids = Views(3, 7), np.array([5, 9, 5, 2**40])
    first = views.uniforms(0, ids, np.array([0, 2, 1, 0]), 4)
    assert first.shape == (4, 4) and (first >= 0).all() and (first < 1).all()
    again = views.uniforms(0, ids[::-1].copy(), np.array([0, 1, 2, 0]), 4)
    assert (again[::-1] == first).all()
    other_source = views.uniforms(1, ids, np.array([0, 2, 1, 0]), 4)
    assert len(np.unique(np.concatenate([first, other_source]))) == 32


def test_the_random_numbers_of_views_are_uniform():
    uniforms = Views(2, 0).uniforms(0, np.arange(50_000), np.zeros(50_000, np.int64), 2)
    counts = np.histogram2d(*uniforms.T, bins=10, range=[[0, 1], [0, 1]])[0]
    # Chi-squared with 99 degrees of freedom: mean 99, deviation 14.
    assert ((counts - 500) ** 2 / 500).sum() < 160


def test_the_corrected_bias_lets_a_student_predict_classes_left_out(run):
    def accuracy_of_absent(name):
        predictions = np.load(run.evaluate.path(f"{name}.npz"))
        absent = np.isin(predictions["labels"], [3, 7])
        correct = predictions["top5"][absent, 0] == predictions["labels"][absent]
        return float(correct.mean())

    assert read_json(run.students["narrow"].path("summary.json"))["bias_shift"] > 0
    assert accuracy_of_absent("narrow") > accuracy_of_absent("narrow_before")


def test_a_student_of_few_examples_sees_a_fraction_of_every_class(run):
    labels = open_shards(run.config.data.train, run.config.data, "train").labels
    names = [f"class {c}" for c in range(NUM_CLASSES)]
    session = SimpleNamespace(
        shards=lambda split: SimpleNamespace(labels=labels), class_names=names, seed=lambda *_: 3
    )

    def class_counts(student):
        return np.bincount(labels[transfer_set(session, student)], minlength=NUM_CLASSES)

    few, narrow = run.config.students["few"], run.config.students["narrow"]
    assert (class_counts(few) == 10).all()
    counts = class_counts(narrow)
    assert counts[[3, 7]].tolist() == [0, 0] and (np.delete(counts, [3, 7]) == 40).all()
    assert (class_counts(few.model_copy(update={"share": 1e-9})) == 1).all()
    with pytest.raises(UserError, match="class 99"):
        transfer_set(session, narrow.model_copy(update={"leave_out": ["class 99"]}))


def test_costs_count_every_ancestor_once(run):
    stages = {stage.place: stage for stage in run.stages}

    def seen(*places):
        return sum(read_json(stages[p].path("summary.json"))["examples_seen"] for p in places)

    def cost(name):
        return row(run, name)["cost"]["examples_seen"]

    ensemble = ("generalist", "members/001", "members/002")
    assert cost("ensemble") == seen(*ensemble)
    assert cost("again") == seen(*ensemble, "students/main", "students/again")
    assert cost("few") == seen("generalist", "students/few")
    assert cost("labels") == seen("students/labels")


def test_a_deep_ensemble_predicts_alike_from_its_run_its_bundle_and_the_command_line(
    run, tmp_path, capsys
):
    bundle, inputs = tmp_path / "bundle", tmp_path / "inputs.npy"
    assert exporting.main([str(run.root), "--to", str(bundle), "--what", "ensemble"]) == 0
    capsys.readouterr()
    raw = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    of_run, of_bundle = load_ensemble(run.root), load_ensemble(bundle)
    assert torch.equal(of_run.probabilities(raw), of_bundle.probabilities(raw))
    np.save(inputs, raw.numpy())
    assert predicting.main([str(bundle), str(inputs), "--json", "--top", "2"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = of_run.predict(raw, 2)
    assert [line["classes"] for line in printed] == [each["classes"] for each in expected]
    with pytest.raises(ValueError, match="load it with load_ensemble"):
        SpecialistEnsemble.load(run.root)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["students.a.teacher=b", "students.b.teacher=a"], "comes from itself"),
        (["students.a.teacher=genralist"], "did you mean generalist"),
        (["students.a.network=hydra"], "students.a.members: how many"),
        (["students.a.members=3"], "leave them out"),
        (["students.a.perturb=ods", "students.a.method=hard"], "needs a teacher"),
        (["students.a.perturb=ods", "students.a.views=2"], "leave one of views and perturb out"),
        (["students.a.bias_correction=true"], "name them in leave_out"),
        (
            ["ensemble.kind=deep", "engine.shard_head=true", "students.a.network=hydra"],
            "several heads",
        ),
    ],
)
def test_a_student_that_contradicts_itself_is_one_line(overrides, words):
    with pytest.raises(UserError, match=words):
        load_config(None, overrides)


def test_a_student_waits_only_for_its_start_and_its_teacher(tmp_path):
    a = ["students.a.start=scratch", "students.a.method=hard"]
    b = ["students.b.start=scratch", "students.b.teacher=generalist"]
    run = RunDirectory(tmp_path, load_config(None, a + b))
    assert run.students["a"].inputs == ()
    places = [stage.place for stage in run.students["b"].inputs]
    assert places == ["generalist", "targets/generalist"]


ZERO_3 = ["engine.name=deepspeed", "engine.zero_stage=3"]
HYDRA_OF_4 = ["students.a.network=hydra", "students.a.members=4"]
DEEP_OF_3 = ["ensemble.kind=deep", "ensemble.members=3"]


@pytest.mark.parametrize(
    "overrides, words",
    [
        ([*ZERO_3, "specialists.ema=0.9"], "specialists.ema = 0.9: no rank"),
        (HYDRA_OF_4, "its teacher ensemble 1"),
        ([*DEEP_OF_3, *HYDRA_OF_4], "its teacher ensemble 3"),
    ],
)
def test_what_cannot_be_averaged_or_taught_is_one_line(overrides, words):
    with pytest.raises(UserError, match=words):
        load_config(None, overrides)


def test_of_a_sharded_run_every_network_may_be_averaged():
    config = load_config(None, ["engine.shard_head=true", "train.ema=0.9"])
    assert config.train.ema == config.specialists.ema == 0.9


@pytest.mark.parametrize("what, members", [("", 3), ("students/hydra", 3), ("generalist", 1)])
def test_a_teacher_may_come_from_elsewhere(run, tmp_path, what, members):
    teacher = str(run.root / what)
    base = toy_config(run.config.data.train).dump()
    base["ensemble"] = {"kind": "deep", "members": 1}
    base["students"] = {"main": {"steps": 3, "teacher": teacher, "start": "scratch"}}
    other = run_all(tmp_path / "run", load_config(None, ["train.steps=3", "seed=7"], base))
    stage = other.targets_for("main")
    assert stage.place.startswith("targets/given-") and stage.inputs == ()
    assert read_json(stage.path("train/answers.json"))["members"] == members
    mine = np.fromfile(stage.path("train/log_values.bin"), np.float16)
    theirs = np.fromfile(run.targets["ensemble"].path("train/log_values.bin"), np.float16)
    assert len(mine) / members == len(theirs) / 3
    assert np.array_equal(mine, theirs) == (what == "")


def test_a_teacher_of_other_classes_is_one_line(run, tmp_path):
    names = [f"another {c}" for c in range(NUM_CLASSES)]
    data = write_toy(tmp_path / "data", {"train": 4, "val": 2, "test": 2}, names)
    base = toy_config(data).dump()
    base["students"] = {"main": {"steps": 3, "teacher": str(run.root)}}
    with pytest.raises(UserError, match="knows other classes"):
        check(load_config(None, [], base), 1)


def test_the_memory_of_measuring_does_not_grow_with_the_label_set():
    sizes = [measuring_batch(C) for C in (10, 100_000, 2**26 // 100, 10**6, 2**30)]
    assert sizes == [512, 512, 100, 67, 1]
