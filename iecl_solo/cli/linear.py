"""``iecl-solo linear``: what the host's main_linear.py does, on either solo-learn."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf

from iecl_solo.errors import IECLError
from iecl_solo.evaluate.linear import linear_accuracy
from iecl_solo.evaluate.load import load_backbone, read_pretrained
from iecl_solo.files import write_json
from iecl_solo.solo.config import plain
from iecl_solo.solo.data import IMAGENET_MEAN, IMAGENET_STD, evaluation_datasets
from iecl_solo.solo.host import find_host
from iecl_solo.solo.settings import prepare_linear, require
from iecl_solo.train.callbacks.epoch_line import EpochLine
from iecl_solo.train.fit import loggers, trainer_arguments
from iecl_solo.train.run import versions


def _check_backbone(cfg: DictConfig, pretrained: DictConfig) -> None:
    if cfg.backbone.name != pretrained.backbone.name:
        raise IECLError(
            f"backbone.name: '{cfg.backbone.name}' is given, the checkpoint holds "
            f"'{pretrained.backbone.name}'"
        )


def main(cfg: DictConfig) -> None:
    """Train the linear layer; print its accuracy and save it beside the checkpoint."""
    OmegaConf.set_struct(cfg, False)
    require(cfg, ["pretrained_feature_extractor"])
    host = find_host()
    pretrained = read_pretrained(cfg.pretrained_feature_extractor)
    if OmegaConf.select(cfg, "backbone.name") is None:
        cfg.backbone = pretrained.cfg.backbone
    cfg = prepare_linear(cfg, host)
    _check_backbone(cfg, pretrained.cfg)
    backbone = load_backbone(pretrained, host)
    size = OmegaConf.select(
        cfg, "data.augmentations.crop_size", default=pretrained.cfg.augmentations[0].crop_size
    )
    train, test = evaluation_datasets(
        host,
        cfg.data.dataset,
        cfg.data.train_path,
        cfg.data.val_path,
        image_size=size,
        augment=True,
        mean=OmegaConf.select(cfg, "data.augmentations.mean", default=IMAGENET_MEAN),
        std=OmegaConf.select(cfg, "data.augmentations.std", default=IMAGENET_STD),
        data_format=cfg.data.get("format", "image_folder"),
    )
    folder = pretrained.path.parent
    bar = sys.stderr.isatty()
    arguments: dict[str, Any] = trainer_arguments(cfg) | {
        "logger": loggers(cfg, folder / cfg.name),
        "enable_progress_bar": bar,
    }
    callbacks: list[Callback] = [] if bar else [EpochLine(cfg.name)]
    top1, top5 = linear_accuracy(cfg, backbone, host, train, test, arguments, callbacks=callbacks)
    result = folder / f"{cfg.name}.json"
    settings = plain(cfg)
    write_json(
        result,
        {"acc1": top1, "acc5": top5, "settings": settings, "versions": versions(host)},
    )
    print(f"linear evaluation: top-1 {top1:.2f} %, top-5 {top5:.2f} %  ({result})")
