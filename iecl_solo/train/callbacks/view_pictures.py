"""Views before and after an objective's transform, for TensorBoard and W&B."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor
from torchvision.utils import make_grid

from iecl_solo.lipschitz import evaluating
from iecl_solo.solo.wrapper import objectives

#: Images of a picture: a row before, a row after.
IMAGES = 8


class ViewPictures(Callback):
    """Logs a picture of an epoch's last views, for objectives that transform them.

    Args:
        every_n_epochs: in every n-th epoch, and in the last one; the monitor's.
    """

    def __init__(self, every_n_epochs: int) -> None:
        self.every_n_epochs = every_n_epochs

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = trainer.current_epoch + 1 == trainer.max_epochs
        due = last or trainer.current_epoch % self.every_n_epochs == 0
        if not (due and trainer.is_last_batch and trainer.is_global_zero):
            return
        for name, objective in objectives(module).items():
            view = objective.views.query[0]
            before = batch[1][view][:IMAGES].detach().float()
            with evaluating(module), torch.no_grad():
                after = objective.transform(before, view, "online").float()
            if not torch.equal(before, after):
                rows = torch.cat([before, after]).cpu()
                picture = make_grid(rows, nrow=len(before), normalize=True)
                self._log(trainer, f"{name}_views", picture)

    def _log(self, trainer: Trainer, name: str, picture: Tensor) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, picture, trainer.global_step)
            elif isinstance(logger, WandbLogger):
                logger.log_image(name, [picture], step=trainer.global_step)
