"""The k-nn metric of both solo-learns under today's torchmetrics."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from iecl_solo.patches.patch import Patch, Stage


def _classifier() -> Any:
    return importlib.import_module("solo.utils.knn").WeightedKNNClassifier


def _knn_is_refused(_: Path) -> bool:
    try:
        _classifier()()
    except (TypeError, ValueError) as error:
        return "compute_on_step" in str(error)
    return False


def _accept_compute_on_step() -> None:
    from torchmetrics import Metric

    class UpdateOnly(Metric):
        """A Metric that does with compute_on_step=False what it once meant."""

        def __init__(self, compute_on_step: bool = False, **kwargs: Any) -> None:
            super().__init__(**kwargs)

        def forward(self, *args: Any, **kwargs: Any) -> None:
            # today's forward also computes: quadratic in what was seen, and compute() resets
            self.update(*args, **kwargs)

    _classifier().__bases__ = (UpdateOnly,)


KNN_METRIC = Patch(
    name="knn-metric",
    stage=Stage.AFTER_IMPORT,
    versions="1.0.2 and GitHub main",
    symptom="knn_eval fails: torchmetrics refuses compute_on_step since 0.12",
    remedy="the argument is accepted, and calling the metric only collects features",
    present=_knn_is_refused,
    apply=_accept_compute_on_step,
)
