"""Pilots of whole networks on a toy run: what they train, what it costs, and what they leave."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from pilots import make_pilot, measured, pilot_stage
from running import run_all
from toy import NUM_CLASSES, toy_config, write_toy

from ensemble import fit_temperature
from networks import load_classifier
from pipeline.graph import RunDirectory
from trainer.core.loop import Interrupted
from trainer.data.shards import open_shards
from trainer.distributed.ranks import process_group
from trainer.session import Session
from trainer.stages.networks import fresh_network
from trainer.stages.pilots import networks as pilots_of_networks
from trainer.stages.pilots.networks import shortlists_on_the_fly

T, BATCH, VAL = 100, 96, 24 * 12
MULTIPLICATIONS = 64 * 24 + 24 * 24  # of the generalist: 8 x 8 pixels, 24 units, 24 classes
SHORT = ("model.dropout=0.1", f"train.steps={T}", "rerank.k=6", "rerank.random=4")
FAMILIES = ("on", "wide", "second", "rerank")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished generalist."""
    root = tmp_path_factory.mktemp("run") / "run"
    return run_all(root, toy_config(data, *SHORT), only={"generalist"})


@pytest.fixture(scope="module")
def stages(run):
    """Both rounds of every family: .2 T steps, and .4 T more."""
    made = {}
    for family in FAMILIES:
        made[f"{family}-0"] = make_pilot(run, f"{family}-0", 0.2)
        made[f"{family}-1"] = make_pilot(run, f"{family}-1", 0.4, made[f"{family}-0"])
    return made


def copied(run, root, *overrides):
    """Another run of the same generalist."""
    again = RunDirectory(root, toy_config(open_place(run), *SHORT, *overrides))
    shutil.copytree(run.root / "generalist", root / "generalist", symlinks=True)
    return again


def open_place(run):
    return run.config.data.train


def val_of(run):
    shards = open_shards(run.config.data.val, run.config.data, "val")
    inputs = torch.from_numpy(shards.read(np.arange(len(shards)))[0])
    return inputs, torch.from_numpy(shards.labels).long()


def generalist_of(run):
    return load_classifier(run.generalist.path("model.json").parent)


def answers_of(stage):
    return np.load(stage.path("answers.npz"))


def but_seconds(record):
    return {key: value for key, value in record.items() if "seconds" not in key}


def rates(stage, file="metrics.jsonl"):
    """The learning rates that a training logged, and its last step."""
    rows = map(json.loads, stage.path(file).read_text().splitlines())
    logged = [row for row in rows if "lr" in row]
    return [row["lr"] for row in logged], logged[-1]["step"]


# What is trained, and what it costs


@pytest.mark.parametrize("family", ["on", "second"])
def test_shares_add_up_over_the_rounds_and_each_pays_for_its_own(stages, family):
    first, second = measured(stages[f"{family}-0"]), measured(stages[f"{family}-1"])
    assert (first["round"], second["round"]) == (0, 1)
    assert [first["share"], second["share"]] == pytest.approx([0.2, 0.6])
    assert [first["spent"], second["spent"]] == pytest.approx([0.2, 0.4])
    assert first["unit"] == "generalist" and first["examples"] == VAL
    summary = json.loads(stages[f"{family}-1"].path("summary.json").read_text())
    assert (summary["steps"], summary["examples_seen"]) == (40, 40 * BATCH)


def test_the_schedule_is_compressed_to_the_share_and_anneals(data, run, tmp_path):
    again = copied(run, tmp_path / "run", "train.log_every=1")
    logged, last = rates(make_pilot(again, "on-0", 0.2))
    assert last == 20 and max(logged) == pytest.approx(0.01)
    # A warm-up of one step, .05 of 20. Then a cosine, whose 19th step is the last.
    assert logged[0] == pytest.approx(0.01)
    assert logged[-1] == pytest.approx(0.01 * (1 + np.cos(np.pi * 18 / 19)) / 2, abs=1e-8)


def test_a_share_below_a_step_is_one_step(run, tmp_path):
    record = measured(make_pilot(copied(run, tmp_path / "run"), "on-0", 1e-9))
    assert record["share"] == pytest.approx(1 / T)


def frozen(run, root):
    """The same run at a rate at which nothing moves."""
    return copied(run, root, "train.learning_rate=1e-12", "rerank.learning_rate=1e-12")


