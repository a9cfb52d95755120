"""How long a run will still take: by what its stages took, on as many slots as there are."""

import pytest

from launch.forecast import makespan, seconds_to_go
from launch.plan import Job, plan
from launch.status import StageStatus, summary


def job(name, waits_for=(), processes=1, chain=0.0):
    return Job(name, (), processes, tuple(waits_for), chain)


@pytest.mark.parametrize("slots, expected", [(1, 34), (2, 27), (3, 26), (9, 26)])
def test_jobs_share_the_slots_and_wait_for_their_inputs(slots, expected):
    first, last = job("a", chain=3), job("d", ["b", "c", "e"], chain=1)
    middle = [job(name, ["a"], chain=2) for name in "bce"]
    costs = {"a": 10, "b": 7, "c": 3, "e": 5, "d": 9}
    assert makespan([first, *middle, last], costs, slots) == expected


def test_a_job_of_several_ranks_takes_several_slots():
    jobs = [job("a", processes=2, chain=2), job("b", chain=1)]
    assert makespan(jobs, {"a": 5, "b": 4}, slots=2) == 9
    assert makespan(jobs, {"a": 5, "b": 4}, slots=3) == 5
    assert makespan(jobs, {"a": 5, "b": 4}, slots=1) == 9


def test_what_is_done_takes_no_time():
    jobs = [job("a"), job("b", ["a"])]
    assert makespan(jobs, {"a": 0, "b": 4}, slots=1) == 4 and makespan([], {}, 1) == 0


@pytest.fixture
def run(ward):
    """Generalist 100 steps, two specialists of 20, no controls, no student."""
    del ward.values["students"]
    return ward.run("controls.enabled=false", "clusters.num_groups=2")


def looked_at(run, **states):
    """What `status` says: (state, seconds, eta_s) by place, all others waiting."""
    stages = []
    for stage in run.stages:
        state, seconds, eta_s = states.get(stage.place.replace("/", "_"), ("waiting", None, None))
        stages.append(StageStatus(stage.place, "", state, seconds=seconds, eta_s=eta_s))
    return stages


def test_before_anything_has_shown_its_pace_nothing_is_foretold(run):
    assert seconds_to_go(run, plan(run), looked_at(run), 2) is None
    assert "to go" not in summary(looked_at(run), None)


def test_what_has_not_begun_takes_as_long_as_its_steps_at_the_pace_so_far(run):
    stages = looked_at(run, generalist=("running", 30.0, 70.0))  # 100 steps: 1 s each
    assert seconds_to_go(run, plan(run), stages, 1, 0) == pytest.approx(70 + 2 * 20)
    assert seconds_to_go(run, plan(run), stages, 2, 0) == pytest.approx(70 + 20)


def test_a_finished_specialist_says_how_long_the_others_take(run):
    stages = looked_at(run, generalist=("done", 100.0, None), specialists_000=("done", 35.0, None))
    assert seconds_to_go(run, plan(run), stages, 1, 0) == pytest.approx(35)
    assert summary(stages, 35.0).endswith("; about 35 s to go")


def test_each_job_that_has_not_begun_has_to_start(run):
    stages = looked_at(run, generalist=("running", 30.0, 70.0))
    waiting = len(plan(run)) - 1
    forecast = seconds_to_go(run, plan(run), stages, 1, start_s=2)
    assert forecast == pytest.approx(70 + 2 * 20 + 2 * waiting)
