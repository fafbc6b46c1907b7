"""``iecl-solo compare``: a method and its twin, same seed, same batches, one table."""

from __future__ import annotations

import copy
import multiprocessing
import shlex
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from iecl_solo.benchmark.report import write_report
from iecl_solo.benchmark.run import training_curves
from iecl_solo.benchmark.store import STORE, Store
from iecl_solo.cli.pretrain import pretrain
from iecl_solo.cli.quiet import quiet
from iecl_solo.cli.runs import Run, read_json
from iecl_solo.errors import IECLError
from iecl_solo.evaluate.load import load_method, read_pretrained
from iecl_solo.evaluate.pictures import is_term, plot_curves, plot_saib, read_metrics
from iecl_solo.evaluate.protocol import EvaluationConfig
from iecl_solo.evaluate.run import EVALUATION, evaluate
from iecl_solo.registry import (
    check_method,
    choose_objectives,
    complete_objective,
    split_method,
)
from iecl_solo.solo.build import build_model
from iecl_solo.solo.config import parse_block, plain
from iecl_solo.solo.data import pretrain_loader
from iecl_solo.solo.host import find_host
from iecl_solo.solo.settings import prepare_pretrain, require
from iecl_solo.solo.wrapper import objectives


def twins(cfg: DictConfig) -> tuple[DictConfig, DictConfig]:
    """The baseline's and the twin's configuration; all but the objectives is shared.

    The twin carries what the method's name says, and IE-CL if it says nothing.
    """
    require(cfg, ["method"])
    carried, _ = split_method(cfg.method)
    both = []
    for names in ([], carried or ["iecl"]):
        own = copy.deepcopy(cfg)
        OmegaConf.set_struct(own, False)
        own.objectives = names
        choose_objectives(own)
        own.pop("evaluation", None)
        both.append(own)
    return both[0], both[1]


def _train_and_evaluate(settings: dict[str, Any], evaluation: dict[str, Any]) -> None:
    cfg = OmegaConf.create(settings)
    assert isinstance(cfg, DictConfig)
    run = pretrain(cfg)
    evaluate(run, parse_block("evaluation", EvaluationConfig, evaluation))


