"""On a pretended accelerator: no operator mixes its tensors with the host's, and who waits for it.

Every stage of a run, by one rank and by two, whose collectives refuse host tensors as NCCL does.
tests/support/pretended.py is the device. An operator or a collective that it refuses ends a run.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import gloo_environment, on_ranks
from toy import write_toy

HERE = Path(__file__).parent
RUN = HERE / "pretended_run.py"
FEW = ("clusters.num_groups=2", "controls.enabled=false")
LIVE = 'students.live={steps=8, learning_rate=0.003, answers="live"}'


def program(script: str, *arguments: object) -> str:
    """The last line that a script of this folder prints, in a process of its own."""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    ended = subprocess.run(
        command, env=gloo_environment(), capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return (ended.stdout.splitlines() or [""])[-1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few examples, but more than the steps of a training see: no epoch ends."""
    return write_toy(tmp_path_factory.mktemp("data"), {"train": 60, "val": 6, "test": 6})


@pytest.fixture(scope="module")
def one_rank(data, tmp_path_factory):
    return json.loads(program(RUN.name, data, tmp_path_factory.mktemp("run"), *FEW, LIVE))


def waits(turn: dict[str, int], kind: str) -> int:
    return sum(times for where, times in turn.items() if where.startswith(kind))


def test_the_device_refuses_what_a_gpu_refuses_and_counts_what_it_waits_for():
    program("strictness.py")


def test_every_stage_runs_without_a_tensor_of_the_host_among_the_devices(one_rank):
    stages = one_rank["stages"]
    done = {name.split("/")[0] for name in stages}
    asked = {"generalist", "clusters", "diagnosis", "routed", "specialists", "ensemble"}
    assert asked | {"targets", "students", "evaluation", "report"} <= done
    # Measuring brings its answers to the host, so the device was asked.
    for name in ("clusters/statistics", "ensemble", "targets/ensemble", "evaluation"):
        assert waits(stages[name], "read") > 0, name


@pytest.mark.parametrize("name", ["generalist", "specialists/000", "students/main"])
def test_no_turn_of_a_loop_of_one_rank_waits_for_the_device(one_rank, name):
    """Of students those with stored targets: a live ensemble's rows depend on its answers."""
    turns = one_rank["trained"][name]
    assert len(turns) >= 4
    assert turns == [{}] * len(turns)


def test_eq_5_of_4096_rows_and_16_specialists_waits_at_most_10_times():
    turn = json.loads(program("waits_of_combining.py"))
    assert sum(turn.values()) <= 10, turn


@pytest.fixture(scope="module")
def two_ranks(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "two"
    return json.loads(on_ranks(2, RUN, data, root, *FEW).splitlines()[-1])


@pytest.mark.slow
def test_two_ranks_exchange_tensors_of_the_device_alone(two_ranks):
    assert {"generalist", "ensemble", "evaluation", "report"} <= set(two_ranks["stages"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generalist", "specialists/000", "students/main"])
def test_a_turn_of_two_ranks_waits_for_nothing_but_the_signal_to_stop(two_ranks, name):
    for turn in two_ranks["trained"][name]:
        assert all(" trainer/distributed/ranks.py" in where for where in turn), turn


@pytest.mark.slow
def test_a_turn_of_two_ranks_waits_at_most_once(two_ranks):
    for turns in two_ranks["trained"].values():
        usual = statistics.median(sum(turn.values()) for turn in turns)
        assert usual <= 1, turns


@pytest.mark.slow
def test_a_turn_with_a_sharded_head_waits_for_nothing_but_the_signal_to_stop(data, tmp_path):
    """Ranks train on as many rows each, and so exchange no sizes. In a validation they do."""
    words = ("stages=generalist", "engine.shard_head=true")
    ran = json.loads(on_ranks(2, RUN, data, tmp_path / "run", *FEW, *words).splitlines()[-1])
    turns = ran["trained"]["generalist"]
    assert len(turns) >= 4
    for turn in turns:
        assert all(" trainer/distributed/ranks.py" in where for where in turn), turn
    of_sizes = [w for w in ran["stages"]["generalist"] if " trainer/engines/sharded.py" in w]
    assert of_sizes, "the last batch of a validation may be shorter on one rank"
