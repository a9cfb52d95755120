"""Eq. 5 on the level of patterns: a few masses instead of C probabilities.

Classes that belong to the same active specialists form a pattern.  Legend: n rows, P patterns, M active specialists.
    A [n, P]    mass that generalist and specialists put on each pattern      d [n, M]  dustbin masses;  A and d
    together sum to 1 N [P, M]    1 where the pattern lies outside S_m                          Q = Y N   mass of the
    answer outside S_m
Wanted: Y [n, P] minimising  - sum_P A_P log Y_P - sum_m d_m log Q_m  with sum Y = 1.  With t_m = d_m / Q_m the optimum
is
    Y_P s_P = A_P,   Q_m t_m = d_m,   s_P = 1 - sum_m N_Pm t_m        (methods.md, section 1: s is the denominator
    there, divided by 1 + M)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Stands for no mass at all, in a pattern or a dustbin: far below every tolerance, and still a float32.
EMPTY = 1e-30
# Mass that nobody misses.
NEGLIGIBLE = 1e-20
# A step of less than this, relative to every variable, needs no line search: it stays inside and Newton's error
# squares.
SURE = 0.3
QUICK_STEPS = 8
MAX_STEPS = 200
# What unrolled steps add to a unit diagonal: above the rounding of 30 specialists' pivots, and no more than a step's
# last digits.
RIDGE = 1e-14
# The smallest target that the long way aims at: its effect on the objective is below float64's resolution of it.
SMALLEST_TARGET = 1e-14


@dataclass
class Membership:
    """Which patterns lie outside which specialists: outside [P, M], the same for all rows, or [n, P, M]; counts
    likewise."""

    outside: Tensor
    counts: Tensor

    def __post_init__(self):
        *_, patterns, specialists = self.outside.shape
        self._transposed = self.outside.mT
        self._pairs = (self.outside[..., :, None] * self.outside[..., None, :]).flatten(-2)
        # A pattern's mass is at least this, in proportion to its classes.
        self.nothing = EMPTY * self.counts.clamp(min=1) / self.counts.sum(-1, keepdim=True)
        self.everything_inside = (self.outside.sum(-2) == 0).to(self.outside.dtype)

    def to_specialists(self, x: Tensor) -> Tensor:
        return _times(x, self.outside)

    def to_patterns(self, t: Tensor) -> Tensor:
        return _times(t, self._transposed)

    def weighted(self, w: Tensor) -> Tensor:
        """N^T diag(w) N, [n, M, M]."""
        return _times(w, self._pairs).unflatten(-1, (self.outside.shape[-1],) * 2)

    def rows(self, index: Tensor) -> "Membership":
        return (
            self if self.outside.dim() == 2 else Membership(self.outside[index], self.counts[index])
        )


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    return x @ matrix if matrix.dim() == 2 else (x[:, None] @ matrix)[:, 0]


def pattern_masses(
    A: Tensor,
    d: Tensor,
    members: Membership,
    tolerance: float,
    steps: int | None = None,
    portable=False,
) -> Tensor:
    """Y [n, P], differentiable in A and d.

    tolerance: of |Y s - A| and |Q t - d|.  steps: that many, unrolled, without a line search; None: until converged.
    portable: unrolled steps of products and sums alone.  Raises ArithmeticError if a row does not converge.
    """
    A = torch.maximum(A, members.nothing)
    d = d.clamp(min=EMPTY)
    if (
        d.shape[1] == 1
    ):  # closed form: the dustbin is shared among the classes outside in proportion to what they have
        return A + d * members.outside[..., 0] * A / (
            members.to_specialists(A) + members.everything_inside
        )
    if steps is not None:
        state = _start(A, d, members)
        for _ in range(steps):
            direction = _direction(
                A, d, state, members, solve=_eliminated if portable else _bounded
            )
            state = _moved(state, direction, *state.rooms(direction))
        return state.Y
    with torch.no_grad():
        state = _solved(A, d, members, tolerance)
    if not (A.requires_grad or d.requires_grad):
        return state.Y
    # Newton's method differentiates itself: at the optimum one more step, with the matrix held fixed, changes nothing
    # and has the derivative that the implicit function theorem gives.
    return state.Y + _direction(A, d, state, members)[0]


@dataclass
class State:
    """A point with Q = Y N and s = 1 - N t; Newton's steps keep both, and s and Y small numbers of their own, never
    differences."""

    Y: Tensor
    s: Tensor
    t: Tensor
    Q: Tensor

    def residual(self, A: Tensor, d: Tensor) -> Tensor:
        return torch.maximum(
            (self.Y * self.s - A).abs().amax(1), (self.Q * self.t - d).abs().amax(1)
        )

    def take(self, rows: Tensor) -> "State":
        return State(self.Y[rows], self.s[rows], self.t[rows], self.Q[rows])

    def largest_step(self, direction) -> Tensor:
        """The largest relative change that a full step makes, [n]."""
        dY, ds, dt, dQ = direction
        parts = [dY / self.Y, ds / self.s, dt / self.t]
        return torch.stack([part.abs().amax(1) for part in parts]).amax(0)

    def rooms(self, direction) -> tuple[Tensor, Tensor]:
        """The longest steps, at most 1, that take no variable further than 95 % of the way to zero: of Y and Q, and of
        s and t, [n, 1] each."""
        dY, ds, dt, dQ = direction
        primal = (-dY / self.Y).amax(1)
        dual = torch.maximum((-ds / self.s).amax(1), (-dt / self.t).amax(1))
        return tuple((0.95 / shrinking.clamp(min=0.95))[:, None] for shrinking in (primal, dual))

    def room(self, direction) -> Tensor:
        """The longest common step, [n, 1]."""
        return torch.minimum(*self.rooms(direction))


def factors(A: Tensor, Y: Tensor, members: Membership) -> tuple[Tensor, Tensor]:
    """By what each pattern's classes are multiplied to have mass Y [n, P], and what each gets where there is no mass.

    Where all but a dustbin leave a pattern empty, its mass is spread evenly over its classes.
    """
    starved = (A < members.nothing) & (Y > NEGLIGIBLE)
    return (
        torch.where(starved, 0.0, Y / torch.maximum(A, members.nothing)),
        torch.where(starved, Y / members.counts.clamp(min=1), 0.0),
    )


def _start(A: Tensor, d: Tensor, members: Membership) -> State:
    """One EM step from q in proportion to A, and t as near to d / Q as keeps every s positive."""
    base = A + 1e-9 * members.counts / members.counts.sum(-1, keepdim=True)
    Y = A + base * members.to_patterns(
        d / (members.to_specialists(base) + members.everything_inside)
    )
    Q = members.to_specialists(Y) + members.everything_inside
    t = torch.where(members.everything_inside > 0, d, d / Q)
    load = members.to_patterns(t)
    t = t * (0.9 / load.amax(1, keepdim=True)).clamp(max=1.0)
    return State(Y, 1 - members.to_patterns(t), t, Q)


def _direction(A: Tensor, d: Tensor, at: State, members: Membership, solve: Callable | None = None):
    """Newton's step for Y s = A, Q t = d; dY and ds are eliminated, so one [M, M] system per row is left."""
    missing_A, missing_d = A - at.Y * at.s, d - at.Q * at.t
    if solve is _least_squares:
        dt = _least_squares(missing_A, missing_d, at, members)
    else:
        matrix = members.weighted(at.Y / at.s) + torch.diag_embed(at.Q / at.t)
        dt = (solve or _cholesky)(
            matrix, missing_d / at.t - members.to_specialists(missing_A / at.s)
        )
    ds = -members.to_patterns(dt)
    dY = (missing_A - at.Y * ds) / at.s
    return dY, ds, dt, members.to_specialists(dY)


