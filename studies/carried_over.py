"""What the backbones of one benchmark are worth on the images of another; none is trained again.

    python studies/carried_over.py benchmark/small_batch-cpu drawings --to benchmark/carried_over

Each finished run of the first benchmark is evaluated on the images, and by the protocol, of the
packaged benchmark that is named second (``configs/benchmark/``). The rows are those of a benchmark,
so ``iecl-solo report`` makes its page of them, with differences paired by seed. The same command
goes on where it stopped, and takes in runs that were added since.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from omegaconf import OmegaConf

from iecl_solo.errors import IECLError, unknown_name
from iecl_solo.evaluate.load import read_pretrained
from iecl_solo.evaluate.protocol import EvaluationConfig
from iecl_solo.evaluate.run import evaluate_on
from iecl_solo.experiments.store import STORE, Store
from iecl_solo.quiet import quiet
from iecl_solo.report.answer import answer
from iecl_solo.report.page import write_report
from iecl_solo.report.results import read
from iecl_solo.solo.config import parse_block, plain
from iecl_solo.solo.host import find_host
from iecl_solo.train.run import versions

CONFIGS = Path(__file__).parents[1] / "configs/benchmark"
#: What is measured in pretraining, not on the images here.
OF_PRETRAINING = ("query_entropy", "effective_rank", "online_acc1")


def carry_over(source: Path, name: str, to: Path) -> Store:
    """Evaluate the finished runs of ``source`` on the first data set of a packaged benchmark.

    Args:
        source: a benchmark's folder, with its runs.
        name: of the packaged benchmark whose images and protocol are taken.
        to: a benchmark's folder to write; rows that are there are not made again.
    """
    names = [path.stem for path in CONFIGS.glob("*.yaml")]
    if name not in names:
        raise unknown_name("benchmark", name, names)
    config = OmegaConf.load(CONFIGS / f"{name}.yaml")
    protocol = parse_block("evaluation", EvaluationConfig, config.evaluation)
    data = {"dataset": "custom", **plain(next(iter(config.data.values())).settings.data)}
    trained = Store(source / STORE, create=False)
    rows = [row for row in trained.rows() if row["status"] == "done"]
    rows.sort(key=lambda row: row["against"] is not None)  # baselines first
    known, store, host = trained.meta(), Store(to / STORE), find_host()
    # of the rows: a benchmark's folder knows of its last command alone
    store.begin(
        {
            "name": "carried_over",
            "preset": None,
            "question": f"What are the backbones of {known['name']} worth on the images of {name}?",
            "kind": "training",
            "measures": [m for m in plain(config.measures) if m not in OF_PRETRAINING],
            "settings": known["settings"],
            "arms": {row["arm"]: {"method": row["method"]} for row in rows},
            "axes": {key: sorted({row["axes"][key] for row in rows}) for key in known["axes"]},
            "data": {name: data},
            "seeds": sorted({row["seed"] for row in rows}),
            "evaluation": plain(config.evaluation),
            "command": f"python studies/carried_over.py {source} {name} --to {to}",
            "cells": [row["id"] for row in rows],
        },
        fixed=("name", "question"),
    )
    for row in rows:
        if not store.claim({**row, "data": name}):
            continue
        pretrained = read_pretrained(source / "runs" / row["method"] / row["id"])
        found = evaluate_on(pretrained, host, protocol, data)
        about = {key: row[key] for key in ("device", "seconds", "config")}
        store.finish(row["id"], found, versions=versions(host), **about)
        store.export()
    return store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, help="the folder of a benchmark that was run")
    parser.add_argument("name", help="of the packaged benchmark whose images judge")
    parser.add_argument("--to", type=Path, required=True, help="the folder to write")
    args = parser.parse_args()
    with quiet():
        store = carry_over(args.source, args.name, args.to)
        page = write_report(store, args.to)
    print(answer(read(store)))
    print(f"rows: {store.csv}  report: {page}")


if __name__ == "__main__":
    try:
        main()
    except IECLError as error:
        raise SystemExit(str(error)) from None
