"""Scripts of solo-learn that take CUDA for granted, on a machine without it."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

from iecl_solo.patches.patch import Patch, Stage


def _cuda_is_missing(_: Path) -> bool:
    import torch

    return not torch.cuda.is_available()


def _stay(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self


def _named_here(argument: Any) -> Any:
    """ "cpu" for anything that names a CUDA device, anything else as it is."""
    import torch

    if isinstance(argument, torch.device) and argument.type == "cuda":
        return torch.device("cpu")
    if isinstance(argument, str) and argument.split(":")[0] == "cuda":
        return "cpu"
    return argument


def _moving_here(to: Any) -> Any:
    @functools.wraps(to)
    def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
        here = {name: _named_here(value) for name, value in kwargs.items()}
        return to(self, *(_named_here(value) for value in args), **here)

    return moved


def _run_on_the_cpu() -> None:
    import torch

    warnings.warn("no CUDA device here: what the script sends there stays on the CPU", stacklevel=2)
    for movable in (torch.Tensor, torch.nn.Module):
        movable.cuda = _stay  # type: ignore[method-assign]
        movable.to = _moving_here(movable.to)  # type: ignore[method-assign]


NO_CUDA = Patch(
    name="no-cuda",
    stage=Stage.SCRIPT,
    versions="GitHub main",
    symptom="main_knn.py calls .cuda() and main_umap.py names cuda:0, on any machine",
    remedy="where there is no CUDA, tensors and modules stay on the CPU",
    present=_cuda_is_missing,
    apply=_run_on_the_cpu,
)
