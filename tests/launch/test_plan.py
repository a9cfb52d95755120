"""The job graph is a pure function of the config."""

import json

from launch.plan import plan, save_graph
from pipeline.stages import KINDS, StageKind


def by_name(jobs):
    return {job.name: job for job in jobs}


def test_every_stage_is_in_one_job_behind_the_jobs_of_its_inputs(ward):
    run = ward.run("specialists.per_job=3")
    jobs = plan(run)
    assert [stage.place for job in jobs for stage in job.stages] == [
        stage.place for stage in run.stages
    ]
    seen = set()
    for job in jobs:
        inputs = {wanted.place for stage in job.stages for wanted in stage.inputs}
        provided = {
            stage.place
            for other in jobs
            if other.name in (*job.waits_for, job.name)
            for stage in other.stages
        }
        assert inputs <= provided
        assert set(job.waits_for) <= seen
        seen.add(job.name)


def test_the_graph_of_the_demo(ward):
    jobs = by_name(plan(ward.run()))
    assert jobs["clusters"].waits_for == ("generalist",)
    assert jobs["clusters"].command() == ["measure", "cluster", "diagnosis", "route"]
    assert jobs["specialists/002"].waits_for == ("clusters",)
    assert jobs["controls/control_wall-0"].waits_for == ("clusters",)
    assert jobs["controls/control_compute"].waits_for == (
        "controls/control_wall-0",
        "controls/control_wall-1",
        "controls/control_wall-2",
    )
    assert jobs["controls/student_hard"].waits_for == ("generalist",)
    assert set(jobs["report"].waits_for) >= {
        "ensemble",
        "controls/control_compute",
        "controls/student_hard",
        "students/main",
    }
    assert jobs["report"].command() == ["evaluate", "report"]


def test_specialists_are_packed_per_job(ward):
    jobs = by_name(plan(ward.run("specialists.per_job=3")))
    assert jobs["specialists/000-002"].command() == ["specialist", "--index", "0", "1", "2"]
    assert jobs["specialists/003"].command() == ["specialist", "--index", "3"]
    assert jobs["ensemble"].waits_for == ("specialists/000-002", "specialists/003")


def test_a_command_names_the_stages_that_are_asked_for(ward):
    run = ward.run("specialists.per_job=4")
    ward.finish([run.specialists[1]])
    job = by_name(plan(run))["specialists/000-003"]
    assert job.command(job.pending) == ["specialist", "--index", "0", "2", "3"]
    assert by_name(plan(run))["controls/control_wall-1"].command() == [
        "control",
        "--name",
        "control_wall-1",
    ]
    assert by_name(plan(run))["students/main"].command() == ["student", "--name", "main"]


def test_a_finished_stage_does_not_change_the_graph(ward):
    run = ward.run()
    before = [(job.name, job.waits_for, job.chain) for job in plan(run)]
    ward.finish([run.generalist])
    assert [(job.name, job.waits_for, job.chain) for job in plan(run)] == before
    assert [job.name for job in plan(run) if job.is_done] == ["generalist"]


def ranks(run, processes=1):
    return {job.name: job.processes for job in plan(run, processes)}


def test_ranks_are_the_configs_or_else_the_machines(ward):
    assert ranks(ward.run(), 2)["generalist"] == 2
    assert ranks(ward.run("launch.processes=4"), 2)["generalist"] == 4


def test_every_job_scales_but_trainings_of_which_there_are_as_many_as_ranks(ward):
    """4 specialists, 3 walls and a twin, control_compute, one student. A control counts alone."""
    several = {"generalist", "clusters", "ensemble", "report", "students/main"}
    several |= {"controls/control_compute"}
    found = ranks(ward.run(), 2)
    assert {name for name, count in found.items() if count == 2} == several
    found = ranks(ward.run("train.batch_size=64"), 8)
    assert set(found.values()) == {8}


def test_the_user_says_what_runs_side_by_side(ward):
    found = ranks(ward.run('launch.side_by_side=["specialists","students"]'), 2)
    alone = {name for name, count in found.items() if count == 1}
    assert alone == {f"specialists/{m:03d}" for m in range(4)} | {"students/main"}
    assert set(ranks(ward.run("launch.side_by_side=[]"), 2).values()) == {2}


def test_a_job_of_stages_that_do_not_scale_has_one_rank(ward):
    found = ranks(ward.run("specialists.kind=branch"), 8)
    assert found["clusters"] == 8 and found["specialists/000-003"] == 1


def test_each_stage_scales_or_says_why_not():
    alone = {name: kind.alone for name, kind in KINDS.items() if not kind.scales}
    assert alone.keys() == {"cluster", "route", "report", "pilot", "advice"}
    assert StageKind.alone not in alone.values()


def test_the_longest_chain_goes_first(ward):
    # Steps, and 100 for starting a job: a wall (120) leads to control_compute (4 x 20 + 100) and so
    # beats nothing here, a specialist (120) to the ensemble (100) and a student of 1,000 steps
    # (1,100).
    chain = {job.name: job.chain for job in plan(ward.run("students.main.steps=1000"))}
    assert chain["report"] == 100
    assert chain["controls/control_compute"] == 100 + 100 + 4 * 20
    assert chain["controls/control_wall-0"] == chain["controls/control_compute"] + 120
    assert chain["students/main"] == chain["controls/student_hard"] == 100 + 1100
    assert chain["specialists/000"] == 1200 + 100 + 120
    assert chain["generalist"] == max(chain.values())


def test_without_controls_and_students_there_are_no_such_jobs(ward):
    del ward.values["students"]
    names = [job.name for job in plan(ward.run("controls.enabled=false", "clusters.num_groups=1"))]
    assert names == ["generalist", "clusters", "specialists/000", "ensemble", "report"]


def test_the_graph_file_is_written_once(ward):
    path = ward.root / "graph.json"
    save_graph(plan(ward.run()), path)
    written = path.stat().st_mtime_ns
    save_graph(plan(ward.run()), path)
    assert path.stat().st_mtime_ns == written
    first = json.loads(path.read_text())["jobs"][0]
    assert first == {
        "name": "generalist",
        "stages": ["generalist"],
        "command": ["generalist"],
        "processes": 1,
        "waits_for": [],
    }


def test_specialists_that_are_taken_over_go_with_the_clusters(ward):
    run = ward.run("specialists.per_job=2", *ward.old_run(groups=3))
    jobs = by_name(plan(run))
    assert jobs["clusters"].command() == [
        "measure",
        "cluster",
        "route",
        "specialist",
        "--index",
        "0",
        "1",
        "2",
    ]
    assert [name for name in jobs if name.startswith("specialist")] == ["specialists/003"]
    assert jobs["specialists/003"].waits_for == ("clusters",)
    assert jobs["ensemble"].waits_for == ("clusters", "specialists/003")


def test_a_run_that_adds_classes_depends_on_what_it_takes_over(ward):
    settings = ward.old_run(groups=3)
    before = [stage.key for stage in ward.run(*settings).stages]
    (ward.root / "old" / "specialists" / "001" / "DONE").write_text("another attempt")
    after = ward.run(*settings).stages
    changed = [stage.place for key, stage in zip(before, after, strict=True) if key != stage.key]
    assert changed[0] == "specialists/001" and "ensemble" in changed and "generalist" not in changed
    assert not {"specialists/000", "specialists/003"} & set(changed)
