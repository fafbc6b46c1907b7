"""Each step's random numbers depend on the seed, the epoch and the step alone.

So a resumed run draws what the uninterrupted one would have drawn, and a method and its variant
draw the same even if one of them draws more on the way.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from iecl_solo.order import seed_all


class StepSeed(Callback):
    """Seeds every epoch's start and every training step.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.fit_loop.restarting:
            # in the middle of an epoch Lightning leaves this out, and DINO's temperature with it
            self.on_train_epoch_start(trainer, module)
            module.on_train_epoch_start()

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        seed_all(self.seed, trainer.current_epoch)

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # 2 and a third number keep a step's place apart from an image's
        seed_all(self.seed, trainer.current_epoch, batch_idx, 2)
