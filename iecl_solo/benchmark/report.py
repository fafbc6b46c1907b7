"""What a benchmark's rows say, as one page: the answer first, then all that it rests on."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import jinja2
import numpy as np
import pandas as pd

from iecl_solo.benchmark import figures
from iecl_solo.benchmark.answer import BAR, answer, state
from iecl_solo.benchmark.figures import Line, Look, Picture, Row, Tile, picture
from iecl_solo.benchmark.results import (
    Results,
    cost_rows,
    count,
    flatten,
    listed,
    read,
    records,
    slug,
    text,
)
from iecl_solo.benchmark.statistics import (
    MIN_SEEDS,
    Difference,
    caution,
    holm,
    paired_difference,
    pairs,
    summarize,
    summary_table,
)
from iecl_solo.benchmark.store import Store
from iecl_solo.benchmark.tables import (
    COST,
    Cell,
    Table,
    better,
    escape_markdown,
    heading,
    interval,
    is_cost,
    latex,
    name,
    number,
    p_value,
    plus_minus,
    title,
    unit,
)
from iecl_solo.version import __version__

BATCH_SIZE = "optimizer.batch_size"

#: More arms than this make a panel illegible, and a table wider than a page.
_ARMS = 6

#: More rows than this make a forest plot longer than a screen.
_FOREST = 16

#: More settings than this are folded, where each has its own curves.
_OPEN = 3

#: More points than this make a line no clearer.
_POINTS = 200


# Tables


def _labels(results: Results, setting: int) -> list[Cell]:
    return [Cell(value) for value in results.settings[setting]]


def main_table(results: Results, measure: str) -> Table:
    """Mean ± standard deviation over seeds; arms across, or down where there are many."""
    runs = results.of(measure)
    settings = [i for i in range(len(results.settings)) if i in set(runs["setting"])]
    arms = [arm for arm in results.arms if arm in set(runs["arm"])]
    cautions = {
        (row["setting"], row["arm"]): row["caution"]
        for row in records(results.differences(measure))
    }
    summaries = {
        (i, arm): summarize(results.values(measure, i, arm)) for i in settings for arm in arms
    }
    n = max((summary.n for summary in summaries.values()), default=0)

    def entry(i: int, arm: str) -> Cell:
        summary = summaries[i, arm]
        if not summary.n:
            return Cell("–")
        means = [summaries[i, other].mean for other in arms if summaries[i, other].n]
        best = max(means) if better(measure) > 0 else min(means)
        bold = better(measure) != 0 and len(means) > 1 and summary.mean == best
        return Cell(plus_minus(measure, summary, n), bold, "≈" if cautions.get((i, arm)) else "")

    if len(arms) > max(_ARMS, len(settings)):
        head = ["arm", *(results.setting_text(i, varying=True) or "value" for i in settings)]
        rows = [[Cell(arm), *(entry(i, arm) for i in settings)] for arm in arms]
        align = "h" + "r" * len(settings)
    else:
        head = [*results.setting_head, *arms]
        rows = [[*_labels(results, i), *(entry(i, arm) for arm in arms)] for i in settings]
        align = "h" * len(results.setting_head) + "r" * len(arms)
    data = summary_table(runs, ["setting"])
    caption = (
        f"Mean ± standard deviation over {count(n, 'seed')}" if n > 1 else "One seed, so no spread"
    )
    caption += ", or as many as given." if any(0 < s.n < n for s in summaries.values()) else "."
    if better(measure) and len(arms) > 1:
        caption += f" Bold: the {'highest' if better(measure) > 0 else 'lowest'} mean."
    if any(cautions.values()):
        caption += (
            " ≈: no difference from its baseline can be told (paired t test, Holm-corrected, "
            f"p ≥ 0.05, or fewer than {MIN_SEEDS} seeds)."
        )
    return Table(
        slug(measure), heading(title(measure)), caption, head, rows, align, _expand(results, data)
    )


def _expand(results: Results, frame: pd.DataFrame) -> pd.DataFrame:
    """Put a setting's own columns where its index was."""
    columns = pd.DataFrame(
        [results.setting_columns(i) for i in frame["setting"]],
        columns=["data", *results.axes],
        index=frame.index,
    )
    rest = frame.drop(columns=[c for c in ("setting", "order") if c in frame])
    return pd.concat([columns, rest], axis=1)


