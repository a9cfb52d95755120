"""docs/extending.md: each recipe is the block on the page and one row, and works end to end."""

import dataclasses
import json
import math
import re
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from running import run_all
from toy import NUM_CLASSES, toy_config, write_toy

from clustering import ClassGroups, PredictionStatistics, group_classes
from ensemble import SpecialistEnsemble
from launch.journal import Journal
from launch.plan import plan
from launch.sbatch import batches
from launch.status import statuses
from networks import load_classifier
from pipeline.choices import CHOOSE_ALL_GROUPS, ENGINES, STUDENT_METHODS, StudentMethod
from pipeline.config import ResolvedSchedule, UserError, load_config
from pipeline.graph import RunDirectory
from pipeline.store import read_json
from trainer.__main__ import choose, parse
from trainer.commands.check import check
from trainer.commands.predict import find_files
from trainer.data.authoring.folder import from_folder
from trainer.data.decoding import decoder_table
from trainer.data.shards import ShardWriter, open_shards, write_manifest
from trainer.distributed.ranks import ALONE, process_group
from trainer.engines import build_engine
from trainer.session import Session
from trainer.stages.networks import fresh_network
from trainer.stages.specialist import mix_batches, specialist_task
from trainer.stages.training import generalist_task

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
# Marker, a block's first line without the "# " -> the rest of the block.
BLOCKS = dict(re.findall(r"^```python\n# ([^\n]+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
GROUPED = ("generalist", "measure", "cluster")
QUICK = (
    "train.steps=4",
    "train.log_every=1",
    "specialists.steps=2",
    "controls.enabled=false",
    "clusters.num_groups=3",
    "students={}",
)


def table_of(marker: str) -> tuple[object, dict]:
    """The module and the dict that "path/of/module.py: NAME" means."""
    path, name = marker.split(": ")
    module = import_module(path.removesuffix(".py").replace("/", "."))
    return module, getattr(module, name)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """(module, marker of its row) -> the page's module on sys.path and its row in the dict."""
    modules = []

    def add(module: str, marker: str = "") -> None:
        (tmp_path / f"{module}.py").write_text(BLOCKS[f"{module}.py"])
        monkeypatch.syspath_prepend(tmp_path)
        modules.append(module)
        if marker:
            names, table = table_of(marker)
            for name, row in rows_in(BLOCKS[marker], vars(names)).items():
                monkeypatch.setitem(table, name, row)

    yield add
    for module in modules:
        sys.modules.pop(module, None)


def rows_in(text: str, names: dict) -> dict:
    """The rows of a block: `name: row` of a dict, or rows that know their names."""
    if text.startswith('"'):
        return eval("{" + text + "}", dict(names))
    return {row.name: row for row in eval("[" + text + "]", dict(names))}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"), {"train": 12, "val": 12, "test": 2})


def logged(directory: Path) -> list[float]:
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def refusal(data, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        toy_config(data, *QUICK, *overrides)
    return str(caught.value)


# The page


def test_every_dict_that_the_page_names_is_there():
    markers = set(re.findall(r"`([a-z_/]+\.py: [A-Z_]+)`", PAGE))
    assert len(markers) == 10
    for marker in markers:
        assert isinstance(table_of(marker)[1], dict)


def test_each_of_six_recipes_is_a_module_and_a_row():
    modules = [marker for marker in BLOCKS if ":" not in marker]
    rows = [marker for marker in BLOCKS if ":" in marker]
    assert len(modules) == len(rows) == 6
    for row in rows:
        ((name, _),) = rows_in(BLOCKS[row], vars(table_of(row)[0])).items()
        assert name not in table_of(row)[1]


def test_blocks_are_short_and_narrow():
    for block in BLOCKS.values():
        assert len(block.splitlines()) <= 20
        assert max(map(len, block.splitlines())) <= 90


# A loss


def focal_by_hand(logits: np.ndarray, labels: np.ndarray) -> float:
    p = np.exp(logits - logits.max(1, keepdims=True))
    p = (p / p.sum(1, keepdims=True))[np.arange(len(labels)), labels]
    return float(((1 - p) ** 2 * -np.log(p)).mean())


def use_focal(recipe):
    recipe("focal", "pipeline/choices.py: LOSSES")


def test_the_focal_loss_of_probabilities_a_half_and_three_quarters(recipe):
    use_focal(recipe)
    logits, labels = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]), torch.tensor([0, 0])
    expected = (math.log(2) / 4 + math.log(4 / 3) / 16) / 2
    assert import_module("focal").focal(logits, labels).item() == pytest.approx(expected)


def test_a_loss_trains_the_generalist_and_by_inheritance_the_specialists(recipe, data, tmp_path):
    use_focal(recipe)
    config = toy_config(data, *QUICK, "train.loss=focal")
    assert config.specialists.loss == "focal"
    run = run_all(tmp_path / "run", config, (*GROUPED, "route", "specialist"))
    with process_group(config.engine) as ranks, torch.no_grad():
        session = Session(run, ranks)
        task = generalist_task(session, fresh_network(session), config.train, lambda network: {})
        batch = task.stream.batch(0)
        first = focal_by_hand(task.network(batch.inputs).numpy(), batch.labels.numpy())
        assert logged(run.root / "generalist")[0] == pytest.approx(first, rel=1e-5)

        classes = ClassGroups.load(run.cluster.path("groups.json")).members[0]
        task, _ = specialist_task(session, 0, classes, lambda network: {})
        batch = task.stream.batch(0)
        logits = task.network.train()(batch.inputs).numpy()
        logits[:, -1] -= mix_batches(session, 0, classes).shift
        columns = np.full(NUM_CLASSES, len(classes))
        columns[classes] = np.arange(len(classes))
        first = focal_by_hand(logits, columns[batch.labels.numpy()])
        assert logged(run.root / "specialists/000")[0] == pytest.approx(first, rel=1e-4)


def test_a_loss_is_refused_where_another_one_is_learnt(recipe, data):
    use_focal(recipe)
    assert "engine.shard_head = true has cross_entropy alone" in refusal(
        data, "train.loss=focal", "engine.shard_head=true"
    )
    for key in ("dustbin=full", "hard_negatives=0.5"):
        message = refusal(data, "train.loss=focal", f"specialists.{key}")
        assert 'set specialists.loss = "cross_entropy"' in message
    with pytest.raises(UserError, match="students.main.loss = 'focal': beside a teacher"):
        toy_config(data, "train.loss=focal", "students.main.hard_weight=0.5")
    assert "did you mean focal?" in refusal(data, "train.loss=focla")


# A network


def use_patches(recipe):
    recipe("patches", "networks/choices.py: NETWORKS")


def test_a_network_without_dropout_is_trained_saved_and_loaded(recipe, data, tmp_path):
    use_patches(recipe)
    config = toy_config(data, *QUICK, "model={name='patches', width=6, depth=3}")
    run = run_all(tmp_path / "run", config, (*GROUPED, "route", "specialist", "ensemble"))
    network = load_classifier(run.root / "generalist")
    assert network.spec.options == {"width": 6, "depth": 3}
    assert [name for name, _ in network.trunk.named_children()] == ["block1", "block2", "block3"]
    pictures = torch.from_numpy(open_shards(str(data), config.data, "test").inputs([0, 1]))
    assert network(pictures).shape == (2, NUM_CLASSES)
    predictions = SpecialistEnsemble.load(run.root).predict(pictures, top=2)
    assert [len(prediction["classes"]) for prediction in predictions] == [2, 2]


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.dropout=0.5", "patches has no option 'dropout'"),
        ("model.options.pacth=2", "patches has no option 'pacth'; did you mean patch?"),
        ("model.options.patch=3", r"patches: patch = 3 does not divide \[1, 8, 8\]"),
    ],
)
def test_what_a_network_cannot_take_is_refused_before_a_run_is_made(
    recipe, data, override, message
):
    use_patches(recipe)
    with pytest.raises(UserError, match=message):
        check(toy_config(data, *QUICK, "model={name='patches'}", override), 1)


