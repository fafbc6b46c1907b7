"""Data loaders out of the host's own functions, for either solo-learn."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from iecl_solo.augment import FrozenSAIB
from iecl_solo.decoded import undecodable
from iecl_solo.errors import IECLError, one_line
from iecl_solo.images import image_files, in_loops, load_image
from iecl_solo.order import EpochOrder, SteadyLoader
from iecl_solo.solo.batched import BatchedLoader, batched, decoded, keeps_shape
from iecl_solo.solo.host import Host
from iecl_solo.solo.settings import sources, without_labels
from iecl_solo.solo.shards import FORMATS, MIXED, ShardImages, open_shards, tar_files

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _real_images(dataset: Any) -> Any:
    """A data set whose images are read by ``load_image``, each once where links make a loop."""
    if hasattr(dataset, "loader"):
        dataset.loader = load_image
    if hasattr(dataset, "samples"):
        files = [path for path, _ in dataset.samples]
        if again := in_loops(files, str(dataset.root)):
            _keep(dataset, [i for i, file in enumerate(files) if file not in again])
    return dataset


def _keep(dataset: Any, left: Sequence[int]) -> None:
    """Leave these entries of a folder's, in all of its lists."""
    kept = "samples" if hasattr(dataset, "samples") else "images"
    count = len(getattr(dataset, kept))
    for name in {kept, "imgs", "targets"} & set(vars(dataset)):
        values = getattr(dataset, name)
        if len(values) == count:  # not after data.fraction, which shortens samples alone
            setattr(dataset, name, [values[i] for i in left])


def _number_alike(train: Any, test: Any) -> None:
    """Give the test images the numbers that their classes have in the training set.

    A folder numbers its own classes from 0: one that lacks a class calls the next by its number.

    Raises:
        IECLError: one line, when a test class is none of the training set's.
    """
    numbers, own = (getattr(s, "class_to_idx", None) for s in (train, test))
    if not numbers or not own or not hasattr(test, "samples"):
        return
    if extra := sorted(own.keys() - numbers.keys()):
        raise IECLError(
            f"{test.root}: its class '{extra[0]}' is none of the {len(numbers)} of {train.root}"
        )
    renumbered = {number: numbers[name] for name, number in own.items()}
    test.samples = [(file, renumbered[number]) for file, number in test.samples]
    test.targets = [number for _, number in test.samples]


def with_saib(transform: Any, augmentation: Mapping[str, Any]) -> Any:
    """The host's pipeline of one crop, followed by a frozen SAIB where the YAML has ``saib:``."""
    given = augmentation.get("saib")
    if given is None:
        return transform
    unknown = sorted(set(given) - {"file", "prob"})
    if unknown or "file" not in given:
        raise IECLError(f"augmentations.saib: {unknown or 'no file'}; file and prob are known")
    return transforms.Compose([transform, FrozenSAIB(given["file"], given.get("prob", 0.5))])


def pretrain_loader(
    cfg: DictConfig,
    host: Host,
    device: Callable[[], torch.device] = lambda: torch.device("cpu"),
) -> DataLoader | BatchedLoader:
    """Batches ``[index, views, label]`` as the host's pretraining script makes them.

    Args:
        cfg: completed by ``prepare_pretrain``.
        host: the solo-learn in use.
        device: where ``data.views: batched`` makes its views; the host makes its own on the CPU.

    Raises:
        IECLError: as ``pretrain_set``.
    """
    if cfg.data.format == "dali":
        raise IECLError("data.format: dali is for solo-learn's own script; use image_folder or h5")
    pipelines, copies = host.pipelines(cfg), [a.num_crops for a in cfg.augmentations]
    if cfg.data.get("views") != "batched":
        dataset = pretrain_set(cfg, host, host.crops(pipelines, copies))
        return host.pretrain_loader(cfg, dataset)
    forms = [batched(p, n) for p, n in zip(pipelines, copies, strict=True)]
    images = decoded(
        pretrain_set(cfg, host, None),
        _roots(cfg),
        largest_crop=max(size for p in forms for size in p.crop.size),
        fraction=cfg.data.fraction,
        workers=cfg.data.num_workers,
    )
    if any(map(keeps_shape, pipelines)) and (images.sizes[:, 0] != images.sizes[:, 1]).any():
        raise IECLError(
            "data.views: batched makes square views, and without rrc these images are not square; "
            "per_image keeps their shape"
        )
    order = EpochOrder(len(images), cfg.optimizer.batch_size, cfg.seed)
    return BatchedLoader(images, forms, order, device)


def _roots(cfg: DictConfig) -> list[Path]:
    """The folders or files that a data set is made of."""
    if cfg.data.format == "webdataset":
        return [tar_files(str(cfg.data.train_path))[0].parent / "shards"]
    return [Path(source).expanduser() for source in sources(cfg.data.train_path)]


