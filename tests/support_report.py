"""Stores with made-up rows, for the tests of the report: no number here was measured."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iecl_solo.evaluate.gallery import make_gallery
from iecl_solo.experiments.store import STORE, Store

BATCH = "optimizer.batch_size"

#: Settings of the made-up arms; the second one leaves beta at its default of 0.1.
ARMS: dict[str, dict[str, Any]] = {
    "simclr": {"method": "simclr"},
    "iecl_simclr": {"method": "iecl_simclr"},
    "beta 0.01": {"method": "iecl_simclr", "iecl": {"beta": 0.01}},
    "beta 1": {"method": "iecl_simclr", "iecl": {"beta": 1.0}},
}

#: How far each arm is made to be above its baseline, in points.
GAIN = {"iecl_simclr": 2.0, "beta 0.01": 0.1, "beta 1": -1.5}

CURVES = ("host_loss", "val_acc1", "iecl_kl", "delta_h", "effective_rank")


def _metrics(rng: np.random.Generator, accuracy: float, against: str | None) -> dict[str, float]:
    return {
        "knn_acc1": accuracy,
        "linear_acc1": accuracy + 1 + rng.normal(0, 0.2),
        "linear_lr": 0.1,
        "knn_acc1/other": accuracy / 2,
        "query_entropy": 60 + rng.normal(0, 3),
        "made_up": rng.normal(0, 0.01),
        "parameters": 15_380_554.0 + 95_472 * (against is not None),
        "seconds_per_step": 0.1,
    }


def _cost(rng: np.random.Generator, arm: str) -> dict[str, float]:
    ratio = 1.03 if arm == "iecl_simclr" else 1.2
    return {
        "time_ratio": ratio,
        "time_ratio_low": ratio - 0.01,
        "time_ratio_high": ratio + 0.01,
        "memory_ratio": ratio - 0.01,
        "peak_memory_bytes": 2.0**28,
        "flops": 3.2e10,
    }


def _curves(rng: np.random.Generator, shift: float, epochs: int) -> list[tuple[int, str, float]]:
    rows = []
    for epoch in range(epochs):
        done = 1 - np.exp(-3 * (epoch + 1) / epochs)
        rows += [
            (epoch, "host_loss", 6 - 3 * done + rng.normal(0, 0.1)),
            (epoch, "val_acc1", (60 + shift) * done + rng.normal(0, 1)),
            (epoch, "iecl_kl", 2 * done + rng.normal(0, 0.1)),
            (epoch, "delta_h", 0.02 * done + rng.normal(0, 0.001)),
            (epoch, "effective_rank", 30 * done + rng.normal(0, 1)),
        ]
    return rows


def make_store(
    path: Path,
    *,
    arms: Mapping[str, Mapping[str, Any]] = ARMS,
    axes: Mapping[str, Sequence[Any]] | None = None,
    data: Sequence[str] = ("digits",),
    seeds: Sequence[int] = (0, 1, 2),
    cost: bool = False,
    epochs: int = 0,
    failed: Sequence[int] = (),
    running: Sequence[int] = (),
    absent: Sequence[int] = (),
    spread: float = 0.3,
    **meta: Any,
) -> Store:
    """A store of a grid in the runner's order, the first arm the baseline of all others.

    Args:
        path: its folder.
        arms: settings by label.
        axes: values by dotted key.
        data: names.
        seeds: of the grid.
        cost: whether there are cost ratios.
        epochs: of the curves; 0 for none.
        failed: which cells failed, by their place in the grid.
        running: which are running.
        absent: which were not begun.
        spread: standard deviation of a paired difference.
        meta: more of it.
    """
    store = Store(path / STORE)
    baseline = next(iter(arms))
    axes = axes or {}
    ids = []
    grid = itertools.product(seeds, arms, data, itertools.product(*axes.values()))
    for i, (seed, arm, name, values) in enumerate(grid):
        ids.append(f"{name}-{arm}-{values}-{seed}".replace("/", "_"))  # they name files
        if i in absent:
            continue
        rng = np.random.default_rng(i)
        own = dict(zip(axes, values, strict=True))
        against = None if arm == baseline else baseline
        cell = {"id": ids[-1], "data": name, "arm": arm, "against": against, "axes": own}
        store.claim(cell | {"method": str(arms[arm].get("method")), "seed": seed})
        if i in failed:
            store.fail(ids[-1], "Traceback:\n  line 1\nValueError: 50 % of <b>x_y</b> & $z$ | w")
        if i in failed or i in running:
            continue
        # what a baseline and its variant share: the seed's, and the batch size's
        shared = np.random.default_rng(1000 + seed).normal(0, 1.5)
        accuracy = 80 + shared + 2 * np.log2(own.get(BATCH, 128) / 128)
        if against:
            accuracy += GAIN.get(arm, 1.0) + rng.normal(0, spread)
        config = {"method": arms[arm].get("method"), "seed": seed, "max_epochs": epochs}
        config["optimizer"] = {"name": "lars", "batch_size": own.get(BATCH, 128)}
        if against:
            config["iecl"] = {"beta": 0.1, "lambda": 0.01} | dict(arms[arm].get("iecl", {}))
        metrics = _metrics(rng, accuracy, against) | (_cost(rng, arm) if cost and against else {})
        store.finish(
            ids[-1],
            metrics,
            _curves(rng, GAIN.get(arm, 0.0), epochs) if epochs else [],
            seconds=12.5,
            device="cpu",
            config=config,
            versions={"torch": "0.0-made-up", "iecl_solo": "0.0"},
            command=f"iecl-solo benchmark cell={i}",
        )
    store.begin(
        {
            "name": "made_up",
            "preset": "smoke",
            "question": "Does a made-up arm stand above a made-up baseline?",
            "measures": ["knn_acc1"],
            "command": "iecl-solo benchmark --config-name made_up preset=smoke",
            "settings": {"max_epochs": epochs},
            "arms": {arm: dict(block) for arm, block in arms.items()},
            "axes": {key: list(values) for key, values in axes.items()},
            "seeds": list(seeds),
            "published": [],
            "cells": ids,
        }
        | meta
    )
    return store


def rich_store(path: Path) -> Store:
    """A store with something for every section."""
    published = [
        {
            "data": data,
            "axes": {BATCH: size},
            "arm": arm,
            "measure": "knn_acc1",
            "value": 80.0 + i,
            "source": "Made Up et al., table 1 (one seed)",
        }
        for data in ("digits", "elsewhere")
        for i, size in enumerate((64, 128, 256))
        for arm in ("simclr", "iecl_simclr")
    ]
    store = make_store(
        path,
        axes={BATCH: [64, 128, 256]},
        seeds=(0, 1, 2, 3),
        cost=True,
        epochs=8,
        failed=(46,),
        running=(47,),
        absent=(45,),
        published=published,
        measures=["knn_acc1", "linear_acc1", "query_entropy"],
    )
    add_galleries(path, store)
    return store


def add_galleries(path: Path, store: Store, labelled: bool = True) -> None:
    """Give each finished cell of a store a run's folder with made-up pictures in it."""
    for cell in store.cells().to_dict("records"):
        if cell["status"] != "done":
            continue
        rng = np.random.default_rng(len(cell["arm"]))
        config = {**cell["config"], "name": cell["id"], "checkpoint": {"dir": "away"}}
        if not labelled:
            config["data"] = {"no_labels": True}
        metrics = store.metrics()
        own = metrics[metrics["cell"] == cell["id"]].set_index("name")["value"].to_dict()
        if not labelled:
            own = {k: v for k, v in own.items() if "acc" not in k}
            own |= {"rankme": 20 + rng.normal(), "lidar": 10 + rng.normal(), "uniformity": -2.0}
        curves = store.curves()
        rows = curves[curves["cell"] == cell["id"]][["epoch", "name", "value"]]
        about = {name: cell[name] for name in ("seconds", "device", "versions", "command")}
        lines = list(rows.itertuples(index=False, name=None))
        store.finish(cell["id"], own, lines, config=config, **about)
        folder = path / "runs" / cell["method"] / cell["id"]
        folder.mkdir(parents=True)
        labels = torch.arange(60) % 3 if labelled else None
        features = torch.from_numpy(rng.normal(size=(60, 8))).float()
        features[:, :3] += 2 * torch.eye(3)[torch.arange(60) % 3]
        hue = 70 * (np.arange(60) % 3)
        views = rng.integers(0, 255, (6, 16, 16, 3), dtype=np.uint8)
        changed = (views, 255 - views) if isinstance(cell["against"], str) else None

        def picture(i: int, hue: np.ndarray = hue) -> np.ndarray:
            return np.full((16, 16, 3), (hue[i], 90, 200 - hue[i]), np.uint8)

        make_gallery(features, labels, picture, changed).save(folder)