def test_on_starts_as_the_generalist(run, tmp_path):
    record = measured(make_pilot(frozen(run, tmp_path / "run"), "on-0", 0.1))
    assert record["forms"]["on"] == pytest.approx(record["forms"]["generalist"], abs=1e-6)
    assert record["forms"]["on"]["gain"] == record["forms"]["on"]["gain_se"] == 0


def test_the_second_network_is_the_beginning_of_the_runs_next_member(run, tmp_path):
    stage = make_pilot(frozen(run, tmp_path / "run"), "second-0", 0.1)
    with process_group(run.config.engine) as ranks:
        session = Session(run, ranks)
        member = fresh_network(session, seed=session.seed("member", 1))
    for name, value in load_classifier(stage.path("second")).state_dict().items():
        torch.testing.assert_close(value, member.state_dict()[name], atol=1e-6, rtol=0)


def test_the_next_round_goes_on_from_the_network_of_the_one_before(run, stages, tmp_path):
    again = frozen(run, tmp_path / "run")
    stage = make_pilot(again, "second-1", 0.1, stages["second-0"])
    before = load_classifier(stages["second-0"].path("second")).state_dict()
    for name, value in load_classifier(stage.path("second")).state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=0)
    assert measured(stage)["share"] == pytest.approx(0.2 + 0.1)


def test_a_wide_pilot_shares_its_compute_between_a_fresh_and_a_grown_network(run, stages):
    record = measured(stages["wide-0"])
    assert set(record["forms"]) == {"generalist", "scratch", "grown"}
    counted = record["multiplications"]
    assert counted["scratch"] == counted["grown"] == pytest.approx(2 * MULTIPLICATIONS, rel=0.05)
    assert record["share"] == pytest.approx(0.05)  # of each
    assert record["spent"] == pytest.approx(0.1 * counted["grown"] / MULTIPLICATIONS)
    assert record["spent"] <= 0.2
    assert rates(stages["wide-0"])[1] == rates(stages["wide-0"], "grown/metrics.jsonl")[1] == 5


def test_the_more_promising_of_the_two_has_all_of_the_next_round(run, stages):
    first, second = measured(stages["wide-0"]), measured(stages["wide-1"])
    gains = {form: first["forms"][form]["gain"] for form in ("scratch", "grown")}
    assert set(second["forms"]) == {"generalist", max(gains, key=lambda form: gains[form])}
    assert second["share"] == pytest.approx(0.05 + 0.2)
    assert rates(stages["wide-1"])[1] == 20


def test_a_grown_network_starts_with_the_generalists_function(run, tmp_path):
    record = measured(make_pilot(frozen(run, tmp_path / "run"), "wide-0", 0.1))
    assert record["forms"]["grown"]["gain_se"] == 0
    assert record["forms"]["grown"] == pytest.approx(record["forms"]["generalist"], abs=1e-5)
    assert record["forms"]["scratch"]["gain"] < -0.3


def test_a_wider_model_of_the_users_is_fresh_alone_where_the_generalist_has_another_shape(
    run, tmp_path
):
    wider = "controls.model={ width = 40, depth = 2 }"
    again = copied(run, tmp_path / "run", 'controls.rows=["wider"]', wider)
    record = measured(make_pilot(again, "wide-0", 0.2))
    assert set(record["forms"]) == {"generalist", "scratch"}
    assert "the rest of the two models must agree" in record["grown_not_possible"]
    count = 64 * 40 + 40 * 40 + 40 * 24
    assert record["multiplications"] == {"scratch": count}
    # The generalist's compute of .2 T pays for .2 T / 2.42 = 8.3 steps of it.
    assert record["share"] == pytest.approx(0.08)
    assert record["spent"] == pytest.approx(0.08 * count / MULTIPLICATIONS)
    assert record["spent"] < 0.2


def test_a_network_without_a_width_is_no_error(data, tmp_path):
    config = toy_config(data, "model.name=own_networks:flat", "train.steps=10")
    run = run_all(tmp_path / "run", config, only={"generalist"})
    stage = make_pilot(run, "wide-0", 0.2)
    record = measured(stage)
    assert "has none of the options" in record["not_possible"]
    assert record["forms"] == {} and record["spent"] == record["share"] == 0
    assert stage.is_done and not (stage.directory / "answers.npz").exists()


