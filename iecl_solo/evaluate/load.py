"""Load a trained network from its checkpoint: the plain backbone, or the whole method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from iecl_solo import checks
from iecl_solo.errors import IECLError
from iecl_solo.files import read_json
from iecl_solo.order import seeded
from iecl_solo.solo.backbones import build_backbone
from iecl_solo.solo.build import build_model
from iecl_solo.solo.checkpoint import backbone_state, load_strictly, read_checkpoint
from iecl_solo.solo.config import plain
from iecl_solo.solo.data import pretrain_loader
from iecl_solo.solo.host import Host
from iecl_solo.solo.registry import check_method
from iecl_solo.solo.settings import CIFAR
from iecl_solo.train.run import ARGS


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint and the settings beside it.

    Attributes:
        path: the ``.ckpt`` file.
        cfg: the run's completed configuration (its ``args.json``).
        checkpoint: contents of the file.
    """

    path: Path
    cfg: DictConfig
    checkpoint: dict[str, Any]


def read_pretrained(path: str | Path) -> Pretrained:
    """A checkpoint of solo-learn's or ours, with the ``args.json`` that stands beside it.

    Args:
        path: the ``.ckpt`` file, or the folder of its run.

    Raises:
        IECLError: one line, for what is missing or cannot be read.
    """
    checks.text("pretrained_feature_extractor", path)
    file = Path(path).expanduser()
    if file.is_dir():
        found = sorted(file.glob("*.ckpt"))
        if not found:
            raise IECLError(f"checkpoint {path}: the folder holds no .ckpt file")
        file = found[-1]
    checkpoint = read_checkpoint(file)
    args = file.parent / ARGS
    if not args.is_file():
        raise IECLError(f"checkpoint {path}: {ARGS}, which names its backbone, is not beside it")
    cfg = OmegaConf.create(read_json(args))
    assert isinstance(cfg, DictConfig)
    return Pretrained(file, cfg, checkpoint)


def load_backbone(pretrained: Pretrained, host: Host) -> nn.Module:
    """The trained online network, (B, 3, H, W) to (B, num_features), every tensor accounted for."""
    cfg = pretrained.cfg
    backbone = build_backbone(
        host,
        cfg.backbone.name,
        method=cfg.method,
        cifar=cfg.data.dataset in CIFAR,
        **(plain(cfg.backbone.get("kwargs")) or {}),
    )
    state = backbone_state(pretrained.checkpoint, pretrained.path)
    load_strictly(backbone, state, pretrained.path)
    return backbone


def first_views(cfg: DictConfig, host: Host, epoch: int) -> list[Tensor]:
    """The views (B, 3, H, W) of an epoch's first batch, as the training run saw them.

    Args:
        cfg: the run's completed configuration.
        host: the solo-learn in use.
        epoch: counted from 0.
    """
    loader, order = seeded(pretrain_loader(cfg, host), cfg.seed)
    order.resume(epoch, 0)
    _, views, _ = next(iter(loader))
    return list(views)


def load_method(pretrained: Pretrained, host: Host) -> LightningModule:
    """The whole trained method, objective included."""
    check_method(pretrained.cfg.method)
    model = build_model(pretrained.cfg, host)
    model.on_load_checkpoint(pretrained.checkpoint)
    load_strictly(model, pretrained.checkpoint["state_dict"], pretrained.path)
    return model
