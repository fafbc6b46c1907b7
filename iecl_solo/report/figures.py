"""The report's figures: drawn once, as SVG, for a file and for a page, light or dark."""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from iecl_solo.evaluate.palette import BASELINE, OTHERS

#: Colours as drawn, and the custom property by which the page gives its own for light and dark.
COLOURS = {
    "ink": "#1b2126",
    "muted": "#66727c",
    "rule": "#d8dee3",
    "accent": "#0b6e75",
    "warm": "#c2571a",
    "series-0": BASELINE,
    **{f"series-{i}": colour for i, colour in enumerate(OTHERS, 1)},
}
INK, MUTED, RULE, ACCENT, WARM = (
    COLOURS[name] for name in ("ink", "muted", "rule", "accent", "warm")
)
SERIES = list(OTHERS)
MARKERS = "os^DvPX"

# Text stays text: it takes the page's font, can be searched, and needs no glyph outlines. Labels
# are names from configurations, so that a $ in one is a $.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "legend.fontsize": 8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}

WIDTH = 4.0  # inches: legible without scaling on a telephone, two or three beside on a desk


@dataclass(frozen=True)
class Picture:
    """A figure: file name, heading, what it shows in words, and its SVG."""

    name: str
    title: str
    caption: str
    svg: str

    @property
    def inline(self) -> str:
        """The SVG for a page that holds several, in the page's colours and font."""
        return inline_svg(self.svg, self.name, f"{self.title}. {self.caption}")


def inline_svg(svg: str, prefix: str, label: str) -> str:
    """Make matplotlib's SVG part of a page.

    Args:
        svg: a whole SVG document.
        prefix: put before every id, so that two figures' clip paths are two.
        label: what a screen reader says.

    Example:
        >>> svg = '<?xml version="1.0"?><svg width="9pt"><path id="a" style="fill: #1b2126"/></svg>'
        >>> inline_svg(svg, "x", "a line")
        '<svg role="img" aria-label="a line"><path id="x-a" style="fill: var(--ink)"/></svg>'
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>\s*", "", svg, flags=re.DOTALL)  # would rule the page
    root, end, content = svg.partition(">")
    root = re.sub(r' (?:xmlns(?::xlink)?|width|height|version|style)="[^"]*"', "", root)
    svg = root + end + content
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    svg = re.sub(r"font-family: [^;\"]*(?:; ?)?", "", svg)
    svg = re.sub(r"font: (?:[\w ]+ )?([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    quoted = html.escape(label)
    return svg.replace("<svg", f'<svg role="img" aria-label="{quoted}"', 1).strip()


def picture(
    name: str,
    title: str,
    caption: str,
    draw: Callable[[Axes], None],
    height: float = 2.6,
    grid: Literal["x", "y", "both", "none"] = "both",
) -> Picture:
    """Draw one panel.

    Args:
        name: of its files, and of its ids in a page.
        title: its heading.
        caption: what it shows.
        draw: draws on the axes that it is given.
        height: in inches.
        grid: the axis that has grid lines: x, y, both or none.
    """
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        if grid != "both":
            axes.grid(False)
        if grid == "x" or grid == "y":
            axes.grid(True, axis=grid)
        draw(axes)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    # as a file it may be shown on a dark page, and its ink is dark
    document = svg.getvalue().replace("<svg ", '<svg style="background: #fff" ', 1)
    return Picture(name, title, caption, document)


@dataclass(frozen=True)
class Look:
    """How an arm's line is drawn, in every figure."""

    colour: str
    line: str = "-"
    marker: str = "o"


def looks(arms: Sequence[str], against: Mapping[str, str | None]) -> dict[str, Look]:
    """A look for each arm; baselines are dashed, grey where there is one of them.

    Args:
        arms: in the order of the tables.
        against: the arm that each is compared with.

    Example:
        >>> found = looks(["simclr", "iecl_simclr"], {"iecl_simclr": "simclr"})
        >>> [look.line for look in found.values()]
        ['--', '-']
    """
    compared = [arm for arm in arms if against.get(arm) is not None]
    own = {
        arm: Look(SERIES[i % len(SERIES)], "-", MARKERS[i % len(MARKERS)])
        for i, arm in enumerate(compared)
    }
    rest = [arm for arm in arms if arm not in own]
    bases = {other for other in against.values() if other is not None}
    found = {}
    for i, arm in enumerate(rest):
        variant = next((a for a in compared if against.get(a) == arm), None)
        if len(bases) <= 1 and arm in bases:
            found[arm] = Look(COLOURS["series-0"], "--", "s")
        elif variant is not None:
            found[arm] = Look(own[variant].colour, "--", own[variant].marker)
        else:
            j = len(compared) + i
            found[arm] = Look(SERIES[j % len(SERIES)], "-", MARKERS[j % len(MARKERS)])
    return {arm: own[arm] if arm in own else found[arm] for arm in arms}


