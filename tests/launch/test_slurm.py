"""What the launcher makes of Slurm's output, with clients that are shell scripts.

A real Slurm: tests/slurm.
"""

import json
import os
import shlex

import pytest

from launch import slurm
from launch.journal import JobRecord, Journal, read_journal
from launch.plan import plan
from launch.status import statuses
from pipeline.config import UserError


def line(number, state, reason="None", restarts=0, node="", elapsed="0:00"):
    """As squeue prints it, in slurm.COLUMNS."""
    values = (number, state, reason, str(restarts), node, elapsed)
    return "".join(
        value.ljust(width) for value, width in zip(values, slurm.COLUMNS.values(), strict=True)
    )


@pytest.fixture
def clients(tmp_path, monkeypatch):
    """Stand-ins for Slurm's clients, before the real ones: clients(sbatch="shell script", ...)."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CALLS", str(tmp_path / "clients.txt"))

    def make(**scripts):
        for name, script in scripts.items():
            (place / name).write_text(
                f'#!/bin/bash\necho "$(basename "$0") $*" >> "$CALLS"\n{script}\n'
            )
            (place / name).chmod(0o755)

    # Numbers its jobs from 1 on.
    make(
        sbatch="""[ "$1" = --version ] && exit
n=$(grep -c "^sbatch --parsable" "$CALLS"); echo "$n;loopback\"""",
        scontrol='echo "MaxArraySize            = 1001"',
        squeue="",
        scancel="",
    )
    make.calls = lambda name: [
        words
        for words in (tmp_path / "clients.txt").read_text().splitlines()
        if words.startswith(name + " ")
    ]
    make.answer = lambda *lines: make(squeue="printf '%s\\n' " + shlex.join(lines))
    return make


def look(run, records, lines, clients):
    clients.answer(*lines)
    return slurm.look(run, plan(run), Journal(records, runner="slurm")).jobs


def of(*ids, state="waiting"):
    """Records of the jobs of the generalist, the clusters, specialist 0, ... as submitted."""
    names = [
        "generalist",
        "clusters",
        "specialists/000",
        "specialists/001",
        "specialists/002",
        "specialists/003",
    ]
    return {
        name: JobRecord(state, id=number, log=f"logs/{name}.txt")
        for name, number in zip(names, ids, strict=False)
    }


def test_squeues_columns_are_read_by_their_widths():
    number, row = slurm.parse(line("12_3", "RUNNING", "None", 2, "n[1-2]", "1-02:03:04"))
    assert number == "12_3" and row == slurm.Row("RUNNING", "None", 2, "n[1-2]", 93784)
    assert slurm.seconds("INVALID") == slurm.seconds("") == 0 and slurm.seconds("5:07") == 307


@pytest.mark.parametrize(
    "answer, state, reason",
    [
        (line("1", "PENDING", "Priority"), "waiting", "Priority"),
        (line("1", "RUNNING", node="n3", elapsed="1:00", restarts=1), "running", ""),
        (line("1", "COMPLETING"), "running", "ending"),
        (line("1", "FAILED", "NonZeroExitCode"), "failed", "Slurm says FAILED"),
        (line("1", "TIMEOUT", "TimeLimit"), "failed", "Slurm says TIMEOUT, TimeLimit"),
        (line("1", "COMPLETED"), "failed", "Slurm says COMPLETED"),  # and yet there is no DONE
        (line("1", "CANCELLED"), "interrupted", "cancelled"),
        (line("2", "RUNNING"), "failed", "it ended unfinished, and Slurm has forgotten job 1"),
    ],
)
def test_a_job_that_is_not_done_is_what_slurm_says(ward, clients, answer, state, reason):
    record = look(ward.run(), of("1"), [answer], clients)["generalist"]
    assert (record.state, record.reason) == (state, reason)
    if state == "running" and not reason:
        assert record.node == "n3" and record.restarts == 1 and record.attempts == 2


def test_a_done_stage_is_done_whatever_slurm_says(ward, clients):
    run = ward.run()
    ward.finish([run.generalist])
    assert look(run, of("1"), [line("1", "FAILED")], clients)["generalist"].state == "done"


def test_a_log_that_a_node_cannot_open_is_told_as_what_it_is(ward, clients):
    record = look(
        ward.run(), of("1"), [line("1", "FAILED", "JobLaunchFailure", node="n5")], clients
    )["generalist"]
    log = f"{ward.run_path}/logs/generalist.txt"
    assert f"n5 cannot write {log}; the run must lie where" in record.reason


def test_a_job_that_ran_out_of_memory_says_what_makes_it_smaller(ward, clients):
    record = look(ward.run(), of("1"), [line("1", "OUT_OF_MEMORY")], clients)["generalist"]
    assert record.state == "failed" and "out of memory; lower train.batch_size" in record.reason
    assert "slurm.generalist.memory" in record.reason


