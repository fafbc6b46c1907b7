"""The papers' own figures beside ours, of the data sets that there are here."""

from __future__ import annotations

import math

import pandas as pd

from iecl_solo.report.results import Results, text
from iecl_solo.report.section import Section, matches
from iecl_solo.report.statistics import summarize
from iecl_solo.report.tables import Cell, Table, number, plus_minus, title

PLACE = 100


def sections(results: Results) -> list[Section]:
    """A table of the published figures of the data sets that there are here."""
    there = {data for data, *_ in results.settings}
    entries = [e for e in results.meta.get("published") or [] if str(e.get("data")) in there]
    if not entries:
        return []
    rows = []
    for entry in entries:
        measure, arm = str(entry.get("measure")), str(entry.get("arm"))
        here = matches(results, entry)
        ours = summarize(results.values(measure, here[0], arm)) if len(here) == 1 else None
        words = plus_minus(measure, ours, results.seeds) if ours and ours.n else "not run here"
        axes = ", ".join(
            f"{results.axis_name(k) if k in results.axes else k} {text(v)}"
            for k, v in (entry.get("axes") or {}).items()
        )
        cells = [str(entry.get("data")), axes or "–", arm, title(measure)]
        value = number(measure, float(entry.get("value", math.nan)))
        cells += [words, f"{value} (theirs)", str(entry.get("source", ""))]
        rows.append([Cell(cell) for cell in cells])
    table = Table(
        "published",
        "The papers' figures beside ours",
        "Ours: mean ± standard deviation over seeds. Theirs: as published, from other code, "
        "hardware and, unless the source says so, a single seed; no test compares the two.",
        ["data", "setting", "arm", "measure", "ours", "published", "source"],
        rows,
        "hhhhrrl",
        pd.json_normalize(entries),
    )
    return [Section("published", "Beside the papers", PLACE, tables=[table])]