def _cholesky(matrix: Tensor, right: Tensor) -> Tensor:
    """NaN where the matrix is not positive definite to the last digit."""
    factor, _ = torch.linalg.cholesky_ex(matrix)
    return torch.cholesky_solve(right[..., None], factor)[..., 0]


def _eliminated(matrix: Tensor, right: Tensor) -> Tensor:
    """Gauss and Jordan's elimination, written out: products and sums alone, which every runtime has.  The matrix is
    positive definite."""
    size = matrix.shape[-1]
    matrix, scale = _scaled(matrix)
    work = torch.cat([matrix, (right * scale)[..., None]], -1)
    for pivot in range(size):
        row = work[:, pivot : pivot + 1] / work[:, pivot : pivot + 1, pivot : pivot + 1]
        others = [work[:, :pivot] - work[:, :pivot, pivot : pivot + 1] * row, row]
        others.append(work[:, pivot + 1 :] - work[:, pivot + 1 :, pivot : pivot + 1] * row)
        work = torch.cat(others, 1)
    return work[..., -1] * scale


def _bounded(matrix: Tensor, right: Tensor) -> Tensor:
    """_cholesky of the scaled matrix, for steps that nothing can follow up."""
    matrix, scale = _scaled(matrix)
    return _cholesky(matrix, right * scale) * scale


