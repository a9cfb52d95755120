"""Heads of cosines through the stages of a run."""

import json

import numpy as np
import pytest
import torch
from running import run_all
from toy import NUM_CLASSES, toy_config, write_toy

from networks import load_classifier
from networks.cosine import UnitTrunk
from pipeline.config import UserError
from pipeline.store import read_json
from trainer.__main__ import main

COSINE = ("model.head=cosine", "model.embedding=12", "model.margin=0.2")
SHORT = ("train.steps=12", "train.log_every=1", "train.checkpoint_every=6")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"), {"train": 12, "val": 6, "test": 6})


def losses(run):
    rows = map(json.loads, run.generalist.path("metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("kind", ("cosface", "arcface"))
def test_a_sharded_head_with_a_margin_logs_the_losses_of_a_whole_one(data, tmp_path, kind):
    words = (*COSINE, f"model.margin_kind={kind}", *SHORT, "train.ema=0.5")
    whole = run_all(tmp_path / "whole", toy_config(data, *words), ["generalist"])
    sharded = ("engine.shard_head=true", "engine.head_block=5")
    blocks = run_all(tmp_path / "blocks", toy_config(data, *words, *sharded), ["generalist"])
    np.testing.assert_allclose(losses(blocks), losses(whole), atol=1e-5)
    theirs, ours = (load_classifier(run.generalist.path("")) for run in (whole, blocks))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, atol=1e-5, rtol=1e-4)
    head, trunk = ours.linear_head, ours.trunk
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(NUM_CLASSES))
    assert not head.bias.any()
    assert isinstance(trunk, UnitTrunk) and trunk.unit.scale.item() != ours.spec.cosine["scale"]


def test_a_share_of_negatives_is_so_many_classes(data, tmp_path):
    words = (*COSINE, *SHORT, "engine.shard_head=true")
    share, count = (f"train.negatives={value}" for value in (0.25, NUM_CLASSES // 4))
    runs = [
        run_all(tmp_path / word[-4:], toy_config(data, *words, word), ["generalist"])
        for word in (share, count)
    ]
    assert losses(runs[0]) == losses(runs[1])


def test_keys_of_cosines_are_refused_where_nobody_reads_them(data):
    with pytest.raises(UserError, match='model.margin = 0.2 is of head = "cosine"; leave it out'):
        toy_config(data, "model.margin=0.2")
    with pytest.raises(UserError, match="margin"):
        toy_config(data, *COSINE, "engine.name=deepspeed", "engine.zero_stage=3")


def test_a_student_may_have_a_linear_head_under_a_cosine_teacher(data):
    config = toy_config(data, *COSINE, "model.scale=9", 'students.main.model={head="linear"}')
    own = config.model.merged(config.students["main"].model)
    assert (own.head, own.scale, own.margin, own.embedding) == ("linear", None, 0.0, 12)


@pytest.mark.slow
def test_every_stage_runs_and_the_exported_program_agrees(data, tmp_path):
    words = (*COSINE, "model.margin_kind=arcface", "clusters.num_groups=4", "train.steps=60")
    students = ("students.hard.method=hard", "students.main.start=generalist")
    run = run_all(tmp_path / "run", toy_config(data, *words, *students))
    results = read_json(run.root / "results.json")
    for row in ("generalist", "ensemble", "student"):
        assert results[row]["top1"] > 0.3, row
    out = tmp_path / "out"
    assert main(["export", str(run.root), "--to", str(out), "--programs"]) == 0
    differences = read_json(out / "export.json")["largest_difference"]
    assert differences["bundle"] == 0
    assert all(value <= 1e-5 for value in differences.values()), differences
