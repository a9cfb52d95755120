"""Tables of what came of advice: by set, in total, and by lever."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean

from benchmarks.papers import lab

from .judging import ALLOWED, Account, Coverage, account, coverage
from .sets import SETS
from .verdicts import Judged


def budgets_of(rows: Iterable[Judged]) -> list[float]:
    return sorted({row.budget for row in rows})


def with_budget(rows: Iterable[Judged], budget: float) -> list[Judged]:
    return [row for row in rows if row.budget == budget]


def accounts(rows: Sequence[Judged]) -> dict[float, dict[str, Account]]:
    """By budget and scarcity."""
    return {
        budget: {
            name: account(row.verdicts[name] for row in with_budget(rows, budget))
            for name in ALLOWED
        }
        for budget in budgets_of(rows)
    }


def coverages(rows: Sequence[Judged]) -> dict[str, Coverage]:
    """By lever, and "all" of them."""
    names = list(dict.fromkeys(name for row in rows for name in row.levers))
    pairs = {
        name: [(row.predicted[name], row.pulled[name]) for row in rows if name in row.levers]
        for name in names
    }
    pairs["all"] = [pair for own in pairs.values() for pair in own]
    return {name: coverage(own) for name, own in pairs.items()}


def by_set(rows: Sequence[Judged], scarcity: str) -> str:
    """A row for each set at the largest budget: what was advised, by seed, and what was best."""
    lines = []
    largest = with_budget(rows, budgets_of(rows)[-1])
    for name in dict.fromkeys(row.name for row in largest):
        own = [row for row in largest if row.name == name]
        lines.append([name, len(own), *cells_of(own, scarcity)])
    header = ["set", "seeds", "advised", "best", "gains", "best gains", "regret"]
    return lab.table([*header, "as good"], lines)


def cells_of(rows: Sequence[Judged], scarcity: str) -> list:
    verdicts = [row.verdicts[scarcity] for row in rows]
    return [
        ", ".join(row.advised for row in verdicts),
        ", ".join(row.best for row in verdicts),
        f"{mean(row.gain for row in verdicts):+.2f}",
        f"{mean(row.best_gain for row in verdicts):+.2f}",
        f"{mean(row.regret for row in verdicts):.2f}",
        sum(row.is_as_good for row in verdicts),
    ]


def in_total(rows: Sequence[Judged]) -> str:
    """A row for each scarcity and budget: the advice against rules that always say the same."""
    lines, rules = [], []
    for budget, by_scarcity in accounts(rows).items():
        spent = mean(row.spent for row in with_budget(rows, budget))
        for scarcity, each in by_scarcity.items():
            rules = list(each.by_rule)
            regrets = [f"{value:.2f}" for value in each.by_rule.values()]
            counts = [each.n, f"{each.best} / {each.as_good}"]
            own = [f"{each.regret:.2f}", f"{each.worst:.2f}"]
            lines.append([scarcity, budget, f"{spent:.2f}", *counts, *own, *regrets])
    header = ["scarce", "budget", "spent", "advice", "best / as good", "regret", "at most"]
    return lab.table([*header, *(f"always {rule}" for rule in rules)], sorted(lines, key=first))


def first(line: list) -> tuple[bool, float]:
    """In the order of ALLOWED, then of budgets."""
    return line[0] != next(iter(ALLOWED)), line[1]


def by_lever(rows: Sequence[Judged]) -> str:
    """How often intervals hold what a lever gains: all levers', and each one's at the largest."""
    lines, budgets = [], budgets_of(rows)
    for budget in budgets:
        for name, each in coverages(with_budget(rows, budget)).items():
            if name != "all" and budget != budgets[-1]:
                continue
            lines.append(
                [
                    name,
                    budget,
                    each.n,
                    f"{each.exactly:.0%}",
                    f"{each.with_error:.0%}",
                    f"{each.width:.1f}",
                    f"{each.predicted:+.2f}",
                    f"{each.measured:+.2f}",
                    f"{each.error:.2f}",
                ]
            )
    header = ["lever", "budget", "n", "held", "with its error", "width", "predicted", "measured"]
    return lab.table([*header, "mean error"], lines)


def report(rows: Sequence[Judged]) -> str:
    """All tables, each with a line before it."""
    parts = [
        "The advice against rules that always say the same. Regrets are mean points of test top-1. "
        "A rule whose lever is not allowed stops.",
    ]
    for words, own in by_age(rows).items():
        parts += [f"On {words}:", in_total(own)]
    for scarcity, most in ALLOWED.items():
        parts += [
            f"By set, where {scarcity} is scarce (at most × {most}), at the largest budget:",
            by_set(rows, scarcity),
        ]
    parts += ["How often the 90 % intervals hold what a lever gains on test."]
    for words, own in by_age(rows).items():
        parts += [f"On {words}:", by_lever(own)]
    return "\n\n".join(parts)


def by_age(rows: Sequence[Judged]) -> dict[str, list[Judged]]:
    """What is known of its sets -> rows. Without those of which there are none."""
    ages = {
        "sets that the constants were fitted to": False,
        "sets that entered no fit": True,
    }
    parts = {
        words: [row for row in rows if SETS[row.name].is_new == is_new]
        for words, is_new in ages.items()
    }
    return {words: own for words, own in parts.items() if own}


def in_numbers(rows: Sequence[Judged]) -> dict:
    """The same as JSON."""
    return {words: numbers_of(own) for words, own in by_age(rows).items()}


def numbers_of(rows: Sequence[Judged]) -> dict:
    numbers = {}
    for budget in budgets_of(rows):
        own = with_budget(rows, budget)
        numbers[str(budget)] = {
            "spent": mean(row.spent for row in own),
            "same_families": sum(row.same_families for row in own),
            "regrets": {name: each._asdict() for name, each in accounts(own)[budget].items()},
            "coverage": {name: each._asdict() for name, each in coverages(own).items()},
        }
    return numbers


def lever_table(rows: Sequence[Judged]) -> str:
    """A row for each advice and lever: predicted, measured on test, and what both mean."""
    lines = []
    for row in rows:
        for name in row.levers:
            predicted, pulled = row.predicted[name], row.pulled[name]
            marks = [
                f"{'advised' if name == each.advised else ''}{' best' if name == each.best else ''}"
                for each in row.verdicts.values()
            ]
            lines.append(
                [
                    f"{row.name} {row.seed}",
                    row.budget,
                    name,
                    f"{predicted.gain:+.2f} [{predicted.low:+.2f}, {predicted.high:+.2f}]",
                    f"{pulled.gain:+.2f} ± {pulled.error:.2f}",
                    "" if row.held[name].exactly else "out",
                    *marks,
                ]
            )
    return lab.table(
        ["set, seed", "budget", "lever", "predicted", "test", "interval", *ALLOWED], lines
    )
