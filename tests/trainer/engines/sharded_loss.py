"""Loss and gradients of a head in shards, in this process group, against torch's.

    sharded_loss.py SIZES BOUNDS

SIZES   the rows that each rank has of the batch
BOUNDS  the first class of each rank, and C

Raises where they differ.
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from networks.cosine import arcface, cosface, with_margin
from networks.linear_logits import LinearLogits, Targets
from trainer.distributed.exit import leave
from trainer.engines.sharded import DistributedComm

SIZE, TOLERANCE, BLOCK = 6, 1e-5, 5


class Problem:
    """A batch and a head. Rank r has the rows `mine` and the classes `own`."""

    def __init__(self, sizes: list[int], bounds: list[int]):
        rank, rows, self.classes = dist.get_rank(), sum(sizes), bounds[-1]
        torch.manual_seed(0)
        features, weight = torch.randn(rows, SIZE), torch.randn(self.classes, SIZE)
        self.whole = (features, weight, torch.randn(self.classes))
        self.labels = torch.randint(self.classes, (rows,))
        self.bounds = tuple(bounds)
        self.mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        self.own = slice(bounds[rank], bounds[rank + 1])

    def fresh_whole(self) -> list[torch.Tensor]:
        """Features, weight and bias, as leaves."""
        return [part.clone().requires_grad_() for part in self.whole]

    def fresh_shard(self) -> list[torch.Tensor]:
        """This rank's features, and its rows of weight and bias, as leaves."""
        features, weight, bias = self.whole
        parts = (features[self.mine], weight[self.own], bias[self.own])
        return [part.clone().requires_grad_() for part in parts]

    def sharded_logits(self, parts: list[torch.Tensor]) -> LinearLogits:
        comm = DistributedComm(self.bounds).of(parts[0])
        if len(set(comm.sizes)) == 1:  # what is known beforehand is what an exchange says
            assert DistributedComm(self.bounds).of(parts[0], even=True) == comm
        return LinearLogits(*parts, self.classes, BLOCK, comm)

    def check(self, name: str, parts, loss, whole, whole_loss) -> None:
        pairs = [(loss, whole_loss[self.mine]), (parts[0].grad, whole[0].grad[self.mine])]
        for part, dense in zip(parts[1:], whole[1:], strict=True):
            # Ranks average their gradients.
            pairs.append((part.grad * dist.get_world_size(), dense.grad[self.own]))
        message = f"{name}: {{}}".format
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0, msg=message)


def check_targets(problem: Problem) -> None:
    """Labels, smoothing, dense and top-k targets, under a prior."""
    labels, classes, mine = problem.labels, problem.classes, problem.mine
    rows = len(labels)
    top = torch.randn(rows, classes).mul(3).softmax(1).topk(4)
    soft = torch.randn(rows, classes).mul(3).softmax(1)
    tail = 1 - top.values.sum(1)
    spread = (tail / (classes - 4))[:, None].expand(-1, classes).scatter(1, top.indices, top.values)
    weights = torch.rand(rows)  # of the rows in the loss: no two are alike
    prior = torch.randn(classes)
    top_targets = Targets.of_top(top.indices[mine], top.values[mine], classes, tail[mine])
    cases = {
        "labels": (Targets.of_labels(labels[mine], classes), (labels, 0.0)),
        "smoothed": (Targets.of_labels(labels[mine], classes, 0.1), (labels, 0.1)),
        "soft": (Targets(dense=soft[mine]), (soft, 0.0)),
        "top": (top_targets, (spread, 0.0)),
    }
    for name, (targets, (target, smoothing)) in cases.items():
        whole = problem.fresh_whole()
        logits = F.linear(*whole) + prior
        whole_loss = F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
        (whole_loss * weights).sum().backward()
        parts = problem.fresh_shard()
        loss = problem.sharded_logits(parts).add_bias(prior).cross_entropy(targets)
        (loss * weights[mine]).sum().backward()
        problem.check(name, parts, loss, whole, whole_loss)


