"""results.json and the sentence that judges it.  No torch here.

Runs of specialists have "clusters" and "specialists", those of a deep ensemble "sizes", a row for its first 1, 2, ... M
members; the rest is the same.
"""

from __future__ import annotations

import math

from .config import UserError
from .controls import best_wall, control_names
from .corruption import merged, summary
from .graph import RunDirectory
from .store import Stage, read_json

ROW_KEYS = ("n", "top1", "top5", "nll", "brier", "ece", "macro_top1")
# After temperature scaling; of several members; in the currency of deep ensembles; against inputs of other kinds.  Not
# every row has them: members and dee want an ensemble, ood_auroc wants [data] ood, and older runs have none.
# old_classes and new_classes want a run that adds classes.
FURTHER_KEYS = (
    "temperature",
    "cnll",
    "cbrier",
    "cece",
    "members",
    "dee",
    "dee_beyond",
    "ood_auroc",
    "old_classes",
    "new_classes",
)
COST_KEYS = ("seconds", "examples_seen", "peak_memory_bytes")
CLUSTER_KEYS = ("captured_confusion", "chance", "captured_unlabelled", "sizes")


def collect(run: RunDirectory) -> dict:
    """The content of results.json.  Raises UserError if the run is not evaluated yet."""
    generalist = read_evaluation(run.evaluate, "generalist")
    ensemble = read_evaluation(run.evaluate, "ensemble")
    if generalist is None or ensemble is None:
        raise UserError(
            f"{run.root}: nothing to report before the stage `evaluate` is done; finish the run first"
        )
    controls = {name: read_evaluation(run.evaluate, name) for name in control_names(run)}
    students = {name: read_evaluation(run.evaluate, name) for name in run.students}
    found = {
        "generalist": _row(generalist["row"]),
        "ensemble": _row(ensemble["row"]),
        "controls": {name: _row(control["row"]) for name, control in controls.items() if control},
        "students": {name: _row(student["row"]) for name, student in students.items() if student},
    }
    found["student"] = found["students"].get("main")
    if "added" in generalist:
        found["added"] = generalist["added"]
    if not run.method.has_groups:
        found["sizes"] = ensemble["sizes"]
    else:
        found["clusters"] = {key: ensemble["clusters"].get(key) for key in CLUSTER_KEYS}
        found["specialists"] = ensemble["specialists"]
    found["damage"] = summary(
        merged([read_file(stage, "damage.json") or {} for stage in run.stages])
    )
    return _finite(found)


def read_evaluation(evaluate: Stage, name: str) -> dict | None:
    return read_file(evaluate, f"{name}.json")


def read_file(stage: Stage, file: str):
    """A finished stage's JSON file, or None where the stage is not done or wrote no such file."""
    if stage.done() is None:
        return None
    try:
        return read_json(stage.path(file))
    except FileNotFoundError:
        return None


def verdict(results: dict) -> str:
    """One line: is the ensemble better than the generalist and every control?  A control that beats it comes first."""
    called = f"The ensemble of {len(results['sizes'])}" if results.get("sizes") else "The ensemble"
    ensemble, generalist, controls = results["ensemble"], results["generalist"], results["controls"]
    beaten_by = [
        f"{name} beats the ensemble in {' and '.join(where)}"
        for name, row in controls.items()
        if (where := _where_better(row, ensemble))
    ]
    versus = _versus_generalist(ensemble, generalist)
    if beaten_by:
        return f"{'; '.join(beaten_by)}. {called} makes {versus}."
    if not controls and results.get(
        "sizes"
    ):  # more of the same: there is no doubt where its gain comes from
        return f"{called} makes {versus}."
    if not controls:
        return f"The ensemble makes {versus}; no control was trained, so nothing says where the difference comes from."
    ties = [name for name, row in controls.items() if errors(row) == errors(ensemble)]
    others = f"as many as {' and '.join(ties)}" if ties else "fewer than every control"
    lower = all(_below(ensemble["nll"], row["nll"]) for row in (generalist, *controls.values()))
    return (
        f"{called} makes {versus}, {others}{', with the lowest NLL of them all' if lower else ''}."
    )


def wins(results: dict) -> bool:
    """Has the ensemble fewer errors and a lower NLL than the generalist and every control?"""
    ensemble, rivals = results["ensemble"], [results["generalist"], *results["controls"].values()]
    return all(
        errors(ensemble) < errors(row) and _below(ensemble["nll"], row["nll"]) for row in rivals
    )


