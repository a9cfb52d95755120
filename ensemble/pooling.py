"""Other ways to make one distribution of several, with the signature of choices.Combiner.

Only reverse_kl takes a specialist for what it is, a coarse distribution.  The others first extend
it: outside S_m its dustbin d_m is shared out as the generalist has it, p_i = d_m g_i / sum of g
outside (evenly where that is 0).  Written g, p_m, w below.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from clustering.groups import ClassGroups
from networks.full_precision import full_precision

from .host_reads import Checks, is_queued, to_device
from .patterns import SetPatterns, set_patterns
from .predictions import (
    SpecialistInput,
    SpecialistPredictions,
    Weights,
    active_sets,
    as_general,
    check_no_negative,
    check_sums,
    checked_active,
    checked_general,
    checked_weights,
    read_predictions,
)

# Stands for a probability of 0 under a logarithm.
FLOOR = 1e-30
# The dual of reverse_kl: how far its gradient may be from 0, and the most steps to get there.
GRADIENT_TOLERANCE = 1e-10
MAX_STEPS = 300
# On a device with a queue the host looks after so many steps, and a step is halved so often.
STEPS_BETWEEN_LOOKS = 8
HALVINGS = 12

# (g [n, C], special: k tensors [n, |S_m| + 1], patterns, w [1 + k]) -> q [n, C], for rows that have
# the same active set.
Rule: TypeAlias = Callable[[Tensor, list[Tensor], SetPatterns, Tensor], Tensor]


def arithmetic_mean(
    p_general: Tensor,
    p_special: SpecialistInput,
    groups: ClassGroups,
    active: Tensor | None = None,
    weights: Weights | None = None,
) -> Tensor:
    """q = (w_0 g + sum_m w_m p_m) / sum of w: the linear opinion pool.

    It is the minimum of sum_m w_m KL(p_m, q) once the specialists are extended, which eq. 5 does
    not do.

    Parameters
    ----------
    p_general, p_special, groups, active, weights
        As in `Combiner`.

    Returns
    -------
    Tensor [B, C]
        q, as in `Combiner`.

    Raises
    ------
    ValueError
        As `Combiner` does.

    References
    ----------
    Stone 1961, "The opinion pool".
    """
    return _pooled(_arithmetic, p_general, p_special, groups, active, weights)


def reverse_kl(
    p_general: Tensor,
    p_special: SpecialistInput,
    groups: ClassGroups,
    active: Tensor | None = None,
    weights: Weights | None = None,
) -> Tensor:
    """q minimising w_0 KL(q, g) + sum_m w_m KL(q, p_m): eq. 5 turned round.

    q's mass outside S_m is compared with the dustbin.  Where every S_m is all classes q is the
    geometric mean, prod p^w normalised.  A class that anybody calls impossible stays so.

    Parameters
    ----------
    p_general, p_special, groups, active, weights
        As in `Combiner`.

    Returns
    -------
    Tensor [B, C]
        q, as in `Combiner`.

    Raises
    ------
    ValueError
        As `Combiner` does, and for a generalist of weight 0.

    References
    ----------
    Genest and Zidek 1986, "Combining probability distributions": the logarithmic pool.
    """
    return _pooled(_reverse, p_general, p_special, groups, active, weights)


def log_ratio_product(
    p_general: Tensor,
    p_special: SpecialistInput,
    groups: ClassGroups,
    active: Tensor | None = None,
    weights: Weights | None = None,
) -> Tensor:
    """q proportional to g^(w_0) prod_m (p_m / g)^(w_m).

    Each specialist's evidence beyond the generalist's is multiplied.  This is Bayes' rule for
    predictions that share the generalist's knowledge and are independent beyond it.

    Parameters
    ----------
    p_general, p_special, groups, active, weights
        As in `Combiner`.

    Returns
    -------
    Tensor [B, C]
        q, as in `Combiner`.

    Raises
    ------
    ValueError
        As `Combiner` does.

    References
    ----------
    Bordley 1982, "A multiplicative formula for aggregating probability assessments".
    Hinton 2002: a product of experts.
    """
    return _pooled(_log_ratio, p_general, p_special, groups, active, weights)


def mixture_gating(
    p_general: Tensor,
    p_special: SpecialistInput,
    groups: ClassGroups,
    active: Tensor | None = None,
    weights: Weights | None = None,
) -> Tensor:
    """q = sum_m a_m p_m: a mixture of experts whose gate is the generalist.

    a_m is proportional to w_m times the generalist's mass in S_m, and for the generalist itself to
    w_0 times its mass outside of all active S_m.

    Parameters
    ----------
    p_general, p_special, groups, active, weights
        As in `Combiner`.

    Returns
    -------
    Tensor [B, C]
        q, as in `Combiner`.

    Raises
    ------
    ValueError
        As `Combiner` does.

    References
    ----------
    Jacobs, Jordan, Nowlan and Hinton 1991, "Adaptive mixtures of local experts".
    """
    return _pooled(_mixture, p_general, p_special, groups, active, weights)


@full_precision
def _pooled(
    rule: Rule,
    p_general: Tensor,
    p_special: SpecialistInput,
    groups: ClassGroups,
    active: Tensor | None,
    weights: Weights | None,
) -> Tensor:
    """Apply the rule to the rows of each active set."""
    p_general, groups = as_general(p_general, groups)
    g, dtype = checked_general(p_general, groups)
    active = checked_active(active, p_special, len(g), groups, g.device)
    are_exponents = rule is _log_ratio
    weights = checked_weights(weights, len(groups.members), g.device, are_exponents)
    if weights is None:
        weights = torch.ones(1 + len(groups.members), dtype=torch.float64, device=g.device)
    on, checks = active.cpu().numpy(), Checks(is_queued(g.device))
    special = read_predictions(p_special, groups, active, g.dtype, dtype, on, checks)
    check_sums(g.sum(1), dtype, lambda at: f"row {at[0]} of p_general", checks)
    check_no_negative(g.amin(1), lambda at: f"row {at[0]} of p_general", checks)
    weights_known = weights.detach().to(g.dtype).cpu()
    sets, set_of_row = active_sets(on)
    pieces = [g[:0]]
    order = [np.zeros(0, dtype=np.int64)]
    for index, specialists in enumerate(sets):
        order.append(np.flatnonzero(set_of_row == index))
        rows = to_device(order[-1], g.device)
        parts = _checked_parts(special, specialists, rows, dtype, checks)
        heard = torch.tensor([0, *[1 + m for m in specialists]])
        w = weights[to_device(heard, g.device)].to(g.dtype)
        if float(weights_known[heard].sum()) <= 0:
            raise ValueError(
                f"the generalist and specialists {list(specialists)} have weight 0; "
                "give one of them some"
            )
        if specialists and rule is _reverse and float(weights_known[0]) == 0:
            raise ValueError(
                "reverse_kl needs a generalist of weight above 0: "
                "nobody else says how classes outside compare"
            )
        if specialists:
            checks.settle()  # a rule may ask the host
            pieces.append(rule(g[rows], parts, set_patterns(groups, specialists), w))
        else:
            pieces.append(g[rows])
    checks.settle()
    back = to_device(np.argsort(np.concatenate(order)), g.device)
    return torch.cat(pieces).index_select(0, back).to(dtype)


def _checked_parts(
    special: SpecialistPredictions,
    specialists: tuple[int, ...],
    rows: Tensor,
    dtype: torch.dtype,
    checks: Checks,
) -> list[Tensor]:
    parts = special.side_by_side(specialists, rows)
    for m, part in zip(specialists, parts, strict=True):

        def naming(at: tuple[int, ...], m: int = m) -> str:
            return f"row {int(rows[at[0]])} of p_special[{m}]"

        check_sums(part.sum(1), dtype, naming, checks)
        check_no_negative(part.amin(1), naming, checks)
    return parts


def _extended(g: Tensor, special: Tensor, inside: Tensor) -> Tensor:
    """A specialist's prediction on all classes, [n, C].

    Its dustbin is shared out in proportion to g, evenly where g has nothing outside.
    """
    rest = g.index_fill(1, inside, 0.0)
    left = rest.sum(1, keepdim=True)
    count = max(1, g.shape[1] - len(inside))
    even = torch.full_like(rest, 1 / count).index_fill(1, inside, 0.0)
    tiny = torch.finfo(g.dtype).tiny
    shares = torch.where(left > tiny, rest / left.clamp(min=tiny), even)
    return (shares * special[:, -1:]).index_copy(1, inside, special[:, :-1])


def _classes(patterns: SetPatterns, device: torch.device) -> list[Tensor]:
    """The classes of each specialist of the set, ascending."""
    return [to_device(classes, device) for classes in patterns.classes]


def _log(p: Tensor) -> Tensor:
    return p.clamp(min=FLOOR).log()


def _arithmetic(g: Tensor, special: list[Tensor], patterns: SetPatterns, w: Tensor) -> Tensor:
    total = w[0] * g
    for part, inside, weight in zip(special, _classes(patterns, g.device), w[1:], strict=True):
        total = total + weight * _extended(g, part, inside)
    return total / total.sum(1, keepdim=True)


def _log_ratio(g: Tensor, special: list[Tensor], patterns: SetPatterns, w: Tensor) -> Tensor:
    logs = w[0] * _log(g)
    for part, inside, weight in zip(special, _classes(patterns, g.device), w[1:], strict=True):
        logs = logs + weight * (_log(_extended(g, part, inside)) - _log(g))
    return torch.softmax(logs, 1)


def _mixture(g: Tensor, special: list[Tensor], patterns: SetPatterns, w: Tensor) -> Tensor:
    classes = _classes(patterns, g.device)
    alone = w[0] * g.index_fill(1, torch.cat(classes), 0.0).sum(1, keepdim=True)
    total = alone * g
    for part, inside, weight in zip(special, classes, w[1:], strict=True):
        mass_inside = g.index_select(1, inside).sum(1, keepdim=True)
        total = total + weight * mass_inside * _extended(g, part, inside)
    mass = total.sum(1, keepdim=True)
    tiny = torch.finfo(g.dtype).tiny
    # Weights of 0 may leave nobody who is responsible.
    return torch.where(mass > tiny, total / mass.clamp(min=tiny), g)


# ---- reverse_kl


def _reverse(g: Tensor, special: list[Tensor], patterns: SetPatterns, w: Tensor) -> Tensor:
    """Solved in one unknown per specialist, as eq. 5 is.

    With u_m = log(Q_m / d_m) and, for each class,

        c_i = w_0 + the weights of the specialists whose S_m holds i
        b_i = (g_i^w_0 prod p_mi^w_m)^(1 / c_i)

    the result is q_i = b_i exp((nu - sum over m with i outside of w_m u_m) / c_i).  u and nu are
    where ReverseDual is smallest.
    """
    pattern, b = _pattern_and_scores(g, special, patterns, w)
    dual = _reverse_dual(b, pattern, special, patterns, w)
    with torch.no_grad():
        x = dual.minimum()
    if torch.is_grad_enabled() and (dual.B.requires_grad or dual.d.requires_grad):
        x = x + dual.step(x)  # its derivative is the solution's: the implicit function theorem
    q = b * torch.exp((x @ dual.slopes.T).index_select(1, pattern))
    return (q / q.sum(1, keepdim=True)).to(g.dtype)


def _pattern_and_scores(
    g: Tensor, special: list[Tensor], patterns: SetPatterns, w: Tensor
) -> tuple[Tensor, Tensor]:
    """The pattern of each class, int64 [C], and b [n, C]."""
    device = g.device
    logs = w[0].double() * _log(g).double()
    c = torch.full((g.shape[1],), 1.0, dtype=torch.float64, device=device) * w[0]
    classes = _classes(patterns, device)
    for part, inside, weight in zip(special, classes, w[1:].double(), strict=True):
        logs = logs.index_add(1, inside, weight * _log(part[:, :-1]).double())
        c = c.index_add(0, inside, weight.expand(len(inside)))
    pattern = torch.zeros(g.shape[1], dtype=torch.int64, device=device)
    union = to_device(patterns.union, device)
    pattern[union[0]] = union[1]
    return pattern, torch.exp(logs / c)


def _reverse_dual(
    b: Tensor, pattern: Tensor, special: list[Tensor], patterns: SetPatterns, w: Tensor
) -> "ReverseDual":
    device = b.device
    outside = to_device(patterns.outside, device)  # N [P, k]
    occupied = to_device(patterns.counts > 0, device)
    B = torch.zeros(len(b), len(occupied), dtype=torch.float64, device=device)
    B = B.index_add(1, pattern, b)
    c = w[0].double() + (1 - outside) @ w[1:].double()
    if not patterns.counts[0]:
        c = torch.where(occupied, c, 1.0)
    d = torch.stack([part[:, -1] for part in special], 1).double().clamp(min=FLOOR)
    ones = torch.ones(len(occupied), 1, dtype=torch.float64, device=device)
    slopes = torch.cat([-outside * w[1:].double(), ones], 1) / c[:, None]
    return ReverseDual(B, c, d, w[1:].double() * d, slopes)


class ReverseDual:
    """The convex sum_P c_P B_P exp((nu - N w u) / c_P) + sum_m w_m d_m exp(u_m) - nu.

    x [n, k + 1] is (u, nu).  B [n, P]: the sum of b over a pattern's classes.  c [P].  d [n, k].
    weighted_d: w_m d_m.  slopes [P, k + 1]: of each pattern's exponent in x.
    """

    def __init__(self, B: Tensor, c: Tensor, d: Tensor, weighted_d: Tensor, slopes: Tensor):
        self.B = B
        self.c = c
        self.d = d
        self.weighted_d = weighted_d
        self.slopes = slopes

    def value(self, x: Tensor) -> Tensor:
        patterns = (self.c * self.B * torch.exp(x @ self.slopes.T)).sum(1)
        return patterns + (self.weighted_d * torch.exp(x[:, :-1])).sum(1) - x[:, -1]

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each pattern's mass [n, P], and each specialist's [n, k]."""
        masses = self.B * torch.exp(x @ self.slopes.T)
        return masses, self.weighted_d * torch.exp(x[:, :-1])

    def gradient(self, x: Tensor) -> Tensor:
        masses, dustbins = self.terms(x)
        return (self.c * masses) @ self.slopes + pad(dustbins, (0, 1), value=-1.0)

    def step(self, x: Tensor) -> Tensor:
        """Newton's step, its matrix held fixed when differentiated."""
        masses, dustbins = self.terms(x)
        weights = (self.c * masses).detach()
        curvature = torch.einsum("np,pi,pj->nij", weights, self.slopes, self.slopes)
        curvature = curvature + torch.diag_embed(pad(dustbins, (0, 1)).detach() + 1e-14)
        return -torch.linalg.solve(curvature, self.gradient(x)[..., None])[..., 0]

    def minimum(self) -> Tensor:
        # nu so that q sums to one with u = 0, by a lower bound of its exponent. Newton's steps then
        # come from the steep side.
        total = self.B.sum(1)
        x = torch.zeros(len(self.B), self.slopes.shape[1], dtype=total.dtype, device=total.device)
        x[:, -1] = -torch.log(total) * torch.where(total < 1, self.c.min(), self.c.max())
        between_looks = STEPS_BETWEEN_LOOKS if is_queued(x.device) else 1
        for count in range(MAX_STEPS):
            gradient = self.gradient(x)
            reached = gradient.abs() <= GRADIENT_TOLERANCE
            if count % between_looks == 0 and bool(reached.all()):
                return x
            step = self.step(x)
            step = step * (20 / step.abs().amax(1, keepdim=True)).clamp(max=1)
            x = x + self._length(x, step, gradient) * step
        worst = float(self.gradient(x).abs().max())
        raise ArithmeticError(f"reverse_kl did not converge (gradient {worst:.1e})")

    def _length(self, x: Tensor, step: Tensor, gradient: Tensor) -> Tensor:
        """[n, 1], halved until the value falls by a part of what the slope promises (Armijo)."""
        before = self.value(x)
        slope = (gradient * step).sum(1)
        length = torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
        queued = is_queued(x.device)
        for _ in range(HALVINGS if queued else 40):
            allowed = before + 1e-4 * length[:, 0] * slope + 1e-13
            worse = ~(self.value(x + length * step) <= allowed)
            if not queued and not bool(worse.any()):
                break
            length = torch.where(worse[:, None], length / 2, length)
        return length
