"""Eq. 5 on the level of patterns: a few masses instead of C probabilities.

Classes that belong to the same active specialists form a pattern.  Legend:

    n, P, M     rows, patterns, active specialists
    A [n, P]    mass that generalist and specialists together put on each pattern
    d [n, M]    dustbin masses. a and d of a row together sum to 1
    N [P, M]    1 where the pattern lies outside S_m, else 0
    Y [n, P]    mass of each pattern in the result: the unknown
    Q [n, M]    mass of the result outside S_m: Q = Y N

Wanted is the Y with sum Y = 1 that minimises

    - sum_P A_P log Y_P - sum_m d_m log Q_m

With t_m = d_m / Q_m the optimum is where

    Y_P s_P = A_P,      Q_m t_m = d_m,      s_P = 1 - sum_m N_Pm t_m

docs/combiner.md derives this.  s_P is the denominator there, divided by the sum of the weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .host_reads import Asking, answered, is_queued

# Stands for no mass at all, in a pattern or a dustbin: far below every tolerance, still a float32.
EMPTY = 1e-30
# Less than any pattern's mass: a divisor where there is no such pattern.
SMALLEST = 1e-100
# Up to so many specialists their pairs' outer products are kept: [P, M, M] numbers.
PAIRS_KEPT = 32
# Mass that nobody misses.
NEGLIGIBLE = 1e-20
# A step of less than this, relative to every variable, needs no line search: it stays inside and
# Newton's error squares.
SURE = 0.3
# How many times a residual's tolerance a load's is (State.missed_load), of a Q that is not below
# NEGLIGIBLE_Q.
LOAD_TOLERANCE = 1e3
NEGLIGIBLE_Q = 1e-12
QUICK_STEPS = 8
MAX_STEPS = 200
CORRECTIONS = 8  # behind the steps that end by a row's residual
# On a device with a queue the host looks after so many steps, and a line search tries so many
# halves of a length at once.
STEPS_BETWEEN_LOOKS = 4
HALVINGS_AT_ONCE = 8
# Benign predictions need 3 steps.  Absurdly conflicting ones (probabilities that underflow) may
# need more than this. UNROLLED_STEPS cannot follow them up.
UNROLLED_STEPS = 16
# What unrolled steps add to a unit diagonal: above the rounding of 30 specialists' pivots, and no
# more than a step's last digits.
RIDGE = 1e-14
# The smallest target of the central path: its effect on the objective is below float64's
# resolution of it.
SMALLEST_TARGET = 1e-14


@dataclass
class Membership:
    """Which patterns lie outside which specialists, and how many classes each pattern has.

    outside: N [P, M], the same for all rows, or [n, P, M].  counts: [P] or [n, P].
    """

    outside: Tensor
    counts: Tensor

    def __post_init__(self):
        self._transposed = self.outside.mT
        self._pairs: Tensor | None = None
        if self.outside.shape[-1] <= PAIRS_KEPT:
            self._pairs = (self.outside[..., :, None] * self.outside[..., None, :]).flatten(-2)
        # A pattern's mass is at least this, in proportion to its classes.
        self.nothing = EMPTY * self.counts.clamp(min=1) / self.counts.sum(-1, keepdim=True)
        self.everything_inside = (self.outside.sum(-2) == 0).to(self.outside.dtype)

    def to_specialists(self, x: Tensor) -> Tensor:
        """x N, [n, P] -> [n, M]."""
        return _times(x, self.outside)

    def to_patterns(self, t: Tensor) -> Tensor:
        """t N^T, [n, M] -> [n, P]."""
        return _times(t, self._transposed)

    def weighted(self, w: Tensor) -> Tensor:
        """N^T diag(w) N, [n, M, M]."""
        if self._pairs is None:
            return (self._transposed * w[:, None]) @ self.outside
        return _times(w, self._pairs).unflatten(-1, (self.outside.shape[-1],) * 2)

    @staticmethod
    def floats_per_row(patterns: int, specialists: int, is_shared: bool) -> int:
        """How many numbers a row takes while it is solved, about.

        is_shared: N is the same for all rows.
        """
        # The system, its factor, and the rows of a least-squares step.
        floats = 4 * (patterns + specialists) * specialists
        if specialists <= PAIRS_KEPT and not is_shared:
            floats += 2 * patterns * specialists**2
        return floats

    def rows(self, index: Tensor) -> "Membership":
        if self.outside.dim() == 2:
            return self
        return Membership(self.outside[index], self.counts[index])


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    if matrix.dim() == 2:
        return x @ matrix
    return (x[:, None] @ matrix)[:, 0]


class Scaling(NamedTuple):
    """How a pattern's classes get their mass in the result.

    factor: [n, P], by what their joined probabilities are multiplied.
    even: [n, P], what each class gets where all but a dustbin leave the pattern empty: its mass is
    spread evenly over its classes.
    """

    factor: Tensor
    even: Tensor


def solve(
    A: Tensor,
    d: Tensor,
    membership: Membership,
    tolerance: float | None,
    portable: bool = False,
) -> Scaling:
    """Eq. 5 for pattern masses A [n, P] and dustbin masses d [n, M] that need not sum to 1.

    tolerance, portable: as in pattern_masses.
    """
    if tolerance is not None and is_queued(A.device):
        return answered(solving(A, d, membership, tolerance))
    # Divided by the mass that is really there, and not by the sum of the weights, q sums to one
    # whatever the rows sum to.
    mass = A.sum(1, keepdim=True) + d.sum(1, keepdim=True)
    Y = pattern_masses(A / mass, d / mass, membership, tolerance, portable)
    scaling = _scaling(A / mass, Y, membership)
    return Scaling(scaling.factor / mass, scaling.even)


def solving(A: Tensor, d: Tensor, membership: Membership, tolerance: float) -> Asking[Scaling]:
    """`solve` on a device with a queue: asks the host seldom whether all rows have converged."""
    mass = A.sum(1, keepdim=True) + d.sum(1, keepdim=True)
    floored_A = torch.maximum(A / mass, membership.nothing)
    floored_d = (d / mass).clamp(min=EMPTY)
    if d.shape[1] == 1:
        Y = _one_specialist(floored_A, floored_d, membership)
    else:
        state = yield from _converging(floored_A, floored_d, membership, tolerance)
        Y = _differentiable(floored_A, floored_d, state, membership)
    scaling = _scaling(A / mass, Y, membership)
    return Scaling(scaling.factor / mass, scaling.even)


def pattern_masses(
    A: Tensor,
    d: Tensor,
    membership: Membership,
    tolerance: float | None,
    portable: bool = False,
) -> Tensor:
    """Y [n, P], differentiable in A and d.

    tolerance: Newton's steps go on until |Y s - A| and |Q t - d| are within it. ArithmeticError for
    a row that does not get there.  None: the same operations for every input, a closed form for two
    specialists, and UNROLLED_STEPS steps without a line search for more.
    portable: the unrolled steps are products and sums alone, which every runtime has.
    """
    A = torch.maximum(A, membership.nothing)
    d = d.clamp(min=EMPTY)
    if d.shape[1] == 1:
        return _one_specialist(A, d, membership)
    if tolerance is None and d.shape[1] == 2:
        return _two_specialists(A, d, membership)
    if tolerance is None:
        return _unrolled(A, d, membership, _by_elimination if portable else _by_scaled_cholesky)
    with torch.no_grad():
        state = _converged(A, d, membership, tolerance)
    return _differentiable(A, d, state, membership)


def _differentiable(A: Tensor, d: Tensor, state: "State", membership: Membership) -> Tensor:
    """Y of the optimum, with its derivatives where somebody may ask for them."""
    if not (A.requires_grad or d.requires_grad):
        return state.Y
    # Newton's method differentiates itself: at the optimum one more step, with the matrix held
    # fixed, changes nothing and has the derivative that the implicit function theorem gives.
    return state.Y + _newton_step(A, d, state, membership).dY


def _one_specialist(A: Tensor, d: Tensor, membership: Membership) -> Tensor:
    """Closed form: the dustbin is shared among the classes outside as they share A."""
    taken = d * membership.outside[..., 0] * A
    return A + taken / (membership.to_specialists(A) + membership.everything_inside)


def _two_specialists(A: Tensor, d: Tensor, membership: Membership) -> Tensor:
    """Closed form: Q_0 and Q_1 are roots of quadratic equations.

    With a the mass A of patterns in one specialist alone, a' in the other alone, o in none, and
    r = o + a + a' + d + d', the conditions of a pattern in one alone are

        r - Q = a Q' / (Q' - d'),      r - Q' = a' Q / (Q - d)

    Q' from the first in the second is

        (o + a + d) Q^2 - (r (o + d) + (r - d') d + a a') Q + r d (o + a' + d) = 0

    whose larger root is Q: Q + Q' - r is Y of the patterns in none, and negative at the smaller.
    Where every class is in one of them, Q = a' + d.
    """
    outside = membership.outside
    both_outside = outside[..., :1] * outside[..., 1:]
    alone = torch.cat(
        [(1 - outside[..., :1]) * outside[..., 1:], outside[..., :1] * (1 - outside[..., 1:])], -1
    )
    o, a = _times(A, both_outside), _times(A, alone)
    a_other, d_other = a.flip(1), d.flip(1)
    r = o + (a + d).sum(1, keepdim=True)
    square = o + a + d
    linear = r * (o + d) + (r - d_other) * d + a * a_other
    constant = r * d * (o + a_other + d)
    root = (linear * linear - 4 * square * constant).clamp_min(0).sqrt()
    Q = (linear + root) / (2 * square)
    # Without patterns in none Q + Q' = r, whatever their s is.
    Q = torch.where(both_outside.sum(-2) > 0, Q, a_other + d)
    # No pattern has less than is put on it. Rounding may say so.
    alone_factor = torch.maximum(r - Q, a) / _no_zero(a)
    none_factor = torch.maximum(Q.sum(1, keepdim=True) - r, o) / _no_zero(o)
    factor = _times(none_factor, both_outside.mT) + _times(alone_factor, alone.mT)
    in_both = 1 - both_outside[..., 0] - alone.sum(-1)
    return A * (factor + in_both)


def _no_zero(mass: Tensor) -> Tensor:
    """What a mass can be divided by. 1 where there is none.

    Not a clamp: torch's exporter makes SMALLEST a float32 for ONNX, which is 0.
    """
    return torch.where(mass > SMALLEST, mass, 1.0)


def _scaling(A: Tensor, Y: Tensor, membership: Membership) -> Scaling:
    starved = (A < membership.nothing) & (Y > NEGLIGIBLE)
    factor = torch.where(starved, 0.0, Y / torch.maximum(A, membership.nothing))
    even = torch.where(starved, Y / membership.counts.clamp(min=1), 0.0)
    return Scaling(factor, even)


class Step(NamedTuple):
    dY: Tensor
    ds: Tensor
    dt: Tensor
    dQ: Tensor

    def where(self, rows: Tensor) -> "Step":
        """No step in the other rows. rows: bool [n]."""
        return Step(*(torch.where(rows[:, None], part, 0.0) for part in self))

    def is_finite(self) -> Tensor:
        """bool [n]."""
        return torch.isfinite(torch.cat(self, 1)).all(1)


@dataclass
class State:
    """A point with Q = Y N and s = 1 - N t.

    Newton's steps keep both, and s and Y stay small numbers of their own, never differences.
    """

    Y: Tensor
    s: Tensor
    t: Tensor
    Q: Tensor

    def residual(self, A: Tensor, d: Tensor) -> Tensor:
        """How far the optimum's conditions are missed, [n]."""
        missed_A = (self.Y * self.s - A).abs().amax(1)
        missed_d = (self.Q * self.t - d).abs().amax(1)
        return torch.maximum(missed_A, missed_d)

    def missed_load(self, d: Tensor) -> Tensor:
        """How far t is from d / Q, [n]: with it, s is off by as much as Q has to lack.

        A Q of 1e-9 that misses its d by 1e-12 has the classes outside off by a thousandth.
        """
        return (self.t - d / self.Q.clamp(min=NEGLIGIBLE_Q)).abs().amax(1)

    def largest_change(self, step: Step) -> Tensor:
        """The largest relative change that the full step makes, [n]."""
        parts = [step.dY / self.Y, step.ds / self.s, step.dt / self.t]
        return torch.stack([part.abs().amax(1) for part in parts]).amax(0)

    def longest(self, step: Step) -> tuple[Tensor, Tensor]:
        """Lengths, at most 1, that take no variable further than 95 % of the way to zero.

        Of Y and Q, and of s and t, [n, 1] each.
        """
        primal = (-step.dY / self.Y).amax(1)
        dual = torch.maximum((-step.ds / self.s).amax(1), (-step.dt / self.t).amax(1))
        primal_length = (0.95 / primal.clamp(min=0.95))[:, None]
        dual_length = (0.95 / dual.clamp(min=0.95))[:, None]
        return primal_length, dual_length

    def moved(self, step: Step, primal: Tensor | float, dual: Tensor | float) -> "State":
        """Q = Y N and s = 1 - N t survive steps of two lengths, as in interior-point methods.

        So an empty pattern that shrinks Y does not hold up t.
        """
        return State(
            self.Y + primal * step.dY,
            self.s + dual * step.ds,
            self.t + dual * step.dt,
            self.Q + primal * step.dQ,
        )

    def replaced(self, rows: Tensor, other: "State") -> "State":
        """Another one's in some rows. rows: bool [n]."""
        mine, others = (self.Y, self.s, self.t, self.Q), (other.Y, other.s, other.t, other.Q)
        pairs = zip(others, mine, strict=True)
        return State(*(torch.where(rows[:, None], theirs, own) for theirs, own in pairs))

    def put(self, rows: Tensor, other: "State") -> None:
        self.Y[rows] = other.Y
        self.s[rows] = other.s
        self.t[rows] = other.t
        self.Q[rows] = other.Q


def _start(A: Tensor, d: Tensor, membership: Membership) -> State:
    """One EM step from q in proportion to A, and t as near to d / Q as keeps every s positive."""
    base = A + 1e-9 * membership.counts / membership.counts.sum(-1, keepdim=True)
    left = membership.to_specialists(base) + membership.everything_inside
    Y = A + base * membership.to_patterns(d / left)
    Q = membership.to_specialists(Y) + membership.everything_inside
    t = torch.where(membership.everything_inside > 0, d, d / Q)
    load = membership.to_patterns(t)
    t = t * (0.9 / load.amax(1, keepdim=True)).clamp(max=1.0)
    return State(Y, 1 - membership.to_patterns(t), t, Q)


def _unrolled(A: Tensor, d: Tensor, membership: Membership, solver: "Solver") -> Tensor:
    """Y after UNROLLED_STEPS."""
    state = _start(A, d, membership)
    for _ in range(UNROLLED_STEPS):
        step = _newton_step(A, d, state, membership, solver)
        primal, dual = state.longest(step)
        state = state.moved(step, primal, dual)
    return state.Y


def _converged(A: Tensor, d: Tensor, membership: Membership, tolerance: float) -> State:
    """Straight to the target from a good guess, which is all that most rows need.

    What is left after QUICK_STEPS follows the central path.
    """
    state = _start(A, d, membership)
    for count in range(QUICK_STEPS + 1):
        done = state.residual(A, d) <= tolerance
        done &= state.missed_load(d) <= LOAD_TOLERANCE * tolerance
        if bool(done.all()):
            return _polished(A, state)
        if count == QUICK_STEPS:
            break
        step = _newton_step(A, d, state, membership)
        if bool((state.largest_change(step) <= SURE).all()):
            state = state.moved(step, 1.0, 1.0)
        elif not bool(torch.isfinite(step.dt).all()):
            break
        else:
            state = _searched(A, d, state, step)
    left = (~(state.residual(A, d) <= tolerance)).nonzero()[:, 0]
    if len(left):
        state.put(left, _central_path(A[left], d[left], membership.rows(left), tolerance))
    return _polished(A, _corrected(A, d, state, membership, tolerance))


def _corrected(
    A: Tensor, d: Tensor, state: State, membership: Membership, tolerance: float
) -> State:
    """Some more steps. Of each row the one whose loads are nearest to what they must be.

    A residual says nothing of a Q that is as small as the residual.
    """
    trial = state
    for _ in range(CORRECTIONS):
        step = _newton_step(A, d, trial, membership, _by_least_squares)
        trial = trial.moved(step, *trial.longest(step))
        is_nearer = trial.missed_load(d) < state.missed_load(d)
        state = state.replaced(is_nearer & (trial.residual(A, d) <= tolerance), trial)
    return state


# ---- the same on a device with a queue


def _converging(A: Tensor, d: Tensor, membership: Membership, tolerance: float) -> Asking[State]:
    """`_converged`, each row by itself and with looks after STEPS_BETWEEN_LOOKS."""
    with torch.no_grad():
        state = _start(A, d, membership)
        converged = torch.zeros(len(A), dtype=torch.bool, device=A.device)
    for _ in range(QUICK_STEPS // STEPS_BETWEEN_LOOKS):
        with torch.no_grad():
            for _ in range(STEPS_BETWEEN_LOOKS):
                # Also those that have converged: a derivative wants more digits than Y.
                step = _newton_step(A, d, state, membership)
                state = _searched_at_once(A, d, state, step.where(step.is_finite()))
            converged = state.residual(A, d) <= tolerance
            is_near = state.missed_load(d) <= LOAD_TOLERANCE * tolerance
        if (yield (converged & is_near).all()):
            break
    else:
        with torch.no_grad():
            left = (~converged).nonzero()[:, 0]
            if len(left):
                few = membership.rows(left)
                path = _central_path(A[left], d[left], few, tolerance, STEPS_BETWEEN_LOOKS)
                state.put(left, path)
            state = _corrected(A, d, state, membership, tolerance)
    with torch.no_grad():
        return _polished(A, state)


def _searched_at_once(A: Tensor, d: Tensor, state: State, step: Step) -> State:
    """`_searched`: the longest of HALVINGS_AT_ONCE halved lengths at which the merit falls."""
    sure = state.largest_change(step) <= SURE
    longest = torch.where(sure[:, None], 1.0, torch.minimum(*state.longest(step)))
    before = _merit(A, d, state)
    halves = 0.5 ** torch.arange(HALVINGS_AT_ONCE, dtype=A.dtype, device=A.device)
    lengths = halves[:, None, None] * longest  # [H, n, 1]
    falls = _merit(A, d, state.moved(step, lengths, lengths)) <= before + 1e-13
    first = falls.int().argmax(0)  # the first that is true, or 0
    first = torch.where(falls.any(0), first, HALVINGS_AT_ONCE - 1)
    length = longest * halves[torch.where(sure, 0, first)][:, None]
    return state.moved(step, length, length)


def _central_path(
    A: Tensor, d: Tensor, membership: Membership, tolerance: float, between_looks: int = 1
) -> State:
    """An interior-point path: every target is at least mu, and mu falls near a row's target.

    Aiming at targets of 1e-20 from afar jams against the boundary, where steps shrink to nothing.

    between_looks: steps between two looks of the host. Of more than one, each row goes by itself.
    """
    n = len(A)
    patterns, specialists = membership.outside.shape[-2:]
    t = torch.full_like(d, 0.5 / specialists)
    Y = torch.full_like(A, 1 / patterns)
    Q = membership.to_specialists(Y) + membership.everything_inside
    state = State(Y, 1 - membership.to_patterns(t), t, Q)
    mu = torch.full((n, 1), 0.1 / (patterns + specialists), dtype=A.dtype, device=A.device)
    for count in range(MAX_STEPS):
        is_looking = count % between_looks == 0
        if is_looking and bool((state.residual(A, d) <= tolerance).all()):
            return state
        near = _is_near(state, torch.maximum(A, mu), torch.maximum(d, mu))
        mu = torch.where(near[:, None], mu * 0.1, mu).clamp(min=SMALLEST_TARGET)
        target_A = torch.maximum(A, mu)
        target_d = torch.maximum(d, mu)
        if between_looks > 1:
            step = _newton_step(target_A, target_d, state, membership, _by_least_squares)
            moving = ~(state.residual(A, d) <= tolerance) & step.is_finite()
            state = _searched_at_once(target_A, target_d, state, step.where(moving))
            continue
        solver = _by_least_squares if bool(mu.min() < 1e-6) else _by_cholesky
        step = _newton_step(target_A, target_d, state, membership, solver)
        state = _searched(target_A, target_d, state, step)
    worst = float(state.residual(A, d).max())
    raise ArithmeticError(
        f"{n} rows did not converge in {MAX_STEPS} Newton steps "
        f"(residual {worst:.1e} > {tolerance:.0e})"
    )


def _is_near(state: State, target_A: Tensor, target_d: Tensor) -> Tensor:
    """Whether each row is within a factor of its targets, bool [n]."""
    off_A = (state.Y * state.s / target_A - 1).abs().amax(1)
    off_d = (state.Q * state.t / target_d - 1).abs().amax(1)
    return torch.maximum(off_A, off_d) < 0.5


def _searched(A: Tensor, d: Tensor, state: State, step: Step) -> State:
    """Go along the step as far as every variable stays positive and the merit falls."""
    length = torch.minimum(*state.longest(step))
    before = _merit(A, d, state)
    trial = state.moved(step, length, length)
    for _ in range(39):
        worse = ~(_merit(A, d, trial) <= before + 1e-13)
        if not bool(worse.any()):
            break
        length = torch.where(worse[:, None], length / 2, length)
        trial = state.moved(step, length, length)
    return trial


def _merit(A: Tensor, d: Tensor, at: State) -> Tensor:
    """Primal plus dual objective, [n]: minimal at the optimum, and falling along Newton's step.

    at: one point, or several, whose tensors have one more axis, which the result has too.
    """
    masses = torch.cat([A, d], 1)
    products = torch.cat([at.Y * at.s, at.Q * at.t], -1)
    return (products - masses * products.log()).sum(-1)


def _polished(A: Tensor, state: State) -> State:
    """Where s is no small number, Y = A / s is right also relative to a tiny A."""
    state.Y = torch.where(state.s > 0.1, A / state.s, state.Y)
    return state


# ---- the linear system of a step

# (missing_A [n, P], missing_d [n, M], state, membership) -> dt [n, M]
Solver: TypeAlias = Callable[[Tensor, Tensor, State, Membership], Tensor]


def _by_cholesky(missing_A: Tensor, missing_d: Tensor, at: State, membership: Membership) -> Tensor:
    return _cholesky(*_normal_equations(missing_A, missing_d, at, membership))


def _newton_step(
    A: Tensor, d: Tensor, at: State, membership: Membership, solver: Solver = _by_cholesky
) -> Step:
    """Newton's step for Y s = A, Q t = d.

    dY and ds are eliminated, so that one [M, M] system per row is left.
    """
    missing_A = A - at.Y * at.s
    missing_d = d - at.Q * at.t
    dt = solver(missing_A, missing_d, at, membership)
    ds = -membership.to_patterns(dt)
    dY = (missing_A - at.Y * ds) / at.s
    return Step(dY, ds, dt, membership.to_specialists(dY))


def _normal_equations(
    missing_A: Tensor, missing_d: Tensor, at: State, membership: Membership
) -> tuple[Tensor, Tensor]:
    """(N^T diag(Y / s) N + diag(Q / t), right side): [n, M, M] and [n, M]."""
    matrix = membership.weighted(at.Y / at.s) + torch.diag_embed(at.Q / at.t)
    right = missing_d / at.t - membership.to_specialists(missing_A / at.s)
    return matrix, right


def _cholesky(matrix: Tensor, right: Tensor) -> Tensor:
    """NaN where the matrix is not positive definite to the last digit."""
    factor, _ = torch.linalg.cholesky_ex(matrix)
    return torch.cholesky_solve(right[..., None], factor)[..., 0]


def _by_scaled_cholesky(
    missing_A: Tensor, missing_d: Tensor, at: State, membership: Membership
) -> Tensor:
    """For steps that nothing can follow up."""
    matrix, right = _normal_equations(missing_A, missing_d, at, membership)
    matrix, scale = _scaled(matrix)
    return _cholesky(matrix, right * scale) * scale


def _by_elimination(
    missing_A: Tensor, missing_d: Tensor, at: State, membership: Membership
) -> Tensor:
    """Gauss and Jordan's elimination, written out: products and sums alone.

    The matrix is positive definite, so it needs no pivoting.
    """
    matrix, right = _normal_equations(missing_A, missing_d, at, membership)
    matrix, scale = _scaled(matrix)
    work = torch.cat([matrix, (right * scale)[..., None]], -1)
    for pivot in range(matrix.shape[-1]):
        row = work[:, pivot : pivot + 1] / work[:, pivot : pivot + 1, pivot : pivot + 1]
        above = work[:, :pivot] - work[:, :pivot, pivot : pivot + 1] * row
        below = work[:, pivot + 1 :] - work[:, pivot + 1 :, pivot : pivot + 1] * row
        work = torch.cat([above, row, below], 1)
    return work[..., -1] * scale


def _scaled(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix with a diagonal of 1 + RIDGE. By what right side and solution are multiplied.

    Rounding cannot then leave a pivot at zero or below, which would be NaN for good.
    """
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    # By a product: of no rows onnxruntime leaves the dimension that a sum takes away.
    ones = torch.ones_like(identity[:, :1])
    scale = 1 / torch.sqrt(((matrix * identity) @ ones)[..., 0])
    return matrix * scale[..., :, None] * scale[..., None, :] + RIDGE * identity, scale


def _by_least_squares(
    missing_A: Tensor, missing_d: Tensor, at: State, membership: Membership
) -> Tensor:
    """The same system, of which the matrix above has the normal equations, by QR of its rows:

        sqrt(Y / s) N dt = - missing_A / sqrt(Y s)
        sqrt(Q / t) dt   =   missing_d / sqrt(Q t)

    Where a pattern's s is next to nothing, its Y / s swamps all else in the sum that the matrix is.
    QR of the rows themselves, largest first, keeps what each row says (Cox and Higham 1998,
    row-wise stability).
    """
    pattern_rows = torch.sqrt(at.Y / at.s)[..., None] * membership.outside
    specialist_rows = torch.diag_embed(torch.sqrt(at.Q / at.t))
    rows = torch.cat([pattern_rows, specialist_rows], 1)
    right_A = -missing_A / torch.sqrt(at.Y * at.s)
    right_d = missing_d / torch.sqrt(at.Q * at.t)
    right = torch.cat([right_A, right_d], 1)
    order = rows.amax(2).argsort(dim=1, descending=True)
    rows = rows.gather(1, order[..., None].expand_as(rows))
    right = right.gather(1, order)
    q, r = torch.linalg.qr(rows)
    return torch.linalg.solve_triangular(r, q.mT @ right[..., None], upper=True)[..., 0]
