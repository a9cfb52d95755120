"""Which lever to pull: the greatest expected gain that what is scarce allows, in one sentence.

All amounts are multiples of the generalist's own: training and wall clock as such (1 is as much
again, 0 is none), what an answer takes with the generalist in it (1 is as much as it takes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict, cast

from .document import GeneralistSize, Interval, Lever, Under
from .levers import FAMILIES, LEVERS, SCARCITIES

STOP = "stop"
EVEN = 0.05  # shares of training that differ by less are called the same

# Gains that differ by less are about the same, and the cheaper lever is the better one: so many
# points, or the share of the greatest gain where that is more. Of small gains at most a quarter.
NEAR_POINTS = 0.1
NEAR_SHARE = 0.05
NEAR_MOST = 0.25


DEFAULT = "training"  # what bounds the choice where the user names nothing


class Choice(TypedDict):
    """The part of advice.json that is chosen, not measured."""

    best: str
    scarce: str
    limit: float | None
    sentence: str
    elsewhere: str
    best_for: dict[str, Under]
    levers: list[Lever]


def choose(
    levers: Sequence[Lever], generalist: GeneralistSize, scarce: str, limit: float | None
) -> Choice:
    """The best lever, under what is scarce and under each other scarcity, and how to say it.

    scarce: a name of SCARCITIES, or "" for nothing.  limit: of that, None for its default.
    The levers come back in the order of their gains, with the fronts that each is on. "stop" is
    among them.
    """
    levers = with_fronts(sorted(with_stop(levers, generalist), key=lambda each: -each["gain"]))
    bound = scarce or DEFAULT
    limits = {name: limit_of(name, limit if name == bound else None) for name in SCARCITIES}
    bests = {name: best_under(levers, name, limits[name], generalist) for name in SCARCITIES}
    return Choice(
        best=bests[bound]["name"],
        scarce=scarce,
        limit=limits[bound],
        sentence=sentence(levers, bound, limits[bound], generalist),
        elsewhere=elsewhere(bests, bests[bound]),
        best_for={name: _under(best, limits[name]) for name, best in bests.items()},
        levers=levers,
    )


def with_fronts(levers: Sequence[Lever]) -> list[Lever]:
    """The levers, each with the scarcities on whose front it is."""
    fronts = {name: pareto(levers, name) for name, row in SCARCITIES.items() if row.quantity}
    return [
        cast(Lever, lever | {"pareto": [name for name in fronts if lever["name"] in fronts[name]]})
        for lever in levers
    ]


def _under(lever: Lever, limit: float | None) -> Under:
    return Under(
        lever=lever["name"],
        limit=limit,
        gain=lever["gain"],
        low=lever["low"],
        high=lever["high"],
    )


def limit_of(scarcity: str, limit: float | None) -> float | None:
    """The limit of a scarcity: the given one, or its default. None where it has none."""
    default = SCARCITIES[scarcity].limit
    return default if limit is None or default is None else limit


def with_stop(levers: Sequence[Lever], generalist: GeneralistSize) -> list[Lever]:
    """The levers, and the one that costs and gains nothing if it is not among them."""
    if any(lever["name"] == STOP for lever in levers):
        return list(levers)
    stop = Lever(
        name=STOP,
        gain=0.0,
        low=0.0,
        high=0.0,
        training=0.0,
        wall_clock=0.0,
        multiplications=generalist["multiplications"],
        parameters=generalist["parameters"],
        latency_ms=generalist["latency_ms"],
        measured=None,
        needs="",
    )
    return [*levers, stop]


# The choice


def amount(lever: Lever, scarcity: str, generalist: GeneralistSize) -> float | None:
    """How much a lever takes of what is scarce, in multiples of the generalist's own.

    None if it is not known, and for the trunk, which has no degrees.
    """
    row = SCARCITIES[scarcity]
    value = lever.get(row.quantity) if row.quantity else None
    if value is None or not row.of_answer:
        return value
    own = generalist.get(row.quantity)
    return value / own if own else None


def allowed(lever: Lever, scarcity: str, limit: float | None, generalist: GeneralistSize) -> bool:
    """Whether a lever keeps to the limit of a scarcity. To stop always does.

    A lever of unknown amount does not. limit: None means no bound.
    """
    if lever["name"] == STOP:
        return True
    if not SCARCITIES[scarcity].quantity:
        return LEVERS[lever["name"]].keeps_trunk
    if limit is None:
        return True
    taken = amount(lever, scarcity, generalist)
    return taken is not None and taken <= limit * (1 + 1e-9)


def best_under(
    levers: Sequence[Lever], scarcity: str, limit: float | None, generalist: GeneralistSize
) -> Lever:
    """The lever of the greatest expected gain among those that a scarcity allows.

    Among gains about equal to the greatest, the lever that takes least of what is scarce wins, then
    the one with the least training. If no lever is expected to gain anything, it is `stop`.
    """
    gaining = [
        lever
        for lever in levers
        if lever["gain"] > 0 and allowed(lever, scarcity, limit, generalist)
    ]
    if not gaining:
        return next(lever for lever in with_stop(levers, generalist) if lever["name"] == STOP)
    most = max(lever["gain"] for lever in gaining)
    margin = max(min(NEAR_POINTS, NEAR_MOST * most), NEAR_SHARE * most)
    near = [lever for lever in gaining if lever["gain"] >= most - margin]

    def price(lever: Lever) -> tuple[float, float, float]:
        return amount(lever, scarcity, generalist) or 0.0, lever["training"], -lever["gain"]

    return min(near, key=price)


def pareto(levers: Sequence[Lever], scarcity: str) -> list[str]:
    """The levers that no other one beats in both gain and amount, the cheapest first.

    scarcity: one with a quantity, of which it does not matter what the generalist takes.  Levers of
    which it is not known are on no front.
    """
    key = SCARCITIES[scarcity].quantity
    known = [lever for lever in levers if lever.get(key) is not None]
    ordered = sorted(known, key=lambda lever: (lever[key], -lever["gain"]))
    front: list[Lever] = []
    for lever in ordered:
        if not front or lever["gain"] > front[-1]["gain"]:
            front.append(lever)
        elif (lever[key], lever["gain"]) == (front[-1][key], front[-1]["gain"]):
            front.append(lever)
    return [lever["name"] for lever in front]


# The words


def sentence(
    levers: Sequence[Lever], scarcity: str, limit: float | None, generalist: GeneralistSize
) -> str:
    """What to do, its expected gain and its price, and which levers may be as good or better.

    "Train a second generalist and average the two: +4.1 points (2.9 to 5.0) for as much training
    again. Wider (+3.8, 2.1 to 5.4) may be as good."
    """
    best = best_under(levers, scarcity, limit, generalist)
    others = [
        lever
        for lever in levers
        if lever["name"] not in (STOP, best["name"]) and allowed(lever, scarcity, limit, generalist)
    ]
    second = max(others, key=lambda lever: lever["gain"], default=None)
    if best["name"] == STOP:
        return _to_stop(second, scarcity, limit)
    gain = f"{points(best['gain'])} points ({interval(best)})"
    text = f"{order(best)}: {gain} for {training_words(best['training'])}"
    taken = amount(best, scarcity, generalist)
    if scarcity != DEFAULT and taken is not None:
        text += f", at {multiple(taken)} × the generalist's {SCARCITIES[scarcity].words}"
    if second is not None and second["high"] >= best["low"]:
        text += f"; {second['name']} ({points(second['gain'])}, {interval(second)}) may be as good"
    return f"{text}.{_undecided(best, others)}"


def _undecided(best: Lever, others: Sequence[Lever]) -> str:
    """Says that specialists may still be better, if their pilots were too short to tell.

    A longer pilot narrows what they gain, unlike that of other levers.
    """
    of_groups = [lever for lever in others if _trains_groups(lever["name"])]
    widest = max(of_groups, key=lambda lever: lever["high"], default=None)
    if widest is None or widest["high"] <= best["high"]:
        return ""
    return (
        f" These pilots are too short to tell: {widest['name']} may gain up to "
        f"{points(widest['high'])} points; a larger --budget says more."
    )


def _trains_groups(lever: str) -> bool:
    return any(FAMILIES[name].needs_groups for name in LEVERS[lever].families)


def _to_stop(second: Lever | None, scarcity: str, limit: float | None) -> str:
    if second is None:
        return f"Stop here: no other lever keeps to {limit_words(scarcity, limit)}."
    gain = f"{points(second['gain'])} points ({interval(second)})"
    return f"Stop here: {second['name']}, the best of the rest, is expected to gain {gain}."


def limit_words(scarcity: str, limit: float | None) -> str:
    """1.10 × the generalist's parameters"""
    if limit is None:
        return "the generalist's trunk alone"
    return f"{multiple(limit)} × the generalist's {SCARCITIES[scarcity].words}"


