"""Other ways to make one distribution of several, behind combine_kl's signature.

They take a specialist for what it is, a coarse distribution, only in reverse_kl; the others first extend it: outside
S_m its dustbin d_m is shared out as the generalist has it, p_i = d_m g_i / sum of g outside (evenly where that is 0).
Written g, p_m, w below.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .combine import combine_kl
from .patterns import SetPatterns, set_patterns
from .predictions import (
    active_sets,
    check_no_negative,
    check_sums,
    checked_active,
    checked_general,
    checked_weights,
    read_predictions,
)

# Stands for a probability of 0 under a logarithm.
FLOOR = 1e-30


def arithmetic_mean(p_general, p_special, groups, active=None, weights=None) -> Tensor:
    """q = (w_0 g + sum_m w_m p_m) / sum of w.  The linear opinion pool, Stone 1961: the minimum of sum_m w_m KL(p_m, q)
    once the specialists are extended, which eq. 5 does not do.  Arguments, result and errors as combine_kl's."""
    return _pooled(_arithmetic, p_general, p_special, groups, active, weights)


def reverse_kl(p_general, p_special, groups, active=None, weights=None) -> Tensor:
    """q minimising w_0 KL(q, g) + sum_m w_m KL(q, p_m), q's mass outside S_m compared with the dustbin: eq. 5 turned
    round.

    Where every S_m is all classes it is the geometric mean, prod p^w normalised (the logarithmic pool, Genest and Zidek
    1986).
    A class that anybody calls impossible stays so.  Arguments, result and errors as combine_kl's.
    """
    return _pooled(_reverse, p_general, p_special, groups, active, weights)


def log_ratio_product(p_general, p_special, groups, active=None, weights=None) -> Tensor:
    """q proportional to g^(w_0) prod_m (p_m / g)^(w_m): each specialist's evidence beyond the generalist's, multiplied.

    Bayes' rule for opinions that share the generalist's knowledge and are independent beyond it (Bordley 1982; a
    product of experts, Hinton 2002).  Arguments, result and errors as combine_kl's.
    """
    return _pooled(_log_ratio, p_general, p_special, groups, active, weights)


def mixture_gating(p_general, p_special, groups, active=None, weights=None) -> Tensor:
    """q = sum_m a_m p_m with a_m proportional to w_m times the generalist's mass in S_m, and for the generalist itself
    w_0 times its mass outside of all active S_m.  A mixture of experts (Jacobs et al. 1991) whose gate is the
    generalist.  Arguments, result and errors as combine_kl's."""
    return _pooled(_mixture, p_general, p_special, groups, active, weights)


COMBINERS: dict[str, Callable] = {
    "kl": combine_kl,
    "reverse_kl": reverse_kl,
    "arithmetic": arithmetic_mean,
    "log_ratio": log_ratio_product,
    "mixture": mixture_gating,
}


def _pooled(rule: Callable, p_general, p_special, groups, active, weights) -> Tensor:
    """Apply rule(g [n, C], said: k tensors [n, |S_m| + 1], patterns, w [1 + k]) to the rows of each active set."""
    g, dtype = checked_general(p_general, groups)
    active = checked_active(active, p_special, len(g), groups, g.device)
    weights = checked_weights(weights, len(groups.members), g.device)
    weights = (
        torch.ones(1 + len(groups.members), dtype=torch.float64, device=g.device)
        if weights is None
        else weights
    )
    opinions = read_predictions(p_special, groups, active, g.dtype, dtype)
    check_sums(g.sum(1), dtype, lambda position: f"row {position[0]} of p_general")
    check_no_negative(g.amin(1), lambda position: f"row {position[0]} of p_general")
    sets, which = active_sets(active)
    pieces, order = [g[:0]], [torch.zeros(0, dtype=torch.int64)]
    for number, chosen in enumerate(sets):
        rows = torch.from_numpy(np.flatnonzero(which == number)).to(g.device)
        said = opinions.side_by_side(chosen, rows)
        for m, part in zip(chosen, said, strict=True):
            check_sums(
                part.sum(1),
                dtype,
                lambda at, rows=rows, m=m: f"row {int(rows[at[0]])} of p_special[{m}]",
            )
            check_no_negative(
                part.amin(1), lambda at, rows=rows, m=m: f"row {int(rows[at[0]])} of p_special[{m}]"
            )
        w = weights[[0, *[1 + m for m in chosen]]].to(g.dtype)
        if float(w.sum()) <= 0:
            raise ValueError(
                f"the generalist and specialists {list(chosen)} have weight 0; give one of them some"
            )
        pieces.append(rule(g[rows], said, set_patterns(groups, chosen), w) if chosen else g[rows])
        order.append(rows.cpu())
    return torch.cat(pieces).index_select(0, torch.argsort(torch.cat(order)).to(g.device)).to(dtype)


