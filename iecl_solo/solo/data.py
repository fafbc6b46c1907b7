"""Data loaders out of the host's own functions, for either solo-learn."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from iecl_solo.augment import FrozenSAIB
from iecl_solo.errors import IECLError
from iecl_solo.solo.host import Host

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# 1.0.2 names them so; it has no equalisation and always crops
_JITTER = ("brightness", "contrast", "saturation", "hue")


def load_image(path: str) -> Image.Image:
    """An RGB image; a file that does not decode is named in one line."""
    try:
        with open(path, "rb") as file:
            return Image.open(file).convert("RGB")
    except OSError as error:  # PIL's UnidentifiedImageError is one
        reason = str(error).splitlines()[0] if "cannot identify" not in str(error) else "no image"
        raise IECLError(f"image {path}: it does not decode ({reason})") from None


def _named_errors(dataset: Any) -> Any:
    if hasattr(dataset, "loader"):
        dataset.loader = load_image
    return dataset


def _with_saib(transform: Any, augmentation: Mapping[str, Any]) -> Any:
    """The host's pipeline of one crop, followed by a frozen SAIB where the YAML has ``saib:``."""
    given = augmentation.get("saib")
    if given is None:
        return transform
    unknown = sorted(set(given) - {"file", "prob"})
    if unknown or "file" not in given:
        raise IECLError(f"augmentations.saib: {unknown or 'no file'}; file and prob are known")
    return transforms.Compose([transform, FrozenSAIB(given["file"], given.get("prob", 0.5))])


def register_saib_augmentation(host: Host) -> None:
    """Let main's own pipeline builder know ``augmentations[i].saib: {file, prob}``. Idempotent.

    Its scripts import the builder by name before a Hydra plugin can run, so it is replaced in the
    running script too.
    """
    if not host.takes_cfg:  # no scripts, and no pipeline from a configuration
        return
    module = host.import_module("data.pretrain_dataloader")
    name = "build_transform_pipeline"
    original: Any = getattr(module, name)
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def build_transform_pipeline(dataset: str, cfg: Any) -> Any:
        return _with_saib(original(dataset, cfg), cfg)

    for holder in (module, sys.modules["__main__"]):
        if getattr(holder, name, None) is original:
            setattr(holder, name, build_transform_pipeline)


def _main_transform(cfg: DictConfig, host: Host) -> Any:
    data = host.import_module("data.pretrain_dataloader")
    pipelines = []
    for a in cfg.augmentations:
        crop = data.build_transform_pipeline(cfg.data.dataset, a)
        pipelines.append(data.NCropAugmentation(crop, a.num_crops))
    return data.FullTransformPipeline(pipelines)


