"""One cell of a benchmark: claimed, trained, evaluated, recorded."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from iecl_solo.errors import IECLError, unknown_name
from iecl_solo.evaluate.load import load_method, read_pretrained
from iecl_solo.evaluate.protocol import EvaluationConfig
from iecl_solo.evaluate.run import evaluate
from iecl_solo.experiments.cost import measure_cost
from iecl_solo.experiments.grid import BenchmarkConfig, Cell, cells, configuration
from iecl_solo.experiments.store import STORE, Store
from iecl_solo.saib import SAIB, save_saib
from iecl_solo.solo.config import parse_block, plain
from iecl_solo.solo.host import Host, find_host
from iecl_solo.solo.wrapper import transforming
from iecl_solo.train.fit import pretrain
from iecl_solo.train.logs import training_curves
from iecl_solo.train.run import versions

# seconds between two signs of life
_BEAT = 60.0


@contextmanager
def _heartbeat(store: Store, cell: str) -> Iterator[None]:
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(_BEAT):
            store.beat(cell)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _prepare(benchmark: BenchmarkConfig, cell: Cell) -> Any:
    folder = Path(str(benchmark.dir))
    cfg = configuration(benchmark, cell)
    cfg.name = cell.id
    cfg.checkpoint = {"enabled": True, "dir": str(folder / "runs"), "frequency": 1}
    if cell.source is not None:
        sibling = find_cell(benchmark, cell.source)
        file = folder / "runs" / sibling.method / sibling.id / "saib.safetensors"
        if not file.is_file():
            raise IECLError(f"the SAIB of {cell.source} is not there: that cell failed")
        prob = benchmark.arms[cell.arm]["saib_from"].get("prob", 0.5)
        for augmentation in cfg.augmentations:
            augmentation.saib = {"file": str(file), "prob": prob}
    return cfg


def _train(
    benchmark: BenchmarkConfig, cell: Cell, host: Host
) -> tuple[dict[str, float], list[tuple[int, str, float]], dict[str, Any]]:
    run = pretrain(_prepare(benchmark, cell))
    if any(other.source == cell.id for other in cells(benchmark)):
        trained = transforming(load_method(read_pretrained(run.checkpoint), host))
        if trained is None or not isinstance(trained.transformer, SAIB):
            raise IECLError(f"saib_from: {cell.id} was trained without a SAIB")
        save_saib(trained.transformer, run.folder / "saib.safetensors")
    protocol = parse_block("evaluation", EvaluationConfig, benchmark.evaluation)
    measures = evaluate(run, protocol)
    assert run.result is not None
    about = {
        "seconds": run.result["seconds"],
        "device": run.result["device"],
        "config": run.args,
        "versions": run.result["versions"],
    }
    return measures, training_curves(run), about


def _cost(benchmark: BenchmarkConfig, cell: Cell, host: Host) -> tuple[dict[str, float], Any]:
    cfg = configuration(benchmark, cell)
    baseline = None
    if cell.against is not None:
        (other,) = [
            c
            for c in cells(benchmark)
            if (c.arm, c.data, c.axes, c.seed) == (cell.against, cell.data, cell.axes, cell.seed)
        ]
        baseline = configuration(benchmark, other)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measures = measure_cost(cfg, baseline, host, rounds=benchmark.rounds, device=device)
    return measures, {"device": device, "config": plain(cfg), "versions": versions(host)}


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
    if benchmark.threads is not None:
        torch.set_num_threads(benchmark.threads)
    print(f"cell {cell.id}", flush=True)
    try:
        with _heartbeat(store, cell.id):
            host = find_host()
            curves: list[tuple[int, str, float]] = []
            if benchmark.kind == "cost":
                measures, about = _cost(benchmark, cell, host)
            else:
                measures, curves, about = _train(benchmark, cell, host)
        store.finish(cell.id, measures, curves, command=store.meta().get("command"), **about)
    except IECLError as error:
        store.fail(cell.id, str(error))
    except Exception:  # the other cells go on
        store.fail(cell.id, traceback.format_exc())
    else:
        return True
    return False


def find_cell(benchmark: BenchmarkConfig, name: str) -> Cell:
    """Raises: IECLError, with the nearest id, if the grid has no such cell."""
    for cell in cells(benchmark):
        if cell.id == name:
            return cell
    raise unknown_name("cell", name, [c.id for c in cells(benchmark)])
