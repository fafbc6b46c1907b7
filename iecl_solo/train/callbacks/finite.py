"""A run stops at its first number that is not finite, before that reaches a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from iecl_solo.errors import IECLError

#: Steps in a row that float16's loss scaling may skip, halving its scale each time, before the
#: run counts as diverged: from 2^16 that leaves none.
SKIPPED_STEPS = 20

_ADVICE = "try a smaller optimizer.lr, a longer scheduler.warmup_epochs or a smaller weight"


def largest(tensors: Iterable[Tensor]) -> Tensor | None:
    """The largest magnitude among floating-point tensors, NaN if there is one; None of none.

    >>> float(largest([torch.tensor([1.0, -3.0]), torch.tensor([2.0])]))
    3.0
    """
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach())
    if not kinds:
        return None
    norms = [n for group in kinds.values() for n in torch._foreach_norm(group, float("inf"))]
    return torch.stack([n.float() for n in norms]).max()


def _first(tensors: Mapping[str, Tensor]) -> tuple[str, float] | None:
    """The first that is not finite, and its first such value."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool((finite := tensor.isfinite()).all()):
            return name, float(tensor[~finite].flatten()[0])
    return None


def _found(module: LightningModule, terms: Mapping[str, Tensor]) -> str:
    """What is not finite: a term of the loss, else a gradient, else a buffer or a weight."""
    gradients = {k: p.grad for k, p in module.named_parameters() if p.grad is not None}
    for what, tensors in (
        ("", terms),
        ("the gradient of ", gradients),
        ("the buffer ", dict(module.named_buffers())),
        ("the weight ", dict(module.named_parameters())),
    ):
        if found := _first(tensors):
            return f"{what}{found[0]} is {found[1]}"
    return "a number was not finite"


def refuse_not_finite(trainer: Trainer) -> None:
    """Raises: IECLError, one line, if a weight or buffer of the model is not finite."""
    module = trainer.lightning_module
    peak = largest([*module.parameters(), *module.buffers()])
    if peak is not None and not math.isfinite(float(peak)):
        raise IECLError(
            f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}: "
            f"{_found(module, {})}; it is not saved. {_ADVICE[0].upper()}{_ADVICE[1:]}"
        )


class Finite(Callback):
    """Stops the run at the first step whose loss, gradients or buffers are not finite.

    On a GPU a step is judged during the next one, so that the device is not waited for.

    Args:
        kept: what to say of the checkpoints that there are.
    """

    def __init__(self, kept: Any = lambda: "") -> None:
        self.kept = kept
        self._skipped = 0
        self._gradients: Tensor | None = None
        self._judged: tuple[int, int, Tensor, dict[str, Tensor]] | None = None

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: Any
    ) -> None:
        found = [p.grad for p in module.parameters() if p.grad is not None]
        self._gradients = largest(found)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        peaks = [loss, self._gradients, largest(module.buffers())]
        self._gradients = None
        peak = torch.stack([p.detach().float().max() for p in peaks if p is not None]).sum()
        terms = {
            k.removesuffix("_step"): v
            for k, v in trainer.callback_metrics.items()
            if not k.endswith("_epoch")
        }
        judged = (trainer.current_epoch, batch_idx, peak, {**terms, "the loss": loss.detach()})
        if module.device.type != "cpu":
            judged, self._judged = self._judged, judged  # type: ignore[assignment]
        if judged is not None:
            self._judge(trainer, module, *judged)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        judged, self._judged = self._judged, None
        if judged is not None:
            self._judge(trainer, module, *judged)

    def _judge(
        self,
        trainer: Trainer,
        module: LightningModule,
        epoch: int,
        batch_idx: int,
        peak: Tensor,
        terms: dict[str, Tensor],
    ) -> None:
        if math.isfinite(float(peak)):
            self._skipped = 0
            return
        self._skipped += 1
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and self._skipped <= SKIPPED_STEPS and _first(terms) is None:
            return
        raise IECLError(
            f"epoch {epoch + 1}, step {batch_idx}: {_found(module, terms)}; the run stops here. "
            f"{self.kept()}{_ADVICE[0].upper()}{_ADVICE[1:]}"
        )
