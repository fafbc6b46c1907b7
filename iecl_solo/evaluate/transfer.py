"""Any of torchvision's classification data sets that is on disk, by its name."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torchvision.datasets
from PIL import Image
from torchvision import transforms

from iecl_solo.errors import IECLError, one_line, unknown_name

#: What torchvision's data sets call the part to train on, and the one to test on, best first.
TRAIN, TEST = ("trainval", "train", "train+unlabeled"), ("test", "val", "valid")


def _classifies(candidate: Any) -> bool:
    if not inspect.isclass(candidate):
        return False
    parameters = inspect.signature(candidate.__init__).parameters
    return {"root", "transform", "target_transform"} <= set(parameters) and bool(
        {"split", "train", "image_set"} & set(parameters)
    )


def names() -> list[str]:
    """Data sets of torchvision that have a part to train on and one to test on.

    Example:
        >>> {"CIFAR10", "Flowers102", "OxfordIIITPet", "STL10"} <= set(names())
        True
    """
    found = torchvision.datasets.__all__
    return sorted(n for n in found if _classifies(getattr(torchvision.datasets, n)))


def _part(name: str, root: Path, wanted: tuple[str, ...], transform: Any) -> Any:
    cls = getattr(torchvision.datasets, name)
    parameters = inspect.signature(cls.__init__).parameters
    options: list[dict[str, Any]]
    if "train" in parameters:
        options = [{"train": wanted is TRAIN}]
    else:
        key = "split" if "split" in parameters else "image_set"
        options = [{key: part} for part in wanted]
    reason = ""
    for option in options:
        try:
            return cls(str(root), transform=transform, **option)
        except (ValueError, RuntimeError, OSError) as error:  # no such part, or no such files
            # the first part that it has says best what is missing
            text = one_line(error)
            if not reason or ("split" in reason.lower() and "split" not in text.lower()):
                reason = text
    reason = reason or "not found"
    raise IECLError(f"torchvision's {name} in {root}: {reason}; it is not downloaded")


def to_rgb(image: Image.Image) -> Image.Image:
    """An image with three channels, whatever it had."""
    return image.convert("RGB")


def torchvision_sets(
    name: str, root: str | Path, for_train: transforms.Compose, for_test: transforms.Compose
) -> tuple[Any, Any]:
    """Training and test part of a data set that torchvision knows, from files that are on disk.

    Args:
        name: of its class in ``torchvision.datasets``.
        root: the folder that its constructor is given; nothing is downloaded.
        for_train: from a training image, as RGB, to a tensor.
        for_test: from a test image, as RGB, to a tensor.

    Raises:
        IECLError: one line, for an unknown name, one that does not classify, or missing files.
    """
    if name not in names():
        raise unknown_name("torchvision data set", name, names())
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise IECLError(f"torchvision's {name} in {root}: no such folder")
    train, test = (
        _part(name, folder, part, transforms.Compose([to_rgb, *steps.transforms]))
        for part, steps in ((TRAIN, for_train), (TEST, for_test))
    )
    label = test[0][1]
    if not isinstance(label, int) and getattr(label, "ndim", None) != 0:
        raise IECLError(f"torchvision's {name}: its labels are no classes ({type(label).__name__})")
    return train, test


def augmenting(transform: transforms.Compose, size: int) -> transforms.Compose:
    """A transform for evaluation, its resize and crop replaced by a random crop and a flip.

    Args:
        transform: with a ``ToTensor`` in it.
        size: of the crop, in pixels.
    """
    steps = transform.transforms
    start = next(i for i, step in enumerate(steps) if isinstance(step, transforms.ToTensor))
    random = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    return transforms.Compose([*random, *steps[start:]])
