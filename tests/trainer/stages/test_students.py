"""Students of every kind, of a deep ensemble's run: who teaches them, what they see, and what is said of them."""

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
from trainer.commands import export as exporting
from trainer.commands import predict as predicting
from trainer.commands.check import check
from trainer.core.distillation import TopKTargets
from trainer.data.augment import Views, find_augment
from trainer.data.shards import open_shards
from trainer.data.streams import Source, TrainingStream, shuffled
from trainer.session import measuring_batch
from trainer.stages.student import transfer_set
from trainer.stages.targets import compress, decompress, warnings

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
    place = tmp_path_factory.mktemp("students")
    data, ood = write_toy(place / "data"), write_unlabelled(place / "ood")
    students = {
        name: {"steps": 30, "learning_rate": 0.003, **keys} for name, keys in STUDENTS.items()
    }
    base = toy_config(data).dump()
    base["data"]["ood"] = f"{ood}/transfer-{{000000..000001}}.tar"
    base |= {"students": students, "ensemble": {"kind": "deep", "members": 3}}
    return run_all(place / "run", load_config(None, [], base))


def row(run, name):
    return json.loads(run.evaluate.path(f"{name}.json").read_text())["row"]


def network_of(stage):
    return load_classifier(stage.path("model.safetensors").parent)


