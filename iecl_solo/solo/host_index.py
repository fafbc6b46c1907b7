"""solo-learn 1.0.2 of the package index: methods take keyword arguments, and no script comes along.

A run is configured in GitHub main's schema all the same; it is put into 1.0.2's words here.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor, nn
from torch.utils.data import Dataset

from iecl_solo.errors import IECLError
from iecl_solo.losses.infonce import info_nce
from iecl_solo.solo.backbones import PREFIX, timm_backbone
from iecl_solo.solo.config import plain
from iecl_solo.solo.data import IMAGENET_MEAN, IMAGENET_STD, with_saib
from iecl_solo.solo.host import Given, Host
from iecl_solo.solo.settings import CIFAR, NUM_CLASSES, device_count

# it names them so; it has no equalisation and always crops
_JITTER = ("brightness", "contrast", "saturation", "hue")


def _info_nce_of_two(
    z1: Tensor, z2: Tensor, temperature: float = 0.1, extra_pos_mask: Tensor | None = None
) -> Tensor:
    if extra_pos_mask is not None:
        raise IECLError("performance.blocked_infonce: it knows no labels, set supervised false")
    return info_nce(
        torch.cat((z1, z2)),
        torch.arange(len(z1), device=z1.device).repeat(2),
        temperature=temperature,
        positives="each",
        gather_distributed=False,  # this host compares within a process
    )


class Index(Host):
    """https://pypi.org/project/solo-learn, 1.0.2."""

    name = "index"
    loaders = "utils"
    online = "encoder"
    momentum = "momentum_encoder"
    finetunes = False

    @classmethod
    def recognises(cls, base_method: type) -> bool:
        return hasattr(base_method, "_SUPPORTED_ENCODERS")

    @property
    def backbones(self) -> Mapping[str, Any]:
        return dict.fromkeys(self.base_method._SUPPORTED_ENCODERS)  # type: ignore[attr-defined]

    def register(self, objectives: Sequence[str]) -> None:
        """Its backbones are in a dict inside ``BaseMethod.__init__``: there is no registry.

        The dict is read from ``solo.utils.backbones`` at each call, so for a timm name, and only
        then, one of its entries stands for the timm model while ``__init__`` runs.
        """
        base: Any = self.base_method
        module = self.import_module("utils.backbones")
        base._SUPPORTED_ENCODERS.extend(PREFIX + n for n in timm.list_models())
        original, stand_in = base.__init__, "vit_tiny"

        @wraps(original)
        def init(self: Any, encoder: str, *args: Any, **kwargs: Any) -> None:
            if not encoder.startswith(PREFIX):
                original(self, encoder, *args, **kwargs)
                return
            constructor = getattr(module, stand_in)
            setattr(module, stand_in, partial(timm_backbone, name=encoder.removeprefix(PREFIX)))
            try:
                original(self, stand_in, *args, **kwargs)
            finally:
                setattr(module, stand_in, constructor)
            # not the timm name: the host looks for "resnet" in it, to treat torchvision's
            self.encoder_name = "timm"

        base.__init__ = init

    def complete(self, cfg: DictConfig) -> DictConfig:
        """What main's ``parse_cfg`` derives: one YAML, one run."""
        defaults = {
            "seed": 5,
            "strategy": None,
            "num_nodes": 1,
            "resume_from_checkpoint": None,
            "accumulate_grad_batches": 1,
            "data.format": "image_folder",
            "data.no_labels": False,
            "data.fraction": -1,
            "optimizer.exclude_bias_n_norm_wd": False,
            "scheduler.lr_decay_steps": None,
            "scheduler.min_lr": 0.0,
            "scheduler.warmup_start_lr": 3e-5,
            "scheduler.warmup_epochs": 10,
            "momentum.base_tau": 0.99,
            "momentum.final_tau": 1.0,
            "momentum.classifier": False,
            "knn_eval.enabled": False,
            "knn_eval.k": 20,
            "checkpoint.enabled": False,
            "checkpoint.dir": "trained_models",
            "checkpoint.frequency": 1,
        }
        with open_dict(cfg):
            for key, value in defaults.items():
                if OmegaConf.select(cfg, key) is None:
                    OmegaConf.update(cfg, key, value, force_add=True)
            dataset = cfg.data.dataset
            cfg.data.num_classes = NUM_CLASSES.get(dataset) or max(
                1, sum(entry.is_dir() for entry in Path(cfg.data.train_path).iterdir())
            )
            large = cfg.augmentations[0].crop_size
            crops = [(a.crop_size == large, a.num_crops) for a in cfg.augmentations]
            cfg.data.num_large_crops = sum(n for is_large, n in crops if is_large)
            cfg.data.num_small_crops = sum(n for is_large, n in crops if not is_large)
            scale = cfg.optimizer.batch_size * device_count(cfg) * cfg.num_nodes / 256
            cfg.optimizer.lr = cfg.optimizer.lr * scale
            if cfg.data.val_path is not None:
                cfg.optimizer.classifier_lr = cfg.optimizer.classifier_lr * scale
            if cfg.optimizer.name in ("sgd", "lars"):
                cfg.optimizer.kwargs.setdefault("momentum", 0.9)
        return cfg

    def complete_linear(self, cfg: DictConfig) -> DictConfig:
        cfg.num_nodes = cfg.get("num_nodes", 1)
        cfg.seed = cfg.get("seed", 5)
        cfg.data.num_classes = NUM_CLASSES.get(cfg.data.dataset) or sum(
            entry.is_dir() for entry in Path(cfg.data.train_path).iterdir()
        )
        scale = cfg.optimizer.batch_size * device_count(cfg) * cfg.num_nodes / 256
        cfg.optimizer.lr = cfg.optimizer.lr * scale
        if cfg.optimizer.name in ("sgd", "lars"):
            key = "optimizer.kwargs.momentum"
            OmegaConf.update(cfg, key, OmegaConf.select(cfg, key, default=0.9), force_add=True)
        return cfg

    def arguments(self, cfg: DictConfig, method: Any) -> dict[str, Any]:
        """A completed configuration in main's schema as keyword arguments of a method's class."""
        if cfg.optimizer.get("exclude_bias_n_norm_wd"):
            raise IECLError(
                f"optimizer.exclude_bias_n_norm_wd: {self.describe()} has no such option, "
                "set it false"
            )
        kwargs: dict[str, Any] = {
            "encoder": cfg.backbone.name,
            "backbone_args": {
                "cifar": cfg.data.dataset in CIFAR,
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
        kwargs |= _method_defaults(method) | plain(cfg.method_kwargs)
        for block in getattr(method, "blocks", ()):
            kwargs[block] = plain(cfg.get(block))
        return kwargs

    def build(self, cfg: DictConfig) -> LightningModule:
        method: Any = self.methods[cfg.method]
        return method(**self.arguments(cfg, method))

    def build_linear(self, cfg: DictConfig, backbone: nn.Module) -> LightningModule:
        if cfg.get("finetune") and not self.finetunes:
            raise IECLError(f"finetune: {self.describe()} only trains the last layer")
        linear: Any = self.methods["linear"]
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

    def unpack(
        self,
        method: type,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        blocks: Mapping[str, Sequence[str] | None],
    ) -> Given:
        given = args[0] if len(args) == 1 else None
        if isinstance(given, DictConfig):
            args, kwargs = (), {**self.arguments(given, method), **kwargs}
        left = dict(kwargs)
        found = {
            name: left.pop(name, None)
            if options is None
            else {option: left.pop(option) for option in options if option in left}
            for name, options in blocks.items()
        }
        size = left.get("crop_size", 224)
        return Given(args, left, found, size if isinstance(size, int) else size[0])

    def apart(self, method: str) -> bool:
        return method in ("simclr", "nnclr")

    def options(self, method: str) -> set[str] | None:
        return _own_options(self.methods[method])

    def network(self, name: str, method: str, *, cifar: bool, **kwargs: Any) -> nn.Module:
        if name.startswith("resnet"):
            return getattr(torchvision.models, name)(**kwargs)
        if "swin" in name and cifar:
            kwargs["window_size"] = 4
        return getattr(self.import_module("utils.backbones"), name)(**kwargs)

    def blocked_infonce(self, model: LightningModule) -> Callable[..., Tensor]:
        if model.multicrop:
            raise IECLError(
                f"performance.blocked_infonce: {self.describe()} forms all pairs of several sizes "
                "of crops itself; give two large crops"
            )
        return _info_nce_of_two

    def pretrain_set(self, cfg: DictConfig, transform: Any) -> Dataset:
        if cfg.data.fraction > 0:
            raise IECLError(f"data.fraction: {self.describe()} has no such option, set it to -1")
        # it joins data_dir and train_dir; an absolute train_dir is taken as it is
        return self.import_module("utils.pretrain_dataloader").prepare_datasets(
            cfg.data.dataset,
            transform,
            data_dir=Path("."),
            train_dir=Path(cfg.data.train_path).expanduser().resolve(),
            no_labels=cfg.data.no_labels,
            download=True,
        )

    def pipelines(self, cfg: DictConfig) -> list[Any]:
        data = self.import_module("utils.pretrain_dataloader")
        built = []
        for i, a in enumerate(cfg.augmentations):
            if not a.rrc.enabled or a.equalization.prob:
                raise IECLError(
                    f"augmentations[{i}]: {self.describe()} always crops and has no equalization; "
                    "set rrc.enabled true and equalization.prob 0"
                )
            kwargs = {k: a.color_jitter.get(k, 0.0) for k in _JITTER} | {
                "color_jitter_prob": a.color_jitter.prob,
                "gray_scale_prob": a.grayscale.prob,
                "horizontal_flip_prob": a.horizontal_flip.prob,
                "gaussian_prob": a.gaussian_blur.prob,
                "solarization_prob": a.solarization.prob,
                "min_scale": a.rrc.crop_min_scale,
                "max_scale": a.rrc.crop_max_scale,
                "crop_size": a.crop_size,
            }
            if cfg.data.dataset == "custom":
                kwargs |= {
                    "mean": tuple(a.get("mean", IMAGENET_MEAN)),
                    "std": tuple(a.get("std", IMAGENET_STD)),
                }
            built.append(with_saib(data.prepare_transform(cfg.data.dataset, **kwargs), a))
        return built

    def evaluation_sets(
        self,
        dataset: str,
        transforms: tuple[Any, Any],
        paths: tuple[str, str],
        data_format: str,
    ) -> tuple[Dataset, Dataset]:
        train, val = (Path(path).expanduser().resolve() for path in paths)
        return self.import_module("utils.classification_dataloader").prepare_datasets(
            dataset, *transforms, data_dir=Path("."), train_dir=train, val_dir=val
        )


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


def _own_options(method: type) -> set[str]:
    """Names of the options that a method has beside those of every method."""
    return {
        name
        for cls in method.__mro__
        if cls.__module__ != "solo.methods.base" and issubclass(cls, LightningModule)
        for name in inspect.signature(cls.__init__).parameters
    }


def _method_defaults(method: type) -> dict[str, Any]:
    """1.0.2's own defaults of a method's options; they are in its argument parser, not in code."""
    own = _own_options(method)
    parser = argparse.ArgumentParser(conflict_handler="resolve")
    method.add_model_specific_args(parser)  # type: ignore[attr-defined]
    return {a.dest: a.default for a in parser._actions if a.dest in own and a.default is not None}
