"""``iecl-solo pretrain``: pretrain one configuration."""

from __future__ import annotations

from omegaconf import DictConfig

from iecl_solo.train.fit import pretrain


def main(cfg: DictConfig) -> None:
    """What the command does with the composed configuration."""
    run = pretrain(cfg)
    print(f"checkpoint: {run.checkpoint}")
