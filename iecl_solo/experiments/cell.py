"""One cell of a benchmark: claimed, trained, evaluated, recorded."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from iecl_solo.devices import cuda_or_cpu
from iecl_solo.errors import IECLError, last_line, unknown_name
from iecl_solo.evaluate.load import load_method, read_pretrained
from iecl_solo.evaluate.protocol import EvaluationConfig
from iecl_solo.evaluate.run import EVALUATION, evaluate
from iecl_solo.experiments.cost import measure_cost
from iecl_solo.experiments.grid import BenchmarkConfig, Cell, cells, configuration
from iecl_solo.experiments.store import STORE, Store
from iecl_solo.experiments.throughput import measure_throughput
from iecl_solo.files import read_json
from iecl_solo.saib import BaseSAIB, save_saib
from iecl_solo.solo.config import parse_block, plain
from iecl_solo.solo.host import Host, find_host
from iecl_solo.solo.wrapper import transforming
from iecl_solo.train.callbacks.terminal import duration
from iecl_solo.train.fit import pretrain
from iecl_solo.train.logs import training_curves
from iecl_solo.train.run import ARGS, RESULT, Run, versions
from iecl_solo.train.stop import noticed


def _prepare(benchmark: BenchmarkConfig, cell: Cell) -> Any:
    folder = Path(str(benchmark.dir))
    cfg = configuration(benchmark, cell)
    cfg.name = cell.id
    cfg.checkpoint = checkpointing(cfg, folder)
    if OmegaConf.select(cfg, "monitor.share") is None:  # rows do not depend on the clock
        OmegaConf.update(cfg, "monitor.share", 1.0, force_add=True)
    if cell.source is not None:
        sibling = find_cell(benchmark, cell.source)
        file = folder / "runs" / sibling.method / sibling.id / "saib.safetensors"
        if not file.is_file():
            raise IECLError(f"the SAIB of {cell.source} is not there: that cell failed")
        prob = benchmark.arms[cell.arm]["saib_from"].get("prob", 0.5)
        for augmentation in cfg.augmentations:
            augmentation.saib = {"file": str(file), "prob": prob}
    return cfg


def checkpointing(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """The ``checkpoint:`` block of a run that is one of several: how often and how many are kept
    is its own, the rest the experiment's."""
    own = plain(cfg.get("checkpoint")) or {}
    given = {key: own[key] for key in ("every_n_steps", "keep") if key in own}
    return {"enabled": True, "dir": str(folder / "runs"), "frequency": 1, **given}


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads of torch's; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _row_of(run: Run) -> dict[str, Any]:
    """A trained cell's row, made of what its run's folder holds."""
    assert run.result is not None
    return {
        "metrics": read_json(run.folder / EVALUATION)["metrics"],
        "curves": training_curves(run),
        **{name: run.result[name] for name in ("seconds", "device", "versions")},
        "config": run.args,
    }


def _train(benchmark: BenchmarkConfig, cell: Cell, host: Host) -> dict[str, Any]:
    run = pretrain(_prepare(benchmark, cell))
    if any(other.source == cell.id for other in cells(benchmark)):
        trained = transforming(load_method(read_pretrained(run.checkpoint), host))
        if trained is None or not isinstance(trained.transformer, BaseSAIB):
            raise IECLError(f"saib_from: {cell.id} was trained without a SAIB")
        save_saib(trained.transformer, run.folder / "saib.safetensors")
    evaluate(run, parse_block("evaluation", EvaluationConfig, benchmark.evaluation))
    return _row_of(run)


def recover(benchmark: BenchmarkConfig, store: Store) -> int:
    """Make the rows anew of all runs that are trained and evaluated, and count them.

    A run is a cell's if it has the cell's id, which differs whenever a setting does.
    """
    if benchmark.kind != "training":
        return 0
    protocol = asdict(parse_block("evaluation", EvaluationConfig, benchmark.evaluation))
    found, done, command = 0, store.done(), store.meta().get("command")
    for cell in cells(benchmark):
        folder = Path(str(benchmark.dir)) / "runs" / cell.method / cell.id
        if cell.id in done or not all((folder / f).is_file() for f in (ARGS, RESULT, EVALUATION)):
            continue
        if read_json(folder / EVALUATION)["protocol"] != protocol:
            continue
        args = read_json(folder / ARGS)
        args.pop("versions", None)  # the result has them
        args["checkpoint"]["dir"] = str(folder.parent.parent)  # it may have been moved
        cfg = OmegaConf.create(args)
        assert isinstance(cfg, DictConfig)
        if store.claim(cell.row()):
            store.finish(cell.id, command=command, **_row_of(Run(cfg)))
            found += 1
    return found


