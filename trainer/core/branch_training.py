"""Training all branches of a job at once, from kept features.

    M, B   branches; rows of a batch for each of them
    K      classes of the largest branch
    z, L   the generalist's logits; log sum exp z over all classes

Each branch learns from rows of its own, as if it were trained alone: its loss reaches its own
parameters only, and the optimizers work entry by entry.  So one product, one optimizer and one
loop train them all, and a branch resumes from its own checkpoint in whatever company.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from networks.branches import Branch, log_rest
from networks.stacked_branches import StackedBranches, fitted
from pipeline.config import ResolvedSpecialists

from ..distributed.ranks import Ranks, StopSignal
from .checkpoints import Saver, State, load_checkpoint, whole_step
from .loop import Interrupted
from .losses import Loss, cross_entropy
from .optim import learning_rate, set_rate
from .progress import MetricsLogger, Progress

VALIDATIONS = 10  # at most, where the schedule does not say how often
FEWEST_VALIDATIONS = 2
NEVER = 10**9  # validations without a better loss before a branch stops


@dataclass(frozen=True)
class BranchBatch:
    """Rows of each branch.

    at_cut: [M, B, ...].  general: [M, B, A], what the generalist's head reads.  total: L, float64
    [M, B].  targets: int64 [M, B], columns of the labels. K stands for the dustbin.
    """

    at_cut: Tensor
    general: Tensor
    total: Tensor
    targets: Tensor


@dataclass(frozen=True)
class BranchTask:
    """What one branch learns beside its rows.

    seed: of its dropout.  shift, log_prior: as in `specialist_loss`.  validate measures
    the branch on val_examples rows: {"loss", "top1"}.
    checkpoints, metrics: where it keeps its state and reports.
    """

    seed: int
    shift: float
    log_prior: Tensor
    validate: Callable[[Branch], dict[str, float]]
    val_examples: int
    checkpoints: Path
    metrics: Path


def validations(trained: int, measured: int) -> int:
    """How often branches are measured: a large val would cost as much as the training.

    trained: rows of all steps.  measured: rows of one validation.  All validations together read
    at most half as many rows as the training does, unless that were too few to choose from.
    """
    affordable = trained // max(1, 2 * measured)
    return min(VALIDATIONS, max(FEWEST_VALIDATIONS, affordable))


class BranchTrainer:
    """Trains M branches at once.  They keep their best step on val. 0 is the generalist.

    read: (step) -> BranchBatch on the ranks' device, a pure function.
    """

    def __init__(
        self,
        stack: StackedBranches,
        head: nn.Linear,
        tasks: Sequence[BranchTask],
        read: Callable[[int], BranchBatch],
        schedule: ResolvedSpecialists,
        loss: Loss,
        steps: int,
        ranks: Ranks,
    ):
        self.stack = stack
        self.tasks = tasks
        self.read = read
        self.schedule = schedule
        self.loss = loss
        self.steps = steps
        self.ranks = ranks
        self.general = GeneralLogits(head, stack)
        self.offsets = self._offsets()
        self.optimizer = build_stack_optimizer(stack, schedule)
        self.best = [_copied(stack.tensors(m)) for m in range(len(tasks))]
        self.progress = [Progress() for _ in tasks]
        self.step = self._resume()
        self.loggers = [
            MetricsLogger(task.metrics, progress, ranks, steps, schedule.batch_size)
            for task, progress in zip(tasks, self.progress, strict=True)
        ]
        self.savers = [Saver(task.checkpoints, schedule.keep, ranks) for task in tasks]
        self.stop_signal = StopSignal()
        self.every = schedule.validate_every or self._validate_every()

    def train(self) -> None:
        """Train until the steps are done or every branch has stopped. `best` is the result."""
        if self.step == 0:
            self.validate()
        while self.step < self.steps and not self.stopped:
            rate = learning_rate(self.step, self.steps, self.schedule)
            losses = self.train_step(self.read(self.step), rate)
            self.step += 1
            for logger, progress, loss in zip(self.loggers, self.progress, losses, strict=True):
                logger.add(loss)
                progress.step = self.step
            self.ranks.progress()
            self._look(rate)
        for saver in self.savers:
            saver.close()

    def _validate_every(self) -> int:
        measured = sum(task.val_examples for task in self.tasks)
        trained = self.steps * self.schedule.batch_size * len(self.tasks)
        return max(1, -(-self.steps // validations(trained, measured)))

    @property
    def stopped(self) -> bool:
        return all(progress.stopped for progress in self.progress)

    def _look(self, rate: float) -> None:
        """Do what is due after a step: log, validate, save."""
        is_last = self.step == self.steps
        interrupted = self.stop_signal.agreed(self.ranks)
        saving = is_last or interrupted or self.step % self.schedule.checkpoint_every == 0
        if saving or self.step % self.schedule.log_every == 0:
            for logger, task in zip(self.loggers, self.tasks, strict=True):
                logger.log(rate, task.checkpoints)
        if is_last or self.step % self.every == 0:
            self.validate()
        if saving or self.stopped:
            self.save()
        if interrupted and not is_last:
            for saver in self.savers:
                saver.close()
            raise Interrupted()

    def train_step(self, batch: BranchBatch, rate: float) -> Tensor:
        """Take one optimizer step. Returns the branches' mean losses [M]."""
        base = self.general(batch).add_(self.offsets)
        logits = base + self.stack(batch.at_cut, self._dropout_mask(batch.at_cut))
        losses = stacked_loss(
            logits, batch.targets, self.stack.sizes, self.schedule.label_smoothing, self.loss
        )
        self.optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        if self.schedule.clip_norm:
            clip_each(self.stack, self.schedule.clip_norm)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        return losses.detach()

    def _offsets(self) -> Tensor:
        """What the loss adds to the logits for the resampled classes, [M, 1, K + 1].

        As in specialist_loss: the classes' log_prior, and the dustbin lowered by the shift.
        """
        offsets = torch.zeros(len(self.tasks), 1, self.stack.width + 1)
        for m, (task, size) in enumerate(zip(self.tasks, self.stack.sizes, strict=True)):
            offsets[m, 0, :size] = task.log_prior
            offsets[m, 0, -1] = -task.shift
        return offsets.to(self.ranks.device)

    def _dropout_mask(self, at_cut: Tensor) -> Tensor | None:
        """What h is multiplied by in this step, drawn for each branch by itself."""
        dropout = self.schedule.dropout
        if not dropout:
            return None
        width = self.stack.hidden.weight.shape[2]
        masks = []
        for task in self.tasks:
            draw = torch.Generator().manual_seed(task.seed + self.step)
            kept = torch.rand(at_cut.shape[1], width, generator=draw) >= dropout
            masks.append(kept.to(at_cut.dtype) / (1 - dropout))
        return torch.stack(masks).to(at_cut.device)

    def validate(self) -> None:
        """Measure every branch that has not stopped, and remember its best weights."""
        patience = self.schedule.patience or NEVER
        for m, (task, progress) in enumerate(zip(self.tasks, self.progress, strict=True)):
            if progress.stopped:
                continue
            metrics = task.validate(self.stack.branch(m))
            if metrics["loss"] < progress.best_loss:
                self.best[m] = _copied(self.stack.tensors(m))
            row = {f"val/{name}": value for name, value in metrics.items()}
            self.loggers[m].write({"step": self.step, **row})
            progress.record_validation(metrics, patience)

    # Each branch's own checkpoint

    def save(self) -> None:
        for m, saver in enumerate(self.savers):
            self.loggers[m].update_seconds()
            state = {
                "weights": _copied(self.stack.tensors(m)),
                "optimizer": stack_state(self.optimizer, self.stack, m),
                "best": self.best[m],
                "progress": vars(self.progress[m]),
            }
            saver.save(self.step, state, None)

    def _resume(self) -> int:
        """The newest step that every branch has a whole checkpoint of, and their states, else 0."""
        step = whole_step([task.checkpoints for task in self.tasks])
        if step is None:
            return 0
        states = [load_checkpoint(t.checkpoints, step, self.ranks.device) for t in self.tasks]
        for m, state in enumerate(states):
            self.stack.put(m, state["weights"])
            self.best[m] = state["best"]
            self.progress[m] = Progress(**state["progress"])
        load_stack_state(self.optimizer, self.stack, [state["optimizer"] for state in states])
        return step

    def trained(self, m: int) -> Branch:
        """Branch m with its best weights."""
        own = {
            name: fitted(name, tensor, self.stack.sizes[m], self.stack.width)
            for name, tensor in self.best[m].items()
        }
        return self.stack.branch(m, own)


