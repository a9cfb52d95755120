"""`referral export`: it predicts what the run does. Never half-written. One line for an error."""

import hashlib
import shutil

import numpy as np
import pytest
import torch
from altered import altered
from toy import NUM_CLASSES, images

from ensemble import SpecialistEnsemble
from networks import InputSpec, ModelSpec, build_classifier, load_classifier
from pipeline import extras
from pipeline.graph import open_run
from pipeline.store import read_json, write_json
from trainer.__main__ import main
from trainer.commands import export as exporting

RAW = torch.from_numpy(images(np.arange(NUM_CLASSES), seed=8)[:, None])


def export(capsys, *argv):
    code = main(["export", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def below(directory):
    files = [path for path in directory.rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(directory)) for path in files)


@pytest.fixture
def copied(small_run, tmp_path):
    """A copy of the run, to be corrupted."""
    return shutil.copytree(small_run.root, tmp_path / "run", symlinks=True)


def test_a_bundle_equals_its_run_bit_for_bit(small_run, tmp_path, capsys):
    code, out, err = export(capsys, small_run.root, "--to", tmp_path / "deep" / "bundle")
    assert code == 0, err
    *_, ready, then = out.splitlines()
    assert "largest difference 0.0e+00" in out and "is ready" in ready
    assert then.startswith("next: referral predict ") and then.endswith(" FILES")
    bundle = tmp_path / "deep" / "bundle"
    expected = SpecialistEnsemble.load(small_run.root).forward_with_details(RAW)
    outputs = SpecialistEnsemble.load(bundle).forward_with_details(RAW)
    for one, other in zip(expected, outputs, strict=True):
        assert torch.equal(one, other)
    student = small_run.students["main"].path("model.safetensors").read_bytes()
    assert (bundle / "students/main/model.safetensors").read_bytes() == student
    kinds = {path.rsplit(".")[-1] for path in below(bundle)}
    assert kinds == {"json", "safetensors", "SHA256SUMS", "md"}
    for line in (bundle / "SHA256SUMS").read_text().splitlines():
        digest, file = line.split("  ")
        assert hashlib.sha256((bundle / file).read_bytes()).hexdigest() == digest
    assert list(tmp_path.joinpath("deep").iterdir()) == [bundle]


def test_predictions_from_a_bundle_are_the_runs(small_run, tmp_path, capsys):
    inputs = tmp_path / "inputs.npy"
    np.save(inputs, RAW.numpy())
    assert export(capsys, small_run.root, "--to", tmp_path / "bundle")[0] == 0
    printed = []
    for directory in (small_run.root, tmp_path / "bundle"):
        for network in ([], ["--student", "main"], ["--generalist"]):
            assert main(["predict", str(directory), str(inputs), "--json", *network]) == 0
            printed.append(capsys.readouterr().out)
    assert printed[:3] == printed[3:] and len(set(printed)) == 3


def test_a_student_can_be_exported_alone(small_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert export(capsys, small_run.root, "--to", out, "--what", "student:main")[0] == 0
    files = [
        "README.md",
        "SHA256SUMS",
        "export.json",
        "students/main/model.json",
        "students/main/model.safetensors",
    ]
    assert below(out) == files
    assert export(capsys, small_run.root, "--to", tmp_path / "two", "--what", "ensemble")[0] == 0
    assert not (tmp_path / "two" / "students").exists()


def test_programs_predict_what_eager_networks_do_at_any_batch_size(small_run, tmp_path, capsys):
    code, out, err = export(capsys, small_run.root, "--to", tmp_path / "out", "--programs")
    assert code == 0, err
    names = [*(f"specialist-{m:03d}" for m in range(4)), "ensemble", "generalist", "student-main"]
    assert below(tmp_path / "out" / "programs") == sorted(f"{name}.pt2" for name in names)
    differences = read_json(tmp_path / "out" / "export.json")["largest_difference"]
    assert {f"programs/{name}.pt2" for name in names} < differences.keys()
    for what, value in differences.items():
        assert f"{what:32} largest difference {value:.1e}" in out
    assert max(differences.values()) <= 1e-5

    run = SpecialistEnsemble.load(small_run.root)
    student = load_classifier(small_run.students["main"].path("model.json").parent)
    p_general, p_special, _ = run.predictions(RAW)
    first = next(m for m, predictions in enumerate(p_special) if predictions is not None)
    rows, of_first = p_special[first]
    expected = {"ensemble": run.probabilities(RAW), "generalist": p_general}
    expected |= {"student-main": torch.softmax(student(RAW), 1).detach()}

    def exported(name):
        return exporting.run_program(tmp_path / "out" / "programs" / f"{name}.pt2", RAW)

    for name, p in expected.items():
        torch.testing.assert_close(exported(name), p, rtol=0, atol=1e-5)
    # A specialist's temperature is part of its program.
    of_program = exported(f"specialist-{first:03d}")[rows]
    torch.testing.assert_close(of_program, of_first, rtol=0, atol=1e-5)


MEMBERS = ({"kind": "heads", "count": 3, "blocks": 1}, {"kind": "batch", "count": 3})


def with_members(members):
    torch.manual_seed(0)
    options = {"width": 4, "depth": 2, "embedding": 6}
    inputs = InputSpec(shape=RAW.shape[1:])
    spec = ModelSpec("convnet", NUM_CLASSES, inputs, options, members=members)
    return build_classifier(spec).eval()


@pytest.mark.parametrize(
    "kinds", [["pt2"], pytest.param(["onnx"], marks=pytest.mark.slow)], ids=["pt2", "onnx"]
)
@pytest.mark.parametrize("members", MEMBERS, ids=["heads", "batch"])
def test_a_student_with_members_is_exported_with_all_of_them_and_predicts_their_mean(
    members, kinds, tmp_path
):
    if kinds == ["onnx"]:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    network = with_members(members)
    written = exporting.Export(tmp_path, {})
    written.student("main", network, kinds)
    assert max(written.differences.values()) <= 1e-6
    assert torch.equal(load_classifier(tmp_path / "students" / "main")(RAW), network(RAW))
    each = [torch.softmax(logits, 1) for logits in network(RAW)]
    assert (each[0] - each[1]).abs().max() > 1e-3
    read = {"pt2": exporting.run_program, "onnx": exporting.run_onnx}[kinds[0]]
    for rows in (1, len(RAW)):
        predicted = read(tmp_path / "programs" / f"student-main.{kinds[0]}", RAW[:rows])
        torch.testing.assert_close(predicted, (sum(each) / 3)[:rows].detach(), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # torch's exporter takes minutes on a busy machine
def test_onnx_predicts_what_eager_networks_do(small_run, tmp_path, capsys):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    code, out, err = export(capsys, small_run.root, "--to", tmp_path / "out", "--onnx")
    assert code == 0, err
    assert len(below(tmp_path / "out" / "programs")) == 7 and "[torch.onnx]" not in out
    session = runtime.InferenceSession(str(tmp_path / "out" / "programs" / "ensemble.onnx"))
    (predicted,) = session.run(None, {"raw": RAW.numpy()})
    expected = SpecialistEnsemble.load(small_run.root).probabilities(RAW)
    torch.testing.assert_close(torch.from_numpy(predicted), expected, rtol=0, atol=1e-5)


def test_onnx_without_its_extra_names_it(small_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(extras, "is_installed", lambda name: False)
    code, _, err = export(capsys, small_run.root, "--to", tmp_path / "out", "--onnx")
    assert code == 2 and extras.install("onnx") in err and not (tmp_path / "out").exists()


def test_only_an_earlier_export_is_replaced_and_only_by_force(small_run, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()  # empty: as good as absent
    options = ("--programs", "--what", "student:main")
    assert export(capsys, small_run.root, "--to", out, *options)[0] == 0
    before = below(out)
    code, _, err = export(capsys, small_run.root, "--to", out)
    assert code == 2 and "is not empty" in err and "--force" in err and below(out) == before
    assert export(capsys, small_run.root, "--to", out, "--what", "ensemble", "--force")[0] == 0
    assert (out / "ensemble.json").is_file()
    assert not (out / "programs").exists() and not (out / "students").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("irreplaceable")
    code, _, err = export(capsys, small_run.root, "--to", mine, "--force")
    assert code == 2 and "holds something other than an export" in err
    assert below(mine) == ["thesis.txt"]
    code, _, err = export(capsys, small_run.root, "--to", mine / "thesis.txt")
    assert code == 2 and "is a file" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_an_export_that_differs_leaves_nothing_behind(small_run, tmp_path, capsys, monkeypatch):
    def run_program(path, raw):
        return torch.zeros(len(raw), NUM_CLASSES)

    monkeypatch.setattr(exporting, "run_program", run_program)
    options = ("--what", "student:main", "--programs")
    code, _, err = export(capsys, small_run.root, "--to", tmp_path / "out", *options)
    assert code == 2 and len(err.splitlines()) == 1
    assert "programs/student-main.pt2 differs" in err and "1e-05 is allowed" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "stage, what",
    [("ensemble", "ensemble"), ("generalist", "all"), ("students/main", "student:main")],
)
def test_an_unfinished_run_names_the_stage(copied, tmp_path, capsys, stage, what):
    (copied / stage / "DONE").unlink()
    code, _, err = export(capsys, copied, "--to", tmp_path / "out", "--what", what)
    assert code == 2 and len(err.splitlines()) == 1 and f"stage {stage} is not done" in err
    assert not (tmp_path / "out").exists()


def test_a_run_that_continued_without_a_specialist_says_so(copied, tmp_path, capsys):
    shutil.rmtree(copied / "specialists" / "001")
    code, _, err = export(capsys, copied, "--to", tmp_path / "out")
    assert code == 2 and "specialists 1 of 4 are missing" in err and not (tmp_path / "out").exists()
    of_attempt = next((copied / "ensemble" / "attempts").glob("*/ensemble.json"))
    for path in (copied / "ensemble.json", of_attempt):
        write_json(path, read_json(path) | {"missing": [1]})
    altered(open_run(copied).ensemble)
    code, out, _ = export(capsys, copied, "--to", tmp_path / "out")
    assert code == 0 and "without specialists 1," in out
    assert SpecialistEnsemble.load(tmp_path / "out", allow_missing=True).missing == [1]


@pytest.mark.parametrize(
    "what, words",
    [
        ("students", "write ensemble, student:NAME or all"),
        ("student:mian", "this run's students are main"),
    ],
)
def test_what_there_is_to_export_is_named(small_run, tmp_path, capsys, what, words):
    code, _, err = export(capsys, small_run.root, "--to", tmp_path / "out", "--what", what)
    assert code == 2 and words in err
    _, _, err = export(capsys, tmp_path, "--to", tmp_path / "out")
    assert err.startswith(f"error: {tmp_path} is not a run")
