"""What a benchmark's rows say, as one page: the answer first, then all that it rests on."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from iecl_solo.experiments.store import Store
from iecl_solo.report.answer import BAR, answer, state
from iecl_solo.report.comparisons import (
    Section,
    batch_section,
    expand,
    matches,
    measure_section,
    sensitivity_section,
    setting_cells,
)
from iecl_solo.report.curves import curves_section, entropy_section
from iecl_solo.report.results import (
    Results,
    cost_rows,
    count,
    listed,
    read,
    records,
    text,
)
from iecl_solo.report.statistics import summarize, summary_table
from iecl_solo.report.tables import (
    COST,
    Cell,
    Table,
    escape_markdown,
    is_cost,
    latex,
    number,
    plus_minus,
    title,
)
from iecl_solo.solo.config import flatten
from iecl_solo.version import __version__


def cost_section(results: Results) -> Section | None:
    """Time, memory, FLOPs and parameters, and whether the bars are kept."""
    rows = cost_rows(results)
    measures = [m for m in COST if any(math.isfinite(row.get(m, math.nan)) for row in rows)]
    if not measures:
        return None

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
        return Section("cost", "Cost", tables=[table])
    folded = Section("cost-table", "What the runs' own clocks say", tables=[table])
    return Section("cost", "Cost", folded=[folded])


# Others' figures, and everything else


def published_section(results: Results) -> Section | None:
    """The papers' own figures beside ours, of the data sets that there are here."""
    there = {data for data, *_ in results.settings}
    entries = [e for e in results.meta.get("published") or [] if str(e.get("data")) in there]
    if not entries:
        return None
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
    return Section("published", "Beside the papers", tables=[table])


def others_section(results: Results) -> Section | None:
    """Measures that the benchmark does not ask for, in one folded table."""
    there = sorted(set(results.runs["measure"]) - set(results.measures))
    there = [m for m in there if not is_cost(m)]
    if not there:
        return None
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
        return None
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
    return Section("others", "Other measures", folded=[folded])


def missing_section(results: Results) -> Section | None:
    """What is not there: failed, unfinished and not started runs, and values that are none."""
    cells = results.cells
    bad = results.runs[~np.isfinite(results.runs["value"])]
    undone = cells[cells["status"] != "done"]
    if undone.empty and bad.empty and not results.missing:
        return None
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
    return Section("missing", "What is missing", tables=[table])


@dataclass(frozen=True)
class RunNote:
    """One run, for the page's list of runs."""

    title: str
    facts: dict[str, str]
    config: str


def _shared(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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
    shared = _shared(flat)
    keys = sorted({key for block in flat for key in block} - {*shared, "name"})
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
    words = {key: text(value) for key, value in shared.items()}
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
    shared = _shared([v for v in results.cells["versions"] if isinstance(v, dict)])
    for row in records(results.cells):
        facts = {"state": row["status"], "device": row["device"], "command": row["command"]}
        if isinstance(row["seconds"], float) and math.isfinite(row["seconds"]):
            facts["seconds"] = f"{row['seconds']:.1f}"
        versions = row["versions"] if isinstance(row["versions"], dict) else {}
        own = {k: v for k, v in versions.items() if k not in shared}
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


# The files


def sections(results: Results) -> list[Section]:
    """All that the store has something to say on, in the page's order."""
    tested = [m for m in results.measures if not is_cost(m)]
    found: list[Section | None] = [measure_section(results, m) for m in tested]
    if tested:
        found += [batch_section(results, tested[0]), sensitivity_section(results, tested[0])]
    cost = cost_section(results)
    primary_is_cost = results.primary is not None and is_cost(results.primary)
    found = [cost, *found] if primary_is_cost else [*found, cost]
    found += [curves_section(results), entropy_section(results), published_section(results)]
    found += [others_section(results), missing_section(results)]
    return [section for section in found if section is not None]


def _environment(escape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("iecl_solo", "report"),
        autoescape=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["md"] = escape_markdown
    return environment


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(content, encoding="utf-8")
    os.replace(part, path)


def write_report(store: Store, to: Path) -> Path:
    """Write ``report.html``, ``report.md``, ``tables/*.csv``, ``tables/*.tex`` and ``figures/*``.

    Whatever the store holds: what is missing is said, and a section without data is left out.

    Args:
        store: a benchmark's rows, finished or not.
        to: the folder.

    Returns:
        The path of the page, one file that needs no network and no script.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> page = write_report(Store(folder / "store.sqlite"), folder)
        >>> "Nothing can be said yet" in page.read_text(encoding="utf-8")
        True
    """
    results = read(store)
    parts = sections(results)
    shared, differing = configuration_table(results)
    inner = [inner for part in parts for inner in part.walk()]
    tables = [table for part in inner for table in part.tables]
    pictures = [figure for part in inner for figure in part.pictures]
    for table in [*tables, *([differing] if differing else [])]:
        _write(to / "tables" / f"{table.name}.csv", table.data.to_csv(index=False))
        _write(to / "tables" / f"{table.name}.tex", latex(table))
    if not results.runs.empty:
        frame = expand(results, results.runs)
        _write(to / "tables" / "runs.csv", frame.to_csv(index=False))
    for figure in pictures:
        _write(to / "figures" / f"{figure.name}.svg", figure.svg)
    versions = [v for v in results.cells["versions"] if isinstance(v, dict)]
    devices = Counter(d for d in results.cells["device"] if isinstance(d, str))
    context = {
        "name": results.meta.get("name") or "benchmark",
        "preset": results.meta.get("preset"),
        "question": results.meta.get("question"),
        "answer": answer(results),
        "state": state(results),
        "total": len(results.cells) + len(results.missing),
        "facts": {
            "arms": " · ".join(results.meta.get("arms") or results.arms),
            "data": ", ".join(dict.fromkeys(setting[0] for setting in results.settings)),
            **{
                results.axis_name(axis): ", ".join(map(text, values))
                for axis, values in (results.meta.get("axes") or {}).items()
            },
            "seeds": ", ".join(map(str, results.meta.get("seeds") or [])),
            "device": ", ".join(f"{d} ({count(n, 'run')})" for d, n in devices.items()),
        },
        "command": results.meta.get("command"),
        "sections": parts,
        "shared": shared,
        "differing": differing,
        "versions": {k: text(v) for k, v in _shared(versions).items()},
        "notes": run_notes(results),
        "generator": __version__,
    }
    for suffix, escape in (("md", False), ("html", True)):
        template = _environment(escape).get_template(f"report.{suffix}.jinja")
        _write(to / f"report.{suffix}", template.render(context))
    return to / "report.html"