@dataclass(frozen=True)
class Line:
    """One arm's line: a mean at each x, and a band or a bar around it (NaN: none)."""

    label: str
    look: Look
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    low: Sequence[float] | np.ndarray
    high: Sequence[float] | np.ndarray


def _finish(axes: Axes, x: str, y: str, entries: int = 0) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(textwrap.fill(y, 26))
    figure = axes.figure
    assert isinstance(figure, Figure)
    if entries:
        figure.legend(loc="outside upper left", ncols=2, handlelength=2.2, columnspacing=1.4)


def bands(axes: Axes, lines: Sequence[Line], x: str, y: str) -> None:
    """Lines with a band around each."""
    for line in lines:
        axes.plot(line.x, line.y, line.look.line, color=line.look.colour, label=line.label)
        axes.fill_between(
            line.x, line.low, line.high, color=line.look.colour, alpha=0.16, linewidth=0
        )
        if len(line.x) == 1:
            axes.plot(line.x, line.y, line.look.marker, color=line.look.colour, markersize=4)
    if len({x for line in lines for x in line.x}) == 1:
        axes.set_xticks([lines[0].x[0]])
    else:
        axes.locator_params(axis="x", nbins=6, integer=True)
    _finish(axes, x, y, len(lines))


def positions(values: Sequence[float]) -> list[float]:
    """Where values go on an axis: by ratio if they are positive, else one after the other.

    Example:
        >>> positions([128, 256, 512]) == [math.log(v) for v in (128, 256, 512)]
        True
        >>> positions([0, 0.1, 1])
        [0.0, 1.0, 2.0]
    """
    if all(v > 0 for v in values):
        return [math.log(v) for v in values]
    return [float(i) for i in range(len(values))]


def bars(
    axes: Axes,
    lines: Sequence[Line],
    ticks: Sequence[float],
    x: str,
    y: str,
    theirs: Sequence[Line] = (),
    level: Line | None = None,
) -> None:
    """Points with interval bars over chosen values.

    Args:
        axes: where to.
        lines: whose x are among the ticks.
        ticks: all values, ascending.
        x: label.
        y: label.
        theirs: published figures: hollow, dotted, without intervals.
        level: what all are compared with: a horizontal line with its interval as a band.
    """
    place = dict(zip(ticks, positions(ticks), strict=True))
    at = list(place.values())
    span = (at[-1] - at[0]) or 1.0
    if level is not None:
        axes.axhline(
            level.y[0], color=level.look.colour, linestyle=level.look.line, label=level.label
        )
        if math.isfinite(level.low[0]):
            axes.axhspan(level.low[0], level.high[0], color=level.look.colour, alpha=0.14, lw=0)
    for i, line in enumerate(lines):
        # side by side, else the bars of equal points hide one another
        shift = 0.018 * span * (i - (len(lines) - 1) / 2)
        error = np.array([np.subtract(line.y, line.low), np.subtract(line.high, line.y)])
        axes.errorbar(
            [place[v] + shift for v in line.x],
            line.y,
            yerr=np.nan_to_num(error),
            color=line.look.colour,
            linestyle=line.look.line,
            marker=line.look.marker,
            markersize=4.5,
            elinewidth=1.1,
            capsize=2.5,
            label=line.label,
        )
    for line in theirs:
        axes.errorbar(  # as above, else the legend would put them first
            [place[v] for v in line.x],
            line.y,
            linestyle=":",
            marker=line.look.marker,
            markersize=5,
            markerfacecolor="none",
            color=line.look.colour,
            label=line.label,
        )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(at, [f"{v:g}" for v in ticks])
    axes.set_xlim(at[0] - 0.08 * span, at[-1] + 0.08 * span)
    _finish(axes, x, y, len(lines) + len(theirs))


@dataclass(frozen=True)
class Row:
    """A row of a forest plot; ``significant`` where the difference is."""

    label: str
    mean: float
    low: float
    high: float
    significant: bool


