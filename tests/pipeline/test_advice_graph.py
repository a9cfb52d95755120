"""The stages of an advice: their order, what each waits for, and what enters their keys."""

import json

import pytest

from pipeline.advice.graph import parse_pilot
from pipeline.advice.levers import FAMILIES, LEVERS, SCARCITIES
from pipeline.config import UserError, load_config, save_config
from pipeline.graph import RunDirectory, open_run

BASE = {
    "data": {
        "train": "d/train-{0..3}.tar",
        "val": "d/val-0.tar",
        "test": "d/test-0.tar",
        "classes": 60,
    },
    "train": {"steps": 100},
    "clusters": {"num_groups": 3},
    "specialists": {"steps": 20},
    "students": {"main": {"steps": 50}},
}
KINDS = [
    [],
    ["specialists.kind=branch"],
    ["ensemble.kind=deep", "ensemble.combine=geometric", "students.main.network=hydra"],
    ["ensemble.kind=shortlist", "ensemble.order=0.5"],
    ["ensemble.kind=rerank"],
]
ROUND = ["on", "wide", "second", "copies", "branches"]


def run_of(*overrides, root="/nowhere/run") -> RunDirectory:
    return RunDirectory(root, load_config(None, list(overrides), json.loads(json.dumps(BASE))))


def keys(run) -> dict[str, str]:
    return {stage.place: stage.key for stage in run.advice.stages}


def changed(one, other) -> set[str]:
    before, after = keys(one), keys(other)
    assert before.keys() == after.keys()
    return {place for place in before if before[place] != after[place]}


@pytest.mark.parametrize("kind", KINDS)
def test_an_advice_is_the_same_stages_whatever_kind_of_run_asks_for_it(kind):
    places = [stage.place for stage in run_of(*kind).advice.stages]
    assert places == [
        "generalist",
        "clusters/statistics",
        "clusters",
        "diagnosis",
        "routed",
        *(f"pilots/{family}-0" for family in ROUND),
        *(f"pilots/{family}-1" for family in ROUND),
        "advice",
    ]
    assert changed(run_of(), run_of(*kind)) == set()


def test_each_stage_stands_behind_its_inputs_and_a_round_behind_the_whole_one_before():
    advice = run_of().advice
    seen = set()
    for stage in advice.stages:
        assert {needed.place for needed in stage.inputs} <= seen
        seen.add(stage.place)
    first, second = advice.rounds
    waits = {stage.address: [needed.place for needed in stage.inputs] for stage in first}
    assert waits == {
        "on-0": ["generalist"],
        "wide-0": ["generalist"],
        "second-0": ["generalist"],
        "copies-0": ["routed"],
        "branches-0": ["clusters"],
    }
    places = {stage.place for stage in first}
    waited_for = places | {"diagnosis"}
    assert all({each.place for each in stage.inputs} == waited_for for stage in second)
    assert {needed.place for needed in advice.advice.inputs} == {
        "diagnosis",
        *(stage.place for stage in advice.pilots),
    }


def test_what_the_advice_shares_with_a_run_has_the_runs_keys():
    run = run_of()
    own = {stage.place: stage.key for stage in run.stages}
    shared = {place: key for place, key in keys(run).items() if place in own}
    assert shared.keys() == {
        "generalist",
        "clusters/statistics",
        "clusters",
        "diagnosis",
        "routed",
    }
    assert all(own[place] == key for place, key in shared.items())


def test_pilots_and_advice_are_found_by_name_and_are_no_stages_of_the_run(tmp_path):
    run = run_of("ensemble.kind=deep", root=tmp_path)
    save_config(run.config, tmp_path / "config.toml")
    opened = open_run(tmp_path)
    assert not {"pilot", "advice", "measure"} & {stage.name for stage in opened.stages}
    assert [stage.address for stage in opened.find("pilot")][:2] == ["on-0", "wide-0"]
    assert [stage.place for stage in opened.find("measure")] == ["clusters/statistics"]
    assert [stage.place for stage in opened.find("generalist")] == ["generalist"]
    assert opened.with_stages(["generalist"]) is opened
    grouped = opened.with_stages(["measure", "cluster"])
    assert grouped.method.has_groups and grouped.advice is opened.advice
    run = run_of(root=tmp_path)
    assert run.with_stages(["pilot"]) is run


