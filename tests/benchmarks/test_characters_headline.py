"""The headline on characters: the runs that it makes, its arithmetic and verdicts by hand."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch

from benchmarks.characters import headline as script
from benchmarks.characters import runs
from clustering import ClassGroups
from ensemble import combine_kl, gate
from networks import (
    InputSpec,
    ModelSpec,
    build_classifier,
    parameter_count,
    save_classifier,
    specialise,
)
from pipeline.config import load_config
from pipeline.graph import RunDirectory
from pipeline.store import write_json
from trainer.data.authoring.arrays import write_arrays


def row(errors: int, nll: float, examples: int = 1000) -> dict:
    return {
        "n": 1000,
        "top1": 1 - errors / 1000,
        "nll": nll,
        "cnll": nll,
        "cost": {"examples_seen": examples, "seconds": 60.0},
    }


def specialist(index: int, gain: float, n: int = 400, routed: int = 500) -> dict:
    cost = {"examples_seen": 200, "seconds": 6.0}
    return {"index": index, "gain": gain, "n": n, "routed": routed, "classes": 40, "cost": cost}


def seed_of(ensemble: dict, **changed) -> dict:
    """A generalist with 100 errors of 1,000, of which groups hold 80."""
    students = {
        "same": row(80, 0.3),
        "same_hard": row(90, 0.4),
        "double": row(70, 0.25),
        "double_hard": row(75, 0.35),
    }
    students |= {"few": row(72, 0.3), "few_hard": row(85, 0.5)}
    main = {
        "generalist": row(100, 0.5),
        "ensemble": ensemble,
        "students": students,
        "controls": {"control_wall": row(110, 0.6), "control_compute": row(85, 0.45)},
        "specialists": [specialist(0, 0.05), specialist(1, 0.02), specialist(2, 0.01)],
        "clusters": {"captured_confusion": 0.8, "chance": 0.1},
    }
    unseen = {"generalist": row(400, 2.0), "ensemble": row(380, 1.9)}
    found = {"seed": 0, "main": main, "unseen": unseen, "whole": 0.7, "own": 0.4, "seconds": 3600.0}
    found["longer"], found["wider"] = {"generalist": row(95, 0.45)}, {"generalist": row(50, 0.3)}
    found["deep"] = {"ensemble": row(65, 0.3), "sizes": [{}, {}]}
    return found | changed


def networks(one: dict) -> dict[str, tuple[float, float]]:
    return dict.fromkeys(script.rows_of(one), (1000, 2000)) | {"student, 2 x": (1980, 4000)}


def holds(found: list[dict]) -> dict[str, bool | None]:
    return {verdict.claim: verdict.holds for verdict in script.verdicts(found, networks(found[0]))}


def test_twins_differ_from_their_students_in_the_method_alone():
    config = load_config(None, [], runs.config_of(Path("data"), seed=3))
    assert config.seed == 3 and config.controls.enabled and config.ensemble.gate == 1
    for name in runs.STUDENTS:
        student, twin = config.students[name], config.students[name + runs.HARD]
        assert (student.method, twin.method) == ("distill", "hard")
        assert student.model_copy(update={"method": "hard"}) == twin


def test_students_are_at_most_their_multiple_of_the_generalist_and_tenfold_is_ten():
    config = runs.config_of(Path("data"), 0)

    def parameters(changed: dict) -> int:
        model = config["model"] | changed
        options = {key: model[key] for key in ("width", "depth", "embedding")} | {"dropout": 0.0}
        spec = ModelSpec(model["name"], 3755, InputSpec((1, 32, 32)), options)
        return parameter_count(build_classifier(spec))

    generalist = parameters({})
    same, double, few = (
        parameters(config["students"][name].get("model", {})) for name in runs.STUDENTS
    )
    assert same == generalist == 37_383 and few == double
    assert 1.9 * generalist < double <= 2 * generalist
    assert parameters(script.TENFOLD) == pytest.approx(10 * generalist, rel=0.02)


def test_settings_reach_what_a_further_run_has_and_add_no_student_to_it():
    config = runs.config_of(Path("data"), 0, ["students.same.steps=7", "train.steps=50"])
    assert config["students"]["same"]["steps"] == 7
    longer = script.longer(config)
    assert longer["students"] == {} and longer["train"]["steps"] == 100


def test_a_further_run_differs_from_the_headline_in_what_its_name_says():
    config = runs.config_of(Path("data"), 0)
    base = load_config(None, [], script.deep(config, 1))
    changed = {
        name: load_config(None, [], make(config, seed_of(row(60, 0.4))["main"]))
        for name, make in script.FURTHER.items()
    }
    assert base.is_deep and base.students == {} and not base.controls.enabled
    assert changed["longer"].train.steps == 2 * config["train"]["steps"]
    assert changed["longer"].model_copy(update={"train": base.train}) == base
    for name, model in (("wider", script.WIDER), ("tenfold", script.TENFOLD)):
        assert {key: getattr(changed[name].model, key) for key in model} == model
        assert changed[name].model_copy(update={"model": base.model}) == base
    assert changed["deep"].ensemble.members == 2
    assert changed["deep"].model_copy(update={"ensemble": base.ensemble}) == base


def test_a_deep_ensemble_has_the_generalists_that_the_specialists_examples_buy_and_two_at_least():
    results = seed_of(row(60, 0.4))["main"]
    # 600 examples of specialists beside 1,000: 1 + round(.6).
    assert script.members_bought(results) == 2
    results["specialists"] = [specialist(m, 0.1) for m in range(12)]  # 2,400
    assert script.members_bought(results) == 3
    results["specialists"] = [specialist(0, 0.1)]  # 200
    assert script.members_bought(results) == 2


def done_run(root: Path, config: dict) -> RunDirectory:
    """A run whose stages are done and hold a file each, with links to them as attempts leave."""
    run = RunDirectory(root, load_config(None, [], config))
    for stage in run.stages:
        attempt = stage.begin("first")
        attempt.path("fact.json").write_text(json.dumps(stage.place))
        attempt.path("below/000.txt").write_text("kept")
        stage.checkpoints.mkdir()
        attempt.finish()
    (root / "config.toml").write_text(tomli_w.dumps(run.config.dump()))
    (root / "cache").mkdir()
    (root / "cache" / "test.npy").write_text("decoded")
    return run


@pytest.mark.parametrize(
    "name, taken", [("deep", ["generalist"]), ("longer", []), ("wider", []), ("itself", None)]
)
def test_a_copy_takes_over_the_stages_that_its_config_leaves_as_they_are(tmp_path, name, taken):
    config = runs.config_of(tmp_path, 0)
    run = done_run(tmp_path / "seed-0", config)
    results = seed_of(row(60, 0.4))["main"]
    other = config if name == "itself" else script.FURTHER[name](config, results)
    place = tmp_path / f"seed-0-{name}"
    runs.begin(place, other, run.root)
    found = RunDirectory(place, load_config(None, [], other))
    done = [stage.place for stage in found.stages if stage.is_done]
    assert done == ([stage.place for stage in found.stages] if taken is None else taken)
    assert json.loads((place / runs.TAKEN).read_text()) == done
    for stage in (stage for stage in found.stages if stage.is_done):
        assert json.loads(stage.path("fact.json").read_text()) == stage.place
        assert (stage.directory / "below" / "000.txt").read_text() == "kept"  # through the link
        assert not stage.checkpoints.exists()
    copy, original = (root / "cache" / "test.npy" for root in (place, run.root))
    assert copy.stat().st_ino == original.stat().st_ino
    assert (place / "config.toml").exists() and not list(tmp_path.glob(".*.unfinished"))


def test_a_copy_that_exists_is_left_alone_and_one_that_was_interrupted_is_begun_again(tmp_path):
    config = runs.config_of(tmp_path, 0)
    run = done_run(tmp_path / "seed-0", config)
    place = tmp_path / "seed-0-deep"
    os.makedirs(tmp_path / ".seed-0-deep.unfinished" / "generalist")
    runs.begin(place, script.deep(config, 2), run.root)
    assert (place / "generalist" / "DONE").exists()
    (place / "generalist" / "DONE").unlink()
    runs.begin(place, script.deep(config, 2), run.root)
    assert not (place / "generalist" / "DONE").exists()
    assert (run.root / "generalist" / "DONE").exists()


def test_what_a_copy_took_over_is_not_counted_among_its_seconds(tmp_path):
    for place, took in (("generalist", 100.0), ("ensemble", 7.0)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "DONE").write_text(json.dumps({"seconds": took}))
    assert runs.own_seconds(tmp_path) == 107
    (tmp_path / runs.TAKEN).write_text('["generalist"]')
    assert runs.own_seconds(tmp_path) == 7


@pytest.fixture
def untrained(tmp_path):
    """(run, shards): a generalist and two specialists with weights of their own.

    On 60 random images of six classes.
    """
    rng, groups = np.random.default_rng(0), ClassGroups([[0, 1, 2, 3], [3, 4, 5]], 6)
    images, labels = rng.integers(0, 256, (60, 8, 8), dtype=np.uint8), np.arange(60) % 6
    inputs = {split: images for split in ("train", "val", "test")}
    of_split = {split: labels.copy() for split in inputs}
    write_arrays(inputs, of_split, tmp_path / "shards", {}, 0, {"command": "test"})
    run, names = tmp_path / "seed-0", tuple(str(label) for label in range(6))
    options = {"width": 2, "depth": 2, "embedding": 8}
    spec = ModelSpec("convnet", 6, InputSpec((1, 8, 8)), options, class_names=names)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generalist = build_classifier(spec).eval()
        save_classifier(generalist, run / "generalist")
        specialists = [
            specialise(generalist, classes.tolist()).eval() for classes in groups.members
        ]
        for m, specialist in enumerate(specialists):
            weight = specialist.head.weight
            assert isinstance(weight, torch.Tensor)
            with torch.no_grad():
                weight.add_(torch.randn_like(weight))
            save_classifier(specialist, run / "specialists" / f"{m:03d}")
    (run / "clusters").mkdir()
    groups.save(run / "clusters" / "groups.json")
    return run, tmp_path / "shards", (generalist, specialists, groups, images, labels)


def test_metrics_on_a_split_are_those_of_every_network_asked_plainly(untrained):
    run, place, (generalist, specialists, groups, images, labels) = untrained
    with torch.no_grad():
        raw, y = torch.from_numpy(images)[:, None], torch.from_numpy(labels)
        p = generalist(raw).softmax(1)
        q = combine_kl(p, [each(raw).softmax(1) for each in specialists], groups, gate(p, groups))
    found = runs.metrics_on(run, place)
    for name, expected in (("generalist", p), ("ensemble", q)):
        top1 = float((expected.argmax(1) == y).double().mean())
        nll = float(-expected[torch.arange(60), y].log().mean())
        assert found[name]["n"] == 60 and found[name]["top1"] == pytest.approx(top1)
        assert found[name]["nll"] == pytest.approx(nll, rel=1e-5)
    assert found["generalist"]["nll"] != pytest.approx(found["ensemble"]["nll"], rel=1e-3)
    assert runs.metrics_on(run, place, "val", most=7)["ensemble"]["n"] == 7


def test_the_seeds_generalists_together_answer_with_the_mean_of_their_probabilities(
    untrained, tmp_path
):
    run, place, (generalist, _, _, images, labels) = untrained
    other, y = tmp_path / "seed-1", torch.from_numpy(labels)
    with torch.no_grad():
        raw = torch.from_numpy(images)[:, None]
        p = generalist(raw).softmax(1)
        generalist.head.bias.add_(torch.tensor([3.0, 0, 0, 0, 0, 0]))
        p = (p + generalist(raw).softmax(1)) / 2
    save_classifier(generalist, other / "generalist")
    found = runs.generalists_together([run, other], place)["together"]
    top1 = float((p.argmax(1) == y).double().mean())
    assert found["n"] == 60 and found["top1"] == pytest.approx(top1)
    assert found["nll"] == pytest.approx(float(-p[torch.arange(60), y].log().mean()), rel=1e-5)


def test_the_seeds_generalists_together_stand_beside_without_a_bar():
    one = seed_of(row(60, 0.4))
    two = seed_of(row(60, 0.4))
    pairs, all_three = [row(80, 0.4), row(100, 0.2)], [row(50, 0.2)]
    *_, pair, three = script.verdicts([one, two], networks(one), {2: pairs, 3: all_three})
    assert "of 2 seeds averaged" in pair.claim and pair.holds is True
    assert pair.metrics.startswith("**32.5 %** (25.0, 40.0)")  # 20 of 80, 40 of 100
    assert three.holds is False and three.metrics.startswith("**-20.0 %** (-20.0, -20.0)")


def test_each_seeds_generalist_is_averaged_with_the_nexts_and_all_together(tmp_path, monkeypatch):
    (tmp_path / "seen").mkdir()
    write_json(tmp_path / "seen" / "manifest.json", {})
    asked = []

    def together(runs, place):
        asked.append([run.name for run in runs])
        return {"together": {"top1": len(asked), "nll": 0.0}}

    monkeypatch.setattr(runs, "generalists_together", together)
    results = {seed: {"generalist": row(seed, 0.1)} for seed in (0, 1, 2)}
    for _ in range(2):  # kept
        assert [len(each) for each in script.of_all(tmp_path, tmp_path, results).values()] == [3, 1]
    names = [f"seed-{seed}" for seed in range(3)]
    assert asked == [names[:2], names[1:], [names[2], names[0]], names]
    assert script.of_all(tmp_path, tmp_path, {0: results[0]}) == {}


def test_metrics_are_measured_once_for_a_run_and_again_when_it_is_another(untrained, monkeypatch):
    run, place, _ = untrained
    results, asked = {"generalist": row(10, 0.5), "ensemble": row(5, 0.4)}, []

    def metrics_on(*arguments):
        asked.append(arguments)
        return {"asked": len(asked)}

    monkeypatch.setattr(runs, "metrics_on", metrics_on)
    for _ in range(2):
        assert runs.kept_metrics(run, results, place, "test") == {"asked": 1}
    other = results | {"ensemble": row(4, 0.4)}
    assert runs.kept_metrics(run, other, place, "test") == {"asked": 2}
    assert runs.kept_metrics(run, results, place, "val", 7) == {"asked": 3}


def test_forecast_and_gain_are_ranked_in_shares_of_all_examples_and_of_the_groups_own():
    """Gains of .05, .02 and .01 of 400, 400 and 1,600 examples are .02, .008 and .016 of 1,000."""
    results = seed_of(row(60, 0.4))["main"]
    results["specialists"][2]["n"] = 1600
    assert script.weighted_gains(results) == pytest.approx({0: 0.02, 1: 0.008, 2: 0.016})
    # Ranks 3, 1, 2 of both, and of the own examples .1, .05, .06 beside .05, .02, .01: one swap,
    # 1 - 6 * 2 / 24.
    forecast = [
        {"gain": gain, "errors_inside": inside, "examples": 1000}
        for gain, inside in ((0.9, 100), (0.1, 50), (0.2, 60))
    ]
    assert script.rank_correlations(forecast, results) == pytest.approx((1.0, 0.5))


def test_the_ceiling_is_what_the_groups_catch():
    assert script.reached(seed_of(row(60, 0.4))["main"]) == pytest.approx(0.4 / 0.8)


def test_errors_that_nobody_fixes_are_counted_among_the_generalists(tmp_path):
    for name, predicted in (("one", [0, 9, 9, 9]), ("other", [9, 1, 9, 3])):
        place = tmp_path / name / "evaluation"
        place.mkdir(parents=True)
        top5 = np.array([[first, 0, 0, 0, 0] for first in predicted])
        np.savez(place / "generalist.npz", top5=top5, labels=np.arange(4))
    # Of 1, 2, 3 the 2.
    assert runs.still_wrong(tmp_path / "one", tmp_path / "other") == pytest.approx(1 / 3)


def test_every_bar_is_judged_by_its_mean_over_the_seeds():
    good, poor = seed_of(row(60, 0.4)), seed_of(row(90, 0.55))
    found = holds([good])
    lost = {claim for claim, value in found.items() if value is False}
    # 60 beside 50.
    assert lost == {"(no bar) the ensemble makes fewer errors than: wider generalist"}
    removes = "the ensemble removes at least 30 % of the generalist's errors"
    assert found[removes]  # 40 %
    both = holds([good, poor])
    assert not both[removes]  # (40 + 10) / 2 %
    assert both["it lowers NLL"]  # (.1 - .05) / 2
    assert both["it makes at least 20 % fewer errors than control_wall"]  # (45.5 + 18.2) / 2 %
    assert both["it makes fewer errors than control_compute"]  # (29.4 - 5.9) / 2 %


@pytest.mark.parametrize(
    "changed, claim",
    [
        (
            {"longer": {"generalist": row(89, 0.4)}},
            "doubling the generalist's examples removes less than 10 % of its errors",
        ),
        (
            {"unseen": {"generalist": row(400, 2.0), "ensemble": row(401, 1.9)}},
            "on unseen fonts it makes no more errors than the generalist",
        ),
        (
            {"unseen": {"generalist": row(400, 2.0), "ensemble": row(380, 2.1)}},
            "on unseen fonts its NLL is no higher",
        ),
        ({"whole": 0.59}, "the forecast ranks the groups by gain, Spearman at least .6"),
        ({"seconds": 6.1 * 3600}, "these runs take at most 3 hours on 2 cores"),
        (
            {"deep": {"ensemble": row(55, 0.3), "sizes": [{}, {}]}},
            "(no bar) the ensemble makes fewer errors than: deep ensemble",
        ),
    ],
)
def test_a_bar_that_is_missed_is_said_to_be(changed, claim):
    assert holds([seed_of(row(60, 0.4))])[claim]
    assert holds([seed_of(row(60, 0.4), **changed)])[claim] is False


def test_a_run_without_students_has_neither_their_rows_nor_their_verdicts():
    one = seed_of(row(60, 0.4))
    with_students = holds([one])
    one["main"]["students"] = {}
    assert not any("student" in name or "labels alone" in name for name in script.rows_of(one))
    left = {claim: holding for claim, holding in with_students.items() if "student" not in claim}
    assert 0 < len(left) < len(with_students) and holds([one]) == left


def test_a_student_of_twice_the_size_is_judged_and_one_of_the_same_size_stands_beside():
    one = seed_of(row(60, 0.4))
    kept, lead = script.student_verdicts([one], "double", networks(one))
    assert (kept.holds, kept.metrics) == (True, "**75 %** (75)")  # 30 of 40
    assert (lead.holds, lead.metrics) == (True, "**6.7 %** (6.7)")  # 5 of 75
    beside, _ = script.student_verdicts([one], "same", networks(one))
    assert (beside.holds, beside.metrics) == (None, "**50 %** (50)")
    large = networks(one) | {"student, 2 x": (2001, 4000)}
    assert script.student_verdicts([one], "double", large)[0].holds is False
    no_gain = seed_of(row(100, 0.5))
    assert script.student_verdicts([no_gain], "double", networks(no_gain))[0].holds is False


def test_the_table_has_each_rows_errors_beside_the_generalists():
    one = seed_of(row(60, 0.4))
    lines = script.main_table([one], networks(one)).splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in lines[2:]}
    assert list(cells) == list(script.rows_of(one))
    assert cells["**ensemble**"][1:4] == ["94.00", "0.4000", "**40.0 %** (40.0)"]
    assert cells["control_wall"][3] == "**-10.0 %** (-10.0)"
    assert cells["student, 2 x"][5:] == ["1,980", "4 k", "0.0 M, 1.0 min"]


def test_seeds_stand_in_a_table_with_ceiling_fonts_and_forecast():
    line = script.seeds_table([seed_of(row(60, 0.4))]).splitlines()[2]
    ceiling = "0.800 (0.100) | 50.0% | not measured"
    assert line == f"| 0 | {ceiling} | 60.00 → 62.00 | 2.0000 → 1.9000 | 0.70 | 0.40 |"


def test_each_size_has_its_place_and_classes(tmp_path):
    sizes = {"": 3755, "--sixth": 626, "--both-levels": 6763, "--quick": 24}
    to = ["--to", str(tmp_path)]
    found = {flag: runs.parsed(runs.parser("doc"), [*to, *flag.split()]) for flag in sizes}
    assert {flag: given.classes for flag, given in found.items()} == sizes
    places = {given.to for given in found.values()}
    assert len(places) == 4 and all(place.is_dir() for place in places)
    assert found["--both-levels"].set == [] and found["--sixth"].set == runs.SIXTH


def test_quick_metrics_are_never_written(capsys):
    with pytest.raises(SystemExit):
        runs.parsed(runs.parser("doc"), ["--quick", "--write"])
    assert "mean nothing" in capsys.readouterr().err
