"""What clusters do to jobs, on a real Slurm, with a trainer that only touches the run directory."""

import re

import pytest
from cluster import ENDED

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]


def finished(ward):
    ward.wait_for_end()
    return set(ward.states().values()) == {"done"}


def test_the_whole_graph_runs_in_arrays_no_larger_than_the_site_allows(ward):
    said = ward.submit("slurm.throttle=2")
    assert "specialists x 4" in said and "specialists-4+ x 1" in said and "6 submissions" in said
    assert finished(ward)
    assert "fewer top-1 errors" in ward.submit()
    assert "fewer top-1 errors" in ward.referral("retry", ward.run)
    status = ward.status()
    assert status["specialists/002"]["id"].endswith("_2")
    assert status["specialists/002"]["node"].startswith("n")
    assert status["specialists/002"]["log"] == "logs/specialists-002.txt"
    assert status["specialists/004"]["log"] == "logs/specialists-4+-000.txt"
    assert (ward.run / status["specialists/004"]["log"]).exists()


def test_8_gpus_lead_to_8_ranks_of_every_job(ward):
    ward.submit("slurm.default.gpus=8", "slurm.specialists.gpus=1", "controls.enabled=true")
    ward.wait_for_end()
    assert set(ward.states().values()) == {"done"}
    for job in ward.jobs():
        lines = re.findall(r"\d+ ranks, \d+ GPUs", ward.log(job))
        assert lines == ([] if job.startswith("specialists") else ["8 ranks, 8 GPUs"]), job


def test_gpus_that_would_idle_are_refused_before_anything_is_submitted(ward):
    said = ward.submit("specialists.kind=branch", "slurm.default.gpus=8", code=2)
    assert said.startswith("error: slurm.specialists reserves 8 GPUs, and specialists/000-004 has")
    assert ward.cluster.jobs() == {} or set(ward.cluster.jobs().values()) <= ENDED


def test_packs_of_specialists_share_a_job(ward):
    assert "specialists-pack x 3" in ward.submit("specialists.per_job=2")
    assert finished(ward)
    assert ward.jobs()["specialists/002-003"]["log"] == "logs/specialists-pack-001.txt"
    assert "try 1: specialist --index 2 3" in ward.log("specialists/002-003")
    assert "--index 4\n" in ward.log("specialists/004")


def test_an_element_that_always_fails_is_tried_as_often_as_said_and_named_and_retry_resumes(ward):
    ward.behave(specialists__001={"exit": 1, "times": 9, "says": "RuntimeError: out of luck"})
    ward.submit()
    ward.wait_for_end()
    states = ward.states()
    of_specialists = [states[f"specialists/00{k}"] for k in range(5)]
    assert of_specialists == ["done", "failed", "done", "done", "done"]
    assert states["ensemble"] == states["report"] == "blocked"
    assert ward.log("specialists/001").count("RuntimeError: out of luck") == 2  # launch.retries = 1
    said = ward.referral("status", ward.run)
    assert "specialists/001: Slurm says FAILED" in said and "    RuntimeError: out of luck" in said
    ward.behave()
    said = ward.referral("retry", ward.run)
    assert "specialists x 1" in said and "3 submissions" in said
    assert finished(ward)
    assert ward.log("specialists/000").count("--- ") == 1  # what was done was not done again


def test_a_mistake_of_the_users_is_not_tried_again(ward):
    ward.behave(generalist={"exit": 2, "times": 9, "says": "error: val has no examples of class 7"})
    ward.submit()
    ward.wait_for_end()
    assert ward.log("generalist").count("error: val has no examples") == 1
    assert "    error: val has no examples of class 7" in ward.referral("status", ward.run)


def test_allow_missing_ends_without_a_failed_one_and_takes_it_in_when_it_is_fixed(ward):
    ward.behave(specialists__001={"exit": 1, "times": 9})
    ward.submit("ensemble.allow_missing=true")
    ward.wait_for_end()
    states = ward.states()
    assert states.pop("specialists/001") == "failed" and set(states.values()) == {"done"}
    ward.behave()
    # The specialist, the ensemble, the report.
    assert "3 submissions" in ward.referral("retry", ward.run)
    assert finished(ward)


def test_a_job_that_asks_for_it_is_queued_again_with_its_log_and_its_dependents(ward):
    """As after a time limit: a signal, a checkpoint, exit code 75."""
    ward.behave(specialists__003={"exit": 75, "times": 1, "steps": 60})
    ward.submit()
    ward.wait_until(lambda: ward.status()["specialists/003"]["restarts"] == 1, "a restart")
    assert finished(ward)
    log = ward.log("specialists/003")
    assert "restarts 0, try 1" in log and "restarts 1, try 1" in log
    assert "asks to be started again" in log


