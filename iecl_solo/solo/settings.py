"""A configuration in GitHub main's schema, checked and completed, for either solo-learn."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from iecl_solo import checks
from iecl_solo.errors import IECLError, one_line, unknown_name
from iecl_solo.images import SUFFIXES, image_files
from iecl_solo.solo import schema
from iecl_solo.solo.config import plain
from iecl_solo.solo.host import Host
from iecl_solo.solo.shards import FORMATS, class_count, open_shards

NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "stl10": 10, "imagenet": 1000, "imagenet100": 100}
DATASETS = (*NUM_CLASSES, "custom")
#: Data sets whose ResNets begin with a 3x3 convolution and no pooling, in both hosts.
CIFAR = ("cifar10", "cifar100")
FOLDER_DATASETS = ("imagenet", "imagenet100", "custom")

_REQUIRED = [
    "method",
    "backbone.name",
    "data.dataset",
    "data.train_path",
    "optimizer.name",
    "optimizer.batch_size",
    "optimizer.lr",
    "optimizer.weight_decay",
    "scheduler.name",
    "max_epochs",
]


@contextmanager
def host_refusals(what: str) -> Iterator[None]:
    """Turn the host's bare assertions and missing keys into one line that says what it wanted."""
    try:
        yield
    except OmegaConfBaseException as error:
        key = error.full_key or error.key
        reason = str(error.msg or error).splitlines()[0]
        raise IECLError(f"{what}: {key}: {reason}") from None
    except AssertionError as error:
        line = traceback.extract_tb(error.__traceback__)[-1].line
        raise IECLError(f"{what}: solo-learn refuses this configuration: {error or line}") from None
    except IECLError:
        raise
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        said = f"{what}: solo-learn refuses this configuration: {one_line(error)}"
        raise IECLError(said) from error


def require(cfg: DictConfig, keys: list[str] | tuple[str, ...]) -> None:
    """One line naming the first of ``keys`` that has no value."""
    for key in keys:
        try:
            missing = OmegaConf.select(cfg, key, throw_on_missing=True) is None
        except OmegaConfBaseException:
            missing = True
        if missing:
            raise IECLError(f"{key}: no value is given; add {key}=... or set it in the YAML")


def sources(path: Any) -> list[str]:
    """``data.train_path`` without labels: a folder, a text file of paths, or a list of these.

    >>> sources("photos"), sources(["photos", "more.txt"])
    (['photos'], ['photos', 'more.txt'])
    """
    return [str(p) for p in path] if isinstance(path, (list, ListConfig)) else [str(path)]


def without_labels(cfg: DictConfig) -> bool:
    """Whether a configuration's images are files of which no class is known."""
    in_files = cfg.data.get("format") in (None, "image_folder", *FORMATS)
    return bool(cfg.data.get("no_labels")) and cfg.data.dataset in FOLDER_DATASETS and in_files


def expand_home(cfg: DictConfig) -> None:
    """Write ``~`` in the paths of the images out: shells leave it alone after ``KEY=``."""
    for key in ("train_path", "val_path"):
        path = OmegaConf.select(cfg, f"data.{key}")
        if isinstance(path, str):
            cfg.data[key] = os.path.expanduser(path)
        elif isinstance(path, ListConfig):
            cfg.data[key] = [os.path.expanduser(str(p)) for p in path]


def settle_labels(cfg: DictConfig) -> None:
    """``data.no_labels: null``, as packaged for a folder of one's own: what the folder shows.

    A text file of paths, several folders, and a folder with images beside its sub-folders have no
    labels. Sub-folders alone are classes.
    """
    data = cfg.data
    if "no_labels" not in data or data.no_labels is not None:
        return
    path, kind = OmegaConf.select(cfg, "data.train_path"), data.get("format")
    data.no_labels = False
    if path is None or data.dataset not in FOLDER_DATASETS or kind not in (None, "image_folder"):
        return
    first, *more = sources(path)
    folder = Path(first).expanduser()
    if more or folder.is_file():
        data.no_labels = True
    elif folder.is_dir():
        data.no_labels = any(f.suffix.lower() in SUFFIXES for f in folder.iterdir() if f.is_file())


