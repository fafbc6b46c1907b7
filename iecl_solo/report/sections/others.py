"""Measures that the benchmark does not ask for, in one folded table."""

from __future__ import annotations

from iecl_solo.report.results import Results, count
from iecl_solo.report.section import Section, expand, setting_cells
from iecl_solo.report.statistics import summarize, summary_table
from iecl_solo.report.tables import Cell, Table, is_cost, plus_minus, title

PLACE = 110


def sections(results: Results) -> list[Section]:
    """A folded table of all other measures, without tests."""
    there = sorted(set(results.runs["measure"]) - set(results.measures))
    there = [m for m in there if not is_cost(m)]
    if not there:
        return []
    rows = []
    frame = results.runs[results.runs["measure"].isin(there)]
    n = int(frame.groupby(["measure", "setting", "arm"])["seed"].nunique().max())
    for i in range(len(results.settings)):
        for arm in results.arms:
            found = [summarize(results.values(m, i, arm)) for m in there]
            if any(summary.n for summary in found):
                entries = [
                    Cell(plus_minus(m, s, n) if s.n else "–")
                    for m, s in zip(there, found, strict=True)
                ]
                rows.append([*setting_cells(results, i), Cell(arm), *entries])
    if not rows:
        return []
    labels = [*results.setting_head, "arm"]
    table = Table(
        "other-measures",
        "Other measures",
        f"Mean ± standard deviation over {count(n, 'seed')}; nothing is tested here.",
        [*labels, *map(title, there)],
        rows,
        "h" * len(labels) + "r" * len(there),
        expand(results, summary_table(frame, ["measure", "setting"])),
    )
    folded = Section("others-table", "What the benchmark does not ask about", tables=[table])
    return [Section("others", "Other measures", PLACE, folded=[folded])]