def _difference(row: Mapping[str, Any]) -> Difference:
    return Difference(*(row[key] for key in ("n", "mean", "sd", "low", "high", "p")))


def differences_table(results: Results, measure: str) -> Table:
    """Each arm minus its baseline, in pairs, with what the seeds can say of it."""
    frame = results.differences(measure)
    rows = []
    for row in records(frame):
        difference = _difference(row)
        rows.append(
            [
                *_labels(results, row["setting"]),
                Cell(f"{row['arm']} − {row['against']}"),
                Cell(str(difference.n)),
                Cell(
                    number(measure, difference.mean, difference.sd, sign=True),
                    bold=not row["caution"],
                ),
                Cell(interval(measure, difference, sign=True)),
                Cell(p_value(row["p"])),
                Cell(p_value(row["p_holm"])),
                Cell(row["caution"] or ("higher" if difference.mean > 0 else "lower")),
            ]
        )
    points = " (points)" if unit(measure) == "%" else f" ({unit(measure)})" * bool(unit(measure))
    head = [*results.setting_head, "comparison", "n", f"difference{points}", "95 % interval"]
    caption = (
        "Paired by seed: same initial weights, order of data and augmentations. 95 % t interval; "
        f"p of the paired t test, and after Holm's correction over {count(len(rows), 'comparison')}"
        f". Bold: corrected p < 0.05 with at least {MIN_SEEDS} seeds. Where nothing is told apart, "
        "the verdict gives the difference that as many seeds of this spread show 4 times in 5."
    )
    return Table(
        f"{slug(measure)}-differences",
        heading(f"{name(measure)}, differences"),
        caption,
        [*head, "p", "p (Holm)", "verdict"],
        rows,
        "h" * (len(results.setting_head) + 1) + "rrrrrl",
        _expand(results, frame),
    )


def forest_pictures(results: Results, measure: str) -> list[Picture]:
    """The differences, drawn: in one panel, or in one a setting where they are many."""
    frame = results.differences(measure)
    if len(frame) <= _FOREST:
        return [_forest(results, measure, frame, f"forest-{slug(measure)}", "")]
    return [
        _forest(
            results,
            measure,
            group,
            f"forest-{slug(measure)}-{i}",
            results.setting_text(int(str(i)), varying=True),
        )
        for i, group in frame.groupby("setting")
    ]


def _forest(
    results: Results, measure: str, frame: pd.DataFrame, stem: str, setting: str
) -> Picture:
    bases = set(frame["against"])
    rows = []
    for row in records(frame):
        who = row["arm"] if len(bases) == 1 else f"{row['arm']} − {row['against']}"
        where = "" if setting else results.setting_text(row["setting"], varying=True)
        label = f"{who} · {where}" if where else who
        rows.append(Row(label, row["mean"], row["low"], row["high"], not row["caution"]))
    of = f" from {next(iter(bases))}" if len(bases) == 1 else ""
    caption = (
        "Mean paired difference and 95 % interval; filled where it is told apart (Holm), hollow "
        "where it is not; no line where there is no interval."
    )
    points = " (points)" if unit(measure) == "%" else f" ({unit(measure)})" * bool(unit(measure))
    return picture(
        stem,
        f"Differences{of} in {name(measure)}" + (f", {setting}" if setting else ""),
        caption,
        partial(figures.forest, rows=rows, x=f"difference in {name(measure)}{points}"),
        height=0.75 + 0.4 * len(rows),
        grid="x",
    )


@dataclass(frozen=True)
class Section:
    """A part of the page; what is in ``folded`` opens on demand."""

    id: str
    title: str
    words: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    folded: Sequence[Section] = field(default_factory=tuple)

    @property
    def caption(self) -> str:
        """The caption that all of its several figures share; empty if they share none."""
        captions = {figure.caption for figure in self.pictures}
        return captions.pop() if len(captions) == 1 and len(self.pictures) > 1 else ""

    def walk(self) -> Iterator[Section]:
        """It and all that is folded in it."""
        yield self
        for section in self.folded:
            yield from section.walk()