def check_image_folder(key: str, path: str | Path) -> int:
    """Number of images under a folder of classes.

    Raises:
        IECLError: one line, when the folder or one of its classes holds no image.
    """
    if isinstance(path, (list, ListConfig)):
        raise IECLError(f"{key}: {list(path)}: several folders have no labels, one is needed")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise IECLError(f"{key}: {path}: no such folder")
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        unlabelled = "; data.no_labels=true takes images without" if key.startswith("data.") else ""
        raise IECLError(
            f"{key}: {path}: it holds no class folders, <class>/<image> is expected{unlabelled}"
        )
    total = 0
    for folder_of_class in classes:
        try:
            total += len(image_files(folder_of_class))
        except IECLError:
            raise IECLError(f"{key}: {folder_of_class}: the class holds no image") from None
    return total


def check_images(key: str, data_format: str, path: str) -> int:
    """Number of images in a folder of classes, or in shards.

    Raises:
        IECLError: one line, when they cannot be read.
    """
    if data_format not in FORMATS:
        return check_image_folder(key, path)
    try:
        return len(open_shards(data_format, str(path)).labels)
    except IECLError as error:
        raise IECLError(f"{key}: {error}") from None


def device_count(cfg: DictConfig) -> int:
    """How many devices of one node the configuration asks for."""
    devices = cfg.get("devices", 1)
    if isinstance(devices, (list, ListConfig)):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([d for d in devices.split(",") if d.strip()])
    try:
        return max(1, int(devices))
    except (TypeError, ValueError):
        raise IECLError(f"devices: {devices!r} is not allowed, 2 or [0, 1] is") from None


def process_count(cfg: DictConfig) -> int:
    """How many processes train, each on its part of the images: devices times nodes."""
    return device_count(cfg) * int(cfg.get("num_nodes") or 1)


def too_few(cfg: DictConfig, images: int, which: str, processes: int) -> None:
    """Refuse a batch that is never full.

    Raises:
        IECLError: one line, where each process has fewer images than a batch.
    """
    size = cfg.optimizer.batch_size
    if images < size * processes:
        each = f", on each of {processes} devices," if processes > 1 else ""
        raise IECLError(
            f"optimizer.batch_size: {size}{each} is more than the {images} images {which}, so that "
            "no batch is ever full"
        )


def check_data(cfg: DictConfig, *, full_batches: bool = True, processes: int = 1) -> None:
    """Data set known, folders there and not empty, batch size possible.

    Args:
        cfg: the configuration.
        full_batches: whether a batch that is not full is dropped, as in pretraining.
        processes: that share the images.
    """
    checks.one_of("data.dataset", cfg.data.dataset, DATASETS)
    data_format = cfg.data.get("format")
    if data_format in FORMATS and cfg.data.dataset not in FOLDER_DATASETS:
        raise IECLError(
            f"data.format: {data_format} is not for data.dataset: {cfg.data.dataset}, it is for "
            f"{', '.join(FOLDER_DATASETS)}"
        )
    if data_format in FORMATS and cfg.data.get("on_error") == "skip":
        raise IECLError(
            f"data.on_error: skip is for files of a folder, not for data.format: {data_format}"
        )
    in_classes = cfg.data.dataset in FOLDER_DATASETS and data_format not in ("h5", "dali")
    if cfg.data.get("fraction", -1) != -1 and (not in_classes or without_labels(cfg)):
        raise IECLError("data.fraction: it is for a folder of classes; list the files instead")
    if cfg.data.dataset not in FOLDER_DATASETS or data_format in ("h5", "dali"):
        return
    if data_format in FORMATS:
        if cfg.data.get("fraction", -1) != -1:
            raise IECLError(f"data.fraction: not with data.format: {data_format}; leave shards out")
        images = check_images("data.train_path", data_format, cfg.data.train_path)
    elif without_labels(cfg):
        try:
            images = len(image_files(*sources(cfg.data.train_path)))
        except IECLError as error:
            raise IECLError(f"data.train_path: {error}") from None
    else:
        images = check_image_folder("data.train_path", cfg.data.train_path)
    if cfg.data.get("val_path"):
        check_images("data.val_path", data_format or "image_folder", cfg.data.val_path)
    if full_batches:
        too_few(cfg, images, "of data.train_path", processes)


