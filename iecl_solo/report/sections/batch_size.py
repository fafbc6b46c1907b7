"""The small-batch claim: a measure against the batch size, and what it does to the gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import pandas as pd

from iecl_solo.report import figures
from iecl_solo.report.figures import Line, picture
from iecl_solo.report.results import BATCH_SIZE, Results, groups, slopes, slug
from iecl_solo.report.section import Section, chunks, matches, seeds_line
from iecl_solo.report.statistics import Difference, caution, corrected
from iecl_solo.report.tables import (
    Cell,
    Table,
    difference_unit,
    heading,
    interval,
    name,
    number,
    p_value,
    title,
)

PLACE = 20


def sections(results: Results) -> list[Section]:
    """The first measure against the batch size, where that is an axis of the grid."""
    measure = results.tested
    if BATCH_SIZE not in results.axes or measure is None:
        return []
    found = {k: v for k, v in groups(results, BATCH_SIZE).items() if len(v) > 1}
    pictures = []
    for rest, values in found.items():
        for j, arms in enumerate(chunks(results, results.arms)):
            lines = [
                seeds_line(
                    results, measure, arm, results.looks[arm], [(x, i, arm) for x, i in values]
                )
                for arm in arms
            ]
            lines = [line for line in lines if line.x]
            theirs = [
                line
                for arm in arms
                if (line := _published_line(results, measure, arm, [i for _, i in values]))
            ]
            if not any(len(line.x) > 1 for line in lines):
                continue
            ticks = sorted({x for line in (*lines, *theirs) for x in line.x})
            caption = "Mean over seeds with its 95 % t interval."
            if theirs:
                caption += " Hollow and dotted: published figures, not ours."
            pictures.append(
                picture(
                    f"batch-size-{slug('-'.join(rest))}-{j}",
                    heading(f"{name(measure)} against batch size, {', '.join(rest)}"),
                    caption,
                    partial(
                        figures.bars,
                        lines=lines,
                        ticks=ticks,
                        x="batch size",
                        y=title(measure),
                        theirs=theirs,
                    ),
                )
            )
    if not pictures:
        return []
    trend = trend_table(results, measure, found)
    tables = [trend] if trend else []
    return [Section("batch-size", "Against the batch size", PLACE, (), tables, pictures)]


def trend_table(
    results: Results, measure: str, settings: Mapping[tuple[str, ...], list[tuple[float, int]]]
) -> Table | None:
    """Whether the difference changes with the batch size: per seed its slope, then t over seeds."""
    found: list[tuple[tuple[str, ...], str, Difference]] = []
    for rest, values in settings.items():
        for (arm, other), slope in slopes(results, measure, {rest: values}).items():
            found.append((rest, f"{arm} − {other}", slope))
    if not found:
        return None
    p_values = corrected([difference for *_, difference in found])
    rows, data = [], []
    where = ["data", *(results.axis_name(axis) for axis in results.axes if axis != BATCH_SIZE)]
    for (rest, comparison, difference), p in zip(found, p_values, strict=True):
        why = caution(difference, p, f"{difference_unit(measure)} per doubling".lstrip())
        rows.append(
            [
                *map(Cell, rest),
                Cell(comparison),
                Cell(str(difference.n)),
                Cell(number(measure, difference.mean, difference.sd, sign=True), bold=not why),
                Cell(interval(measure, difference, sign=True)),
                Cell(p_value(difference.p)),
                Cell(p_value(p)),
                Cell(why or ("rises" if difference.mean > 0 else "falls")),
            ]
        )
        data.append(
            dict(zip(where, rest, strict=True))
            | {"comparison": comparison}
            | vars(difference)
            | {"p_holm": p, "caution": why}
        )
    head = [*where, "comparison", "n", "change per doubling", "95 % interval", "p", "p (Holm)"]
    return Table(
        "batch-size-trend",
        "Does the difference change with the batch size?",
        "Per seed the slope of the paired difference over log2 of the batch size, then mean and "
        "95 % t interval over seeds. Below 0: the gain is larger where the batch is small.",
        [*head, "verdict"],
        rows,
        "h" * (len(where) + 1) + "rrrrrl",
        pd.DataFrame(data),
    )


def _published_line(
    results: Results, measure: str, arm: str, settings: Sequence[int]
) -> Line | None:
    points = sorted(
        (float(entry["axes"][BATCH_SIZE]), float(entry["value"]))
        for entry in results.meta.get("published") or []
        if (entry.get("arm"), entry.get("measure")) == (arm, measure)
        and BATCH_SIZE in (entry.get("axes") or {})
        and set(matches(results, entry)) & set(settings)
    )
    if not points:
        return None
    x, y = ([p[i] for p in points] for i in range(2))
    return Line(f"{arm}, published", results.looks[arm], x, y, y, y)
