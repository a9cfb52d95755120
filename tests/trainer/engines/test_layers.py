"""The form in which a network trains, compiled or channels last, of which nothing is kept."""

from contextlib import closing
from functools import partial

import pytest
import torch
from torch import nn

from networks import InputSpec, ModelSpec, batch_ensemble, build_classifier, hydra, specialise
from pipeline.config import Engine, UserError, load_config
from trainer.distributed import ranks as ranks_module
from trainer.distributed.numerics import numerics
from trainer.distributed.ranks import precision, process_group
from trainer.engines import build_engine, layers
from trainer.engines.layers import change_layers, check_layers, is_one_graph, restore_layers

CPU = torch.device("cpu")
PICTURES = InputSpec((3, 16, 16))


def network(builder="convnet", **options):
    options = options or {"width": 4, "embedding": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_classifier(ModelSpec(builder, 6, PICTURES, options))


NETWORKS = {
    "mlp": lambda: network("mlp", width=8, depth=2),
    "convnet": network,
    "resnet": lambda: network("resnet", width=4, depth=8),
    "specialist": lambda: specialise(network(), [0, 2]),
    "hydra": lambda: hydra(network(), 3, 0),
    "batch_ensemble": lambda: batch_ensemble(network(), 2),
}


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without code of its own: what is traced is run as it is."""
    monkeypatch.setattr(layers.torch, "compile", partial(torch.compile, backend="eager"))
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_learns_is_one_graph(name, traced):
    learner = NETWORKS[name]().train()
    raw = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    assert is_one_graph(learner)
    compiled = layers.compiled(learner)
    torch.testing.assert_close(compiled(raw), learner(raw), rtol=1e-5, atol=1e-5)
    # As in training: under autocast too.
    with torch.autocast("cpu", torch.bfloat16):
        compiled(raw).float().sum().backward()


def steps(config: Engine, count: int = 3, name: str = "convnet"):
    """(names of what a checkpoint keeps, losses, the exported network) of a short training."""
    schedule = load_config(
        None, ["train.steps=5", "clusters.num_groups=2", "train.optimizer=adamw"]
    ).train
    learner = NETWORKS[name]()
    raw = torch.randint(256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    labels = torch.arange(8) % 6
    losses = []
    with process_group(config) as ranks, closing(build_engine(config, ranks)) as engine:
        module = engine.prepare(learner, schedule)
        module.train()
        for _ in range(count):
            with engine.accumulating(last=True):
                with engine.autocast():
                    loss = nn.functional.cross_entropy(module(raw.byte()).float(), labels)
                engine.backward(loss)
            losses.append(float(loss.detach()))
            engine.step(0.01)
        names = {part: sorted(engine.state()[part]) for part in ("network", "optimizer")}
        exported = engine.export()
    return names, losses, exported


@pytest.fixture(scope="module")
def plain():
    return steps(Engine(device="cpu"))


@pytest.mark.parametrize("key", ["compile", "channels_last"])
def test_checkpoints_and_exports_are_those_of_a_plain_training(key, plain, traced):
    names, losses, exported = steps(Engine.model_validate({"device": "cpu", key: True}))
    assert names == plain[0]
    torch.testing.assert_close(losses, plain[1], rtol=1e-4, atol=1e-4)
    assert type(exported) is type(plain[2])
    for (name, value), (plain_name, expected) in zip(
        exported.state_dict().items(), plain[2].state_dict().items(), strict=True
    ):
        assert name == plain_name and value.is_contiguous()
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_compiled_code_learns_what_plain_code_learns():
    """By torch's own compiler, which takes seconds."""
    plain = steps(Engine(device="cpu"), name="mlp")
    names, losses, exported = steps(Engine(device="cpu", compile=True), name="mlp")
    assert names == plain[0]
    torch.testing.assert_close(losses, plain[1], rtol=1e-5, atol=1e-5)
    for name, value in exported.state_dict().items():
        torch.testing.assert_close(value, plain[2].state_dict()[name], rtol=1e-3, atol=1e-3)


def test_convolutions_train_channels_last():
    learner = network("resnet", width=4, depth=8)
    change_layers(learner, Engine(channels_last=True), 1)
    kernels = [p for p in learner.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    restore_layers(learner, Engine(channels_last=True), {})
    assert all(p.is_contiguous() for p in learner.parameters())


def test_norms_of_all_ranks_share_their_tensors_and_leave_none_behind():
    learner = network("resnet", width=4, depth=8)
    before = dict(learner.named_modules())
    state = {name: id(value) for name, value in learner.named_parameters()}
    replaced = change_layers(learner, Engine(sync_batchnorm=True), 2)
    synced = [each for each in learner.modules() if isinstance(each, nn.SyncBatchNorm)]
    assert len(synced) == len(replaced) > 0
    assert {name: id(value) for name, value in learner.named_parameters()} == state
    mean = synced[0].running_mean
    assert mean is not None
    mean.fill_(7)
    restore_layers(learner.eval(), Engine(sync_batchnorm=True), replaced)
    assert dict(learner.named_modules()) == before
    assert not any(each.training for each in learner.modules())
    means = [each.running_mean for each in learner.modules() if isinstance(each, nn.BatchNorm2d)]
    assert bool((means[0] == 7).all())


def test_norms_of_all_ranks_are_refused_on_a_cpu():
    with pytest.raises(UserError, match="engine.sync_batchnorm = true needs GPUs"):
        check_layers(Engine(sync_batchnorm=True), CPU)


def test_compiling_without_a_compiler_is_one_line(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(layers.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match="engine.compile = true needs a C\\+\\+ compiler"):
        check_layers(Engine(compile=True), CPU)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"compile": True, "shard_head": True}, "engine.compile = true and engine.shard_head"),
        ({"compile": True, "checkpoint_activations": True}, "keeps its activations"),
        ({"deterministic": True, "cudnn_benchmark": True}, "whichever kernel is fastest"),
        ({"name": "deepspeed", "channels_last": True}, "needs engine.name = \"ddp\""),
    ],
)  # fmt: skip
def test_settings_that_exclude_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Engine.model_validate(settings)


def test_bf16_is_refused_where_the_card_lacks_it_and_auto_does_without(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(ranks_module, "has_bf16", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    assert precision(Engine(), gpu) == torch.float32
    with pytest.raises(UserError, match="which Tesla V100 lacks"):
        precision(Engine(precision="bf16"), gpu)
    monkeypatch.setattr(ranks_module, "has_bf16", lambda: True)
    assert precision(Engine(), gpu) == torch.bfloat16


def test_a_process_computes_as_its_config_says_and_as_before_afterwards():
    with numerics(Engine(matmul="high", deterministic=True)):
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.are_deterministic_algorithms_enabled()
    with numerics(Engine(cudnn_benchmark=True)):
        assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.benchmark
