"""`referral prepare --plan`: what each stage will take, of a run without data."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.sizing import Inputs, Needs, Split, inputs_of, size_text, warnings
from pipeline.config import UserError, load_config

ROOT = Path(__file__).parents[2]
CLASSES = ("data.classes=1000000", "data.train=nowhere", "data.val=nowhere", "data.test=nowhere")


def referral(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", "-m", "launch.cli", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def documented() -> tuple[list[str], str]:
    """The words of the command that docs/scaling.md gives, and what it says that it prints."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    found = re.search(
        r"^    \$ (referral prepare [^\n]+ \\\n[^\n]+)\n((?:    [^\n]*\n|\n)+?)\n(?! )", page, re.M
    )
    assert found, "docs/scaling.md shows a dry run"
    words = found[1].replace("\\\n", " ").split()
    return words[1:], re.sub(r"^    ", "", found[2], flags=re.M)


def test_the_page_shows_what_the_command_prints():
    words, printed = documented()
    done = referral(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == printed.strip()
    assert not (ROOT / "runs" / "million").exists()


def test_nothing_is_known_of_inputs_that_no_manifest_describes(tmp_path):
    config = load_config(None, CLASSES, {})
    with pytest.raises(UserError, match="no manifest says what one input is like; give --inputs"):
        inputs_of(config)
    with pytest.raises(UserError, match="data.train = 'nowhere': .* give --examples"):
        inputs_of(config, "uint8,3,8,8")
    known = inputs_of(config, "float32,64", "100,20,10")
    assert known == Inputs(
        10**6,
        (64,),
        "float32",
        {"train": Split(100, 256), "val": Split(20, 256), "test": Split(10, 256)},
    )
    assert known.input_bytes == 256
    with pytest.raises(UserError, match="data.classes is not set and no manifest is there"):
        inputs_of(load_config(None, CLASSES[1:], {}), "uint8,3")


@pytest.mark.parametrize("text", ["uint8", "complex,3", "uint8,3,x", ","])
def test_inputs_that_are_none_are_refused(text):
    with pytest.raises(UserError, match="such as uint8,3,64,64"):
        inputs_of(load_config(None, CLASSES, {}), text, "1,1,1")


@pytest.mark.parametrize("text", ["1,2", "1,2,x", "many"])
def test_examples_are_three_numbers(text):
    with pytest.raises(
        UserError, match=f"--examples {text}: three numbers, of train, val and test"
    ):
        inputs_of(load_config(None, CLASSES, {}), "uint8,3,8,8", text)


def test_what_a_stage_would_refuse_to_write_is_said():
    config = load_config(None, ["specialists.features_bytes=1000"], {})
    rows = [Needs("features", 1, disk=2048), Needs("routed", 1, disk=2048)]
    assert warnings(rows, config) == [
        "features takes 2 KiB, and specialists.features_bytes = 1,000 allows less"
    ]


def test_a_manifest_says_how_many_examples_and_what_pictures(tmp_path):
    shards = [{"name": "a.tar", "samples": 3, "bytes": 600, "sha256": "0"}]
    splits = dict.fromkeys(("train", "val", "test"), {"samples": 3, "shards": shards})
    rules = {"pictures": {"size": [32, 16], "channels": 3}}
    manifest = {"schema": 2, "classes": ["a", "b"], "splits": splits, "inputs": rules}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    paths = [f"data.{split}={tmp_path}" for split in splits]
    known = inputs_of(load_config(None, paths, {}))
    assert known.shape == (3, 32, 16) and known.classes == 2
    assert known.splits["val"] == Split(3, 200) and known.splits["val"].bytes == 600


def test_sizes_have_three_digits():
    texts = [size_text(size) for size in (None, 0, 999, 2**10, 1.5 * 2**30, 1000 * 2**40)]
    assert texts == ["-", "0 B", "999 B", "1 KiB", "1.5 GiB", "1,000 TiB"]