def _scaled(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix with a diagonal of 1 + RIDGE, and by what right side and solution are to be multiplied.

    Rounding cannot then leave a pivot at zero or below, which would be NaN for good.
    """
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    scale = 1 / torch.sqrt((matrix * identity).sum(-1))
    return matrix * scale[..., :, None] * scale[..., None, :] + RIDGE * identity, scale


def _least_squares(missing_A: Tensor, missing_d: Tensor, at: State, members: Membership) -> Tensor:
    """The same system as normal equations of rows sqrt(Y / s) N dt = - missing_A / sqrt(Y s) and sqrt(Q / t) dt =
    missing_d / sqrt(Q t).

    Where a pattern's s is next to nothing, its Y / s swamps all else in the sum that the matrix is.  QR of the rows
    themselves, largest first, keeps what each row says (Cox and Higham 1998, row-wise stability).
    """
    rows = torch.cat(
        [
            torch.sqrt(at.Y / at.s)[..., None] * members.outside,
            torch.diag_embed(torch.sqrt(at.Q / at.t)),
        ],
        1,
    )
    right = torch.cat(
        [-missing_A / torch.sqrt(at.Y * at.s), missing_d / torch.sqrt(at.Q * at.t)], 1
    )
    order = rows.amax(2).argsort(dim=1, descending=True)
    rows, right = rows.gather(1, order[..., None].expand_as(rows)), right.gather(1, order)
    q, r = torch.linalg.qr(rows)
    return torch.linalg.solve_triangular(r, q.mT @ right[..., None], upper=True)[..., 0]


def _moved(at: State, direction, step, dual_step=None) -> State:
    """Q = Y N and s = 1 - N t survive steps of two lengths, as in primal-dual interior-point methods: an empty pattern
    that shrinks Y does not then hold up t."""
    dY, ds, dt, dQ = direction
    other = step if dual_step is None else dual_step
    return State(at.Y + step * dY, at.s + other * ds, at.t + other * dt, at.Q + step * dQ)


def _merit(A: Tensor, d: Tensor, at: State) -> Tensor:
    """Primal plus dual objective, [n]; minimal exactly at the optimum, and Newton's direction descends it."""
    masses, products = torch.cat([A, d], 1), torch.cat([at.Y * at.s, at.Q * at.t], 1)
    return (products - masses * products.log()).sum(1)


def _solved(A: Tensor, d: Tensor, members: Membership, tolerance: float) -> State:
    """Straight to the target from a good guess, which is all that most rows need; what is left goes the long way."""
    state = _start(A, d, members)
    for step in range(QUICK_STEPS + 1):
        done = state.residual(A, d) <= tolerance
        if bool(done.all()):
            return _polished(A, state)
        if step == QUICK_STEPS:
            break
        direction = _direction(A, d, state, members)
        if bool((state.largest_step(direction) <= SURE).all()):
            state = _moved(state, direction, 1.0)
        elif not bool(torch.isfinite(direction[2]).all()):
            break
        else:
            state = _searched(A, d, state, direction)
    left = (~done).nonzero()[:, 0]
    found = _followed(A[left], d[left], members.rows(left), tolerance)
    for name in ("Y", "s", "t", "Q"):
        getattr(state, name)[left] = getattr(found, name)
    return _polished(A, state)


def _followed(A: Tensor, d: Tensor, members: Membership, tolerance: float) -> State:
    """Along the central path, as interior-point methods go: every target at least mu, and mu falls once a row is near
    its target.

    Aiming at targets of 1e-20 from afar jams against the boundary, where steps shrink to nothing.
    """
    n, (patterns, specialists) = len(A), members.outside.shape[-2:]
    t = torch.full_like(d, 0.5 / specialists)
    Y = torch.full_like(A, 1 / patterns)
    state = State(
        Y, 1 - members.to_patterns(t), t, members.to_specialists(Y) + members.everything_inside
    )
    mu = torch.full((n, 1), 0.1 / (patterns + specialists), dtype=A.dtype, device=A.device)
    for _ in range(MAX_STEPS):
        target_A, target_d = torch.maximum(A, mu), torch.maximum(d, mu)
        off_A, off_d = state.Y * state.s / target_A, state.Q * state.t / target_d
        near = torch.maximum((off_A - 1).abs().amax(1), (off_d - 1).abs().amax(1)) < 0.5
        if bool((state.residual(A, d) <= tolerance).all()):
            return state
        mu = torch.where(near[:, None], mu * 0.1, mu).clamp(min=SMALLEST_TARGET)
        target_A, target_d = torch.maximum(A, mu), torch.maximum(d, mu)
        solve = _least_squares if bool(mu.min() < 1e-6) else None
        direction = _direction(target_A, target_d, state, members, solve)
        state = _searched(target_A, target_d, state, direction)
    worst = float(state.residual(A, d).max())
    raise ArithmeticError(
        f"{n} rows did not converge in {MAX_STEPS} Newton steps (residual {worst:.1e} > {tolerance:.0e})"
    )


def _searched(A: Tensor, d: Tensor, state: State, direction) -> State:
    """As far along the direction as every variable stays positive and the merit falls."""
    length, before = state.room(direction), _merit(A, d, state)
    for _ in range(40):
        trial = _moved(state, direction, length)
        worse = ~(_merit(A, d, trial) <= before + 1e-13)
        if not bool(worse.any()):
            break
        length = torch.where(worse[:, None], length / 2, length)
    return trial


def _polished(A: Tensor, state: State) -> State:
    """Where s is no small number, Y = A / s is right also relative to a tiny A."""
    state.Y = torch.where(state.s > 0.1, A / state.s, state.Y)
    return state
