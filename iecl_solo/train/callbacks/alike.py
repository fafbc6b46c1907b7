"""Several processes of one run must have the same images, in batches of the same size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from iecl_solo.distributed import world_size
from iecl_solo.errors import IECLError


class Alike(Callback):
    """Compares what every process has, once, before the first step.

    A process with fewer images would leave the others waiting at the end of its epoch; one with
    smaller batches would leave a gathering without an answer.

    Args:
        counts: of images and of a batch, by the key that sets them.
    """

    def __init__(self, counts: Mapping[str, int]) -> None:
        self.counts = dict(counts)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises: IECLError, one line, the same in every process."""
        if world_size() == 1:
            return
        found: list[Any] = [None] * world_size()
        dist.all_gather_object(found, self.counts)
        for key, first in found[0].items():
            for rank, counts in enumerate(found):
                if counts[key] != first:
                    raise IECLError(
                        f"{key}: the process of rank 0 has {first}, that of rank {rank} has "
                        f"{counts[key]}; all of them need the same"
                    )
