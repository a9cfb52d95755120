"""The pool: what runs, when, how often, and what is left of it."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

import launch.local
from launch.display import Display
from launch.journal import read_journal
from launch.plan import plan
from launch.results import groups_line, metrics_of


@pytest.fixture
def small(ward):
    """A run without controls and students, done up to the specialists. Of these, `left` are not."""
    del ward.values["students"]

    def make(*overrides, left=(0, 1, 2, 3)):
        run = ward.run("controls.enabled=false", *overrides)
        ward.finish([run.generalist, run.measure, run.cluster, run.route])
        ward.finish(stage for index, stage in enumerate(run.specialists) if index not in left)
        return run

    return make


def display():
    out, err = io.StringIO(), io.StringIO()
    return Display(Console(file=out, width=200), Console(file=err, width=200)), out, err


def states(run):
    return {name: record.state for name, record in read_journal(run.root).jobs.items()}


def test_a_run_ends_with_every_stage_done_and_each_behind_its_inputs(ward, small):
    run = small()
    assert ward.pool(run).execute() == 0
    assert all(stage.is_done for stage in run.stages)
    calls = ward.calls()
    for stage in run.stages[4:]:
        for wanted in stage.inputs:
            if wanted in run.stages[4:]:
                assert calls.index(("end", wanted.place)) < calls.index(("begin", stage.place))
    assert set(states(run).values()) == {"done"}


def test_done_stages_are_not_run_again(ward, small):
    run = small(left=[0, 3])
    assert ward.pool(run).execute() == 0
    begun = [place for _, place in ward.calls("begin")]
    assert sorted(begun[:2]) == ["specialists/000", "specialists/003"]
    assert begun[2:] == ["ensemble", "evaluation", "report"]


@pytest.mark.parametrize("size", [1, 3])
def test_no_more_jobs_run_than_the_pool_holds(ward, small, size):
    run = small(f"launch.pool={size}")
    ward.behave(
        **{f"specialists/{index:03d}": {"steps": 6} for index in range(4)},
        ensemble={"exit": 1, "times": 1},
    )
    ward.pool(run).execute()
    running = most = 0
    for word, _ in ward.calls():
        running += {"begin": 1, "end": -1, "fail": -1}[word]
        most = max(most, running)
    assert most == size


def test_the_generalists_ranks_count_against_the_pool(ward):
    run = ward.run("launch.processes=3", "launch.pool=4")
    pool = ward.pool(run)
    pool._start(pool.jobs[0])
    assert pool.free == [3]
    pool._stop()


def test_a_job_of_several_ranks_keeps_free_slots_from_shorter_chains(ward):
    """Else trainings of one rank would take each slot that becomes free, and it would come last."""
    settings = ("launch.processes=2", "launch.pool=2", "students.main.steps=1000")
    run = ward.run(*settings, "controls.twins=none")
    before = [run.generalist, run.measure, run.cluster, run.diagnosis, run.route]
    ward.finish([*before, *run.specialists])
    pool = ward.pool(run)
    pool.free = [1]
    pool._start_ready()  # a wall is ready too, and would fit
    assert pool.children == {} and pool.free == [1]
    pool.free = [0, 1]
    pool._start_ready()
    assert list(pool.children) == ["ensemble"] and pool.free == []
    pool._stop()


def test_more_ranks_than_slots_take_the_whole_pool(ward):
    pool = ward.pool(ward.run("launch.processes=8", "launch.pool=2"))
    pool._start(pool.jobs[0])
    assert pool.free == []
    pool._stop()


def test_each_slot_has_its_gpu(ward):
    pool = ward.pool(ward.run("launch.pool=4"), devices=["GPU-a", "GPU-b"])
    assert [pool._environment([slot])["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == [
        "GPU-a",
        "GPU-b",
        "GPU-a",
    ]
    assert pool._environment([0, 1])["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    assert pool._environment([0])["OMP_NUM_THREADS"] == "1"


def test_a_failed_specialist_stops_neither_the_others_nor_is_it_passed_over(ward, small):
    run = small()
    ward.behave(specialists__001={"exit": 1, "times": 9, "says": "RuntimeError: out of luck"})
    shown, _, errors = display()
    assert ward.pool(run, display=shown).execute() == 1
    assert [stage.is_done for stage in run.specialists] == [True, False, True, True]
    assert states(run)["specialists/001"] == "failed" and states(run)["ensemble"] == "blocked"
    assert not run.evaluate.is_done
    for words in ("specialists/001", "RuntimeError: out of luck", "ensemble.allow_missing"):
        assert words in errors.getvalue()


def test_allow_missing_ends_without_a_failed_specialist_and_takes_it_in_when_it_is_fixed(
    ward, small
):
    run = small("ensemble.allow_missing=true", left=[0, 1])
    ward.behave(specialists__001={"exit": 1, "times": 1})
    assert ward.pool(run).execute() == 1
    assert run.report.is_done and not run.specialists[1].is_done
    assert ward.pool(run).execute() == 0
    places = [place for _, place in ward.calls("end")]
    assert places.count("specialists/000") == 1
    assert places.count("specialists/001") == 1
    assert [places.count(place) for place in ("ensemble", "evaluation", "report")] == [2, 2, 2]


def test_a_job_is_tried_again_as_often_as_the_config_says(ward, small):
    run = small("launch.retries=2", left=[2])
    ward.behave(specialists__002={"exit": 1, "times": 2})
    assert ward.pool(run).execute() == 0
    assert ward.calls("fail") == [("fail", "specialists/002")] * 2


def test_75_means_start_me_again_and_is_no_failure(ward, small):
    run = small(left=[2])
    ward.behave(specialists__002={"exit": 75, "times": 3, "saves": True})
    assert ward.pool(run).execute() == 0
    assert len(ward.calls("fail")) == 3


def test_75_without_a_newer_checkpoint_is_a_failure_and_does_not_spin(ward, small):
    run = small(left=[2])
    ward.behave(specialists__002={"exit": 75, "times": 99, "steps": 1})
    assert ward.pool(run).execute() == 1
    assert len(ward.calls("fail")) == 1


def test_an_error_of_the_users_is_told_in_the_trainers_words_and_not_tried_again(ward, small):
    run = small("launch.retries=3", left=[])
    says = "warning: x\nerror: val has no examples of class 7"
    ward.behave(ensemble={"exit": 2, "times": 9, "says": says})
    shown, _, errors = display()
    assert ward.pool(run, display=shown).execute() == 2
    assert errors.getvalue().splitlines()[0] == "error: val has no examples of class 7"
    reason = read_journal(run.root).jobs["ensemble"].reason
    assert reason == "val has no examples of class 7"  # what `status` shows
    assert len(ward.calls("fail")) == 1


@pytest.mark.parametrize("code", [137, -9])
def test_a_job_that_was_killed_is_named_and_not_tried_again_as_it_is(ward, small, code):
    run = small("launch.retries=3", left=[2])
    pool = ward.pool(run)
    job = next(job for job in pool.jobs if job.name == "specialists/002")
    pool._start(job)
    pool.children[job.name].wait()
    run.specialists[2].clear()
    pool._ended(job, code)
    record = pool.journal.jobs[job.name]
    assert record.state == "failed"
    assert record.reason == (
        "killed by signal 9 (SIGKILL), probably out of memory; lower specialists.batch_size "
        "(or raise specialists.accumulation), or lower launch.pool"
    )


def test_a_finished_stage_prints_what_it_took_and_its_metric(ward, small):
    run = small(left=[1])
    with open(run.specialists[0].path("summary.json"), "w") as file:
        json.dump({"val": {"top1": 0.7614}}, file)
    assert metrics_of(run.specialists[:2]) == ["val top-1 76.1 %"]
    assert metrics_of(run.specialists[1:2]) == []
    shown, out, _ = display()
    assert ward.pool(run, display=shown).execute() == 0
    assert "specialists/001 done in " in out.getvalue()


def test_exit_0_without_the_stage_done_is_a_failure(ward, small):
    run = small(left=[])
    ward.behave(ensemble={"exit": 0, "times": 9})
    shown, _, errors = display()
    assert ward.pool(run, display=shown).execute() == 1
    assert "ended without finishing ensemble" in errors.getvalue()


def test_a_done_stage_counts_whatever_the_exit_code(ward, small, monkeypatch):
    """The markers are the truth: a crash after DONE lost nothing."""
    run = small(left=[])
    pool = ward.pool(run)
    job = next(job for job in pool.jobs if job.name == "ensemble")
    pool._start(job)
    pool.children["ensemble"].wait()
    pool.children["ensemble"].returncode = 1
    pool._reap()
    assert states(run)["ensemble"] == "done"


# Processes that end as processes do


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def children_of(run: Path) -> list[int]:
    """Processes that have RUN on their command line, the launcher left out."""
    pids = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(run).encode() in words and any(word.endswith(b"fake_trainer.py") for word in words):
            pids.append(int(entry.name))
    return pids


@pytest.fixture
def long_run(ward):
    """A launcher with two specialists at work, as a process."""
    del ward.values["students"]
    ward.values |= {"controls": {"enabled": False}}
    run = ward.run()
    ward.finish([run.generalist, run.measure, run.cluster, run.route])
    ward.behave(**{f"specialists/{index:03d}": {"steps": 400} for index in range(4)})
    started = []

    def make(**behaviour):
        if behaviour:
            ward.behave(
                **{f"specialists/{index:03d}": {"steps": 400} for index in range(4)}, **behaviour
            )
        launcher = ward.start("run", ward.write_config(), "--run", ward.run_path)
        started.append(launcher)
        until(lambda: len(ward.calls("begin")) == 2 or launcher.poll() is not None)
        assert launcher.poll() is None, launcher.communicate()
        return launcher, run

    yield make
    for launcher in started:
        launcher.kill()
        launcher.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_killed_launcher_leaves_no_child_and_a_run_that_resumes(ward, long_run):
    launcher, run = long_run()
    assert len(children_of(run.root)) == 2
    launcher.kill()
    launcher.wait()
    until(lambda: not children_of(run.root), seconds=3)
    ward.behave()
    assert ward.pool(run).execute() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_lets_children_write_a_checkpoint_and_ends_with_130(ward, long_run, number):
    launcher, run = long_run()
    launcher.send_signal(number)
    out, err = launcher.communicate(timeout=15)
    assert launcher.returncode == 130, err
    assert len(ward.calls("checkpoint")) == 2
    assert "the same command resumes" in out and "Traceback" not in err
    assert not children_of(run.root)
    assert {state for state in states(run).values() if state not in ("done", "waiting")} == {
        "interrupted"
    }


def test_cancel_lets_the_launcher_stop_and_retry_resumes(ward, long_run, referral):
    launcher, run = long_run()
    then = f"To go on with it:\nnext: referral retry {run.root}\n"
    assert referral("cancel", run.root)[:2] == (0, f"{run.root}: stopped\n{then}")
    assert launcher.wait(timeout=15) == 130 and len(ward.calls("checkpoint")) == 2
    assert referral("cancel", run.root)[:2] == (0, f"{run.root}: nothing is running\n{then}")
    ward.behave()
    code, out, err = referral("retry", run.root)
    assert code == 0 and "fewer top-1 errors" in out, err


def test_a_run_under_nohup_outlives_its_terminal(ward):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    pool = ward.pool(ward.run())
    try:
        with launch.local._signals(pool):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        assert pool.requested == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


def test_children_that_do_not_heed_are_killed(ward, small, monkeypatch):
    monkeypatch.setattr(launch.local, "GRACE_S", 0.3)
    run = small()
    ward.behave(deaf=True, specialists__000={"steps": 400})
    pool = ward.pool(run)
    pool._start_ready()
    until(lambda: ward.calls("begin"))
    pool._stop()
    assert not children_of(run.root)


@pytest.mark.slow
def test_torchrun_ends_with_the_code_of_the_rank_that_failed_and_takes_its_ranks_along(tmp_path):
    """No stage is needed: `trainer` itself refuses an unknown run with exit code 2."""
    command = [*launch.local.torchrun(2), "generalist", "--run", str(tmp_path / "none")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert "error:" in ended.stderr and "Traceback" not in ended.stderr


def test_the_terminal_tells_what_the_groups_hold_before_specialists_are_paid_for(small):
    run = small(left=[2])
    assert groups_line(run) is None
    summary = {"captured": 0.963, "chance": 0.176, "sizes": [54, 137, 80], "skipped": [2]}
    (run.cluster.directory / "summary.json").write_text(json.dumps(summary))
    assert groups_line(run).startswith(
        "3 groups of 54 to 137 classes hold 96.3 % of the generalist's errors on val "
        "(chance 17.6 %); 1 get no specialist (clusters.min_gain, clusters.specialists); "
        "what each can gain at most: "
    )
    (run.cluster.directory / "summary.json").write_text(
        json.dumps(summary | {"captured": None, "skipped": []})
    )
    assert groups_line(run).startswith(
        "3 groups of 54 to 137 classes are not judged, since the generalist makes no error on val; "
    )
    old = "val has 9 examples for 3 classes: predictions are measured on train"
    run.measure.begin("attempt").finish()
    run.measure.path("log-0.txt").write_text(f"2026-01-01 00:00:00,000 {old}\n")
    (run.cluster.directory / "summary.json").write_text(json.dumps(summary))
    assert "96.3 % of the generalist's errors on train (chance" in groups_line(run)
    (run.cluster.directory / "summary.json").write_text(json.dumps(summary | {"split": "val"}))
    assert "96.3 % of the generalist's errors on val (chance" in groups_line(run)


def moved_while_running(ward, run, move) -> tuple[str, Path]:
    """What the launcher says once `move` was done with RUN while a job ran, and where RUN went."""
    ward.behave(specialists__000={"steps": 60}, specialists__001={"steps": 60})
    elsewhere = ward.root / "elsewhere"
    with ward.start("run", ward.write_config(), "--run", run.root) as started:
        while not ward.calls("begin"):
            assert started.poll() is None, started.communicate()
            time.sleep(0.02)
        move(run.root, elsewhere)
        _, err = started.communicate(timeout=30)
        assert started.returncode == 2
    return err, elsewhere


def renamed(root, elsewhere):
    root.rename(elsewhere)


def removed(root, elsewhere):
    shutil.rmtree(root, ignore_errors=True)


def replaced(root, elsewhere):
    root.rename(elsewhere)
    root.mkdir()
    (root / "mine").touch()


@pytest.mark.parametrize("move", [renamed, removed, replaced])
def test_a_run_that_is_moved_or_removed_while_it_runs_ends_in_one_line(ward, small, move):
    run = small()
    err, elsewhere = moved_while_running(ward, run, move)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and f"{run.root}: it was moved or removed while this ran" in lines[0]
    assert "Traceback" not in err
    left = sorted(path.name for path in run.root.rglob("*")) if run.root.exists() else []
    assert left == (["mine"] if move is replaced else [])
    assert elsewhere.exists() == (move is not removed)


def test_a_log_that_is_a_link_in_a_run_of_somebody_elses_is_not_written_to(ward, small, referral):
    run = small(left=[0])
    victim = ward.root / "profile"
    victim.write_text("mine\n")
    (run.root / "logs").mkdir()
    for job in plan(run):
        (run.root / job.log).symlink_to(victim)
    code, _, err = referral("run", ward.write_config(), "--run", run.root)
    assert code == 2 and "it is a link, and what it leads to is not written" in err
    assert victim.read_text() == "mine\n"
