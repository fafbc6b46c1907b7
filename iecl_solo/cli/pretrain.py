"""``iecl-solo pretrain``: pretrain one configuration."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from iecl_solo.cli.hydra_app import Invocation
from iecl_solo.evaluate.protocol import EvaluationConfig
from iecl_solo.solo.config import parse_block
from iecl_solo.train.fit import pretrain


def main(cfg: DictConfig, given: Invocation) -> None:
    """What the command does with the composed configuration."""
    # another command's, but a wrong value is said before the training that it is for
    parse_block("evaluation", EvaluationConfig, cfg.get("evaluation"))
    run = pretrain(cfg)
    rank_zero_only(print)(f"checkpoint: {run.checkpoint}")
