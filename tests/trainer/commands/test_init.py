"""`referral init`: from data to a config that runs as it is. Every refusal is one line."""

import tomllib

import numpy as np
import pytest
import userdata
from toy import write_toy

from pipeline.config import UserError, load_config
from trainer.commands.check import check
from trainer.commands.init import data_name, main


def init(*argv) -> int:
    return main([str(word) for word in argv])


def refusal(*argv) -> str:
    with pytest.raises(UserError) as error:
        init(*argv)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_shards_get_a_config_that_passes_the_check_of_prepare(here, capsys):
    write_toy(here / "shards")
    assert init("shards/", "--out", "mine.toml", "--run", "runs/a b") == 0
    out = capsys.readouterr().out
    assert "mine.toml: 24 classes of gray pictures, 8 x 8: 960 train, 288 val, 288 test" in out
    assert "next: referral advise mine.toml --run 'runs/a b'" in out
    assert out.count("next: ") == 1  # of init, not of the shards that it may have made
    config = load_config("mine.toml")
    assert check(config, config.launch.processes) == []
    assert config.data.train == "shards" and 0.4 < config.data.mean[0] < 0.6
    header = (here / "mine.toml").read_text().split("\n\n")[0]
    for words in (
        "Written by: referral init shards/ --out mine.toml --run 'runs/a b'",
        "referral run mine.toml --run 'runs/a b'",
        "40 training examples in a class",
        "cores",
        "Time: about",
    ):
        assert words in header


def test_a_config_that_exists_is_replaced_only_with_force(here):
    write_toy(here / "shards")
    (here / "config.toml").write_text("mine")
    assert "config.toml exists; --force replaces it" in refusal("shards")
    assert (here / "config.toml").read_text() == "mine"
    assert init("shards", "--force") == 0
    assert load_config("config.toml").data.val == "shards"


def test_it_trains_nothing_and_writes_only_the_config(here):
    write_toy(here / "shards")
    before = set(here.rglob("*"))
    assert init("shards") == 0
    assert {path.name for path in set(here.rglob("*")) - before} == {"config.toml"}


@pytest.mark.parametrize(
    "make, said, expected",
    [
        (
            lambda here: userdata.picture_folder(here / "photos", 1),
            "referral shards folder photos --out photos-shards --size 32 --gray",
            {"kind": "convnet", "channels": 1},
        ),
        (
            lambda here: userdata.picture_folder(here / "photos", 3),
            "referral shards folder photos --out photos-shards --size 32",
            {"kind": "convnet", "channels": 3},
        ),
        (
            lambda here: userdata.text_table(here / "t.csv"),
            "referral shards table t.csv --out t-shards",
            {"kind": "embedding_bag", "channels": 1},
        ),
        (
            lambda here: userdata.vectors(here / "v.npz"),
            "referral shards arrays v.npz --out v-shards",
            {"kind": "mlp", "channels": 9},
        ),
        (
            lambda here: userdata.webdataset(here / "hf"),
            "referral shards from-webdataset hf --out hf-shards --label json:label",
            {"kind": "convnet", "channels": 3},
        ),
        (
            lambda here: userdata.idx_files(here / "idx"),
            "--out idx-shards",
            {"kind": "convnet", "channels": 1},
        ),
    ],
    ids=["gray", "colour", "text", "vectors", "webdataset", "idx"],
)
def test_raw_data_become_shards_by_a_command_that_is_said(here, capsys, make, said, expected):
    data = make(here).relative_to(here)
    assert init(data) == 0
    out = capsys.readouterr().out
    assert said in out and "holds no shards yet" in out
    config = load_config("config.toml")
    assert config.model.name == expected["kind"]
    assert len(config.data.mean) == len(config.data.std) == expected["channels"]
    assert "holds shards already: referral init" in refusal(data, "--out", "other.toml")


def test_arrays_of_pictures_with_channels_last_and_names_for_labels_become_a_config(here, capsys):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (60, 14, 20, 3), dtype=np.uint8)
    names = np.array(["ash", "beech", "elm"])[np.arange(60) % 3]
    np.savez(here / "trees.npz", images=pixels, labels=names)
    assert init("trees.npz") == 0
    assert "3 classes of colour pictures, 14 x 20: 48 train" in capsys.readouterr().out
    config = load_config("config.toml")
    assert config.clusters.num_groups == 1 and config.data.augment == "flip-crop"
    np.testing.assert_allclose(config.data.mean, [0.5] * 3, atol=0.02)


def test_tars_of_train_alone_get_val_and_test_from_it(here, capsys):
    userdata.webdataset(here / "hf", ("train",))
    assert init("hf") == 0
    assert "100 train, 10 val, 10 test" in capsys.readouterr().out
    config = load_config("config.toml")
    assert config.data.val == config.data.test == "hf-shards"


def test_mistakes_are_one_line(here):
    (here / "file").write_text("")
    write_toy(here / "shards", {"train": 10, "val": 5})
    x = np.ones((30, 4), np.float32)
    np.savez(here / "same.npz", x=x, y=np.arange(30) % 3)
    (here / "x.parquet").write_bytes(b"PAR1")
    for argv, words in (
        (["absent"], "absent: no such file or directory"),
        (["shards"], "has no test split"),
        (["shards", "--out", "."], "is a directory; name a file"),
        (["same.npz"], "all inputs of the sample are one and the same"),
        (["x.parquet"], "parquet"),
    ):
        assert words in refusal(*argv)
        assert not (here / "config.toml").exists()


def test_what_the_shards_command_lacks_is_said_with_that_command(here):
    rows = [f"{n},sentence {n},{n % 3}" for n in range(30)]
    (here / "t.csv").write_text("\n".join(["no,words,intent", *rows]) + "\n")
    message = refusal("t.csv")
    assert "e.g. --label intent" in message
    assert (
        "`referral shards table t.csv --out t-shards`; after it: referral init t-shards" in message
    )


def test_keys_are_explained_beside_them(here):
    write_toy(here / "shards")
    init("shards")
    lines = (here / "config.toml").read_text().splitlines()
    for before, line in zip(lines, lines[1:], strict=False):
        if " = " in line and not line.startswith("#"):
            assert "# " in line or before.startswith("# ")
    assert tomllib.loads("\n".join(lines))["seed"] == 0


@pytest.mark.parametrize(
    "place, name",
    [
        ("data/photos/", "photos"),
        ("mnist.npz", "mnist"),
        ("t.csv.gz", "t"),
        ("http://h/d/train-{000..003}.tar", "train"),
    ],
)
def test_shards_of_raw_data_are_called_after_them(place, name):
    assert data_name(place) == name
