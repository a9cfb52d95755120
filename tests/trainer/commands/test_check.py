"""Errors that are found before a run is made: one line, exit code 2, nothing written."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import webdataset as wds
from toy import encode_png, images, toy_config, write_toy

from pipeline.config import UserError, save_config
from trainer.commands import needs
from trainer.commands.check import check
from trainer.data.shards import ShardWriter, write_manifest


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"))


def test_a_sound_config_passes_and_writes_nothing(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check(toy_config(data), 2, tmp_path / "run") == []
    assert not list(tmp_path.iterdir())


INDIVISIBLE = "batch 95 is not divisible by 2 ranks x 1 accumulation steps; try 94 or 96"


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.batch_size=95", INDIVISIBLE),
        ("train.accumulation=7", "not divisible by 2 ranks x 7 accumulation steps"),
        ("model.options={widht=3}", "widht"),
        ("generalist.from=/tmp/no/such/run", "generalist.from = /tmp/no/such/run"),
        ("data.augment=no_such_module:view", "no_such_module"),
        ("model.name=no_such_module:build", "no_such_module"),
    ],
)
def test_an_error_is_found_before_anything_runs(data, override, message):
    with pytest.raises(UserError) as error:
        check(toy_config(data, override), 2)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_val_with_other_classes_is_refused(data, tmp_path):
    other = write_toy(tmp_path / "other", names=[f"another {c}" for c in range(24)])
    with pytest.raises(UserError, match="data.val has other classes than data.train"):
        check(toy_config(data, f"data.val={other}"), 1)


def test_val_with_pictures_made_by_other_rules_is_refused(tmp_path):
    few = {"train": 4, "val": 10, "test": 2}
    for name, background in (("a", "white"), ("b", "black")):
        path = write_toy(tmp_path / name, few) / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["inputs"] = {"pictures": {"channels": 1, "background": background}}
        path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="data.val holds pictures made by other rules .*black"):
        check(toy_config(tmp_path / "a", f"data.val={tmp_path}/b"), 1)


def test_a_class_index_out_of_range_leaves_no_run_behind(data, tmp_path):
    with wds.TarWriter(str(tmp_path / "wrong-000000.tar")) as tar:
        tar.write({"__key__": "a", "cls": b"99", "png": encode_png(images(np.array([0]), 1)[0])})
    config, run = tmp_path / "config.toml", tmp_path / "run"
    wrong = (f"data.train={tmp_path}/wrong-000000.tar", "data.classes=24")
    save_config(toy_config(data, *wrong), config)
    command = [sys.executable, "-P", "-m", "launch.cli", "run", str(config), "--run", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and not run.exists()
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "has label 99, which is none of the 24 classes" in done.stderr


# The first step of every network


MODULE = """
import torch
from torch import nn

class Trunk(nn.Module):
    def __init__(self, shape, spare=False, fails=False, infinite=False):
        super().__init__()
        self.body = nn.Linear(64, 6)
        self.spare = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)) if spare else None
        self.fails, self.infinite = fails, infinite

    def forward(self, x):
        if self.fails and self.training:
            return self.body(x.flatten(1)) @ torch.ones(3, 3)
        return self.body(x.flatten(1)) * (float("inf") if self.infinite else 1)