def _extended(g: Tensor, said: Tensor, inside: Tensor) -> Tensor:
    """A specialist's opinion on all classes, [n, C]: its dustbin is shared out in proportion to g, evenly where g has
    nothing."""
    rest = g.index_fill(1, inside, 0.0)
    left = rest.sum(1, keepdim=True)
    even = torch.full_like(rest, 1 / max(1, g.shape[1] - len(inside))).index_fill(1, inside, 0.0)
    tiny = torch.finfo(g.dtype).tiny
    shares = torch.where(left > tiny, rest / left.clamp(min=tiny), even)
    return (shares * said[:, -1:]).index_copy(1, inside, said[:, :-1])


def _members(patterns: SetPatterns, device) -> list[Tensor]:
    """The classes of each specialist of the set, ascending."""
    return [torch.tensor(classes, device=device) for classes in patterns.members]


def _arithmetic(g: Tensor, said: list[Tensor], patterns: SetPatterns, w: Tensor) -> Tensor:
    total = w[0] * g
    for part, inside, weight in zip(said, _members(patterns, g.device), w[1:], strict=True):
        total = total + weight * _extended(g, part, inside)
    return total / total.sum(1, keepdim=True)


def _log_ratio(g: Tensor, said: list[Tensor], patterns: SetPatterns, w: Tensor) -> Tensor:
    logs = w[0] * _log(g)
    for part, inside, weight in zip(said, _members(patterns, g.device), w[1:], strict=True):
        logs = logs + weight * (_log(_extended(g, part, inside)) - _log(g))
    return torch.softmax(logs, 1)


def _mixture(g: Tensor, said: list[Tensor], patterns: SetPatterns, w: Tensor) -> Tensor:
    members = _members(patterns, g.device)
    alone = w[0] * g.index_fill(1, torch.cat(members), 0.0).sum(1, keepdim=True)
    total = alone * g
    for part, inside, weight in zip(said, members, w[1:], strict=True):
        total = total + weight * g.index_select(1, inside).sum(1, keepdim=True) * _extended(
            g, part, inside
        )
    mass = total.sum(1, keepdim=True)
    tiny = torch.finfo(g.dtype).tiny
    return torch.where(
        mass > tiny, total / mass.clamp(min=tiny), g
    )  # weights of 0 may leave nobody who is responsible


