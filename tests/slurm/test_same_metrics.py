"""Whatever a cluster does to a run, it ends with the metrics of a run that nothing happened to."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from patient import Patient
from toy import toy_config, write_toy

from pipeline.config import save_config

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
REFERRAL = ["-P", "-m", "launch.cli"]
SCRIPT = Path(__file__).parents[2] / "slurm" / "stage.sbatch"
WHOLE = (
    "clusters.num_groups=2",
    "controls.learning_rates=[0.003]",
    "students.main.steps=20",
    "launch.processes=2",
    "slurm.generalist.nodes=2",
)
STEPS = 120
# The faults of tests/slurm/faults.py. A checkpoint now and then, a row for every step.
SHORT = (
    "clusters.num_groups=2",
    "controls.enabled=false",
    "launch.processes=2",
    "slurm.generalist.nodes=2",
    "data.augment=faults:leave",
    f"train.steps={STEPS}",
    "train.log_every=1",
    "train.checkpoint_every=5",
    "specialists.steps=160",
    "specialists.log_every=1",
    "specialists.checkpoint_every=5",
)


def metrics(run: Path) -> dict:
    """results.json but for what depends on the machine's mood."""

    def without_cost(value):
        if isinstance(value, dict):
            return {key: without_cost(each) for key, each in value.items() if key != "cost"}
        return [without_cost(each) for each in value] if isinstance(value, list) else value

    return without_cost(json.loads((run / "results.json").read_text()))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"), {"train": 20, "val": 12, "test": 12})


def on_this_machine(patient: Patient) -> None:
    patient.referral("run", patient.config, "--run", patient.run)


@pytest.fixture
def make(cluster, tmp_path, data):
    """A run's directory-to-be and its config."""

    def made(settings, students=True):
        patient = Patient(cluster, tmp_path, REFERRAL)
        config = toy_config(data, *settings)
        if not students:
            config = config.model_copy(update={"students": {}})
        save_config(config, patient.config)
        return patient

    return made


@pytest.fixture(scope="module")
def reference(loopback, tmp_path_factory, data):
    """A finished run of SHORT, on this machine, with two ranks, to which nothing happened."""
    root = tmp_path_factory.mktemp("reference")
    patient = Patient(loopback, root, REFERRAL)
    save_config(toy_config(data, *SHORT).model_copy(update={"students": {}}), patient.config)
    on_this_machine(patient)
    return patient


@pytest.fixture
def patient(make, reference):
    """A run of SHORT, not begun, whose batches take their time until `hurry`."""
    run = make(SHORT, students=False)
    (run.faults / "nap").touch()
    run.hurry = (run.faults / "nap").unlink
    return run


@pytest.fixture
def at_the_specialists(patient, reference):
    """The same, its generalist and its groups done, its two specialists at work."""
    shutil.copytree(reference.run, patient.run, symlinks=True)
    left = (
        "specialists",
        "ensemble",
        "evaluation",
        "report",
        "results.json",
        "report.html",
        "jobs.json",
        "logs",
    )
    for name in left:
        path = patient.run / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    patient.submit()
    training = (patient.run / "specialists" / "000", patient.run / "specialists" / "001")
    patient.wait_until(lambda: min(map(patient.steps, training)) > 6, "the specialists' training")
    return patient


def ends_as_if_nothing_had_happened(patient, reference):
    patient.wait_for_end()
    assert set(patient.states().values()) == {"done"}, patient.referral("status", patient.run)
    assert metrics(patient.run) == metrics(reference.run)
    return True


def test_the_whole_method_on_slurm_ends_with_the_metrics_of_this_machine(
    make, tmp_path, data, cluster
):
    """Generalist on two nodes. Specialists, controls, ensemble and student. Two local ranks."""
    on_slurm = make(WHOLE)
    on_slurm.submit()
    on_slurm.wait_for_end(400)
    assert set(on_slurm.states().values()) == {"done"}, on_slurm.referral("status", on_slurm.run)
    assert on_slurm.status()["generalist"]["node"] == "n[1-2]"
    here = make(WHOLE)
    here.run = tmp_path / "here"
    on_this_machine(here)
    assert metrics(on_slurm.run) == metrics(here.run)
    attempts = re.findall(r"attempt .*, 2 ranks", on_slurm.log("generalist"))
    assert len(attempts) == 2  # one line from each node


def test_a_time_limit_in_the_generalist(patient, reference):
    """A real limit, of one minute. A step takes half a second until the job is queued again."""
    patient.submit("slurm.generalist.time=1", "slurm.signal_s=20")
    patient.wait_until(
        lambda: patient.status()["generalist"]["restarts"] == 1, "the time limit", 240
    )
    assert 0 < patient.steps("generalist") < STEPS  # in the middle
    patient.hurry()
    assert ends_as_if_nothing_had_happened(patient, reference)
    assert "asks to be started again" in patient.log("generalist")
    assert patient.starts("generalist") == 2