"""


@pytest.fixture
def own_network(tmp_path, monkeypatch):
    (tmp_path / "trunk_to_check.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trunk_to_check", raising=False)
    return "model.name=trunk_to_check:Trunk", tmp_path / "trunk_to_check.py"


def mistake(config, processes=1, **options):
    with pytest.raises(UserError) as error:
        check(config, processes, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_parameters_that_the_loss_does_not_reach_are_named(data, own_network):
    config = toy_config(data, own_network[0], "model.options={spare=true}")
    assert mistake(config) == (
        "train: the loss does not reach trunk.spare.0.weight, trunk.spare.0.bias, "
        "trunk.spare.1.weight and 1 more; leave layers that the output does not depend on out of "
        "the network"
    )


def test_what_fails_in_training_mode_alone_names_the_users_line(data, own_network):
    name, file = own_network
    line = MODULE.splitlines().index(
        "            return self.body(x.flatten(1)) @ torch.ones(3, 3)"
    )
    words = mistake(toy_config(data, name, "model.options={fails=true}"))
    assert words.startswith("train: the first training step fails: RuntimeError: mat1 and mat2")
    assert words.endswith(f"({file}:{line + 1})")


def test_a_loss_that_is_not_finite_at_the_first_step_is_refused(data, own_network):
    words = mistake(toy_config(data, own_network[0], "model.options={infinite=true}"))
    assert "the loss of the first training step is nan" in words


@pytest.mark.parametrize(
    "ranks, overrides, words",
    [
        (1, ["train.batch_size=1"], "train.batch_size = 1 over 1 ranks x 1 accumulation"),
        (2, ["train.batch_size=2"], "train.batch_size = 2 over 2 ranks x 1 accumulation"),
        (1, ["train.batch_size=4", "train.accumulation=4"], "over 1 ranks x 4 accumulation"),
        (1, ["students.main.batch_size=1"], "students.main.batch_size = 1 over 1 ranks"),
    ],
)
def test_batch_norm_with_one_example_at_a_time_is_refused(data, ranks, overrides, words):
    batches = ["specialists.batch_size=8", "specialists.accumulation=1"]
    batches += ["students.main.batch_size=8", "students.main.accumulation=1"]
    config = toy_config(data, "model.options={norm='batch'}", *batches, *overrides)
    message = mistake(config, ranks)
    assert words in message and "which batch norm (trunk.hidden1.norm) cannot normalise" in message


def test_a_specialists_batch_of_one_has_no_room_for_the_dustbin(data):
    words = mistake(toy_config(data, "specialists.batch_size=1"))
    assert "specialists.batch_size = 1" in words and "try 2" in words


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["specialists.trainable=last-9-blocks"], "specialists.trainable = 'last-9-blocks'"),
        (
            ["specialists.kind=branch", "specialists.blocks=9"],
            "specialists: blocks = 9: the trunk has 1 (hidden1)",
        ),
        (["students.main.model={name='nothing:here'}"], "No module named 'nothing'"),
        (["students.main.model={name='mlp', width=48, depth=3}"], 'start = "scratch"'),
        (["students.main.perturb=ods"], "networks that are joined are none"),
        (["students.main.leave_out=['no such class']"], "leave_out = 'no such class' is no class"),
        (["students.main.augment=nothing:here"], "No module named 'nothing'"),
    ],
)
def test_a_network_or_objective_that_cannot_be_is_found_by_its_name(data, overrides, words):
    assert words in mistake(toy_config(data, *overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["ensemble.kind=deep", "ensemble.members=2", "students.main.network=hydra"],
        ["ensemble.kind=deep", "ensemble.members=2", "students.main.perturb=ods"],
        ["specialists.dustbin=full"],
        ["specialists.dustbin=fresh", "specialists.trainable=head"],
        ["specialists.hard_negatives=0.5"],
        ["specialists.kind=branch", "specialists.model={embedding=8}"],
        ["specialists.kind=branch", "specialists.blocks=1", "engine.precision=bf16"],
        ["engine.shard_head=true", "train.negatives=5"],
        ["students.main.method=prior", "students.main.start=scratch"],
        ["students.main.model={width=48}"],
        ["students.a.steps=3", "students.b.start=a", "students.b.teacher=a"],
        ["data.augment=shift", "students.main.views=2", "engine.precision=bf16"],
    ],
)
def test_every_objective_of_a_sound_run_takes_its_first_step(data, overrides):
    assert check(toy_config(data, *overrides), 2) == []


# Classes, groups and inputs


def test_rerankers_of_a_small_label_set_are_a_warning(data, monkeypatch):
    rerank = ('ensemble.kind="rerank"', "ensemble.members=2", "rerank.k=4", "rerank.random=2")
    config = toy_config(data, *rerank, "students={}", "controls.enabled=false")
    (warning,) = check(config, 1)
    assert 'ensemble.kind = "rerank" with 24 classes' in warning
    assert 'kind = "shortlist"' in warning
    monkeypatch.setattr("trainer.commands.check.FEWEST_TO_RERANK", 24)
    assert check(config, 1) == []


def without(data, tmp_path, absent, splits=("train",)):
    """The toy's shards, less the examples of some classes in some splits."""
    names = json.loads((data / "manifest.json").read_text())["classes"]
    facts = {}
    for seed, split in enumerate(("train", "val", "test")):
        kept = [c for c in range(24) if split not in splits or c not in absent]
        labels = np.repeat(kept, 8)
        with ShardWriter(tmp_path / "fewer", split, names) as writer:
            for k, image in enumerate(images(labels, seed)):
                label = str(labels[k]).encode()
                writer.write({"__key__": f"{k:06d}", "png": encode_png(image), "cls": label})
        facts[split] = writer.facts
    write_manifest(tmp_path / "fewer", names, facts)
    return tmp_path / "fewer"


