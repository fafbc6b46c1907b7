"""A benchmark's store read with pandas: the paired difference of two arms, by hand.

python examples/read_store.py benchmark/small_batch-smoke/rows
"""

import sys

import pandas as pd

from iecl_solo.experiments.store import Store


def paired(path: str, baseline: str, variant: str, measure: str) -> pd.DataFrame:
    """One row a seed (and axis): the measure of both arms, and their difference."""
    store = Store(path, create=False)
    cells, metrics = store.cells(), store.metrics()
    rows = cells.merge(metrics[metrics["name"] == measure], left_on="id", right_on="cell")
    known = {"id", "cell", "name", "value", "arm", "seed", "data"}
    axes = [c for c in rows.columns if c not in known and "." in str(c)]
    wide = rows.pivot_table(index=["data", *axes, "seed"], columns="arm", values="value")
    wide["difference"] = wide[variant] - wide[baseline]
    return wide[[baseline, variant, "difference"]]


def main(path: str) -> pd.DataFrame:
    table = paired(path, "simclr", "iecl_simclr", "knn_acc1")
    print(table.round(2))
    print(table["difference"].describe()[["count", "mean", "std"]].round(2))
    return table


if __name__ == "__main__":
    main(sys.argv[1])
