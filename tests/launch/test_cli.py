"""The command line: what it prints, what it exits with, and what it leaves alone."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from launch.demo import demo_config, is_complete
from pipeline.graph import RunDirectory


def snapshot(directory):
    return {path: path.lstat().st_mtime_ns for path in sorted(directory.rglob("*"))}


@pytest.fixture
def short(ward):
    """A config of five jobs."""
    del ward.values["students"]
    ward.values |= {"controls": {"enabled": False}, "clusters": {"num_groups": 1}}
    return ward


def test_run_then_run_again_prints_the_same_results_and_changes_nothing(short, referral):
    code, out, err = referral("run", short.write_config(), "--run", "run")
    assert code == 0, err
    assert "12.5 % fewer top-1 errors" in out and "report.html" in out
    rows = [line.split()[0] for line in out.splitlines() if " % " in line and "NLL" not in line]
    before = snapshot(short.run_path)
    code, again, _ = referral("run", short.toml, "--run", "run")
    assert code == 0 and again in out and snapshot(short.run_path) == before
    assert {"generalist", "control_wall", "ensemble"} <= set(rows)
    # Without the config: the run's own.
    assert referral("run", "--run", "run")[0] == 0
    code, out, _ = referral("status", "run")
    assert "9 stages: 9 done" in out
    stages = json.loads(referral("status", "run", "--json")[1])["stages"]
    assert {stage["state"] for stage in stages} == {"done"}


def test_a_run_may_be_looked_at_and_resumed_from_elsewhere(
    short, referral, monkeypatch, tmp_path_factory
):
    short.values["data"] = {split: f"data/{split}-000000.tar" for split in ("train", "val", "test")}
    assert referral("prepare", short.write_config(), "--run", "run")[0] == 0
    run = RunDirectory(short.run_path, short.config())
    short.finish([run.generalist])
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    out = referral("status", short.run_path)[1]
    assert "1 done" in out and "stale" not in out


def test_prepare_lays_out_and_starts_nothing(ward, referral):
    code, out, _ = referral("prepare", ward.write_config(), "--run", "run", "--set", "seed=3")
    assert code == 0 and "is ready" in out
    assert "seed = 3" in (ward.run_path / "config.toml").read_text()
    assert not ward.calls()
    assert len(json.loads((ward.run_path / "graph.json").read_text())["jobs"]) == 14


def test_dry_run_prints_every_job_and_writes_nothing(ward, referral):
    code, out, _ = referral("run", ward.write_config(), "--run", "run", "--dry-run")
    assert code == 0 and not ward.run_path.exists()
    for words in (
        "specialists/003",
        "ensemble, controls/control_wall-0",
        "control --name control_compute --run run",
        "to run",
    ):
        assert words in out


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["train.stepz=3"], "unknown key train.stepz; did you mean train.steps?"),
        (["train.steps=many"], "train.steps = 'many'"),
        (["data.train=data/none-*.tar"], "no shard matches"),
        (["data.val="], "data.val is empty"),
        (["data.classes=3"], "class index 7 is out of range"),
        (["clusters.num_groups=0"], "greater than 0"),
        (["clusters.num_groups=99"], "more than the 8 classes"),
        (["seed"], "write section.key=value"),
        (["train.stepz=3", "modle.name=x"], "did you mean model?"),
    ],
)
@pytest.mark.parametrize("command", ["run", "prepare"])
def test_bad_config_is_one_clear_line_and_exit_2_and_nothing_written(
    ward, referral, command, overrides, words
):
    options = [word for override in overrides for word in ("--set", override)]
    code, out, err = referral(command, ward.write_config(), "--run", "run", *options)
    assert code == 2 and words in err and not ward.run_path.exists()
    assert out == "" and all(line.startswith("error: ") for line in err.splitlines())
    assert len(err.splitlines()) == len(overrides)


@pytest.mark.parametrize("command", ["run", "prepare"])
def test_what_the_trainer_finds_wrong_stops_before_anything_is_written(ward, referral, command):
    code, _, _ = referral(
        command, ward.write_config(), "--run", "run", "--set", "data.input=unlucky"
    )
    assert code == 2 and not ward.run_path.exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["run", "nowhere.toml", "--run", "run"], "no such config file"),
        (["run", "--run", "run"], "is not a run yet"),
        (["run", "config.toml"], "--run"),
        (["run", "config.toml", "--run", "data"], "is not a run"),
        (["run", "config.toml", "--run", "config.toml"], "not a directory"),
        (["run", "config.toml", "--run", "/proc/nothing/run"], "/proc"),
        (["cancel", "nowhere"], "is not a run"),
        (["retry", "nowhere"], "is not a run"),
        (["run", "config.toml", "--run", "run", "--on", "moon"], "moon"),
        (["status", "nowhere"], "is not a run"),
        (["status", "data"], "is not a run"),
        (["report", "nowhere"], "is not a run"),
        (["compare", "nowhere"], "is not a run"),
        (["compare"], "RUN"),
        (["cure"], "cure"),
    ],
)
def test_bad_arguments_are_one_clear_line_and_exit_2(ward, referral, arguments, words):
    ward.write_config()
    before = snapshot(ward.root)
    code, _, err = referral(*arguments)
    assert code == 2 and words in err and snapshot(ward.root) == before
    assert len(err.splitlines()) == 1 and err.startswith("error: ")


def test_another_config_is_refused_and_force_redoes_what_is_stale(short, referral):
    run = short.run()
    short.finish(run.stages)
    code, _, err = referral(
        "run", short.write_config(), "--run", "run", "--set", "specialists.steps=21"
    )
    assert code == 2 and "specialists.steps: 20 -> 21" in err and "--force" in err
    assert run.report.is_done
    code, out, err = referral(
        "run", short.toml, "--run", "run", "--set", "specialists.steps=21", "--force"
    )
    assert code == 0, err
    assert [place for _, place in short.calls("begin")] == [
        "specialists/000",
        "ensemble",
        "evaluation",
        "report",
    ]


@pytest.mark.parametrize("command", ["run", "retry", "run --force"])
def test_a_done_stage_whose_files_are_lost_is_done_again_and_said(short, referral, command):
    run = short.run()
    short.finish([stage for stage in run.stages if stage is not run.report])
    shutil.rmtree(run.evaluate.directory / "attempts")
    name, *options = command.split()
    arguments = ["--run", "run", *options] if name == "run" else ["run"]
    code, out, err = referral(name, *arguments)
    assert code == 0, err
    said = "evaluation is done again, for its files are not whole: "
    assert said in out and "is missing" in out.partition(said)[2].splitlines()[0]
    assert [place for _, place in short.calls("begin")] == ["evaluation", "report"]


def test_results_without_a_failed_specialist_are_shown_and_the_exit_code_says_that_it_failed(
    short, referral
):
    short.values |= {"clusters": {"num_groups": 2}, "ensemble": {"allow_missing": True}}
    run = short.run()
    short.finish([run.generalist, run.measure, run.cluster, run.route, run.specialists[0]])
    short.behave(specialists__001={"exit": 1, "times": 9})
    code, out, err = referral("run", short.write_config(), "--run", "run")
    assert code == 1 and "specialists/001" in err and "fewer top-1 errors" in out


def test_report_is_written_anew_for_an_evaluated_run_only(short, referral):
    run = short.run()
    code, _, err = referral("report", "run")
    assert code == 2 and "not evaluated yet" in err
    short.finish(run.stages)
    code, out, _ = referral("report", "run")
    assert code == 0 and "fewer top-1 errors" in out
    assert short.calls("end") == [("end", "report")]


def test_the_table_of_results_shows_calibration_and_dee_only_where_a_run_has_them(ward):
    from rich.console import Console

    from launch.results import results_table

    def shown(**more):
        row = {
            "top1": 0.5,
            "top5": 0.9,
            "nll": 1.25,
            "brier": 0.5,
            "ece": 0.05,
            "macro_top1": 0.5,
            "cost": {"seconds": 60.0, "examples_seen": 1000},
        }
        results = {
            "generalist": row,
            "ensemble": {**row, **more},
            "controls": {},
            "students": {},
            "sizes": [{}] * 4,
        }
        console = Console(width=200, record=True, file=open(os.devnull, "w"))
        console.print(results_table(results))
        return [line.split() for line in console.export_text().splitlines()]

    assert "cNLL" not in shown()[0] and "DEE" not in shown()[0]
    head, generalist, ensemble = shown(cnll=1.125, dee=None, dee_beyond=True)
    assert head[:6] == ["top-1", "top-5", "NLL", "cNLL", "Brier", "ECE"] and head[6] == "DEE"
    same = ["50.00", "%", "90.00", "%", "1.2500"]
    assert generalist[1:10] == [*same, "–", "0.5000", "0.0500", "–"]
    assert ensemble[1:10] == [*same, "1.1250", "0.5000", "0.0500", ">4"]


def test_compare_prints_writes_and_passes_the_plot_on(short, referral):
    short.write_config()
    for seed in (1, 2):
        assert referral("run", short.toml, "--run", f"r{seed}", "--set", f"seed={seed}")[0] == 0
    options = "--metric top1,nll --json c.json --plot c.png --versus generalist"
    code, out, err = referral("compare", "r1", "r2", *options.split())
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == (
        "2 runs, 2 seeds (1, 2); mean ± sample deviation over runs of the difference to generalist "
        "in the same run"
    )
    # The fake trainer's ensemble has 65 % and 1.1, its generalist 60 % and 1.2, in every run.
    assert [line.split() for line in lines if line.startswith("ensemble")] == [
        ["ensemble", "2", "+5.00", "±", "0.00", "-0.1000", "±", "0.0000"]
    ]
    assert lines[-1] == "compare r1 r2 --plot c.png --metric=top1,nll --by= --versus=generalist"
    written = json.loads((short.root / "c.json").read_text())
    means = {row["row"]: row["figures"]["top1"]["mean"] for row in written["rows"]}
    assert means["ensemble"] == pytest.approx(0.05) and written["runs"][1]["seed"] == 2
    assert "error: --json" in referral("compare", "r1", "--json", "nowhere/c.json")[2]


@pytest.mark.parametrize("name", ["shards", "export", "predict", "doctor"])
def test_commands_that_need_torch_pass_on_arguments_and_exit_code(referral, name):
    assert referral(name, "a b", "--help", "--x=1")[:2] == (0, f"{name} a b --help --x=1\n")
    assert referral(name, "--seven")[0] == 7


def test_help_names_every_command(referral):
    code, out, _ = referral()
    assert code == 0
    assert all(
        name in out
        for name in ("run", "demo", "prepare", "status", "report", "compare", "shards", "doctor")
    )


def test_the_launcher_never_imports_torch():
    heavy = "{'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    command = f"import launch.cli, sys; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", command], check=True)


# The demo


@pytest.mark.parametrize("quick", [False, True])
def test_the_demos_config_is_valid_and_quick_is_smaller(tmp_path, quick):
    config = demo_config(tmp_path, 3, quick, ["train.learning_rate=0.5"])
    assert config.seed == 3 and config.train.learning_rate == 0.5 and "main" in config.students
    assert config.data.train == str(tmp_path / "data")
    if quick:
        assert config.train.steps < demo_config(tmp_path, 3, False, []).train.steps


def test_shards_are_complete_when_each_has_the_size_that_the_manifest_says(tmp_path):
    assert not is_complete(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"1234")
    shard = {"name": "a.tar", "bytes": 4}
    splits = {split: {"shards": [shard]} for split in ("train", "val", "test")}
    (tmp_path / "manifest.json").write_text(json.dumps({"splits": splits}))
    assert is_complete(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"123")
    assert not is_complete(tmp_path)


def test_the_demo_renders_its_glyphs_once(ward, referral, monkeypatch):
    import launch.cli

    rendered = []

    def make(root, seed, quick, trainer):
        rendered.append(seed)
        ward.data.rename(root / "data")

    monkeypatch.setattr(launch.demo, "make_glyphs", make)
    monkeypatch.setattr(launch.demo, "has_glyphs", lambda root, seed, quick: bool(rendered))
    monkeypatch.setattr(launch.cli, "start", lambda *args, **options: 0)
    for _ in range(2):
        code, out, _ = referral("demo", "--run", "run", "--quick")
        assert code == 0 and "only a look at every stage" in out.splitlines()[0]
    assert rendered == [0]


def test_a_demo_of_other_glyphs_wants_another_run(tmp_path, referral):
    data = tmp_path / "run" / "data"
    data.mkdir(parents=True)
    (data / "a.tar").touch()
    splits = {
        split: {"shards": [{"name": "a.tar", "bytes": 0}]} for split in ("train", "val", "test")
    }
    (data / "manifest.json").write_text(json.dumps({"classes": ["x"], "splits": splits}))
    (data / "demo.json").write_text(json.dumps({"seed": "1"}))
    code, _, err = referral("demo", "--run", tmp_path / "run")
    assert code == 2 and "was made with --seed 1, not with --seed 0" in err


# Ctrl-C and SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_passed_on_command_is_ended_by_a_signal_in_one_line(tmp_path, number):
    """The trainer's process ends with it, and one of the two says so."""
    trainer = tmp_path / "trainer.py"
    trainer.write_text(
        "import sys, time\n"
        "from pipeline.failures import answer\n"
        "def work():\n"
        "    print('begun', flush=True)\n"
        "    time.sleep(60)\n"
        "sys.exit(answer(work))\n"
    )
    program = (
        "import sys\n"
        "import launch.cli\n"
        f"launch.cli.FAKE = [sys.executable, {str(trainer)!r}]\n"
        "sys.argv = ['referral', 'doctor']\n"
        "sys.exit(launch.cli.main())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "interrupted\n"


def test_ctrl_c_while_modules_are_loaded_is_one_line():
    program = (
        "import signal\n"
        "from pipeline.interrupts import end_at_once\n"
        "end_at_once()\n"
        "signal.raise_signal(signal.SIGINT)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 130 and ended.stderr == "interrupted\n"


@pytest.mark.parametrize("name", ["-mine", "--force", "two\nlines", "a 'b' \"c\" $d", "ünï☃"])
def test_a_run_may_have_any_name(short, referral, name):
    code, _, err = referral("run", short.write_config(), "--run", name)
    assert code == 0, err
    for words in (["status"], ["status", "--json"], ["report"], ["cancel"], ["compare"]):
        assert referral(*words, "--", name)[0] == 0, words