def test_classes_without_a_training_example_are_a_warning(data, tmp_path):
    fewer = without(data, tmp_path, absent=(3, 4, 5, 6))
    (warning,) = check(toy_config(fewer), 1)
    assert warning.startswith(
        "data.train has no example of 4 of 24 classes (class 3, class 4, class 5 and 1 more)"
    )


def test_more_groups_than_classes_with_examples_are_refused(data, tmp_path):
    fewer = without(data, tmp_path, absent=range(3, 24))
    words = mistake(toy_config(fewer))
    assert "clusters.num_groups = 6 is more than the 3 classes that data.train has" in words


@pytest.mark.parametrize(
    "content, words",
    [
        ({"num_classes": 9, "members": [[0, 1]]}, "is for 9 classes, the data has 24"),
        ({"num_classes": 24, "members": [[0, 0]]}, "holds class 0 more than once"),
        ({"num_classes": 24, "members": [[0], []]}, "group 1 is empty"),
        ({"num_classes": 24, "members": [[3, 4]]}, "no example of a class in any of its groups"),
    ],
)
def test_a_groups_file_that_does_not_fit_is_refused(data, tmp_path, content, words):
    fewer = without(data, tmp_path, absent=(3, 4))
    file = tmp_path / "groups.json"
    file.write_text(json.dumps({"schema": 1, **content}))
    assert words in mistake(toy_config(fewer, f"clusters.groups_file={file}"))


def test_of_the_users_groups_one_without_examples_is_a_warning(data, tmp_path):
    fewer = without(data, tmp_path, absent=(3, 4))
    file = tmp_path / "groups.json"
    groups = {"schema": 1, "num_classes": 24, "members": [[0, 1, 2], [3, 4]]}
    file.write_text(json.dumps(groups))
    warnings = check(toy_config(fewer, f"clusters.groups_file={file}"), 1)
    assert any("group 1 has no class with an example" in warning for warning in warnings)


@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros((1, 9, 9), np.uint8), "data.val has inputs of shape [1, 9, 9], data.train"),
        (np.zeros((1, 8, 8), np.float32), "data.val has inputs of type float32, data.train uint8"),
    ],
)
def test_a_split_with_other_inputs_than_train_is_refused(data, tmp_path, array, words):
    names = json.loads((data / "manifest.json").read_text())["classes"]
    with ShardWriter(tmp_path / "other", "val", names) as writer:
        writer.write({"__key__": "a", "npy": npy(array), "cls": b"0"})
    write_manifest(tmp_path / "other", names, {"val": writer.facts})
    assert words in mistake(toy_config(data, f"data.val={tmp_path / 'other'}"))


