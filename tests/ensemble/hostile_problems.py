"""Problems of eq. 5 that somebody made up to break it, each with a proof of what comes of it.

    python tests/ensemble/hostile_problems.py 10000 [--first NUMBER] [--seed SEED]
        makes and judges as many: `make soak`

Every problem is answered exactly or refused in one line that says a rule it breaks.  The proof of
an answer is independent of how it was found: eq. 5 is convex, so a point that meets the conditions
of Karush, Kuhn and Tucker is its minimum.  They are computed here class by class, in extended
precision, from the definition.
"""

import math
import random
import sys
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2])]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from campaigns import SEEDS_APART, asked  # noqa: E402

from clustering.groups import ClassGroups  # noqa: E402
from ensemble import combine_kl  # noqa: E402

# How far the conditions may be missed, as a share of all mass.
# The unknowns are float64 in both.  Of float32 predictions 36 at most are added per class, and the
# sum is multiplied twice: 38 roundings of 2 ** -24 relative, in q and in the sum that it is held
# against, are 4.5e-6.  Loads may be off by 1e-6 (newton.LOAD_TOLERANCE), of 35 specialists by
# 3.5e-5.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 4e-5}
HALVES = (torch.float16, torch.bfloat16)  # computed in float32, so its answer rounded:
HALF_TOLERANCE = 0.02  # bfloat16 rounds q and what is left of it by 2 ** -8 each
SCALES = [0.0, 1.0, 8.0, 40.0, 300.0, 1000.0]
DUSTBINS = [0.0, 1.0, 1 - 2.0**-53, 0.5, 1e-6, 1e-30, 1e-300, 5e-324]
BAD_VALUES = [math.nan, math.inf, -math.inf, -0.25, 7.0]


def rows_of(chance: random.Random, rows: int, width: int) -> np.ndarray:
    """float64 [rows, width], each row a distribution: soft, sharp, with zeros or of one class."""
    rng = np.random.default_rng(chance.getrandbits(32))
    z = rng.standard_normal((rows, width)) * chance.choice(SCALES)
    p = np.exp(z - z.max(1, keepdims=True))
    kind = chance.random()
    if kind < 0.2:
        p *= rng.random(p.shape) < 0.5
        p[np.arange(rows), rng.integers(width, size=rows)] += 0.1
    elif kind < 0.35:
        p = np.eye(width)[rng.integers(width, size=rows)]
    return p / p.sum(1, keepdims=True)


def with_dustbin(chance: random.Random, p: np.ndarray) -> np.ndarray:
    """The dustbin, last, set to one of the values that hurt."""
    dustbin = chance.choice(DUSTBINS)
    inside = p[:, :-1].sum(1, keepdims=True)
    even = np.full_like(p[:, :-1], 1 / (p.shape[1] - 1))
    shares = np.where(inside > 0, p[:, :-1] / np.where(inside > 0, inside, 1), even)
    return np.concatenate([shares * (1 - dustbin), np.full((len(p), 1), dustbin)], 1)


def group(chance: random.Random, classes: int, others: list[list[int]]) -> list[int]:
    """One class, all but one, all, another's again, another's complement, or any."""
    kind = chance.random()
    if kind < 0.1:
        return [chance.randrange(classes)]
    if kind < 0.2:
        return chance.sample(range(classes), classes - 1)
    if kind < 0.25:
        return chance.sample(range(classes), classes)
    if kind < 0.35 and others:
        return list(chance.choice(others))
    if kind < 0.45 and others:
        rest = sorted(set(range(classes)) - set(chance.choice(others)))
        return rest or [0]
    return chance.sample(range(classes), chance.randint(1, classes))


