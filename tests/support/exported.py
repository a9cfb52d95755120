"""A run with a deep or shortlist ensemble, exported: what `referral predict` says of both."""

import json
from pathlib import Path

import numpy as np
from torch import Tensor

from pipeline.store import read_json
from trainer.__main__ import main


def predicted_by_run_and_export(root: Path, inputs: Tensor, tmp_path: Path, capsys) -> dict:
    """The first of five predictions with two classes each, which are the same of both."""
    out = tmp_path / "out"
    assert main(["export", str(root), "--to", str(out), "--programs"]) == 0
    differences = read_json(out / "export.json")["largest_difference"]
    assert differences["bundle"] == 0 and differences["programs/ensemble.pt2"] <= 1e-5
    np.save(tmp_path / "inputs.npy", inputs[:5].numpy())
    capsys.readouterr()
    printed = []
    for directory in (root, out):
        argv = ["predict", str(directory), str(tmp_path / "inputs.npy"), "--json", "--top", "2"]
        assert main(argv) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    return json.loads(printed[0].splitlines()[0])
