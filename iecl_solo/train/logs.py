"""What a run logged, read back from its folder."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd

from iecl_solo.errors import IECLError, one_line
from iecl_solo.solo.registry import OBJECTIVES
from iecl_solo.train.run import Run


def read_log(path: Path) -> pd.DataFrame:
    """A log of numbers by epoch; of a row that a kill cut off nothing is taken.

    Lightning's monitor of the learning rates logs rows of its own, without an epoch. They are left
    out.

    Raises:
        IECLError: one line, for a file that is damaged.
    """
    try:
        text = path.read_bytes().decode()
        frame = pd.read_csv(io.StringIO(text[: text.rfind("\n") + 1])).apply(pd.to_numeric)
        rates = frame.filter(regex="^lr-")
        others = frame.columns.difference([*rates, "step"])
        frame = frame[~(rates.notna().any(axis=1) & frame[others].isna().all(axis=1))]
        if not (frame["epoch"] >= 0).all() or (frame["epoch"] % 1).any():
            raise ValueError("an epoch is no whole number")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        said = f"{path}: it is damaged, or no log of a run ({one_line(error)})"
        raise IECLError(said) from None
    return frame


def read_metrics(run: Path) -> pd.DataFrame:
    """All that the CSV logger wrote for a run, its interruptions included, one row an epoch."""
    logs = sorted(run.glob("logs/version_*/metrics.csv"), key=lambda p: p.stat().st_mtime)
    frames = [read_log(path) for path in logs if path.stat().st_size > 0]
    if not frames:
        return pd.DataFrame()
    # an epoch that was begun twice is taken from the run that finished it
    return pd.concat(frames).groupby("epoch").last().sort_index()


def read_monitor(run: Path) -> pd.DataFrame:
    """What ``EntropyMonitor`` wrote for a run, an epoch a row: its measures but single layers'."""
    path = run / "monitor.csv"
    if not path.is_file():
        return pd.DataFrame()
    frame = read_log(path).set_index("epoch")
    of_sample = ["monitor_seconds", "images", "delta_h_images", "probes"]
    frame = frame.drop(columns=of_sample, errors="ignore")
    return frame[[column for column in frame if "/" not in str(column)]]


def is_term(column: str) -> bool:
    """Whether a logged value is an objective's, its mean over an epoch."""
    prefixes = tuple(f"train_{objective.name}_" for objective in OBJECTIVES)
    return column.startswith(prefixes) and column.endswith("_epoch")


def host_loss(metrics: pd.DataFrame) -> str | None:
    """The column of the host's own loss, whatever it calls it."""
    names = [c for c in metrics.columns if c.endswith(("_loss_epoch", "_sim_epoch"))]
    own = [
        c for c in names if not c.startswith(("train_class", "train_momentum")) and not is_term(c)
    ]
    return own[0] if own else None


def training_curves(run: Run) -> list[tuple[int, str, float]]:
    """What a run logged, as (epoch, name, value): the host's loss under one name for all hosts."""
    out: list[tuple[int, str, float]] = []
    metrics = read_metrics(run.folder)
    loss = host_loss(metrics)
    for column in metrics.columns:
        name = str(column).removeprefix("train_").removesuffix("_epoch")
        if column == loss:
            name = "host_loss"
        elif column in ("train_acc1_epoch", "val_acc1"):
            name = str(column).removesuffix("_epoch")
        elif not is_term(str(column)):
            continue
        out += [(int(e), name, float(v)) for e, v in metrics[column].dropna().items()]  # type: ignore[call-overload]
    monitor = read_monitor(run.folder)
    for column in monitor.columns:
        out += [(int(e), str(column), float(v)) for e, v in monitor[column].dropna().items()]  # type: ignore[call-overload]
    return out
