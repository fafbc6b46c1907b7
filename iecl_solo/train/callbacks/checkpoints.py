"""When a run is saved: every so many epochs and steps, and when it is told to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from iecl_solo.errors import IECLError
from iecl_solo.train.callbacks.finite import refuse_not_finite
from iecl_solo.train.stop import Signals, Stopped


class Checkpoints(Checkpoint):
    """Saves the run to one path, and ends it after a signal.

    A save in mid-epoch waits for the start of the next step: only then has the host updated its
    momentum network. The sums behind the epoch's means are saved with it (of several processes
    rank zero's), so that the means are those of the whole epoch.

    Args:
        path: where the newest checkpoint stands.
        every_n_epochs: after how many epochs; 0 for none.
        every_n_steps: after how many steps; 0 for none.
        signals: which ends the run, once it is saved.
        may_save: asked before each save; False once the folder has become another process's.
    """

    def __init__(
        self,
        path: Path,
        every_n_epochs: int,
        every_n_steps: int,
        signals: Signals,
        may_save: Any = lambda: True,
    ) -> None:
        self.path, self.signals, self.may_save = path, signals, may_save
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self._saved_step = -1
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    # --- when -----------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._saved_step = trainer.global_step
        self.signals.take()
        self.signals.stepping = True

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0 or batch_idx % trainer.accumulate_grad_batches:
            return
        stop, step = self._told_to_stop(trainer), trainer.global_step
        due = self.every_n_steps > 0 and step % self.every_n_steps == 0
        if (stop or due) and step != self._saved_step:
            self._save_in_mid_epoch(trainer)
        if stop:
            self._stop(trainer, f"epoch {trainer.current_epoch + 1}, step {batch_idx} of it")

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        stop, done = self._told_to_stop(trainer), trainer.current_epoch + 1
        due = self.every_n_epochs > 0 and done % self.every_n_epochs == 0
        if stop or due or done == trainer.max_epochs:
            self._save(trainer)
        if stop:  # after the last epoch too: what evaluates the run must not begin
            self._stop(trainer, f"the end of epoch {done}")

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step != self._saved_step:  # max_steps or max_time ended it
            self._save(trainer)
        self.signals.stepping = False

    def on_exception(
        self, trainer: Trainer, module: LightningModule, exception: BaseException
    ) -> None:
        self.signals.stepping = False

    # --- what -----------------------------------------------------------------------------------

    def _told_to_stop(self, trainer: Trainer) -> bool:
        told = self.signals.received is not None
        if trainer.world_size == 1:
            return told
        # all or none, in the same step
        return trainer.strategy.reduce_boolean_decision(told, all=False)

    def _stop(self, trainer: Trainer, where: str) -> None:
        assert trainer.checkpoint_callback is self
        number = self.signals.received or 15  # told by another process's signal
        raise Stopped(number, f"saved at {where} ({self.path})")

    def _save(self, trainer: Trainer) -> None:
        if not self.may_save():
            raise IECLError(
                f"{self.path.parent} was taken over by another process while this one slept; "
                "nothing was written to it since"
            )
        refuse_not_finite(trainer)
        trainer.save_checkpoint(self.path)
        self._saved_step = trainer.global_step

    def _save_in_mid_epoch(self, trainer: Trainer) -> None:
        """As if the batch that is about to be trained on had not been fetched."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        last, progress.is_last_batch = progress.is_last_batch, False
        progress.current.ready -= 1
        progress.total.ready -= 1
        self._sums = {
            key: (metric.value.cpu(), metric.cumulated_batch_size.cpu())
            for key, metric in trainer.fit_loop.epoch_loop._results.items()
            if metric.is_tensor and metric.meta.on_epoch and metric.meta.is_mean_reduction
        }
        try:
            self._save(trainer)
        finally:
            self._sums = {}
            progress.is_last_batch = last
            progress.current.ready += 1
            progress.total.ready += 1

    # --- and the means of an epoch that was resumed -----------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {key: list(sums) for key, sums in self._sums.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sums = {key: (sums[0], sums[1]) for key, sums in state_dict["sums"].items()}

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        results = trainer.fit_loop.epoch_loop._results
        for key, (value, size) in self._sums.items():
            if key in results:
                metric = results[key]
                metric.value = value.to(metric.value.device) + metric.value
                metric.cumulated_batch_size = (
                    size.to(metric.cumulated_batch_size.device) + metric.cumulated_batch_size
                )
                metric._computed = None
        self._sums = {}


def progress_of(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """The epoch to go on with, and how many of its batches have been trained on."""
    loop = checkpoint.get("loops", {}).get("fit_loop")
    if loop is None:
        return int(checkpoint.get("epoch", -1)) + 1, 0
    epochs = loop["epoch_progress"]["current"]
    batches = loop["epoch_loop.batch_progress"]["current"]
    middle = epochs["processed"] < epochs["started"]
    return int(epochs["processed"]), int(batches["completed"]) if middle else 0
