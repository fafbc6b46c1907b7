"""A resumed momentum network goes on at the rate and the step it had reached."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

from iecl_solo.patches.patch import Patch, Stage

_KEY = "momentum_tau"


def _base() -> Any:
    return importlib.import_module("solo.methods.base").BaseMomentumMethod


def _rate_is_not_saved(_: Path) -> bool:
    # the rate is a plain attribute of the updater; only a hook of the base class could save it
    import lightning.pytorch as pl

    saved = _base().on_save_checkpoint
    return saved in (
        pl.LightningModule.on_save_checkpoint,
        importlib.import_module("solo.methods.base").BaseMethod.on_save_checkpoint,
    )


def _save_the_rate() -> None:
    base = _base()
    save, load = base.on_save_checkpoint, base.on_load_checkpoint

    @functools.wraps(save)
    def on_save_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        save(self, checkpoint)
        checkpoint[_KEY] = float(self.momentum_updater.cur_tau)

    @functools.wraps(load)
    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        load(self, checkpoint)
        if _KEY in checkpoint:
            self.momentum_updater.cur_tau = checkpoint[_KEY]

    base.on_save_checkpoint = on_save_checkpoint
    base.on_load_checkpoint = on_load_checkpoint


def _steps_begin_at_0(_: Path) -> bool:
    return "global_step" not in _base().on_train_start.__code__.co_names


def _begin_at_the_step_reached() -> None:
    base = _base()
    start = base.on_train_start

    @functools.wraps(start)
    def on_train_start(self: Any) -> None:
        start(self)
        self.last_step = self.trainer.global_step

    base.on_train_start = on_train_start


MOMENTUM_STEP = Patch(
    name="momentum-step",
    stage=Stage.AFTER_IMPORT,
    versions="1.0.2 and GitHub main",
    symptom="with accumulate_grad_batches a resumed run of a momentum method updates its momentum "
    "network after the first batch, before the optimiser has made a step",
    remedy="steps are counted from the one that the run goes on from",
    present=_steps_begin_at_0,
    apply=_begin_at_the_step_reached,
)

MOMENTUM_RATE = Patch(
    name="momentum-rate",
    stage=Stage.AFTER_IMPORT,
    versions="1.0.2 and GitHub main",
    symptom="a resumed run of a momentum method updates its momentum network once at base_tau "
    "instead of the rate it had reached, so it is not the run that was interrupted",
    remedy="the rate is saved with the checkpoint and restored from it",
    present=_rate_is_not_saved,
    apply=_save_the_rate,
)
