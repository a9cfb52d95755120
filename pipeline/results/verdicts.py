"""The sentences that judge a run: what the ensemble, a student and new classes are worth."""

from __future__ import annotations

from .formats import ABSENT, percent
from .rows import AddedClasses, Metrics, Results, Row, errors, named_rows, share_of_gain


def wins(results: Results) -> bool:
    """Has the ensemble fewer errors and a lower NLL than the generalist and every control?"""
    ensemble = results["ensemble"]
    rivals = [results["generalist"], *results["controls"].values()]
    return all(
        errors(ensemble) < errors(row) and _below(ensemble["nll"], row["nll"]) for row in rivals
    )


def verdict(results: Results) -> str:
    """One line: is the ensemble better than the generalist and every control?

    A control that beats it comes first.
    """
    controls = results["controls"]
    sizes = results.get("sizes")
    subject = f"The ensemble of {len(sizes)}" if sizes else "The ensemble"
    sentence = f"{subject} makes {_versus_generalist(results)}"
    beaten_by = _beaten_by(results)
    if beaten_by:
        return f"{beaten_by}. {sentence}."
    if controls:
        return f"{sentence}, {_versus_controls(results)}."
    if sizes:  # more of the same: there is no doubt where its gain comes from
        return f"{sentence}."
    return f"{sentence}; no control was trained, so nothing says where the difference comes from."


def _beaten_by(results: Results) -> str:
    """Each control that is better in something; empty if none is."""
    clauses = []
    for name, row in results["controls"].items():
        better_in = _better_in(row, results["ensemble"])
        if better_in:
            clauses.append(f"{name} beats the ensemble in {' and '.join(better_in)}")
    return "; ".join(clauses)


def _better_in(row: Row, ensemble: Row) -> list[str]:
    """The metrics in which a row is better than the ensemble."""
    metrics = []
    if errors(row) < errors(ensemble):
        metrics.append(f"top-1 ({errors(row):,} errors against {errors(ensemble):,})")
    if _below(row["nll"], ensemble["nll"]):
        metrics.append(f"NLL ({row['nll']:.4f} against {ensemble['nll']:.4f})")
    return metrics


def _versus_generalist(results: Results) -> str:
    n = results["ensemble"]["n"]
    before, after = errors(results["generalist"]), errors(results["ensemble"])
    if before == after:
        return f"as many top-1 errors as the generalist ({after:,} of {n:,})"
    if before == 0:
        return f"{after:,} top-1 errors where the generalist makes none"
    change = percent(abs(before - after) / before, 1)
    direction = "fewer" if after < before else "more"
    counts = f"({after:,} against {before:,} of {n:,})"
    return f"{change} {direction} top-1 errors than the generalist {counts}"


def _versus_controls(results: Results) -> str:
    """Of an ensemble that no control beats."""
    ensemble, generalist, controls = results["ensemble"], results["generalist"], results["controls"]
    clause = "fewer than every control"
    ties = [name for name, row in controls.items() if errors(row) == errors(ensemble)]
    if ties:
        clause = f"as many as {' and '.join(ties)}"
    if all(_below(ensemble["nll"], row["nll"]) for row in (generalist, *controls.values())):
        clause += ", with the lowest NLL of them all"
    return clause


def _below(a: float | None, b: float | None) -> bool:
    return a is not None and (b is None or a < b)


# Students


def student_verdict(results: Results, name: str = "main") -> str | None:
    """What a student keeps of the ensemble's gain, how it stands against its twin, and its worth.

    One line.  None if there is no such student.
    """
    student = results["students"].get(name)
    if student is None:
        return None
    line = _gain_kept(name, student, results)
    if name == "main":
        line += _versus_twin(student, results["controls"].get("student_hard"))
    return f"{line}{_worth_in_networks(student, results)}."


def _gain_kept(name: str, student: Row, results: Results) -> str:
    kept = share_of_gain(student, results)
    if kept is None:
        top1 = percent(student["top1"])
        return f"The student {name} reaches {top1} top-1; there is no gain of the ensemble to keep"
    if kept < 0:
        return (
            f"The student {name}, one network, keeps none of the ensemble's gain: "
            "it falls below the generalist"
        )
    return (
        f"The student {name}, one network, keeps {percent(kept, 0)} of the ensemble's gain in top-1"
    )


def _versus_twin(student: Row, twin: Row | None) -> str:
    if twin is None or twin["nll"] is None or student["nll"] is None:
        return ""
    relation = "below" if student["nll"] < twin["nll"] else "not below"
    return (
        f"; its NLL, {student['nll']:.3f}, is {relation} the {twin['nll']:.3f} "
        "of its twin on hard labels"
    )


def _worth_in_networks(student: Row, results: Results) -> str:
    dee = student.get("dee")
    if student.get("dee_beyond") or (dee is not None and dee > 1):
        networks = worth(student, results)
        return f". By calibrated NLL it is worth {networks} networks of a deep ensemble"
    if dee is None:
        return ""
    # 1 is a single network, or worse.
    return ". By calibrated NLL it is worth no more than one network of the ensemble"


def worth(row: Row, results: Results) -> str:
    """A row's deep ensemble equivalent as text: 2.74, or `>4` beyond the largest ensemble."""
    if row.get("dee_beyond"):
        return f">{len(results.get('sizes') or [])}"
    dee = row.get("dee")
    if dee is None:
        return ABSENT
    return f"{dee:.2f}"


# A run that adds classes


def classes_line(results: Results) -> str | None:
    """One line on how the old and the new classes fare; None of a run that adds none."""
    added = results.get("added")
    if added is None:
        return None
    clauses = [_age_clause("old", results, added), _age_clause("new", results, added)]
    return f"Top-1 of {'; '.join(clause for clause in clauses if clause)}."


def _age_clause(age: str, results: Results, added: AddedClasses) -> str:
    """Of the "old" or the "new" classes; empty without a test example of them."""
    rows: dict[str, Metrics] = {}
    for name, row in named_rows(results).items():
        of_age = row.get(f"{age}_classes")
        if of_age and name not in results["controls"]:
            rows[name] = of_age
    if not rows:
        return ""
    clause = ", ".join(f"{name} {percent(row['top1'])}" for name, row in rows.items())
    if age == "old" and "top1_before" in added:
        before = percent(added["top1_before"])
        clause += f" (before the new ones came the generalist had {before})"
    count = added["old"] if age == "old" else added["new"]
    return f"{count:,} {age} classes ({rows['generalist']['n']:,} test examples): {clause}"
