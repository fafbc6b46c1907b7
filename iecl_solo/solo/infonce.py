"""InfoNCE in blocks in the place of the host's, which forms every pair at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from iecl_solo.errors import IECLError
from iecl_solo.solo.host import Host, find_host

_LOSS = "simclr_loss_func"


@contextmanager
def _standing_in(module: Any, loss: Callable[..., Tensor]) -> Iterator[None]:
    original = getattr(module, _LOSS)
    setattr(module, _LOSS, loss)
    try:
        yield
    finally:
        setattr(module, _LOSS, original)


def use_blocked_infonce(model: LightningModule, host: Host) -> None:
    """Let a SimCLR, or a variant of it, compute its loss in blocks of pairs.

    The function that its ``training_step`` calls is replaced while that runs, and only then. Value
    and gradient are the host's up to the order of summation; memory grows with the embeddings, not
    with their square. Idempotent.

    Args:
        model: of ``host.methods``.
        host: the solo-learn in use.

    Raises:
        IECLError: one line, for another method, or several sizes of crops where the host forms all
            pairs before it calls its loss.
    """
    simclr = host.methods["simclr"]
    if not isinstance(model, simclr):
        raise IECLError(
            f"performance.blocked_infonce: {type(model).__name__} is not SimCLR or a variant of it"
        )
    host.blocked_infonce(model)  # refuses what it cannot do now, not in the first step
    # bound, so that a copy of the model trains the copy
    model.training_step = MethodType(_step, model)  # type: ignore[method-assign]


def _step(model: LightningModule, *args: Any, **kwargs: Any) -> Any:
    host = find_host()
    module = sys.modules[host.methods["simclr"].__module__]
    with _standing_in(module, host.blocked_infonce(model)):
        return type(model).training_step(model, *args, **kwargs)
