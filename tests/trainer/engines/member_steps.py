"""Steps of networks with members by engines in turn, against one process's by hand.

    member_steps.py ENGINE ...          in this process group

After two of four steps a new engine resumes from the state of the first.  Raises where a gradient
(of ddp) or a weight differs.
"""

import copy
import sys

import torch
import torch.nn.functional as F
from through_files import through_a_checkpoint

from networks import InputSpec, ModelSpec, build_classifier
from pipeline.config import DEFAULT_SCHEDULE, Engine
from trainer.distributed.exit import leave
from trainer.distributed.ranks import process_group
from trainer.engines import build_engine

K, BATCH, CLASSES, RATE, DECAY, MOMENTUM = 3, 12, 5, 0.2, 0.1, 0.5
SGD = {"optimizer": "sgd", "momentum": MOMENTUM, "clip_norm": 0.0, "weight_decay": DECAY}
SCHEDULE = DEFAULT_SCHEDULE.model_copy(update={**SGD, "batch_size": BATCH, "ema": 0.0})
KINDS = ({"kind": "heads", "count": K, "blocks": 1}, {"kind": "batch", "count": K})


def main(engines: list[str]) -> None:
    with process_group(Engine(device="cpu")) as ranks:
        for name in engines:
            for members in KINDS:
                compare(name, members, ranks)


def engine_config(name: str) -> Engine:
    if name == "ddp":
        return Engine(device="cpu")
    return Engine(name="deepspeed", zero_stage=int(name.removeprefix("zero")), device="cpu")


def compare(name: str, members: dict, ranks) -> None:
    torch.manual_seed(0)
    inputs, options = InputSpec(shape=(6,), dtype="float32"), {"width": 8, "depth": 2}
    spec = ModelSpec("mlp", CLASSES, inputs, options, members=members)
    network = build_classifier(spec)
    alone, velocity = copy.deepcopy(network), {}
    steps = [(torch.randn(BATCH, 6), torch.randint(CLASSES, (K, BATCH))) for _ in range(4)]
    engine = build_engine(engine_config(name), ranks)
    module = engine.prepare(network, SCHEDULE)
    for index, (raw, targets) in enumerate(steps):
        if index == 2:
            state = through_a_checkpoint(engine.state(), ranks)
            engine.close()
            engine = build_engine(engine_config(name), ranks)
            network = build_classifier(spec)
            module = engine.prepare(network, SCHEDULE, state)
        own = slice(ranks.rank, None, ranks.world_size)
        with engine.accumulating(last=True):
            loss = loss_of(module(raw[own]), targets[:, own])
            engine.backward(loss)
        alone.zero_grad()
        loss_of(alone(raw), targets).backward()
        if name == "ddp":
            check(gradients(network), gradients(alone))
        engine.step(RATE)
        step_by_hand(alone, velocity)
    check(dict(engine.export().named_parameters()), dict(alone.named_parameters()))
    engine.close()
    print(name, members["kind"], "agree")


def gradients(network) -> dict:
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def loss_of(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def step_by_hand(network, velocity: dict) -> None:
    """Weights decay. Factors take half steps."""
    for name, parameter in network.named_parameters():
        rate = RATE / 2 if name.endswith((".r", ".s")) else RATE
        decay = DECAY if name.endswith("weight") else 0.0
        velocity[name] = MOMENTUM * velocity.get(name, 0.0) + parameter.grad + decay * parameter
        parameter -= rate * velocity[name]


def check(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        message = f"{name}: {{}}".format
        torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=1e-5, msg=message)


if __name__ == "__main__":
    leave(lambda: main(sys.argv[1:]))
