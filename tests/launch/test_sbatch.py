"""The sbatch commands are a pure function of the run and of what is queued already."""

import shlex

import pytest

from launch.plan import plan
from launch.sbatch import SCRIPT, batches, dependency, plan_on_slurm, ranges, shell_script
from pipeline.config import UserError, load_config


def submitted(run, *, done=(), size=1001):
    """Per batch by its name the command. Slurm's ids are 1, 2, 3, ..."""
    jobs = plan_on_slurm(run)
    left = [job for job in jobs if job.name not in done]
    ids, whole, commands = {}, set(), {}
    for number, batch in enumerate(batches(run, left, size), 1):
        waits = dependency(run, batch, ids, whole, done.__contains__)
        commands[batch.name] = batch.command(run.root, waits)
        whole.add(str(number))
        ids |= batch.ids(str(number))
    return commands


def option(command, name):
    """The value of --name, None if it is not there."""
    return next((word.partition("=")[2] for word in command if word.startswith(f"--{name}=")), None)


def arguments(command):
    return command[command.index(str(SCRIPT)) + 1 :]


def test_each_job_waits_for_the_jobs_of_its_inputs(ward):
    found = submitted(ward.run())
    assert list(found) == [
        "generalist",
        "clusters",
        "specialists",
        "ensemble",
        "controls/control_wall-0",
        "controls/control_wall-1",
        "controls/control_wall-2",
        "controls/control_compute",
        "controls/student_hard",
        "students/main",
        "report",
    ]
    waits = {name: option(command, "dependency") for name, command in found.items()}
    assert waits["generalist"] is None
    assert waits["clusters"] == "afterok:1" and waits["specialists"] == "afterok:2"
    assert waits["ensemble"] == "afterok:3"  # the whole array
    assert waits["controls/control_compute"] == "afterok:5:6:7"
    assert waits["controls/student_hard"] == "afterok:1"
    assert waits["report"] == "afterok:4:5:6:7:8:9:10"


def test_specialists_are_one_array_with_a_throttle(ward):
    command = submitted(ward.run("slurm.throttle=3"))["specialists"]
    assert option(command, "array") == "0-3%3"
    assert arguments(command)[-5:] == ["specialist", "0", "1", "2", "3"]
    assert option(command, "output") == f"{ward.run_path}/logs/specialists-%3a.txt"


def test_packs_are_the_elements_of_the_array(ward):
    command = submitted(ward.run("specialists.per_job=3"))["specialists-pack"]
    assert option(command, "array") == "0-1"
    assert arguments(command)[-3:] == ["specialist", "0,1,2", "3"]


def test_specialists_that_are_taken_over_are_no_elements_of_the_array(ward):
    found = submitted(ward.run("specialists.per_job=2", *ward.old_run(groups=3)))
    assert arguments(found["clusters"])[-5:] == ["specialist", "--index", "0", "1", "2"]
    pack = found["specialists-pack"]
    assert option(pack, "array") == "0" and arguments(pack)[-2:] == ["specialist", "3"]
    assert option(found["ensemble"], "dependency") == "afterok:2:3"


def test_arrays_are_no_larger_than_the_site_allows_and_share_the_throttle(ward):
    found = submitted(ward.run("slurm.throttle=2"), size=3)
    assert option(found["specialists"], "array") == "0-2%1"
    assert option(found["specialists-3+"], "array") == "0%1"
    assert arguments(found["specialists-3+"])[-2:] == ["specialist", "3"]
    assert option(found["ensemble"], "dependency") == "afterok:3:4"


def test_only_what_is_left_of_an_array_is_submitted_each_at_its_place(ward):
    found = submitted(
        ward.run(), done={"generalist", "clusters", "specialists/000", "specialists/002"}
    )
    assert option(found["specialists"], "array") == "1,3"
    assert option(found["specialists"], "dependency") is None
    assert arguments(found["specialists"])[-5:] == ["specialist", "0", "1", "2", "3"]


def test_elements_that_are_queued_are_waited_for_one_by_one(ward):
    """Their array has an element that failed: of the whole, afterok would never hold."""
    run = ward.run()
    ensemble = next(batch for batch in batches(run, plan(run)) if batch.name == "ensemble")
    ids = {
        "specialists/000": "7_0",
        "specialists/001": "9_1",
        "specialists/002": "7_2",
        "specialists/003": "9_3",
    }
    assert dependency(run, ensemble, ids, {"9"}, set().__contains__) == "afterok:7_0:9:7_2"