def _reverse(g: Tensor, said: list[Tensor], patterns: SetPatterns, w: Tensor) -> Tensor:
    """With c_i = w_0 + the weights of the specialists whose S_m holds i, b_i = (g_i^w_0 prod p_mi^w_m)^(1 / c_i) and
    u_m = log(Q_m / d_m), q_i = b_i exp((nu - sum over m with i outside of w_m u_m) / c_i).  u and nu minimise the
    convex sum_P c_P B_P exp((nu - N w u) / c_P) + sum_m w_m d_m exp(u_m) - nu, B_P the sum of b over a pattern of
    classes.
    """
    if float(w[0]) == 0:
        raise ValueError(
            "reverse_kl needs a generalist of weight above 0: nobody else says how classes outside compare"
        )
    device = g.device
    logs, c = (
        w[0].double() * _log(g).double(),
        torch.full((g.shape[1],), 1.0, dtype=torch.float64, device=device) * w[0],
    )
    for part, inside, weight in zip(said, _members(patterns, device), w[1:].double(), strict=True):
        logs = logs.index_add(1, inside, weight * _log(part[:, :-1]).double())
        c = c.index_add(0, inside, weight.expand(len(inside)))
    pattern = torch.zeros(g.shape[1], dtype=torch.int64, device=device)
    pattern[torch.from_numpy(patterns.union[0]).to(device)] = torch.from_numpy(
        patterns.union[1]
    ).to(device)
    outside = torch.from_numpy(patterns.outside).to(device)  # N [P, k]
    has = torch.from_numpy(patterns.counts > 0).to(device)
    b = torch.exp(logs / c)
    B = torch.zeros(len(g), len(has), dtype=torch.float64, device=device).index_add(1, pattern, b)
    c_P = w[0].double() + (1 - outside) @ w[1:].double()
    if not bool(has[0]):
        c_P = torch.where(has, c_P, 1.0)
    d = torch.stack([part[:, -1] for part in said], 1).double().clamp(min=FLOOR)
    slopes = (
        torch.cat(
            [
                -outside * w[1:].double(),
                torch.ones(len(has), 1, dtype=torch.float64, device=device),
            ],
            1,
        )
        / c_P[:, None]
    )
    bins = w[1:].double() * d

    def pieces(x):
        Y, e = B * torch.exp(x @ slopes.T), bins * torch.exp(x[:, :-1])
        gradient = (c_P * Y) @ slopes + torch.nn.functional.pad(e, (0, 1), value=-1.0)
        return Y, e, gradient

    def value(x):
        return (
            (c_P * B * torch.exp(x @ slopes.T)).sum(1)
            + (bins * torch.exp(x[:, :-1])).sum(1)
            - x[:, -1]
        )

    def step(x, hessian_at):
        Y, e, _ = pieces(hessian_at)
        curvature = torch.einsum("np,pi,pj->nij", (c_P * Y).detach(), slopes, slopes)
        curvature = curvature + torch.diag_embed(
            torch.nn.functional.pad(e, (0, 1)).detach() + 1e-14
        )
        return -torch.linalg.solve(curvature, pieces(x)[2][..., None])[..., 0]

    with torch.no_grad():
        # nu so that q sums to one with u = 0, by a lower bound of its exponent; Newton's steps then come from the steep
        # side.
        x = torch.zeros(len(g), outside.shape[1] + 1, dtype=torch.float64, device=device)
        x[:, -1] = -torch.log(B.sum(1)) * torch.where(B.sum(1) < 1, c_P.min(), c_P.max())
        for _ in range(300):
            gradient = pieces(x)[2]
            if bool((gradient.abs() <= 1e-10).all()):
                break
            move, before = step(x, x), value(x)
            move = move * (20 / move.abs().amax(1, keepdim=True)).clamp(max=1)
            slope, length = (
                (gradient * move).sum(1),
                torch.ones(len(g), 1, dtype=torch.float64, device=device),
            )
            for _ in range(40):
                worse = ~(value(x + length * move) <= before + 1e-4 * length[:, 0] * slope + 1e-13)
                if not bool(worse.any()):
                    break
                length = torch.where(worse[:, None], length / 2, length)
            x = x + length * move
        else:
            raise ArithmeticError(
                f"reverse_kl did not converge (gradient {float(gradient.abs().max()):.1e})"
            )
    if torch.is_grad_enabled() and (B.requires_grad or d.requires_grad):
        x = x + step(x, x)  # its derivative is the solution's, by the implicit function theorem
    exponent = (x @ slopes.T).index_select(1, pattern)
    q = b * torch.exp(exponent)
    return (q / q.sum(1, keepdim=True)).to(g.dtype)


def _log(p: Tensor) -> Tensor:
    return p.clamp(min=FLOOR).log()
