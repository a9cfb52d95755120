"""Pilots of specialists on a toy run: which groups, what they heal, what it costs, and resuming."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from pilots import make_pilot, measured, pilot_stage
from running import run_all
from toy import NUM_CLASSES, toy_config, write_toy

from clustering.groups import ClassGroups
from ensemble import SpecialistEnsemble
from networks import load_branch, load_classifier
from networks.cutting import cut_at
from pipeline.graph import RunDirectory
from pipeline.store import read_json
from trainer.core.loop import Interrupted
from trainer.data.shards import open_shards
from trainer.distributed.ranks import process_group
from trainer.session import Session
from trainer.stages.branches import BranchWork
from trainer.stages.pilots.group_features import extract, plan_extraction
from trainer.stages.pilots.groups import branches_section, copies_section, with_section

T, BATCH = 100, 96
SHARE = 0.3  # of T steps: 1,440 examples each of a copy and a control. Branches have half of it
SHORT = (
    f"train.steps={T}",
    "clusters.num_groups=6",
    "specialists.steps=40",
    "specialists.learning_rate=0.003",
    "controls.enabled=false",
    "students={}",
)
GROUPED = {"generalist", "measure", "cluster"}
# The generalist's: 8 x 8 pixels, 24 units, 24 classes.
MULTIPLICATIONS = 64 * 24 + 24 * 24


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"), {"train": 20, "val": 12, "test": 4})


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished generalist, and its groups."""
    root = tmp_path_factory.mktemp("run") / "run"
    return run_all(root, toy_config(data, *SHORT), only=GROUPED)


@pytest.fixture(scope="module")
def copies(run):
    first = make_pilot(run, "copies-0", SHARE)
    return [first, make_pilot(run, "copies-1", 2 * SHARE, first)]


@pytest.fixture(scope="module")
def branches(run):
    first = make_pilot(run, "branches-0", SHARE / 2)
    return [first, make_pilot(run, "branches-1", SHARE, first)]


def copied(run, root, *overrides):
    """Another run of the same generalist and groups."""
    again = RunDirectory(root, toy_config(run.config.data.train, *SHORT, *overrides))
    for place in ("generalist", "clusters"):
        shutil.copytree(run.root / place, root / place, symlinks=True)
    return again


def forecasts(run):
    rows = read_json(run.cluster.path("summary.json"))["forecast"]
    return [row["gain"] for row in rows]


def val_of(run):
    shards = open_shards(run.config.data.val, run.config.data, "val")
    return torch.from_numpy(shards.read(np.arange(len(shards)))[0]), shards.labels


def answers_of(stage):
    return np.load(stage.path("answers.npz"))


def referred(run, groups):
    """Whether the generalist's likeliest class is of one of the groups, bool [n]."""
    with np.load(run.measure.path("predictions.npz")) as predictions:
        top = predictions["top"][:, 0]
    members = ClassGroups.load(run.cluster.path("groups.json")).members
    return np.isin(top, np.concatenate([members[m] for m in groups]))


def but_seconds(record):
    return {key: value for key, value in record.items() if "seconds" not in key}


# Copies


def test_the_group_with_the_highest_ceiling_is_piloted(run, copies):
    gains, record = forecasts(run), measured(copies[0])
    assert record["groups"] == sorted(range(6), key=lambda m: (-gains[m], m))[:1]
    # Groups that do not overlap share no error, so that ceilings add up.
    assert record["ceiling"] == pytest.approx(sum(gains[m] for m in record["groups"]))
    assert record["ceiling_all"] == pytest.approx(sum(gains))


def test_two_networks_share_the_compute_of_a_round(copies):
    first, second = map(measured, copies)
    seen, whole, full = 22 * 64, T * BATCH, 40 * BATCH  # 1,440 examples are 22 batches
    assert first["seen"] == [seen] and first["full_seen"] == [full]
    assert first["batch_size"] == 64
    assert first["spent"] == pytest.approx(2 * seen / whole) and first["spent"] <= SHARE
    assert first["share"] == pytest.approx(first["spent"])
    assert first["full_share"] == pytest.approx(seen / full)
    summary = read_json(copies[0].path("summary.json"))
    assert (summary["steps"], summary["examples_seen"]) == (44, 44 * 64)
    # 2,880 examples are 40 steps of 72, as many as a whole training. 2,432 are left to see.
    further = 33 * 72
    assert second["groups"] == first["groups"] and second["seen"] == [seen + further]
    assert second["spent"] == pytest.approx(2 * further / whole)
    assert second["share"] == pytest.approx(2 * (seen + further) / whole)


def test_what_is_not_referred_is_the_generalists_in_every_form(run, copies):
    answers, groups = answers_of(copies[0]), measured(copies[0])["groups"]
    elsewhere = ~referred(run, groups)
    for form in ("copies", "control"):
        for kind in ("correct", "logp"):
            own, other = answers[f"{kind}/{form}"], answers[f"{kind}/generalist"]
            assert np.array_equal(own[elsewhere], other[elsewhere])
    assert (answers["logp/copies"] != answers["logp/generalist"]).sum() > 0


