"""The host's Lightning modules, built from a completed configuration."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.parameter import is_lazy

from iecl_solo.errors import IECLError
from iecl_solo.solo.host import Host, find_host
from iecl_solo.solo.infonce import use_blocked_infonce
from iecl_solo.solo.settings import host_refusals


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
    if OmegaConf.select(cfg, "performance.blocked_infonce", default=False):
        use_blocked_infonce(model, host)
    return model


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