def measure_section(results: Results, measure: str) -> Section:
    """One measure: means, differences, forest plot."""
    tables: list[Table] = [main_table(results, measure)]
    pictures: list[Picture] = []
    if len(results.differences(measure)):
        tables.append(differences_table(results, measure))
        pictures = forest_pictures(results, measure)
    return Section(slug(measure), heading(title(measure)), tables=tables, pictures=pictures)


# Accuracy against batch size, and sensitivity


def _groups(results: Results, axis: str) -> dict[tuple[str, ...], list[tuple[float, int]]]:
    """(value of an axis, setting) by what else a setting is; numeric values only, ascending."""
    column = 1 + results.axes.index(axis)
    found: dict[tuple[str, ...], list[tuple[float, int]]] = {}
    for i, setting in enumerate(results.settings):
        try:
            value = float(setting[column])
        except ValueError:
            continue
        found.setdefault(setting[:column] + setting[column + 1 :], []).append((value, i))
    return {rest: sorted(values) for rest, values in found.items()}


def _line(
    results: Results, measure: str, label: str, look: Look, at: Iterable[tuple[float, int, str]]
) -> Line:
    points = [(x, summarize(results.values(measure, i, arm))) for x, i, arm in at]
    points = [(x, summary) for x, summary in points if summary.n]
    columns = zip(*((x, s.mean, s.low, s.high) for x, s in points), strict=True)
    x, y, low, high = (list(c) for c in columns) if points else ([], [], [], [])
    return Line(label, look, x, y, low, high)


def _chunks(results: Results, arms: Sequence[str]) -> list[list[str]]:
    """Arms by panel: few enough to read, each with what it is compared with."""
    compared = [arm for arm in arms if results.against.get(arm) is not None]
    alone = [arm for arm in arms if arm not in compared]
    if len(arms) <= _ARMS + 1:
        return [list(arms)]
    found, shown = [], set()
    for i in range(0, len(compared), _ARMS):
        chunk = compared[i : i + _ARMS]
        bases = {results.against[arm] for arm in chunk}
        found.append([arm for arm in arms if arm in chunk or arm in bases])
        shown |= bases
    rest = [arm for arm in alone if arm not in shown]
    return found + [rest[i : i + _ARMS] for i in range(0, len(rest), _ARMS)]


def batch_section(results: Results, measure: str) -> Section | None:
    """The small-batch claim: the measure against the batch size, and what it does to the gain."""
    if BATCH_SIZE not in results.axes:
        return None
    groups = {k: v for k, v in _groups(results, BATCH_SIZE).items() if len(v) > 1}
    pictures = []
    for rest, values in groups.items():
        for j, arms in enumerate(_chunks(results, results.arms)):
            lines = [
                _line(results, measure, arm, results.looks[arm], [(x, i, arm) for x, i in values])
                for arm in arms
            ]
            lines = [line for line in lines if line.x]
            theirs = [
                line
                for arm in arms
                if (line := _published_line(results, measure, arm, [i for _, i in values]))
            ]
            if not any(len(line.x) > 1 for line in lines):
                continue
            ticks = sorted({x for line in (*lines, *theirs) for x in line.x})
            caption = "Mean over seeds with its 95 % t interval."
            if theirs:
                caption += " Hollow and dotted: published figures, not ours."
            pictures.append(
                picture(
                    f"batch-size-{slug('-'.join(rest))}-{j}",
                    heading(f"{name(measure)} against batch size, {', '.join(rest)}"),
                    caption,
                    partial(
                        figures.bars,
                        lines=lines,
                        ticks=ticks,
                        x="batch size",
                        y=title(measure),
                        theirs=theirs,
                    ),
                )
            )
    if not pictures:
        return None
    trend = trend_table(results, measure, groups)
    return Section(
        "batch-size", "Against the batch size", tables=[trend] if trend else [], pictures=pictures
    )


