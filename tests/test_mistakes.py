"""Mistakes that users make: each is answered in a line or two, before anything is trained.

The command `referral` runs in this process, and so does each trainer command that it starts: an
exception that is not caught, which a user would see as a traceback, fails the test.
"""

import io
import shlex
import sys

import numpy as np
import pytest
import torch
from shardsets import png
from toy import NUM_CLASSES, write_toy

import launch.cli
from trainer.__main__ import main as trainer_main

CONFIG = """
[data]
train = "data"
val = "data"
test = "data"

[model]
name = "mlp"
width = 8
depth = 1

[train]
steps = 3
batch_size = 24

[clusters]
num_groups = 4

[specialists]
steps = 2

[controls]
enabled = false

[students.main]
steps = 2

[launch]
processes = 1

[engine]
device = "cpu"
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"), {"train": 4, "val": 2, "test": 2})


@pytest.fixture
def place(tmp_path, data, monkeypatch):
    """The working directory: data, config.toml, and files that mistakes are made with."""
    (tmp_path / "data").symlink_to(data)
    (tmp_path / "config.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def referral(capfd, monkeypatch):
    """referral(*words) -> (exit code, what it prints on standard error)."""

    def in_process(command, text=None):
        words = list(map(str, command))
        assert words[1:4] == ["-P", "-m", "trainer"], words
        monkeypatch.setattr(sys, "stdin", io.StringIO(text or ""))
        try:
            return trainer_main(words[4:])
        except SystemExit as leaving:  # after help
            return leaving.code

    monkeypatch.setattr(launch.cli, "call_trainer", in_process)

    def referral(*words):
        monkeypatch.setattr(sys, "argv", ["referral", *map(str, words)])
        try:
            code = launch.cli.main()
        except SystemExit as leaving:
            code = leaving.code
        _, err = capfd.readouterr()
        return code, err

    return referral


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content)


# A row: what was typed, what the answer says, and what lies there.  `run` stands for
# `run config.toml --run runs/a`, `set X` for that with --set X.

COMMAND_LINE = [
    ("trian config.toml", ["No such command", "trian"]),
    ("run config.toml", ["--run"]),
    ("run cofnig.toml --run runs/a", ["cofnig.toml"]),
    ("run data --run runs/a", ["data"]),
    ("run --run runs/a", ["runs/a is not a run yet"]),
    ("run config.toml --run config.toml", ["config.toml"]),
    ("run config.toml --run config.toml/a", ["config.toml/a"]),
    ("run config.toml --run runs/a --on cluster", ["cluster", "local", "slurm"]),
    ("run config.toml --run runs/a --set train.steps", ["train.steps", "="]),
    ("run config.toml --run runs/a --sett train.steps=3", ["--sett"]),
    ("demo --seed one", ["--seed", "integer"]),
    ("status runs/none", ["runs/none"]),
    ("status data", ["data"]),
    ("report runs/none", ["runs/none"]),
    ("cancel data", ["data"]),
    ("retry data", ["data"]),
    ("compare data", ["data"]),
    ("export data --to out", ["data"]),
    ("export runs/none --to out", ["runs/none"]),
    ("predict data a.png", ["data"]),
    ("predict runs/none a.png", ["runs/none"]),
    ("evaluate runs/none data", ["runs/none"]),
    ("predict runs/none", ["FILES"]),
]

CONFIG_FILES = [
    (b"\x00\xff\xfe", ["not valid TOML"]),
    ("[data\n", ["not valid TOML"]),
    ("[data]\ntrain = a\n", ["not valid TOML"]),
    ("[modle]\nname = 'mlp'\n", ["modle", "model"]),
    ("[train]\nstep = 3\n", ["train.step", "steps"]),
    ("train = 3\n", ["train"]),
    ("[students]\nmethod = 'hard'\n", ["students"]),
]

SETTINGS = [
    ("train.stps=3", ["train.stps", "steps"]),
    ("train.steps=many", ["train.steps"]),
    ("train.steps=-3", ["train.steps"]),
    ("train.batch_size=0", ["train.batch_size"]),
    ("train.learning_rate=-1", ["learning_rate"]),
    ("train.optimizer=adam", ["optimizer", "adamw"]),
    ("train.loss=crossentropy", ["loss", "cross_entropy"]),
    ("train.warmup=500", ["warmup"]),
    ("train.batch_size=33 launch.processes=2", ["33", "2 ranks"]),
    ("train.checkpoint_every=-1", ["checkpoint_every"]),
    ("model.name=resnet50", ["resnet50", "resnet"]),
    ("model.name=mlpp", ["mlpp", "mlp"]),
    ("model.width=-8", ["width"]),
    ("model.name=nets:build", ["nets"]),
    ("model.options.kernel=3", ["kernel"]),
    ("model.name=timm:resnet999", ["resnet999"]),
    ("data.train=", ["data.train"]),
    ("data.train=dta", ["dta"]),
    ("data.train=data/train-000009.tar", ["train-000009.tar"]),
    ("data.test=empty", ["empty"]),
    ("data.mean=[0.4,0.5,0.6]", ["data.mean", "3"]),
    ("data.std=[0.0]", ["data.std"]),
    ("data.augment=flip", ["augment", "flip-crop"]),
    ("data.augment=views:turn", ["views"]),
    ("data.decoders.png=readers:read", ["readers"]),
    ("data.damage=ignore", ["damage", "skip"]),
    ("data.label=json:class", ["json"]),
    ("data.input=jpg", ["jpg"]),
    ("data.classes=10", ["10", "24"]),
    ("clusters.num_groups=50", ["num_groups", "50"]),
    ("clusters.num_groups=0", ["num_groups"]),
    ("clusters.overlap=9", ["overlap"]),
    ("clusters.method=kmean", ["kmean", "kmeans"]),
    ("clusters.groups_file=groups.json", ["groups.json"]),
    ("specialists.dustbin=no", ["dustbin"]),
    ("ensemble.combine=average", ["average", "arithmetic"]),
    ("ensemble.gate=0", ["gate"]),
    ("students.main.method=distil", ["distil", "distill"]),
    ("students.main.start=students", ["start"]),
    ("students.main.temperature=0", ["temperature"]),
    ("engine.name=ddpp", ["ddp"]),
    ("engine.device=gpu", ["gpu"]),
    ("engine.precision=fp8", ["precision", "fp8"]),
    ("engine.zero_stage=4", ["zero_stage"]),
    ("engine.track=[wandbb]", ["wandb"]),
    ("launch.processes=0", ["processes"]),
    ("generalist.from=weights.pt", ["weights.pt"]),
    ("generalist.from=data", ["data"]),
]

SHARDS = [
    ("folder none --out s", ["none"]),
    ("folder config.toml --out s", ["config.toml"]),
    ("folder pictures", ["--out"]),
    ("folder one --out s", ["one has 1 class directories"]),
    ("folder pictures --out s --val 1.5", ["1.5"]),
    ("folder pictures --out s --val a.csv", ["--val"]),
    ("folder pictures --out s --size 0", ["--size", "1"]),
    ("folder pictures --out s --input txt", ["txt"]),
    ("folder pictures --out data", ["data"]),
    ("folder sizes --out s", ["--size"]),
    ("folder torn --out s", ["torn/b/0.png", "--damage skip"]),
    ("folder pictures --out config.toml", ["config.toml"]),
    ("folder pictures --out s --damage ignore", ["ignore", "skip"]),
    ("arrays --out s", ["npz"]),
    ("arrays none.npz --out s", ["none.npz"]),
    ("arrays x.npz --out s", ["labels"]),
    ("arrays pickled.npz --out s", ["pickled.npz", "astype(str)"]),
    ("arrays uneven.npz --out s", ["do not belong together"]),
    ("arrays onehot.npz --out s", ["argmax"]),
    ("arrays nan.npz --out s", ["NaN"]),
    ("arrays config.toml --out s", ["config.toml"]),
    ("table none.csv --out s", ["none.csv"]),
    ("table t.csv --out s --text word", ["word", "text"]),
    ("table latin.csv --out s", ["--encoding"]),
    ("table empty.csv --out s", ["empty.csv"]),
    ("table t.csv --out s --drop dog", ["dog"]),
    ("from-webdataset none.tar --out s", ["none.tar"]),
    ("from-webdataset config.toml --out s", ["config.toml"]),
    ("index pictures", ["pictures"]),
    ("table data.parquet --out s", ["data.parquet", "referral shards parquet"]),
    ("index data --label json:class", ["json"]),
    ("validate none", ["none"]),
    ("fodler pictures --out s", ["fodler", "folder"]),
]


INIT = [
    ("init", ["DATA"]),
    ("init none --out new.toml", ["none"]),
    ("init config.toml", ["config.toml"]),
    ("init data --out config.toml", ["config.toml", "--force"]),
    ("init one --out new.toml", ["one"]),
    ("init torn --out new.toml", ["torn/b/0.png"]),
    ("init x.npz --out new.toml", ["labels"]),
    ("init empty.csv --out new.toml", ["empty.csv"]),
    ("init data.parquet --out new.toml", ["parquet"]),
]


@pytest.fixture
def brought(place):
    """What users bring to `referral shards`."""
    pixels = np.zeros((6, 5), np.uint8)
    for name in "ab":
        for number in range(4):
            write(place / "pictures" / name / f"{number}.png", png(pixels))
            write(place / "torn" / name / f"{number}.png", png(pixels))
            shape = (6, 5 + number)
            write(place / "sizes" / name / f"{number}.png", png(np.zeros(shape, np.uint8)))
    write(place / "torn" / "b" / "0.png", png(pixels)[:40])
    write(place / "one" / "a" / "0.png", png(pixels))
    x = np.zeros((4, 3), np.float32)
    y = np.array([0, 1, 0, 1])
    np.savez(place / "x.npz", x=x)
    np.savez(place / "pickled.npz", x=x, y=np.array(["a", None, "b", "a"], object))
    np.savez(place / "uneven.npz", x=x, y=y[:3])
    np.savez(place / "onehot.npz", x=x, y=np.eye(2)[y])
    np.savez(place / "nan.npz", x=np.where(x == 0, np.nan, x), y=y)
    write(place / "t.csv", "text,label\none,cat\ntwo,cow\n")
    write(place / "latin.csv", "text,label\ncaf\xe9,cat\n".encode("latin-1"))
    write(place / "empty.csv", "")
    write(place / "data.parquet", b"PAR1")
    return place


def assert_answered(answer, words, place):
    """One or two lines that name the mistake. Nothing is trained, and nothing is half made."""
    code, err = answer
    assert code in (1, 2), err
    lines = [line for line in err.splitlines() if line.strip()]
    errors = [line for line in lines if not line.startswith(("warning:", "corrupt:"))]
    assert 1 <= len(errors) <= 2, err
    assert "Traceback" not in err and "Error:" not in err.replace("error:", "")
    for word in words:
        assert word in err, f"{word!r} is not in: {err}"
    assert not list(place.glob("runs/*/generalist"))
    assert not (place / "s").exists() or not list((place / "s").iterdir())


@pytest.mark.parametrize("line, words", COMMAND_LINE, ids=[row[0] for row in COMMAND_LINE])
def test_on_the_command_line(referral, place, line, words):
    assert_answered(referral(*shlex.split(line)), words, place)


@pytest.mark.parametrize("text, words", CONFIG_FILES, ids=[str(row[0]) for row in CONFIG_FILES])
def test_in_the_config_file(referral, place, text, words):
    write(place / "config.toml", text)
    assert_answered(referral("run", "config.toml", "--run", "runs/a"), words, place)


@pytest.mark.parametrize("settings, words", SETTINGS, ids=[row[0] for row in SETTINGS])
def test_in_a_setting(referral, place, settings, words):
    (place / "empty").mkdir()
    options = [word for setting in settings.split() for word in ("--set", setting)]
    answer = referral("run", "config.toml", "--run", "runs/a", *options)
    assert_answered(answer, words, place)


@pytest.mark.parametrize("line, words", SHARDS, ids=[row[0] for row in SHARDS])
def test_in_making_shards(referral, brought, line, words):
    assert_answered(referral("shards", *shlex.split(line)), words, brought)


@pytest.mark.parametrize("line, words", INIT, ids=[row[0] for row in INIT])
def test_in_writing_a_first_config(referral, brought, line, words):
    assert_answered(referral(*shlex.split(line)), words, brought)
    assert not (brought / "new.toml").exists()


def test_the_config_without_a_mistake_is_ready(referral, place):
    code, err = referral("prepare", "config.toml", "--run", "runs/a")
    assert (code, err) == (0, "")


# Files of weights


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", ["weights.pt"]),
        (b"not a checkpoint", ["weights.pt"]),
        ({"epoch": 3}, ["weights.pt"]),
        ({"fc.weight": torch.zeros(NUM_CLASSES, 5)}, ["weights.pt"]),
    ],
    ids=["empty", "text", "no weights", "another network"],
)
def test_in_a_file_of_weights(referral, place, content, words):
    if isinstance(content, bytes):
        write(place / "weights.pt", content)
    else:
        torch.save(content, place / "weights.pt")
    options = ["--set", "generalist.from=weights.pt", "--set", "generalist.head=fc"]
    answer = referral("run", "config.toml", "--run", "runs/a", *options)
    assert_answered(answer, words, place)


def test_a_file_that_could_run_code_is_not_read_and_the_recipe_is_said(referral, place):
    torch.save(np.zeros(3), place / "weights.pt")
    options = ["--set", "generalist.from=weights.pt", "--set", "generalist.head=fc"]
    code, err = referral("run", "config.toml", "--run", "runs/a", *options)
    assert code == 2 and not (place / "runs").exists()
    assert "reading these can run code" in err and "st.save_file" in err
