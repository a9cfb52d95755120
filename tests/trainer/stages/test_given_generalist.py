"""A run that starts at the clusters, with weights that somebody else trained."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from running import run_all
from safetensors.torch import save_file
from toy import encode_png, images, toy_config, write_toy

from networks import InputSpec, ModelSpec, PictureRules, build_classifier, load_classifier
from pipeline.config import Data, UserError
from trainer.data.shards import ShardWriter, open_shards, write_manifest
from trainer.stages.networks import record_inputs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    """A run with a generalist of 24 classes."""
    return run_all(tmp_path_factory.mktemp("theirs"), toy_config(data), only={"generalist"})


@pytest.fixture(scope="module")
def weights(saved, tmp_path_factory):
    """What torch.save left of the trunk's own names and a head called fc."""
    state = load_classifier(saved.generalist.path("model.json").parent).state_dict()

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


def test_rows_that_config_json_names_in_another_order_become_the_datas(
    data, weights, tmp_path, caplog
):
    caplog.set_level("INFO", "referral")
    path, state = weights
    names = open_shards(str(data), Data(), "train").class_names
    order = list(range(1, len(names))) + [0]
    theirs = dict(torch.load(path)["state_dict"])
    theirs |= {key: theirs[key][order].clone() for key in ("fc.weight", "fc.bias")}
    save_file(theirs, tmp_path / "model.safetensors")
    id2label = {str(row): names[number] for row, number in enumerate(order)}
    (tmp_path / "config.json").write_text(json.dumps({"id2label": id2label}))
    config = toy_config(data, f"generalist.from={tmp_path}", "generalist.head=fc")
    taken = state_of(run_all(tmp_path / "run", config, only={"generalist"}))
    assert all(torch.equal(taken[name], value) for name, value in state.items())
    assert "rows were put into the order of the classes" in caplog.text


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


@pytest.mark.parametrize("key", ["weights=ema", "head=fc", "prefix=trunk."])
def test_a_key_of_files_is_refused_for_a_run(data, saved, tmp_path, key):
    given = [f"generalist.from={saved.root}", f"generalist.{key}"]
    with pytest.raises(UserError, match="is a directory of Referral's; generalist.head .but .new"):
        run_all(tmp_path / "run", toy_config(data, *given), only={"generalist"})


def test_a_directory_without_a_network_is_named(data, tmp_path):
    config = toy_config(data, f"generalist.from={tmp_path}")
    with pytest.raises(UserError, match="no network is saved there: neither model.json, a run's"):
        run_all(tmp_path / "run", config, only={"generalist"})


SLOW = "train.learning_rate=1e-12"  # at such a rate nothing moves


@pytest.mark.parametrize("place", ["run", "network"])
def test_a_new_head_goes_on_the_trunk_of_a_run_even_of_as_many_classes(
    data, saved, tmp_path, place
):
    source = saved.root if place == "run" else saved.generalist.path("model.json").parent
    given = [f"generalist.from={source}", "generalist.head=new", SLOW]
    run = run_all(tmp_path / "run", toy_config(data, *given), only={"generalist"})
    theirs, ours = state_of(saved), state_of(run)
    for name in theirs:
        same = torch.allclose(ours[name], theirs[name], atol=1e-4)
        assert same == (name not in ("head.weight", "head.bias")), name
    assert read_steps(run) == 60


def test_a_new_head_is_of_other_classes_than_the_runs_were(data, saved, tmp_path):
    """Of 24 classes 9: the trunk is kept, and 9 rows are drawn."""
    few = write_shards(tmp_path / "few", 9)
    given = [f"generalist.from={saved.root}", "generalist.head=new", SLOW]
    run = run_all(tmp_path / "run", toy_config(few, *given), only={"generalist"})
    theirs, ours = state_of(saved), state_of(run)
    assert ours["head.weight"].shape[0] == 9
    assert all(torch.allclose(ours[k], v, atol=1e-4) for k, v in theirs.items() if "trunk" in k)