def test_a_users_own_network_needs_no_row(recipe, data, tmp_path):
    recipe("patches")
    own = "model={name='patches:patches', options={width=5}}"
    run = run_all(tmp_path / "run", toy_config(data, *QUICK, own), ["generalist"])
    builders = {"patches:patches": import_module("patches").patches}
    network = load_classifier(run.root / "generalist", builders=builders)
    assert network.linear_head.in_features == 5
    with pytest.raises(ValueError, match="unknown builder 'patches:patches'"):
        load_classifier(run.root / "generalist")
    with pytest.raises(UserError, match="has no option 'pacth'; did you mean patch?"):
        check(toy_config(data, *QUICK, own.replace("width", "pacth")), 1)


# A clustering method


def use_spectral(recipe):
    recipe("spectral", "clustering/choices.py: METHODS")


def test_a_method_finds_the_groups_of_a_run(recipe, data, tmp_path):
    use_spectral(recipe)
    config = toy_config(data, *QUICK, "clusters.method=spectral", "train.steps=30")
    run = run_all(tmp_path / "run", config, GROUPED)
    groups = ClassGroups.load(run.cluster.path("groups.json"))
    assert sorted(np.concatenate(groups.members)) == list(range(NUM_CLASSES))
    summary = read_json(run.cluster.path("summary.json"))
    assert summary["captured_unlabelled"] > 1.2 * summary["chance_unlabelled"]