def test_specialists_that_may_be_missing_are_only_waited_for(ward):
    found = submitted(ward.run("ensemble.allow_missing=true"))
    assert option(found["ensemble"], "dependency") == "afterany:3"
    assert option(found["specialists"], "dependency") == "afterok:2"


def test_resources_are_the_stages_own_then_those_of_default(ward):
    settings = [
        'slurm.default.partition="cpu"',
        "slurm.default.memory=4G",
        'slurm.default.extra=["--exclude=n9"]',
        "slurm.default.time=600",
        'slurm.generalist.partition="gpu"',
        "slurm.generalist.nodes=2",
        "slurm.generalist.gpus=4",
        "slurm.generalist.cpus=16",
        'slurm.generalist.time="1-12:00:00"',
        'slurm.generalist.extra=["--reservation=x"]',
        "slurm.signal_s=90",
    ]
    run = ward.run(*settings)
    found = submitted(run)
    words = [
        "--nodes=2",
        "--signal=USR2@90",
        "--gpus-per-node=4",
        "--cpus-per-task=16",
        "--mem=4G",
        "--time=1-12:00:00",
        "--partition=gpu",
        "--exclude=n9",
        "--reservation=x",
    ]
    assert [word for word in found["generalist"] if word in words] == words
    assert arguments(found["generalist"])[:2] == ["-r", "4"]
    words = ["--nodes=1", "--mem=4G", "--time=600", "--partition=cpu", "--exclude=n9"]
    assert [word for word in found["report"] if word in words] == words
    assert arguments(found["report"])[:2] == ["-r", "1"]


def ranks_on_slurm(run):
    return {job.name: job.processes for job in plan_on_slurm(run)}


@pytest.mark.parametrize(
    "settings, expected",
    [
        ([], 1),
        (["slurm.generalist.nodes=3"], 3),
        (["slurm.generalist.gpus=8"], 8),
        (["slurm.generalist.nodes=2", "slurm.generalist.gpus=4", "train.batch_size=64"], 8),
        (["slurm.generalist.nodes=2", "launch.processes=8"], 8),
    ],
)
def test_the_generalists_ranks(ward, settings, expected):
    assert ranks_on_slurm(ward.run(*settings))["generalist"] == expected


def test_with_8_gpus_every_job_has_8_ranks_and_srun_starts_them(ward):
    run = ward.run("slurm.default.gpus=8", "specialists.per_job=2")
    assert set(ranks_on_slurm(run).values()) == {8}
    for name, command in submitted(run).items():
        assert option(command, "gpus-per-node") == "8", name
        assert arguments(command)[:2] == ["-r", "8"], name


def test_a_section_has_the_ranks_of_its_own_gpus_and_nodes(ward):
    settings = ("slurm.default.gpus=1", "slurm.generalist.gpus=8", "slurm.controls.gpus=4")
    ranks = ranks_on_slurm(ward.run(*settings, "slurm.clusters.nodes=2"))
    assert ranks["generalist"] == 8 and ranks["clusters"] == 2 and ranks["specialists/000"] == 1
    assert ranks["controls/control_compute"] == ranks["controls/control_wall-0"] == 4


def test_without_gpus_jobs_have_the_ranks_that_they_have_on_one_machine(ward):
    run = ward.run("launch.processes=2", "slurm.generalist.nodes=2")
    here = {job.name: job.processes for job in plan(run)}
    assert ranks_on_slurm(run) == here and {1, 2} == set(here.values())


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            ["launch.processes=7", "slurm.generalist.nodes=2"],
            "launch.processes = 7 ranks cannot be shared evenly by slurm.generalist.nodes = 2; "
            "try 6 or 8",
        ),
        (
            ["launch.processes=2", "slurm.generalist.gpus=8"],
            "launch.processes = 2, and slurm.generalist reserves 8 GPUs: each rank has a GPU of "
            "its own; leave launch.processes out",
        ),
        (
            ["specialists.kind=branch", "slurm.specialists.gpus=8"],
            "slurm.specialists reserves 8 GPUs, and specialists/000-003 has one rank (all branches "
            "of a job learn in one product): the rest would idle; set slurm.specialists.gpus = 1",
        ),
        (
            ["launch.processes=2", "slurm.specialists.nodes=2"],
            "slurm.specialists reserves 2 nodes, and specialists/000 has 1 ranks: the rest would "
            "idle; set slurm.specialists.nodes = 1, or leave specialists out of "
            "launch.side_by_side",
        ),
    ],
)
def test_what_would_idle_or_cannot_be_shared_is_refused_in_one_line(ward, settings, words):
    with pytest.raises(UserError) as error:
        plan_on_slurm(ward.run(*settings))
    assert str(error.value) == words


