"""Sections of a report that compare arms: tables, forest plots, batch size, sensitivity."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeGuard

import pandas as pd

from iecl_solo.report import figures
from iecl_solo.report.figures import Line, Look, Picture, Row, Tile, picture
from iecl_solo.report.results import (
    BATCH_SIZE,
    Results,
    count,
    groups,
    records,
    slopes,
    slug,
    text,
)
from iecl_solo.report.statistics import (
    MIN_SEEDS,
    Difference,
    caution,
    holm,
    summarize,
    summary_table,
)
from iecl_solo.report.tables import (
    Cell,
    Table,
    better,
    heading,
    interval,
    name,
    number,
    p_value,
    plus_minus,
    title,
    unit,
)
from iecl_solo.solo.config import flatten

#: What is chosen on a split of the training images for a measure: where it is stored, its name,
#: and its grid in ``evaluation``.
_CHOSEN = {
    "linear_acc1": ("linear_lr", "learning rate", "linear", "lr"),
    "knn_acc1": ("knn_k", "number of neighbours", "knn", "k"),
}
#: More arms than this make a panel illegible, and a table wider than a page.
_ARMS = 6

#: More rows than this make a forest plot longer than a screen.
_FOREST = 16


def setting_cells(results: Results, setting: int) -> list[Cell]:
    """What names a row: data set and axes."""
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
        rows = [[*setting_cells(results, i), *(entry(i, arm) for arm in arms)] for i in settings]
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
        slug(measure), heading(title(measure)), caption, head, rows, align, expand(results, data)
    )


def expand(results: Results, frame: pd.DataFrame) -> pd.DataFrame:
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
    tested = bool(frame["low"].notna().any())  # of one seed there is nothing to test
    rows = []
    for row in records(frame):
        difference = _difference(row)
        mean = number(measure, difference.mean, difference.sd, sign=True)
        entries = [
            *setting_cells(results, row["setting"]),
            Cell(f"{row['arm']} − {row['against']}"),
            Cell(str(difference.n)),
            Cell(mean, bold=not row["caution"]),
        ]
        if tested:
            entries.append(Cell(interval(measure, difference, sign=True)))
            entries += [Cell(p_value(row["p"])), Cell(p_value(row["p_holm"]))]
        entries.append(Cell(row["caution"] or ("higher" if difference.mean > 0 else "lower")))
        rows.append(entries)
    points = " (points)" if unit(measure) == "%" else f" ({unit(measure)})" * bool(unit(measure))
    head = [*results.setting_head, "comparison", "n", f"difference{points}"]
    caption = "Paired by seed: same initial weights, order of data and augmentations."
    if tested:
        head += ["95 % interval", "p", "p (Holm)"]
        caption += (
            " 95 % t interval; p of the paired t test, and after Holm's correction over "
            f"{count(len(rows), 'comparison')}. Bold: corrected p < 0.05 with at least {MIN_SEEDS} "
            "seeds. Where nothing is told apart, the verdict gives the difference that as many "
            "seeds of this spread show 4 times in 5."
        )
    labels = len(results.setting_head) + 1
    return Table(
        f"{slug(measure)}-differences",
        heading(f"{name(measure)}, differences"),
        caption,
        [*head, "verdict"],
        rows,
        "h" * labels + "r" * (len(head) - labels) + "l",
        expand(results, frame),
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
    differences = results.differences(measure)
    if len(differences):
        tables.append(differences_table(results, measure))
    if differences["low"].notna().any():
        pictures = forest_pictures(results, measure)
    return Section(
        slug(measure),
        heading(title(measure)),
        words=edge_of_grid(results, measure),
        tables=tables,
        pictures=pictures,
    )


def edge_of_grid(results: Results, measure: str) -> list[str]:
    """A caution where what was chosen for a measure often lay at an end of its grid."""
    if measure not in _CHOSEN:
        return []
    name, words, protocol, key = _CHOSEN[measure]
    chosen = results.of(name)["value"]
    grid = ((results.meta.get("evaluation") or {}).get(protocol) or {}).get(key) or []
    if len(grid) < 3:  # most of it is ends
        return []
    ends = {"lowest": min(grid), "highest": max(grid)}
    return [
        f"The {words} chosen was the {end} of its grid ({text(value)}) in "
        f"{int((chosen == value).sum())} of {count(len(chosen), 'run')}: a grid that reaches "
        "further may give higher figures."
        for end, value in ends.items()
        if (chosen == value).mean() > 0.25
    ]


# Accuracy against batch size, and sensitivity


def _line(
    results: Results, measure: str, label: str, look: Look, at: Iterable[tuple[float, int, str]]
) -> Line:
    points = [(x, summarize(results.values(measure, i, arm))) for x, i, arm in at]
    points = [(x, summary) for x, summary in points if summary.n]
    columns = zip(*((x, s.mean, s.low, s.high) for x, s in points), strict=True)
    x, y, low, high = (list(c) for c in columns) if points else ([], [], [], [])
    return Line(label, look, x, y, low, high)


def chunks(results: Results, arms: Sequence[str]) -> list[list[str]]:
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
    found = {k: v for k, v in groups(results, BATCH_SIZE).items() if len(v) > 1}
    pictures = []
    for rest, values in found.items():
        for j, arms in enumerate(chunks(results, results.arms)):
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
    trend = trend_table(results, measure, found)
    return Section(
        "batch-size", "Against the batch size", tables=[trend] if trend else [], pictures=pictures
    )


def trend_table(
    results: Results, measure: str, settings: Mapping[tuple[str, ...], list[tuple[float, int]]]
) -> Table | None:
    """Whether the difference changes with the batch size: per seed its slope, then t over seeds."""
    found: list[tuple[tuple[str, ...], str, Difference]] = []
    for rest, values in settings.items():
        sizes = {i: x for x, i in values if x > 0}
        for (arm, other), slope in slopes(results, measure, sizes).items():
            found.append((rest, f"{arm} − {other}", slope))
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
                Cell(why or ("rises" if difference.mean > 0 else "falls")),
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
        crossed = [a for a in results.axes if any(len(v) > 1 for v in groups(results, a).values())]
        for axis in crossed:
            for rest, values in groups(results, axis).items():
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


# The papers' own figures


def matches(results: Results, entry: Mapping[str, Any]) -> list[int]:
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
        and set(matches(results, entry)) & set(settings)
    )
    if not points:
        return None
    x, y = ([p[i] for p in points] for i in range(2))
    return Line(f"{arm}, published", results.looks[arm], x, y, y, y)
