"""The host's Lightning modules, built from a completed configuration."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.parameter import is_lazy

from iecl_solo.errors import IECLError
from iecl_solo.solo.host import Host, find_host
from iecl_solo.solo.infonce import use_blocked_infonce
from iecl_solo.solo.settings import host_refusals, process_count


def build_model(cfg: DictConfig, host: Host | None = None) -> LightningModule:
    """The method that a completed configuration names, as the host's script would build it.

    Args:
        cfg: completed by ``prepare_pretrain``.
        host: the solo-learn in use; found if not given.

    Raises:
        IECLError: one line, when the host or an objective refuses the configuration.
    """
    host = host or find_host()
    with host_refusals(f"method '{cfg.method}'"):
        model = host.build(cfg)
    for name, weight in model.named_parameters():
        if not is_lazy(weight) and weight.numel() == 0:
            raise IECLError(
                f"method '{cfg.method}': its layer {name} has no weight (backbone.kwargs)"
            )
    _check_batch(model, cfg)
    if OmegaConf.select(cfg, "performance.blocked_infonce", default=False):
        use_blocked_infonce(model, host)
    return model


def _check_batch(model: LightningModule, cfg: DictConfig) -> None:
    """Refuse a batch that the host would refuse in its first step, by a bare assertion."""
    own = cfg.optimizer.batch_size
    joint = own * process_count(cfg)
    whole: Any = model
    queued = any(hasattr(model, name) for name in ("_dequeue_and_enqueue", "dequeue_and_enqueue"))
    if queued and (size := int(whole.queue_size)) % joint:
        raise IECLError(
            f"method_kwargs.queue_size: {size} is not allowed, a multiple of the {joint} images "
            "of a step is"
        )
    if (size := int(getattr(model, "whitening_size", 1))) and own % size:
        raise IECLError(
            f"optimizer.batch_size: {own} is not allowed, a multiple of "
            f"method_kwargs.whitening_size, {size}, is"
        )


def build_linear(cfg: DictConfig, backbone: nn.Module, host: Host) -> LightningModule:
    """The host's own ``LinearModel`` on a frozen backbone.

    Args:
        cfg: completed by ``prepare_linear``.
        backbone: (B, 3, H, W) to (B, num_features), weights loaded.
        host: the solo-learn in use.

    Raises:
        IECLError: one line, when the host refuses the configuration.
    """
    with host_refusals("linear evaluation"):
        return host.build_linear(cfg, backbone)
