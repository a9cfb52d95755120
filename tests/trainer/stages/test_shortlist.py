"""Second opinions as a run: what joins them is fitted on val, and everybody can use them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from exported import predicted_by_run_and_export
from running import run_all
from toy import NUM_CLASSES, toy_config, write_toy

from ensemble import DeepEnsemble, ShortlistEnsemble, load_ensemble
from launch.plan import plan
from launch.results import show_results
from networks import load_classifier, save_classifier
from pipeline.config import UserError, load_config
from pipeline.graph import RunDirectory
from pipeline.results import collect
from pipeline.store import read_json
from pipeline.terminal import Console
from trainer.commands.check import check
from trainer.data.shards import open_shards
from trainer.stages.stored_targets import restored, rows_by_mass

SHORT = ["train.steps=30", "students.main.steps=10", "controls.enabled=false"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"))


def configured(data, ensemble, *overrides):
    base = toy_config(data).dump()
    base["ensemble"] = ensemble
    return load_config(None, [*SHORT, *overrides], base)


@pytest.fixture(scope="module")
def other(data, tmp_path_factory):
    """A run of a wider network of the same classes."""
    base = toy_config(data).dump()
    base |= {"model": {"name": "mlp", "width": 48, "depth": 1}, "seed": 5}
    root = tmp_path_factory.mktemp("other") / "run"
    return run_all(root, load_config(None, SHORT, base), only=["generalist"])


@pytest.fixture(scope="module")
def run(data, other, tmp_path_factory):
    """Two generalists of its own, a wider one from elsewhere, and a student of all three."""
    keys = {"kind": "shortlist", "members": 2, "networks": [str(other.root)]}
    root = tmp_path_factory.mktemp("shortlist") / "run"
    return run_all(root, configured(data, keys))


def inputs_of(run):
    test = open_shards(run.config.data.test, run.config.data, "test")
    return torch.from_numpy(test.read(np.arange(len(test)))[0]), torch.from_numpy(test.labels)


def test_its_members_are_generalists_of_its_own_and_copies_of_those_from_elsewhere(run, other):
    assert [stage.place for stage in run.members] == ["members/001", "members/002"]
    assert {stage.name for stage in run.stages} == set(
        "generalist member ensemble targets student evaluate report".split()
    )
    theirs = other.generalist.path("model.safetensors").read_bytes()
    assert (run.root / "members/002/model.safetensors").read_bytes() == theirs
    trained = [read_json(stage.path("summary.json"))["steps"] for stage in run.members]
    assert trained == [30, 0]


def test_networks_that_exist_already_join_in_the_job_of_the_ensemble(run):
    jobs = {job.name: job for job in plan(run)}
    assert jobs["members/001"].command() == ["member", "--index", "1"]
    assert jobs["ensemble"].command()[:2] == ["member", "ensemble"]
    assert [stage.place for stage in jobs["ensemble"].stages][:2] == ["members/002", "ensemble"]
    assert set(jobs["ensemble"].waits_for) == {"generalist", "members/001"}


def test_what_is_fitted_on_val_is_ensemble_json(run):
    content = read_json(run.root / "ensemble.json")
    assert content["kind"] == "shortlist" and content["members"] == 3 and content["order"] == 0
    assert content["shortlist"] in (5, 20, NUM_CLASSES)
    assert content["weights"][0] == 1 and len(content["weights"]) == 3
    assert len(set(content["temperatures"])) == 3
    by_size = read_json(run.ensemble.path("sizes.json"))
    assert [len(each["weights"]) for each in by_size] == [1, 2, 3]
    assert {each["shortlist"] for each in by_size} == {content["shortlist"]}


def test_the_ensembles_row_is_that_of_the_library_call(run):
    inputs, labels = inputs_of(run)
    ensemble = load_ensemble(run.root)
    assert isinstance(ensemble, ShortlistEnsemble)
    q = ensemble.probabilities(inputs)
    row = read_json(run.evaluate.path("ensemble.json"))["row"]
    assert row["nll"] == pytest.approx(float(-q[range(len(q)), labels].log().mean()), rel=1e-5)
    assert row["top1"] == pytest.approx(float((q.argmax(1) == labels).double().mean()))
    assert row["members"]["count"] == 3


def test_it_is_better_than_its_generalist_and_has_a_row_for_each_size(run):
    results = collect(run)
    sizes = results["sizes"]
    assert [each["size"] for each in sizes] == [1, 2, 3]
    assert sizes[2]["nll"] == pytest.approx(results["ensemble"]["nll"], rel=1e-5)
    assert sizes[0]["top1"] == pytest.approx(results["generalist"]["top1"])
    assert results["ensemble"]["nll"] < results["generalist"]["nll"]
    examples = [results[name]["cost"]["examples_seen"] for name in ("generalist", "ensemble")]
    assert examples[1] == 2 * examples[0]  # nothing for the network that was there already
    assert "dee" in results["ensemble"]


def test_a_student_learns_what_the_ensemble_predicts(run):
    stage = run.targets["ensemble"]
    answers = read_json(stage.path("train/answers.json"))
    assert answers["members"] == 1
    train = open_shards(run.config.data.train, run.config.data, "train")
    q = load_ensemble(run.root).probabilities(torch.from_numpy(train.read(np.arange(4))[0]))
    read = rows_by_mass(stage.path("train"), train.num_classes, 1, len(train))
    kept = restored(read(np.arange(4)), train.num_classes, "cpu")
    torch.testing.assert_close(kept.spread()[0], q.float(), atol=2e-3, rtol=0)


def test_its_page_and_its_last_lines_say_what_it_is(run):
    page = (run.root / "report.html").read_text()
    assert "3 networks: the generalist, and others of the same classes" in page
    length = read_json(run.root / "ensemble.json")["shortlist"]
    assert f"asked about its {length} likeliest classes" in page
    assert "joined there by the geometric mean" in page
    assert "Ensemble size and diversity" in page and "The groups" not in page
    console = Console(record=True, width=300)
    show_results(run, console)
    said = console.export_text()
    asked = f"asked about each example's {length} likeliest classes"
    assert f"2 further networks were {asked}" in " ".join(said.split())


def test_it_is_exported_and_predicts_as_the_run_does(run, tmp_path, capsys):
    inputs, _ = inputs_of(run)
    first = predicted_by_run_and_export(run.root, inputs, tmp_path, capsys)
    p = load_ensemble(run.root).probabilities(inputs[:1])
    assert first["classes"] == p.topk(2).indices[0].tolist() and first["specialists"] == []


def test_with_all_classes_and_nothing_fitted_it_is_the_geometric_deep_ensemble(run, data, tmp_path):
    fixed = {"temperatures": False, "fit_weight": False, "members": 2}
    kinds = {
        "whole": {"kind": "shortlist", "shortlist": 1000, **fixed},
        "deep": {"kind": "deep", "combine": "geometric", "members": 2},
    }
    rows, sizes = {}, {}
    for name, keys in kinds.items():
        root = tmp_path / name
        again = RunDirectory(root, configured(data, keys, "students={}"))
        for stage in (again.generalist, *again.members):  # the same stages: not trained again
            shutil.copytree(run.root / stage.place, root / stage.place, symlinks=True)
            assert stage.is_done
        done = run_all(root, again.config)
        rows[name] = read_json(done.evaluate.path("ensemble.json"))["row"]
        sizes[name] = collect(done)["sizes"]
        if name == "deep":
            assert load_ensemble(root).order == 0
    for key in ("nll", "top1", "brier"):
        assert rows["whole"][key] == pytest.approx(rows["deep"][key], rel=1e-5)
    for one, two in zip(sizes["whole"], sizes["deep"], strict=True):
        assert one["nll"] == pytest.approx(two["nll"], rel=1e-5)


def test_networks_from_elsewhere_are_averaged_whole_too(run, other, data, tmp_path):
    """A deep ensemble of the run's generalist and two networks that exist already."""
    given = [str(run.root / "members" / "001"), str(other.root)]
    keys = {"kind": "deep", "members": 1, "networks": given}
    start = f"generalist.from={run.root}"
    heads = ["students.main.network=hydra", "students.main.start=scratch"]
    done = run_all(tmp_path / "run", configured(data, keys, start, *heads))
    assert [stage.place for stage in done.members] == ["members/001", "members/002"]
    assert not any(stage.kind.trains for stage in done.members)
    assert read_json(done.root / "ensemble.json") == {"schema": 1, "kind": "deep", "members": 3}
    inputs, labels = inputs_of(run)
    networks = [load_classifier(run.root / "generalist"), load_classifier(given[0])]
    networks.append(load_classifier(other.root / "generalist"))
    with torch.no_grad():
        p = torch.stack([network(inputs).softmax(1) for network in networks]).mean(0)
    results = collect(done)
    assert results["ensemble"]["nll"] == pytest.approx(
        float(-p[range(len(p)), labels].log().mean()), rel=1e-5
    )
    assert results["ensemble"]["cost"]["examples_seen"] == 0
    assert load_classifier(done.root / "students/main").num_members == 3  # one of each teacher
    page = (done.root / "report.html").read_text()
    assert "3 networks, 2 of them trained elsewhere, and the mean of their distributions" in page


