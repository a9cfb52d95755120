"""What `referral prepare --plan` says of a run, beside what the run left on the disk and held."""

import numpy as np
import pytest
import torch
from running import run_all
from toy import NUM_CLASSES, toy_config, write_toy

from benchmarks.scaling import storages
from launch.plan import plan
from launch.sizing import Inputs, Sizes, Sizing, Split, inputs_of
from networks import InputSpec, ModelSpec, build_classifier, load_classifier, parameter_count
from pipeline.config import Engine
from pipeline.graph import RunDirectory
from pipeline.scaling import (
    EVALUATED_ROW,
    INDEX,
    Network,
    checkpoint_bytes,
    held_by_training,
)
from trainer.commands.sizes import DeclaredInputs, network_sizes
from trainer.core.checkpoints import save_checkpoint
from trainer.core.objectives import classify
from trainer.data.streams import Batch
from trainer.distributed.ranks import process_group
from trainer.engines import build_engine

HEADS = 6000  # bytes: of npz and safetensors files before their numbers


def sizing_of(run: RunDirectory) -> Sizing:
    """As the command has it, but for the trainer's process."""
    inputs = inputs_of(run.config, "uint8,1,8,8")
    declared = DeclaredInputs(inputs.classes, inputs.shape, np.dtype(inputs.dtype))
    answer = network_sizes(run.config, declared)
    networks = {name: Network(**each) for name, each in answer["networks"].items()}
    return Sizing(run, plan(run), inputs, Sizes(networks, answer["branch"]))


def on_disk(place) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


def file_sizes(stages, name) -> int:
    return sum(stage.path(name).stat().st_size for stage in stages)


@pytest.fixture(scope="module")
def needs(small_run):
    return {row.stage: row for row in sizing_of(small_run).rows()}


def test_networks_are_counted_without_memory(small_run):
    sizes = sizing_of(small_run).sizes.networks
    for name, place in (("generalist", "generalist"), ("students.main", "students/main")):
        network = load_classifier(small_run.root / place)
        assert sizes[name].weights == parameter_count(network)
        assert sizes[name].features == network.linear_head.in_features
        assert sizes[name].head == parameter_count(network.head)
        assert small_run.generalist.path("model.safetensors").stat().st_size == pytest.approx(
            sizes["generalist"].bytes, abs=HEADS
        )


def test_specialists_are_of_average_size(small_run):
    sizing = sizing_of(small_run)
    found = file_sizes(small_run.specialists, "model.safetensors")
    assert found == pytest.approx(4 * sizing.specialist_network().bytes, abs=4 * HEADS)
    assert sizing.group_size == NUM_CLASSES / 4


def test_every_stage_has_its_ranks_and_one_row(small_run, needs):
    assert needs["specialists x 4"].count == 4 and needs["generalist"].ranks == 1
    assert set(needs) == {
        *(stage.place for stage in small_run.stages if stage.name != "specialist"),
        "specialists x 4",
        "cache",
    }
    assert needs["generalist"].steps == 40


def test_what_measuring_stages_leave_is_within_its_headers(small_run, needs):
    predictions = small_run.measure.path("predictions.npz").stat().st_size
    assert predictions == pytest.approx(needs["clusters/statistics"].disk, abs=HEADS)
    rows = on_disk(small_run.root / "cache")
    assert rows == pytest.approx(needs["cache"].disk, abs=3 * HEADS)
    ids = sum(path.stat().st_size for path in small_run.route.path("").glob("**/*.npy"))
    assert ids == pytest.approx(needs["routed"].disk, abs=4 * HEADS)


def test_what_evaluation_leaves_of_each_example_is_counted(small_run):
    with np.load(small_run.evaluate.path("generalist.npz")) as arrays:
        of_row = sum(array.nbytes for array in arrays.values()) / len(arrays["labels"])
    assert of_row in (EVALUATED_ROW, EVALUATED_ROW + INDEX)


def test_stored_targets_are_those_of_all_classes_where_these_are_few(small_run, needs):
    stored = small_run.targets["ensemble"].path("train")
    counts = np.load(stored / "counts.npy")
    found = on_disk(stored)
    least = needs["targets/ensemble"].disk * (14 + 4 * counts.mean()) / (14 + 4 * NUM_CLASSES)
    assert found == pytest.approx(least, abs=HEADS)


