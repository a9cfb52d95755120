"""Distributions of so many classes that a row of C numbers is too long.

Some classes are listed, and the others are known by sums.  Legend:

    B, C, k     rows, classes, listed classes of a row
    z           log q of a class, at least that of the smallest normal float32
    beta        a power: at the temperature T a distribution is q^(1 / T) over its sum
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from networks import Summary
from networks.full_precision import full_precision

# What stands for 0 under a logarithm, and the mass of others below which they share it evenly.
TINY = torch.finfo(torch.float32).tiny
NOBODY = 1e-30


class PowerSums(NamedTuple):
    """Sums over the classes that are not listed, float64 [B] each, with e = q^beta and z = log q.

    power: of e.  double: of e^2.  first, second: of e z and e z^2. None where nobody asked.
    """

    power: Tensor
    double: Tensor
    first: Tensor | None = None
    second: Tensor | None = None

    @classmethod
    def of(
        cls, rest: Tensor, listed: Tensor, beta: float, moments: bool, last: bool = False
    ) -> PowerSums:
        """rest: q of the others, 0 at those that are listed, [B, C].  listed: int64 [B, k].

        last: rest is not needed any more, and is overwritten.
        """
        e, z = rest, None
        if last and beta != 1:
            z = rest.clamp_min_(TINY).log_()
        elif moments or beta != 1:
            z = rest.clamp_min(TINY).log_()
        if z is not None and beta != 1:
            e = (z * beta if moments else z.mul_(beta)).exp_().scatter_(1, listed, 0.0)
        # float32 is summed pairwise: off by 1e-7 of a million numbers.
        power, double = e.sum(1).double(), torch.linalg.vector_norm(e, dim=1).double().square()
        if not moments or z is None:
            return cls(power, double)
        first = _dot(e, z)
        return cls(power, double, first, _dot(e, z.square_()))

    def times(self, factor: Tensor, beta: float) -> PowerSums:
        """The sums after each class is multiplied by its row's factor [B], float64, above 0."""
        log, scale = factor.log(), factor**beta
        first, second = self.first, self.second
        if first is not None and second is not None:
            second = scale * (second + 2 * log * first + log.square() * self.power)
            first = scale * (first + log * self.power)
        return PowerSums(scale * self.power, scale.square() * self.double, first, second)

    @classmethod
    def evenly(cls, mass: Tensor, count: int, beta: float) -> PowerSums:
        """The sums over `count` classes that share a mass [B] evenly."""
        each = (mass / max(1, count)).clamp_min(TINY)
        z, e = each.log(), each**beta
        power, double = count * e, count * e.square()
        return cls(power, double, power * z, power * z.square())

    def where(self, chosen: Tensor, others: PowerSums) -> PowerSums:
        """These in the rows that are chosen, bool [B], and `others` elsewhere."""

        def choose(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            if mine is None or theirs is None:
                return None
            return torch.where(chosen, mine, theirs)

        power = torch.where(chosen, self.power, others.power)
        double = torch.where(chosen, self.double, others.double)
        first, second = choose(self.first, others.first), choose(self.second, others.second)
        return PowerSums(power, double, first, second)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Row by row, float64 [B]."""
    return (x * y).sum(1).double()  # vecdot takes longer


@dataclass(frozen=True)
class Listed:
    """A distribution q of each row: k classes by themselves, and the others as sums.

    Parameters
    ----------
    indices : int64 Tensor [B, k]
        Distinct classes.  None that is not listed is likelier than those that a reader asks for.
    values : Tensor [B, k]
        q of these.
    tail : float64 Tensor [B]
        The sum of q over the others.
    sums : mapping
        {beta: PowerSums} of the others, at the powers that were asked.
    num_classes : int
        C.
    """

    indices: Tensor
    values: Tensor
    tail: Tensor
    sums: Mapping[float, PowerSums]
    num_classes: int

    @classmethod
    def of(
        cls,
        p: Tensor,
        indices: Tensor,
        powers: tuple[float, ...] = (),
        moments: bool = False,
    ) -> Listed:
        """List classes of rows p [B, C], which it overwrites. moments: with sums of z and z^2."""
        values = p.gather(1, indices)
        rest = p.scatter_(1, indices, 0.0)
        tail = rest.sum(1).double()
        sums = {
            beta: PowerSums.of(rest, indices, beta, moments, place == len(powers))
            for place, beta in enumerate(powers, 1)
        }
        return cls(indices, values, tail, sums, p.shape[1])

    def with_values(self, values: Tensor, tail: Tensor) -> Listed:
        """Other values of the listed classes. The others keep their proportions among themselves.

        values: [B, k].  tail: [B], the others' new sum.  Where they had none they share it evenly.
        """
        tail, others = tail.double(), self.num_classes - self.indices.shape[1]
        some = self.tail > NOBODY
        factor = torch.where(some & (tail > 0), tail / torch.where(some, self.tail, 1.0), NOBODY)
        sums = {
            beta: each.times(factor, beta).where(some, PowerSums.evenly(tail, others, beta))
            for beta, each in self.sums.items()
        }
        return Listed(self.indices, values, tail, sums, self.num_classes)

    @property
    def z(self) -> Tensor:
        """log q of the listed classes, float64 [B, k]."""
        return self.values.clamp_min(TINY).double().log()

    def log_sum(self, beta: float) -> Tensor:
        """log of the sum of q^beta over all classes, float64 [B]."""
        return ((self.z * beta).exp().sum(1) + self.sums[beta].power).log()

    def summary(self, k: int, labels: Tensor | None = None, temperature: float = 1.0) -> Summary:
        """Like LinearLogits.summary, at a temperature whose power was asked.

        labels: int64 [B], which must be listed.
        """
        beta = 1 / temperature
        z = self.z
        log_sum = self.log_sum(beta)
        best = z.topk(min(k, z.shape[1]), dim=1)
        squares = (2 * beta * z).exp().sum(1) + self.sums[beta].double
        log_label = None
        if labels is not None:
            log_label = (self.at(z, labels) * beta - log_sum).float()
        return Summary(
            self.indices.gather(1, best.indices),
            (beta * best.values - log_sum[:, None]).exp().float(),
            log_label,
            (squares / (2 * log_sum).exp()).float(),
        )

    def at(self, values: Tensor, classes: Tensor) -> Tensor:
        """What `values` [B, k] say of one listed class of each row, [B]."""
        here = self.indices == classes[:, None]
        assert bool(here.any(1).all()), "every class that is read is listed"
        return values.gather(1, here.int().argmax(1, keepdim=True))[:, 0]

    def slopes(self, labels: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """How each row's NLL at q^beta grows with beta, and how that grows: float64 [B] each.

        They are the mean of z under q^beta less z of the label, and the variance of z.
        """
        z, rest = self.z, self.sums[beta]
        assert rest.first is not None and rest.second is not None, "moments were asked"
        e = (z * beta).exp()
        total = e.sum(1) + rest.power
        mean = ((e * z).sum(1) + rest.first) / total
        square = ((e * z.square()).sum(1) + rest.second) / total
        return mean - self.at(z, labels), (square - mean.square()).clamp_min(0)

    def entropy(self) -> Tensor:
        """In nats, float64 [B]. Of sums at the power 1, with moments."""
        rest = self.sums[1.0]
        assert rest.first is not None, "moments were asked"
        return -(torch.special.xlogy(self.values, self.values).sum(1).double() + rest.first)


@full_precision
def logits_slopes(logits: Tensor, labels: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """`Listed.slopes` of logits [B, C] that are at hand."""
    z = logits.float()
    z = (z - z.amax(1, keepdim=True)).clamp_(min=-1e4)
    p = (z * beta).softmax(1)
    mean = torch.linalg.vecdot(p, z).double()
    square = torch.linalg.vecdot(p, z.square()).double()
    of_label = z.gather(1, labels[:, None])[:, 0].double()
    return mean - of_label, (square - mean.square()).clamp_min(0)


def inverse(temperature: float) -> float:
    """beta of a temperature. 0 of infinity."""
    return 0.0 if math.isinf(temperature) else 1 / temperature