@pytest.mark.parametrize("num_classes, num_groups", [(1, 1), (4, 1), (4, 4)])
def test_a_method_is_fine_with_the_least_and_the_most_groups(recipe, num_classes, num_groups):
    use_spectral(recipe)
    statistics = PredictionStatistics(num_classes)
    statistics.update(torch.eye(num_classes), torch.arange(num_classes))
    groups = group_classes(statistics, num_groups, "spectral")
    assert len(groups) == num_groups and groups.sizes.sum() == num_classes


def test_what_a_method_cannot_do_is_refused_by_name(recipe, data, monkeypatch):
    use_spectral(recipe)
    assert "did you mean spectral?" in refusal(data, "clusters.method=spectrl")
    wanted = ("clusters.method=spectral", "clusters.overlap=2", "clusters.coverage=0.5")
    assert toy_config(data, *QUICK, *wanted).clusters.coverage == 0.5
    monkeypatch.setattr("pipeline.config.sections.CHOOSE_ALL_GROUPS", {"random", "spectral"})
    assert 'a method other than "random" or "spectral"' in refusal(data, *wanted)
    assert CHOOSE_ALL_GROUPS == {"random"}


# An engine


def use_guarded(recipe):
    recipe("guarded", "pipeline/choices.py: ENGINES")


def test_an_engine_trains_to_the_same_losses_and_weights_as_ddp(recipe, data, tmp_path):
    use_guarded(recipe)
    runs = {}
    for name in ("ddp", "guarded"):
        config = toy_config(data, *QUICK, f"engine.name={name}", "train.accumulation=2")
        runs[name] = run_all(tmp_path / name, config, ["generalist"])
    assert runs["ddp"].report.key == runs["guarded"].report.key
    ddp, guarded = (run.root / "generalist" for run in runs.values())
    assert logged(ddp) == logged(guarded) and len(logged(ddp)) == 4
    weights = load_classifier(ddp).state_dict()
    for name, value in load_classifier(guarded).state_dict().items():
        assert torch.equal(value, weights[name])


def test_it_leaves_out_a_step_whose_gradients_are_not_finite(recipe, data):
    use_guarded(recipe)
    config = toy_config(data, *QUICK, "engine.name=guarded").engine
    with process_group(config) as ranks:
        engine = build_engine(config, ranks)
        network = torch.nn.Linear(2, 1)
        before = network.weight.clone()
        module = engine.prepare(network, ResolvedSchedule())
        for value, moves in ((math.inf, False), (1.0, True)):
            engine.backward(module(torch.full((1, 2), value)).sum())
            engine.step(0.1)
            assert torch.equal(network.weight, before) != moves
        engine.close()


