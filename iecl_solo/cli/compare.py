"""``iecl-solo compare``: a baseline and its variant, same seed, same batches, one table."""

from __future__ import annotations

import sys

import pandas as pd
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from iecl_solo.cli.hydra_app import Invocation
from iecl_solo.experiments.compare import compare, draw, record
from iecl_solo.report.page import write_report
from iecl_solo.solo.host import find_host
from iecl_solo.train.callbacks.terminal import tell


def _cell(column: str, value: float) -> str:
    if pd.isna(value):
        return "-"
    if column == "parameters":
        return f"{int(value):,}"
    return f"{value:.0f}" if column == "peak MB" else f"{value:.4g}"


def show(frame: pd.DataFrame, title: str) -> None:
    """The table on screen: measures down, methods across, the ratio last."""
    view = Table(title=title, title_justify="left")
    view.add_column("")
    for method in frame.index:
        view.add_column(str(method), justify="right")
    view.add_column("difference", justify="right")
    baseline, variant = frame.iloc[0], frame.iloc[1]
    for column in frame.columns:
        a, b = baseline[column], variant[column]
        if column.endswith("%"):
            change = f"{b - a:+.2f} points"
        elif pd.isna(a) or pd.isna(b):
            change = ""
        elif column.startswith("H("):
            change = f"{b - a:+.3g}"
        else:
            change = f"x {b / a:.3f}"
        view.add_row(column, _cell(column, a), _cell(column, b), change)
    Console(width=None if sys.stdout.isatty() else 100).print(view)


def verdict(frame: pd.DataFrame) -> str:
    """One honest sentence: which is ahead, and that one seed does not decide."""
    parts = []
    for column in (c for c in ("k-NN %", "linear %") if c in frame):
        change = float(frame[column].iloc[1] - frame[column].iloc[0])
        by = f" by {abs(change):.2f} points" if change else ""
        word = "ahead of" if change > 0 else "behind" if change < 0 else "level with"
        parts.append(f"{word} the baseline{by} ({column.split()[0]})")
    if not parts:
        return "There are no labels, so nothing here says which of the two is better."
    return f"{frame.index[1]} is {' and '.join(parts)}; one seed, so no significance is claimed."


def main(cfg: DictConfig, given: Invocation) -> None:
    """What the command does with the composed configuration."""
    pair = compare(cfg)
    frame, folder, args = pair.table, pair.folder, pair.runs[0].args
    frame.to_csv(folder / "table.csv")
    pictures = draw(pair.runs, list(frame.index), folder)
    epochs = f"{args['max_epochs']} epoch{'s' * (args['max_epochs'] != 1)}"
    of = f"{epochs}, seed {args['seed']}, {find_host().describe()}"
    show(frame, f"{pair.title}, {of}")
    tell(verdict(frame))
    page = write_report(record(pair, given.line), folder)
    written = ", ".join(["table.csv", *(path.name for path in pictures)])
    print(f"report: {page} ({written} beside it)")
