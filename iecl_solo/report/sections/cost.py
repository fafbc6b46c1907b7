"""Time, memory, FLOPs and parameters, and whether the bars are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from iecl_solo.report.answer import BAR
from iecl_solo.report.results import Results, cost_rows
from iecl_solo.report.section import Section, expand, setting_cells
from iecl_solo.report.tables import COST, Cell, Table, is_cost, number, title

PLACE = 40


def sections(results: Results) -> list[Section]:
    """The cost table: at the top where cost is the question, folded where nothing was timed A/B."""
    rows = cost_rows(results)
    measures = [m for m in COST if any(math.isfinite(row.get(m, math.nan)) for row in rows)]
    if not measures:
        return []

    def entry(row: Mapping[str, Any], measure: str) -> list[Cell]:
        value = row[measure]
        words = number(measure, value)
        low, high = row["time_ratio_low"], row["time_ratio_high"]
        if measure == "time_ratio" and math.isfinite(low) and math.isfinite(high):
            words += f" [{low:.3f}, {high:.3f}]"
        if measure not in ("time_ratio", "memory_ratio"):
            return [Cell(words)]
        judged = math.isfinite(value) and results.against.get(row["arm"]) is not None
        return [Cell(words), Cell(("pass" if value <= BAR else "fail") if judged else "–")]

    head = [*results.setting_head, "arm", "device"]
    labels = len(head)
    for measure in measures:
        barred = measure in ("time_ratio", "memory_ratio")
        head += [title(measure), f"≤ {BAR}"] if barred else [title(measure)]
    entries = [
        [
            *setting_cells(results, row["setting"]),
            Cell(row["arm"]),
            Cell(row["device"]),
            *(cell for measure in measures for cell in entry(row, measure)),
        ]
        for row in rows
    ]
    caption = "Medians over runs."
    if "time_ratio" in measures:
        caption += (
            " Step time: median of paired A/B ratios in one process, [quartiles]. The bar is "
            f"{BAR} × the baseline, for time and for peak memory."
        )
    elif "seconds_per_step" in measures:
        caption += (
            " Times are of whole trainings, which may have shared the machine: they compare "
            "nothing; iecl-solo benchmark --config-name cost does."
        )
    table = Table(
        "cost",
        "Cost",
        caption,
        head,
        entries,
        "h" * labels + "r" * (len(head) - labels),
        expand(results, pd.DataFrame(rows)),
    )
    if "time_ratio" in measures or "memory_ratio" in measures:
        asked = results.primary is not None and is_cost(results.primary)
        return [Section("cost", "Cost", 0 if asked else PLACE, tables=[table])]
    folded = Section("cost-table", "What the runs' own clocks say", tables=[table])
    return [Section("cost", "Cost", PLACE, folded=[folded])]