def _options(host: Host, method: str) -> set[str] | None:
    """Names of ``method_kwargs``; None for a method that checks its own."""
    own = method not in host.methods or hasattr(host.methods[method], "Config")
    return None if own else host.options(method)


def prepare_pretrain(cfg: DictConfig, host: Host) -> DictConfig:
    """Check a pretraining configuration, and complete it as the host's own script would.

    Args:
        cfg: as composed; it is changed in place (learning rates are scaled by the batch size,
            crops counted, defaults filled).
        host: the solo-learn in use.

    Raises:
        IECLError: one line naming the key, what was given and what is allowed.
    """
    OmegaConf.set_struct(cfg, False)
    require(cfg, _REQUIRED)
    if cfg.backbone.name not in host.backbones:
        raise unknown_name("backbone", cfg.backbone.name, host.backbones)
    if not isinstance(cfg.get("augmentations"), ListConfig) or not cfg.augmentations:
        raise IECLError("augmentations: a list of at least one pipeline is needed")
    method = host.methods.get(cfg.method)
    schema.check(plain(cfg), tuple(getattr(method, "blocks", ())))
    expand_home(cfg)
    settle_labels(cfg)
    if cfg.data.get("val_path"):
        require(cfg, ["optimizer.classifier_lr"])
    check_data(cfg)
    cfg.name = cfg.get("name") or f"{cfg.method}-{cfg.data.dataset}"
    for block in ("backbone.kwargs", "optimizer.kwargs", "method_kwargs", "data.val_path"):
        if OmegaConf.select(cfg, block) is None:
            OmegaConf.update(cfg, block, None if block == "data.val_path" else {})
    options = plain(cfg.method_kwargs)
    if isinstance(options, dict):
        require(cfg, [f"method_kwargs.{key}" for key in options])
    schema.check_method_options(options, _options(host, cfg.method))
    with host_refusals(f"method '{cfg.method}'"):
        return _completed(cfg, host.complete)


def _completed(cfg: DictConfig, complete: Callable[[DictConfig], DictConfig]) -> DictConfig:
    """What the host makes of it, which takes each folder in ``data.train_path`` for a class."""
    in_shards = cfg.data.get("format") in FORMATS
    if not in_shards and not without_labels(cfg):
        return complete(cfg)
    path = cfg.data.train_path
    with tempfile.TemporaryDirectory() as stand_in:
        if in_shards and not cfg.data.get("no_labels"):
            shards = open_shards(cfg.data.format, str(path))
            for label in range(class_count(shards)):
                Path(stand_in, str(label)).mkdir()
        cfg.data.train_path = stand_in
        cfg = complete(cfg)
    cfg.data.train_path = path
    return cfg


def prepare_linear(cfg: DictConfig, host: Host) -> DictConfig:
    """Check and complete a linear evaluation's configuration, in main_linear.py's schema.

    Args:
        cfg: as composed; changed in place.
        host: the solo-learn in use.

    Raises:
        IECLError: one line naming the key, what was given and what is allowed.
    """
    OmegaConf.set_struct(cfg, False)
    require(cfg, ["pretrained_feature_extractor", "data.val_path", *_REQUIRED[1:]])
    if cfg.backbone.name not in host.backbones:
        raise unknown_name("backbone", cfg.backbone.name, host.backbones)
    given = plain(cfg)
    schema.check_steps(given["scheduler"])
    del given["scheduler"]["name"]  # it knows more of them than pretraining does
    schema.check(given)
    expand_home(cfg)
    check_data(cfg, full_batches=False)
    cfg.name = cfg.get("name") or f"linear-{cfg.data.dataset}"
    with host_refusals("linear evaluation"):
        return _completed(cfg, host.complete_linear)
