"""An optimizer of some rows of a layer: what a step costs is the rows that it changes.

    C, D  rows of the layer, numbers of one
    m     rows that a step changes

A row's averages, its weight decay and its count of steps move only when it has a gradient, as in
torch.optim.SparseAdam.  That one counts the steps of the whole layer. A row that is new in step
1,000 would then start with sqrt(1000) times its share.  With every row in every step it is
torch.optim's AdamW, or SGD.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from networks.row_head import RowGradients, RowHead
from pipeline.config import ResolvedSchedule

BETA1, EPSILON = 0.9, 1e-8  # of AdamW, as build_optimizer has them
ROWS = 1024  # changed at a time: their numbers stay near a CPU core
State = dict[str, Tensor]  # "step" [C], and averages of the shape of the tensor


def adamw_rows(
    p: Tensor, g: Tensor, state: State, rate: float, decay: float, schedule: ResolvedSchedule
) -> None:
    """One step of AdamW, in place.  p, g: [m, D] or [m].  state: of the same rows."""
    average = state["exp_avg"].lerp_(g, 1 - BETA1)
    square = state["exp_avg_sq"].mul_(schedule.beta2).addcmul_(g, g, value=1 - schedule.beta2)
    # average / (1 - b1^t) over sqrt(square / (1 - b2^t)) + epsilon, with one factor for each row.
    step = state["step"].view(-1, *[1] * (p.dim() - 1))
    root = (1 - schedule.beta2**step).sqrt_()
    change = (average * (root * -rate / (1 - BETA1**step))).div_(square.sqrt().add_(EPSILON * root))
    p.mul_(1 - rate * decay).add_(change)


def sgd_rows(
    p: Tensor, g: Tensor, state: State, rate: float, decay: float, schedule: ResolvedSchedule
) -> None:
    """One step of SGD with momentum, in place. Arguments as in adamw_rows."""
    velocity = state["momentum_buffer"].mul_(schedule.momentum).add_(g).add_(p, alpha=decay)
    p.sub_(velocity, alpha=rate)


Rule = Callable[[Tensor, Tensor, State, float, float, ResolvedSchedule], None]
# Optimizer -> the step of some rows, and the averages that it keeps.
RULES: dict[str, tuple[Rule, tuple[str, ...]]] = {
    "adamw": (adamw_rows, ("exp_avg", "exp_avg_sq")),
    "sgd": (sgd_rows, ("momentum_buffer",)),
}


class RowOptimizer:
    """The schedule's optimizer of a RowHead. The bias has no weight decay.

    Parameters
    ----------
    head : RowHead
        On the device where it will be trained.
    schedule : ResolvedSchedule
    states : dict, optional
        {"weight": State, "bias": State} of a checkpoint.
    """

    def __init__(
        self, head: RowHead, schedule: ResolvedSchedule, states: dict[str, State] | None = None
    ):
        self.head = head
        self.schedule = schedule
        self.rule, names = RULES[schedule.optimizer]
        self.states: dict[str, State] = {}
        for leaf in ("weight", "bias"):
            tensor = getattr(head, leaf)
            if states is not None:
                self.states[leaf] = {k: v.to(tensor.device) for k, v in states[leaf].items()}
                continue
            self.states[leaf] = {name: torch.zeros_like(tensor) for name in names}
            self.states[leaf]["step"] = tensor.new_zeros(len(tensor))

    @torch.no_grad()
    def step(self, gradients: RowGradients, rate: float) -> None:
        """Change the rows that have gradients."""
        classes, weight, bias = gradients
        for some, g in zip(classes.split(ROWS), weight.split(ROWS), strict=True):
            self._step("weight", some, g, rate, self.schedule.weight_decay)
        self._step("bias", classes, bias, rate, 0.0)

    def _step(self, leaf: str, classes: Tensor, g: Tensor, rate: float, decay: float) -> None:
        whole: Tensor = getattr(self.head, leaf)
        states = self.states[leaf]
        p = whole.index_select(0, classes)
        rows = {name: state.index_select(0, classes) for name, state in states.items()}
        rows["step"] += 1
        self.rule(p, g, rows, rate, decay, self.schedule)
        whole.index_copy_(0, classes, p)
        for name, state in states.items():
            state.index_copy_(0, classes, rows[name])
