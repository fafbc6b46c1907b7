"""The host's Lightning modules, built from a completed configuration."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

import torch
from lightning.pytorch import LightningModule
from omegaconf import DictConfig
from torch import nn

from iecl_solo.errors import IECLError
from iecl_solo.solo.config import plain
from iecl_solo.solo.host import Host, find_host
from iecl_solo.solo.settings import host_refusals


def _optimizer_kwargs(cfg: DictConfig, *, grad_clip: bool) -> dict[str, Any]:
    """The optimiser as 1.0.2 wants it: LARS is a flag on SGD there, not a name."""
    options = dict(plain(cfg.optimizer.get("kwargs")) or {})
    lars = cfg.optimizer.name == "lars"
    out: dict[str, Any] = {
        "optimizer": "sgd" if lars else cfg.optimizer.name,
        "lars": lars,
        "exclude_bias_n_norm": bool(options.pop("exclude_bias_n_norm", False)),
    }
    eta, clip = options.pop("eta", None), options.pop("clip_lr", None)
    if grad_clip:
        out["eta_lars"] = 1e-3 if eta is None else eta
        out["grad_clip_lars"] = bool(clip)
    out["extra_optimizer_args"] = options
    return out


def _method_defaults(method: type) -> dict[str, Any]:
    """1.0.2's own defaults of a method's options; they are in its argument parser, not in code."""
    own = {
        name
        for cls in method.__mro__
        if cls.__module__ != "solo.methods.base" and issubclass(cls, LightningModule)
        for name in inspect.signature(cls.__init__).parameters
    }
    parser = argparse.ArgumentParser(conflict_handler="resolve")
    method.add_model_specific_args(parser)  # type: ignore[attr-defined]
    return {a.dest: a.default for a in parser._actions if a.dest in own and a.default is not None}


def _method_kwargs(cfg: DictConfig, host: Host) -> dict[str, Any]:
    """A completed configuration in main's schema as the keyword arguments that 1.0.2 takes."""
    if cfg.optimizer.get("exclude_bias_n_norm_wd"):
        raise IECLError(
            f"optimizer.exclude_bias_n_norm_wd: {host.describe()} has no such option, set it false"
        )
    kwargs: dict[str, Any] = {
        "encoder": cfg.backbone.name,
        "backbone_args": {
            "cifar": cfg.data.dataset in ("cifar10", "cifar100"),
            **(plain(cfg.backbone.kwargs) or {}),
        },
        "num_classes": cfg.data.num_classes,
        "max_epochs": cfg.max_epochs,
        "batch_size": cfg.optimizer.batch_size,
        "lr": cfg.optimizer.lr,
        "weight_decay": cfg.optimizer.weight_decay,
        "classifier_lr": cfg.optimizer.classifier_lr,
        "accumulate_grad_batches": cfg.accumulate_grad_batches,
        "scheduler": cfg.scheduler.name,
        "min_lr": cfg.scheduler.min_lr,
        "warmup_start_lr": cfg.scheduler.warmup_start_lr,
        "warmup_epochs": cfg.scheduler.warmup_epochs,
        "lr_decay_steps": plain(cfg.scheduler.lr_decay_steps),
        "num_large_crops": cfg.data.num_large_crops,
        "num_small_crops": cfg.data.num_small_crops,
        "knn_eval": cfg.knn_eval.enabled,
        "knn_k": cfg.knn_eval.k,
        "base_tau_momentum": cfg.momentum.base_tau,
        "final_tau_momentum": cfg.momentum.final_tau,
        "momentum_classifier": cfg.momentum.classifier,
        "crop_size": cfg.augmentations[0].crop_size,
    }
    kwargs |= _optimizer_kwargs(cfg, grad_clip=True)
    kwargs |= _method_defaults(host.methods[cfg.method]) | plain(cfg.method_kwargs)
    for block in getattr(host.methods[cfg.method], "blocks", ()):
        kwargs[block] = plain(cfg.get(block))
    return kwargs


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
        if not host.takes_cfg:
            return host.methods[cfg.method](**_method_kwargs(cfg, host))
        model = host.methods[cfg.method](cfg)
        host.import_module("utils.misc").make_contiguous(model)
    if not cfg.performance.disable_channel_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def build_linear(cfg: DictConfig, backbone: nn.Module, host: Host) -> LightningModule:
    """The host's own ``LinearModel`` on a frozen backbone.

    Args:
        cfg: completed by ``prepare_linear``.
        backbone: (B, 3, H, W) to (B, num_features), weights loaded.
        host: the solo-learn in use.
    """
    linear = host.methods["linear"]
    with host_refusals("linear evaluation"):
        if host.takes_cfg:
            return linear(backbone, cfg=cfg)
        if cfg.get("finetune"):
            raise IECLError(f"finetune: {host.describe()} only trains the last layer")
        return linear(
            backbone,
            num_classes=cfg.data.num_classes,
            max_epochs=cfg.max_epochs,
            batch_size=cfg.optimizer.batch_size,
            lr=cfg.optimizer.lr,
            weight_decay=cfg.optimizer.weight_decay,
            scheduler=cfg.scheduler.name,
            lr_decay_steps=plain(cfg.scheduler.get("lr_decay_steps")),
            **_optimizer_kwargs(cfg, grad_clip=False),
        )