def test_what_stands_behind_a_lost_job_is_blocked_not_cancelled(ward, clients):
    lines = [
        line("1", "FAILED", node="n1"),
        line("2", "CANCELLED", "DependencyNeverSatisfied"),
        line("3_0", "PENDING"),
    ]
    records = look(ward.run(), of("1", "2", "3_0"), lines, clients)
    clusters = records["clusters"]
    assert clusters.state == "blocked" and clusters.reason == "waits for generalist"
    assert records["specialists/000"].state == "waiting"


def test_a_single_job_that_slurm_has_forgotten_is_no_error(ward, clients):
    clients(squeue='echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    assert slurm.queue(["7"]) == {}


def test_only_what_failed_and_what_stands_behind_it_is_submitted_again(ward, clients):
    run = ward.run("controls.enabled=false")
    ward.finish([run.generalist, run.measure, run.cluster, run.route, run.specialists[0]])
    records = of("1", "2", "3_0", "3_1", "3_2", "3_3") | {
        "ensemble": JobRecord(id="4"),
        "report": JobRecord(id="6"),
    }
    lines = [
        line("3_1", "FAILED", node="n1"),
        line("3_2", "RUNNING"),
        line("3_3", "PENDING"),
        line("4", "PENDING", "Dependency"),
        line("6", "PENDING", "Dependency"),
    ]
    clients.answer(*lines)
    jobs = plan(run)
    journal = slurm.look(run, jobs, Journal(records, runner="slurm"))
    chosen = [job.name for job in slurm.choose(run, jobs, journal)]
    assert chosen == ["specialists/001", "ensemble", "students/main", "report"]
    submitted = slurm.submit(run, jobs, journal)
    assert [number for _, number in submitted] == ["1", "2", "3", "4"]
    assert clients.calls("scancel") == ["scancel 4 6"]  # they would wait for what will never be
    array, ensemble, *_ = clients.calls("sbatch")
    assert "--array=1 " in array and "--dependency=afterok:1:3_2:3_3" in ensemble
    noted = read_journal(run.root).jobs
    assert noted["specialists/001"].id == "1_1" and noted["specialists/002"].id == "3_2"


def test_what_runs_without_a_missing_specialist_is_not_pulled_from_under(ward, clients):
    run = ward.run("ensemble.allow_missing=true")
    ward.finish([run.generalist, run.measure, run.cluster, run.route, *run.specialists[1:]])
    clients.answer(line("3_0", "FAILED"), line("4", "RUNNING"))
    records = {"specialists/000": JobRecord(id="3_0"), "ensemble": JobRecord(id="4")}
    journal = slurm.look(run, plan(run), Journal(records, runner="slurm"))
    with pytest.raises(
        UserError, match=r"ensemble \(job 4\) is running without specialists/000; wait"
    ):
        slurm.choose(run, plan(run), journal)


def test_a_refused_batch_takes_back_those_before_it(ward, clients):
    clients(
        sbatch="""n=$(grep -c "^sbatch --parsable" "$CALLS")
[ $n -lt 3 ] && echo $n && exit
echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy" >&2; exit 1"""
    )
    run = ward.run()
    with pytest.raises(UserError) as error:
        slurm.submit(run, plan(run), Journal())
    assert str(error.value).splitlines() == [
        "specialists was not submitted: sbatch: Batch job submission failed: "
        "Job violates accounting/QOS policy",
        "what was submitted before it is cancelled: 1 (generalist), 2 (clusters)",
    ]
    assert clients.calls("scancel") == ["scancel 1 2"]
    assert read_journal(run.root).jobs["clusters"].state == "interrupted"


def test_jobs_that_could_not_be_taken_back_are_listed(ward, clients):
    clients(
        sbatch='[ "$(grep -c "^sbatch --parsable" "$CALLS")" = 1 ] && echo 41 && exit; exit 3',
        scancel="exit 1",
    )
    with pytest.raises(
        UserError,
        match=r"still queued, for they could not be cancelled \(scancel: exit code 1\): 41",
    ):
        slurm.submit(ward.run(), plan(ward.run()), Journal())
    assert read_journal(ward.run_path).jobs["generalist"].id == "41"


def test_a_backslash_in_the_runs_name_is_refused(ward, clients):
    ward.run_path = ward.root / "a\\b"
    with pytest.raises(UserError, match="doubles the backslashes"):
        slurm.submit(ward.run(), plan(ward.run()), Journal())


def test_a_client_that_is_not_there_or_silent_or_unhappy_is_one_clear_line(clients, monkeypatch):
    clients(squeue="sleep 5", sbatch='echo "sbatch: fatal: no" >&2; exit 1')
    with pytest.raises(UserError, match="squeue did not answer within 0.2 s"):
        slurm.ask(["squeue"], timeout=0.2)
    with pytest.raises(UserError, match="^sbatch: no$"):
        slurm.ask(["sbatch"])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        UserError, match="sbatch is not on the PATH: .*login node.* leave out --on slurm"
    ):
        slurm.ask(["sbatch"])


