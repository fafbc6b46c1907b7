"""How well measures that need no labels rank the runs of a benchmark whose labels are known.

    iecl-solo benchmark --config-name methods preset=smoke evaluation.measures=[label_free]
    python studies/label_free_ranking.py benchmark/methods-smoke

prints Spearman's rank correlation of each label-free measure with the k-NN accuracy (or
``--against`` another), over all finished runs of one data set: arms and seeds together. Where low
is better by the measure's definition the sign is turned, so that +1 is always a perfect ranking;
alpha-ReQ counts by its distance from 1. The p-value is that of no association; runs of one arm
are not independent, so that it flatters.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import spearmanr

from iecl_solo.errors import IECLError
from iecl_solo.experiments.store import STORE, Store, read_rows

#: What makes each measure grow with what its authors call better (ours for the entropies).
GOOD = {
    "rankme": lambda x: x,
    "lidar": lambda x: x,
    "alpha_req": lambda x: -(x - 1).abs(),
    "uniformity": lambda x: -x,
    "alignment": lambda x: -x,
    "query_entropy": lambda x: x,
    "entropy_query_knn": lambda x: x,
    "effective_rank": lambda x: x,
}


def finished_rows(path: Path) -> list[dict[str, Any]]:
    """The finished rows of a benchmark's folder, or of its rows.csv."""
    if path.is_file():
        return read_rows(path)[1]
    inside = path / STORE
    rows = Store(inside if inside.is_dir() else path, create=False).rows()
    return [row for row in rows if row["status"] == "done"]


def ranking(rows: list[dict[str, Any]], against: str = "knn_acc1") -> pd.DataFrame:
    """One row a data set and measure: ``runs``, ``rho``, ``p``.

    Raises:
        IECLError: no run has both the accuracy and a label-free measure.
    """
    frame = pd.DataFrame([{"data": row["data"], **row["metrics"]} for row in rows])
    there = [m for m in GOOD if m in frame]
    if against not in frame or not there:
        raise IECLError(
            f"no finished run has {against} and a label-free measure ({', '.join(GOOD)}); "
            "evaluation.measures=[label_free] measures them"
        )
    found = []
    for data, group in frame.groupby("data"):
        for measure in there:
            both = group[[measure, against]].dropna()
            rho = p = math.nan
            if len(both) > 2:
                rho, p = spearmanr(GOOD[measure](both[measure]), both[against])
            found.append({"data": data, "measure": measure, "runs": len(both), "rho": rho, "p": p})
    return pd.DataFrame(found)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("store", type=Path, help="a benchmark's folder, or its rows.csv")
    parser.add_argument("--against", default="knn_acc1", help="the accuracy")
    args = parser.parse_args()
    table = ranking(finished_rows(args.store), args.against)
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
