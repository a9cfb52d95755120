"""referral advise: pilots beside a run, resumed like a run, and what the run then goes on with."""

import json
import signal
import time

import pytest

from launch import slurm
from launch.advised import config_before, save_advised_on
from launch.aims import ADVISE, RUN
from launch.journal import Journal, read_journal
from launch.plan import plan
from launch.prepare import check
from launch.sbatch import batches
from pipeline.advice.levers import LEVERS
from pipeline.config import UserError, load_config
from pipeline.graph import RunDirectory, open_run

from .fake_trainer import ADVICE
from .test_slurm import clients, line  # noqa: F401

FEW = 'advise.levers=["train_on", "copies"]'
PILOTS = [f"pilots/{family}-{number}" for number in (0, 1) for family in ("on", "copies")]
GROUPS = ["clusters/statistics", "clusters", "diagnosis", "routed"]


def advise(ward, referral, *arguments):
    """A short advice: two families of pilots."""
    config = ward.write_config()
    return referral("advise", config, "--run", "run", "--set", FEW, *arguments)


def advised(ward, *overrides, **content):
    """A run whose advice is given already.  content: of advice.json."""
    run = ward.run(FEW, "controls.enabled=false", *overrides)
    for stage in run.advice.stages:
        attempt = stage.begin()
        if stage.name == "advice":
            attempt.path("advice.json").write_text(json.dumps({**ADVICE, **content}))
        attempt.finish()
    save_advised_on(run.config, run.root)
    Journal(aim="advise").save(run.root)
    return run


def ends(ward) -> list[str]:
    return [place for _, place in ward.calls("end")]


def begun_since(ward, before) -> list[str]:
    return [place for word, place in ward.calls()[len(before) :] if word == "begin"]


def jobs_of(run, aim=ADVISE):
    return {job.name: job for job in plan(aim.run(run), 1, aim.stages(run))}


# The jobs


def test_the_jobs_of_an_advice(ward):
    jobs = jobs_of(ward.run(FEW))
    assert {name: job.waits_for for name, job in jobs.items()} == {
        "generalist": (),
        "clusters": ("generalist",),
        "pilots/on-0": ("generalist",),
        "pilots/copies-0": ("clusters",),
        "pilots/on-1": ("pilots/on-0", "pilots/copies-0", "clusters"),
        "pilots/copies-1": ("pilots/on-0", "pilots/copies-0", "clusters"),
        "advice": ("clusters", *PILOTS),
    }
    assert jobs["pilots/on-1"].command() == ["pilot", "--name", "on-1"]
    assert jobs["clusters"].command() == ["measure", "cluster", "diagnosis", "route"]
    # on and copies cost 1 each, and one of them goes on: f = .3 / (2 + 2) of 100 steps.
    chains = {name: job.chain for name, job in jobs.items()}
    assert chains["pilots/on-1"] == pytest.approx(chains["advice"] + 100 + 15)
    assert chains["pilots/on-0"] == pytest.approx(chains["pilots/on-1"] + 100 + 7.5)


def test_pilots_ask_slurm_for_what_a_specialist_of_one_rank_does_and_need_no_array(ward):
    run = ward.run(FEW, "slurm.specialists.gpus=3", "slurm.report.memory=9G")
    submitted = {batch.name: batch for batch in batches(run, list(jobs_of(run).values()))}
    assert set(submitted) == {"generalist", "clusters", *PILOTS, "advice"}
    assert "--gpus-per-node=1" in submitted["pilots/copies-1"].options  # a pilot has one rank
    assert submitted["pilots/copies-1"].elements is None
    assert submitted["pilots/copies-1"].arguments[-3:] == ("pilot", "--name", "copies-1")
    assert "--mem=9G" in submitted["advice"].options


# Here


def test_an_advice_does_groups_pilots_and_nothing_else_and_prints_what_it_found(ward, referral):
    code, out, err = advise(ward, referral)
    assert code == 0, err
    assert sorted(ends(ward)) == sorted(["generalist", *GROUPS, *PILOTS, "advice"])
    assert "more examples would help most" in out  # of the diagnosis
    assert ADVICE["sentence"] in out
    assert out.splitlines()[-1] == "next: referral run --advised --run run"
    before = ward.calls()
    code, again, _ = referral("advise", "run")
    assert code == 0 and out.endswith(again) and again.startswith(ADVICE["sentence"])
    assert ward.calls() == before
    assert json.loads((ward.run_path / "advice.json").read_text())["best"] == "average"


