"""Loss and gradients of a head in shards, in this process group, against torch's:  sharded_loss.py SIZES BOUNDS

SIZES: the rows that each rank has of the batch; BOUNDS: the first class of each rank, and C.  Raises where they differ.
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F

from networks.linear_logits import LinearLogits, Targets
from trainer.distributed.exit import leave
from trainer.engines.sharded import DistributedComm

SIZE, TOLERANCE = 6, 1e-5


def main(sizes: list[int], bounds: list[int]) -> None:
    dist.init_process_group("gloo")
    rank, rows, classes = dist.get_rank(), sum(sizes), bounds[-1]
    torch.manual_seed(0)
    features, weight, bias = (
        torch.randn(rows, SIZE),
        torch.randn(classes, SIZE),
        torch.randn(classes),
    )
    labels = torch.randint(classes, (rows,))
    top = torch.randn(rows, classes).mul(3).softmax(1).topk(4)
    soft = torch.randn(rows, classes).mul(3).softmax(1)
    tail = 1 - top.values.sum(1)
    spread = (tail / (classes - 4))[:, None].expand(-1, classes).scatter(1, top.indices, top.values)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    own = slice(bounds[rank], bounds[rank + 1])
    weights = torch.rand(rows)  # of the rows in the loss: no two are alike
    prior = torch.randn(classes)
    cases = {
        "labels": (Targets.of_labels(labels[mine], classes), (labels, 0.0)),
        "smoothed": (Targets.of_labels(labels[mine], classes, 0.1), (labels, 0.1)),
        "soft": (Targets(dense=soft[mine]), (soft, 0.0)),
        "top": (
            Targets.of_top(top.indices[mine], top.values[mine], classes, tail[mine]),
            (spread, 0.0),
        ),
    }
    for name, (targets, (target, smoothing)) in cases.items():
        whole = [part.clone().requires_grad_() for part in (features, weight, bias)]
        logits = F.linear(*whole) + prior
        held = F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
        (held * weights).sum().backward()

        parts = [features[mine].clone(), weight[own].clone(), bias[own].clone()]
        parts = [part.requires_grad_() for part in parts]
        comm = DistributedComm(tuple(bounds)).of(parts[0])
        loss = LinearLogits(*parts, classes, 5, comm).add_bias(prior).cross_entropy(targets)
        (loss * weights[mine]).sum().backward()

        pairs = [(loss, held[mine]), (parts[0].grad, whole[0].grad[mine])]
        for part, all_of_it in zip(parts[1:], whole[1:], strict=True):
            pairs.append(
                (part.grad * dist.get_world_size(), all_of_it.grad[own])
            )  # ranks average their gradients
        for ours, theirs in pairs:
            torch.testing.assert_close(
                ours, theirs, atol=TOLERANCE, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
            )
    for negatives in (2, 8, classes):
        whole = [part.clone().requires_grad_() for part in (features, weight, bias)]
        alone, target = LinearLogits(*whole, classes).sampled(
            labels, negatives, torch.Generator().manual_seed(1)
        )
        held = alone.cross_entropy(Targets.of_labels(target, alone.num_classes))
        held.sum().backward()
        parts = [part.clone().requires_grad_() for part in (features[mine], weight[own], bias[own])]
        logits = LinearLogits(*parts, classes, 5, DistributedComm(tuple(bounds)).of(parts[0]))
        logits, target = logits.sampled(labels[mine], negatives, torch.Generator().manual_seed(1))
        loss = logits.cross_entropy(Targets.of_labels(target, logits.num_classes))
        loss.sum().backward()
        torch.testing.assert_close(loss, held[mine], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(parts[0].grad, whole[0].grad[mine], atol=TOLERANCE, rtol=0)
        for part, all_of_it in zip(parts[1:], whole[1:], strict=True):
            ours = part.grad * dist.get_world_size()
            torch.testing.assert_close(ours, all_of_it.grad[own], atol=TOLERANCE, rtol=0)
    dist.destroy_process_group()


if __name__ == "__main__":
    leave(lambda: main(*([int(number) for number in word.split(",")] for word in sys.argv[1:])))
