"""``iecl-solo pretrain``: pretrain one configuration."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from iecl_solo.cli.hydra_app import Invocation
from iecl_solo.train.fit import pretrain


def main(cfg: DictConfig, given: Invocation) -> None:
    """What the command does with the composed configuration."""
    run = pretrain(cfg)
    rank_zero_only(print)(f"checkpoint: {run.checkpoint}")
