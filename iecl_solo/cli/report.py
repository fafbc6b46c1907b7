"""``iecl-solo report``: what a benchmark's rows say, as a page, Markdown, LaTeX and CSV."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("store", help="a benchmark's folder, or its rows.csv alone")
    parser.add_argument("--to", help="the folder to write to; beside what is read if not given")


def run(args: argparse.Namespace) -> int:
    """Write the report and say where, and what it says."""
    from iecl_solo.errors import IECLError
    from iecl_solo.experiments.store import STORE, Store, read_rows
    from iecl_solo.report.answer import answer
    from iecl_solo.report.page import write_report
    from iecl_solo.report.results import read

    path = Path(args.store)
    with tempfile.TemporaryDirectory() as temporary:
        if path.is_file():
            meta, rows = read_rows(path)
            store, beside = Store(Path(temporary) / STORE), path.parent
            store.begin(meta)
            for row in rows:
                store.put(row)
        else:
            inside = path / STORE
            folder = inside if inside.is_dir() else path
            if folder.is_dir() and not any(folder.glob("*.json")):  # of a row, or of what it was
                raise IECLError(f"store {path}: no rows are in it")
            store = Store(folder, create=False)
            beside = store.path.parent
        page = write_report(store, Path(args.to) if args.to else beside)
        print(answer(read(store)))
    print(f"report: {page} (also report.md, tables/*.csv, tables/*.tex, figures/*.svg)")
    return 0
