"""What clustering finds, as lines of text for people."""

from collections.abc import Collection, Sequence

from .judging import GroupForecast


def forecast_table(
    rows: Sequence[GroupForecast], skipped: Collection[int] = (), most: int = 40
) -> list[str]:
    """A forecast as lines of text, the group most worth a job first.

    Parameters
    ----------
    rows : sequence of GroupForecast
        What `forecast` returned. Without labels the order is by "gain_unlabelled".
    skipped : collection of int
        Groups that get no specialist.
    most : int
        Groups with a line of their own. One more line sums up the rest.

    Returns
    -------
    list of str
        A header, then a line for each group.
    """
    gains = [_gain(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda group: -gains[group])
    lines = ["group  classes  examples  errors inside  gain at most  expected"]
    for group in order[:most]:
        line = _line(group, rows[group])
        if group in skipped:
            line += "  skipped"
        lines.append(line)
    rest = order[most:]
    if rest:
        best = max(gains[group] for group in rest)
        num_skipped = len(set(rest) & set(skipped))
        more = f"... and {len(rest):,} more of at most {best:.2%} each"
        lines.append(f"{more}, {num_skipped:,} of them skipped")
    return lines


def _gain(row: GroupForecast) -> float:
    if row["gain"] is None:
        return row["gain_unlabelled"]
    return row["gain"]


def _line(group: int, row: GroupForecast) -> str:
    examples = _text(row["examples"], ",")
    errors = _text(row["errors_inside"], ",")
    gain = _text(row["gain"], ".2%")
    return (
        f"{group:5d}  {row['classes']:7,}  {examples:>8}  {errors:>13}  "
        f"{gain:>12}  {row['gain_unlabelled']:>8.2%}"
    )


def _text(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return format(value, form)