def test_status_is_about_what_was_started_last(ward, referral):
    run = advised(ward)
    assert "10 stages: 10 done" in referral("status", "run")[1]
    assert read_journal(ward.run_path).aim == "advise"
    ward.finish(run.specialists)
    assert referral("run", "--run", "run")[0] == 0
    out = referral("status", "run")[1]
    assert "pilots" not in out and "14 stages: 14 done" in out


def test_a_run_takes_over_what_its_advice_did_and_the_other_way_round(ward, referral):
    run = advised(ward)
    shared = {"generalist", *GROUPS}
    assert {stage.place for stage in run.stages if stage.is_done} == shared
    before = ward.calls()
    code, out, err = referral("advise", "run", "--set", 'advise.levers=["average"]', "--force")
    assert code == 0, err
    assert set(begun_since(ward, before)) == {"pilots/second-0", "pilots/second-1", "advice"}


def test_pilots_of_a_round_run_side_by_side_and_the_next_round_waits_for_all(ward, referral):
    slow = {"pilots/on-0": {"steps": 30}, "pilots/second-0": {"steps": 30}}
    (ward.root / "behaviour.json").write_text(json.dumps(slow))
    few = 'advise.levers=["train_on", "average"]'
    run = ward.run(few)
    ward.finish([run.generalist, run.measure, run.cluster, run.diagnosis])
    assert referral("advise", "run")[0] == 0
    calls = ward.calls()
    first_end = min(calls.index(("end", place)) for place in slow)
    assert all(calls.index(("begin", place)) < first_end for place in slow)
    last_end = max(calls.index(("end", place)) for place in slow)
    assert calls.index(("begin", "pilots/on-1")) > last_end
    assert calls.index(("begin", "pilots/second-1")) > last_end


def test_a_killed_advice_goes_on_where_it_was(ward, referral):
    slow = {"pilots/copies-0": {"steps": 400}}
    (ward.root / "behaviour.json").write_text(json.dumps(slow))
    command = ("advise", ward.write_config(), "--run", ward.run_path, "--set", FEW)
    launcher = ward.start(*command)
    try:
        deadline = time.monotonic() + 60
        while ("begin", "pilots/copies-0") not in ward.calls():
            assert time.monotonic() < deadline and launcher.poll() is None
            time.sleep(0.05)
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(timeout=30) == 130
    finally:
        launcher.kill()
        launcher.communicate()
    states = {stage: state for stage, state in stage_states(referral)}
    assert states["pilots/copies-0"] == "interrupted" and states["generalist"] == "done"
    ward.behave()
    before = ward.calls()
    code, out, err = referral("retry", "run")
    assert code == 0 and ADVICE["sentence"] in out, err
    assert "generalist" not in begun_since(ward, before)
    assert set(PILOTS[2:]) | {"pilots/copies-0", "advice"} <= set(begun_since(ward, before))


def stage_states(referral):
    stages = json.loads(referral("status", "run", "--json")[1])["stages"]
    return [(stage["stage"], stage["state"]) for stage in stages]


def test_a_pilot_that_fails_blocks_its_round_and_is_retried(ward, referral):
    (ward.root / "behaviour.json").write_text(
        json.dumps({"pilots/on-0": {"exit": 1, "times": 1, "says": "no memory"}})
    )
    code, _, err = advise(ward, referral)
    assert code == 1 and "error: pilots/on-0" in err and "no memory" in err
    assert "pilots/copies-0" in ends(ward) and "pilots/copies-1" not in ends(ward)
    assert referral("retry", "run")[0] == 0
    assert ends(ward).count("pilots/copies-0") == 1


@pytest.mark.parametrize("options", [["--scarce", "latency", "--limit", "2"], ["--workers", "3"]])
def test_another_scarcity_costs_the_advice_alone_and_no_force(ward, referral, options):
    advised(ward)
    before = ward.calls()
    code, _, err = referral("advise", "run", *options)
    assert code == 0, err
    assert begun_since(ward, before) == ["advice"]
    config = load_config(ward.run_path / "config.toml")
    assert (config.advise.scarce or "", config.advise.workers) in {("latency", 1), ("", 3)}