def pretrain_set(cfg: DictConfig, host: Host, transform: Any) -> Any:
    """The images of a pretraining configuration, as ``(index, views, label)``.

    Args:
        cfg: completed by ``prepare_pretrain``.
        host: the solo-learn in use.
        transform: from an image to its views.

    Raises:
        IECLError: one line, when the data set is not there and cannot be had.
    """
    if cfg.data.format in FORMATS:
        mixed = cfg.data.get("shuffle_shards", MIXED)
        shards = open_shards(cfg.data.format, str(cfg.data.train_path))
        named = not cfg.data.no_labels
        return ShardImages(shards, transform, numbered=True, labelled=named, mixed=mixed)
    paths, workers = sources(cfg.data.train_path), cfg.data.num_workers
    skips = cfg.data.get("on_error") == "skip"
    if without_labels(cfg):
        found = Unlabelled(image_files(*paths), transform)
        return _decodable("data.train_path", found, paths[0], workers) if skips else found
    try:
        labelled = _real_images(host.pretrain_set(cfg, transform))
        return _decodable("data.train_path", labelled, paths[0], workers) if skips else labelled
    except (OSError, RuntimeError) as error:  # a download that fails raises either
        reason = one_line(error)
        raise IECLError(
            f"data.train_path: {cfg.data.train_path}: {cfg.data.dataset} cannot be read ({reason})"
        ) from error


def _decodable(key: str, dataset: Any, root: str, workers: int) -> Any:
    """A data set without the images that do not decode, which are counted in a line.

    Raises:
        IECLError: one line, when its images are no files, or none of them decodes.
    """
    kept = "samples" if hasattr(dataset, "samples") else "images"
    if not isinstance(dataset, Unlabelled) and kept == "images":
        raise IECLError("data.on_error: skip is for folders of images")
    entries = getattr(dataset, kept)
    files = [Path(entry[0] if kept == "samples" else entry) for entry in entries]
    broken = undecodable(files, Path(root), workers)
    if not broken:
        return dataset
    if len(broken) == len(files):
        raise IECLError(f"{key}: {root}: none of its {len(files)} images decodes")
    _keep(dataset, [i for i, file in enumerate(files) if file not in broken])
    first = os.path.relpath(min(broken), Path(root).expanduser())
    rank_zero_only(print)(
        f"{key}: {len(broken)} of {len(files)} images do not decode and are skipped, the first "
        f"is {first}",
        flush=True,
    )
    return dataset


class Unlabelled(Dataset):
    """Images without labels, as ``(index, views, 0)``.

    The host's own lists one folder's entries, whatever they are, and its label -1 makes the online
    classifier's loss NaN. One class has the loss 0, and no gradient.

    Args:
        files: the images.
        transform: from an image to its views.
    """

    labelled = False

    def __init__(self, files: Sequence[Path], transform: Any) -> None:
        self.root, self.images, self.transform = Path("/"), [f.absolute() for f in files], transform

    def __getitem__(self, index: int) -> tuple[int, Any, int]:
        image = load_image(self.images[index])
        return index, image if self.transform is None else self.transform(image), 0

    def __len__(self) -> int:
        return len(self.images)


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
    data: Mapping[str, Any],
    *,
    image_size: int,
    augment: bool = False,
    mean: Any = IMAGENET_MEAN,
    std: Any = IMAGENET_STD,
) -> tuple[Dataset, Dataset]:
    """Train and test set for evaluation, through the host's own ``prepare_datasets``.

    Args:
        host: the solo-learn in use.
        data: a ``data:`` block: ``dataset``, ``train_path`` and ``val_path``; ``format``
            (image_folder if not given, h5, webdataset or hf); ``on_error: skip``, which leaves out
            images that do not decode, an error otherwise; ``num_workers``, the processes that look
            for them.
        image_size: size of the images for ``dataset: custom``; the other data sets have theirs.
        augment: whether the training set is cropped and flipped at random (linear evaluation) or
            shown as the test set is (k-NN).
        mean: per-channel mean for ``dataset: custom``.
        std: per-channel standard deviation for ``dataset: custom``.

    Raises:
        IECLError: one line, when the test set has a class that the training set lacks.
    """
    dataset, paths = data["dataset"], (data["train_path"], data["val_path"])
    data_format = data.get("format", "image_folder")
    if dataset == "custom":
        for_train, for_val = _sized_transforms(image_size, mean, std)
    else:
        for_train, for_val = host.evaluation_transforms(dataset)
    shown = (for_train if augment else for_val, for_val)
    if data_format in FORMATS:
        return (
            ShardImages(open_shards(data_format, paths[0]), shown[0]),
            ShardImages(open_shards(data_format, paths[1]), shown[1]),
        )
    train, val = host.evaluation_sets(dataset, shown, paths, data_format)
    train, val = _real_images(train), _real_images(val)
    _number_alike(train, val)
    if data.get("on_error") == "skip" and hasattr(train, "samples"):
        workers = data.get("num_workers", 0)
        train = _decodable("data.train_path", train, paths[0], workers)
        val = _decodable("data.val_path", val, paths[1], workers)
    return train, val


def evaluation_loader(
    dataset: Dataset,
    batch_size: int,
    num_workers: int,
    *,
    shuffle: bool = False,
    persistent_workers: bool = False,
) -> DataLoader:
    """A loader that leaves no image out."""
    return SteadyLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=persistent_workers and num_workers > 0,
    )


def evaluation_transform(host: Host, dataset: str, image_size: int) -> Any:
    """What an image of any size goes through before a backbone that was trained on ``dataset``.

    The host's own for evaluation, after a resize and a crop where it has none: CIFAR's images are
    all of one size.
    """
    if dataset == "custom":
        return _sized_transforms(image_size, IMAGENET_MEAN, IMAGENET_STD)[1]
    _, own = host.evaluation_transforms(dataset)
    if any(isinstance(step, transforms.Resize) for step in own.transforms):
        return own
    sized = [transforms.Resize(image_size), transforms.CenterCrop(image_size)]
    return transforms.Compose([*sized, *own.transforms])