def test_a_new_head_needs_the_trunk_that_model_builds(data, saved, tmp_path):
    given = [f"generalist.from={saved.root}", "generalist.head=new", "model.width=12"]
    with pytest.raises(UserError, match="its trunk is mlp .*, .model. builds mlp .*'width': 12"):
        run_all(tmp_path / "run", toy_config(data, *given), only={"generalist"})


def test_a_file_with_a_head_of_as_many_classes_gets_a_new_one_where_that_is_asked(
    data, weights, tmp_path
):
    path, state = weights
    given = [f"generalist.from={path}", "generalist.head=new", SLOW]
    run = run_all(tmp_path / "run", toy_config(data, *given), only={"generalist"})
    assert not torch.allclose(state_of(run)["head.weight"], state["head.weight"], atol=0.1)
    assert read_steps(run) == 60


def test_a_snapshot_of_a_hub_is_read_as_its_weights(data, weights, tmp_path, caplog):
    caplog.set_level("INFO", "referral")
    _, state = weights
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    theirs = {name.replace("trunk.", "vision_model.net."): v for name, v in state.items()}
    save_file(theirs | {"text_model.w": torch.ones(2)}, snapshot / "model.safetensors")
    described = {"architecture": "x", "pretrained_cfg": {"mean": [0.4], "std": [0.2]}}
    (snapshot / "config.json").write_text(json.dumps(described))
    given = [f"generalist.from={snapshot}", "generalist.prefix=vision_model.", SLOW]
    run = run_all(tmp_path / "run", toy_config(data, *given), only={"generalist"})
    ours = state_of(run)
    assert all(torch.allclose(ours[k], v, atol=1e-4) for k, v in state.items() if "trunk" in k)
    assert "it learned from inputs with data.mean = [0.4] and data.std = [0.2]" in caplog.text


def test_frozen_layers_of_a_given_trunk_stay_as_they_were(data, saved, tmp_path):
    given = [f"generalist.from={saved.root}", "generalist.head=new"]
    last = [*given, "train.trainable=last-1-blocks", "train.layer_decay=0.5"]
    run = run_all(tmp_path / "run", toy_config(data, *last), only={"generalist"})
    theirs, ours = state_of(saved), state_of(run)
    moved = {name.split(".")[1] for name in theirs if not torch.equal(ours[name], theirs[name])}
    blocks = [name for name, _ in load_trunk(saved).named_children()]
    assert moved == {blocks[-1], "weight", "bias"}  # of the head


def test_a_layer_that_is_not_there_is_named_before_there_is_a_run(data, saved, tmp_path):
    given = [f"generalist.from={saved.root}", "generalist.head=new"]
    config = toy_config(data, *given, "train.trainable=trunk.hiden1")
    with pytest.raises(UserError, match="train.trainable: .* 'trunk.hiden1'; did you mean trunk.h"):
        run_all(tmp_path / "run", config, only={"generalist"})
    with pytest.raises(UserError, match="is of a generalist that starts from weights"):
        toy_config(data, "train.trainable=head")


def write_shards(directory, classes):
    """The toy's pictures of its first classes alone."""
    names, splits = [f"other {c}" for c in range(classes)], {}
    for seed, split in enumerate(("train", "val", "test")):
        labels = np.repeat(np.arange(classes), 12)
        with ShardWriter(directory, split, names) as writer:
            for k, picture in enumerate(images(labels, seed)):
                label = str(labels[k]).encode()
                writer.write({"__key__": f"{k:06d}", "png": encode_png(picture), "cls": label})
        splits[split] = writer.facts
    write_manifest(directory, names, splits)
    return directory


def state_of(run):
    return load_classifier(run.generalist.path("model.json").parent).state_dict()


def load_trunk(run):
    return load_classifier(run.generalist.path("model.json").parent).trunk


def read_steps(run):
    return json.loads(run.generalist.path("summary.json").read_text())["steps"]


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