def test_another_budget_redoes_the_pilots_with_force_alone(ward, referral):
    advised(ward)
    before = ward.calls()
    code, _, err = referral("advise", "run", "--budget", "0.5")
    assert code == 2 and "advise.budget: 0.3 -> 0.5" in err and "pilots/copies-1" in err
    assert "--force" in err and ward.calls() == before
    assert referral("advise", "run", "--budget", "0.5", "--force")[0] == 0
    assert set(begun_since(ward, before)) == {*PILOTS, "advice"}


def test_a_run_without_groups_gets_them_for_its_advice(ward, referral):
    ward.values["ensemble"] = {"kind": "deep", "members": 2}
    code, _, err = advise(ward, referral)
    assert code == 0, err
    assert sorted(ends(ward)) == sorted(["generalist", *GROUPS, *PILOTS, "advice"])
    config = load_config(ward.run_path / "config.toml")
    assert config.is_deep and set(config.students) == {"main"}
    before = ward.calls()
    assert referral("run", "--run", "run")[0] == 0
    assert "members/001" in begun_since(ward, before)
    assert "generalist" not in begun_since(ward, before)


def test_what_is_asked_wrongly_is_one_line(ward, referral):
    config = ward.write_config()
    code, _, err = referral("advise", config)
    assert code == 2 and "is a config; add --run DIR" in err
    code, _, err = referral("advise", "no-such-run")
    assert code == 2 and "no-such-run: no such config file and no such run" in err
    (ward.root / "empty").mkdir()
    code, _, err = referral("advise", "empty")
    assert code == 2 and "is not a run" in err
    ward.run()
    code, _, err = referral("advise", "run", "--run", "empty")
    assert code == 2 and "is a run, and --run names another" in err
    code, _, err = referral("advise", "run", "--limit", "2")
    assert code == 2 and 'limit = 2 is of what is scarce, and scarce = ""' in err
    code, _, err = referral("advise", "run", "--scarce", "latancy")
    assert code == 2 and "did you mean latency?" in err


def test_a_dry_run_shows_the_jobs_and_writes_nothing(ward, referral):
    code, out, _ = advise(ward, referral, "--dry-run")
    assert code == 0 and "pilots/copies-1" in out and "pilot --name on-0 --run" in out
    assert not ward.run_path.exists()


# On Slurm


def test_an_advice_is_submitted_looked_at_and_cancelled(ward, clients, referral):  # noqa: F811
    code, out, err = advise(ward, referral, "--on", "slurm")
    assert code == 0 and "7 submissions in" in out, err
    (words,) = [each for each in clients.calls("sbatch") if "pilots-copies-0.txt" in each]
    assert "--dependency=afterok:2 " in words and "pilot --name copies-0" in words
    clients.answer(*(line(str(k), "PENDING", "Dependency") for k in range(1, 8)))
    states = dict(stage_states(referral))
    assert set(states) == {"generalist", *GROUPS, *PILOTS, "advice"}
    code, _, err = referral("run", ward.toml, "--run", "run", "--on", "slurm", "--set", FEW)
    assert code == 2 and "has 7 jobs of `referral advise` in Slurm (1, 2, 3, 4 and 3 more)" in err
    code, out, _ = referral("cancel", "run")
    assert code == 0 and "cancelled 7 jobs" in out
    clients.answer()
    assert referral("retry", "run")[0] == 0
    assert len(clients.calls("sbatch --parsable")) == 14
    assert read_journal(ward.run_path).aim == "advise"


def test_a_run_of_an_earlier_version_is_gone_on_with_on_slurm_and_not_redone(ward, clients):  # noqa: F811
    run = ward.run()
    done = [run.generalist, run.measure, run.cluster, run.route, *run.specialists[1:]]
    ward.finish(done)
    again = open_run(run.root)
    jobs = plan(again)
    chosen = slurm.choose(again, jobs, Journal())
    assert [job.name for job in chosen][0] == "specialists/000"
    assert all(not job.is_done for job in chosen)


# Going on as advised


def test_going_on_with_the_best_lever_is_resumed_by_the_same_command(ward, referral):
    advised(ward)
    before = ward.calls()
    code, out, err = referral("run", "--advised", "--run", "run")
    assert code == 0, err
    assert out.startswith(f"as advised: {LEVERS['average'].what}\n")
    assert "members/001" in begun_since(ward, before)
    assert not {"generalist", *PILOTS, "specialists/000"} & set(begun_since(ward, before))
    config = load_config(ward.run_path / "config.toml")
    assert (config.ensemble.kind, config.ensemble.members) == ("deep", 2)
    before = ward.calls()
    assert referral("run", "--advised", "--run", "run")[0] == 0
    assert referral("run", "--run", "run")[0] == 0
    assert ward.calls() == before


