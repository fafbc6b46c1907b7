"""All measures of one setting in one table, before each has its own."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from iecl_solo.report.results import Results, count, records
from iecl_solo.report.section import MANY, Section
from iecl_solo.report.statistics import difference_of, summarize, summary_table
from iecl_solo.report.tables import Cell, Table, interval, is_cost, number, title

PLACE = 5


def overview_table(results: Results, measures: Sequence[str]) -> Table:
    """Measures down; each arm's mean and 95 % t interval, and the paired differences, across."""
    pairs: dict[tuple[str, str], dict[str, Cell]] = {}
    for measure in measures:
        for row in records(results.differences[measure]):
            difference = difference_of(row)
            mean = number(measure, difference.mean, difference.sd, sign=True)
            ends = interval(measure, difference, sign=True)
            entry = Cell(_with(mean, ends), bold=not row["caution"])
            pairs.setdefault((row["arm"], row["against"]), {})[measure] = entry
    rows: list[list[Cell]] = []
    for measure in measures:
        entries = [Cell(title(measure))]
        for arm in results.arms:
            one = summarize(results.values(measure, 0, arm))
            mean = number(measure, one.mean, one.sd) if one.n else "–"
            entries.append(Cell(_with(mean, interval(measure, one))))
        entries += [found.get(measure, Cell("–")) for found in pairs.values()]
        rows.append(entries)
    names = [f"{arm} − {against}" for arm, against in pairs]
    frames = [summary_table(results.of(m), ["setting"]).assign(measure=m) for m in measures]
    seeds = count(results.seeds, "seed")
    return Table(
        "overview",
        "All measures",
        f"Mean and 95 % t interval over {seeds}; differences are paired by seed. Bold: a "
        "difference that is significant, corrected within its measure. Each measure's own table "
        "is below.",
        ["measure", *results.arms, *names],
        rows,
        "h" + "r" * (len(results.arms) + len(names)),
        pd.concat(frames).drop(columns="setting"),
    )


def _with(mean: str, ends: str) -> str:
    return mean if ends == "–" else f"{mean} [{ends}]"


def sections(results: Results) -> list[Section]:
    """The table, where one can hold it and the seeds say something of the spread."""
    measures = [m for m in results.measures if not is_cost(m)]
    fits = len(results.settings) == 1 and len(measures) > 1 and len(results.arms) <= MANY
    if not fits or results.seeds < 2:
        return []
    return [Section("overview", "All measures", PLACE, tables=[overview_table(results, measures)])]
