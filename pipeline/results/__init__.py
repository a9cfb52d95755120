"""results.json and the sentences that judge it.  No torch here.

Runs of specialists have "clusters" and "specialists".  Those of a deep ensemble have "sizes", a row
for its first 1, 2, ... M members.  The rest is the same.
"""

from .collecting import Evaluation, collect, read_evaluation, read_file
from .formats import count, duration, number, percent
from .rows import (
    AddedClasses,
    Clusters,
    Cost,
    Metrics,
    Results,
    Row,
    SizeRow,
    SpecialistMetrics,
    errors,
    named_rows,
    read_results,
    share_of_gain,
)
from .verdicts import classes_line, student_verdict, verdict, wins, worth

__all__ = [
    "AddedClasses",
    "Clusters",
    "Cost",
    "Evaluation",
    "Metrics",
    "Results",
    "Row",
    "SizeRow",
    "SpecialistMetrics",
    "classes_line",
    "collect",
    "count",
    "duration",
    "errors",
    "named_rows",
    "number",
    "read_results",
    "percent",
    "read_evaluation",
    "read_file",
    "share_of_gain",
    "student_verdict",
    "verdict",
    "wins",
    "worth",
]
