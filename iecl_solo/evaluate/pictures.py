"""The pictures of a comparison: training curves, and images before and after SAIB."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from iecl_solo.evaluate.gallery import matched
from iecl_solo.evaluate.palette import BASELINE, OTHERS
from iecl_solo.saib import match_statistics
from iecl_solo.train.logs import host_loss, is_term

_COLOURS = (BASELINE, *OTHERS)  # the baseline's run is the first one


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure and its axes (rows, columns); without pyplot, whose backend is the user's."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _epochs(axis: Any) -> None:
    """Dress an axis whose x is epochs."""
    axis.set_xlabel("epoch", fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _mosaic(axes: Any, rows: Mapping[str, Tensor], fontsize: int) -> None:
    """Pictures (n, h, w, 3) in rows, each with its label."""
    for row, (label, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture.numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(label, fontsize=fontsize)


def _titled(column: str) -> str:
    return column.removeprefix("train_").removesuffix("_epoch").replace("_", " ")


def plot_curves(runs: dict[str, pd.DataFrame], path: Path) -> None:
    """Host loss, online accuracy and the objective's terms over the epochs, one line a run."""
    first = next(iter(runs.values()))
    loss = host_loss(first)
    accuracy = "val_acc1" if "val_acc1" in first else "train_acc1_epoch"
    terms = sorted({c for frame in runs.values() for c in frame.columns if is_term(c)})
    panels = [p for p in (loss, accuracy, *terms) if p is not None]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = _panels(rows, columns, 4.2 * columns, 3 * rows)
    for axis, column in zip(axes.flat, panels, strict=False):
        for (name, frame), colour in zip(runs.items(), _COLOURS, strict=False):
            if column in frame:
                values = frame[column].dropna()
                axis.plot(values.index + 1, values, label=name, color=colour, linewidth=1.8)
        axis.set_title(
            {loss: "host loss", accuracy: "online accuracy, %"}.get(column, _titled(column)),
            fontsize=10,
        )
        _epochs(axis)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    axes.flat[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


#: By panel, the columns of monitor.csv that it shows, each with its label.
_MONITOR = {
    "Delta H of SAIB, nats per dimension": {
        "delta_h": "all",
        "delta_h_beyond_contrast": "beyond contrast",
        "patch_kl": "KL of patches",
    },
    "H(X' | X), nats per dimension": {
        "conditional_entropy": "measured",
        "conditional_entropy_bound": "at most, at this budget",
    },
    "coding rate, nats": {"entropy_query": "query", "entropy_anchor": "anchor"},
    "effective rank": {"effective_rank": "query"},
}


def plot_monitor(monitor: pd.DataFrame, metrics: pd.DataFrame, path: Path) -> None:
    """Delta H and KL, the entropies, and the host's loss over training (paper, figure 5)."""
    epoch = monitor["epoch"] + 1  # counted from 1, as logs print them
    lines: dict[str, dict[str, tuple[Any, Any]]] = {
        title: {label: (epoch, monitor[c]) for c, label in columns.items() if c in monitor}
        for title, columns in _MONITOR.items()
    }
    loss = host_loss(metrics)
    if loss is not None:
        values = metrics[loss].dropna()
        lines["host loss"] = {"": (values.index + 1, values)}
    lines = {title: found for title, found in lines.items() if found}
    figure, axes = _panels(1, len(lines), 4 * len(lines), 3.2)
    for axis, (title, found) in zip(axes.flat, lines.items(), strict=True):
        for (label, (x, y)), colour in zip(found.items(), _COLOURS, strict=False):
            axis.plot(x, y, "o-", ms=3, color=colour, label=label)
        if len(found) > 1:
            axis.legend(frameon=False, fontsize=8)
        axis.set_title(title, fontsize=10)
        _epochs(axis)
    figure.savefig(path, dpi=130)


def plot_singular_values(spectrum: dict[str, tuple[float, float]], path: Path) -> None:
    """Largest and smallest singular value of every layer, in the network's order."""
    figure, axes = _panels(1, 1, 7, 0.22 * len(spectrum) + 1.2)
    axis = axes[0, 0]
    rows = range(len(spectrum))
    low = [max(smallest, 1e-6) for _, smallest in spectrum.values()]
    high = [largest for largest, _ in spectrum.values()]
    axis.hlines(rows, low, high, color="0.75", linewidth=2)
    axis.plot(high, rows, "o", ms=4, color=_COLOURS[1], label="largest")
    axis.plot(low, rows, "o", ms=4, color=_COLOURS[0], label="smallest")
    axis.axvline(1, color="0.4", linewidth=0.8, linestyle="--")
    axis.set_yticks(list(rows), list(spectrum), fontsize=7)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("singular value of the kernel", fontsize=9)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def plot_saib_over_training(
    views: Tensor, saibs: Mapping[str, nn.Module], path: Path, columns: int = 8
) -> None:
    """The same views through SAIB as it was at several epochs (paper, figure 2).

    Args:
        views: (B, 3, H, W) as the host hands them on.
        saibs: SAIB by the label of its row.
        path: the PNG to write.
        columns: how many views to show.
    """
    views = views[:columns].float().cpu()
    low = views.amin(dim=(1, 2, 3), keepdim=True)
    high = views.amax(dim=(1, 2, 3), keepdim=True) + 1e-6
    rows = {"view": views}
    with torch.no_grad():
        rows |= {label: match_statistics(saib(views), views) for label, saib in saibs.items()}
    count = len(views)
    figure, axes = _panels(len(rows), count, 1.2 * count + 1, 1.25 * len(rows) + 0.3)
    shown = {label: _shown(pictures, low, high) for label, pictures in rows.items()}
    _mosaic(axes, shown, 9)
    figure.suptitle("each channel at the view's own mean and contrast", fontsize=9)
    figure.savefig(path, dpi=130)


def _shown(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return ((x - low) / (high - low)).clamp(0, 1).permute(0, 2, 3, 1)


def plot_saib(before: Tensor, after: Tensor, path: Path, columns: int = 8) -> None:
    """Views before SAIB, after it, and their difference, each pair on one scale.

    Args:
        before: (B, 3, H, W) views as the host hands them on (normalised pixels).
        after: (B, 3, H, W) what SAIB makes of them.
        path: the PNG to write.
        columns: how many views to show.
    """
    before, after = before[:columns].float().cpu(), after[:columns].float().cpu()
    dims = (1, 2, 3)
    low, high = before.amin(dims, keepdim=True), before.amax(dims, keepdim=True) + 1e-6
    shown = matched(after, before)
    difference = (shown - before).abs()
    rows = {
        "view": _shown(before, low, high),
        "SAIB(view)": _shown(shown, low, high),
        "|difference|": (difference / difference.amax().clamp_min(1e-6)).permute(0, 2, 3, 1),
    }
    count = len(before)
    figure, axes = _panels(3, count, 1.3 * count + 0.9, 4.3)
    _mosaic(axes, rows, 10)
    scale = float((after.std(dims) / before.std(dims).clamp_min(1e-6)).mean())
    largest = float(difference.amax() / (high - low).mean())
    figure.suptitle(
        f"SAIB, shown at the view's mean and contrast (it multiplies contrast by {scale:.2f}); "
        f"largest difference {100 * largest:.0f} % of the view's range",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