def weights_of(chance: random.Random, count: int) -> tuple[list[float] | None, str]:
    """(weights, why they must be refused or "")."""
    kind = chance.random()
    if kind < 0.35:
        return None, ""
    if kind < 0.55:
        scale = chance.choice([5e-324, 1e-300, 1.0, 1e300, 1e308])
        return [scale] * count, ""
    if kind < 0.8:
        scale = chance.choice([1e-290, 1.0, 1e290])
        return [scale * 10 ** chance.uniform(-5, 5) for _ in range(count)], ""
    weights = [chance.choice([0.0, 1.0, 3.0]) for _ in range(count)]
    if kind < 0.9:
        return weights, ""
    bad = chance.choice([math.nan, math.inf, -1.0, -5e-324, 1e308, 1e-13])
    weights = [1.0] * count
    weights[chance.randrange(count)] = bad
    return weights, "weight"


def problem(seed: int) -> tuple[dict, str]:
    """(the arguments of combine_kl as float64 arrays and lists, why it must be refused or "")."""
    chance = random.Random(seed)
    classes = chance.choice([2, 3, 5, 12, 40])
    rows = chance.randint(1, 6)
    specialists = chance.choice([1, 1, 2, 3, 5, 9, 35])
    members: list[list[int]] = []
    for _ in range(specialists):
        members.append(group(chance, classes, members))
    g = rows_of(chance, rows, classes)
    special = [rows_of(chance, rows, len(each) + 1) for each in members]
    special = [with_dustbin(chance, p) if chance.random() < 0.5 else p for p in special]
    if chance.random() < 0.1:  # sums that are off by less than is allowed
        g = g * (1 + 4e-4)
    active = np.array([[chance.random() < 0.6 for _ in members] for _ in range(rows)])
    if chance.random() < 0.4:
        active[:] = True
    weights, bad = weights_of(chance, 1 + specialists)
    if bad == "" and chance.random() < 0.1:
        bad = spoil(chance, g, special, active)
    given = {"g": g, "special": special, "members": members, "active": active, "weights": weights}
    if bad == "" and has_no_weight(given):
        bad = "weight 0"
    return given, bad


def spoil(chance: random.Random, g: np.ndarray, special: list, active: np.ndarray) -> str:
    """Put a value that is no probability somewhere.  Why it must be refused, "" if unread."""
    value = chance.choice(BAD_VALUES)
    row = chance.randrange(len(g))
    if chance.random() < 0.3:
        g[row, chance.randrange(g.shape[1])] = value
        return "p_general"
    m = chance.randrange(len(special))
    special[m] = special[m].copy()
    special[m][row, chance.randrange(special[m].shape[1])] = value
    return "p_special" if active[row, m] else ""


def has_no_weight(given: dict) -> bool:
    weights, active = given["weights"], given["active"]
    if weights is None:
        return False
    if max(weights) == 0:
        return bool(active.any())
    total = weights[0] / max(weights) + active @ (np.array(weights[1:]) / max(weights))
    return bool((total[active.any(1)] <= 0).any())


def missed(given: dict, q: np.ndarray, least: float = 1e-12) -> float:
    """By how much q misses the conditions of the minimum, as a share of the mass. Worst row.

    least: classes of a smaller q are too few digits of it to be held to their loads.
    """
    ld = np.longdouble
    weights = given["weights"] or [1.0] * (1 + len(given["members"]))
    w = np.array(weights, ld) / (ld(max(weights)) or 1)
    q = q.astype(ld)
    worst = ld(max(-q.min(), 0))
    for b, row in enumerate(q):
        on = np.flatnonzero(given["active"][b])
        if not len(on):
            worst = max(worst, np.abs(row - given["g"][b]).max())
            continue
        worst = max(worst, np.abs(row.sum() - 1))
        a = w[0] * given["g"][b].astype(ld)
        mass, load = a.sum(), np.zeros(len(row), ld)
        for m in on:
            p = given["special"][m][b].astype(ld)
            classes = np.array(given["members"][m])
            if len(classes) == len(row):  # nothing is outside of every class
                inside = p[:-1].sum()
                p = np.append(p[:-1] / inside if inside > 0 else np.full(len(row), 1 / len(row)), 0)
            outside = np.ones(len(row), bool)
            outside[classes] = False
            if weights[1 + m] == 0:
                continue
            a[classes] += w[1 + m] * p[:-1]
            mass += w[1 + m] * p.sum()
            left = row[outside].sum()
            if left > 0:
                load[outside] += w[1 + m] * p[-1] / left
            elif len(classes) < len(row):
                worst = max(worst, w[1 + m] * p[-1] / mass)
        if mass == 0:  # only of classes that a weight of 0 hides
            continue
        # q_i (mass - load_i) = a_i, and no class that has nothing would gain by having some
        worst = max(worst, np.abs(row * (mass - load) - a).max() / mass)
        told = row > least
        if told.any():
            worst = max(worst, (load[told] / mass - 1).max() * row[told].max())
    return float(worst)


