"""README.md of an export: a model card with figures, their conditions, and nobody's markup."""

import hashlib
import json

import pytest

from networks import InputSpec, ModelSpec
from pipeline.config import UserError
from pipeline.store import read_json
from trainer.__main__ import main
from trainer.commands.model_card import Card, check_license, escaped, wilson


def front_matter(text: str) -> dict:
    """Every line is `key: JSON`, which YAML reads alike."""
    assert text.startswith("---\n")
    lines = text[4:].partition("---\n")[0].splitlines()
    return {key: json.loads(value) for key, _, value in (line.partition(": ") for line in lines)}


def card(**changes) -> Card:
    spec = ModelSpec("mlp", 2, InputSpec(shape=(1, 8, 8)), class_names=("cat", "dog"))
    values = {"run": "mine", "spec": spec, "rows": ["ensemble"], "results": None, "seed": 0}
    return Card(**(values | {"programs": []} | changes))


def test_a_bundles_card_has_the_runs_figures_with_their_conditions(small_run, tmp_path, capsys):
    out = tmp_path / "bundle"
    code = main(["export", str(small_run.root), "--to", str(out), "--license", "apache-2.0"])
    assert code == 0, capsys.readouterr().err
    text = (out / "README.md").read_text()
    results = read_json(small_run.root / "results.json")
    front = front_matter(text)
    assert front["license"] == "apache-2.0" and front["pipeline_tag"] == "image-classification"
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"]["split"] == "test"
    values = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert values["top-1, ensemble"] == results["ensemble"]["top1"]
    assert values["NLL, student main"] == results["students"]["main"]["nll"]
    n, top1 = results["ensemble"]["n"], results["ensemble"]["top1"]
    low, high = wilson(top1, n)
    row = next(line for line in text.splitlines() if line.startswith("| ensemble |"))
    assert f"| {n} | {100 * top1:.2f} % | {100 * low:.2f} to {100 * high:.2f} |" in row
    assert f"{n} examples, seed 0" in text and "24: class 0, class 1" in text
    assert "and 4 more" in text and "load_ensemble" in text
    sums = dict(line.split("  ")[::-1] for line in (out / "SHA256SUMS").read_text().splitlines())
    assert sums["README.md"] == hashlib.sha256(text.encode()).hexdigest()


def test_yaml_reads_the_front_matter_alike(small_run, tmp_path):
    yaml = pytest.importorskip("yaml")
    results = read_json(small_run.root / "results.json")
    text = card(run='a: "b"\n---\nlicense: mit', results=results).text()
    loaded = yaml.safe_load(text[4:].partition("---\n")[0])
    assert loaded == front_matter(text)
    assert loaded["license"] == "unknown"
    assert loaded["model-index"][0]["name"] == 'a: "b" --- license: mit'


def test_wilsons_interval_by_hand():
    # n = 4, share 1: (1 + z^2 / 8) / (1 + z^2 / 4) -+ the same half, z^2 = 3.841459
    low, high = wilson(1.0, 4)
    assert (low, high) == pytest.approx((1 / (1 + 3.841459 / 4), 1.0), abs=1e-6)
    assert wilson(0.5, 100) == pytest.approx((0.4038315, 0.5961685), abs=1e-6)
    assert wilson(0.0, 0) == (0.0, 1.0)


def test_names_are_no_markup():
    spec = ModelSpec(
        "mlp",
        2,
        InputSpec(shape=(1, 8, 8)),
        class_names=("<script>alert(1)</script>", "[a](http://evil)|`b`\n# c\x1b[31m"),
    )
    text = card(spec=spec, run="x](javascript:1)").text()
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert "\\[a\\]\\(http\\://evil\\)\\|\\`b\\`" in text
    assert "\n# c" not in text and "\x1b" not in text
    assert escaped("a b") == "a b"


@pytest.mark.parametrize(
    "shape, dtype, decoders, task",
    [
        ((1, 8, 8), "uint8", None, "image-classification"),
        ((7,), "float32", None, "tabular-classification"),
        ((256,), "int32", None, "text-classification"),
        ((2048,), "float32", {"txt": "hashed_ngrams"}, "text-classification"),
    ],
)
def test_the_task_is_what_the_network_reads(shape, dtype, decoders, task):
    spec = ModelSpec("mlp", 2, InputSpec(shape, dtype, decoders=decoders), class_names=("a", "b"))
    assert card(spec=spec).task == front_matter(card(spec=spec).text())["pipeline_tag"] == task


def test_a_run_without_results_claims_nothing():
    text = card().text()
    assert "Nothing is known" in text and "model-index" not in text


def test_a_student_alone_is_loaded_as_one_network():
    text = card(rows=["student main"], programs=["student-main.onnx"]).text()
    assert "--student main" in text and 'load_classifier("THIS_DIRECTORY/students/main")' in text
    assert "onnx" in front_matter(text)["tags"] and "student\\-main\\.onnx" in text


def test_a_license_is_an_identifier():
    assert check_license("cc-by-nc-4.0") == "cc-by-nc-4.0"
    with pytest.raises(UserError, match="--license MIT License: write an identifier"):
        check_license("MIT License")