def test_the_control_is_measured_on_the_same_rows(run, copies):
    inputs, labels = val_of(run)
    record = measured(copies[0])
    rows = referred(run, record["groups"])
    assert record["referred"] == rows.sum()
    control = load_classifier(copies[0].path("control"))
    generalist = load_classifier(run.generalist.path("model.json").parent)
    with torch.no_grad():
        asked = control(inputs).argmax(1).numpy()
        own = generalist(inputs).argmax(1).numpy()
    expected = np.where(rows, asked, own) == labels
    assert np.array_equal(answers_of(copies[0])["correct/control"], expected)
    gain = record["forms"]["control"]["gain"]
    assert gain == pytest.approx(expected.mean() - (own == labels).mean())


def test_copies_are_joined_as_the_ensemble_joins_them(run, tmp_path):
    plain = ("ensemble.fit_weight=false", "ensemble.temperatures=false")
    again = copied(run, tmp_path / "run", *plain)
    stage = make_pilot(again, "copies-0", SHARE)
    record, answers = measured(stage), answers_of(stage)
    members = ClassGroups.load(again.cluster.path("groups.json")).members
    names = [f"group-{m:03d}" for m in record["groups"]]
    joined = SpecialistEnsemble(
        load_classifier(again.generalist.path("model.json").parent),
        {k: load_classifier(stage.path(name)) for k, name in enumerate(names)},
        ClassGroups([members[m] for m in record["groups"]], NUM_CLASSES),
    )
    inputs, labels = val_of(run)
    q = joined.forward_with_details(inputs).q.numpy()
    rows = referred(run, record["groups"])
    of_label = q[np.arange(len(labels)), labels]
    assert np.allclose(answers["logp/copies"][rows], np.log(of_label[rows]), atol=1e-4)
    assert np.array_equal(answers["correct/copies"][rows], (q.argmax(1) == labels)[rows])


def test_what_is_healed_is_net_of_what_is_lost(run, copies):
    record, answers = measured(copies[1]), answers_of(copies[1])
    net = int(answers["correct/copies"].sum()) - int(answers["correct/generalist"].sum())
    possible = record["ceiling"] * record["examples"]
    assert record["healed"] == pytest.approx(net / possible)
    assert record["forms"]["copies"]["gain"] == pytest.approx(net / record["examples"])


def test_a_second_round_goes_on_from_the_networks_of_the_first(run, tmp_path):
    still = copied(run, tmp_path / "run", "specialists.learning_rate=1e-12")
    first = make_pilot(still, "copies-0", SHARE)
    second = make_pilot(copied(run, tmp_path / "other"), "copies-1", 1e-9, first)
    began, record = measured(first), measured(second)
    assert record["seen"] == [23 * 64]
    for name in (f"group-{began['groups'][0]:03d}", "control"):
        one, other = load_classifier(first.path(name)), load_classifier(second.path(name))
        moved = [
            float((p - q).detach().abs().max())
            for p, q in zip(one.parameters(), other.parameters(), strict=True)
        ]
        assert 0 < max(moved) <= 0.0025  # one step of Adam at 3e-3 sqrt(64 / 96)


def test_the_next_group_has_its_turn_once_one_is_done(run, tmp_path):
    again = copied(run, tmp_path / "run", "specialists.steps=10")
    first = make_pilot(again, "copies-0", SHARE)
    second = measured(make_pilot(again, "copies-1", 2 * SHARE, first))
    gains = forecasts(run)
    ranked = sorted(range(6), key=lambda m: (-gains[m], m))
    assert measured(first)["full_share"] == 1.0
    assert (second["groups"], second["tried"]) == (ranked[1:2], ranked[:1])
    assert second["seen"] == [960]


def test_nothing_is_paid_where_nothing_is_left_to_train(data, tmp_path):
    config = toy_config(data, *SHORT, "clusters.num_groups=2", "specialists.steps=10")
    again = run_all(tmp_path / "run", config, only=GROUPED)
    first = make_pilot(again, "copies-0", SHARE)
    second = make_pilot(again, "copies-1", 2 * SHARE, first)
    third = make_pilot(again, "copies-2", 2 * SHARE, second)
    assert measured(third)["spent"] == 0.0
    assert measured(third)["forms"] == measured(second)["forms"]
    assert read_json(third.path("summary.json"))["steps"] == 0


@pytest.mark.parametrize(
    "settings",
    [
        ("specialists.dustbin=full",),
        ("specialists.hard_negatives=0.5",),
        ("specialists.dustbin_rows=5", "train.balance=0.5"),
        ("ensemble.gate=2", "ensemble.shortlist=8"),
        ("specialists.kind=branch", "specialists.model={embedding=8}"),
    ],
)
def test_copies_are_what_the_specialists_would_be(run, tmp_path, settings):
    again = copied(run, tmp_path / "run", *settings)
    first = make_pilot(again, "copies-0", SHARE)
    second = measured(make_pilot(again, "copies-1", SHARE, first))
    assert second["seen"] > measured(first)["seen"]
    assert second["spent"] <= SHARE
    assert np.isfinite(second["forms"]["copies"]["nll"])