def test_a_preempted_specialist(at_the_specialists, reference):
    patient, cluster = at_the_specialists, at_the_specialists.cluster
    node = patient.status()["specialists/001"]["node"]
    options = ["--partition=urgent", f"--nodelist={node}", "--exclusive", "--output=/dev/null"]
    cluster.client("sbatch", *options, "--wrap=sleep 3")
    patient.wait_until(
        lambda: patient.status()["specialists/001"]["restarts"] == 1, "the preemption"
    )
    patient.hurry()
    assert ends_as_if_nothing_had_happened(patient, reference)
    assert patient.starts("specialists/001") == 2


def test_a_node_set_down_under_a_specialist(at_the_specialists, reference):
    patient, cluster = at_the_specialists, at_the_specialists.cluster
    node = patient.status()["specialists/000"]["node"]
    cluster.client("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    patient.wait_until(lambda: patient.status()["specialists/000"]["restarts"] == 1, "the requeue")
    patient.hurry()
    assert ends_as_if_nothing_had_happened(patient, reference)
    assert patient.starts("specialists/000") == 2


def test_a_killed_slurmd_whose_specialist_trains_on_beside_its_second_copy(
    at_the_specialists, reference
):
    patient, cluster = at_the_specialists, at_the_specialists.cluster
    attempts = patient.run / "specialists" / "000" / "attempts"
    (first,) = attempts.iterdir()
    cluster.kill_node(patient.status()["specialists/000"]["node"])
    patient.wait_until(
        lambda: patient.status()["specialists/000"]["restarts"] == 1, "the requeue", 120
    )
    size = (first / "metrics.jsonl").stat().st_size
    patient.wait_until(lambda: len(list(attempts.glob("*/metrics.jsonl"))) == 2, "the second copy")
    assert (first / "metrics.jsonl").stat().st_size > size  # the first one has gone on
    patient.hurry()
    assert ends_as_if_nothing_had_happened(patient, reference)
    done = json.loads((patient.run / "specialists" / "000" / "DONE").read_text())
    assert done["attempt"] in os.listdir(attempts)


def test_an_element_that_fails_once_is_tried_again_in_place(patient, reference, at_the_specialists):
    (patient.faults / "fail-1").write_text("1")
    patient.wait_until(lambda: not (patient.faults / "fail-1").exists(), "the failure")
    patient.hurry()
    assert ends_as_if_nothing_had_happened(patient, reference)
    assert "this GPU has fallen off the bus" in patient.log("specialists/001")
    assert "restarts 0, try 2" in patient.log("specialists/001")
    assert patient.starts("specialists/001") == 1


def test_an_element_that_fails_always_and_is_fixed(patient, reference, at_the_specialists):
    (patient.faults / "fail-1").write_text("9")
    patient.hurry()
    patient.wait_for_end()
    states = patient.states()
    assert states["specialists/000"] == "done" and states["specialists/001"] == "failed"
    assert "fallen off the bus" in patient.referral("status", patient.run)
    (patient.faults / "fail-1").unlink()
    patient.referral("retry", patient.run)
    assert ends_as_if_nothing_had_happened(patient, reference)


def test_the_whole_graph_cancelled_and_submitted_again(patient, reference):
    patient.submit()
    patient.wait_until(lambda: patient.steps("generalist") > 6, "the generalist's training")
    patient.referral("cancel", patient.run)
    patient.hurry()
    patient.submit()
    assert ends_as_if_nothing_had_happened(patient, reference)
    first = (patient.run / "generalist" / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["step"] == 1  # the metrics of both attempts, from the first step on


def test_the_scripts_by_hand(patient, reference):
    """As docs/slurm.md shows: prepare, then sbatch for each stage."""
    patient.hurry()
    patient.referral("prepare", patient.config, "--run", patient.run)

    def sbatch(*words):
        options = ["sbatch", "--parsable", f"--output={patient.run}/by-hand-%j.txt", *words]
        ended = subprocess.run(
            options, env=patient.environment, cwd=patient.root, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()

    last = ""
    for options, ranks, stages in (
        (["--nodes=2"], 1, ["generalist"]),
        ([], 2, ["measure", "cluster", "route"]),
        (["--array=0-1"], 1, ["specialist", "0", "1"]),
        ([], 2, ["ensemble"]),
        ([], 2, ["evaluate", "report"]),
    ):
        if last:
            options.append(f"--dependency=afterok:{last}")
        script = (str(SCRIPT), "-p", sys.executable, "-r", str(ranks), str(patient.run))
        last = sbatch(*options, *script, *stages)
    # It is published after DONE.
    patient.wait_until((patient.run / "results.json").exists, "the report")
    assert metrics(patient.run) == metrics(reference.run)