def test_another_lever_starts_from_the_config_that_was_advised_on(ward, referral):
    advised(ward, best="train_on")
    assert referral("run", "--advised", "--run", "run")[0] == 0
    config = load_config(ward.run_path / "config.toml")
    assert config.controls.rows == ["train_on"] and config.students == {}
    code, _, err = referral("advise", "run", "--scarce", "latency")
    assert code == 0, err
    # What the run has is not taken back by another advice.
    assert load_config(ward.run_path / "config.toml").controls.rows == ["train_on"]
    code, _, err = referral("run", "--advised", "--run", "run", "--force")
    assert code == 0, err
    config = load_config(ward.run_path / "config.toml")
    assert config.controls.rows == [] and set(config.students) == {"main"}
    assert config.ensemble.members == 2 and config.advise.scarce == "latency"


def test_a_lever_that_changes_what_pilots_read_can_be_resumed_and_advised_on_again(ward, referral):
    """wider sets controls.model, which the pilot of wider networks reads, too."""
    advised(ward, 'advise.levers=["wider"]', best="wider")
    assert referral("run", "--advised", "--run", "run")[0] == 0
    config = load_config(ward.run_path / "config.toml")
    assert config.controls.model == {"width": 24} and config.controls.rows == ["wider"]
    assert config_before(ward.run_path).controls.model == {}
    before = ward.calls()
    assert referral("run", "--advised", "--run", "run")[0] == 0
    assert ward.calls() == before
    code, _, err = referral("advise", "run", "--scarce", "latency")
    assert code == 0, err
    assert begun_since(ward, before) == ["advice"]
    assert open_run(ward.run_path).config.controls.model == {}
    # What went on stays as it is: with the same lever nothing would be redone.
    run = open_run(ward.run_path)
    config = run.advice.config_with("wider", {"model": {"width": 24}})
    assert all(stage.is_done for stage in RunDirectory(run.root, config).stages)


@pytest.mark.parametrize("lever", LEVERS)
def test_every_lever_has_a_run_that_can_be_laid_out(ward, lever):
    run = ward.run("rerank.k=5")
    ward.finish(run.advice.stages)
    config = run.advice.config_with(lever)
    gone_on, stale = check(config, ward.run_path)
    assert stale == []
    jobs = plan(gone_on)
    assert jobs[-1].name == "report" and all(job.stages for job in jobs)
    fresh = {stage.place for stage in gone_on.stages if not stage.is_done}
    assert {"ensemble", "evaluation", "report"} <= fresh and "generalist" not in fresh


def test_what_goes_on_as_advised_may_be_changed_by_set(ward, referral):
    advised(ward)
    referral("run", "--advised", "--run", "run", "--set", "ensemble.members=3", "--dry-run")
    assert load_config(ward.run_path / "config.toml").has_specialists
    code, _, err = referral("run", "--advised", "--run", "run", "--set", "ensemble.members=3")
    assert code == 0, err
    assert load_config(ward.run_path / "config.toml").ensemble.members == 3


def test_without_an_advice_or_with_one_of_another_config_nothing_goes_on(ward, referral):
    code, _, err = referral("run", "--advised", "--run", "run")
    assert code == 2 and "is not a run yet; first: referral advise CONFIG.toml --run run" in err
    ward.run()
    code, _, err = referral("run", "--advised", "--run", "run")
    assert code == 2 and err.strip().endswith("goes on with: referral advise run")
    advised(ward)
    ward.values["train"]["steps"] = 90
    code, _, err = referral("run", ward.write_config(), "--advised", "--run", "run")
    assert code == 2 and "was given on another config or other data" in err
    assert load_config(ward.run_path / "config.toml").train.steps == 100


def test_a_stage_of_an_advice_is_stale_for_the_advice_alone(ward):
    run = ward.run(FEW)
    ward.finish([*run.stages, *run.advice.pilots, run.advice.advice])
    other = ward.config(FEW, "advise.budget=0.5")
    assert check(other, ward.run_path, aim=RUN)[1] == []
    with pytest.raises(UserError, match="pilots/on-0"):
        check(other, ward.run_path, aim=ADVISE)
    with pytest.raises(UserError, match="an advice is about a generalist"):
        check(ward.config(*ward.old_run(groups=3)), ward.root / "new", aim=ADVISE)