def check_negatives(problem: Problem) -> None:
    """The same classes are drawn on any number of ranks."""
    for negatives in (2, 8, problem.classes):
        whole = problem.fresh_whole()
        alone = LinearLogits(*whole, problem.classes)
        whole_loss = sampled_loss(alone, problem.labels, negatives)
        whole_loss.sum().backward()
        parts = problem.fresh_shard()
        logits = problem.sharded_logits(parts)
        loss = sampled_loss(logits, problem.labels[problem.mine], negatives)
        loss.sum().backward()
        problem.check(f"{negatives} negatives", parts, loss, whole, whole_loss)


def sampled_loss(logits: LinearLogits, labels, negatives: int):
    logits, targets = logits.sampled(labels, negatives, torch.Generator().manual_seed(1))
    return logits.cross_entropy(Targets.of_labels(targets, logits.num_classes))


def check_chosen_classes(problem: Problem) -> None:
    """Logits of each row's own classes, from the rows of the weight of every rank."""
    indices = torch.randint(problem.classes, (len(problem.labels), 4))
    slopes = torch.randn(len(problem.labels), 4)
    whole, parts = problem.fresh_whole(), problem.fresh_shard()
    dense = (F.linear(*whole).gather(1, indices) * slopes).sum(1)
    dense.sum().backward()
    z = problem.sharded_logits(parts).logits_at(indices[problem.mine])
    chosen = (z * slopes[problem.mine]).sum(1)
    chosen.sum().backward()
    problem.check("chosen classes", parts, chosen, whole, dense)


def check_margins(problem: Problem) -> None:
    """Labels whose logits are moved by what depends on these logits."""
    labels, mine = problem.labels, problem.mine
    for kind in (cosface, arcface):
        whole, parts = problem.fresh_whole(), problem.fresh_shard()
        rows = F.normalize(whole[1])
        z = 7 * F.normalize(whole[0]) @ rows.T
        at = labels[:, None]
        moved = kind(z.gather(1, at), torch.tensor(7.0), 0.3)
        whole_loss = F.cross_entropy(z.scatter(1, at, moved), labels, reduction="none")
        whole_loss.sum().backward()
        logits = problem.sharded_logits([7 * F.normalize(parts[0]), F.normalize(parts[1]), None])
        targets = Targets.of_labels(labels[mine], problem.classes)
        loss = with_margin(logits, labels[mine], 0.3, kind).cross_entropy(targets)
        loss.sum().backward()
        problem.check(kind.__name__, parts[:2], loss, whole[:2], whole_loss)


def check_summary(problem: Problem) -> None:
    """What metrics need, of rows that are split over the ranks."""
    features, weight, bias = problem.whole
    alone = LinearLogits(features, weight, bias, problem.classes)
    mine, labels = problem.mine, problem.labels
    sharded = problem.sharded_logits([part.detach() for part in problem.fresh_shard()])
    for k in (1, 5, problem.classes):
        whole = alone.summary(k, labels)
        ours = sharded.summary(k, labels[mine])
        for part, of_all in zip(ours, whole, strict=True):
            torch.testing.assert_close(part, of_all[mine], atol=TOLERANCE, rtol=0)


def check_overflow() -> None:
    """Where one rank's rows overflow, all ranks leave the step out and scale less."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = ShardedGradScaler("cpu", init_scale=8.0, growth_interval=1)
    for overflows, expected, scale in ((True, 1.0, 4.0), (False, 0.5, 8.0)):
        factor = torch.inf if overflows and dist.get_rank() == 0 else 0.5
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert weight.tolist() == [expected] * 3, weight
        assert scaler.get_scale() == scale, scaler.get_scale()


def main(sizes: list[int], bounds: list[int]) -> None:
    dist.init_process_group("gloo")
    problem = Problem(sizes, bounds)
    check_margins(problem)
    check_summary(problem)
    check_overflow()
    check_targets(problem)
    check_negatives(problem)
    check_chosen_classes(problem)
    dist.destroy_process_group()


if __name__ == "__main__":
    leave(lambda: main(*([int(n) for n in word.split(",")] for word in sys.argv[1:])))
