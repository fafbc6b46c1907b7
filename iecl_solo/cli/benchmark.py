"""``iecl-solo benchmark``: a grid of runs on Hydra's launchers, one store, one report."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from iecl_solo.cli.hydra_app import run as run_hydra
from iecl_solo.evaluate.protocol import EvaluationConfig
from iecl_solo.experiments.cell import find_cell, run_cell
from iecl_solo.experiments.grid import (
    BenchmarkConfig,
    Cell,
    cells,
    configuration,
    read_benchmark,
    write_data,
)
from iecl_solo.experiments.store import STORE, Store
from iecl_solo.report.page import write_report
from iecl_solo.solo.config import parse_block, plain
from iecl_solo.solo.host import find_host
from iecl_solo.train.complete import complete

_WHAT = "run a grid of methods, data sets, batch sizes and seeds, and report it"
# what the first pass, which only looks, leaves for the command
_planned: list[BenchmarkConfig] = []


def check(benchmark: BenchmarkConfig) -> None:
    """Refuse in one line what would make every cell of an arm fail, before any is run."""
    parse_block("evaluation", EvaluationConfig, benchmark.evaluation)
    write_data(benchmark)
    host = find_host()
    seen = set()
    for cell in cells(benchmark):
        if (cell.arm, cell.data) not in seen:
            seen.add((cell.arm, cell.data))
            complete(configuration(benchmark, cell), host)


def take_gpu(number: int) -> None:
    """Let this worker see one GPU of the machine's, the ``number``-th in turn.

    Lightning would take the first one in every worker. Nothing is done where CUDA runs already, as
    in a worker's second cell, or where there is one GPU at most.
    """
    count = torch.cuda.device_count()
    if count < 2 or torch.cuda.is_initialized():
        return
    given = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    visible = given.split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)]


def main(cfg: DictConfig) -> None:
    """What each of Hydra's jobs does: look at the whole grid, or run the cell it is given."""
    benchmark = read_benchmark(cfg)
    if benchmark.cell is None:
        check(benchmark)
        _planned.append(benchmark)
        return
    hydra = HydraConfig.get()
    if "joblib" in hydra.launcher._target_.lower():  # the other launchers give each job its own
        take_gpu(hydra.job.num)
    run_cell(benchmark, find_cell(benchmark, benchmark.cell))


def _begin(benchmark: BenchmarkConfig, store: Store, arguments: list[str]) -> None:
    meta: dict[str, Any] = {
        name: plain(getattr(benchmark, name))
        for name in (
            *("name", "preset", "question", "kind", "measures", "settings", "arms", "axes"),
            *("data", "seeds", "published", "evaluation"),
        )
    }
    # a YAML of one's own need not have presets, and is then not "the paper's"
    meta["preset"] = benchmark.preset if benchmark.presets else None
    meta["command"] = shlex.join(["iecl-solo", "benchmark", *arguments])
    meta["cells"] = [cell.id for cell in cells(benchmark)]
    store.begin(meta, fixed=("name", "preset", "kind"))


def _waves(benchmark: BenchmarkConfig) -> tuple[list[Cell], list[Cell]]:
    """Cells that need no other, and those that need one of them."""
    grid = cells(benchmark)
    return [c for c in grid if c.source is None], [c for c in grid if c.source is not None]


def _launch(benchmark: BenchmarkConfig, wanted: Sequence[Cell], arguments: list[str]) -> None:
    folder = Path(str(benchmark.dir)).resolve()
    listed = ",".join(cell.id for cell in wanted)
    run_hydra(
        "benchmark",
        __name__,
        "benchmark",
        _WHAT,
        [
            *arguments,
            "--multirun",
            f"++cell={listed}",
            f"++dir={folder}",
            f"hydra.sweep.dir={folder / 'hydra'}",
            "hydra.sweep.subdir=${hydra.job.num}",
        ],
    )


def run(given: list[str]) -> int:
    """Run what is missing of the grid, then report.

    Args:
        given: ``--config-name NAME``, and KEY=VALUE in Hydra's grammar.

    Returns:
        0 if every cell is done, 1 if some failed (the report says which, and why).

    Raises:
        IECLError: one line for whatever the benchmark's configuration gets wrong.
    """
    _planned.clear()
    # any key of a benchmark may be given, whether its YAML has it or not
    own = {f.name for f in fields(BenchmarkConfig)}
    arguments = [f"++{a}" if re.split(r"[.=]", a)[0] in own else a for a in given]
    run_hydra("benchmark", __name__, "benchmark", _WHAT, arguments)
    if not _planned:  # --help, --cfg
        return 0
    benchmark = _planned[0]
    store = Store(Path(str(benchmark.dir)) / STORE)
    _begin(benchmark, store, given)
    for wave in _waves(benchmark):
        done = store.done()
        wanted = [cell for cell in wave if cell.id not in done]
        if wanted:
            print(f"{benchmark.name}: {len(wanted)} of {len(wave)} cells to run", flush=True)
            _launch(benchmark, wanted, arguments)
    page = write_report(store, store.path.parent)
    rows = store.cells()
    failed = rows[(rows["status"] == "failed") & rows["id"].isin(c.id for c in cells(benchmark))]
    for row in failed.itertuples():
        print(f"failed: {row.id}: {str(row.error).strip().splitlines()[-1]}", file=sys.stderr)
    print(f"store: {store.path}\nreport: {page}")
    return 1 if len(failed) else 0
