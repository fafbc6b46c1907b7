"""Arms that sweep one setting: heat maps against another axis, or a line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

from iecl_solo.report import figures
from iecl_solo.report.figures import Picture, Tile, picture
from iecl_solo.report.results import Results, groups, records, slug
from iecl_solo.report.section import Section, seeds_line
from iecl_solo.report.statistics import sign, summarize
from iecl_solo.report.tables import name, number, title
from iecl_solo.solo.config import flatten

PLACE = 30


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


def sections(results: Results) -> list[Section]:
    """Heat maps of a swept setting against another axis; a line where there is no other."""
    measure = results.tested
    if measure is None:
        return []
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
    return [Section("sensitivity", "Sensitivity", PLACE, pictures=pictures)]


def _heat_map(
    results: Results,
    measure: str,
    sweep: Sweep,
    axis: str,
    rest: tuple[str, ...],
    values: Sequence[tuple[float, int]],
    stem: str,
) -> list[Picture]:
    frame = results.differences[measure]
    told = {(row["setting"], row["arm"]): row for row in records(frame)}
    diverging = any((i, arm) in told for _, i in values for arm in sweep.arms.values())

    def tile(i: int, arm: str) -> Tile:
        if diverging:
            row = told.get((i, arm))
            if row is None:
                return Tile(math.nan, "")
            mark = f" {sign(row['caution'])}".rstrip()
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
        marks = {"n.s.": "not significantly different from the baseline", "†": "not tested"}
        drawn = [t.text for row in grid for t in row]
        caption += "".join(
            f" {mark}: {words}." for mark, words in marks.items() if any(mark in t for t in drawn)
        )
        caption += " Blue-green is above the baseline, orange below."
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
    line = seeds_line(results, measure, key, look, at)
    if len(line.x) < 2:
        return []
    bases = {results.against.get(arm) for arm in sweep.arms.values()} - {None, *sweep.arms.values()}
    base = next(iter(bases)) if len(bases) == 1 else None
    level = None
    if base is not None:
        level = seeds_line(results, measure, base, results.looks[base], [(0.0, setting, base)])
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
