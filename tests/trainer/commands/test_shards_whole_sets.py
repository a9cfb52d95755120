"""`shards from-webdataset` of a whole set, and what is proposed where words are missing."""

import json
import shlex

import numpy as np
import pytest
import userdata
from shards_command import counts_of, refusal, run
from shardsets import png, write_tar

from pipeline.config import Data
from trainer.data import open_shards
from trainer.data.authoring.splitting import split_by_class
from trainer.proposal.raw_data import shards_command


def tar(path, members: dict[str, str], count: int = 20):
    """Samples with a picture, beside members whose text may say the class with {}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(count):
        files.append((f"{number}.png", png(np.full((6, 5), number, np.uint8))))
        for extension, text in members.items():
            content = text.replace("{}", str(number % 2)).encode()
            files.append((f"{number}.{extension}", content))
    return write_tar(path, files)


JSON = '{"label": {}, "caption": "c"}'


def test_a_directory_of_tars_is_rewritten_with_all_its_splits(tmp_path):
    root = userdata.webdataset(tmp_path / "hf")
    assert run("from-webdataset", root, "--out", tmp_path / "s", "--label", "json:label") == 0
    assert counts_of(tmp_path / "s") == {"train": 120, "val": 25, "test": 25}
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert manifest["classes"] == ["0", "1", "2", "3", "4"]


def test_splits_may_be_directories_and_absent_ones_are_taken_of_train(tmp_path):
    tar(tmp_path / "d" / "train" / "0000.tar", {"cls": "{}"}, 40)
    tar(tmp_path / "d" / "eval" / "0000.tar", {"cls": "{}"}, 6)
    assert run("from-webdataset", tmp_path / "d", "--out", tmp_path / "s") == 0
    assert counts_of(tmp_path / "s") == {"train": 36, "val": 4, "test": 6}


def test_tars_of_one_split_stay_one_split_unless_fractions_are_given(tmp_path, capsys):
    source = tar(tmp_path / "train-0.tar", {"cls": "{}"}, 40)
    assert run("from-webdataset", source, "--out", tmp_path / "s") == 0
    assert counts_of(tmp_path / "s") == {"train": 40}
    note = "there is no val and no test yet"
    options = "--val 0.1 --test 0.1 --overwrite"
    out = capsys.readouterr().out
    assert note in out and options in out
    run("from-webdataset", source, "--out", tmp_path / "s", *options.split())
    assert counts_of(tmp_path / "s") == {"train": 32, "val": 4, "test": 4}
    assert note not in capsys.readouterr().out


def test_samples_are_in_one_split_each(tmp_path):
    tar(tmp_path / "x.tar", {"cls": "{}"}, 60)
    run("from-webdataset", tmp_path / "x.tar", "--out", tmp_path / "s", "--val", 0.2, "--test", 0.2)
    seen = [
        open_shards(str(tmp_path / "s"), Data(), split).inputs(range(size))[:, 0, 0, 0]
        for split, size in counts_of(tmp_path / "s").items()
    ]
    assert sorted(np.concatenate(seen).tolist()) == list(range(60))


@pytest.mark.parametrize(
    "members, proposal",
    [
        ({"json": JSON}, "--label json:label reads it"),
        ({"json": '{"category": "a{}"}'}, "--label json:category reads it"),
        ({"json": '{"kind": "a{}", "size": 3}'}, "--label json:FIELD, of kind, size"),
        ({"label": "{}"}, "--label label reads it"),
        ({"txt": "{}"}, "--label MEMBER"),
    ],
)
def test_the_label_is_proposed_where_no_sample_has_the_member(tmp_path, members, proposal):
    tar(tmp_path / "d" / "train-0.tar", members)
    for argv in (["from-webdataset", tmp_path / "d", "--out", tmp_path / "s"], ["index", "d"]):
        argv = [tmp_path / "d" if word == "d" else word for word in argv]
        message = refusal(*argv)
        assert "no sample has the label member .cls; they have png," in message
        assert proposal in message


def test_a_picture_is_the_input_and_what_is_beside_it_is_named(tmp_path, capsys):
    tar(tmp_path / "train-0.tar", {"cls": "{}", "json": JSON, "txt": "a caption"})
    assert run("from-webdataset", tmp_path / "train-0.tar", "--out", tmp_path / "s") == 0
    out = capsys.readouterr().out
    assert "members beside the input are left out: json, txt" in out
    assert "inputs: png, uint8 [1, 6, 5]" in out


def test_of_several_inputs_in_indexed_tars_one_is_proposed(tmp_path):
    tar(tmp_path / "train-0.tar", {"cls": "{}", "json": JSON})
    message = refusal("index", tmp_path)
    assert "--input of `referral shards`), e.g. png" in message
    assert run("index", tmp_path, "--input", "png") == 0


def test_numbered_tars_of_one_split_are_that_split(tmp_path):
    for number in range(2):
        tar(tmp_path / f"validation-{number:05d}-of-00002.tar", {"cls": "{}"})
    run("index", tmp_path)
    assert counts_of(tmp_path) == {"val": 40}


@pytest.mark.parametrize("command", ["table", "arrays", "index", "from-webdataset"])
def test_parquet_is_refused_with_the_command_that_reads_it(tmp_path, command):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    out = [] if command == "index" else ["--out", tmp_path / "s"]
    message = refusal(command, tmp_path / "x.parquet", *out)
    assert ".parquet files are not read here; `referral shards parquet`" in message


def test_the_remedy_for_mixed_sizes_is_a_command_that_works(tmp_path):
    root = userdata.picture_folder(tmp_path / "my photos", 3)
    message = refusal("folder", root, "--out", tmp_path / "s")
    words = shlex.split(message[message.index("referral shards") :])
    assert run(*words[2:]) == 0
    assert counts_of(tmp_path / "s") == {"train": 100, "val": 10, "test": 10}


@pytest.mark.parametrize("classes, each", [(3, 5), (3, 4), (2, 3), (100, 2), (2, 2)])
def test_a_split_of_too_few_examples_takes_one_of_some_classes(classes, each):
    labels = np.repeat(np.arange(classes), each)
    divided = split_by_class(labels, {"val": 0.1, "test": 0.1}, 0)
    assert sorted(np.concatenate(list(divided.values())).tolist()) == list(range(len(labels)))
    assert set(labels[divided["train"]]) == set(range(classes))
    for split in ("val", "test"):
        chosen = labels[divided[split]]
        assert len(chosen) == len(set(chosen)) == max(1, round(0.1 * len(labels)))


@pytest.mark.parametrize("name", ["", "id", "Index", "idx"])
def test_a_column_that_numbers_the_rows_is_no_text(tmp_path, capsys, name):
    rows = [f"{number},word{number % 2} here,{number % 2}" for number in range(20)]
    (tmp_path / "t.csv").write_text("\n".join([f"{name},sentence,label", *rows]) + "\n")
    assert run("table", tmp_path / "t.csv", "--out", tmp_path / "s") == 0
    assert "passed over: 1 columns" in capsys.readouterr().out
    assert counts_of(tmp_path / "s") == {"train": 16, "val": 2, "test": 2}


def test_pictures_of_many_sizes_in_tars_are_brought_to_one_that_is_proposed(tmp_path, capsys):
    files = []
    for number in range(20):
        pixels = np.full((20 + number, 40), number, np.uint8)
        files += [(f"{number}.png", png(pixels)), (f"{number}.cls", b"%d" % (number % 2))]
    (tmp_path / "d").mkdir()
    write_tar(tmp_path / "d" / "x.tar", files)
    run("from-webdataset", tmp_path / "d", "--out", tmp_path / "s")
    out = capsys.readouterr().out
    assert "a batch needs one" in out and "--size 24 --overwrite brings" in out
    options = ["--size", 24, "--gray", "--overwrite"]
    run("from-webdataset", tmp_path / "d", "--out", tmp_path / "s", *options)
    assert "a batch needs one" not in capsys.readouterr().out
    shards = open_shards(str(tmp_path / "s"), Data(), "train")
    assert shards.input_shape == (1, 24, 24) and shards.pictures.size == (24, 24)
    assert shards_command(str(tmp_path / "d"), "t")[-3:] == ["--size", "24", "--gray"]


def test_what_was_taken_of_train_does_not_come_back_to_it(tmp_path):
    tar(tmp_path / "train-0.tar", {"cls": "{}"}, 40)
    source = ["from-webdataset", tmp_path / "train-0.tar", "--out", tmp_path / "s", "--overwrite"]
    fractions = ["--val", 0.1, "--test", 0.2]
    run(*source, *fractions)
    message = refusal(*source)
    assert "val and test were taken of train" in message and "(--val 0.1 --test 0.1)" in message
    assert "test were taken of train" in refusal(*source, "--val", 0.1)
    assert counts_of(tmp_path / "s") == {"train": 28, "val": 4, "test": 8}
    run(*source, "--val", 0.2, "--test", 0.2)
    assert counts_of(tmp_path / "s") == {"train": 24, "val": 8, "test": 8}


def test_val_of_an_earlier_set_does_not_stay_beside_a_train_that_holds_it(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.eye(40, dtype=np.float32), y=np.arange(40) % 2)
    source = ["arrays", tmp_path / "a.npz", "--out", tmp_path / "s", "--overwrite"]
    run(*source)
    assert "val of an earlier `shards arrays` would stay" in refusal(*source, "--val", 0)
    assert counts_of(tmp_path / "s") == {"train": 32, "val": 4, "test": 4}
    run(*source, "--val", 0.2)
    assert counts_of(tmp_path / "s") == {"train": 28, "val": 8, "test": 4}


def test_of_several_columns_the_likeliest_is_proposed(tmp_path):
    rows = [f"{n},the {n}th sentence,about {n % 3},same" for n in range(30)]
    (tmp_path / "t.csv").write_text("\n".join(["no,sentence,the intent,source", *rows]) + "\n")
    source = ["table", tmp_path / "t.csv", "--out", tmp_path / "s"]
    message = refusal(*source)
    assert "choose one with --label, e.g. --label 'the intent'" in message
    message = refusal(*source, "--label", "the intent")
    assert "choose one with --text, e.g. --text sentence" in message
    assert run(*source, "--label", "the intent", "--text", "sentence") == 0
