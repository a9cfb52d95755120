"""What the config of a run is that goes on with a lever."""

import json

import pytest

from pipeline.advice.levers import FAMILIES, LEVERS
from pipeline.config import UserError, load_config
from pipeline.graph import RunDirectory

BASE = {
    "data": {"train": "d/a.tar", "val": "d/b.tar", "test": "d/c.tar", "classes": 60},
    "train": {"steps": 100, "ema": 0.9},
    "clusters": {"num_groups": 3},
    "specialists": {"steps": 20},
    "controls": {"rows": ["average"]},
    "students": {"main": {"steps": 50, "temperature": 4.0}, "second": {"steps": 5}},
}
# Settings that only some kinds of run may have.
KINDS = {
    "copies": ["specialists.dustbin=full", "specialists.freeze_norm=false"],
    "branches": ["specialists.kind=branch", "specialists.blocks=1", "specialists.ema=0"],
    "deep": ["ensemble.kind=deep", "ensemble.combine=geometric", 'ensemble.networks=["a/b"]'],
    "shortlist": ["ensemble.kind=shortlist", "ensemble.order=0.5", "ensemble.shortlist=20"],
    "specialists' shortlist": ["ensemble.shortlist=9", "ensemble.max_specialists=2"],
    "reverse": ["ensemble.combine=reverse_kl"],
}


def advised(lever, *overrides, entry=None):
    config = load_config(None, list(overrides), json.loads(json.dumps(BASE)))
    return RunDirectory("/nowhere/run", config).advice.config_with(lever, entry)


def plain(lever, **entry):
    return advised(lever, entry=entry)


def test_every_lever_is_piloted_by_families_that_there_are():
    assert {name for lever in LEVERS.values() for name in lever.families} == FAMILIES.keys()


@pytest.mark.parametrize("lever", ["stop", "train_on", "wider"])
def test_the_generalist_by_itself_is_a_deep_ensemble_of_one_that_teaches_nobody(lever):
    config = plain(lever)
    assert (config.ensemble.kind, config.ensemble.members) == ("deep", 1)
    assert config.students == {}
    rows = {"stop": ["average"], "train_on": ["average", "train_on"], "wider": ["average", "wider"]}
    assert config.controls.rows == rows[lever]


def test_wider_takes_the_widths_that_the_advice_priced_and_else_the_users():
    assert plain("wider", model={"width": 24}).controls.model == {"width": 24}
    own = ('controls.rows=["wider"]', "controls.model={depth=3}")
    assert advised("wider", *own).controls.model == {"depth": 3}
    assert plain("wider").controls.model == {}
    assert plain("train_on").controls.model == {}


@pytest.mark.parametrize(
    "lever, kind", [("average", "deep"), ("shortlist", "shortlist"), ("rerank", "rerank")]
)
def test_one_network_more_keeps_the_users_students(lever, kind):
    config = plain(lever)
    assert (config.ensemble.kind, config.ensemble.members) == (kind, 2)
    assert set(config.students) == {"main", "second"}
    assert config.students["main"].temperature == 4.0


def test_a_reranker_takes_nothing_from_train_that_it_cannot_have():
    own = ("train.label_smoothing=0.1", "train.clip_norm=1.0", "train.row_rate=0.1")
    rerank = advised("rerank", *own).rerank
    assert (rerank.label_smoothing, rerank.clip_norm, rerank.ema) == (0.0, 0.0, 0.0)
    assert rerank.row_rate is None
    with pytest.raises(UserError, match=r"rerank.label_smoothing = 0.1 spreads over all classes"):
        advised("rerank", "rerank.label_smoothing=0.1")


def test_a_reranker_learns_half_as_long_as_the_generalist_unless_the_user_says_how_long():
    assert plain("rerank").rerank.steps == 50
    own = advised("rerank", "rerank.steps=80")
    assert own.rerank.steps == 80
    by_epochs = advised("rerank", "train.epochs=5.0")
    assert (by_epochs.rerank.epochs, by_epochs.rerank.steps) == (2.5, None)
    run = RunDirectory("/nowhere/run", plain("rerank"))
    assert run.advice.config_with("rerank").rerank.steps == 50  # not halved again


def test_the_student_of_an_average_is_the_generalists_own_network_and_schedule():
    config = plain("average_student")
    assert (config.ensemble.kind, config.ensemble.members) == ("deep", 2)
    (student,) = config.students.values()
    assert student.teacher == "ensemble" and student.model == {} and student.network == "single"
    assert (student.steps, student.ema) == (100, 0.9)


def test_a_student_of_bags_learns_from_mixed_ones():
    (student,) = advised("average_student", "model={name='embedding_bag'}").students.values()
    assert student.perturb == "mix_bags" and student.start == "generalist"
    assert student.steps == 100
    (other,) = plain("average_student").students.values()
    assert other.perturb == "none"


@pytest.mark.parametrize("lever, kind", [("copies", "copy"), ("branches", "branch")])
@pytest.mark.parametrize("start", KINDS)
def test_groups_leave_out_what_only_the_other_kind_has(lever, kind, start):
    config = advised(lever, *KINDS[start])
    assert config.has_specialists and config.specialists.kind == kind
    assert config.specialists.steps == 20 and config.clusters.num_groups == 3
    if lever == "branches":
        assert config.specialists.ema == 0 and config.specialists.dustbin == "preserving"
    if (lever, start) == ("copies", "copies"):
        assert config.specialists.dustbin == "full" and not config.specialists.freeze_norm
    if start == "specialists' shortlist":
        assert (config.ensemble.shortlist, config.ensemble.max_specialists) == (9, 2)


@pytest.mark.parametrize("start", KINDS)
@pytest.mark.parametrize("lever", LEVERS)
def test_every_lever_can_follow_every_kind_of_run(lever, start):
    config = advised(lever, *KINDS[start])
    assert config.train.steps == 100 and config.data.classes == 60
    wanted = {"copies": "specialists", "branches": "specialists"}
    assert config.ensemble.kind == wanted.get(lever, config.ensemble.kind)
    assert config.ensemble.networks == []


@pytest.mark.parametrize("lever", LEVERS)
def test_what_a_lever_goes_on_with_is_advised_on_alike(lever):
    config = load_config(None, ["specialists.ema=0"], json.loads(json.dumps(BASE)))
    before = RunDirectory("/nowhere/run", config)
    after = RunDirectory("/nowhere/run", before.advice.config_with(lever))
    assert [stage.key for stage in after.advice.stages] == [
        stage.key for stage in before.advice.stages
    ]


def test_the_users_own_values_are_not_changed():
    config = load_config(None, [], json.loads(json.dumps(BASE)))
    before = config.dump()
    run = RunDirectory("/nowhere/run", config)
    for lever in run.advice.levers:
        run.advice.config_with(lever)
    assert run.config.dump() == before


def test_students_of_several_heads_stay_where_the_ensemble_has_as_many():
    heads = [
        "ensemble.kind=deep",
        "ensemble.members=3",
        'students.any={network="hydra"}',
        'students.three={network="hydra", members=3}',
        'students.grown={start="three"}',
        'students.last={teacher="grown"}',
    ]
    assert set(advised("average", *heads).students) == {"main", "second", "any"}
    assert set(advised("shortlist", *heads).students) == {"main", "second"}
    assert set(advised("branches", *heads).students) == {"main", "second"}
    assert set(advised("average_student", *heads).students) == {"main"}