def npy(array):
    import io

    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


# Memory and disk


def test_too_little_memory_is_a_warning_with_what_is_needed_and_free(data, monkeypatch):
    monkeypatch.setattr(needs, "free_memory", lambda device: 50_000)
    warnings = check(toy_config(data), 2)
    assert warnings and warnings[0].startswith("train: weights, optimizer and logits take 0.1 MiB")


def test_features_that_would_take_too_much_are_refused_before_anything_runs(data, tmp_path):
    branch = ("specialists.kind=branch", "specialists.features_bytes=1000")
    config = toy_config(data, *branch)
    # 960 and 288 examples of 24 numbers and one of 8 bytes. The head reads the same numbers.
    needed = (960 + 288) * (24 * 4 + 8)
    words = f"take {needed:,} bytes, specialists.features_bytes = 1,000 allows less"
    assert words in mistake(config, run=tmp_path / "run")


def test_memory_is_counted_by_hand():
    """An mlp of 64 x 24 + 24 weights and 24 x 24 + 24 of the head, AdamW, batch 96 of 2 ranks."""
    from trainer.stages.rehearsal import Part

    config = toy_config("nowhere", "train.ema=0.9")
    network = _toy_network()
    weights = 64 * 24 + 24 + 24 * 24 + 24
    part = Part("train", network, None, config.train, 2, "none")
    assert needs.memory_of(config, part) == 4 * 5 * weights + 4 * 3 * 48 * 24
    assert needs.checkpoint_bytes(part) == 4 * 4 * weights
    assert needs.kept_checkpoints(part) == 3  # 60 steps, one every 20


def _toy_network():
    from networks import InputSpec, ModelSpec, build_classifier

    spec = ModelSpec("mlp", 24, InputSpec(shape=(1, 8, 8)), {"width": 24, "depth": 1})
    return build_classifier(spec)


@pytest.mark.parametrize("free, refused", [(10_000, True), (200_000, False)])
def test_too_small_a_disk_is_said_with_what_is_needed_and_free(
    data, tmp_path, monkeypatch, free, refused
):
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    if refused:
        words = mistake(toy_config(data), run=tmp_path / "run")
        assert "are free; checkpoints take" in words and "choose --run on another disk" in words
        return
    (warning,) = check(toy_config(data), 1, tmp_path / "run")
    assert "are free; checkpoints take" in warning and "more than there is" in warning


# Where networks cannot be tried before RUN is made


def test_the_first_job_tries_the_networks_where_nobody_could(data, tmp_path, own_network):
    config = toy_config(data, own_network[0], "model.options={spare=true}")
    run = tmp_path / "run"
    run.mkdir()
    save_config(config, run / "config.toml")
    (run / "UNCHECKED").touch()
    command = [sys.executable, "-P", "-m", "trainer", "generalist", "--run", str(run), "--trust"]
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", os.getcwd())])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "the loss does not reach trunk.spare" in done.stderr
    assert (run / "UNCHECKED").exists() and not (run / "generalist").exists()


# Splits that are not apart


def test_splits_that_have_shards_in_common_are_a_warning(data):
    (warning,) = check(toy_config(data, f"data.test={data}/train-000000.tar"), 1)
    assert "data.train and data.test have 1 of 1 shards in common" in warning
    (warning,) = check(toy_config(data, f"data.test={data}/val-000000.tar"), 1)
    assert "data.val and data.test have 1 of 1 shards in common" in warning


def test_a_batch_larger_than_train_is_a_warning(data):
    count = json.loads((data / "manifest.json").read_text())["splits"]["train"]["samples"]
    (warning,) = check(toy_config(data, f"train.batch_size={count + 1}"), 1)
    assert f"train.batch_size = {count + 1} is more than the {count} examples" in warning
    assert check(toy_config(data, f"train.batch_size={count}"), 1) == []
