"""The learning-rate schedule that solo-learn 1.0.2 takes from lightning-bolts, in closed form."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class LinearWarmupCosineAnnealingLR(LRScheduler):
    """Linear warm-up followed by a cosine decay.

    Epoch 0 runs at ``warmup_start_lr``, epochs ``warmup_epochs - 1`` and ``warmup_epochs`` at the
    optimiser's own rate, epoch ``max_epochs`` at ``eta_min``. With no warm-up the cosine starts at
    once: ``warmup_start_lr`` is then not used. Every rate follows from the epoch alone, so a
    scheduler restored from its state dict continues exactly, whatever the optimiser's groups hold.

    The name and the arguments are those of lightning-bolts, which no longer imports beside
    today's Lightning; so are the rates.

    Args:
        optimizer: each parameter group keeps its own peak rate.
        warmup_epochs: number of ``step()`` calls of the warm-up.
        max_epochs: number of ``step()`` calls until ``eta_min`` is reached.
        warmup_start_lr: rate at epoch 0 if there is a warm-up.
        eta_min: rate at ``max_epochs``.
        last_epoch: where to start; -1 for the beginning.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(()))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> scheduler = LinearWarmupCosineAnnealingLR(optimizer, warmup_epochs=3, max_epochs=7)
        >>> rates = []
        >>> for _ in range(8):
        ...     rates.append(round(optimizer.param_groups[0]["lr"], 3))
        ...     optimizer.step()
        ...     scheduler.step()
        >>> rates
        [0.0, 0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_epochs: float,
        max_epochs: float,
        warmup_start_lr: float = 0.0,
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        self.warmup_epochs = warmup_epochs
        self.max_epochs = max_epochs
        self.warmup_start_lr = warmup_start_lr
        self.eta_min = eta_min
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each parameter group at ``last_epoch``. The host may replace this."""
        return [self._rate(peak) for peak in self.base_lrs]

    def _rate(self, peak: float | Tensor) -> float | Tensor:
        if self.last_epoch < self.warmup_epochs:
            risen = min(1.0, self.last_epoch / max(self.warmup_epochs - 1, 1))
            return self.warmup_start_lr + risen * (peak - self.warmup_start_lr)
        decay = max(self.max_epochs - self.warmup_epochs, 1)
        fallen = (self.last_epoch - self.warmup_epochs) / decay
        return self.eta_min + (peak - self.eta_min) * (1 + math.cos(math.pi * fallen)) / 2
