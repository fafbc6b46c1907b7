"""Collapse named while it happens: embeddings that shrink to a point, or to a few dimensions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from iecl_solo.entropy import effective_rank
from iecl_solo.lipschitz import evaluating
from iecl_solo.solo.embed import embed
from iecl_solo.solo.host import Host
from iecl_solo.solo.wrapper import find_embedder

#: Images whose embeddings are looked at, of an epoch's last batch.
IMAGES = 256

#: Below this deviation embeddings are all but one point. An untrained network's are too (0.02 to
#: 0.05), so that it has to be there for two epochs, and not to rise.
LEAST_DEVIATION = 0.05

#: Below this share of the dimensions they could fill, and below 1.5, they fill too few.
LEAST_RANK = 0.02

_TRY = (
    "try a smaller optimizer.lr, a longer scheduler.warmup_epochs, "
    "or a larger weight on the term that spreads the embeddings"
)


def deviation(z: Tensor) -> Tensor:
    """Root mean squared distance of L2-normalised embeddings (n, d) from their mean; 0-dim.

    1 where they are spread over the sphere, 0 where they are one point: sqrt(d) times the standard
    deviation of one dimension, which Chen and He, "Exploring Simple Siamese Representation
    Learning", 2021, figure 2, compare with 1 / sqrt(d).

    >>> float(deviation(F.normalize(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))))
    1.0
    >>> float(deviation(torch.tensor([[0.6, 0.8], [0.6, 0.8]])))
    0.0
    """
    return (z - z.mean(0)).pow(2).sum(1).mean().sqrt()


class Collapse(Callback):
    """Logs the deviation and the effective rank of z each epoch; says once what has collapsed.

    Args:
        host: the solo-learn in use.
        name: what the run is called.
    """

    def __init__(self, host: Host, name: str) -> None:
        self.host, self.name = host, name
        self._views: Tensor | None = None
        self._before: dict[str, float] = {}
        self._said: set[str] = set()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_last_batch and trainer.is_global_zero:
            self._views = batch[1][0][:IMAGES].detach()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        views, self._views = self._views, None
        if views is None or len(views) < 2:
            return
        z = self._embeddings(module, views)
        if not bool(z.isfinite().all()):
            return  # another callback's business
        values = {
            "z_deviation": float(deviation(z)),
            "z_effective_rank": float(effective_rank(z - z.mean(0))),
        }
        module.log_dict({f"monitor_{k}": v for k, v in values.items()}, rank_zero_only=True)
        for line in self._lines(values, most=min(len(z) - 1, z.shape[1])):
            print(f"{self.name}  epoch {trainer.current_epoch + 1}: {line}", flush=True)

    def _embeddings(self, module: LightningModule, views: Tensor) -> Tensor:
        with evaluating(module), torch.no_grad(), torch.autocast(views.device.type, enabled=False):
            if find_embedder(module, "online") is not None:
                return embed(module, self.host, views.float())
            return F.normalize(getattr(module, self.host.online)(views.float()).float(), dim=-1)

    def _lines(self, values: dict[str, float], most: int) -> list[str]:
        least = {"z_deviation": LEAST_DEVIATION, "z_effective_rank": max(1.5, LEAST_RANK * most)}
        before, self._before = self._before, values
        low = [k for k, v in values.items() if v <= before.get(k, math.inf) < least[k]]
        if "z_deviation" in low:
            low = ["z_deviation"]  # of one point the rank says nothing
        new = [k for k in low if k not in self._said]
        self._said |= set(new)
        said = {
            "z_deviation": (
                f"complete collapse: embeddings deviate by {values['z_deviation']:.4f} from their "
                f"mean (1 is spread out, 0 one point); {_TRY}"
            ),
            "z_effective_rank": (
                f"dimensional collapse: embeddings have effective rank "
                f"{values['z_effective_rank']:.1f} of {most}; {_TRY}"
            ),
        }
        return [said[k] for k in new]