def _kwargs_transform(cfg: DictConfig, host: Host) -> Any:
    data = host.import_module("utils.pretrain_dataloader")
    built, counts = [], []
    for i, a in enumerate(cfg.augmentations):
        if not a.rrc.enabled or a.equalization.prob:
            raise IECLError(
                f"augmentations[{i}]: {host.describe()} always crops and has no equalization; "
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
        built.append(_with_saib(data.prepare_transform(cfg.data.dataset, **kwargs), a))
        counts.append(a.num_crops)
    return data.prepare_n_crop_transform(built, num_crops_per_aug=counts)


def pretrain_loader(cfg: DictConfig, host: Host) -> DataLoader:
    """Batches ``[index, views, label]`` as the host's pretraining script makes them."""
    if cfg.data.format == "dali":
        raise IECLError("data.format: dali is for solo-learn's own script; use image_folder or h5")
    common = {"no_labels": cfg.data.no_labels, "download": True}
    if host.takes_cfg:
        data = host.import_module("data.pretrain_dataloader")
        dataset = data.prepare_datasets(
            cfg.data.dataset,
            _main_transform(cfg, host),
            train_data_path=cfg.data.train_path,
            data_format=cfg.data.format,
            data_fraction=cfg.data.fraction,
            **common,
        )
    else:
        data = host.import_module("utils.pretrain_dataloader")
        if cfg.data.fraction > 0:
            raise IECLError(f"data.fraction: {host.describe()} has no such option, set it to -1")
        # it joins data_dir and train_dir; an absolute train_dir is taken as it is
        dataset = data.prepare_datasets(
            cfg.data.dataset,
            _kwargs_transform(cfg, host),
            data_dir=Path("."),
            train_dir=Path(cfg.data.train_path).expanduser().resolve(),
            **common,
        )
    return data.prepare_dataloader(
        _named_errors(dataset),
        batch_size=cfg.optimizer.batch_size,
        num_workers=cfg.data.num_workers,
    )


def _sized_transforms(size: int, mean: Any, std: Any) -> tuple[Any, Any]:
    """The host's transforms for folders of images, at the size that was trained on.

    The host fixes 224 there, which makes another problem of a backbone trained at 32 (ours).
    """
    to_tensor = [transforms.ToTensor(), transforms.Normalize(tuple(mean), tuple(std))]
    train = [
        transforms.RandomResizedCrop(size, scale=(0.08, 1.0)),
        transforms.RandomHorizontalFlip(),
    ]
    val = [transforms.Resize(size), transforms.CenterCrop(size)]
    return transforms.Compose(train + to_tensor), transforms.Compose(val + to_tensor)


def evaluation_datasets(
    host: Host,
    dataset: str,
    train_path: str,
    val_path: str,
    *,
    image_size: int,
    augment: bool = False,
    mean: Any = IMAGENET_MEAN,
    std: Any = IMAGENET_STD,
    data_format: str = "image_folder",
) -> tuple[Dataset, Dataset]:
    """Train and test set for evaluation, through the host's own ``prepare_datasets``.

    Args:
        host: the solo-learn in use.
        dataset: one of solo-learn's data set names.
        train_path: folder of the training set.
        val_path: folder of the test set.
        image_size: size of the images for ``dataset: custom``; the other data sets have theirs.
        augment: whether the training set is cropped and flipped at random (linear evaluation) or
            shown as the test set is (k-NN).
        mean: per-channel mean for ``dataset: custom``.
        std: per-channel standard deviation for ``dataset: custom``.
        data_format: image_folder or h5.
    """
    module = (
        "data.classification_dataloader" if host.takes_cfg else ("utils.classification_dataloader")
    )
    data = host.import_module(module)
    if dataset == "custom":
        for_train, for_val = _sized_transforms(image_size, mean, std)
    else:
        for_train, for_val = data.prepare_transforms(dataset)
    for_train = for_train if augment else for_val
    if host.takes_cfg:
        train, val = data.prepare_datasets(
            dataset,
            for_train,
            for_val,
            train_data_path=train_path,
            val_data_path=val_path,
            data_format=data_format,
        )
    else:
        train, val = data.prepare_datasets(
            dataset,
            for_train,
            for_val,
            data_dir=Path("."),
            train_dir=Path(train_path).expanduser().resolve(),
            val_dir=Path(val_path).expanduser().resolve(),
        )
    return _named_errors(train), _named_errors(val)


def evaluation_loader(
    dataset: Dataset, batch_size: int, num_workers: int, *, shuffle: bool = False
) -> DataLoader:
    """A loader that leaves no image out."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def evaluation_transform(host: Host, dataset: str, image_size: int) -> Any:
    """What an image of any size goes through before a backbone that was trained on ``dataset``.

    The host's own for evaluation, after a resize and a crop where it has none: CIFAR's images are
    all of one size.
    """
    if dataset == "custom":
        return _sized_transforms(image_size, IMAGENET_MEAN, IMAGENET_STD)[1]
    module = "data" if host.takes_cfg else "utils"
    data = host.import_module(f"{module}.classification_dataloader")
    _, own = data.prepare_transforms(dataset)
    if any(isinstance(step, transforms.Resize) for step in own.transforms):
        return own
    sized = [transforms.Resize(image_size), transforms.CenterCrop(image_size)]
    return transforms.Compose([*sized, *own.transforms])