def _cost(benchmark: BenchmarkConfig, cell: Cell, host: Host) -> dict[str, Any]:
    cfg = configuration(benchmark, cell)
    baseline = None
    if cell.against is not None:
        (other,) = [
            c
            for c in cells(benchmark)
            if (c.arm, c.data, c.axes, c.seed) == (cell.against, cell.data, cell.axes, cell.seed)
        ]
        baseline = configuration(benchmark, other)
    device = cuda_or_cpu()
    measures = measure_cost(cfg, baseline, host, rounds=benchmark.rounds, device=device)
    about = {"device": device, "config": plain(cfg), "versions": versions(host)}
    return {"metrics": measures, **about}


def _throughput(benchmark: BenchmarkConfig, cell: Cell, host: Host) -> dict[str, Any]:
    cfg = configuration(benchmark, cell)
    threads = int(cfg.get("threads") or torch.get_num_threads())
    start = cell.data == next(iter(benchmark.data))  # it is of the pipeline, not of the network
    measures = measure_throughput(
        cfg, cell.arm, host, rounds=benchmark.rounds, threads=threads, start=start
    )
    about = {"device": "cpu", "config": plain(cfg), "versions": versions(host)}
    return {"metrics": measures, **about}


_KINDS = {"training": _train, "cost": _cost, "throughput": _throughput}


def _progress(benchmark: BenchmarkConfig, cell: Cell, store: Store) -> str:
    """Which cell of how many, and how long the rest takes if it takes as long as those before."""
    grid = [c.id for c in cells(benchmark)]
    rows = [row for row in store.rows() if row["id"] in grid]
    walls = [row["wall"] for row in rows if row["status"] == "done" and row.get("wall")]
    left = len(grid) - sum(row["status"] == "done" for row in rows)
    at_once = max(1, sum(row["status"] == "running" for row in rows))
    words = f"cell {grid.index(cell.id) + 1} of {len(grid)}  {cell.id}"
    if walls:
        words += f"  (about {duration(sum(walls) / len(walls) * left / at_once)} left)"
    return words


def run_cell(benchmark: BenchmarkConfig, cell: Cell) -> bool:
    """Run a cell unless it is done or somebody else runs it; a failure is recorded, not raised.

    Args:
        benchmark: as ``read_benchmark`` gave it.
        cell: one of ``cells(benchmark)``.

    Returns:
        Whether the cell is done now.
    """
    store = Store(Path(str(benchmark.dir)) / STORE)
    if not store.claim(cell.row()):
        return cell.id in store.done()
    print(_progress(benchmark, cell, store), flush=True)
    start = time.perf_counter()
    with noticed():  # in its evaluation too; training takes more signals
        try:
            with _threads(benchmark.threads):
                host = find_host()
                row = _KINDS[benchmark.kind](benchmark, cell, host)
            command = store.meta().get("command")
            store.finish(cell.id, command=command, wall=time.perf_counter() - start, **row)
        except KeyboardInterrupt:  # the run is saved; whoever is next goes on with it
            store.release(cell.id)
            raise
        except Exception as error:  # the other cells go on
            why = str(error) if isinstance(error, IECLError) else traceback.format_exc()
            store.fail(cell.id, why)
            print(f"failed: {cell.id}: {last_line(error)}", flush=True)
        else:
            store.export()
            return True
    return False


def find_cell(benchmark: BenchmarkConfig, name: str) -> Cell:
    """Raises: IECLError, with the nearest id, if the grid has no such cell."""
    for cell in cells(benchmark):
        if cell.id == name:
            return cell
    raise unknown_name("cell", name, [c.id for c in cells(benchmark)])