def test_the_generalist_is_the_first_of_a_deep_ensemble_and_the_others_come_from_other_seeds(run):
    assert [stage.place for stage in run.members] == ["members/001", "members/002"]
    networks = [network_of(stage) for stage in (run.generalist, *run.members)]
    firsts = [next(network.parameters()).detach() for network in networks]
    assert not any(torch.allclose(firsts[a], firsts[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_a_run_without_groups_has_no_stage_of_them(run):
    assert {stage.name for stage in run.stages} == {
        "generalist",
        "member",
        "ensemble",
        "targets",
        "student",
        "control",
        "evaluate",
        "report",
    }
    assert json.loads((run.root / "ensemble.json").read_text()) == {
        "schema": 1,
        "kind": "deep",
        "members": 3,
    }


def test_the_ensemble_of_one_is_the_generalist_and_its_size_is_its_equivalent(run):
    sizes = json.loads(run.evaluate.path("ensemble.json").read_text())["sizes"]
    assert [each["size"] for each in sizes] == [1, 2, 3]
    generalist, ensemble = row(run, "generalist"), row(run, "ensemble")
    assert sizes[0]["nll"] == pytest.approx(generalist["nll"], rel=1e-5)
    assert sizes[0]["cnll"] == pytest.approx(generalist["cnll"], rel=1e-4)
    assert sizes[2]["nll"] == pytest.approx(ensemble["nll"], rel=1e-5)
    assert ensemble["dee"] == 3 and ensemble["members"]["count"] == 3


def test_an_ensemble_of_one_is_its_generalist_and_has_nobody_to_differ_from(tmp_path):
    base = toy_config(write_toy(tmp_path / "data")).dump() | {
        "ensemble": {"kind": "deep", "members": 1}
    }
    alone = run_all(tmp_path / "run", load_config(None, ["train.steps=5"], base))
    generalist, ensemble = row(alone, "generalist"), row(alone, "ensemble")
    assert ensemble["nll"] == pytest.approx(generalist["nll"], rel=1e-5)
    for each in (generalist, ensemble):
        assert "members" not in each and "dee" not in each
    assert "dee" not in json.loads((alone.root / "results.json").read_text())["ensemble"]


def test_the_ensembles_row_is_the_mean_of_its_members(run):
    test = open_shards(run.config.data.test, run.config.data, "test")
    inputs = torch.from_numpy(test.read(np.arange(len(test)))[0])
    networks = [network_of(stage) for stage in (run.generalist, *run.members)]
    with torch.no_grad():
        p = torch.stack([network(inputs).softmax(1) for network in networks])[
            :, np.arange(len(test)), test.labels
        ]
    nll = row(run, "ensemble")["nll"]
    assert nll == pytest.approx(float(-p.mean(0).log().mean()), rel=1e-5)
    assert nll < float(-p.log().mean())  # Jensen


def test_every_row_has_its_calibrated_figures_and_tells_other_inputs_apart(run):
    for name in ("generalist", "ensemble", *STUDENTS, "student_hard"):
        found = row(run, name)
        assert found["temperature"] > 0 and found["cnll"] > 0 and 0 <= found["cece"] <= 1, name
        assert (
            0 <= found["ood_auroc"]["confidence"] <= 1 and 0 <= found["ood_auroc"]["entropy"] <= 1
        ), name
    assert row(run, "prior")["members"]["mu"] > 0 and "mu" in row(run, "prior")["ood_auroc"]


@pytest.mark.parametrize(
    "name, members", [("hydra", 3), ("batch", 3), ("conf", 3), ("labels", 2), ("main", 1)]
)
def test_a_student_has_as_many_members_as_its_teacher_or_as_asked(run, name, members):
    network = network_of(run.students[name])
    assert network.num_members == members
    assert ("members" in row(run, name)) == (members > 1)
    if members > 1:
        each = member_log_probabilities(network, torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
        assert each.shape == (members, 2, NUM_CLASSES)
        assert not torch.allclose(each[0], each[1])  # they learned from different members
        assert torch.allclose(
            mean_log_probabilities(network, torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).exp(),
            each.exp().mean(0),
            atol=1e-6,
        )


def test_students_with_one_teacher_and_one_view_share_its_answers(run):
    assert run.targets_for("main").place == run.targets_for("hydra").place == "targets/ensemble"
    assert run.targets_for("batch") is None and run.targets_for("prior") is None
    assert sorted(run.targets) == [
        "ensemble",
        "ensemble-2-views-" + run.targets_for("views").place[-4:],
        "generalist",
        "main",
    ]


def test_an_even_tail_of_a_thousandth_outweighs_what_is_kept_at_a_temperature_of_2():
    """3,000 classes of 1e-3 in all: sqrt(3,000 x 1e-3) = 1.732 beside sqrt(.999) = .9995, which is .634 of the sum."""
    top = TopKTargets(
        torch.tensor([[0]]), torch.tensor([[0.999]]).log(), torch.tensor([1e-3]).log(), 3001
    )
    assert float(1 - top.log_parts(2.0)[0, 0].exp()) == pytest.approx(0.634, abs=1e-3)


def test_a_temperature_at_which_what_is_kept_is_far_from_the_teacher_is_named():
    facts = {"num_classes": 3755, "truncation_kl": {"1": 0.023, "1.5": 0.09, "2": 0.6}}
    (line,) = warnings(facts)
    assert line.startswith(
        "warning: at T = 2 what is kept of the 3,755 classes is 0.6 nats from what the teacher predicts"
    )


def test_stored_answers_are_the_members_answers(run):
    stored = run.targets["ensemble"].path("train")
    facts = json.loads((stored / "answers.json").read_text())
    assert (facts["members"], facts["k"], facts["views"]) == (3, 24, None)
    assert 0 <= facts["truncation_kl"]["1"] < 1e-5  # float16, nothing is left out
    shards = open_shards(run.config.data.train, run.config.data, "train")
    inputs = torch.from_numpy(shards.read(np.array([5]))[0])
    parts = [np.load(stored / f"{name}.npy")[5:6] for name in ("indices", "log_values", "log_tail")]
    parts[0] = parts[0].astype(np.int64)
    kept = decompress(*parts, NUM_CLASSES, "cpu").spread()
    with torch.no_grad():
        for k, stage in enumerate((run.generalist, *run.members)):
            torch.testing.assert_close(
                kept[k], network_of(stage)(inputs).softmax(1), atol=2e-3, rtol=1e-2
            )


def test_answers_of_views_say_which_views(run):
    stage = next(stage for name, stage in run.targets.items() if "views" in name)
    facts = json.loads(stage.path("train/answers.json").read_text())
    assert (
        facts["views"] == 2 and facts["augment"] == "shift" and isinstance(facts["views_seed"], int)
    )
    shards = open_shards(run.config.data.train, run.config.data, "train")
    assert len(np.load(stage.path("train/indices.npy"))) == 2 * len(shards)
    views, augment = Views(2, facts["views_seed"]), find_augment("shift")
    stream = TrainingStream([Source(shards, shuffled(len(shards), 1), 96)], 0, "shift", views)
    batch = stream.batch(13)  # in the second pass: 13 x 96 > 960
    assert set(batch.view.tolist()) == {1}
    network, k = network_of(run.members[0]), 3
    row_of = int(batch.ids[k]) * 2 + int(batch.view[k])
    parts = [
        np.load(stage.path(f"train/{name}.npy"))[row_of : row_of + 1]
        for name in ("indices", "log_values", "log_tail")
    ]
    parts[0] = parts[0].astype(np.int64)
    with torch.no_grad():
        answer = network(batch.inputs[k : k + 1]).softmax(1)
    torch.testing.assert_close(
        decompress(*parts, NUM_CLASSES, "cpu").spread()[1], answer, atol=2e-3, rtol=1e-2
    )
    assert augment.numbers == 2


def test_a_view_is_of_its_sample_whatever_the_batch_and_the_rank():
    views, ids = Views(3, 7), np.array([5, 9, 5, 2**40])
    first = views.uniforms(0, ids, np.array([0, 2, 1, 0]), 4)
    assert first.shape == (4, 4) and (first >= 0).all() and (first < 1).all()
    again = views.uniforms(0, ids[::-1].copy(), np.array([0, 1, 2, 0]), 4)
    assert (again[::-1] == first).all()
    assert (
        len(np.unique(np.concatenate([first, views.uniforms(1, ids, np.array([0, 2, 1, 0]), 4)])))
        == 32
    )


def test_the_numbers_of_views_are_even():
    numbers = Views(2, 0).uniforms(0, np.arange(50_000), np.zeros(50_000, np.int64), 2)
    counts = np.histogram2d(*numbers.T, bins=10, range=[[0, 1], [0, 1]])[0]
    assert (
        (counts - 500) ** 2 / 500
    ).sum() < 160  # chi-squared with 99 degrees of freedom: mean 99, deviation 14


def test_classes_left_out_are_found_again_by_the_corrected_bias(run):
    stage = run.students["narrow"]
    shift = json.loads(stage.path("summary.json").read_text())["bias_shift"]
    before, after = (
        np.load(run.evaluate.path(f"{name}.npz")) for name in ("narrow_before", "narrow")
    )
    absent = np.isin(after["labels"], [3, 7])
    found = [
        float((each["top5"][absent, 0] == each["labels"][absent]).mean())
        for each in (before, after)
    ]
    assert shift > 0 and found[1] > found[0]


def test_a_student_of_few_examples_sees_a_share_of_every_class(run):
    labels = open_shards(run.config.data.train, run.config.data, "train").labels
    names = [f"class {c}" for c in range(NUM_CLASSES)]
    session = SimpleNamespace(
        shards=lambda split: SimpleNamespace(labels=labels), class_names=names, seed=lambda *_: 3
    )
    few, narrow = run.config.students["few"], run.config.students["narrow"]
    assert (np.bincount(labels[transfer_set(session, few)], minlength=NUM_CLASSES) == 10).all()
    counts = np.bincount(labels[transfer_set(session, narrow)], minlength=NUM_CLASSES)
    assert counts[[3, 7]].tolist() == [0, 0] and (np.delete(counts, [3, 7]) == 40).all()
    one_each = few.model_copy(update={"share": 1e-9})
    assert (np.bincount(labels[transfer_set(session, one_each)], minlength=NUM_CLASSES) == 1).all()
    with pytest.raises(UserError, match="class 99"):
        transfer_set(session, narrow.model_copy(update={"leave_out": ["class 99"]}))


def test_costs_count_every_ancestor_once(run):
    def seen(name):
        return json.loads(
            next(s for s in run.stages if s.place == name).path("summary.json").read_text()
        )["examples_seen"]

    ensemble = seen("generalist") + seen("members/001") + seen("members/002")
    assert row(run, "ensemble")["cost"]["examples_seen"] == ensemble
    assert row(run, "again")["cost"]["examples_seen"] == ensemble + seen("students/main") + seen(
        "students/again"
    )
    assert row(run, "few")["cost"]["examples_seen"] == seen("generalist") + seen("students/few")
    assert row(run, "labels")["cost"]["examples_seen"] == seen("students/labels")


def test_a_deep_ensemble_answers_alike_from_the_run_from_a_bundle_and_on_the_command_line(
    run, tmp_path, capsys
):
    assert (
        exporting.main([str(run.root), "--to", str(tmp_path / "bundle"), "--what", "ensemble"]) == 0
    )
    capsys.readouterr()
    raw = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    ensembles = [load_ensemble(place) for place in (run.root, tmp_path / "bundle")]
    assert torch.equal(*(each.probabilities(raw) for each in ensembles))
    np.save(tmp_path / "inputs.npy", raw.numpy())
    assert (
        predicting.main(
            [str(tmp_path / "bundle"), str(tmp_path / "inputs.npy"), "--json", "--top", "2"]
        )
        == 0
    )
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = ensembles[0].predict(raw, 2)
    assert [line["classes"] for line in said] == [each["classes"] for each in expected]
    with pytest.raises(ValueError, match="load it with load_ensemble"):
        SpecialistEnsemble.load(run.root)


def test_what_is_kept_of_an_answer_is_close_to_it_and_small():
    torch.manual_seed(0)
    p = (torch.randn(2, 7, 1000) * 3).softmax(-1)
    rows = compress(p, 32)
    assert (
        sum(part[0, 0].numel() * part.element_size() for part in rows.values()) == 32 * (4 + 2) + 2
    )
    kept = decompress(
        *(rows[name].numpy() for name in ("indices", "log_values", "log_tail")), 1000, "cpu"
    ).spread()
    assert kept.shape == p.shape
    torch.testing.assert_close(kept.sum(-1), torch.ones(2, 7))
    top = p.topk(32, -1)
    torch.testing.assert_close(kept.gather(-1, top.indices), top.values, rtol=5e-3, atol=1e-4)
    torch.testing.assert_close(
        1 - kept.topk(32, -1).values.sum(-1), 1 - top.values.sum(-1), rtol=1e-2, atol=1e-4
    )


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
def test_a_student_that_cannot_be_is_one_line(overrides, words):
    with pytest.raises(UserError, match=words):
        load_config(None, overrides)


def test_a_student_that_needs_no_one_waits_for_no_one(tmp_path):
    config = load_config(
        None,
        [
            "students.a.start=scratch",
            "students.a.method=hard",
            "students.b.start=scratch",
            "students.b.teacher=generalist",
        ],
    )
    run = RunDirectory(tmp_path, config)
    assert run.students["a"].inputs == ()
    assert [stage.place for stage in run.students["b"].inputs] == [
        "generalist",
        "targets/generalist",
    ]


@pytest.mark.parametrize(
    "overrides, words",
    [
        (
            ["engine.name=deepspeed", "engine.zero_stage=3", "specialists.ema=0.9"],
            "specialists.ema = 0.9: no rank",
        ),
        (["engine.shard_head=true", "students.a.ema=0.9"], "take engine.shard_head = false"),
        (["students.a.network=hydra", "students.a.members=4"], "its teacher ensemble 1"),
        (
            [
                "ensemble.kind=deep",
                "ensemble.members=3",
                "students.a.network=hydra",
                "students.a.members=4",
            ],
            "its teacher ensemble 3",
        ),
    ],
)
def test_what_cannot_be_averaged_or_taught_is_one_line(overrides, words):
    with pytest.raises(UserError, match=words):
        load_config(None, overrides)


def test_of_a_sharded_run_specialists_may_be_averaged():
    assert (
        load_config(None, ["engine.shard_head=true", "specialists.ema=0.9"]).specialists.ema == 0.9
    )


@pytest.mark.parametrize("what, members", [("", 3), ("students/hydra", 3), ("generalist", 1)])
def test_a_teacher_may_come_from_elsewhere(run, tmp_path, what, members):
    place = run.root / what
    base = toy_config(run.config.data.train).dump() | {
        "ensemble": {"kind": "deep", "members": 1},
        "students": {"main": {"steps": 3, "teacher": str(place), "start": "scratch"}},
    }
    other = run_all(tmp_path / "run", load_config(None, ["train.steps=3", "seed=7"], base))
    stage = other.targets_for("main")
    assert stage.place.startswith("targets/given-") and stage.inputs == ()
    assert json.loads(stage.path("train/answers.json").read_text())["members"] == members
    mine, theirs = (
        np.load(s.path("train/log_values.npy")) for s in (stage, run.targets["ensemble"])
    )
    assert mine.shape == (theirs.shape[0], members, theirs.shape[2])
    assert np.array_equal(mine, theirs) == (what == "")


def test_a_teacher_of_other_classes_is_one_line(run, tmp_path):
    names = [f"another {c}" for c in range(NUM_CLASSES)]
    data = write_toy(tmp_path / "data", {"train": 4, "val": 2, "test": 2}, names)
    base = toy_config(data).dump() | {"students": {"main": {"steps": 3, "teacher": str(run.root)}}}
    with pytest.raises(UserError, match="knows other classes"):
        check(load_config(None, [], base), 1)


def test_what_is_held_while_measuring_does_not_grow_with_the_label_set():
    assert [measuring_batch(C) for C in (10, 100_000, 2**26 // 100, 10**6, 2**30)] == [
        512,
        512,
        100,
        67,
        1,
    ]