def test_a_row_says_what_an_engine_cannot_do(recipe, data, monkeypatch):
    use_guarded(recipe)
    chosen = ("engine.name=guarded", "train.ema=0.9")
    assert toy_config(data, *QUICK, *chosen).train.ema == 0.9
    message = refusal(data, "engine.name=guarded", "engine.shard_head=true")
    assert 'engine.shard_head = true needs engine.name = "ddp": "guarded" would' in message

    row = dataclasses.replace(ENGINES["guarded"], splits_weights=lambda zero_stage: True)
    monkeypatch.setitem(ENGINES, "guarded", row)
    assert "no rank holds the weights to average; set ema = 0" in refusal(data, *chosen)
    row = dataclasses.replace(row, whole_weights='name = "ddp"', package="no_such_package")
    monkeypatch.setitem(ENGINES, "guarded", row)
    assert 'take engine.name = "ddp", or ema = 0' in refusal(data, *chosen)
    with pytest.raises(UserError, match='"guarded": no_such_package is not installed'):
        check(toy_config(data, *QUICK, "engine.name=guarded"), 1)


# A stage


def use_bound(recipe):
    recipe("bound", "pipeline/stages.py: KINDS")


def test_a_stage_runs_behind_its_inputs_and_is_published(recipe, data, tmp_path):
    use_bound(recipe)
    config = toy_config(data, *QUICK)
    run = run_all(tmp_path / "run", config, (*GROUPED, "bound"))
    (stage,) = run.find("bound")
    assert stage.is_done and stage.inputs == (run.cluster,)

    groups = ClassGroups.load(run.cluster.path("groups.json"))
    measured = np.load(run.measure.path("predictions.npz"))
    pairs = list(zip(measured["top"][:, 0], measured["labels"], strict=True))
    together = [any({a, b} <= set(classes) for classes in groups.members) for a, b in pairs]
    assert read_json(run.root / "bound.json") == {"top1": pytest.approx(np.mean(together))}

    jobs = plan(run)
    states = {status.stage: status.state for status in statuses(run, jobs, Journal())}
    assert states["bound"] == states["clusters"] == "done" and states["report"] == "waiting"
    args = parse(["bound", "--run", str(run.root)])
    assert choose(run, "bound", args) == [stage]


def test_a_stage_is_a_job_here_and_on_slurm(recipe, data, tmp_path):
    use_bound(recipe)
    options = ("slurm.report.time=30", "slurm.default.partition=cpu")
    run = RunDirectory(tmp_path, toy_config(data, *QUICK, *options))
    jobs = plan(run)
    (job,) = (job for job in jobs if job.name == "bound")
    assert job.waits_for == ("clusters",) and job.command() == ["bound"]
    (batch,) = (batch for batch in batches(run, jobs) if batch.name == "bound")
    assert {"--time=30", "--partition=cpu"} <= set(batch.options)
    assert batch.arguments[-1] == "bound" and batch.waits_for == ("clusters",)


def test_a_stage_is_stale_when_a_section_that_it_names_changes(recipe, data, tmp_path):
    use_bound(recipe)
    run = RunDirectory(tmp_path, toy_config(data, *QUICK))
    for stage in (*run.stages[:3], *run.find("bound")):
        stage.begin().finish()
    for override, stale in (("ensemble.gate=2", True), ("slurm.report.time=30", False)):
        again = RunDirectory(tmp_path, toy_config(data, *QUICK, override))
        (stage,) = again.find("bound")
        assert again.cluster.is_done
        assert stage.is_stale == stale and stage.is_done != stale


def test_a_run_without_its_inputs_has_no_such_stage(recipe, data, tmp_path):
    use_bound(recipe)
    run = RunDirectory(tmp_path, toy_config(data, *QUICK, "ensemble.kind=deep"))
    args = parse(["bound", "--run", str(tmp_path)])
    with pytest.raises(UserError, match="bound: this run has no such stage"):
        choose(run, "bound", args)


# A decoder