def test_a_job_of_one_rank_asks_for_one_gpu_where_others_of_its_section_take_more(ward):
    run = ward.run("slurm.default.gpus=8").advice.run
    jobs = {job.name: job for job in plan_on_slurm(run, run.advice.stages)}
    assert jobs["generalist"].processes == 8 and jobs["advice"].processes == 1
    command = {each.name: each.command(run.root) for each in batches(run, list(jobs.values()))}
    assert option(command["advice"], "gpus-per-node") == "1"
    assert arguments(command["advice"])[:2] == ["-r", "1"]


def test_whatever_a_run_is_called_it_is_one_word_and_nothing_else(ward):
    ward.run_path = ward.root / "--wrap=x %j $(touch pwned)\n'\""
    command = submitted(ward.run())["generalist"]
    assert option(command, "job-name") == "wrap_x__j___touch_pwned____-generalist"
    directory = str(ward.run_path).replace("%", "%%")
    assert option(command, "output") == f"{directory}/logs/generalist.txt"
    assert arguments(command)[-2:] == [str(ward.run_path), "generalist"]


def test_the_dry_runs_script_is_the_same_commands_for_a_shell(ward):
    ward.run_path = ward.root / "a b$(c)"
    run = ward.run()
    jobs = plan(run)
    lines = shell_script(run, jobs, jobs, {}, 1001).splitlines()
    assert len(lines) == 11 and lines[0].startswith("generalist=$(sbatch ")
    words = shlex.split(lines[1].removeprefix("clusters=$(").removesuffix(")"))
    expected = submitted(run)["clusters"]
    assert words == [*expected[:4], "--dependency=afterok:${generalist}", *words[5:]]
    assert "'--output=" in lines[1] and "--dependency=afterok:${specialists}" in lines[3]


def test_ranges_read_like_slurms():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8" and ranges([]) == ""


@pytest.mark.parametrize(
    "setting, words",
    [
        (
            "slurm.generalist.gpu=4",
            "unknown key slurm.generalist.gpu; did you mean slurm.generalist.gpus?",
        ),
        (
            "slurm.specialist.gpus=1",
            "unknown key slurm.specialist; did you mean slurm.specialists?",
        ),
        ("slurm.default.time=soon", 'write minutes, "HH:MM:SS" or "DAYS-HH:MM:SS"'),
        ("slurm.default.time=4", "slurm.signal_s = 120 s before its end"),
        ("slurm.default.memory=lots", "slurm.default.memory = 'lots'"),
        ('launch.side_by_side=["report"]', "report"),
        ('slurm.default.extra=["-p gpu"]', "is no long option of sbatch"),
        ('slurm.default.extra=["--wrap=ls"]', "is what referral itself says to sbatch"),
        ('slurm.default.partition=""', "slurm.default.partition = ''"),
    ],
)
def test_a_wrong_resource_is_one_clear_line(setting, words):
    with pytest.raises(UserError) as error:
        load_config(None, [setting])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "time, seconds",
    [("90", 5400), ("5:30", 330), ("04:00:00", 14400), ("2-0", 172800), ("1-02:03", 93780)],
)
def test_time_limits_are_read_as_slurm_reads_them(time, seconds):
    assert load_config(None, [f'slurm.default.time="{time}"']).slurm.default.seconds == seconds


def test_times_and_memory_may_come_without_quotes():
    config = load_config(None, ["slurm.default.time=04:00:00", "slurm.default.memory=4000"])
    resources = config.slurm.default
    assert (resources.time, resources.memory) == ("04:00:00", "4000")
