"""A run that was received: no command executes what its config names, and one line says why."""

import os
import sys

import pytest
import tomli_w

import launch.cli
from pipeline.graph import open_run
from pipeline.trust import record
from trainer.__main__ import main as trainer_main

LAUNCHER = [
    ["run", "--run", "RUN"],
    ["run", "--run", "RUN", "--dry-run"],
    ["prepare", "--run", "RUN"],
    ["retry", "RUN"],
    ["advise", "RUN"],
]
TRAINER = [
    ["predict", "RUN", "INPUT"],
    ["predict", "RUN", "INPUT", "--generalist"],
    ["evaluate-data", "RUN", "INPUT"],
    ["export", "RUN", "--to", "OUT"],
    ["doctor", "--run", "RUN"],
    ["generalist", "--run", "RUN"],
    ["evaluate", "report", "--run", "RUN"],
]


@pytest.fixture
def received(tmp_path, monkeypatch):
    """A run directory whose config names a module in it, which writes RAN when it is imported."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "input.npy").touch()
    shards = tmp_path / "shards"
    shards.mkdir()
    for split in ("train", "val", "test"):
        (shards / f"{split}-000000.tar").touch()
    (tmp_path / "evil.py").write_text("open('RAN', 'w')\n\n\ndef f(*_):\n    raise SystemExit\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "400")
    yield tmp_path / "theirs"
    assert not (tmp_path / "RAN").exists() or "evil" in sys.modules
    sys.modules.pop("evil", None)


def lay_out(run, **data):
    values = {
        "data": {split: str(run.parent / "shards") for split in ("train", "val", "test")} | data,
        "train": {"steps": 1},
        "specialists": {"steps": 1},
    }
    (run / "config.toml").write_text(tomli_w.dumps(values))


def called(run, words, capfd, monkeypatch) -> tuple[int, str]:
    """(exit code, errors) of a command of the launcher's or the trainer's, in this process."""
    places = {"RUN": str(run), "INPUT": str(run.parent / "input.npy"), "OUT": str(run.parent / "o")}
    words = [places.get(word, word) for word in words]
    if words[0] in ("run", "prepare", "retry", "advise"):
        monkeypatch.setattr(sys, "argv", ["referral", *words])
        code = launch.cli.main()
    else:
        code = trainer_main(words)
    return code, capfd.readouterr().err


@pytest.mark.parametrize("words", [*LAUNCHER, *TRAINER], ids=" ".join)
def test_a_received_run_does_not_execute_a_function(received, words, capfd, monkeypatch):
    lay_out(received, decoders={"bin": "evil:f"})
    code, err = called(received, words, capfd, monkeypatch)
    assert code == 2 and "evil" not in sys.modules and not os.path.exists("RAN")
    (line,) = err.splitlines()
    assert "data.decoders.bin = 'evil:f' is a function to import" in line
    assert line.endswith("if you trust it add --trust")


PIPE = "pipe:touch RAN; cat x.tar"


@pytest.mark.parametrize(
    "words", [*LAUNCHER, ["doctor", "--run", "RUN"], ["generalist", "--run", "RUN"]], ids=" ".join
)
def test_a_received_run_does_not_execute_a_command(received, words, capfd, monkeypatch):
    lay_out(received, train=PIPE)
    code, err = called(received, words, capfd, monkeypatch)
    assert code == 2 and not os.path.exists("RAN")
    assert len(err.splitlines()) == 1 and f"data.train = {PIPE!r} is a command to run" in err


def test_what_opens_no_shards_of_the_run_does_not_ask_about_a_pipe(received, capfd, monkeypatch):
    lay_out(received, train=PIPE)
    code, err = called(received, ["predict", "RUN", "INPUT"], capfd, monkeypatch)
    assert code == 2 and "--trust" not in err and not os.path.exists("RAN")


def test_status_and_cancel_of_a_received_run_do_not_ask(received, capfd, monkeypatch):
    lay_out(received, decoders={"bin": "evil:f"}, train=PIPE)
    for command in ("status", "cancel"):
        monkeypatch.setattr(sys, "argv", ["referral", command, str(received)])
        assert launch.cli.main() == 0
        assert "--trust" not in capfd.readouterr().err
    assert "evil" not in sys.modules and not os.path.exists("RAN")


def test_trust_and_a_record_of_ones_own_run_let_its_code_run(received, capfd, monkeypatch):
    lay_out(received, decoders={"bin": "evil:f"})
    words = ["predict", "RUN", "INPUT"]
    code, err = called(received, [*words, "--trust"], capfd, monkeypatch)
    assert code == 2 and "--trust" not in err and "generalist" in err  # there is no network
    record(open_run(received))
    assert called(received, words, capfd, monkeypatch)[1] == err


def test_a_bundle_whose_network_is_a_function_is_refused_without_an_import(received, capfd):
    from networks import ModelSpec, load_classifier

    (received / "generalist").mkdir()
    spec = '{"schema": 1, "builder": "evil:f", "num_classes": 2, "input": {"shape": [4]}}'
    (received / "generalist" / "model.json").write_text(spec)
    (received / "generalist" / "model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"{}")
    assert ModelSpec.load(received / "generalist" / "model.json").builder == "evil:f"
    with pytest.raises(ValueError, match="evil:f"):
        load_classifier(received / "generalist")
    assert trainer_main(["predict", str(received), str(received.parent / "input.npy")]) == 2
    assert "evil" not in sys.modules and not os.path.exists("RAN")