@pytest.fixture
def sounds(tmp_path):
    """train and val of two classes, 64 samples of 16 bits each."""
    directory, splits = tmp_path / "sounds", {}
    for seed, split in enumerate(("train", "val")):
        samples = np.random.default_rng(seed).integers(-(2**15), 2**15, (48, 64), dtype="<i2")
        with ShardWriter(directory, split, ["low", "high"]) as writer:
            for index, sample in enumerate(samples):
                label = str(index % 2).encode()
                writer.write({"__key__": f"{index:03d}", "pcm": sample.tobytes(), "cls": label})
        splits[split] = writer.facts
    write_manifest(directory, ["low", "high"], splits)
    return directory


def sound_config(sounds, *overrides):
    data = {split: str(sounds) for split in ("train", "val", "test")}
    base = {"data": data, "model": {"name": "mlp"}, "train": {"steps": 2, "batch_size": 8}}
    return load_config(None, ["engine.device=cpu", *overrides], base)


def assert_decoded(shards):
    values = np.random.default_rng(0).integers(-(2**15), 2**15, (48, 64), dtype="<i2")
    inputs = shards.inputs([5, 0])
    assert inputs.shape == (2, 1, 64) and inputs.dtype == np.float32
    assert np.array_equal(inputs[:, 0] * 2**15, values[[5, 0]])


def test_a_decoder_reads_what_training_sees(recipe, sounds, tmp_path):
    recipe("sound", "trainer/data/choices.py: DECODERS")
    config = sound_config(sounds)
    assert_decoded(open_shards(str(sounds), config.data, "train"))
    run = run_all(tmp_path / "run", config, ["generalist"])
    assert load_classifier(run.root / "generalist").spec.input.shape == (1, 64)


def test_what_a_decoder_cannot_read_is_a_corrupt_sample(recipe, tmp_path):
    recipe("sound", "trainer/data/choices.py: DECODERS")
    with ShardWriter(tmp_path, "train", ["a"]) as writer:
        for index, content in enumerate((b"ab", b"abc", b"abcd")):
            writer.write({"__key__": f"{index}", "pcm": content, "cls": b"0"})
    write_manifest(tmp_path, ["a"], {"train": writer.facts})
    shards = open_shards(str(tmp_path), sound_config(tmp_path).data, "train")
    with pytest.raises(UserError, match="3 bytes are not 16-bit samples"):
        shards.inputs([1])
    with pytest.raises(UserError, match=r"float32 \[1, 2\], the first sample float32 \[1, 1\]"):
        shards.inputs([2])


def test_a_decoders_files_are_made_shards_and_predicted(recipe, tmp_path):
    recipe("sound", "trainer/data/choices.py: DECODERS")
    for name in ("low", "high"):
        (tmp_path / "files" / name).mkdir(parents=True)
        for index in range(10):
            (tmp_path / "files" / name / f"{index}.pcm").write_bytes(bytes([index, 1] * 4))
    from_folder(tmp_path / "files", tmp_path / "shards", {"val": 0.2, "test": 0.2})
    shards = open_shards(str(tmp_path / "shards"), sound_config(tmp_path).data, "train")
    assert shards.inputs([0]).shape == (1, 1, 4)
    assert len(list(find_files([tmp_path / "files"], decoder_table({})))) == 20


def test_a_decoder_of_the_config_needs_no_row(recipe, sounds):
    with pytest.raises(UserError, match="no decoder for .pcm"):
        open_shards(str(sounds), sound_config(sounds).data, "train").inputs([0])
    recipe("sound")
    config = sound_config(sounds, "data.decoders.pcm='sound:pcm'")
    assert_decoded(open_shards(str(sounds), config.data, "train"))


# A student's method


def test_a_students_method_is_a_row_and_a_function(data, tmp_path, monkeypatch):
    (tmp_path / "coarse.py").write_text(
        "from trainer.core.objectives import classify\n"
        "def smoothed(session, name, network, stream):\n"
        "    return classify(label_smoothing=0.3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(STUDENT_METHODS, "smoothed", StudentMethod("coarse:smoothed"))
    student = "students.main={method='smoothed', start='scratch', steps=2}"
    run = run_all(tmp_path / "run", toy_config(data, *QUICK, student), ["student"])
    assert len(logged(run.root / "students/main")) == 2
    assert Session(run, ALONE).run.students["main"].is_done
    sys.modules.pop("coarse")
