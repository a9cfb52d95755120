"""results.json and the sentences that judge it.  No torch here.

Runs of specialists have "clusters" and "specialists".  Those of a deep ensemble have "sizes", a row
for its first 1, 2, ... M members.  The rest is the same.
"""

from .collecting import Evaluation, collect, read_evaluation, read_file
from .formats import count, duration, milliseconds, number, percent
from .rows import (
    AddedClasses,
    Clusters,
    Cost,
    Metrics,
    MissingControls,
    Paired,
    Results,
    Row,
    SizeRow,
    SpecialistMetrics,
    compare_paired,
    errors,
    is_of_another_size,
    named_rows,
    read_results,
    share_kept,
    share_of_gain,
)
from .verdicts import (
    classes_line,
    dropped_line,
    missing_line,
    student_verdict,
    verdict,
    verdict_sentences,
    wins,
    worth,
)

__all__ = [
    "AddedClasses",
    "Clusters",
    "Cost",
    "Evaluation",
    "Metrics",
    "MissingControls",
    "Paired",
    "Results",
    "Row",
    "SizeRow",
    "SpecialistMetrics",
    "classes_line",
    "collect",
    "compare_paired",
    "dropped_line",
    "is_of_another_size",
    "milliseconds",
    "missing_line",
    "count",
    "duration",
    "errors",
    "named_rows",
    "number",
    "read_results",
    "percent",
    "read_evaluation",
    "read_file",
    "share_kept",
    "share_of_gain",
    "student_verdict",
    "verdict",
    "verdict_sentences",
    "wins",
    "worth",
]