def _child(target: Callable[..., None], args: tuple[Any, ...], errors: Any) -> None:
    quiet()
    try:
        target(*args)
    except IECLError as error:
        errors.put(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        errors.put(traceback.format_exc())
        sys.exit(1)


def in_own_process(target: Callable[..., None], *args: Any) -> None:
    """Run ``target`` in a fresh process, so that its peak memory is its own.

    Raises:
        IECLError: what went wrong there.
    """
    context = multiprocessing.get_context("spawn")
    errors = context.Queue()
    process = context.Process(target=_child, args=(target, args, errors))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.join()
        raise
    if process.exitcode == 130:
        raise KeyboardInterrupt
    if process.exitcode:
        raise IECLError(errors.get(timeout=5) if not errors.empty() else "the run was killed")


def table(runs: list[Run]) -> pd.DataFrame:
    """One row a run, baseline first: accuracy, loss terms, cost, entropy."""
    rows = []
    carried, _ = split_method(runs[-1].args["method"])
    entropy = "H(Z') nats" if "iecl" in carried else "H(Z) nats"
    for run in runs:
        result, scores = run.result, read_json(run.folder / EVALUATION)["metrics"]
        assert result is not None
        terms = {
            k.removeprefix("train_").removesuffix("_epoch"): v
            for k, v in result["metrics"].items()
            if is_term(k)
        }
        rows.append(
            {
                "method": result["method"],
                "k-NN %": scores["knn_acc1"],
                "linear %": scores["linear_acc1"],
                entropy: scores["query_entropy"],
                **terms,
                "s/step": result["seconds_per_step"],
                "peak MB": result["peak_memory_bytes"] / 2**20,
                "parameters": result["parameters"],
            }
        )
    return pd.DataFrame(rows).set_index("method")


def _cell(column: str, value: float) -> str:
    if pd.isna(value):
        return "-"
    if column == "parameters":
        return f"{int(value):,}"
    return f"{value:.0f}" if column == "peak MB" else f"{value:.4g}"


def show(frame: pd.DataFrame, title: str) -> None:
    """The table on screen: measures down, methods across, the ratio last."""
    view = Table(title=title, title_justify="left")
    view.add_column("")
    for method in frame.index:
        view.add_column(str(method), justify="right")
    view.add_column("difference", justify="right")
    baseline, twin = frame.iloc[0], frame.iloc[1]
    for column in frame.columns:
        a, b = baseline[column], twin[column]
        if column.endswith("%"):
            change = f"{b - a:+.2f} points"
        elif pd.isna(a) or pd.isna(b):
            change = ""
        elif column.startswith("H("):
            change = f"{b - a:+.3g}"
        else:
            change = f"x {b / a:.3f}"
        view.add_row(column, _cell(column, a), _cell(column, b), change)
    Console(width=None if sys.stdout.isatty() else 100).print(view)


def verdict(frame: pd.DataFrame) -> str:
    """One honest sentence: which is ahead, and that one seed does not decide."""
    parts = []
    for column in ("k-NN %", "linear %"):
        change = float(frame[column].iloc[1] - frame[column].iloc[0])
        by = f" by {abs(change):.2f} points" if change else ""
        word = "ahead of" if change > 0 else "behind" if change < 0 else "level with"
        parts.append(f"{word} the baseline{by} ({column.split()[0]})")
    return f"{frame.index[1]} is {' and '.join(parts)}; one seed, so no significance is claimed."


def _pictures(runs: list[Run], names: list[str], folder: Path) -> None:
    plot_curves(
        {n: read_metrics(r.folder) for n, r in zip(names, runs, strict=True)},
        folder / "curves.png",
    )
    host = find_host()
    pretrained = read_pretrained(runs[1].checkpoint)
    objective: Any = objectives(load_method(pretrained, host).eval()).get("iecl")
    if objective is None or objective.saib is None:
        return
    torch.manual_seed(pretrained.cfg.seed)
    _, views, _ = next(iter(pretrain_loader(pretrained.cfg, host)))
    query = views[objective.views.query[0]][:8]
    with torch.no_grad():
        plot_saib(query, objective.saib(query), folder / "saib.png")


def _command() -> str | None:
    """The command line that Hydra was given."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    name = str(hydra.job.config_name).removeprefix("pretrain/")
    return shlex.join(["iecl-solo", "compare", "--config-name", name, *hydra.overrides.task])


def _report(runs: list[Run], title: str, folder: Path) -> Path:
    """The same page that a benchmark ends with, of this one pair."""
    (folder / STORE).unlink(missing_ok=True)  # it is made of what the runs keep
    store = Store(folder / STORE)
    methods = [str(run.args["method"]) for run in runs]
    seed = runs[0].args["seed"]
    store.begin(
        {
            "name": title,
            "question": f"What does {methods[1]} change about {methods[0]}?",
            "measures": ["knn_acc1", "linear_acc1", "query_entropy"],
            "arms": {method: {"method": method} for method in methods},
            "axes": {},
            "seeds": [seed],
            "settings": {},
            "published": [],
            "command": _command(),
            "cells": methods,
        }
    )
    for run, method, against in zip(runs, methods, [None, methods[0]], strict=True):
        assert run.result is not None
        row = {"id": method, "data": run.args["data"]["dataset"], "arm": method, "axes": {}}
        store.claim({**row, "method": method, "against": against, "seed": seed})
        about = {name: run.result[name] for name in ("seconds", "device", "versions")}
        measures = read_json(run.folder / EVALUATION)["metrics"]
        store.finish(method, measures, training_curves(run), config=run.args, **about)
    return write_report(store, folder)


def compare(cfg: DictConfig) -> pd.DataFrame:
    """Train, evaluate and tabulate a method and its twin; what is done already is not redone.

    Args:
        cfg: a pretraining configuration of either, and optionally ``evaluation:`` and
            ``compare.dir``.

    Returns:
        The table, one row a method.

    Raises:
        IECLError: one line for whatever the configuration gets wrong.
    """
    OmegaConf.set_struct(cfg, False)
    protocol = parse_block("evaluation", EvaluationConfig, cfg.get("evaluation"))
    require(cfg, ["method", "data.dataset", "data.val_path"])
    choose_objectives(cfg)
    check_method(cfg.method)
    both = twins(cfg)
    title = str(both[0].get("name") or both[0].method)
    folder = Path(OmegaConf.select(cfg, "compare.dir") or Path("compare") / title)
    host = find_host()
    runs, given = [], []
    for own in both:
        check_method(own.method)
        own.pop("compare", None)
        own.checkpoint = {"enabled": True, "dir": str(folder / "runs"), "frequency": 1}
        own.name = own.method
        raw = plain(own)
        own = prepare_pretrain(own, host)
        complete_objective(own)
        build_model(copy.deepcopy(own), host)  # both are refused before either is trained
        runs.append(Run(own))
        given.append(raw)
    for raw in given:
        in_own_process(_train_and_evaluate, raw, asdict(protocol))
    frame = table(runs)
    carried, _ = split_method(both[1].method)
    # one baseline, and a report for each twin that it is compared with
    report = folder if carried == ["iecl"] else folder / "_".join(carried)
    report.mkdir(parents=True, exist_ok=True)
    frame.to_csv(report / "table.csv")
    _pictures(runs, [own.method for own in both], report)
    seed = runs[0].args["seed"]
    show(frame, f"{title}, {cfg.max_epochs} epochs, seed {seed}, {host.describe()}")
    print(verdict(frame))
    written = [n for n in ("table.csv", "curves.png", "saib.png") if (report / n).is_file()]
    page = _report(runs, title, report)
    print(f"report: {page} ({', '.join(written)} beside it)")
    return frame


def main(cfg: DictConfig) -> None:
    """What the command does with the composed configuration."""
    compare(cfg)
