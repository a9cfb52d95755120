"""report.html: one self-contained file, for a reader who has nothing but this file.

No request: plots are inline SVG, pictures data: URIs. The one script sorts tables, and the
Content-Security-Policy names it by its hash and forbids the rest. Class names are anybody's text:
the template escapes everything that is not Markup, and only svg.py, plots.py and the script's file
are Markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tomli_w

from pipeline import results as metrics
from pipeline.advice.document import FILE, read_advice
from pipeline.graph import RunDirectory
from pipeline.store import write_json, write_text

from .advice import AdviceSection, advice_section
from .calibration import calibration_rows, reliability_panels
from .classes import CLASSES_FILE, CONFUSED_FILE, class_files, class_section
from .conditions import about_the_run, run_conditions, stage_times
from .curves import learning_curves
from .diversity import diversity_table, size_plot, size_rows
from .evidence import Evidence
from .examples import changed_examples, picture_rows
from .explanations import explanations, missing_rows
from .fitted import fitted
from .formatting import printable
from .frequency import frequency
from .groups import captured_confusion, group_cards
from .overview import (
    cost_plots,
    cost_rows,
    headline_tiles,
    measured_batches,
    metric_rows,
    softmax_note,
    students_in_the_head,
)
from .pictures import phrases, pictures, why_no_pictures
from .sections import shown
from .specialists import forecast_plot, specialist_rows
from .students import student_section
from .templates import script, template

if TYPE_CHECKING:
    from ..data.shards import ShardSet

FILES = ("results.json", "report.html", CLASSES_FILE, CONFUSED_FILE)


def write_report(
    run: RunDirectory,
    directory: Path,
    images: ShardSet | None = None,
    class_counts: Sequence[int] | np.ndarray | None = None,
) -> metrics.Results:
    """Write results.json, report.html and the files of FILES that the page links to.

    Parameters
    ----------
    run : RunDirectory
        A run whose stage `evaluate` is done.
    directory : Path
        Where the files are written.
    images : ShardSet, optional
        The test split, for its pictures. Without it the page has none.
    class_counts : sequence of int, optional
        [C], training examples of each class. By default the manifest beside the train shards says.
        Without one the test labels stand in.

    Returns
    -------
    Results
        The content of results.json.

    Raises
    ------
    UserError
        If the run is not evaluated yet.
    """
    results = metrics.collect(run)
    directory = Path(directory)
    write_json(directory / "results.json", results)
    evidence = Evidence(run, results, images, class_counts)
    for name, text in class_files(evidence).items():
        write_text(directory / name, text)
    write_text(directory / "report.html", _render(evidence))
    return results


def render(
    run: RunDirectory,
    results: metrics.Results,
    images: ShardSet | None = None,
    class_counts: Sequence[int] | np.ndarray | None = None,
) -> str:
    """The page as text. The parameters are those of `write_report`."""
    return _render(Evidence(run, results, images, class_counts))


def _render(evidence: Evidence) -> str:
    context = _head(evidence) | _sections(evidence) | _groups_and_examples(evidence)
    if evidence.has_specialists:
        context |= _sections_of_specialists(evidence)
    context["shown"] = shown(context)
    return printable(template("template.html.j2").render(context))


def _head(evidence: Evidence) -> dict[str, object]:
    results = evidence.results
    first, *sentences = metrics.verdict_sentences(results)
    students = students_in_the_head(results)
    paragraphs = [" ".join(sentences)]
    paragraphs += [metrics.student_verdict(results, name) or "" for name in students]
    paragraphs.append(metrics.classes_line(results) or "")
    return {
        "title": evidence.run.root.resolve().name,
        "about": about_the_run(evidence),
        "verdict": first,
        "tone": metrics.tone(results),
        "paragraphs": [paragraph for paragraph in paragraphs if paragraph],
        "missing": evidence.missing,
        "dropped": metrics.dropped_line(results),
        "missing_controls": missing_rows(evidence),
        "tiles": headline_tiles(results),
        "advice": _advice(evidence),
    }


def _advice(evidence: Evidence) -> AdviceSection | None:
    """What pilots advised before the run, and the gains that were measured."""
    advice = read_advice(evidence.run.root / FILE)
    return None if advice is None else advice_section(advice, evidence.results.get("advice"))


def _sections(evidence: Evidence) -> dict[str, object]:
    """The sections that every kind of run has."""
    run, results = evidence.run, evidence.results
    return {
        "results": results,
        "deep": not evidence.has_specialists,
        "script": script(),
        "names": evidence.names,
        "rows": metric_rows(evidence),
        "rows_explained": explanations(evidence),
        "students": student_section(evidence),
        "classes": class_section(evidence),
        "fitted": fitted(evidence),
        "cost_rows": cost_rows(evidence),
        "cpu_time": any(row["cost"].get("cpu_seconds") for row in evidence.rows.values()),
        "contended": evidence.is_contended,
        "batches": measured_batches(evidence.rows),
        "softmax_note": softmax_note(evidence),
        "cost_plots": cost_plots(evidence),
        "curves": learning_curves(run),
        "frequency": frequency(evidence),
        "calibration": calibration_rows(evidence),
        "reliability": reliability_panels(evidence),
        "diversity": diversity_table(evidence),
        "sizes": size_rows(results),
        "size_plot": size_plot(evidence),
        "conditions": run_conditions(evidence),
        "stages": stage_times(run),
        "config": tomli_w.dumps(run.config.dump()),
    }


def _groups_and_examples(evidence: Evidence) -> dict[str, object]:
    """The two sections with pictures, or texts, of test examples."""
    groups = None
    if evidence.has_specialists:
        groups = group_cards(evidence)
    examples = changed_examples(evidence)
    rows = picture_rows(groups, examples)
    images, ids = evidence.images, evidence.before.ids
    why_none = why_no_pictures(images)
    return {
        "groups": groups,
        "examples": examples,
        "why_no_pictures": why_none,
        "pictures": pictures(images, rows, ids),
        "phrases": phrases(images, rows, ids) if why_none else {},
    }


def _sections_of_specialists(evidence: Evidence) -> dict[str, object]:
    return {
        "captured": captured_confusion(evidence),
        "judged_on": evidence.judged_on,
        "specialists": specialist_rows(evidence),
        "forecast_plot": forecast_plot(evidence),
        "coverage": evidence.coverage,
    }
