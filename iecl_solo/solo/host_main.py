"""solo-learn of GitHub main: methods take one OmegaConf ``cfg``, and it brings its scripts."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any

import timm
import torch
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import Dataset

from iecl_solo.losses.infonce import info_nce
from iecl_solo.solo.backbones import PREFIX, timm_backbone
from iecl_solo.solo.data import with_saib
from iecl_solo.solo.host import Given, Host
from iecl_solo.solo.settings import device_count


class Main(Host):
    """https://github.com/vturrisi/solo-learn, branch main (1.0.6)."""

    name = "main"
    loaders = "data"
    online = "backbone"
    momentum = "momentum_backbone"

    @classmethod
    def recognises(cls, base_method: type) -> bool:
        return hasattr(base_method, "_BACKBONES")

    @property
    def backbones(self) -> Mapping[str, Any]:
        return self.base_method._BACKBONES  # type: ignore[attr-defined]

    def register(self, objectives: Sequence[str]) -> None:
        registry: dict[str, Any] = self.base_method._BACKBONES  # type: ignore[attr-defined]
        for name in timm.list_models():
            registry[PREFIX + name] = partial(timm_backbone, name=name)
        # it chooses the ViT by the method's name (MoCo v3 has its own): an objective's prefix
        # must not change the network
        prefixes = tuple(f"{name}_" for name in objectives)
        for name, constructor in list(registry.items()):
            if not name.startswith(PREFIX):
                registry[name] = _without_prefix(constructor, prefixes)
        self._register_saib()

    def _register_saib(self) -> None:
        """Its pipeline builder learns ``augmentations[i].saib: {file, prob}``.

        Its scripts import the builder by name before a Hydra plugin can run, so it is replaced in
        the running script too.
        """
        module = self.import_module("data.pretrain_dataloader")
        name = "build_transform_pipeline"
        original: Any = getattr(module, name)

        @wraps(original)
        def build_transform_pipeline(dataset: str, cfg: Any) -> Any:
            return with_saib(original(dataset, cfg), cfg)

        for holder in (module, sys.modules["__main__"]):
            if getattr(holder, name, None) is original:
                setattr(holder, name, build_transform_pipeline)

    def complete(self, cfg: DictConfig) -> DictConfig:
        return self._parsed(cfg, "args.pretrain")

    def complete_linear(self, cfg: DictConfig) -> DictConfig:
        return self._parsed(cfg, "args.linear")

    def _parsed(self, cfg: DictConfig, module: str) -> DictConfig:
        # it counts devices with len()
        devices, cfg.devices = cfg.get("devices", 1), list(range(device_count(cfg)))
        cfg = self.import_module(module).parse_cfg(cfg)
        cfg.devices = devices
        return cfg

    def build(self, cfg: DictConfig) -> LightningModule:
        model: Any = self.methods[cfg.method](cfg)
        self.import_module("utils.misc").make_contiguous(model)
        if not cfg.performance.disable_channel_last:
            model = model.to(memory_format=torch.channels_last)
        return model

    def build_linear(self, cfg: DictConfig, backbone: nn.Module) -> LightningModule:
        linear: Any = self.methods["linear"]
        return linear(backbone, cfg=cfg)

    def unpack(
        self,
        method: type,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        blocks: Mapping[str, Sequence[str] | None],
    ) -> Given:
        cfg = args[0] if args else kwargs["cfg"]
        size = OmegaConf.select(cfg, "augmentations[0].crop_size", default=224)
        found = {name: cfg.get(name) for name in blocks}
        return Given(args, kwargs, found, size if isinstance(size, int) else size[0])

    def options(self, method: str) -> set[str] | None:
        found: set[str] = set()
        for cls in self.methods[method].__mro__:
            if cls.__module__.startswith("solo.methods"):
                found |= set(re.findall(r"\bmethod_kwargs\.(\w+)", inspect.getsource(cls)))
        return found

    def network(self, name: str, method: str, *, cifar: bool, **kwargs: Any) -> nn.Module:
        return self.backbones[name](method, **kwargs)

    def blocked_infonce(self, model: LightningModule) -> Callable[..., Tensor]:
        return partial(info_nce, positives="joint")

    def pipelines(self, cfg: DictConfig) -> list[Any]:
        build = self.import_module("data.pretrain_dataloader").build_transform_pipeline
        return [build(cfg.data.dataset, a) for a in cfg.augmentations]

    def pretrain_set(self, cfg: DictConfig, transform: Any) -> Dataset:
        return self.import_module("data.pretrain_dataloader").prepare_datasets(
            cfg.data.dataset,
            transform,
            train_data_path=cfg.data.train_path,
            data_format=cfg.data.format,
            data_fraction=cfg.data.fraction,
            no_labels=cfg.data.no_labels,
            download=True,
        )

    def evaluation_sets(
        self,
        dataset: str,
        transforms: tuple[Any, Any],
        paths: tuple[str, str],
        data_format: str,
    ) -> tuple[Dataset, Dataset]:
        return self.import_module("data.classification_dataloader").prepare_datasets(
            dataset,
            *transforms,
            train_data_path=paths[0],
            val_data_path=paths[1],
            data_format=data_format,
        )


def _without_prefix(
    constructor: Callable[..., nn.Module], prefixes: tuple[str, ...]
) -> Callable[..., nn.Module]:
    @wraps(constructor)
    def build(method: Any = None, *args: Any, **kwargs: Any) -> nn.Module:
        for prefix in prefixes:
            method = str(method).removeprefix(prefix) if method is not None else None
        return constructor(method, *args, **kwargs)

    return build
