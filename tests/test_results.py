"""The figures of docs/studies.md are those of the rows that are committed beside it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from iecl_solo.report.statistics import paired_difference

DOCS = Path(__file__).parents[1] / "docs"


def written(values: pd.Series, baseline: pd.Series | None) -> list[str]:
    """The cells of a table for an arm's values by seed: they, and their difference."""
    cells = [", ".join(f"{value:.2f}" for value in values)]
    if baseline is None:
        return cells
    difference = paired_difference(values, baseline[values.index])
    cells.append(f"{difference.mean:+.1f}")
    if difference.n > 1:
        cells[-1] += f" ({difference.low:+.1f} to {difference.high:+.1f}), p {difference.p:.2g}"
    return cells


@pytest.mark.parametrize(
    ("study", "section", "measures"),
    [
        (
            "small_batch",
            "SimCLR and IE-CL on all of CIFAR-10",
            ("knn_acc1", "linear_acc1", "online_acc1", "query_entropy", "effective_rank"),
        ),
        ("input_entropy", "The study of the input terms", ("knn_acc1", "linear_acc1")),
        ("hosts", "Other methods with strong augmentations", ("knn_acc1", "linear_acc1")),
        ("few_augmentations", "Other methods with crop and flip", ("knn_acc1", "linear_acc1")),
        (
            "drawings",
            "A second data set",
            ("knn_acc1", "linear_acc1", "same_object_recall_at_1", "dense_miou", "effective_rank"),
        ),
        (
            "carried_over",
            "CIFAR-10's backbones on the drawings",
            ("knn_acc1", "linear_acc1", "same_object_recall_at_1", "dense_miou"),
        ),
    ],
)
def test_tables_are_their_rows(study: str, section: str, measures: tuple[str, ...]):
    page = (DOCS / "studies.md").read_text().replace("−", "-").replace("**", "")
    (text,) = (x for x in page.split("\n## ") if x.startswith(f"{section}\n"))
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    rows = pd.read_csv(DOCS / f"rows/{study}.csv", skiprows=1)
    baselines = rows.dropna(subset="against").groupby("arm")["against"].first()
    rows = rows.pivot(index=["data", "arm", "seed"], columns="measure", values="value")
    for data in rows.index.unique("data"):
        for arm in rows.loc[data].index.unique("arm"):
            for measure in measures:
                baseline = baselines.get(arm)
                without = None if baseline is None else rows.loc[(data, baseline), measure]
                cells = written(rows.loc[(data, arm), measure], without)
                assert any(set(cells) <= set(line) for line in lines), (data, arm, measure, cells)