def elsewhere(bests: Mapping[str, Lever], best: Lever) -> str:
    """What is best under other scarcities, where that is not `best`.

    bests: by the name of the scarcity.
    """
    words: dict[str, list[str]] = {}
    for scarcity, lever in bests.items():
        if lever["name"] != best["name"]:
            words.setdefault(lever["name"], []).append(SCARCITIES[scarcity].words)
    if not words:
        return ""
    gains = {lever["name"]: lever["gain"] for lever in bests.values()}
    parts = [
        f"{'to stop' if name == STOP else f'{name} ({points(gains[name])})'} for {listed(scarce)}"
        for name, scarce in words.items()
    ]
    return f"Best where something else is scarce: {'; '.join(parts)}."


def listed(words: Sequence[str]) -> str:
    """a, b and c"""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def order(lever: Lever) -> str:
    """What a lever asks the user to do, and about how many classes, if that is known."""
    what = LEVERS[lever["name"]].what
    shortlist = lever.get("shortlist")
    if shortlist:
        what = what.replace("likeliest", f"{shortlist} likeliest")
    return what[0].upper() + what[1:]


def training_words(training: float) -> str:
    """A share of the generalist's training, behind "for"."""
    if abs(training - 1) <= EVEN:
        return "as much training again"
    if abs(training - 0.5) <= EVEN / 2:
        return "half as much training again"
    if training < 1:
        return f"{100 * training:.2g} % of the generalist's training"
    return f"{training:.2g} times the generalist's training"


def points(gain: float, digits: int = 1) -> str:
    """+4.1 or -0.3. Without a sign where that is shown as zero"""
    text = f"{gain:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


def interval(lever: Interval) -> str:
    """2.9 to 5.0"""
    low, high = (points(lever[end]).removeprefix("+") for end in ("low", "high"))
    return f"{low} to {high}"


def multiple(value: float) -> str:
    """1.00, 12.3 or 250: how many times the generalist's own."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"
