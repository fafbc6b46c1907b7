"""One line an epoch, for logs: a progress bar is only readable on a terminal."""

from __future__ import annotations

import time

from lightning.pytorch import Callback, LightningModule, Trainer

from iecl_solo.solo.registry import shown_terms

_SHOWN = ("train_acc1_epoch", "val_acc1", *shown_terms())


class EpochLine(Callback):
    """Prints epoch, seconds, and what is logged of the loss and the online accuracy.

    Args:
        name: what the run is called.
        labelled: whether an accuracy says anything.
    """

    def __init__(self, name: str, labelled: bool = True) -> None:
        self.name, self.labelled = name, labelled
        self._start = 0.0

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        logged = trainer.callback_metrics
        losses = [k for k in logged if k.endswith(("_loss_epoch", "_sim_epoch"))]
        values = "  ".join(
            f"{k.removesuffix('_epoch').removeprefix('train_')} {float(logged[k]):.3f}"
            for k in (*losses, *_SHOWN)
            if k in logged and (self.labelled or "_acc" not in k)
        )
        seconds = time.perf_counter() - self._start
        epoch = f"{trainer.current_epoch + 1}/{trainer.max_epochs}"
        print(f"{self.name}  epoch {epoch}  {seconds:.1f} s  {values}", flush=True)