def forest(axes: Axes, rows: Sequence[Row], x: str) -> None:
    """Differences with their intervals, one below the other, and the line of no difference."""
    axes.axvline(0, color=MUTED, linewidth=1)
    for i, row in enumerate(rows):
        colour = ACCENT if row.significant else MUTED
        if math.isfinite(row.low):
            axes.plot([row.low, row.high], [i, i], color=colour, linewidth=1.8)
        axes.plot(
            [row.mean],
            [i],
            "o",
            color=colour,
            markersize=5.5,
            markerfacecolor=colour if row.significant else "none",
            markeredgewidth=1.3,
        )
        axes.text(0, i - 0.26, row.label, transform=axes.get_yaxis_transform(), fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.85)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.06)
    axes.set_xlabel(x)


@dataclass(frozen=True)
class Tile:
    """A tile of a heat map."""

    value: float
    text: str


def tiles(
    axes: Axes,
    grid: Sequence[Sequence[Tile]],
    columns: Sequence[str],
    rows: Sequence[str],
    x: str,
    y: str,
    diverging: bool,
) -> None:
    """A heat map; the colour is one hue's strength, so that its numbers stay legible.

    Args:
        axes: where to.
        grid: rows of tiles, the first one at the bottom.
        columns: labels along x.
        rows: labels along y.
        x: label.
        y: label.
        diverging: whether values are differences, where below 0 has a hue of its own.
    """
    finite = [tile.value for row in grid for tile in row if math.isfinite(tile.value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    largest = max(abs(low), abs(high)) if diverging else high - low
    for i, row in enumerate(grid):
        for j, tile in enumerate(row):
            if not math.isfinite(tile.value):
                axes.text(j, i, "–", ha="center", va="center", color=MUTED)
                continue
            strength = abs(tile.value) if diverging else tile.value - low
            axes.add_patch(
                Rectangle(
                    (j - 0.48, i - 0.47),
                    0.96,
                    0.94,
                    facecolor=WARM if diverging and tile.value < 0 else ACCENT,
                    alpha=0.06 + 0.44 * (strength / largest if largest else 0.0),
                    linewidth=0,
                )
            )
            axes.text(j, i, tile.text, ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlim(-0.55, len(columns) - 0.45)
    axes.set_ylim(-0.55, len(rows) - 0.45)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _finish(axes, x, y)


def mosaic(
    axes: Axes,
    rows: Mapping[str, np.ndarray],
    framed: Sequence[tuple[int, int]] = (),
    first_apart: bool = False,
) -> None:
    """Small pictures in rows.

    Args:
        axes: where to.
        rows: by label, (n, s, s, 3) uint8 each, from the top.
        framed: (row, column) of pictures with a frame.
        first_apart: whether the first column stands apart from the others.
    """
    gap = 0.3 if first_apart else 0.0
    for i, images in enumerate(rows.values()):
        for j, image in enumerate(images):
            x = j + gap * (j > 0)
            box = (x - 0.47, x + 0.47, i + 0.47, i - 0.47)
            axes.imshow(image, extent=box, interpolation="nearest")
            if (i, j) in framed:
                frame = Rectangle(
                    (x - 0.47, i - 0.47), 0.94, 0.94, fill=False, edgecolor=WARM, linewidth=2
                )
                axes.add_patch(frame)
    columns = max(len(images) for images in rows.values())
    axes.set_xlim(-0.5, columns - 0.5 + gap)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks(range(len(rows)), list(rows))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


#: More labels than this cannot be distinguished by colour and mark.
LABELS = len(OTHERS) * len(MARKERS)


def scatter(axes: Axes, points: np.ndarray, labels: np.ndarray) -> None:
    """Points on a plane whose axes mean nothing.

    Args:
        axes: where to.
        points: (N, 2).
        labels: (N,), -1 where there are none.
    """
    known = sorted(set(labels.tolist()))
    for n, label in enumerate(known if len(known) <= LABELS else [None]):
        own = points if label is None else points[labels == label]
        colour = SERIES[n % len(SERIES)]
        marker = MARKERS[n // len(SERIES)]
        axes.plot(*own.T, marker, color=colour, markersize=3, alpha=0.6, markeredgewidth=0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", adjustable="datalim")
    axes.spines[:].set_visible(False)


def paths(axes: Axes, lines: Sequence[Line], x: str, y: str) -> None:
    """How two measures went together over training: from the hollow end to the filled one."""
    for line in lines:
        colour = line.look.colour
        axes.plot(line.x, line.y, line.look.line, color=colour, label=line.label)
        axes.plot(line.x[:1], line.y[:1], "o", color=colour, markerfacecolor="none", markersize=5)
        axes.plot(line.x[-1:], line.y[-1:], "o", color=colour, markersize=5)
    axes.locator_params(axis="x", nbins=5)
    _finish(axes, x, y, len(lines))