PILOTS = {f"pilots/{family}-{number}" for family in ROUND for number in range(2)}
ALL = {"generalist", "clusters/statistics", "clusters", "diagnosis", "routed", "advice"} | PILOTS
SECOND_ROUND = {place for place in PILOTS if place.endswith("-1")}


@pytest.mark.parametrize(
    "overrides, stale",
    [
        (["advise.scarce=latency"], {"advice"}),
        (["advise.scarce=latency", "advise.limit=2.0"], {"advice"}),
        (["advise.workers=4"], {"advice"}),
        (["advise.budget=0.5"], PILOTS | {"advice"}),
        (["train.steps=200"], ALL),
        (["clusters.num_groups=4"], ALL - {"generalist", "clusters/statistics"} - {
            f"pilots/{family}-0" for family in ("on", "wide", "second")
        }),
        (["specialists.steps=30"], {"pilots/copies-0", "pilots/branches-0", "advice"}
         | SECOND_ROUND),
        (['controls.rows=["wider"]', "controls.model={width=9}"], {"pilots/wide-0", "advice"}
         | SECOND_ROUND),
        (['controls.rows=["average"]'], set()),
        (["ensemble.gate=2"], set()),
        (["launch.pool=7", "students={}", "ensemble.kind=deep"], set()),
    ],
)  # fmt: skip
def test_a_setting_stales_what_reads_it_and_what_stands_behind(overrides, stale):
    assert changed(run_of(), run_of(*overrides)) == stale


def test_every_pilot_is_another_stage():
    pilots = run_of().advice.pilots
    assert len({stage.key for stage in pilots}) == len(pilots) == 10
    assert parse_pilot("second-1") == ("second", 1)


def test_rerankers_have_a_pilot_of_their_own_where_there_are_many_classes():
    few, many = (run_of(f"data.classes={count}").advice for count in (1999, 2000))
    assert [family.name for family in few.families] == ROUND
    assert [family.name for family in many.families] == [*ROUND[:3], "rerank", *ROUND[3:]]
    assert few.family_of("rerank") == "second" and many.family_of("rerank") == "rerank"
    alone = run_of("data.classes=2000", 'advise.levers=["rerank"]').advice
    assert [family.name for family in alone.families] == ["rerank"]


def test_pilots_are_of_the_levers_that_were_asked_for():
    advice = run_of('advise.levers=["average", "shortlist", "branches"]').advice
    assert advice.levers == ["stop", "average", "shortlist", "branches"]
    places = [stage.place for stage in advice.stages]
    assert places[4:] == [
        *(f"pilots/{name}" for name in ("second-0", "branches-0", "second-1", "branches-1")),
        "advice",
    ]
    assert set(advice.not_possible.values()) == {"advise.levers leaves it out"}


def test_what_the_config_or_the_data_exclude_has_a_reason():
    advice = run_of("data.classes=3", "clusters.num_groups=2", "rerank.label_smoothing=0.1").advice
    assert advice.not_possible["copies"] == "3 classes do not make two groups"
    assert advice.not_possible["rerank"].startswith("rerank.label_smoothing = 0.1 spreads")
    assert advice.levers == ["stop", "train_on", "wider", "average", "shortlist", "average_student"]
    assert run_of().advice.not_possible == {}
    assert "rerank.k = 50 is more than the 40" in run_of("data.classes=40").advice.not_possible[
        "rerank"
    ]  # fmt: skip


def test_groups_for_a_run_that_has_none_are_two_classes_each_at_least():
    deep = ("ensemble.kind=deep", "clusters.num_groups=16")
    assert run_of(*deep, "data.classes=20").advice.run.config.clusters.num_groups == 10
    assert run_of(*deep, "data.classes=400").advice.run.config.clusters.num_groups == 16
    taken = run_of(*deep, "data.classes=20").advice.config_with("copies")
    assert taken.clusters.num_groups == 10 and taken.has_specialists


def test_an_advice_about_inherited_networks_or_about_nothing_is_refused():
    with pytest.raises(UserError, match="extend.run = old: an advice is about a generalist"):
        run_of("extend.run=old").advice.check()
    with pytest.raises(UserError, match="nothing to advise on: train_on"):
        run_of('advise.levers=["stop"]').advice.check()
    run_of().advice.check()


