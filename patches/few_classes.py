"""Linear evaluation on data of fewer than five classes."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iecl_solo.patches.patch import Patch, Stage

_USERS = ("utils.metrics", "methods.base", "methods.linear")


def _fewer_classes_than_k_fail(_: Path) -> bool:
    import torch

    accuracy_at_k = importlib.import_module("solo.utils.metrics").accuracy_at_k
    try:
        accuracy_at_k(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), top_k=(1, 5))
    except RuntimeError:  # topk cannot take more than there is
        return True
    return False


def _count_all_classes_at_most() -> None:
    original = importlib.import_module("solo.utils.metrics").accuracy_at_k

    @functools.wraps(original)
    def accuracy_at_k(outputs: Any, targets: Any, top_k: Sequence[int] = (1, 5)) -> Any:
        return original(outputs, targets, top_k=[min(k, outputs.size(1)) for k in top_k])

    for name in _USERS:
        module = importlib.import_module(f"solo.{name}")
        if getattr(module, "accuracy_at_k", None) is original:
            module.accuracy_at_k = accuracy_at_k  # type: ignore[attr-defined]


FEW_CLASSES = Patch(
    name="few-classes",
    stage=Stage.AFTER_IMPORT,
    versions="1.0.2 and GitHub main",
    symptom="linear evaluation on fewer than 5 classes fails in its first step: top-5 accuracy is "
    "asked of logits that are fewer",
    remedy="top-k accuracy over n classes is at most top-n accuracy",
    present=_fewer_classes_than_k_fail,
    apply=_count_all_classes_at_most,
)
