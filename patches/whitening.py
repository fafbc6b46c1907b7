"""The whitening of solo-learn 1.0.2's W-MSE, which torch has lost a function of."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from iecl_solo.patches.patch import Patch, Stage


def _whitening() -> Any:
    return importlib.import_module("solo.utils.whitening")


def _whitening_fails(_: Path) -> bool:
    import torch

    try:
        _whitening().Whitening2d(2)(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    except (AttributeError, RuntimeError) as error:
        return any(lost in str(error) for lost in ("cholesky", "triangular_solve"))
    return False


class _TorchOfOld:
    """torch, with the two functions that moved to torch.linalg under their old names."""

    def __getattr__(self, name: str) -> Any:
        import torch

        return getattr(torch, name)

    @staticmethod
    def cholesky(matrix: Any, upper: bool = False) -> Any:
        import torch

        return torch.linalg.cholesky(matrix, upper=upper)

    @staticmethod
    def triangular_solve(right: Any, matrix: Any, upper: bool = True) -> Any:
        import torch

        return torch.linalg.solve_triangular(matrix, right, upper=upper), matrix


def _whiten() -> None:
    _whitening().torch = _TorchOfOld()


WHITENING = Patch(
    name="whitening",
    stage=Stage.AFTER_IMPORT,
    versions="1.0.2",
    symptom="wmse fails in its first step: torch.cholesky was removed",
    remedy="solo.utils.whitening takes it, and triangular_solve, from torch.linalg",
    present=_whitening_fails,
    apply=_whiten,
)