def trend_table(
    results: Results, measure: str, groups: Mapping[tuple[str, ...], list[tuple[float, int]]]
) -> Table | None:
    """Whether the difference changes with the batch size: per seed its slope, then t over seeds."""
    both = pairs(results.of(measure), ["setting"])
    both = both.assign(d=both["value"] - both["baseline"])
    found: list[tuple[tuple[str, ...], str, Difference]] = []
    for rest, values in groups.items():
        sizes = {i: math.log2(x) for x, i in values if x > 0}
        here = both[both["setting"].isin(sizes)]
        for (arm, other), group in here.groupby(["arm", "against"], sort=False):
            wide = group.pivot_table(index="seed", columns="setting", values="d").dropna()
            if len(wide) and wide.shape[1] > 1:
                x = [sizes[int(str(i))] for i in wide.columns]
                slopes = np.polyfit(x, wide.to_numpy().T, 1)[0]
                difference = paired_difference(slopes, np.zeros(len(slopes)))
                found.append((rest, f"{arm} − {other}", difference))
    if not found:
        return None
    corrected = holm([difference.p for *_, difference in found])
    rows, data = [], []
    where = ["data", *(results.axis_name(axis) for axis in results.axes if axis != BATCH_SIZE)]
    for (rest, comparison, difference), p in zip(found, corrected, strict=True):
        why = caution(difference, float(p))
        rows.append(
            [
                *map(Cell, rest),
                Cell(comparison),
                Cell(str(difference.n)),
                Cell(number(measure, difference.mean, difference.sd, sign=True), bold=not why),
                Cell(interval(measure, difference, sign=True)),
                Cell(p_value(difference.p)),
                Cell(p_value(float(p))),
                Cell(why or ("grows" if difference.mean > 0 else "shrinks")),
            ]
        )
        data.append(
            dict(zip(where, rest, strict=True))
            | {"comparison": comparison}
            | vars(difference)
            | {"p_holm": p, "caution": why}
        )
    head = [*where, "comparison", "n", "change per doubling", "95 % interval", "p", "p (Holm)"]
    return Table(
        "batch-size-trend",
        "Does the difference change with the batch size?",
        "Per seed the slope of the paired difference over log2 of the batch size, then mean and "
        "95 % t interval over seeds. Below 0: the gain is larger where the batch is small.",
        [*head, "verdict"],
        rows,
        "h" * (len(where) + 1) + "rrrrrl",
        pd.DataFrame(data),
    )


@dataclass(frozen=True)
class Sweep:
    """Arms that differ in one number only."""

    key: str
    arms: dict[float, str]


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def sweeps(
    arms: Mapping[str, Mapping[str, Any]], configs: Mapping[str, Mapping[str, Any]]
) -> list[Sweep]:
    """Which arms sweep one setting, of at least three values.

    Args:
        arms: the settings that each arm writes.
        configs: a completed configuration of each arm: tells the value of an arm that leaves the
            setting at its default.

    Example:
        >>> beta = {f"beta {b}": {"method": "iecl_byol", "iecl": {"beta": b}} for b in (0.3, 0.1)}
        >>> default = {"iecl_byol": {"method": "iecl_byol"}}
        >>> configs = {"iecl_byol": {"iecl": {"beta": 0.2, "lambda": 0.1}}}
        >>> sweeps({"byol": {"method": "byol"}} | default | beta, configs)
        [Sweep(key='iecl.beta', arms={0.1: 'beta 0.1', 0.2: 'iecl_byol', 0.3: 'beta 0.3'})]
    """
    flat = {
        arm: {k: v for k, v in flatten(block).items() if k.partition(".")[0] not in _NO_SETTINGS}
        for arm, block in arms.items()
    }
    full = {arm: flatten(config) for arm, config in configs.items()}
    found = []
    for key in dict.fromkeys(k for block in flat.values() for k in block):
        groups: dict[str, dict[float, str]] = {}
        for explicit in (True, False):
            for arm, block in flat.items():
                if (key in block) != explicit:
                    continue
                value = block[key] if explicit else full.get(arm, {}).get(key)
                rest = json.dumps({k: v for k, v in block.items() if k != key}, sort_keys=True)
                if _is_number(value) and (explicit or rest in groups):
                    groups.setdefault(rest, {}).setdefault(float(value), arm)
        found += [Sweep(key, dict(sorted(g.items()))) for g in groups.values() if len(g) > 2]
    return found