def test_kept_features_are_counted(tmp_path):
    data = write_toy(tmp_path / "data", {"train": 8, "val": 4, "test": 4})
    config = toy_config(data, "specialists.kind=branch", "train.steps=2", "controls.enabled=false")
    run = run_all(tmp_path / "run", config, {"generalist", "measure", "cluster", "features"})
    row = next(each for each in sizing_of(run).rows() if each.stage == "features")
    arrays = [p for p in run.features.path("").rglob("*.npy") if p.stem != "readable"]
    assert len(arrays) >= 4
    assert sum(path.stat().st_size for path in arrays) == pytest.approx(row.disk, abs=HEADS)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.optimizer=sgd",),
        ("train.ema=0.9",),
        ("engine.shard_head=true",),
        ("train.row_rate=0.1",),
    ],
)
def test_a_training_step_holds_and_saves_what_the_formula_says(tmp_path, overrides):
    """A network large enough that a step's small tensors do not count: 2.1 million."""
    inputs = DeclaredInputs(2000, (1000,), np.dtype(np.float32))
    config = toy_config(tmp_path, "model.width=700", "data.classes=2000", *overrides)
    size = Network(**network_sizes(config, inputs)["networks"]["generalist"])
    spec = ModelSpec("mlp", 2000, InputSpec((1000,), "float32"), {"width": 700, "depth": 1})
    held = held_by_training(size, config.train, config.engine, 1, "cpu")
    zeros = torch.zeros(4, dtype=torch.long)
    batch, learn = Batch(torch.zeros(4, 1000), zeros, zeros, zeros), classify(0.0)
    kept = torch.zeros(500_000)  # of whoever runs the stage, which freezes it
    before = storages()
    assert before >= kept.nbytes
    with process_group(Engine(device="cpu")) as ranks:
        engine = build_engine(config.engine, ranks)
        network = build_classifier(spec)
        assert parameter_count(network) == size.weights
        module = engine.prepare(network, config.train)
        average = {name: p.detach().clone() for name, p in network.named_parameters()}
        if not config.train.ema:
            average = {}
        for _ in range(2):
            engine.backward(learn(module, batch))
            engine.step(1e-3)
        engine.backward(learn(module, batch))  # a split head has gradients until the step
        assert storages() - before == pytest.approx(held.states, rel=0.02)
        state = engine.state() | ({"average": average} if average else {})
        save_checkpoint(tmp_path / "saved", 1, state, keep=1, ranks=ranks)
        engine.close()
    saved = on_disk(tmp_path / "saved")
    assert saved == pytest.approx(checkpoint_bytes(size, config.train), rel=0.02)


def test_a_run_whose_head_is_split_needs_less_of_each_rank(tmp_path):
    overrides = ("engine.shard_head=true", "controls.enabled=false", "launch.processes=4")
    config = toy_config(tmp_path, *overrides, "data.classes=20000", "model.width=64")
    splits = {name: Split(1000, 64) for name in ("train", "val", "test")}
    inputs = Inputs(20_000, (1, 8, 8), "uint8", splits)
    declared = DeclaredInputs(20_000, inputs.shape, np.dtype(np.uint8))
    memory = {}
    for ranks in (1, 4):
        run = RunDirectory(
            tmp_path,
            config.model_copy(
                update={"launch": config.launch.model_copy(update={"processes": ranks})}
            ),
        )
        answer = network_sizes(run.config, declared)
        networks = {name: Network(**each) for name, each in answer["networks"].items()}
        sizing = Sizing(run, plan(run), inputs, Sizes(networks, answer["branch"]))
        (row,) = [each for each in sizing.rows() if each.stage == "generalist"]
        assert row.ranks == ranks
        memory[ranks] = held_by_training(
            networks["generalist"], config.train, config.engine, ranks, "cpu"
        ).states
    trunk = networks["generalist"].weights - networks["generalist"].head
    assert memory[1] - memory[4] == 16 * networks["generalist"].head * 3 / 4
    assert memory[4] == 16 * (trunk + networks["generalist"].head / 4)
