"""The sentences that judge a run: what the ensemble, a student and new classes are worth.

A difference whose paired 95 % interval holds zero is "no measurable difference".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from ..choices import CONTROL_ROWS
from ..controls import COMPUTE, WALL, twin_name
from .formats import ABSENT, number, percent
from .rows import (
    AddedClasses,
    MetricName,
    Metrics,
    Results,
    Row,
    compare_paired,
    difference_to,
    errors,
    is_of_another_size,
    named_rows,
    share_kept,
)

NAMES: dict[MetricName, str] = {"top1": "top-1", "nll": "NLL", "cnll": "calibrated NLL"}
JUDGED: tuple[MetricName, ...] = ("top1", "nll")  # what a verdict is about
LARGER = 1.05  # a control that multiplies more than so many times as much is no rival


def rivals(results: Results) -> dict[str, Row]:
    """The controls that the ensemble has to beat: those that multiply no more than it does."""
    most = results["ensemble"].get("multiplications")
    return {
        name: row
        for name, row in results["controls"].items()
        if not most or row.get("multiplications", 0) <= LARGER * most
    }


def wins(results: Results) -> bool:
    """Has the ensemble measurably fewer errors and a lower NLL than generalist and controls?"""
    ensemble, generalist = results["ensemble"], results["generalist"]
    return all(
        compare_paired(ensemble, "generalist", generalist, metric) > 0
        and all(
            compare_paired(row, "ensemble", ensemble, metric) < 0
            for row in rivals(results).values()
        )
        for metric in JUDGED
    )


def tone(results: Results) -> Literal["wins", "beaten", "open"]:
    """Whether the verdict is good news, bad news, or that nothing was measured."""
    if wins(results):
        return "wins"
    ensemble, generalist = results["ensemble"], results["generalist"]
    if _beaten_by(results) or compare_paired(ensemble, "generalist", generalist, "top1") < 0:
        return "beaten"
    return "open"


def verdict(results: Results) -> str:
    """One line: is the ensemble better than the generalist and every control?

    Controls that beat it come first.
    """
    return " ".join(verdict_sentences(results))


def verdict_sentences(results: Results) -> list[str]:
    """`verdict` sentence by sentence. The first one is a headline: it is two lines at most."""
    sizes = results.get("sizes")
    subject = f"The ensemble of {len(sizes)}" if sizes else "The ensemble"
    sentence = f"{subject} makes {_versus_generalist(results)}"
    beaten_by = _beaten_by(results)
    if beaten_by:
        return [*beaten_by, f"{sentence}."]
    if rivals(results):
        return [f"{sentence}.", *_versus_controls(results)]
    if sizes:  # more of the same: there is no doubt where its gain comes from
        return [f"{sentence}."]
    generalist = results["generalist"]
    if compare_paired(results["ensemble"], "generalist", generalist, "top1") == 0:
        return [f"{sentence}; no control was trained."]
    return [f"{sentence}; no control was trained, so nothing says where the difference comes from."]


def _beaten_by(results: Results) -> list[str]:
    """Sentences on the controls that are better in something. Empty if none is.

    The control with the fewest errors has its figures first. Then the others are named, and at
    last it is said what the first one is.
    """
    ensemble = results["ensemble"]
    better = {name: _better_in(row, ensemble) for name, row in rivals(results).items()}
    better = {name: metrics for name, metrics in better.items() if metrics}
    if not better:
        return []
    best = min(better, key=lambda name: errors(results["controls"][name]))
    sentences = [_beats(best, better.pop(best), results)]
    if better:
        sentences.append(_also_beat(better))
    what = what_it_is(best, results["students"])
    if what:
        sentences.append(f"{best} is {what}.")
    return sentences


# What a control is that the names of students and pipeline.choices.CONTROL_ROWS do not say.
TRAINED_ON = {
    WALL: "the generalist, trained on for as long as one specialist",
    COMPUTE: "the generalist, trained on with up to as many examples as all specialists saw",
}


def what_it_is(control: str, students: Iterable[str]) -> str:
    """What a control is, in a few words. "" where nothing says.

    students: names of the run's students.
    """
    for student in students:
        if control == twin_name(student):
            return f"the network of student {student}, taught by labels alone"
    if control in CONTROL_ROWS:
        return CONTROL_ROWS[control].what
    return TRAINED_ON.get(control, "")


def _also_beat(better: dict[str, list[MetricName]]) -> str:
    """So do a and b in top-1 and NLL, and c in NLL."""
    groups: dict[str, list[str]] = {}
    for name, metrics in better.items():
        groups.setdefault(" and ".join(NAMES[each] for each in metrics), []).append(name)
    clauses = [f"{_listed(names)} in {metrics}" for metrics, names in groups.items()]
    verb = "does" if len(better) == 1 else "do"
    return f"So {verb} {', and '.join(clauses)}."


def _better_in(row: Row, ensemble: Row) -> list[MetricName]:
    """The metrics in which a row is measurably better than the ensemble."""
    return [each for each in JUDGED if compare_paired(row, "ensemble", ensemble, each) > 0]


def _beats(name: str, metrics: Sequence[MetricName], results: Results) -> str:
    row, ensemble = results["controls"][name], results["ensemble"]
    figures = {
        "top1": f"{errors(row):,} top-1 errors against {errors(ensemble):,}",
        "nll": f"an NLL of {number(row['nll'])} against {number(ensemble['nll'])}",
    }
    return f"{name} beats the ensemble on test: {', '.join(figures[each] for each in metrics)}."


def _versus_generalist(results: Results) -> str:
    ensemble, generalist = results["ensemble"], results["generalist"]
    n = ensemble["n"]
    before, after = errors(generalist), errors(ensemble)
    if before == after:
        return f"as many top-1 errors as the generalist ({after:,} of {n:,} test examples)"
    if compare_paired(ensemble, "generalist", generalist, "top1") == 0:
        return (
            f"about as many top-1 errors as the generalist: no measurable difference on {n:,} test "
            f"examples ({after:,} against {before:,})"
        )
    if before == 0:
        return f"{after:,} top-1 errors on {n:,} test examples where the generalist makes none"
    change = percent(abs(before - after) / before, 1)
    direction = "fewer" if after < before else "more"
    counts = f"{after:,} against {before:,} of {n:,} test examples"
    counts += _interval_of_errors(ensemble, before)
    return f"{change} {direction} top-1 errors than the generalist ({counts})"


def _interval_of_errors(ensemble: Row, before: int) -> str:
    """The 95 % interval of the share of errors that are gone. Empty where it is not known."""
    difference = difference_to(ensemble, "generalist", "top1")
    if difference is None:
        return ""
    least, most = abs(difference.value) - difference.half, abs(difference.value) + difference.half
    share = 100 * ensemble["n"] / before
    return f"; 95 % interval {least * share:.1f} to {most * share:.1f} %"


def _versus_controls(results: Results) -> list[str]:
    """Sentences on an ensemble that no control beats."""
    ensemble, generalist = results["ensemble"], results["generalist"]
    controls = rivals(results)
    ties = [name for name, row in controls.items() if errors(row) == errors(ensemble)]
    undecided = [
        name
        for name, row in controls.items()
        if compare_paired(row, "ensemble", ensemble, "top1") == 0 and name not in ties
    ]
    beaten = [name for name in controls if name not in undecided]
    clauses = []
    if ties:
        clauses.append(f"makes as many as {_listed(ties)}")
    elif not undecided:
        clauses.append("makes fewer than every control")
    elif beaten:
        clauses.append(f"makes fewer than {_listed(beaten)}")
    lower = [compare_paired(row, "ensemble", ensemble, "nll") < 0 for row in controls.values()]
    if all(lower) and compare_paired(ensemble, "generalist", generalist, "nll") > 0:
        clauses.append("has the lowest NLL of them all")
    sentences = [f"It {' and '.join(clauses)}."] if clauses else []
    if undecided:
        sentences.append(
            f"Against {_listed(undecided)} there is no measurable difference in top-1."
        )
    return sentences


def _listed(names: Sequence[str]) -> str:
    """a, b and c"""
    if len(names) == 1:
        return names[0]
    return f"{', '.join(names[:-1])} and {names[-1]}"


# Students


def student_verdict(results: Results, name: str = "main") -> str | None:
    """What a student keeps of the ensemble's gain, how it stands against its twin, and its worth.

    One line.  None if there is no such student.
    """
    student = results["students"].get(name)
    if student is None:
        return None
    line = _gain_kept(name, student, results)
    line += _versus_twin(name, student, results)
    return f"{line}{_worth_in_networks(student, results)}."


def _gain_kept(name: str, student: Row, results: Results) -> str:
    ensemble, generalist = results["ensemble"], results["generalist"]
    top1 = f"{percent(student['top1'])} top-1 on test"
    if is_of_another_size(student, generalist):
        return f"The student {name}, {_size(student, generalist)}, reaches {top1}"
    if compare_paired(ensemble, "generalist", generalist, "top1") <= 0:
        return f"The student {name} reaches {top1}; there is no gain of the ensemble to keep"
    against_generalist = compare_paired(student, "generalist", generalist, "top1")
    subject = f"The student {name}, one network,"
    if against_generalist < 0:
        return f"{subject} keeps none of the ensemble's gain: it falls below the generalist"
    if against_generalist == 0:
        return (
            f"{subject} keeps none of the ensemble's gain: "
            "no measurable difference to the generalist in top-1 on "
            f"{student['n']:,} test examples"
        )
    if compare_paired(student, "ensemble", ensemble, "top1") > 0:
        return (
            f"{subject} keeps all of the ensemble's gain in top-1 on test, and makes fewer errors "
            "still"
        )
    share = share_kept(student, results)
    assert share is not None
    if share == 1:
        return f"{subject} keeps all of the ensemble's gain in top-1 on test"
    return f"{subject} keeps {percent(share, 0)} of the ensemble's gain in top-1 on test"


def _size(row: Row, generalist: Row) -> str:
    """How much larger a network is than the generalist."""
    whose = {"parameters": "the generalist's parameters", "multiplications": "its multiplications"}
    factors = [
        f"{row[key] / generalist[key]:.1f} times {words}"
        for key, words in whose.items()
        if row.get(key) and generalist.get(key)
    ]
    return f"a network of {' and '.join(factors)}"


def _versus_twin(name: str, student: Row, results: Results) -> str:
    """How it stands against the network that learned from labels alone."""
    twin_called = twin_name(name)
    twin = results["controls"].get(twin_called) or results["students"].get(twin_called)
    if twin is None:
        return ""
    metric: MetricName = "nll"
    if student.get("cnll") is not None and twin.get("cnll") is not None:
        metric = "cnll"
    value, others = student.get(metric), twin.get(metric)
    if value is None or others is None:
        return ""
    relation = _relation_to_twin(student, twin_called, twin, metric)
    return (
        f". Its {NAMES[metric]} of {value:.3f} {relation} the {others:.3f} of its twin, which "
        f"learned from labels alone, {_top1_against(student, twin_called, twin)}"
    )


def _relation_to_twin(student: Row, twin_called: str, twin: Row, metric: MetricName) -> str:
    is_paired = "nll" in student.get("versus", {}).get(twin_called, {})
    if is_paired and difference_to(student, twin_called, metric) is None:
        # An earlier version kept no calibrated predictions: nothing says whether they differ.
        return "stands beside"
    relation = compare_paired(student, twin_called, twin, metric)
    if relation == 0:
        return "is not measurably different from"
    return "is below" if relation > 0 else "is above"


def _top1_against(student: Row, twin_called: str, twin: Row) -> str:
    relation = compare_paired(student, twin_called, twin, "top1")
    if relation == 0:
        n = student["n"]
        return f"and there is no measurable difference in top-1 on {n:,} test examples"
    points = 100 * abs(student["top1"] - twin["top1"])
    direction = "above" if relation > 0 else "below"
    return f"and its top-1 is {points:.2f} points {direction} the twin's"


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
    """One line on how the old and the new classes fare. None of a run that adds none."""
    added = results.get("added")
    if added is None:
        return None
    clauses = [_age_clause("old", results, added), _age_clause("new", results, added)]
    return f"Top-1 of {'; '.join(clause for clause in clauses if clause)}."


def _age_clause(age: str, results: Results, added: AddedClasses) -> str:
    """Of the "old" or the "new" classes. Empty without a test example of them."""
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


# What is not there


def missing_line(results: Results, run: str = "RUN") -> str | None:
    """The rivals that were not made, and the line that makes them. None where none is missing.

    run: the run's directory, as the line is to name it.
    """
    missing = results.get("missing_controls")
    if not missing:
        return None
    command = missing["command"].replace("--run RUN", f"--run {run}", 1)
    return f"not trained: {_listed(missing['names'])}; this trains them: {command}"


def dropped_line(results: Results) -> str | None:
    """The specialists that stay out of the ensemble. None where all are in it."""
    dropped = results.get("dropped")
    if not dropped:
        return None
    listed = _listed([str(index) for index in dropped])
    plural = "s" if len(dropped) > 1 else ""
    verb = "were" if len(dropped) > 1 else "was"
    return (
        f"Specialist{plural} {listed} {verb} never better on val than the generalist: the ensemble "
        f"goes without {'them' if plural else 'it'}."
    )
