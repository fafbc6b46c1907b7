"""LARS of solo-learn 1.0.2 under Lightning's closures."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iecl_solo.patches.patch import Patch, Stage


def _lars() -> Any:
    importlib.import_module("solo.methods")
    module = sys.modules.get("solo.utils.lars")
    return getattr(module, "LARSWrapper", None)


def _lars_comes_before_the_gradient(_: Path) -> bool:
    wrapper = _lars()
    if wrapper is None:
        return False
    import torch

    def step(in_closure: bool) -> float:
        weight = torch.nn.Parameter(torch.ones(1, 1))
        optimizer = wrapper(torch.optim.SGD([weight], lr=1.0, weight_decay=1.0))

        def closure() -> torch.Tensor:
            loss = weight.sum()
            loss.backward()
            return loss

        if in_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        return weight.item()

    return step(in_closure=True) != step(in_closure=False)


def _gradient_first() -> None:
    import torch

    wrapper = _lars()
    original_step = wrapper.step

    @functools.wraps(original_step)
    def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        original_step(self)
        return loss

    wrapper.step = step


LARS_CLOSURE = Patch(
    name="lars-closure",
    stage=Stage.AFTER_IMPORT,
    versions="1.0.2",
    symptom="with lars=True every step is plain SGD without weight decay, silently: LARS scales "
    "the gradients before Lightning's closure has computed them (fp16 mixed precision alone "
    "calls the closure first)",
    remedy="the closure is called first",
    present=_lars_comes_before_the_gradient,
    apply=_gradient_first,
)