def test_the_runs_site_file_goes_before_the_users_and_gives_sbatch_its_variables(
    ward, clients, monkeypatch, capfd
):
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    home = ward.root / "home" / ".config" / "referral" / "site.sh"
    home.parent.mkdir(parents=True)
    home.write_text("echo hello\nexport SBATCH_PARTITION='a b' OTHER=1\n")
    run = ward.run()
    variables = slurm.environment(run.root)
    assert variables["SBATCH_PARTITION"] == "a b"
    assert "OTHER" not in variables and "SLURM_JOB_ID" not in variables
    (run.root / "site.sh").write_text("export SBATCH_PARTITION=mine\n")
    assert slurm.environment(run.root)["SBATCH_PARTITION"] == "mine"
    (run.root / "site.sh").write_text("modul load cuda\n")
    slurm.environment(run.root)
    assert "modul: command not found" in capfd.readouterr().err
    (run.root / "site.sh").write_text("exit 3\n")
    with pytest.raises(UserError, match="site.sh ended the shell that read it, with exit code 3"):
        slurm.environment(run.root)


def test_a_job_that_slurm_says_runs_and_that_writes_nothing_is_doubted(ward, clients):
    run = ward.run()
    jobs = plan(run)
    clients.answer(line("1", "RUNNING", node="n1", elapsed="11:00"))
    journal = slurm.look(run, jobs, Journal(of("1"), runner="slurm"))
    assert statuses(run, jobs, journal)[0].detail == "nothing written for 11 min 00 s"
    metrics = run.generalist.begin().path("metrics.jsonl")
    metrics.touch()
    (run.generalist.directory / "metrics.jsonl").symlink_to(metrics)
    assert statuses(run, jobs, journal)[0].detail == ""


# The command line


def test_run_submits_status_tells_cancel_cancels(ward, clients, referral):
    code, out, err = referral("run", ward.write_config(), "--run", "run", "--on", "slurm")
    assert code == 0 and "specialists x 4" in out and "11 submissions in" in out, err
    waiting = [line(str(k), "PENDING", "Dependency") for k in range(2, 12)]
    clients.answer(line("1", "RUNNING", node="n1", elapsed="0:30"), *waiting)
    code, out, _ = referral("status", "run")
    row = next(row.split() for row in out.splitlines() if row.startswith("generalist"))
    assert row[:6] == ["generalist", "running", "1", "n1", "30", "s"]
    found = json.loads(referral("status", "run", "--json")[1])
    second = found["stages"][1]
    assert found["runner"] == "slurm" and second["id"] == "2" and second["detail"] == "Dependency"
    code, out, _ = referral("cancel", "run")
    assert code == 0 and "cancelled" in out
    assert clients.calls("scancel")[0].startswith("scancel 1 2 ")
    assert "no job is queued" in referral("cancel", "run")[1]


def test_status_without_slurms_answer_says_so_and_what_the_run_directory_says(
    ward, clients, referral
):
    run = ward.run()
    ward.finish([run.generalist])
    Journal(of("1", "2"), runner="slurm").save(run.root)
    clients(squeue='echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1')
    code, out, _ = referral("status", "run")
    assert code == 0 and "1 done" in out
    assert "Slurm does not answer: squeue: slurm_load_jobs error: Unable" in out


def test_a_run_in_slurm_is_not_started_here_too(ward, clients, referral):
    run = ward.run()
    Journal(of("1"), runner="slurm").save(run.root)
    clients.answer(line("1", "RUNNING"))
    code, _, err = referral("run", ward.write_config(), "--run", "run")
    message = (
        "has 1 jobs of `referral run` in Slurm (1); to go on otherwise, first: referral cancel"
    )
    assert code == 2 and message in err


def test_without_sbatch_nothing_is_written(ward, referral, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, err = referral("run", ward.write_config(), "--run", "run", "--on", "slurm")
    assert code == 2 and err.startswith("error: sbatch is not on the PATH")
    assert not ward.run_path.exists()
    code, out, _ = referral("run", ward.toml, "--run", "run", "--on", "slurm", "--dry-run")
    assert code == 0 and "report=$(sbatch " in out and "#SBATCH --requeue" in out
    assert not ward.run_path.exists()


@pytest.mark.parametrize("count", [200])
def test_200_specialists_are_as_many_submissions_as_one(ward, clients, count):
    ward.write_manifest([f"class {k}" for k in range(count)])
    run = ward.run(f"clusters.num_groups={count}")
    assert len(slurm.submit(run, plan(run), Journal())) == 11
    assert len(read_journal(run.root).jobs) == count + 10