def test_scontrol_requeue_of_one_element_begins_it_again_alone(ward):
    ward.behave(specialists__002={"steps": 100})
    ward.submit()
    ward.wait_until(lambda: ward.states()["specialists/002"] == "running", "the specialist's start")
    ward.cluster.client("scontrol", "requeue", ward.ids()["specialists/002"])
    assert finished(ward)
    assert ward.starts("specialists/002") == 2 and ward.starts("specialists/001") == 1


def test_scancel_of_one_element_blocks_what_needs_it_until_retry(ward):
    ward.behave(specialists__002={"steps": 200})
    ward.submit()
    ward.wait_until(lambda: ward.states()["specialists/002"] == "running", "the specialist's start")
    ward.cluster.client("scancel", ward.ids()["specialists/002"])
    ward.wait_for_end()
    states = ward.states()
    assert states["specialists/002"] == "interrupted" and states["ensemble"] == "blocked"
    assert ward.starts("specialists/002") == 1  # a cancelled job does not queue again by itself
    ward.behave()
    ward.referral("retry", ward.run)
    assert finished(ward)


def test_cancel_ends_every_job_and_the_same_command_resumes(ward):
    ward.behave(specialists__002={"steps": 200})
    ward.submit()
    last = {"specialists/002", "ensemble", "evaluation", "report"}

    def only_these_are_left() -> bool:
        states = ward.states()
        unfinished = {place for place, state in states.items() if state != "done"}
        return unfinished == last and states["specialists/002"] == "running"

    ward.wait_until(only_these_are_left, "the specialist's start and the end of the others")
    assert "every job that is left is queued already" in ward.submit()
    assert "jobs of `referral run` in Slurm" in ward.referral("run", "--run", ward.run, code=2)
    assert "would be redone" in ward.referral(
        "run", "--run", ward.run, "--on", "slurm", "--set", "train.steps=11", "--force", code=2
    )
    assert "cancelled 3 jobs" in ward.referral("cancel", ward.run)
    assert "no job is queued" in ward.referral("cancel", ward.run)
    assert ward.states()["ensemble"] == "interrupted"
    ward.behave()
    assert "3 submissions" in ward.submit()
    assert finished(ward)


# What Slurm refuses


def test_a_refused_job_takes_back_those_submitted_before_it_in_slurms_own_words(ward):
    said = ward.submit("slurm.report.partition=moon", code=2).splitlines()
    refused = "error: report was not submitted: sbatch: invalid partition specified: moon; "
    assert said[0].startswith(refused)
    assert said[1].startswith("error: what was submitted before it is cancelled: ")
    assert len(said) == 2
    states = ward.states()
    assert states.pop("evaluation") == states.pop("report") == "waiting"
    assert set(states.values()) == {"interrupted"}
    in_slurm = ward.cluster.jobs()
    assert {in_slurm[number] for number in ward.ids().values() if number} == {"CANCELLED"}
    ward.submit()
    assert finished(ward)


def test_a_refused_first_job_leaves_nothing_queued(ward):
    before = ward.cluster.jobs()
    said = ward.submit("slurm.default.constraint=moon", code=2)
    line = r"error: generalist was not submitted: sbatch: .*Invalid feature specification\n"
    assert re.fullmatch(line, said)
    assert ward.cluster.jobs() == before and not (ward.run / "jobs.json").exists()


def test_a_run_that_compute_nodes_cannot_see_is_one_clear_line(ward):
    ward.cluster.start_node("n5", hidden=ward.root)
    ward.cluster.until(
        lambda: "n5" in ward.cluster.client("sinfo", "-h", "-p", "elsewhere", "-t", "idle"), "n5"
    )
    ward.submit("slurm.default.partition=elsewhere")
    ward.wait_for_end()
    detail = ward.status()["generalist"]["detail"]
    assert "JobLaunchFailure" in detail and "n5 cannot write" in detail
    assert "where compute nodes see it" in detail
    states = ward.states()
    assert states.pop("generalist") == "failed" and set(states.values()) == {"blocked"}
    ward.submit()
    assert finished(ward)


def test_no_name_is_executed_or_taken_for_anything_but_a_name(ward):
    ward.run = ward.root / "-x y'z\"$(touch pwned)`touch pwned`;#&|%j%%3a*?[1]~\nline"
    ward.submit()
    assert finished(ward)
    assert not list(ward.root.rglob("pwned")) and (ward.run / "logs" / "generalist.txt").exists()
