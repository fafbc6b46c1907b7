"""``iecl-solo report``: what a benchmark's store says, as a page, Markdown, LaTeX and CSV."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("store", help="a benchmark's store.sqlite, or the folder that holds it")
    parser.add_argument("--to", help="the folder to write to; the store's own if not given")


def run(args: argparse.Namespace) -> int:
    """Write the report and say where, and what it says."""
    from iecl_solo.experiments.store import STORE, Store
    from iecl_solo.report.answer import answer
    from iecl_solo.report.page import write_report
    from iecl_solo.report.results import read

    path = Path(args.store)
    store = Store(path / STORE if path.is_dir() else path, create=False)
    page = write_report(store, Path(args.to) if args.to else store.path.parent)
    print(answer(read(store)))
    print(f"report: {page} (also report.md, tables/*.csv, tables/*.tex, figures/*.svg)")
    return 0
