"""stage.sbatch: what it starts, how often, and when it queues again. Srun is a stand-in."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "stage.sbatch"


@pytest.fixture
def job(tmp_path):
    """job(arguments, codes, **environment) -> (exit code, commands that ran on nodes, log)."""
    place = tmp_path / "bin"
    place.mkdir()
    (tmp_path / "a run").mkdir()
    # srun runs the launcher itself, on one node, with the job's environment whatever --export said.
    # python ends with the next of the exit codes.
    (place / "srun").write_text("""#!/bin/bash
while [[ $1 == --* ]]; do shift; done
[ "$SLURM_EXPORT_ENV" = ALL ] || exit 9
SLURM_NODEID=3 SLURMD_NODENAME=n4 exec "$@"
""")
    (place / "python").write_text("""#!/bin/bash
printf '<%s>' "$@" >> "$ROOT/calls"; echo " $PET_NODE_RANK $OMP_NUM_THREADS" >> "$ROOT/calls"
read -r code rest < "$ROOT/codes"; echo "$rest" > "$ROOT/codes"; exit "${code:-0}"
""")
    (place / "scontrol").write_text("""#!/bin/bash
[ "$1" = show ] && [ "$2" = hostnames ] && printf 'n4\\nn5\\n'
[ "$1" = show ] && [ "$2" = job ] &&
    echo "JobId=7 JobState=${STATE:-RUNNING} Reason=None Restarts=${NOW:-0} X=1"
[ "$1" = requeue ] && echo "requeue $2" >> "$ROOT/calls"
exit 0
""")
    for name in ("srun", "python", "scontrol"):
        (place / name).chmod(0o755)

    def call(*arguments, codes="0", **environment):
        (tmp_path / "codes").write_text(codes)
        (tmp_path / "calls").write_text("")
        ended = subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=30,
            cwd=tmp_path,
            env={
                "PATH": f"{place}:{os.environ['PATH']}",
                "HOME": str(tmp_path),
                "ROOT": str(tmp_path),
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NUM_NODES": "1",
                "SLURM_JOB_NODELIST": "n4",
                **environment,
            },
        )
        calls = (tmp_path / "calls").read_text().replace(str(tmp_path), "ROOT").splitlines()
        return ended.returncode, calls, ended.stdout

    return call


def test_one_rank_runs_the_trainer_itself(job):
    code, calls, _ = job("a run", "measure", "cluster")
    assert code == 0 and calls == ["<-P><-m><trainer><measure><cluster><--run><ROOT/a run> 3 1"]


def test_several_ranks_run_under_one_launcher_on_each_node_at_a_port_of_the_jobs_own(job):
    both = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "593"}
    code, calls, _ = job("a run", "generalist", **both)
    call = calls[-1]
    assert code == 0
    assert "<-P><-m><trainer.distributed.torchrun><--nnodes><2><--nproc-per-node><4>" in call
    assert "<--master-port><20488>" in call
    assert call.endswith("<--><generalist><--run><ROOT/a run> 3 1")
    ports = {20000 + (16 * number) % 9000 for number in range(10_000)}
    assert 29500 not in ports and max(ports) < 32768


def test_an_element_of_an_array_takes_its_own_word(job):
    packs = ("a run", "specialist", "0,1,2", "3,4", "5")
    element = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "1"}
    assert job(*packs, **element)[1] == [
        "<-P><-m><trainer><specialist><--index><3><4><--run><ROOT/a run> 3 1"
    ]
    (call,) = job("a run", "specialist", "9")[1]
    assert call.startswith("<-P><-m><trainer><specialist><--index><9>")


def test_controls_and_students_are_named(job):
    assert job("a run", "student", "--name", "main")[1][0].startswith(
        "<-P><-m><trainer><student><--name><main><--run>"
    )


def test_a_failure_is_tried_again_as_often_as_said(job):
    assert len(job("-t", "2", "a run", "ensemble", codes="1 1 0")[1]) == 3
    code, calls, log = job("-t", "1", "a run", "ensemble", codes="1 13 0")
    assert code == 1 and len(calls) == 2 and "n4: exit code 13" in log


def test_what_ran_out_of_memory_is_not_tried_again_as_it_is(job):
    code, calls, log = job("-t", "5", "a run", "ensemble", codes="137 0")
    assert code == 1 and len(calls) == 1
    assert "n4: exit code 137" in log and "probably out of memory" in log


def test_an_error_of_the_users_is_not_tried_again(job):
    code, calls, _ = job("-t", "5", "a run", "ensemble", codes="2 0")
    assert code == 2 and len(calls) == 1


# A checkpoint is written. SIGUSR2 or SIGTERM came before training.
@pytest.mark.parametrize("ended", [75, 140, 143])
def test_after_a_signal_the_job_is_queued_again(job, ended):
    code, calls, log = job("a run", "ensemble", codes=f"{ended} 0")
    assert code == 75 and calls[1:] == ["requeue 7"] and "asks to be started again" in log
    element = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "1"}
    assert job("a run", "specialist", "0", "1", codes="75", **element)[1][1:] == ["requeue 6_1"]


def test_neither_a_cancelled_job_nor_an_old_copy_of_one_queues_it_again(job):
    assert len(job("a run", "ensemble", codes="75", STATE="CANCELLED")[1]) == 1
    assert len(job("a run", "ensemble", codes="75", NOW="1")[1]) == 1
    assert len(job("a run", "ensemble", codes="75", NOW="1", SLURM_RESTART_COUNT="1")[1]) == 2


def test_the_site_file_names_python_and_the_container_and_sets_variables(job, tmp_path):
    (tmp_path / "a run" / "site.sh").write_text(
        "container=(env INSIDE=1)\nexport OMP_NUM_THREADS=8\n"
    )
    assert job("-p", "python", "a run", "ensemble")[1][0].endswith(" 3 8")


def test_no_argument_is_executed(job, tmp_path):
    name = "$(touch pwned)`touch pwned`; touch pwned"
    (tmp_path / name).mkdir()
    assert job(name, "student", "--name", "$(touch pwned)")[1] == [
        f"<-P><-m><trainer><student><--name><$(touch pwned)><--run><ROOT/{name}> 3 1"
    ]
    assert not list(tmp_path.rglob("pwned"))