_NO_SETTINGS = ("against", "saib_from")


def _configs(results: Results) -> dict[str, dict[str, Any]]:
    there = results.configured
    pair = there.drop_duplicates("arm")
    return dict(zip(pair["arm"], pair["config"], strict=True))


def sensitivity_section(results: Results, measure: str) -> Section | None:
    """Heat maps of a swept setting against another axis; a line where there is no other."""
    present = {k: v for k, v in (results.meta.get("arms") or {}).items() if k in results.arms}
    pictures: list[Picture] = []
    for n, sweep in enumerate(sweeps(present, _configs(results))):
        crossed = [a for a in results.axes if any(len(v) > 1 for v in _groups(results, a).values())]
        for axis in crossed:
            for rest, values in _groups(results, axis).items():
                if len(values) > 1:
                    stem = f"sensitivity-{n}-{slug(axis)}-{slug('-'.join(rest))}"
                    pictures += _heat_map(results, measure, sweep, axis, rest, values, stem)
        if not crossed:
            for i in range(len(results.settings)):
                pictures += _sweep_line(results, measure, sweep, i, f"sensitivity-{n}-{i}")
    return Section("sensitivity", "Sensitivity", pictures=pictures) if pictures else None


def _heat_map(
    results: Results,
    measure: str,
    sweep: Sweep,
    axis: str,
    rest: tuple[str, ...],
    values: Sequence[tuple[float, int]],
    stem: str,
) -> list[Picture]:
    frame = results.differences(measure)
    told = {(row["setting"], row["arm"]): row for row in records(frame)}
    diverging = any((i, arm) in told for _, i in values for arm in sweep.arms.values())

    def tile(i: int, arm: str) -> Tile:
        if diverging:
            row = told.get((i, arm))
            if row is None:
                return Tile(math.nan, "")
            mark = "≈" if row["caution"] else ""
            return Tile(row["mean"], number(measure, row["mean"], row["sd"], sign=True) + mark)
        summary = summarize(results.values(measure, i, arm))
        return Tile(summary.mean, number(measure, summary.mean, summary.sd))

    grid = [[tile(i, arm) for arm in sweep.arms.values()] for _, i in values]
    if not any(math.isfinite(t.value) for row in grid for t in row):
        return []
    what = f"difference from baseline in {name(measure)}" if diverging else name(measure)
    key = sweep.key.rpartition(".")[2]
    caption = f"{what[0].upper() + what[1:]}, mean over seeds; {sweep.key} across."
    if diverging:
        caption += " ≈: cannot be told from 0. Blue-green is above the baseline, orange below."
    return [
        picture(
            stem,
            f"{key} against {results.axis_name(axis)}, {', '.join(rest)}",
            caption,
            partial(
                figures.tiles,
                grid=grid,
                columns=[f"{v:g}" for v in sweep.arms],
                rows=[f"{x:g}" for x, _ in values],
                x=key,
                y=results.axis_name(axis),
                diverging=diverging,
            ),
            height=0.9 + 0.42 * len(values),
            grid="none",
        )
    ]