# Branches


def test_branches_pay_for_their_features_too(run, branches):
    record = measured(branches[0])
    passes = record["features_of"] * record["views"] + record["referred"]
    whole = 3 * T * BATCH * MULTIPLICATIONS
    of_step = sum(
        BATCH * (3 * (24 * 64 + 64 * (size + 1)) + size * 24)
        for size in sizes(run, record["groups"])
    )
    spent = passes * MULTIPLICATIONS + record["seen"][0] / BATCH * of_step
    assert record["spent"] == pytest.approx(spent / whole)
    assert record["spent"] <= SHARE / 2
    assert record["model"] == {"embedding": 64}


def sizes(run, groups):
    members = ClassGroups.load(run.cluster.path("groups.json")).members
    return [len(members[m]) for m in groups]


def test_branches_go_on_and_keep_what_is_best(run, branches):
    first, second = map(measured, branches)
    assert second["groups"] == first["groups"]
    assert second["seen"][0] > first["seen"][0]
    assert 1 <= len(first["groups"]) <= 4
    for m in second["groups"]:
        branch = load_branch(branches[1].path(f"group-{m:03d}"))
        assert len(branch.classes) == sizes(run, [m])[0]
    elsewhere = ~referred(run, second["groups"])
    answers = answers_of(branches[1])
    assert np.array_equal(
        answers["logp/branches"][elsewhere], answers["logp/generalist"][elsewhere]
    )


def test_a_network_that_cannot_branch_is_no_error(run, tmp_path):
    again = copied(run, tmp_path / "run", "specialists.kind=branch", "specialists.blocks=5")
    record = measured(make_pilot(again, "branches-0", SHARE))
    assert "blocks" in record["not_possible"] and record["forms"] == {}


def test_features_in_memory_are_those_of_the_chosen_examples(run):
    with process_group(run.config.engine) as ranks:
        session = Session(run, ranks)
        generalist = load_classifier(run.generalist.path("model.json").parent)
        session = with_section(session, branches_section(run.config.specialists, generalist))
        members = ClassGroups.load(run.cluster.path("groups.json")).members
        wanted = plan_extraction(session, dict(enumerate(members)), [1e9] * 6, 1e9, 2)
        few = wanted._replace(own=wanted.own[::2], natural=wanted.natural[:50])
        kept = extract(session, generalist, cut_at(generalist.trunk, 0), few)
        shards = session.shards("train")
        inputs = torch.from_numpy(shards.read(few.train)[0])
        with torch.no_grad():
            total = generalist(inputs).double().logsumexp(1).numpy()
        rows = kept.train.rows_of(few.train)
        assert np.allclose(kept.train.total[rows], total, atol=1e-5)
        assert np.array_equal(np.flatnonzero(kept.train.readable), few.train)
        work = BranchWork(session, generalist, kept, 0, 1, run.root / "x", run.root / "y")
        ids, columns = work.rows(0, 20, BATCH, shards.labels, 1)
        assert np.isin(ids[columns >= 0], few.own).all()
        # Others come at natural frequencies: from those alone that were drawn so.
        assert np.isin(ids[columns < 0], few.natural).all()


# Both


def test_settings_of_one_kind_do_not_disturb_the_other():
    branch = toy_config(
        "/nowhere", "specialists.kind=branch", "specialists.blocks=1", "specialists.views=0"
    ).specialists
    copy = toy_config("/nowhere", "specialists.dustbin=full", "specialists.ema=0.9").specialists
    assert copies_section(branch).kind == "copy" and copies_section(branch).blocks == 0
    assert copies_section(copy) == copy

    class Generalist:
        class linear_head:
            in_features = 100

    assert branches_section(branch, Generalist) == branch
    made = branches_section(copy, Generalist)
    assert (made.kind, made.embedding, made.dustbin, made.ema) == ("branch", 100, "preserving", 0)
    assert made.learning_rate == copy.learning_rate


@pytest.mark.parametrize("family, killed", [("copies", 14), ("branches", 3)])
def test_a_killed_pilot_that_goes_on_finds_the_same_numbers(
    run, tmp_path, monkeypatch, family, killed
):
    pace = ("specialists.checkpoint_every=3", "model.dropout=0")
    undisturbed = make_pilot(copied(run, tmp_path / "one", *pace), f"{family}-0", SHARE)
    seen = []

    def agreed(self, ranks):
        seen.append(1)
        return len(seen) == killed

    monkeypatch.setattr("trainer.distributed.ranks.StopSignal.agreed", agreed)
    again = copied(run, tmp_path / "killed", *pace)
    with pytest.raises(Interrupted):
        make_pilot(again, f"{family}-0", SHARE)
    assert not pilot_stage(again, f"{family}-0").is_done
    stage = make_pilot(again, f"{family}-0", SHARE)
    assert len(list((stage.directory / "attempts").iterdir())) == 2
    assert but_seconds(measured(stage)) == but_seconds(measured(undisturbed))
    one, other = answers_of(stage), answers_of(undisturbed)
    assert all(np.array_equal(one[name], other[name]) for name in other.files)
