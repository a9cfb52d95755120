"""Steps of a head that learns by rows, by engines in turn, against one process's by hand.

    row_steps.py ENGINE ...          in this process group

Each rank has its share of a batch, whose rows overlap the others'. A batch comes in two parts.
After two of four steps a new engine resumes from the state of the first.  Raises where a weight
differs.
"""

import copy
import sys

import torch
from through_files import through_a_checkpoint

from networks import InputSpec, ModelSpec, build_classifier
from networks.candidates import candidates_of, cross_entropy_among
from networks.drawing import draw_classes
from networks.linear_logits import LinearLogits
from networks.row_head import RowGradients, RowHead
from pipeline.config import DEFAULT_SCHEDULE, Engine
from trainer.core.optim import build_optimizer, set_rate
from trainer.core.row_optim import RowOptimizer
from trainer.distributed.exit import leave
from trainer.distributed.ranks import process_group
from trainer.engines import build_engine

BATCH, CLASSES, LISTED, DRAWN, RATE, PARTS = 12, 40, 4, 5, 0.02, 2
SCHEDULE = DEFAULT_SCHEDULE.model_copy(
    update={"weight_decay": 0.1, "batch_size": BATCH, "accumulation": PARTS}
)


def main(engines: list[str]) -> None:
    with process_group(Engine(device="cpu")) as ranks:
        for name in engines:
            compare(name, ranks)


def engine_of(name: str, ranks):
    config = Engine(device="cpu")
    if name != "ddp":
        stage = int(name.removeprefix("zero"))
        config = Engine(name="deepspeed", zero_stage=stage, device="cpu")
    return build_engine(config, ranks, by_rows=True)


def network_by_rows(seed: int):
    torch.manual_seed(seed)
    inputs, options = InputSpec(shape=(6,), dtype="float32"), {"width": 8, "depth": 2}
    network = build_classifier(ModelSpec("mlp", CLASSES, inputs, options))
    network.head = RowHead(network.head)
    return network


def batches():
    generator = torch.Generator().manual_seed(3)
    for step in range(4):
        raw = torch.randn(BATCH, 6, generator=generator)
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        lists = [torch.randperm(CLASSES, generator=generator)[:LISTED] for _ in range(BATCH)]
        yield raw, labels, torch.stack(lists), draw_classes(CLASSES, DRAWN, step)


def compare(name: str, ranks) -> None:
    network = network_by_rows(0)
    alone = copy.deepcopy(network)
    by_hand = build_optimizer(alone, SCHEDULE), RowOptimizer(alone.head, SCHEDULE)
    engine = engine_of(name, ranks)
    module = engine.prepare(network, SCHEDULE)
    for index, batch in enumerate(batches()):
        if index == 2:
            state = through_a_checkpoint(engine.state(), ranks)
            assert state["network"]["head.weight"].shape == (CLASSES, 8)
            engine.close()
            engine, network = engine_of(name, ranks), network_by_rows(1)
            module = engine.prepare(network, SCHEDULE, state)
        *examples, drawn = batch
        own = [each[ranks.rank :: ranks.world_size] for each in examples]
        for part in range(PARTS):
            with engine.accumulating(last=part == PARTS - 1):
                share = [each.chunk(PARTS)[part] for each in own]
                loss = loss_of(module, network.head, *share, drawn) / PARTS
                engine.backward(loss)
        engine.step(RATE)
        step_by_hand(alone, by_hand, *batch)
    with engine.eval_model(None) as whole:
        check(dict(whole.named_parameters()), alone)
    check(dict(engine.export().named_parameters()), alone)
    engine.close()
    print(name, "agrees")


def loss_of(module, head, raw, labels, lists, drawn):
    classes, asked = candidates_of(labels, lists, drawn).numbered()
    logits = head.read(module(raw), classes)
    return cross_entropy_among(logits, asked, CLASSES).mean()


def step_by_hand(network, optimizers, raw, labels, lists, drawn) -> None:
    """The whole batch at once, and a dense head, of which the rows that are read change."""
    trunk, rows = optimizers
    head = network.head
    weight, bias = head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()
    logits = LinearLogits(network.trunk(network.preprocess(raw)), weight, bias, CLASSES)
    asked = candidates_of(labels, lists, drawn)
    trunk.zero_grad()
    cross_entropy_among(logits, asked, CLASSES).mean().backward()
    set_rate(trunk, RATE)
    trunk.step()
    read, _ = asked.numbered()
    rows.step(RowGradients(read, weight.grad[read], bias.grad[read]), RATE)


def check(ours: dict, alone) -> None:
    theirs = dict(alone.named_parameters())
    theirs |= {"head.weight": alone.head.weight, "head.bias": alone.head.bias}
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        message = f"{name}: {{}}".format
        torch.testing.assert_close(
            ours[name].detach(), value.detach(), atol=1e-6, rtol=1e-5, msg=message
        )


if __name__ == "__main__":
    leave(lambda: main(sys.argv[1:]))
