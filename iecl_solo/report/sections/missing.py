"""What is not there: failed, unfinished and not started runs, and values that are none."""

from __future__ import annotations

import numpy as np
import pandas as pd

from iecl_solo.report.results import Results, records
from iecl_solo.report.section import Section, setting_cells
from iecl_solo.report.tables import Cell, Table

PLACE = 120


def sections(results: Results) -> list[Section]:
    """A table of what counts nowhere else in the report, with the reason."""
    cells = results.cells
    bad = results.runs[~np.isfinite(results.runs["value"])]
    undone = cells[cells["status"] != "done"]
    if undone.empty and bad.empty and not results.missing:
        return []
    rows = []
    for row in records(undone):
        error = str(row["error"] or "").strip()
        words = error.splitlines()[-1] if error else ""
        status = "failed" if row["status"] == "failed" else "running or interrupted"
        identity = [Cell(row["arm"]), Cell(str(row["seed"]))]
        rows.append([*setting_cells(results, row["setting"]), *identity, Cell(status), Cell(words)])
    for cell in results.missing:
        blank = [Cell("–")] * (len(results.setting_head) + 2)
        rows.append([*blank, Cell("not started"), Cell(cell)])
    for (i, arm, seed), group in bad.groupby(["setting", "arm", "seed"]):
        words = "no finite value: " + ", ".join(group["measure"])
        identity = [Cell(arm), Cell(str(seed)), Cell("done"), Cell(words)]
        rows.append([*setting_cells(results, i), *identity])
    head = [*results.setting_head, "arm", "seed", "state", "note"]
    table = Table(
        "missing",
        "What is missing",
        "Runs and values that count nowhere above. The command below runs them again.",
        head,
        rows,
        "h" * (len(head) - 2) + "ll",
        pd.DataFrame([[cell.text for cell in row] for row in rows], columns=head),
    )
    return [Section("missing", "What is missing", PLACE, tables=[table])]