def _sweep_line(
    results: Results, measure: str, sweep: Sweep, setting: int, stem: str
) -> list[Picture]:
    look = results.looks[next(iter(sweep.arms.values()))]
    at = [(x, setting, arm) for x, arm in sweep.arms.items()]
    key = sweep.key.rpartition(".")[2]
    line = _line(results, measure, key, look, at)
    if len(line.x) < 2:
        return []
    bases = {results.against.get(arm) for arm in sweep.arms.values()} - {None, *sweep.arms.values()}
    base = next(iter(bases)) if len(bases) == 1 else None
    level = None
    if base is not None:
        level = _line(results, measure, base, results.looks[base], [(0.0, setting, base)])
    where = results.setting_text(setting)
    return [
        picture(
            stem,
            f"{key}, {where}",
            f"Mean over seeds of {name(measure)} with its 95 % t interval; {sweep.key} is swept, "
            "all else as in the other arms"
            + (f"; the level line is {base}." if level and level.y else "."),
            partial(
                figures.bars,
                lines=[line],
                ticks=list(sweep.arms),
                x=key,
                y=title(measure),
                level=level if level and level.y else None,
            ),
        )
    ]


# Curves


def _thin(frame: pd.DataFrame) -> pd.DataFrame:
    step = math.ceil(len(frame) / _POINTS)
    return frame.iloc[sorted({*range(0, len(frame), step), len(frame) - 1})] if step > 1 else frame


def _curve(results: Results, measure: str, setting: int, arm: str) -> pd.DataFrame:
    """Mean and standard deviation over seeds at each epoch."""
    curves = results.curves
    own = curves[
        (curves["setting"] == setting) & (curves["arm"] == arm) & (curves["name"] == measure)
    ]
    own = own[np.isfinite(own["value"])]
    return own.groupby("epoch")["value"].agg(["mean", "std"])


def _curve_pictures(results: Results, measure: str, setting: int) -> list[Picture]:
    found = []
    for j, arms in enumerate(_chunks(results, results.arms)):
        lines = []
        for arm in arms:
            frame = _thin(_curve(results, measure, setting, arm))
            if len(frame):
                mean, sd = frame["mean"].to_numpy(), frame["std"].fillna(0.0).to_numpy()
                epochs = frame.index.to_numpy(dtype=float)
                lines.append(Line(arm, results.looks[arm], epochs, mean, mean - sd, mean + sd))
        if not lines:
            continue
        found.append(
            picture(
                f"curve-{slug(measure)}-{setting}-{j}",
                heading(f"{name(measure)}, {results.setting_text(setting)}"),
                "Mean over seeds; the band is one standard deviation to each side.",
                partial(figures.bands, lines=lines, x="epoch", y=title(measure)),
                grid="y",
            )
        )
    return found


def curves_section(results: Results) -> Section | None:
    """Training curves (IE-CL's figure 4): accuracy and loss first, all others folded."""
    there = list(dict.fromkeys(results.curves["name"]))
    first = [c for c in ("val_acc1", "host_loss") if c in there] or there[:1]
    rest = [c for c in there if c not in first]
    settings = [i for i in range(len(results.settings)) if i in set(results.curves["setting"])]
    pictures = [p for i in settings[:_OPEN] for c in first for p in _curve_pictures(results, c, i)]
    if not pictures:
        return None
    folded = []
    for n, i in enumerate(settings):
        names, what = (rest, "Other curves") if n < _OPEN else (there, "Curves")
        drawn = [p for c in names for p in _curve_pictures(results, c, i)]
        if drawn:
            where = results.setting_text(i)
            folded.append(Section(f"curves-{i}", f"{what}, {where}", pictures=drawn))
    return Section("curves", "Over training", pictures=pictures, folded=folded)


def entropy_section(results: Results) -> Section | None:
    """ΔH of SAIB against the host's loss over training (IE-CL's figure 5)."""
    pictures = []
    for i in range(len(results.settings)):
        for j, arms in enumerate(_chunks(results, results.arms)):
            lines = []
            for arm in arms:
                both = _curve(results, "delta_h", i, arm)[["mean"]].join(
                    _curve(results, "host_loss", i, arm)["mean"].rename("loss"), how="inner"
                )
                both = _thin(both)
                if len(both) > 1:
                    x, y = both["mean"].to_numpy(), both["loss"].to_numpy()
                    lines.append(Line(arm, results.looks[arm], x, y, y, y))
            if lines:
                pictures.append(
                    picture(
                        f"delta-h-{i}-{j}",
                        f"ΔH against the host's loss, {results.setting_text(i)}",
                        "Means over seeds, epoch by epoch: from the hollow point to the filled "
                        "one. ΔH is E log|det J| of SAIB in nats per dimension, scaling included.",
                        partial(
                            figures.paths, lines=lines, x=title("delta_h"), y=title("host_loss")
                        ),
                    )
                )
    return Section("delta-h", "ΔH against the loss", pictures=pictures) if pictures else None


