"""The one way from a composed configuration to one that can be trained."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from iecl_solo.solo.config import parse_block
from iecl_solo.solo.host import Host
from iecl_solo.solo.registry import check_method, choose_objectives, complete_objective
from iecl_solo.solo.settings import prepare_pretrain, require
from iecl_solo.train.callbacks.entropy_monitor import MonitorConfig


def complete(cfg: DictConfig, host: Host) -> DictConfig:
    """Check a pretraining configuration and fill in all that it leaves open.

    Every command that trains, plans or measures a method comes through here, so that all of them
    accept and refuse the same.

    Args:
        cfg: as composed, in solo-learn's schema; changed in place.
        host: the solo-learn in use.

    Returns:
        The configuration, every value of a run's record in it.

    Raises:
        IECLError: one line for whatever it gets wrong.
    """
    OmegaConf.set_struct(cfg, False)
    require(cfg, ["method"])
    choose_objectives(cfg)
    check_method(cfg.method)
    cfg = prepare_pretrain(cfg, host)
    complete_objective(cfg)
    parse_block("monitor", MonitorConfig, cfg.get("monitor"))
    return cfg
