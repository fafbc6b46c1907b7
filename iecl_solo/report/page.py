"""What a benchmark's rows say, as one page: the answer first, then all that it rests on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import jinja2

from iecl_solo.experiments.store import Store
from iecl_solo.files import replacing
from iecl_solo.report.answer import answer, collapses, mixed, state
from iecl_solo.report.results import count, read, text
from iecl_solo.report.runs import configuration_table, run_notes, shared
from iecl_solo.report.section import expand
from iecl_solo.report.sections import all_sections
from iecl_solo.report.tables import escape_markdown, latex
from iecl_solo.version import __version__


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
    with replacing(path) as part:
        part.write_text(content, encoding="utf-8")


def write_report(store: Store, to: Path) -> Path:
    """Write ``report.html``, ``report.md``, ``tables/*.csv``, ``tables/*.tex`` and ``figures/*``.

    Whatever the store holds: what is missing is said, and a section without data is left out.

    Args:
        store: a benchmark's rows, finished or not.
        to: the folder.

    Returns:
        The path of the page, one file that needs no network and no script.

    Raises:
        CannotWrite: one line, when the disk is full or cannot be written to.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> page = write_report(Store(folder / "rows"), folder)
        >>> "Nothing can be said yet" in page.read_text(encoding="utf-8")
        True
    """
    results = read(store)
    parts = all_sections(results)
    common, differing = configuration_table(results)
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
    preset = results.meta.get("preset")
    versions = [v for v in results.cells["versions"] if isinstance(v, dict)]
    devices = Counter(d for d in results.cells["device"] if isinstance(d, str))
    context = {
        "name": results.meta.get("name") or "benchmark",
        "preset": preset,
        "question": results.meta.get("question"),
        "answer": answer(results),
        "state": state(results),
        "notices": [*collapses(results), *mixed(results)],
        "kind": "Benchmark" if "kind" in results.meta or preset else "Comparison",
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
        "shared": common,
        "differing": differing,
        "versions": {k: text(v) for k, v in shared(versions).items()},
        "notes": run_notes(results),
        "generator": __version__,
    }
    for suffix, escape in (("md", False), ("html", True)):
        template = _environment(escape).get_template(f"report.{suffix}.jinja")
        _write(to / f"report.{suffix}", template.render(context))
    return to / "report.html"