def test_a_moved_network_stales_nothing_and_another_one_does(run, other, data, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(other.root, moved)
    keys = {"kind": "shortlist", "members": 2, "networks": [str(moved)]}
    again = RunDirectory(run.root, configured(data, keys))
    assert again.ensemble.is_done and again.members[1].is_done and again.report.is_done
    network = load_classifier(moved / "generalist")
    with torch.no_grad():
        network.head.bias.add_(1)
    save_classifier(network, tmp_path / "changed")
    keys["networks"] = [str(tmp_path / "changed")]
    changed = RunDirectory(run.root, configured(data, keys))
    assert changed.members[0].is_done and changed.generalist.is_done
    assert not changed.members[1].is_done and not changed.ensemble.is_done


def test_networks_that_cannot_join_are_named_before_anything_is_trained(run, other, data, tmp_path):
    def message(path):
        keys = {"kind": "shortlist", "members": 1, "networks": [str(path)]}
        config = configured(data, keys)
        with pytest.raises(UserError) as error:
            RunDirectory(tmp_path / "new", config).method.check(NUM_CLASSES, "the data")
            check(config, 1, tmp_path / "new")
        return str(error.value)

    assert "holds no network" in message(tmp_path)
    network = load_classifier(other.root / "generalist")
    network.spec = network.spec.__class__(
        **{**vars(network.spec), "class_names": tuple("abcdefghijklmnopqrstuvwx")}
    )
    save_classifier(network, tmp_path / "names")
    assert "its class 0 is 'a', the data's 'class 0'" in message(tmp_path / "names")
    model = read_json(tmp_path / "names" / "model.json")
    few = model | {"num_classes": 3, "class_names": ["a", "b", "c"]}
    (tmp_path / "names" / "model.json").write_text(json.dumps(few))
    assert f"knows 3 classes, the data has {NUM_CLASSES}" in message(tmp_path / "names")


def test_a_deep_ensemble_of_old_is_arithmetic(run):
    ensemble = DeepEnsemble([load_classifier(run.root / "generalist")])
    assert ensemble.order == 1