# Cost


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
            *_labels(results, row["setting"]),
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
        _expand(results, pd.DataFrame(rows)),
    )
    if "time_ratio" in measures or "memory_ratio" in measures:
        return Section("cost", "Cost", tables=[table])
    folded = Section("cost-table", "What the runs' own clocks say", tables=[table])
    return Section("cost", "Cost", folded=[folded])


# Others' figures, and everything else


def _matches(results: Results, entry: Mapping[str, Any]) -> list[int]:
    """Settings that a published figure is of."""
    wanted = {"data": entry.get("data")} | dict(entry.get("axes") or {})
    return [
        i
        for i in range(len(results.settings))
        if all(results.setting_columns(i).get(k) == text(v) for k, v in wanted.items())
    ]


def _published_line(
    results: Results, measure: str, arm: str, settings: Sequence[int]
) -> Line | None:
    points = sorted(
        (float(entry["axes"][BATCH_SIZE]), float(entry["value"]))
        for entry in results.meta.get("published") or []
        if (entry.get("arm"), entry.get("measure")) == (arm, measure)
        and BATCH_SIZE in (entry.get("axes") or {})
        and set(_matches(results, entry)) & set(settings)
    )
    if not points:
        return None
    x, y = ([p[i] for p in points] for i in range(2))
    return Line(f"{arm}, published", results.looks[arm], x, y, y, y)


def published_section(results: Results) -> Section | None:
    """The papers' own figures beside ours."""
    entries = results.meta.get("published") or []
    if not entries:
        return None
    rows = []
    for entry in entries:
        measure, arm = str(entry.get("measure")), str(entry.get("arm"))
        here = _matches(results, entry)
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
                rows.append([*_labels(results, i), Cell(arm), *entries])
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
        _expand(results, summary_table(frame, ["measure", "setting"])),
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
        rows.append([*_labels(results, row["setting"]), *identity, Cell(status), Cell(words)])
    for cell in results.missing:
        blank = [Cell("–")] * len(results.setting_head)
        rows.append([*blank, Cell(cell), Cell("–"), Cell("not started"), Cell("")])
    for (i, arm, seed), group in bad.groupby(["setting", "arm", "seed"]):
        words = "no finite value: " + ", ".join(group["measure"])
        identity = [Cell(arm), Cell(str(seed)), Cell("done"), Cell(words)]
        rows.append([*_labels(results, i), *identity])
    head = [*results.setting_head, "arm", "seed", "state", "error"]
    table = Table(
        "missing",
        "What is missing",
        "Runs that count nowhere above. The command that made the store runs them again.",
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
    keys = sorted({key for block in flat for key in block} - set(shared))
    arms = [arm for arm in results.arms if arm in set(cells["arm"])]
    rows = []
    for key in keys:
        entries = []
        for arm in arms:
            own = [b for b, a in zip(flat, cells["arm"], strict=True) if a == arm]
            values = dict.fromkeys(text(b[key]) if key in b else "–" for b in own)
            entries.append(listed([v if len(v) < 60 else f"…{v[-58:]}" for v in values], most=5))
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
        loader=jinja2.PackageLoader("iecl_solo", "benchmark"),
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
        frame = _expand(results, results.runs)
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
            "arms": ", ".join(results.arms),
            "data": ", ".join(dict.fromkeys(setting[0] for setting in results.settings)),
            **{
                results.axis_name(axis): ", ".join(
                    dict.fromkeys(setting[i] for setting in results.settings)
                )
                for i, axis in enumerate(results.axes, start=1)
            },
            "seeds": ", ".join(map(str, sorted(results.cells["seed"].unique()))),
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
