"""A run that starts at the clusters, with weights that somebody else trained."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from running import run_all
from toy import toy_config, write_toy

from networks import InputSpec, ModelSpec, PictureRules, build_classifier, load_classifier
from pipeline.config import UserError
from trainer.stages.networks import record_inputs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def weights(data, tmp_path_factory):
    """What torch.save left of the trunk's own names and a head called fc."""
    run = run_all(tmp_path_factory.mktemp("theirs"), toy_config(data), only={"generalist"})
    state = load_classifier(run.generalist.path("model.json").parent).state_dict()

    def their_name(name):
        return name.removeprefix("trunk.").replace("head.", "fc.")

    theirs = {their_name(name): value for name, value in state.items()}
    path = tmp_path_factory.mktemp("weights") / "theirs.pt"
    torch.save({"state_dict": theirs}, path)
    return path, state


def test_a_run_starts_at_the_clusters_with_someone_elses_weights(data, weights, tmp_path):
    path, state = weights
    config = toy_config(data, f"generalist.from={path}", "generalist.head=fc")
    run = run_all(tmp_path / "run", config, only={"generalist", "measure", "cluster"})
    taken = load_classifier(run.generalist.path("model.json").parent).state_dict()
    assert all(torch.equal(taken[name], value) for name, value in state.items())
    assert run.cluster.is_done


@pytest.mark.parametrize("head", [[], ["generalist.head=fc"]])
def test_a_trunk_without_a_head_for_these_classes_is_trained_from_there(
    data, weights, tmp_path, caplog, head
):
    caplog.set_level("INFO", "referral")
    path, state = weights
    fewer = torch.load(path)["state_dict"]
    fewer |= {"fc.weight": fewer["fc.weight"][:7], "fc.bias": fewer["fc.bias"][:7]}
    torch.save(fewer, tmp_path / "fewer.pt")
    given = [f"generalist.from={tmp_path / 'fewer.pt'}", *head, "train.learning_rate=1e-12"]
    run = run_all(tmp_path / "run", toy_config(data, *given), only={"generalist"})
    trained = load_classifier(run.generalist.path("model.json").parent).state_dict()
    # At such a rate nothing moves: the trunk is still theirs, the head is fresh.
    trunk = [name for name in state if name.startswith("trunk.")]
    for name in trunk:
        torch.testing.assert_close(trained[name], state[name], atol=1e-4, rtol=0)
    assert not torch.allclose(trained["head.weight"], state["head.weight"], atol=0.1)
    summary = json.loads(run.generalist.path("summary.json").read_text())
    assert summary["steps"] == 60
    assert "its trunk and a fresh head of 24 rows are trained from there" in caplog.text


def test_a_saved_network_of_other_class_names_is_refused(data, weights, tmp_path):
    names = [f"class {c}" for c in reversed(range(24))]
    other = write_toy(tmp_path / "other", names=names)
    run = run_all(tmp_path / "theirs", toy_config(other), only={"generalist"})
    source = run.generalist.path("model.json").parent
    with pytest.raises(UserError, match="its class 0 is 'class 23', the data's 'class 0'"):
        run_all(tmp_path / "run", toy_config(data, f"generalist.from={source}"), {"generalist"})


def test_a_key_of_files_is_refused_for_a_directory(data, weights, tmp_path):
    given = [f"generalist.from={tmp_path}", "generalist.weights=ema"]
    with pytest.raises(UserError, match="is a directory; generalist.head and generalist.weights"):
        run_all(tmp_path / "run", toy_config(data, *given), only={"generalist"})


def test_a_network_from_elsewhere_records_how_the_data_is_made_unless_it_learned_otherwise():
    spec = ModelSpec("mlp", 2, InputSpec((1, 4, 4)), {"width": 2})
    network = build_classifier(spec)
    white = PictureRules(size=(4, 4), channels=1)
    black = replace(white, background="black")

    def record(pictures):
        shards = SimpleNamespace(pictures=pictures, decoder_names={})
        record_inputs(SimpleNamespace(shards=lambda _: shards), network)
        return network.spec.input.pictures

    assert record(None) is None and record(white) == white
    # Data that do not say it are taken to be like those that it learned from.
    assert record(None) == white and record(replace(white, max_pixels=99)).max_pixels == 99
    with pytest.raises(ValueError, match="background white.*than the data's .*background black"):
        record(black)
