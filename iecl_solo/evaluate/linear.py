"""Linear evaluation: a linear layer on a frozen backbone, by the host's own ``LinearModel``."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, seed_everything
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import Dataset

from iecl_solo.solo.build import build_linear
from iecl_solo.solo.data import evaluation_loader
from iecl_solo.solo.host import Host
from iecl_solo.train.fit import make_trainer


def linear_accuracy(
    cfg: DictConfig,
    backbone: nn.Module,
    host: Host,
    train: Dataset,
    test: Dataset,
    trainer_arguments: dict[str, Any],
    *,
    callbacks: list[Callback] | None = None,
) -> tuple[float, float]:
    """Top-1 and top-5 test accuracy in per cent after the last epoch (not after the best one).

    NaN for a layer that diverged: its argmax is the first class, whatever the image.

    Args:
        cfg: completed by ``prepare_linear``.
        backbone: (B, 3, H, W) to (B, num_features); its weights are frozen.
        host: the solo-learn in use.
        train: labelled training set.
        test: labelled test set.
        trainer_arguments: for Lightning's Trainer.
        callbacks: for Lightning's Trainer.
    """
    seed_everything(cfg.seed, workers=True, verbose=False)
    model = build_linear(cfg, backbone, host)
    batch, workers = cfg.optimizer.batch_size, cfg.data.num_workers
    trainer = make_trainer(
        **trainer_arguments
        | {
            "callbacks": callbacks,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        }
    )
    trainer.fit(
        model,
        # an epoch of a head is short: to begin workers anew takes longer than it on few images
        evaluation_loader(train, batch, workers, shuffle=True, persistent_workers=True),
        evaluation_loader(test, batch, workers, persistent_workers=True),
    )
    if not all(weight.isfinite().all() for weight in model.parameters()):
        return math.nan, math.nan
    logged = trainer.callback_metrics
    return float(logged["val_acc1"]), float(logged["val_acc5"])
