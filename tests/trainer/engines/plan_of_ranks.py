"""What some of many ranks hold and send in a step with a split head. Prints a line of JSON each.

    plan_of_ranks.py RANKS RANK ...

torch's fake process group stands for the others: nothing is sent, so numbers are wrong, and shapes,
rows and bytes are those of the job.
"""

import json
import sys
from collections import Counter

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from networks import InputSpec, ModelSpec, build_classifier
from networks.head_rows import fresh_rows
from networks.heads import ShardedHead
from pipeline.config import Engine, ResolvedSchedule
from trainer.core.objectives import classify
from trainer.data.streams import Batch
from trainer.distributed.ranks import Ranks
from trainer.engines import build_engine
from trainer.engines.sharded import DistributedComm, class_bounds

CLASSES, FEATURES, ROWS = 100_003, 16, 8  # rows: of the batch on each rank
PASSES = {"allreduce_": 2, "allgather_": 1, "_reduce_scatter_base_": 1, "broadcast_": 1}


class Sent(TorchDispatchMode):
    """Bytes that a ring moves on each rank, by collective."""

    def __init__(self, ranks: int):
        super().__init__()
        self.ranks = ranks
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            leaves = pytree.tree_leaves(args)
            tensors = [each for each in leaves if isinstance(each, torch.Tensor)]
            # The whole: all outputs of a gather, else the largest tensor.
            whole = max(each.numel() * each.element_size() for each in tensors)
            if name == "allgather_":
                whole = tensors[-1].numel() * tensors[-1].element_size() * self.ranks
            self.bytes[name] += PASSES[name] * whole * (self.ranks - 1) // self.ranks
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def plan(rank: int, world: int) -> dict:
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    ranks = Ranks(rank, world, torch.device("cpu"))
    bounds = class_bounds(CLASSES, world)

    def head(spec: ModelSpec, in_features: int) -> ShardedHead:
        rows = fresh_rows(CLASSES, in_features, slice(*bounds[rank : rank + 2]))
        return ShardedHead(rows, CLASSES, DistributedComm(bounds))

    options = {"width": 32, "depth": 1, "embedding": FEATURES}
    spec = ModelSpec("mlp", CLASSES, InputSpec((4, 4)), options)
    network = build_classifier(spec, make=head)
    engine = build_engine(Engine(device="cpu", shard_head=True), ranks, split=True)
    # The fake group answers no futures, which DDP waits for: the trunk's gradients stay here.
    engine.averaged = lambda network: []
    own = engine.own_rows(network)
    module = engine.prepare(network, ResolvedSchedule(batch_size=ROWS * world))
    labels = torch.arange(ROWS) * (CLASSES // ROWS)
    batch = Batch(torch.randn(ROWS, 4, 4), labels, labels, labels * 0)
    with Sent(world) as sent:
        engine.backward(classify()(module, batch))
        engine.step(0.01)
    state = engine.state()
    held = {name: list(value.shape) for name, value in network.state_dict().items()}
    averages = state["optimizer"]["head.rows.weight"]
    engine.close()
    dist.destroy_process_group()
    return {
        "rows": {name: [each.start, each.stop] for name, each in own.items()},
        "held": held,
        "averages": list(averages["exp_avg"].shape),
        "saved": {name: each[-1] for name, each in state["rows"].items()},
        "bytes": dict(sent.bytes),
        "calls": dict(sent.calls),
    }


if __name__ == "__main__":
    world, *some = map(int, sys.argv[1:])
    for rank in some:
        print(json.dumps(plan(rank, world)), flush=True)
