"""``iecl-solo linear``: what the host's main_linear.py does, on either solo-learn."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf

from iecl_solo import checks
from iecl_solo.cli.hydra_app import Invocation
from iecl_solo.errors import IECLError
from iecl_solo.evaluate.linear import linear_accuracy
from iecl_solo.evaluate.load import Pretrained, load_backbone, read_pretrained
from iecl_solo.evaluate.protocol import EvaluationConfig, LinearProtocol
from iecl_solo.evaluate.run import EVALUATION, choose_lr, own_data
from iecl_solo.files import write_json
from iecl_solo.solo.config import plain
from iecl_solo.solo.data import IMAGENET_MEAN, IMAGENET_STD, evaluation_datasets
from iecl_solo.solo.host import Host, find_host
from iecl_solo.solo.settings import device_count, prepare_linear, require
from iecl_solo.train.callbacks.terminal import Terminal
from iecl_solo.train.fit import loggers, trainer_arguments
from iecl_solo.train.run import ARGS, RESULT, check_name, versions

#: Learning rates for 256 images a batch, out of which one is chosen where none is given.
GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
#: Schedulers that both hosts have.
SCHEDULERS = ("warmup_cosine", "reduce", "step", "exponential", "none")
_EPOCHS_OF_GRID = 20
# what a run's folder holds, or the other evaluations write there
_TAKEN = [
    name.removesuffix(".json") for name in (ARGS, RESULT, EVALUATION, "knn.json", "dense.json")
]


def _fill(cfg: DictConfig, pretrained: DictConfig, given: Invocation) -> None:
    """Take from the checkpoint what is not given: backbone, method, data and the images' size."""
    if OmegaConf.select(cfg, "backbone.name") is None:
        cfg.backbone = pretrained.backbone
    if cfg.backbone.name != pretrained.backbone.name:
        raise IECLError(
            f"backbone.name: '{cfg.backbone.name}' is given, the checkpoint holds "
            f"'{pretrained.backbone.name}'"
        )
    if cfg.get("pretrain_method") is None:
        cfg.pretrain_method = pretrained.method
    for key in ("dataset", "train_path", "val_path", "format"):
        try:
            missing = OmegaConf.select(cfg.data, key, throw_on_missing=True) is None
        except Exception:
            missing = True
        if missing:
            cfg.data[key] = pretrained.data.get(key, "image_folder" if key == "format" else None)
    size = "data.augmentations.crop_size"
    typed = given.gives(size) or given.gives("data.image_size")
    if not typed or OmegaConf.select(cfg, size) is None:
        OmegaConf.update(cfg, size, pretrained.augmentations[0].crop_size, force_add=True)


def _chosen_lr(cfg: DictConfig, pretrained: Pretrained, host: Host) -> float:
    """The best of a grid on a tenth of the training set, on features that are computed once."""
    protocol = EvaluationConfig(
        linear=LinearProtocol(
            max_epochs=min(_EPOCHS_OF_GRID, cfg.max_epochs),
            lr=list(GRID),
            weight_decay=cfg.optimizer.weight_decay,
            batch_size=cfg.optimizer.batch_size,
        )
    )
    best = choose_lr(pretrained, host, protocol, own_data(cfg))
    print(f"learning rate {best:g}: the best of {list(GRID)} on a tenth of the training set")
    return best


def main(cfg: DictConfig, given: Invocation) -> None:
    """Train the linear layer; print its accuracy and save it beside the checkpoint."""
    OmegaConf.set_struct(cfg, False)
    require(cfg, ["pretrained_feature_extractor"])
    host = find_host()
    pretrained = read_pretrained(cfg.pretrained_feature_extractor)
    _fill(cfg, pretrained.cfg, given)
    checks.one_of("scheduler.name", OmegaConf.select(cfg, "scheduler.name"), SCHEDULERS)
    if cfg.get("name") and check_name(cfg.name) in _TAKEN:
        raise IECLError(f"name: {cfg.name!r} is not allowed, the run has a file of that name")
    if device_count(cfg) > 1:
        raise IECLError(f"devices: {cfg.devices} is not allowed, a linear evaluation runs on one")
    choose = cfg.optimizer.get("lr") is None or not given.gives("optimizer.lr")
    if choose:
        cfg.optimizer.lr = GRID[0]
        prepare_linear(copy.deepcopy(cfg), host)  # what is wrong is said before the work
        cfg.optimizer.lr = _chosen_lr(cfg, pretrained, host)
    cfg = prepare_linear(cfg, host)
    backbone = load_backbone(pretrained, host)
    train, test = evaluation_datasets(
        host,
        cfg.data,
        image_size=cfg.data.augmentations.crop_size,
        augment=True,
        mean=OmegaConf.select(cfg, "data.augmentations.mean", default=IMAGENET_MEAN),
        std=OmegaConf.select(cfg, "data.augmentations.std", default=IMAGENET_STD),
    )
    folder = pretrained.path.parent
    bar = sys.stderr.isatty()
    arguments: dict[str, Any] = trainer_arguments(cfg) | {
        "logger": loggers(cfg, folder / cfg.name),
        "enable_progress_bar": bar,
    }
    callbacks: list[Callback] = [] if bar else [Terminal(cfg.name, [], labelled=True)]
    top1, top5 = linear_accuracy(cfg, backbone, host, train, test, arguments, callbacks=callbacks)
    if math.isnan(top1):
        rate = cfg.optimizer.lr
        raise IECLError(f"optimizer.lr: the linear layer diverged at {rate:g}; give a smaller one")
    result = folder / f"{cfg.name}.json"
    settings = plain(cfg)
    write_json(
        result,
        {"acc1": top1, "acc5": top5, "settings": settings, "versions": versions(host)},
    )
    print(f"linear evaluation: top-1 {top1:.2f} %, top-5 {top5:.2f} %  ({result})")