class GeneralLogits:
    """The generalist's logits as the branches of a stack see them."""

    def __init__(self, head: nn.Linear, stack: StackedBranches):
        # A column more, the dustbin's: e^-inf of it adds nothing to what lies inside.
        width, last = stack.width, (0, 1)
        self.weight = F.pad(head.weight.detach()[stack.classes].transpose(1, 2), last).contiguous()
        bias = head.bias.detach()[stack.classes].masked_fill(~stack.valid, -torch.inf)
        self.bias = F.pad(bias, last, value=-torch.inf)[:, None]
        everything = [size == len(head.weight) for size in stack.sizes]
        self.covers_all = torch.tensor(everything, device=head.weight.device)
        self.dustbin = width

    @torch.no_grad()
    def __call__(self, batch: BranchBatch) -> Tensor:
        """[M, B, K + 1]: z of each branch's classes, -inf in padding, and the rest's logsumexp."""
        logits = torch.baddbmm(self.bias, batch.general, self.weight)
        rest = log_rest(logits, batch.total).to(logits.dtype)
        rest[self.covers_all] = -torch.inf
        logits[..., self.dustbin] = rest
        return logits


class _MeanCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy [M] of logits [M, B, K + 1] with targets [M, B].

    Its gradient, softmax less one at the target, is made in the place of the softmax: a step's time
    is that of passing over [M, B, K + 1].
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        gradient = logits.softmax(2)
        # log sum exp z = z_top - log p_top, whatever underflows.
        log_sum = logits.amax(2) - gradient.amax(2).log()
        losses = (log_sum - logits.gather(2, targets[..., None])[..., 0]).mean(1)
        gradient.scatter_add_(2, targets[..., None], gradient.new_full((*targets.shape, 1), -1.0))
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor):
        (gradient,) = ctx.saved_tensors
        scale = gradients[0] / gradient.shape[1]
        return gradient * scale[:, None, None], None


