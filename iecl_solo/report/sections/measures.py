"""Each measure that the benchmark asks about: means, paired differences, forest plot."""

from __future__ import annotations

from functools import partial

import pandas as pd

from iecl_solo.report import figures
from iecl_solo.report.figures import Picture, Row, picture
from iecl_solo.report.results import Results, count, records, slug, text
from iecl_solo.report.section import MANY, Section, expand, setting_cells
from iecl_solo.report.statistics import MIN_SEEDS, difference_of, sign, summarize, summary_table
from iecl_solo.report.tables import (
    Cell,
    Table,
    better,
    difference_unit,
    heading,
    interval,
    is_cost,
    name,
    number,
    p_value,
    plus_minus,
    title,
    unit,
)

PLACE = 10

#: What is chosen on a split of the training images for a measure: where it is stored, its name,
#: and its grid in ``evaluation``.
_CHOSEN = {
    "linear_acc1": ("linear_lr", "learning rate", "linear", "lr"),
    "knn_acc1": ("knn_k", "number of neighbours", "knn", "k"),
}

#: More rows than this make a forest plot longer than a screen.
_FOREST = 16


def main_table(results: Results, measure: str) -> Table:
    """Mean ± standard deviation over seeds; arms across, or down where there are many."""
    runs = results.of(measure)
    settings = [i for i in range(len(results.settings)) if i in set(runs["setting"])]
    arms = [arm for arm in results.arms if arm in set(runs["arm"])]
    cautions = {
        (row["setting"], row["arm"]): row["caution"]
        for row in records(results.differences[measure])
    }
    summaries = {
        (i, arm): summarize(results.values(measure, i, arm)) for i in settings for arm in arms
    }
    n = max((summary.n for summary in summaries.values()), default=0)

    def best(i: int) -> str | None:
        """The arm to be set in bold: none unless its lead is significant."""
        there = [arm for arm in arms if summaries[i, arm].n]
        if better(measure) == 0 or len(there) < 2:
            return None
        first = max(there, key=lambda arm: better(measure) * summaries[i, arm].mean)
        compared = [first] if (i, first) in cautions else [a for a in there if (i, a) in cautions]
        if not compared or any(cautions[i, arm] for arm in compared):
            return None
        return first

    def entry(i: int, arm: str) -> Cell:
        summary = summaries[i, arm]
        if not summary.n:
            return Cell("–")
        mark = sign(cautions.get((i, arm), ""))
        return Cell(plus_minus(measure, summary, n), best(i) == arm, mark)

    if len(arms) > max(MANY, len(settings)):
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
    if any(best(i) for i in settings):
        extreme = "highest" if better(measure) > 0 else "lowest"
        caption += f" Bold: the {extreme} mean, where it differs significantly."
    marks = {sign(words) for words in cautions.values()}
    if "n.s." in marks:
        caption += (
            " n.s.: not significantly different from its baseline (paired t test, p ≥ 0.05 after "
            "Holm's correction)."
        )
    if "†" in marks:
        caption += (
            f" †: not tested against its baseline (fewer than {MIN_SEEDS} seeds, or the same "
            "difference at every seed)."
        )
    return Table(
        slug(measure), heading(title(measure)), caption, head, rows, align, expand(results, data)
    )


def differences_table(results: Results, measure: str) -> Table:
    """Each arm minus its baseline, in pairs, with what the seeds can say of it."""
    frame = results.differences[measure]
    tested = bool(frame["low"].notna().any())  # of one seed there is nothing to test
    rows = []
    for row in records(frame):
        difference = difference_of(row)
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
        direction = "higher" if difference.mean > 0 else "lower"
        entries.append(Cell(row["caution"] or f"significantly {direction}"))
        rows.append(entries)
    of_unit = f" ({difference_unit(measure)})" if unit(measure) else ""
    head = [*results.setting_head, "comparison", "n", f"difference{of_unit}"]
    caption = "Paired by seed: same initial weights, order of data and augmentations."
    if tested:
        tests = count(int(frame["p_holm"].notna().sum()), "comparison")
        head += ["95 % interval", "p", "p (Holm)"]
        caption += (
            " 95 % t interval; p of the paired t test, and after Holm's correction over "
            f"{tests}. Bold: corrected p < 0.05 with at least {MIN_SEEDS} "
            "seeds. The minimum detectable difference is what a test of as many seeds of this "
            "spread finds significant 4 times in 5."
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
    frame = results.differences[measure]
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
        "Mean paired difference and 95 % interval; filled where it is significant after Holm's "
        "correction, hollow where it is not; no line where there is no interval."
    )
    of_unit = f" ({difference_unit(measure)})" if unit(measure) else ""
    return picture(
        stem,
        f"Differences{of} in {name(measure)}" + (f", {setting}" if setting else ""),
        caption,
        partial(figures.forest, rows=rows, x=f"difference in {name(measure)}{of_unit}"),
        height=0.75 + 0.4 * len(rows),
        grid="x",
    )


def sections(results: Results) -> list[Section]:
    """One for each measure that the benchmark asks about, costs excepted."""
    return [measure_section(results, m) for m in results.measures if not is_cost(m)]


def measure_section(results: Results, measure: str) -> Section:
    """One measure: means, differences, forest plot."""
    tables: list[Table] = [main_table(results, measure)]
    pictures: list[Picture] = []
    differences = results.differences[measure]
    if len(differences):
        tables.append(differences_table(results, measure))
    if differences["low"].notna().any():
        pictures = forest_pictures(results, measure)
    return Section(
        slug(measure),
        heading(title(measure)),
        place=PLACE,
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