@pytest.fixture(autouse=True)
def own_networks(tmp_path, monkeypatch):
    """A builder of the user's without any option."""
    (tmp_path / "own_networks.py").write_text(
        "from torch import nn\n"
        "def flat(input_shape):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


# A re-ranker


def test_a_reranker_costs_the_rows_that_it_reads_and_the_generalists_answers(run, stages):
    """17 of the 24 rows: the label's, 6 of the shortlist and 4 drawn ones are 11."""
    step = 3 * (64 * 24 + 11 * 24) + MULTIPLICATIONS
    record = measured(stages["rerank-0"])
    examples = round(record["share"] * T * BATCH)
    assert record["spent"] == pytest.approx(examples * step / (3 * MULTIPLICATIONS * T * BATCH))
    # Half of the steps would cost more than half of the share's compute.
    assert examples == BATCH * int(0.5 * 0.2 * T * 3 * MULTIPLICATIONS / step) < 0.1 * T * BATCH
    assert record["spent"] <= 0.5 * 0.2


def test_a_reranker_takes_half_of_the_steps_where_its_head_is_most_of_the_cost(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr(pilots_of_networks, "cost_of_reranking", lambda *_: MULTIPLICATIONS)
    record = measured(make_pilot(copied(run, tmp_path / "run"), "rerank-0", 0.2))
    assert record["share"] == pytest.approx(0.1)


def test_shortlists_on_the_fly_are_the_generalists_likeliest_classes(run):
    from trainer.data.streams import Batch

    inputs, labels = val_of(run)
    network = generalist_of(run)
    listed = shortlists_on_the_fly(network, 6)(Batch(inputs, labels, labels, labels))
    assert torch.equal(listed, network(inputs).topk(6, dim=1).indices)


def test_a_run_whose_training_averages_and_clips_has_a_pilot_of_a_reranker(run, tmp_path):
    again = copied(run, tmp_path / "run", "train.ema=0.9", "train.clip_norm=1.0")
    assert measured(make_pilot(again, "rerank-0", 0.2))["forms"]["rerank"]["gain_se"] >= 0


# What is measured


def test_top1_and_its_paired_gain_are_those_of_the_saved_network(run, stages):
    inputs, labels = val_of(run)
    own = load_classifier(stages["on-1"].path("on"))(inputs).argmax(1) == labels
    generalists = generalist_of(run)(inputs).argmax(1) == labels
    difference = own.double() - generalists.double()
    form = measured(stages["on-1"])["forms"]["on"]
    assert form["top1"] == pytest.approx(float(own.double().mean()))
    assert form["gain"] == pytest.approx(float(difference.mean()))
    assert form["gain_se"] == pytest.approx(float(difference.std(correction=0)) / VAL**0.5)
    answers = answers_of(stages["on-1"])
    np.testing.assert_array_equal(answers["ids"], np.arange(VAL))
    np.testing.assert_array_equal(answers["correct/on"], own.numpy())
    assert answers["logp/on"].dtype == np.float32 and answers["correct/on"].dtype == bool


def test_temperatures_of_one_half_of_val_are_measured_on_the_other(run, stages):
    inputs, labels = val_of(run)
    logits = load_classifier(stages["second-1"].path("second"))(inputs).detach()
    expected = torch.empty(VAL)
    for half in (0, 1):
        T_half = fit_temperature(logits[half::2], labels[half::2])
        rows = slice(1 - half, None, 2)
        log_p = (logits[rows] / T_half).log_softmax(1)
        expected[rows] = log_p.gather(1, labels[rows, None])[:, 0]
    ours = answers_of(stages["second-1"])["logp/alone"]
    np.testing.assert_allclose(ours, expected.numpy(), atol=0.03)
    nll = measured(stages["second-1"])["forms"]["alone"]["nll"]
    assert nll == pytest.approx(-float(ours.mean()), abs=1e-6)
    assert nll == pytest.approx(-float(expected.mean()), abs=1e-3)


def test_the_average_is_a_linear_pool_of_both(run, stages):
    """log((p + w q) / (1 + w)) of the label, with one w for each half."""
    answers = answers_of(stages["second-1"])
    p, q = (np.exp(answers[f"logp/{form}"].astype(float)) for form in ("generalist", "alone"))
    pooled = np.exp(answers["logp/average"].astype(float))
    for half in (0, 1):
        rows = slice(half, None, 2)
        share = (pooled[rows] - p[rows]) / (q[rows] - p[rows])
        sure = np.abs(q[rows] - p[rows]) > 0.05
        assert sure.sum() > 20 and 0 < share[sure].mean() < 1
        np.testing.assert_allclose(share[sure], share[sure].mean(), atol=1e-4)


def test_two_networks_joined_can_be_better_than_either(stages):
    forms = measured(stages["second-1"])["forms"]
    assert forms["geometric"]["nll"] < min(forms["generalist"]["nll"], forms["alone"]["nll"])
    # 24 classes are fewer than the 100 of a shortlist.
    assert forms["shortlist"] == pytest.approx(forms["geometric"], abs=1e-6)


def test_the_correlation_of_residuals_is_that_of_all_classes(run, stages):
    inputs, labels = val_of(run)
    hot = torch.nn.functional.one_hot(labels, NUM_CLASSES).double()
    residuals = []
    for network in (generalist_of(run), load_classifier(stages["second-1"].path("second"))):
        logits = network(inputs).detach()
        p = torch.empty(VAL, NUM_CLASSES, dtype=torch.float64)
        for half in (0, 1):
            rows = slice(1 - half, None, 2)
            T_half = fit_temperature(logits[half::2], labels[half::2])
            p[rows] = (logits[rows] / T_half).double().softmax(1)
        residuals.append((hot - p).flatten())
    a, b = residuals
    expected = float((a @ b) / (a.norm() * b.norm()))
    assert measured(stages["second-1"])["residual_correlation"] == pytest.approx(expected, abs=0.01)


def test_a_val_of_one_example_is_measured(data, tmp_path):
    few = write_toy(tmp_path / "few", {"train": 5, "val": 1, "test": 1})
    config = toy_config(data, "train.steps=5", f"data.val={few}")
    run = run_all(tmp_path / "run", config, only={"generalist"})
    assert measured(make_pilot(run, "second-0", 0.5))["examples"] == NUM_CLASSES


# Again, and from elsewhere


@pytest.mark.parametrize("family", FAMILIES)
def test_two_runs_of_one_seed_measure_the_same(run, stages, tmp_path, family):
    again = copied(run, tmp_path / "run")
    torch.manual_seed(1234)  # dropout does not depend on what came before
    record = measured(make_pilot(again, f"{family}-0", 0.2))
    assert but_seconds(record) == but_seconds(measured(stages[f"{family}-0"]))


@pytest.mark.parametrize("family, step", [("on", 13), ("wide", 3), ("wide", 8), ("rerank", 5)])
def test_a_killed_pilot_resumes_to_the_same_numbers(run, tmp_path, monkeypatch, family, step):
    """wide trains two networks, of 5 steps each."""
    pace = "train.checkpoint_every=2", "rerank.checkpoint_every=4"
    undisturbed = make_pilot(copied(run, tmp_path / "whole", *pace), f"{family}-0", 0.2)
    seen = []

    def agreed(self, ranks):
        seen.append(1)
        return len(seen) == step

    monkeypatch.setattr("trainer.core.loop.StopSignal.agreed", agreed)
    again = copied(run, tmp_path / "killed", *pace)
    with pytest.raises(Interrupted):
        make_pilot(again, f"{family}-0", 0.2)
    assert not pilot_stage(again, f"{family}-0").is_done
    stage = make_pilot(again, f"{family}-0", 0.2)
    assert len(list((stage.directory / "attempts").iterdir())) == 2
    assert but_seconds(measured(stage)) == but_seconds(measured(undisturbed))


def test_of_a_given_generalist_train_is_the_unit(run, tmp_path):
    given = run.generalist.path("model.json").parent
    config = toy_config(open_place(run), *SHORT, f"generalist.from={given}", "train.steps=50")
    other = run_all(tmp_path / "other", config, only={"generalist"})
    record = measured(make_pilot(other, "on-0", 0.2))
    assert record["unit"] == "train"
    assert record["share"] == pytest.approx(0.2)
    summary = json.loads((other.root / "pilots/on-0/summary.json").read_text())
    assert summary["steps"] == 10
    assert record["forms"]["generalist"]["top1"] == pytest.approx(
        measured(make_pilot(other, "second-0", 0.2))["forms"]["generalist"]["top1"]
    )
