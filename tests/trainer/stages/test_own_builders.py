"""A trunk of the user's own, module:function, where only students have it."""

import json

import torch
from running import run_all
from toy import NUM_CLASSES, toy_config, write_toy

from pipeline.config import load_config
from trainer.distributed.ranks import ALONE
from trainer.session import Session
from trainer.stages.networks import load_network

MINE = """
from torch import nn

def two_layers(shape, width=20):
    first = nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], width), nn.ReLU())
    return nn.Sequential(first, nn.Sequential(nn.Linear(width, width), nn.ReLU()))
"""


def test_students_may_have_a_builder_of_their_own_and_others_start_from_them(tmp_path, monkeypatch):
    (tmp_path / "my_trunks.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    own = {"model": {"name": "my_trunks:two_layers", "options": {"width": 12}}, "steps": 5}
    data = write_toy(tmp_path / "data")
    base = toy_config(data, "train.steps=5", "controls.enabled=false").dump()
    base["students"] = {
        "one": {"start": "scratch", **own},
        "many": {"start": "one", "network": "hydra", "head_blocks": 1, **own},
        "after": {"start": "scratch", "teacher": "one", "steps": 5},
    }
    base["ensemble"] = {"kind": "deep", "members": 2}
    run = run_all(tmp_path / "run", load_config(None, [], base))
    rows = json.loads((run.root / "results.json").read_text())["students"]
    assert set(rows) == set(base["students"])
    grown = load_network(Session(run, ALONE), run.students["many"])
    assert grown(torch.zeros(3, *grown.spec.input.shape)).shape == (2, 3, NUM_CLASSES)
    assert [head.linear.in_features for head in grown.head.heads] == [12, 12]