def student_verdict(results: dict, name: str = "main") -> str | None:
    """One line on how much of the ensemble's gain a student keeps, how it stands against its hard-label twin, and what
    it is worth in networks."""
    student = results["students"].get(name)
    if student is None:
        return None
    share = share_of_gain(student, results)
    if share is None:
        kept = f"The student {name} reaches {percent(student['top1'])} top-1; there is no gain of the ensemble to keep"
    elif share >= 0:
        kept = f"The student {name}, one network, keeps {percent(share, 0)} of the ensemble's gain in top-1"
    else:
        kept = f"The student {name}, one network, keeps none of the ensemble's gain: it falls below the generalist"
    twin = results["controls"].get("student_hard")
    if (
        name == "main"
        and twin is not None
        and twin["nll"] is not None
        and student["nll"] is not None
    ):
        relation = "below" if student["nll"] < twin["nll"] else "not below"
        kept += f"; its NLL, {student['nll']:.3f}, is {relation} the {twin['nll']:.3f} of its twin on hard labels"
    if student.get("dee_beyond") or (student.get("dee") or 0) > 1:
        kept += (
            f". By calibrated NLL it is worth {worth(student, results)} networks of a deep ensemble"
        )
    elif student.get("dee") is not None:  # 1 is a single network or worse
        kept += ". By calibrated NLL it is worth no more than one network of the ensemble"
    return f"{kept}."


def classes_line(results: dict) -> str | None:
    """One line of a run that adds classes: how the old and the new ones fare; None of any other run."""
    added, told = results.get("added"), []
    if added is None:
        return None
    for age in ("old", "new"):
        rows = {
            name: row[f"{age}_classes"]
            for name, row in named_rows(results).items()
            if row.get(f"{age}_classes") and name not in results["controls"]
        }
        each = ", ".join(f"{name} {percent(row['top1'])}" for name, row in rows.items())
        if age == "old" and "top1_before" in added:
            each += (
                f" (before the new ones came the generalist had {percent(added['top1_before'])})"
            )
        if rows:
            told.append(
                f"{added[age]:,} {age} classes ({rows['generalist']['n']:,} test examples): {each}"
            )
    return f"Top-1 of {'; '.join(told)}."


def worth(row: dict, results: dict) -> str:
    """A row's deep ensemble equivalent as it is printed: 2.74, or `>4` beyond the largest ensemble."""
    if row.get("dee_beyond"):
        return f">{len(results['sizes'])}"
    return "–" if row.get("dee") is None else f"{row['dee']:.2f}"


def share_of_gain(row: dict, results: dict) -> float | None:
    """(errors of the generalist - errors of row) / (errors of the generalist - errors of the ensemble)."""
    before, after = errors(results["generalist"]), errors(results["ensemble"])
    return (before - errors(row)) / (before - after) if after < before else None


def errors(row: dict) -> int:
    """Top-1 errors, the whole number that n and top1 stand for."""
    return row["n"] - round(row["n"] * row["top1"])


def named_rows(results: dict) -> dict[str, dict]:
    """Every row under its name, in the order in which people compare them."""
    return {
        "generalist": results["generalist"],
        **results["controls"],
        "ensemble": results["ensemble"],
        **{f"student {name}": row for name, row in results["students"].items()},
    }


def percent(share: float | None, digits: int = 2) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def count(value: float | None) -> str:
    """1,234 or 3.10 M."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value < 1e6 else f"{value / 1e6:,.2f} M"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _versus_generalist(ensemble: dict, generalist: dict) -> str:
    before, after = errors(generalist), errors(ensemble)
    figures = f"({after:,} against {before:,} of {ensemble['n']:,})"
    if before == after:
        return f"as many top-1 errors as the generalist ({after:,} of {ensemble['n']:,})"
    if before == 0:
        return f"{after:,} top-1 errors where the generalist makes none"
    change = abs(before - after) / before
    return f"{percent(change, 1)} {'fewer' if after < before else 'more'} top-1 errors than the generalist {figures}"


def _where_better(row: dict, ensemble: dict) -> list[str]:
    where = []
    if errors(row) < errors(ensemble):
        where.append(f"top-1 ({errors(row):,} errors against {errors(ensemble):,})")
    if _below(row["nll"], ensemble["nll"]):
        where.append(f"NLL ({row['nll']:.4f} against {ensemble['nll']:.4f})")
    return where


def _below(a: float | None, b: float | None) -> bool:
    return a is not None and (b is None or a < b)


def _row(row: dict) -> dict:
    cost = row.get("cost") or {}
    further = {key: row[key] for key in FURTHER_KEYS if key in row}
    return {
        **{key: row.get(key) for key in ROW_KEYS},
        **further,
        "cost": {key: cost.get(key) for key in COST_KEYS},
    }


def _finite(value):
    """JSON has no NaN and no infinity: a figure that is not a number is absent."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def best_control_wall(run: RunDirectory) -> int | None:
    """The number of the wall control that counts as control_wall."""
    best = best_wall(run)
    return int(best.rpartition("-")[2]) if best else None