def test_a_pilots_planned_cost_is_its_rounds_share_times_its_familys_cost():
    # on, wide, second, copies, branches cost 1 each, a re-ranker .5: 5.5 f, and 2 f of three
    # others: f = .23 / 11.5 = .02.
    advice = run_of("advise.budget=0.23", "data.classes=2000").advice
    shares = {stage.address: advice.planned_share(stage) for stage in advice.pilots}
    assert shares["on-0"] == pytest.approx(0.02) and shares["on-1"] == pytest.approx(0.04)
    assert shares["wide-1"] == pytest.approx(0.04) and shares["rerank-0"] == pytest.approx(0.01)


def test_a_pilot_trains_by_the_section_of_its_lever():
    run = run_of("rerank.steps=7", "data.classes=2000")
    steps = {
        stage.address: run.schedule(stage).steps for stage in run.advice.rounds[0]
    }  # fmt: skip
    assert steps["on-0"] == 100 and steps["copies-0"] == 20 and steps["rerank-0"] == 7


# The diagnosis in ordinary runs


def finished(tmp_path, *overrides, without=("diagnosis",)) -> RunDirectory:
    """A run as an earlier version finished it."""
    run = run_of(*overrides, root=tmp_path)
    for stage in run.stages:
        if stage.name not in without:
            stage.begin().finish()
    return run_of(*overrides, root=tmp_path)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_runs_with_groups_have_a_diagnosis_for_which_nothing_waits(kind):
    run = run_of(*kind)
    assert [stage.place for stage in run.find("diagnosis")] == ["diagnosis"]
    assert run.diagnosis.inputs == (run.cluster,)
    assert not any(run.diagnosis in stage.inputs for stage in run.stages)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_run_that_an_earlier_version_finished_is_finished_without_a_diagnosis(tmp_path, kind):
    run = finished(tmp_path, *kind)
    assert all(stage.is_done for stage in run.stages)
    assert "diagnosis" not in {stage.name for stage in run.stages}
    assert not run.advice.diagnosis.is_done and run.advice.diagnosis in run.advice.stages
    run.diagnosis.begin().finish()
    again = run_of(*kind, root=tmp_path)
    assert again.diagnosis in again.stages or "diagnosis" in {each.name for each in again.stages}


def test_a_run_that_has_not_gone_on_from_its_groups_is_diagnosed(tmp_path):
    early = ("generalist", "measure", "cluster")
    names = {stage.name for stage in run_of().stages}
    run = finished(tmp_path, without=names - set(early))
    assert "diagnosis" in {stage.name for stage in run.stages}
    run.route.begin().finish()
    again = run_of(root=tmp_path)
    assert "diagnosis" not in {stage.name for stage in again.stages}


def test_runs_without_groups_and_those_that_add_classes_have_no_diagnosis(tmp_path):
    for kind in KINDS[2:]:
        assert "diagnosis" not in {stage.name for stage in run_of(*kind).stages}
    old = tmp_path / "old" / "clusters"
    old.mkdir(parents=True)
    (old / "groups.json").write_text(json.dumps({"members": [[0], [1]]}))
    run = run_of(f"extend.run={tmp_path / 'old'}")
    assert "diagnosis" not in {stage.name for stage in run.stages}


def test_the_tables_agree():
    named = {name for lever in LEVERS.values() for name in lever.families}
    assert named == FAMILIES.keys()
    assert [name for name, lever in LEVERS.items() if not lever.families] == ["stop"]
    assert {name for name, lever in LEVERS.items() if lever.keeps_trunk} == {"stop", "branches"}
    for name in SCARCITIES:
        load_config(None, [f"advise.scarce={name}"])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["advise.scarce=memory"], "must be one of training, wall_clock, multiplications"),
        (['advise.levers=["averages"]'], "did you mean average?"),
        (["advise.limit=2.0"], 'limit = 2 is of what is scarce, and scarce = ""'),
        (["advise.scarce=trunk", "advise.limit=2.0"], "leave limit out"),
        (["advise.budget=0"], "advise.budget = 0"),
        (["advise.workers=0"], "advise.workers = 0"),
    ],
)
def test_mistakes_about_an_advice_are_one_line(overrides, message):
    with pytest.raises(UserError) as error:
        load_config(None, overrides)
    assert message in str(error.value) and "\n" not in str(error.value)