def as_arrays(g: torch.Tensor, special: list[torch.Tensor]) -> tuple[np.ndarray, list[np.ndarray]]:
    return g.double().numpy(), [p.double().numpy() for p in special]


# By dtype, the farthest that an answer of this process missed the conditions.
worst_missed: dict[torch.dtype, float] = {}


def judge(seed: int) -> str:
    """ "exact" or "refused". AssertionError for anything else."""
    given, bad = problem(seed)
    dtype = random.Random(seed).choice([torch.float64] * 4 + [torch.float32] * 3 + [*HALVES])
    g = torch.from_numpy(given["g"]).to(dtype)
    special = [torch.from_numpy(p).to(dtype) for p in given["special"]]
    groups = ClassGroups(given["members"], given["g"].shape[1])
    # What the classes of a group are called by its columns: ascending or as given.
    given["members"] = [list(map(int, each)) for each in groups.members]
    active = torch.from_numpy(given["active"])
    try:
        q = combine_kl(g, special, groups, active=active, weights=given["weights"])
    except ValueError as error:
        assert bad, f"problem {seed} is sound and was refused: {error}"
        assert len(str(error).splitlines()) == 1, error
        return "refused"
    assert not bad, f"problem {seed} ({bad}) was answered"
    assert q.dtype == dtype and bool(torch.isfinite(q).all()), f"problem {seed}: {q}"
    # The question as it was asked: after rounding to the dtype.
    if dtype in HALVES:
        # Rounded rows of float32 may be off by more than float32's own may.
        given["g"], given["special"] = as_arrays(g, special)
        off = missed(given, q.double().numpy(), least=1e-3)
        assert off <= HALF_TOLERANCE, f"problem {seed} ({dtype}): off by {off:.2e}"
        g = g.float() / g.float().sum(1, keepdim=True)
        special = [p.float() / p.float().sum(1, keepdim=True) for p in special]
        dtype = torch.float32
        q = combine_kl(g, special, groups, active=active, weights=given["weights"])
    given["g"], given["special"] = as_arrays(g, special)
    off = missed(given, q.double().numpy())
    worst_missed[dtype] = max(off, worst_missed.get(dtype, 0.0))
    assert off <= TOLERANCE[dtype], f"problem {seed} ({dtype}): off by {off:.2e}"
    return "exact"


def campaign(count: int, seed: int = 0) -> Counter:
    """{"exact": ..., "refused": ...} of `count` problems."""
    return Counter(judge(SEEDS_APART * seed + number) for number in range(count))


def soak(numbers: range) -> tuple[Counter, list[str]]:
    """How the problems of these numbers ended, and what is wrong with some."""
    ends: Counter = Counter()
    wrong = []
    for number in numbers:
        try:
            ends[judge(number)] += 1
        except Exception as error:
            wrong.append(f"problem {number}: {type(error).__name__}: {error}")
            print(wrong[-1], flush=True)
    return ends, wrong


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = asked(10_000)
    counts, failures = soak(given.numbers)
    off = ", ".join(f"{str(dtype)[6:]} by {value:.1e}" for dtype, value in worst_missed.items())
    print(f"hostile problems of eq. 5 {given}: {dict(counts)}, {len(failures)} wrong; off: {off}")
    sys.exit(bool(failures))
