"""A baseline and its variant: same seed, same batches, one table."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from iecl_solo.errors import IECLError
from iecl_solo.evaluate.load import load_method, read_pretrained
from iecl_solo.evaluate.pictures import plot_curves, plot_saib
from iecl_solo.evaluate.protocol import EvaluationConfig
from iecl_solo.evaluate.run import EVALUATION, check_evaluation, evaluate
from iecl_solo.experiments.cell import checkpointing
from iecl_solo.experiments.store import STORE, Store
from iecl_solo.files import make_folder, read_json
from iecl_solo.solo.build import build_model
from iecl_solo.solo.config import parse_block, plain
from iecl_solo.solo.data import pretrain_loader
from iecl_solo.solo.host import find_host
from iecl_solo.solo.registry import OBJECTIVES, choose_objectives, query_name, split_method
from iecl_solo.solo.schema import Compare, check_block
from iecl_solo.solo.settings import require, settle_labels
from iecl_solo.solo.wrapper import transforming
from iecl_solo.train.complete import complete
from iecl_solo.train.fit import pretrain
from iecl_solo.train.logs import is_term, read_metrics, training_curves
from iecl_solo.train.processes import in_processes, launched
from iecl_solo.train.run import Run, check_name


@dataclass(frozen=True)
class Comparison:
    """A trained and evaluated pair.

    Attributes:
        title: what it is called.
        folder: where its table, pictures and report belong.
        runs: the baseline's and the variant's.
        table: one row a method, baseline first.
    """

    title: str
    folder: Path
    runs: list[Run]
    table: pd.DataFrame


def pair(cfg: DictConfig) -> tuple[DictConfig, DictConfig]:
    """The baseline's and the variant's configuration; they share all but the objectives.

    The variant carries what the method's name says, and the first objective if it says nothing.
    """
    require(cfg, ["method"])
    carried, _ = split_method(cfg.method)
    both = []
    for names in ([], carried or [OBJECTIVES[0].name]):
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


#: What a pair is judged by, with labels and without, as the table calls it.
_JUDGED = {
    "knn_acc1": "k-NN %",
    "linear_acc1": "linear %",
    "rankme": "RankMe",
    "lidar": "LiDAR",
    "alpha_req": "alpha-ReQ",
    "uniformity": "uniformity",
    "alignment": "alignment",
}


def table(runs: list[Run]) -> pd.DataFrame:
    """One row a run, baseline first: accuracy (or what needs no labels), terms, cost, entropy."""
    rows = []
    carried, _ = split_method(runs[-1].args["method"])
    entropy = f"H({query_name(carried)}) nats"
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
                **{shown: scores[name] for name, shown in _JUDGED.items() if name in scores},
                entropy: scores["query_entropy"],
                **terms,
                "s/step": result["seconds_per_step"],
                "peak MB": result["peak_memory_bytes"] / 2**20,
                "parameters": result["parameters"],
            }
        )
    return pd.DataFrame(rows).set_index("method")


def draw(runs: list[Run], names: list[str], folder: Path) -> list[Path]:
    """Curves, and images before and after SAIB where the variant has one; the files written."""
    curves, images = folder / "curves.png", folder / "saib.png"
    plot_curves({n: read_metrics(r.folder) for n, r in zip(names, runs, strict=True)}, curves)
    host = find_host()
    pretrained = read_pretrained(runs[1].checkpoint)
    objective = transforming(load_method(pretrained, host).eval())
    if objective is None or objective.transformer is None:
        return [curves]
    torch.manual_seed(pretrained.cfg.seed)
    _, views, _ = next(iter(pretrain_loader(pretrained.cfg, host)))
    query = views[objective.views.query[0]][:8]
    with torch.no_grad():
        plot_saib(query, objective.transformer(query), images)
    return [curves, images]


def record(comparison: Comparison, command: str | None) -> Store:
    """The pair as a benchmark's store, made anew of what the runs' folders hold.

    Args:
        comparison: whose runs are trained and evaluated.
        command: the command line that made them, for the report.
    """
    runs, folder = comparison.runs, comparison.folder
    store = Store(folder / STORE)
    store.clear()  # it is made of what the runs keep
    methods = [str(run.args["method"]) for run in runs]
    judged = read_json(runs[0].folder / EVALUATION)["metrics"]
    seed = runs[0].args["seed"]
    store.begin(
        {
            "name": comparison.title,
            "question": f"What does {methods[1]} change about {methods[0]}?",
            "measures": [*(n for n in _JUDGED if n in judged), "query_entropy"],
            "arms": {method: {"method": method} for method in methods},
            "axes": {},
            "seeds": [seed],
            "settings": {},
            "published": [],
            "command": command,
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
    return store


def compare(cfg: DictConfig) -> Comparison:
    """Train, evaluate and tabulate a baseline and its variant; what is done is not done again.

    Args:
        cfg: a pretraining configuration of either, and optionally ``evaluation:`` and
            ``compare.dir``.

    Raises:
        IECLError: one line for whatever the configuration gets wrong.
    """
    if launched():
        raise IECLError("compare: start it once, not under torchrun; it launches devices=N itself")
    OmegaConf.set_struct(cfg, False)
    protocol = parse_block("evaluation", EvaluationConfig, cfg.get("evaluation"))
    require(cfg, ["method", "data.dataset"])
    settle_labels(cfg)
    if not cfg.data.get("no_labels"):
        require(cfg, ["data.val_path"])
    check_evaluation(protocol)
    check_block("compare.", Compare, plain(cfg.get("compare")) or {})
    choose_objectives(cfg)
    both = pair(cfg)
    title = str(both[0].get("name") or both[0].method)
    check_name(title)  # it may be the folder's
    folder = Path(OmegaConf.select(cfg, "compare.dir") or Path("compare") / title)
    host = find_host()
    runs, given = [], []
    for own in both:
        own.pop("compare", None)
        own.checkpoint = checkpointing(own, folder)
        own.name = own.method
        raw = plain(own)
        own = complete(own, host)
        build_model(copy.deepcopy(own), host)  # both are refused before either is trained
        runs.append(Run(own))
        given.append(raw)
    for run, raw in zip(runs, given, strict=True):
        if run.result is None:  # in a process of its own, so that its peak memory is its own
            in_processes(_train_and_evaluate, raw, asdict(protocol))
        else:  # what is trained may still lack a measure
            _train_and_evaluate(raw, asdict(protocol))
    carried, _ = split_method(both[1].method)
    # one baseline, and a report for each variant that is compared with it
    report = folder if carried == [OBJECTIVES[0].name] else folder / "_".join(carried)
    make_folder(report)
    return Comparison(title, report, runs, table(runs))
