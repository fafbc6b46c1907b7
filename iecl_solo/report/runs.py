"""What every run was: the settings they share, those they do not, and each one's own."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from iecl_solo.report.results import Results, listed, records, text
from iecl_solo.report.tables import Cell, Table
from iecl_solo.solo.config import flatten


@dataclass(frozen=True)
class RunNote:
    """One run, for the page's list of runs."""

    title: str
    facts: dict[str, str]
    config: str


def shared(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The entries that all blocks have in common."""
    if not blocks:
        return {}
    first = blocks[0]
    return {k: v for k, v in first.items() if all(k in b and b[k] == v for b in blocks[1:])}


def configuration_table(results: Results) -> tuple[dict[str, str], Table | None]:
    """What all runs share, and by arm what they do not.

    Returns:
        Shared settings by dotted key; a table of the others (None if there are none).
    """
    cells = results.configured
    flat = [flatten(config) for config in cells["config"]]
    common = shared(flat)
    keys = sorted({key for block in flat for key in block} - {*common, "name"})
    arms = [arm for arm in results.arms if arm in set(cells["arm"])]
    rows = []
    for key in keys:
        entries = []
        for arm in arms:
            own = [b for b, a in zip(flat, cells["arm"], strict=True) if a == arm]
            values = dict.fromkeys(text(b.get(key)) for b in own)
            entries.append(listed([v if len(v) < 60 else f"…{v[-58:]}" for v in values], most=5))
        if set(entries) != {"–"}:  # null here and absent there
            rows.append([Cell(key), *map(Cell, entries)])
    words = {key: text(value) for key, value in common.items()}
    if not rows:
        return words, None
    table = Table(
        "configurations",
        "What differs between runs",
        "Every setting that not all runs share, with all values that it takes in an arm.",
        ["setting", *arms],
        rows,
        "h" + "l" * len(arms),
        pd.DataFrame([[c.text for c in row] for row in rows], columns=["setting", *arms]),
    )
    return words, table


def run_notes(results: Results) -> list[RunNote]:
    """Each run's state, command, versions and whole configuration."""
    notes = []
    common = shared([v for v in results.cells["versions"] if isinstance(v, dict)])
    for row in records(results.cells):
        facts = {"state": row["status"], "device": row["device"], "command": row["command"]}
        if isinstance(row["seconds"], float) and math.isfinite(row["seconds"]):
            facts["seconds"] = f"{row['seconds']:.1f}"
        versions = row["versions"] if isinstance(row["versions"], dict) else {}
        own = {k: v for k, v in versions.items() if k not in common}
        facts["other versions"] = ", ".join(f"{k} {text(v)}" for k, v in own.items())
        facts["error"] = row["error"]
        notes.append(
            RunNote(
                f"{row['arm']}, {results.setting_text(row['setting'])}, seed {row['seed']}",
                {k: str(v) for k, v in facts.items() if v and not pd.isna(v)},
                json.dumps(row["config"], indent=2) if isinstance(row["config"], dict) else "",
            )
        )
    return notes
