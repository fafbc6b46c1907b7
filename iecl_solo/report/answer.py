"""A report's first sentence: what the seeds show, and nothing beyond it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from iecl_solo.report.results import (
    BATCH_SIZE,
    Results,
    cost_rows,
    count,
    groups,
    listed,
    records,
    slopes,
)
from iecl_solo.report.statistics import (
    MIN_SEEDS,
    Difference,
    amount,
    caution,
    corrected,
    detectable_difference,
    difference_of,
    paired_difference,
    pairs,
    sign,
    summarize,
    summary_table,
)
from iecl_solo.report.tables import (
    better,
    difference_unit,
    interval,
    is_cost,
    name,
    number,
    p_value,
    unit,
)

#: What step time and peak memory may be of the baseline's.
BAR = 1.05


def state(results: Results) -> str:
    """How much of the grid is there, in words; empty when all of it is."""
    n = Counter(results.cells["status"])
    total = len(results.cells) + len(results.missing)
    if n["done"] == total:
        return ""
    parts = [f"{n['done']} of {count(total, 'run')} done"]
    parts += [f"{n['failed']} failed"] if n["failed"] else []
    parts += [f"{n['running']} running or interrupted"] if n["running"] else []
    parts += [f"{len(results.missing)} not started"] if results.missing else []
    return ", ".join(parts)


class Compared(NamedTuple):
    """An arm's difference from the one that it is against, over so many settings; Holm's p."""

    arm: str
    against: str
    settings: int
    difference: Difference
    p: float


def overall(results: Results, measure: str) -> list[Compared]:
    """Each arm's difference over all settings: each seed's mean over settings, then over seeds.

    A seed counts if it has every setting that the arm has.
    """
    both = pairs(results.of(measure), ["setting"])
    found: list[tuple[str, str, int, Difference]] = []
    for (arm, other), group in both.groupby(["arm", "against"], sort=False):
        wide = group.assign(d=group["value"] - group["baseline"])
        wide = wide.pivot_table(index="seed", columns="setting", values="d").dropna()
        per_seed = wide.mean(axis=1).to_numpy()
        difference = paired_difference(per_seed, np.zeros(len(per_seed)))
        found.append((str(arm), str(other), wide.shape[1], difference))
    if found:  # an arm that has no pair yet is named beside those that have
        without = [arm for arm in results.arms if arm not in {row[0] for row in found}]
        none = paired_difference([], [])
        found += [(a, str(b), 0, none) for a in without if (b := results.against.get(a))]
    found.sort(key=lambda row: results.arms.index(row[0]))
    p_values = corrected([difference for *_, difference in found])
    return [Compared(*row, p) for row, p in zip(found, p_values, strict=True)]


def _amount(measure: str, difference: Difference) -> str:
    of_unit = f" {difference_unit(measure)}" if unit(measure) else ""
    words = f"{number(measure, difference.mean, difference.sd, sign=True)}{of_unit}"
    if math.isfinite(difference.low):
        words += f" (95 % interval {interval(measure, difference, sign=True)})"
    return words


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p_value(p)}"


def _called(arm: str) -> str:
    return f"“{arm}”" if "," in arm else arm


def _over(settings: int) -> str:
    return f", averaged over {settings} settings" if settings > 1 else ""


def _standing(measure: str, mean: float) -> str:
    """Where a difference puts an arm: neither side is "ahead" where neither is better."""
    side = better(measure)
    if not side:
        return "above" if mean > 0 else "below"
    return "ahead of" if side * mean > 0 else "behind"


def _why_untested(differences: Sequence[Difference]) -> str:
    """Why no one of them was tested, in words."""
    few = any(difference.n < MIN_SEEDS for difference in differences)
    same = any(difference.n >= MIN_SEEDS for difference in differences)
    return " or ".join(["too few to test"] * few + ["the same difference at every one"] * same)


def _answer_of_one(measure: str, row: Compared) -> str:
    arm, other, settings, difference, p = row
    seeds = count(difference.n, "seed")
    if not difference.n:
        return f"No seed of {arm} and {other} has every setting yet."
    if sign(caution(difference, p)) == "†":
        return (
            f"Not tested ({seeds}, {_why_untested([difference])}): in {name(measure)} {arm} is "
            f"{_amount(measure, difference)} from {other}{_over(settings)}."
        )
    if caution(difference, p):
        least = detectable_difference(difference.n, difference.sd)
        return (
            f"{arm} is not significantly different from {other} in {name(measure)}: "
            f"{_amount(measure, difference)}{_over(settings)}; {seeds}, paired t, {_p(p)}, minimum "
            f"detectable difference {amount(least, difference_unit(measure))} at 80 % power."
        )
    return (
        f"{arm} is {_standing(measure, difference.mean)} {other} in {name(measure)} by "
        f"{_amount(measure, difference)}{_over(settings)}; {seeds}, paired t, {_p(p)}."
    )


def _answer_of_many(measure: str, rows: Sequence[Compared]) -> str:
    there = [row for row in rows if row.difference.n]
    if not there:
        return "No seed of an arm and its baseline has every setting yet."
    marks = [sign(caution(row.difference, row.p)) for row in rows]
    significant, rest, untested = (
        [row for row, its in zip(rows, marks, strict=True) if its == mark]
        for mark in ("", "n.s.", "†")
    )
    seeds = sorted({row.difference.n for row in rows})
    n = count(seeds[-1], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    largest = max(there, key=lambda row: abs(row.difference.mean))
    far = f"the largest difference is {_amount(measure, largest.difference)}, "
    far += _called(largest.arm) + _over(largest.settings)
    if len(untested) == len(rows):
        why = _why_untested([row.difference for row in rows])
        return f"Not tested ({n}, {why}): in {name(measure)} {far}."
    how = f"{n}, paired t, Holm-corrected"
    if not significant:
        finest = min(detectable_difference(row.difference.n, row.difference.sd) for row in rest)
        how += f"; minimum detectable difference {amount(finest, difference_unit(measure))} or more"
        how += " at 80 % power"
    if len(rest) == len(rows):
        return (
            f"None of {len(rows)} arms is significantly different from its baseline in "
            f"{name(measure)} ({how}); {far}."
        )
    bases = {row.against for row in rows}

    def from_(arms: Sequence[str]) -> str:
        if len(bases) == 1:
            return _called(next(iter(bases)))
        return "its baseline" if len(arms) == 1 else "their baselines"

    said: dict[str, list[str]] = {}
    for where in ("ahead of", "behind", "above", "below"):
        said[where] = [
            _called(row.arm)
            for row in significant
            if _standing(measure, row.difference.mean) == where
        ]
    said["not significantly different from"] = [_called(row.arm) for row in rest]
    parts = [
        f"{listed(arms)} {'is' if len(arms) == 1 else 'are'} {where} {from_(arms)}"
        for where, arms in said.items()
        if arms
    ]
    if untested:
        arms = [_called(row.arm) for row in untested]
        parts.append(f"{listed(arms)} {'is' if len(arms) == 1 else 'are'} not tested")
    return f"In {name(measure)}, {', '.join(parts)}; {far} ({how})."


def _by_setting(results: Results, measure: str, rows: Sequence[Compared]) -> str:
    """What is significant in a setting, of arms whose mean over all of them hides it."""
    hidden = [row.arm for row in rows if caution(row.difference, row.p)]
    if len(results.settings) < 2 or not hidden:
        return ""
    frame = results.differences[measure]
    found = [row for row in records(frame) if not row["caution"] and row["arm"] in hidden]
    if not found:
        return ""
    words = [
        f"{_called(row['arm'])} {_standing(measure, row['mean'])} {_called(row['against'])} by "
        f"{_amount(measure, difference_of(row))} ({results.setting_text(row['setting'])})"
        for row in sorted(found, key=lambda row: -abs(row["mean"]))
    ]
    tests = count(int(frame["p_holm"].notna().sum()), "comparison")
    return f" Setting by setting, Holm-corrected over {tests}: {listed(words, most=4)}."


def _trend(results: Results, measure: str, row: Compared) -> str:
    """What the batch size does to the only difference, where it is an axis."""
    if BATCH_SIZE not in results.axes:
        return ""
    slope = slopes(results, measure, groups(results, BATCH_SIZE)).get((row.arm, row.against))
    if slope is None:
        return ""
    why = caution(slope, slope.p)
    if sign(why) == "†":
        words = "whether that changes with the batch size is not tested"
    elif why:
        words = "it does not change significantly with the batch size"
    else:
        words = f"it {'rises' if slope.mean > 0 else 'falls'} with the batch size"
    return f"; {words}: {_amount(measure, slope)} per doubling"


def _answer_of_cost(results: Results) -> str:
    rows = cost_rows(results)
    arms = [arm for arm in results.arms if arm in {row["arm"] for row in rows}]
    worst = {
        arm: {
            key: max((r[key] for r in rows if r["arm"] == arm and r[key] == r[key]), default=None)
            for key in ("time_ratio", "memory_ratio")
        }
        for arm in arms
        if results.against.get(arm) is not None
    }
    words = []
    for arm, ratios in worst.items():
        parts = [
            f"{ratios[key]:.3f} × the {what}"
            for key, what in (("time_ratio", "step time"), ("memory_ratio", "peak memory"))
            if ratios[key] is not None
        ]
        above = any(ratio is not None and ratio > BAR for ratio in ratios.values())
        if parts:
            words.append(
                f"{_called(arm)} takes {' and '.join(parts)} ({'above' if above else 'within'})"
            )
    if not words:
        return "No ratio to a baseline has been measured."
    sentence = f"Against a bar of {BAR} × the baseline, {listed(words, most=8)}"
    return f"{sentence}; the largest over all settings and devices."


#: Embeddings have collapsed where their effective rank is below this share of the baseline's, or
#: where they have less than two dimensions (both ours).
COLLAPSED, FLAT = 0.25, 2.0


def collapses(results: Results) -> list[str]:
    """A sentence for each arm whose embeddings fill few dimensions, by the last effective rank."""
    found = []
    of_rank = results.of("effective_rank")
    for i in sorted(set(of_rank["setting"])):
        ranks = {a: summarize(results.values("effective_rank", i, a)).mean for a in results.arms}
        for arm, rank in ranks.items():
            other = results.against.get(arm)
            base = ranks.get(other, math.nan) if other is not None else math.nan
            if not (rank < FLAT or rank < COLLAPSED * base):
                continue
            where = results.setting_text(i, varying=True)
            words = f"{'Collapse' if rank < FLAT else 'Dimensional collapse'}: the embeddings of "
            words += f"{_called(arm)} have effective rank {rank:.3g}"
            words += f", {other}'s {base:.3g}" if math.isfinite(base) else ""
            found.append(f"{words}{f' ({where})' if where else ''}.")
    return found


def mixed(results: Results) -> list[str]:
    """A sentence where the finished runs are not of one solo-learn, or of one kind of device."""
    done = results.cells[results.cells["status"] == "done"]
    hosts = {
        str(v["solo-learn"]) for v in done["versions"] if isinstance(v, dict) and "solo-learn" in v
    }
    devices = {device for device in done["device"] if isinstance(device, str)}
    kinds = (("solo-learn", sorted(hosts)), ("devices", sorted(devices)))
    return [
        f"Runs of {len(them)} {'versions of ' * (what == 'solo-learn')}{what} are compared here "
        f"({', '.join(them)}): a difference between such runs need not be the arms'."
        for what, them in kinds
        if len(them) > 1 and not is_cost(results.primary or "")
    ]


def answer(results: Results) -> str:
    """One sentence, with its interval, that claims no more than the seeds show."""
    progress = state(results)
    done = int((results.cells["status"] == "done").sum())
    total = len(results.cells) + len(results.missing)
    so_far = f"So far ({done} of {count(total, 'run')}): " if progress else ""
    measure = results.primary
    if results.runs.empty or measure is None:
        return f"Nothing can be said yet: {progress or 'the store holds no run'}."
    if is_cost(measure):
        return so_far + _answer_of_cost(results)
    if results.of(measure).empty:
        return so_far + f"no run has measured {name(measure)}, which the question is about."
    if rows := overall(results, measure):
        if len(rows) == 1:
            sentence = _answer_of_one(measure, rows[0]).removesuffix(".")
            sentence += _trend(results, measure, rows[0]) + "."
        else:
            sentence = _answer_of_many(measure, rows)
        return so_far + sentence + _by_setting(results, measure, rows)
    table = summary_table(results.of(measure), ["setting"])
    table = table.dropna(subset=["mean"]).sort_values("mean")
    if table.empty:
        return so_far + f"no run has a finite {name(measure)}."
    best = table.iloc[-1]
    summary = summarize(results.values(measure, best["setting"], best["arm"]))
    where = f" (95 % interval {interval(measure, summary)})" if summary.n > 1 else ""
    return so_far + (
        f"no run and its baseline are both there, so no difference is tested; the highest "
        f"{name(measure)} is {number(measure, summary.mean, summary.sd)}{where}, {best['arm']}, "
        f"{count(summary.n, 'seed')}."
    )
