"""`referral predict`: files in, the evaluate stage's predictions out. One line for an error."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from toy import NUM_CLASSES, encode_png, images

from networks import InputSpec, ModelSpec, build_classifier, save_classifier
from trainer.__main__ import main
from trainer.commands import predict as predicting
from trainer.data.shards import open_shards


def predict(capsys, *argv):
    code = main(["predict", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def rows_of(capsys, *argv):
    code, out, err = predict(capsys, *argv, "--json")
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope="session")
def test_split(small_run, tmp_path_factory):
    """The whole test split as one .npy file, in the order of the split."""
    data = small_run.config.data
    shards = open_shards(data.test, data, "test")
    path = tmp_path_factory.mktemp("test") / "test.npy"
    np.save(path, shards.inputs(np.arange(shards.num_samples)))
    return path


@pytest.mark.parametrize(
    "row, options",
    [("ensemble", []), ("main", ["--student", "main"]), ("generalist", ["--generalist"])],
)
def test_predictions_of_the_test_split_are_those_that_evaluate_wrote(
    small_run, test_split, capsys, row, options
):
    lines = rows_of(capsys, small_run.root, test_split, "--top", NUM_CLASSES, *options)
    with np.load(small_run.evaluate.path(f"{row}.npz"), allow_pickle=False) as file:
        expected = dict(file)
    assert [line["index"] for line in lines] == list(range(len(expected["labels"])))
    assert [line["classes"][0] for line in lines] == expected["top5"][:, 0].tolist()
    p_label = []
    for line, label in zip(lines, expected["labels"], strict=True):
        p_label.append(line["probabilities"][line["classes"].index(label)])
    np.testing.assert_allclose(p_label, expected["label_probability"], rtol=0, atol=1e-6)
    specialists = [line["specialists"] for line in lines]
    if row == "ensemble":
        assert expected["active"].sum() > len(lines)  # more than one for some
        assert specialists == [np.flatnonzero(active).tolist() for active in expected["active"]]
    else:
        assert specialists == [[]] * len(lines)


def test_a_network_with_members_predicts_their_mean():
    # Of two members. The mean is 0.5, 0.4, 0.1.
    predicted = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1]])
    spec = ModelSpec("mlp", 3, InputSpec(shape=(1,), dtype="float32"), class_names=("a", "b", "c"))
    network = torch.nn.Flatten(0)
    network.spec = spec
    network.forward = lambda raw: predicted.log()[:, None].expand(2, len(raw), 3)
    (row,) = predicting.predict_alone(network, torch.zeros(1, 1), top=2)
    assert row["classes"] == [0, 1] and row["names"] == ["a", "b"]
    assert row["probabilities"] == pytest.approx([0.5, 0.4])


def test_images_of_files_and_directories_are_those_of_arrays(small_run, tmp_path, capsys):
    pixels = images(np.arange(3), seed=5)
    np.save(tmp_path / "all.npy", pixels[:, None])
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for name, picture in zip(("a.png", "b.PNG", "deep/c.png"), pixels, strict=True):
        (tmp_path / "pictures" / name).write_bytes(encode_png(picture))
    (tmp_path / "pictures" / "notes.txt").write_text("not an input")
    from_array = rows_of(capsys, small_run.root, tmp_path / "all.npy")
    from_files = rows_of(capsys, small_run.root, tmp_path / "pictures")
    assert [row.pop("file").rsplit("/")[-1] for row in from_files] == ["a.png", "b.PNG", "c.png"]
    for row in from_array:
        del row["file"], row["index"]
    assert from_array == from_files
    assert from_array[0]["names"] == [f"class {c}" for c in from_array[0]["classes"]]
    assert len(from_array[0]["names"]) == 5


def test_colour_becomes_gray_and_resize_scales_another_size(small_run, tmp_path, capsys):
    small = images(np.array([4]), seed=1)[0]
    large = np.kron(small, np.ones((2, 2))).astype(np.uint8)  # 16 x 16, each pixel four times
    for name, gray in (("large.png", large), ("small.png", small)):
        Image.fromarray(np.stack([gray] * 3, axis=2)).save(tmp_path / name)
    code, _, err = predict(capsys, small_run.root, tmp_path / "large.png")
    assert code == 1
    assert "has shape [1, 16, 16]; the network reads [1, 8, 8]; --resize (resize=True)" in err
    pictures = (tmp_path / "large.png", tmp_path / "small.png")
    large, small = rows_of(capsys, small_run.root, *pictures, "--resize")
    assert len(large["classes"]) == len(small["classes"]) == 5
    np.save(tmp_path / "small.npy", images(np.array([4]), seed=1))
    (alone,) = rows_of(capsys, small_run.root, tmp_path / "small.npy")
    assert alone["probabilities"] == pytest.approx(small["probabilities"], abs=1e-6)


def test_the_table_names_files_classes_and_specialists(small_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # no path is long enough to be wrapped
    (tmp_path / "a [red] one.png").write_bytes(encode_png(images(np.array([4]), seed=1)[0]))
    (row,) = rows_of(capsys, small_run.root, tmp_path, "--top", 2)
    code, out, _ = predict(capsys, small_run.root, tmp_path, "--top", 2)
    assert code == 0 and len(out.splitlines()) == 5
    assert out.splitlines()[-1] == f"next: referral evaluate {small_run.root} LABELLED-DATA"
    for text in ("a [red] one.png", row["names"][1], f"{row['probabilities'][0]:.4f}"):
        assert text in out
    assert out.splitlines()[1].rstrip().endswith(", ".join(map(str, row["specialists"])))
    assert "specialists" not in predict(capsys, small_run.root, tmp_path, "--generalist")[1]


def test_missing_specialists_are_one_line_unless_allowed(small_run, test_split, tmp_path, capsys):
    root = tmp_path / "run"
    shutil.copytree(small_run.root, root, symlinks=True)
    shutil.rmtree(root / "specialists" / "001")
    code, out, err = predict(capsys, root, test_split)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert "specialists 1 of 4 are missing" in err and "--allow-missing" in err
    code, out, err = predict(capsys, root, test_split, "--json", "--allow-missing")
    assert code == 0 and err == "without specialists 1, which are missing\n"
    assert {m for line in out.splitlines() for m in json.loads(line)["specialists"]} == {0, 2, 3}


def test_an_unfinished_run_names_the_stage(small_run, test_split, tmp_path, capsys):
    root = tmp_path / "run"
    shutil.copytree(small_run.root, root, symlinks=True)
    shutil.rmtree(root / "ensemble")
    code, _, err = predict(capsys, root, test_split)
    assert code == 2 and "stage ensemble is not done" in err
    shutil.rmtree(root / "generalist")
    assert "generalist is done" in predict(capsys, root, test_split)[2]
    assert "no generalist/model.json" in predict(capsys, root, test_split, "--generalist")[2]


FLOATS = np.full((1, 8, 8), 1.5)
IMAGE = np.zeros((1, 8, 8), np.uint8)
MATRIX = np.zeros((3, 4), np.uint8)


@pytest.mark.parametrize(
    "content, name, options, expected, words",
    [
        (b"not a picture", "a.png", [], 1, "a.png: cannot be decoded"),
        (b"", "a.png", [], 1, "a.png: cannot be decoded: is empty"),
        (b"anything", "a.heic", [], 2, "a.heic: no decoder for .heic (known: bmp, gif,"),
        (FLOATS, "a.npy", [], 1, "a.npy holds float64 from 1.5 to 1.5; the network reads uint8 ["),
        (np.full((1, 8, 8), 256), "a.npy", [], 1, "a.npy holds int64 from 256 to 256; the network"),
        (np.full((1, 8, 8), np.nan), "a.npy", [], 1, "a.npy holds NaN"),
        (np.ones((1, 8, 8), bool), "a.npy", [], 1, "a.npy holds bool; the network reads uint8 ["),
        (MATRIX, "a.npy", [], 1, "a.npy has shape [3, 4]; the network reads [1, 8, 8]"),
        (None, "nowhere.png", [], 2, "nowhere.png: no such file"),
        (IMAGE, "a.npy", ["--top", 0], 2, "--top 0: at least 1"),
        (IMAGE, "a.npy", ["--student", "maine"], 2, "--student maine: "),
        (IMAGE, "a.npy", ["--device", "nonsense"], 2, "--device nonsense: "),
    ],
)
def test_an_error_is_one_line(small_run, tmp_path, capsys, content, name, options, expected, words):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        np.save(tmp_path / name, content)
    code, out, err = predict(capsys, small_run.root, tmp_path / name, *options)
    assert (code, out) == (expected, "") and len(err.splitlines()) == 1
    assert err.startswith("error: ") and words in err, err


def test_what_can_be_read_is_answered_and_the_rest_is_listed(small_run, tmp_path, capsys):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(encode_png(images(np.array([4]), seed=1)[0]))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[:60])
    (tmp_path / "d.jpg").write_bytes(b"")
    (tmp_path / "e.png").symlink_to("nowhere")
    code, out, err = predict(capsys, small_run.root, tmp_path, tmp_path / "absent.png", "--json")
    assert code == 1
    assert [json.loads(line)["file"][-5:] for line in out.splitlines()] == ["a.png", "c.png"]
    listed = err.splitlines()
    assert len(listed) == 4 and all(line.startswith("error: ") for line in listed)
    assert "absent.png: no such file" in err and "b.png: cannot be decoded" in err
    assert "e.png: No such file" in err
    assert "d.jpg: cannot be decoded: is empty" in err
    code, out, _ = predict(capsys, small_run.root, tmp_path, "--top", 1)
    assert code == 1 and "a.png" in out and "c.png" in out


def test_a_network_of_texts_reads_the_texts_of_a_directory(tmp_path, capsys):
    spec = InputSpec((2048,), dtype="float32", decoders={"txt": "hashed_ngrams"})
    network = build_classifier(ModelSpec("mlp", 3, spec, {"width": 4}))
    save_classifier(network, tmp_path / "run" / "generalist")
    (tmp_path / "notes").mkdir()
    for name, content in (("a.txt", b"soy"), ("b.txt", b"\xff"), ("c.png", b"no text")):
        (tmp_path / "notes" / name).write_bytes(content)
    code, out, err = predict(capsys, tmp_path / "run", tmp_path / "notes", "--generalist", "--json")
    assert code == 1 and len(out.splitlines()) == len(err.splitlines()) == 1
    assert json.loads(out)["file"].endswith("a.txt") and "b.txt: cannot be decoded" in err


def test_json_is_utf8_whatever_files_are_called(small_run, tmp_path, capfdbinary, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # no path is long enough to be wrapped
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9\n\xc3\xa9.png")
    with open(name, "wb") as file:
        file.write(encode_png(images(np.array([4]), seed=1)[0]))
    assert main(["predict", str(small_run.root), os.fsdecode(name), "--json"]) == 0
    row = json.loads(capfdbinary.readouterr().out.decode("utf-8"))
    assert os.fsencode(row["file"]) == name
    assert main(["predict", str(small_run.root), os.fsdecode(name)]) == 0
    assert rb"caf\udce9\n" in capfdbinary.readouterr().out


def test_a_directory_that_is_no_run_and_one_without_inputs_are_named(small_run, tmp_path, capsys):
    (tmp_path / "a.npy").touch()
    assert "generalist/model.json" in predict(capsys, tmp_path, tmp_path / "a.npy")[2]
    (tmp_path / "empty").mkdir()
    err = predict(capsys, small_run.root, tmp_path / "empty")[2]
    assert "holds no files with an extension of bmp, gif, jfif, jpe, jpeg, jpg, npy" in err


def test_export_and_predict_are_commands_of_referral():
    for name, option in (("export", "--programs"), ("predict", "--student")):
        command = [sys.executable, "-P", "-m", "launch.cli", name, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0
        assert f"Usage: referral {name}" in done.stdout and option in done.stdout


def test_a_reader_that_closes_the_pipe_early_is_no_error(small_run, tmp_path):
    np.save(tmp_path / "many.npy", np.zeros((1000, 1, 8, 8), np.uint8))
    arguments = [str(small_run.root), str(tmp_path / "many.npy"), "--json"]
    command = [sys.executable, "-P", "-m", "trainer", "predict", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert json.loads(process.stdout.readline())["index"] == 0
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(60) == 0


# Files of many inputs


def test_shards_are_answered_under_their_keys_as_evaluate_answered(small_run, capsys):
    place = small_run.config.data.test
    lines = rows_of(capsys, small_run.root, place, "--generalist")
    with np.load(small_run.evaluate.path("generalist.npz"), allow_pickle=False) as file:
        expected = file["top5"][:, 0].tolist()
    assert [line["classes"][0] for line in lines] == expected
    assert [line["key"] for line in lines[:2]] == ["000000", "000001"]
    assert {line["file"] for line in lines} == {place}
    tar = f"{place}/test-000000.tar"
    assert rows_of(capsys, small_run.root, tar, "--generalist")[0]["key"] == "000000"


def test_an_npz_is_answered_by_its_rows_without_labels(small_run, tmp_path, capsys):
    pixels = images(np.arange(3), seed=5)
    np.savez(tmp_path / "a.npz", x=pixels)
    np.save(tmp_path / "a.npy", pixels[:, None])
    lines = rows_of(capsys, small_run.root, tmp_path / "a.npz", tmp_path / "a.npy")
    assert [line.get("key") for line in lines] == ["0", "1", "2", None, None, None]
    for one, other in zip(lines[:3], lines[3:], strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)


def test_a_csv_for_a_network_of_pictures_is_one_line(small_run, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("id,text\nx7,hello\nx8,you\n")
    code, out, err = predict(capsys, small_run.root, tmp_path / "a.csv")
    assert (code, out) == (1, "") and len(err.splitlines()) == 1
    assert "a.csv holds texts; the network reads uint8 [1, 8, 8]" in err
