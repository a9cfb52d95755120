"""Status believes the stages' markers and live processes, and the launcher's notes beside them."""

import json
import os
import socket
import time

import pytest

from launch.journal import JobRecord, Journal, end_of_log, read_journal
from launch.plan import plan
from launch.processes import birth
from launch.status import duration, failures, progress, statuses, summary
from pipeline.config import UserError
from pipeline.results import read_results


def look(run, journal=None):
    return {
        status.stage: status
        for status in statuses(run, plan(run), journal or read_journal(run.root))
    }


def running(**known):
    return JobRecord(
        "running", pid=os.getpid(), born=birth(os.getpid()), started=time.time() - 5, **known
    )


def write_metrics(stage, rows, steps=100):
    path = stage.directory / "metrics.jsonl"
    with open(path, "w") as file:
        for step, seconds in rows:
            row = {
                "step": step,
                "steps": steps,
                "loss": 1,
                "seconds": seconds,
                "samples_per_s": 500,
            }
            file.write(json.dumps(row) + "\n")
        file.write(json.dumps({"step": step, "val/loss": 1.0}) + '\n{"step": 9')


def test_what_is_neither_begun_nor_noted_waits(ward):
    assert {status.state for status in look(ward.run()).values()} == {"waiting"}


def test_a_done_stage_is_done_whatever_the_journal_says(ward):
    run = ward.run()
    ward.finish([run.generalist])
    status = look(run, Journal({"generalist": JobRecord("failed")}))["generalist"]
    assert status.state == "done" and status.seconds is not None


def test_a_running_stage_has_progress_and_time_to_go(ward):
    run = ward.run()
    run.generalist.begin()
    write_metrics(run.generalist, [(10, 1.0), (20, 2.0), (30, 3.0)])
    status = look(run, Journal({"generalist": running()}))["generalist"]
    assert (status.state, status.step, status.steps) == ("running", 30, 100)
    assert status.eta_s == pytest.approx(7.0) and status.samples_per_s == 500


def test_a_running_stage_shows_loss_rate_and_val_top_1(ward):
    run = ward.run()
    attempt = run.generalist.begin()
    attempt.publish("metrics.jsonl")
    row = {"step": 10, "steps": 40, "loss": 1.234, "lr": 0.002, "seconds": 5, "samples_per_s": 9}
    lines = [row, {"step": 10, "val/top1": 0.4}, row | {"step": 20, "seconds": 10}]
    attempt.path("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status = look(run, Journal({"generalist": running()}))["generalist"]
    assert progress(status) == (
        "step 20/40 · loss 1.23 · lr 0.002 · val top-1 40.0 % · 9 samples/s · 10 s to go"
    )


@pytest.mark.parametrize("content", ["{", "[]", '{"jobs": 3}', '{"jobs": {"a": {"nothing": 1}}}'])
def test_a_damaged_journal_is_named(ward, content):
    run = ward.run()
    (run.root / "jobs.json").write_text(content)
    with pytest.raises(UserError, match="jobs.json is damaged .*; restore it, or remove it"):
        read_journal(run.root)


@pytest.mark.parametrize("content", ["{}", "[]", "null"])
def test_a_damaged_marker_is_named(ward, content):
    run = ward.run()
    run.generalist.begin()
    (run.generalist.directory / "DONE").write_text(content)
    with pytest.raises(UserError, match="generalist/DONE is damaged"):
        look(run)


def test_metrics_of_an_earlier_attempt_promise_no_time_to_go(ward):
    run = ward.run()
    run.generalist.begin()
    write_metrics(run.generalist, [(10, 1.0), (20, 2.0)])
    os.utime(run.generalist.directory / "metrics.jsonl", (1, 1))
    status = look(run, Journal({"generalist": running()}))["generalist"]
    assert status.state == "running" and status.eta_s is None


def test_a_dead_process_is_not_running(ward):
    run = ward.run()
    run.generalist.begin()
    write_metrics(run.generalist, [(10, 1.0)])
    record = running()
    record.born = "another process that had this pid"
    assert look(run, Journal({"generalist": record}))["generalist"].state == "interrupted"


def test_on_another_host_the_log_must_be_fresh(ward):
    run = ward.run()
    log = run.root / "log.txt"
    log.touch()
    journal = Journal({"generalist": running(log="log.txt")}, host=f"not-{socket.gethostname()}")
    assert look(run, journal)["generalist"].state == "running"
    os.utime(log, (1, 1))
    assert look(run, journal)["generalist"].state == "waiting"


def test_in_a_packed_job_only_what_is_begun_runs(ward):
    run = ward.run("specialists.per_job=3")
    ward.finish([run.specialists[0]])
    run.specialists[1].begin()
    found = look(run, Journal({"specialists/000-002": running()}))
    assert [found[f"specialists/00{index}"].state for index in range(4)] == [
        "done",
        "running",
        "waiting",
        "waiting",
    ]


def test_a_failed_job_shows_the_end_of_its_log_from_this_attempt_on(ward):
    run = ward.run()
    (run.root / "log.txt").write_text("an earlier attempt\nTraceback\nValueError: seven\n")
    record = JobRecord(
        "failed",
        exit_code=1,
        log="log.txt",
        log_start=len("an earlier attempt\n"),
        reason="exit code 1",
    )
    journal = Journal({"generalist": record, "clusters": JobRecord("blocked")})
    found = statuses(run, plan(run), journal)
    assert [status.state for status in found[:3]] == ["failed", "blocked", "blocked"]
    lines = failures(run, found, journal)
    assert "generalist: exit code 1" in lines[0] and lines[1:] == [
        "    Traceback",
        "    ValueError: seven",
    ]


def test_a_stage_of_another_config_is_stale(ward):
    ward.finish([ward.run().generalist])
    found = look(ward.run("train.steps=101"))
    assert found["generalist"].state == "stale" and found["clusters"].state == "waiting"


def test_the_journal_reads_back(ward):
    run = ward.run()
    journal = Journal({"generalist": running(log="x")})
    journal.save(run.root)
    assert (
        read_journal(run.root) == journal and read_journal(run.root).jobs["generalist"].is_running
    )


def test_the_end_of_a_log_is_its_last_lines(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"x" * 100_000 + b"\n" + b"".join(b"%d\n\n" % k for k in range(50)) + b"\xff")
    assert end_of_log(path, lines=3) == ["48", "49", "\ufffd"]
    assert end_of_log(tmp_path / "none") == []


def test_durations_and_sums_read_like_prose(ward):
    assert [duration(s) for s in (None, 4.4, 65, 7261)] == ["", "4 s", "1 min 05 s", "2 h 01 min"]
    run = ward.run()
    ward.finish([run.generalist])
    assert summary(statuses(run, plan(run), Journal())) == "19 stages: 1 done, 18 waiting"


@pytest.mark.parametrize("content", ["{}", "[]", '{"generalist": 3, "ensemble": 3}'])
def test_results_that_somebody_wrote_over_are_named(ward, content):
    (ward.root / "results.json").write_text(content)
    with pytest.raises(UserError, match="results.json is damaged"):
        read_results(ward.root / "results.json")
