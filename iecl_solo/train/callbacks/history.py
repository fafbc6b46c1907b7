"""What each epoch logged, kept in the checkpoint, so that a kill takes no row from the logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from iecl_solo.train.logs import read_metrics

# what is logged once an epoch under a name that does not say so
_OF_EPOCH = ("val_", "monitor_")


class History(Callback):
    """Keeps an epoch's logged values by epoch; puts what a kill took from the CSV back into it.

    Lightning logs an epoch's row after its checkpoint is written, and a disk that is full takes
    rows with it.

    Args:
        folder: the run's.

    Attributes:
        rows: by epoch, each value by name, and ``step``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[int, dict[str, float]] = {}

    @property
    def last(self) -> dict[str, float]:
        """What the last epoch logged."""
        if not self.rows:
            return {}
        return {k: v for k, v in self.rows[max(self.rows)].items() if k != "step"}

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        values = {k: float(v) for k, v in trainer.callback_metrics.items()}
        logged = {
            k: v for k, v in values.items() if k.endswith("_epoch") or k.startswith(_OF_EPOCH)
        }
        self.rows[trainer.current_epoch] = {**logged, "step": float(trainer.global_step - 1)}

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero or not self.rows:
            return
        there = read_metrics(self.folder)
        for epoch, row in self.rows.items():
            found = set(there.loc[epoch].dropna().index) if epoch in there.index else set()
            lost = {k: v for k, v in row.items() if k != "step" and k not in found}
            for logger in trainer.loggers:
                if lost and isinstance(logger, CSVLogger):
                    logger.log_metrics({**lost, "epoch": epoch}, int(row["step"]))

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = dict(state_dict["rows"])