def stacked_loss(
    logits: Tensor, targets: Tensor, sizes: Sequence[int], label_smoothing: float, loss: Loss
) -> Tensor:
    """Each branch's mean loss, [M], of logits [M, B, K + 1] that are -inf in padding.

    targets: int64 [M, B], K for the dustbin.  sizes: |S_m|.
    """
    if loss is cross_entropy and not label_smoothing:
        return _MeanCrossEntropy.apply(logits, targets)
    losses = []
    # unbind: a slice of each would have a gradient of the whole's size.
    for size, z, columns in zip(sizes, logits.unbind(0), targets, strict=True):
        own = torch.cat([z[:, :size], z[:, -1:]], 1)
        losses.append(loss(own, columns.clamp_max(size), label_smoothing))
    return torch.stack(losses)


@torch.inference_mode()
def branch_logits(
    branch: Branch, head: nn.Linear, at_cut: Tensor, general: Tensor, total: Tensor
) -> Tensor:
    """A branch's logits [n, |S| + 1] of kept features, without the generalist's of all classes."""
    own = F.linear(general, head.weight[branch.classes], head.bias[branch.classes])
    rest = log_rest(own, total)
    if len(branch.classes) == len(head.weight):
        rest = torch.full_like(total, -torch.inf)
    return branch(at_cut, own, rest)


def build_stack_optimizer(
    stack: StackedBranches, schedule: ResolvedSpecialists
) -> torch.optim.Optimizer:
    """Like build_optimizer: matrices and kernels decay, vectors do not. One more axis each."""
    decayed = [p for p in stack.parameters() if p.ndim > 2]
    plain = [p for p in stack.parameters() if p.ndim <= 2]
    groups = [
        {"params": decayed, "weight_decay": schedule.weight_decay, "rate_scale": 1.0},
        {"params": plain, "weight_decay": 0.0, "rate_scale": 1.0},
    ]
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=schedule.learning_rate, momentum=schedule.momentum)
    return torch.optim.AdamW(
        groups, lr=schedule.learning_rate, betas=(0.9, schedule.beta2), fused=True
    )


@torch.no_grad()
def clip_each(stack: StackedBranches, norm: float) -> None:
    """Scale each branch's gradient to at most `norm`."""
    gradients = [p.grad for p in stack.parameters() if p.grad is not None]
    squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0)
    factors = (norm / (squares.sqrt() + 1e-6)).clamp_max(1)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))


def stack_state(optimizer: torch.optim.Optimizer, stack: StackedBranches, m: int) -> State:
    """Branch m's part of the optimizer's state, by the stack's names."""
    return {
        # Clones: a view would be saved with all that it is a view of.
        name: {
            key: (value[m] if value.ndim else value).clone()
            for key, value in optimizer.state[p].items()
            if value is not None
        }
        for name, p in stack.named_parameters()
        if p in optimizer.state
    }


def load_stack_state(
    optimizer: torch.optim.Optimizer, stack: StackedBranches, states: list[State]
) -> None:
    """Set what `stack_state` returned of each branch, all of one step."""
    for name, p in stack.named_parameters():
        of_each = [state[name] for state in states if name in state]
        if not of_each:
            continue
        loaded: dict[str, Tensor] = {}
        for key, first in of_each[0].items():
            if first.ndim == 0:
                loaded[key] = first.clone()
                continue
            parts = [
                fitted(name, each[key].to(p), size, stack.width)
                for each, size in zip(of_each, stack.sizes, strict=True)
            ]
            loaded[key] = torch.stack(parts)
        optimizer.state[p] = loaded


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}
