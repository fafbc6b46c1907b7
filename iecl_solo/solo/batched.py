"""Pretraining batches whose views are made for the whole batch at once, from the host's pipelines.

What the host would do to one image is read off the pipelines that it builds itself, so that both
hosts' own values (normalisation, blur, filter) hold here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode

from iecl_solo import views
from iecl_solo.augment import FrozenSAIB
from iecl_solo.decoded import Decoded, Stored, decode
from iecl_solo.distributed import rank
from iecl_solo.errors import IECLError
from iecl_solo.order import EpochOrder, seed_of


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))


def _operation(transform: Any, prob: float) -> views.Operation | None:
    """The batched form of a transform of one image; the host's own are known by their names."""
    name = type(transform).__name__
    if isinstance(transform, transforms.ColorJitter):
        ranges = {p: getattr(transform, p) for p in ("brightness", "contrast", "saturation", "hue")}
        return views.ColorJitter(**ranges, prob=prob)
    if isinstance(transform, transforms.RandomGrayscale):
        return views.Grayscale(prob * transform.p)
    if name == "GaussianBlur":
        return views.GaussianBlur(tuple(transform.sigma), prob)
    if name == "Solarization":
        return views.Solarize(prob)
    if name == "Equalization":
        return views.Equalize(prob)
    return None


class _SAIB:
    """A frozen SAIB on the normalised views, as the last operation."""

    def __init__(self, transform: FrozenSAIB) -> None:
        self.transform, self.prob = transform, transform.prob

    def draw(self, count: int, generator: torch.Generator) -> views.Parameters:
        return {"seed": torch.randint(2**63 - 1, (count,), generator=generator)}

    def __call__(self, x: Tensor, parameters: views.Parameters) -> Tensor:
        # a SAIB with noise draws it for these images at once, by the first one's seed
        noise = torch.Generator(x.device).manual_seed(int(parameters["seed"][0]))
        return self.transform.saib.to(x.device).realize(x, noise)(x)


def batched(pipeline: Any, copies: int = 1) -> views.Pipeline:
    """The batched form of a pipeline of torchvision's transforms, as the host builds them.

    Args:
        pipeline: a ``Compose``, or something that holds one as ``transform``.
        copies: views that it makes of each image.

    Raises:
        IECLError: one line, for a transform that has no batched form.

    Example:
        >>> one = transforms.Compose([transforms.RandomResizedCrop(32, interpolation=3)])
        >>> batched(one).crop.size
        (32, 32)
    """
    given: dict[str, Any] = {"copies": copies}
    operations: list[views.Operation] = []
    after: list[views.Operation] = []
    crop: dict[str, Any] = {}
    for transform, prob in _flat(pipeline, 1.0):
        if isinstance(transform, (transforms.RandomResizedCrop, transforms.Resize)):
            if transform.interpolation != InterpolationMode.BICUBIC:
                raise _no_form(transform)
            crop |= {"size": _pair(transform.size), "scale": None}
            if isinstance(transform, transforms.RandomResizedCrop):
                crop |= {"scale": tuple(transform.scale), "ratio": tuple(transform.ratio)}
        elif isinstance(transform, transforms.RandomHorizontalFlip):
            crop["flip"] = prob * transform.p
        elif isinstance(transform, transforms.Normalize):
            given |= {"mean": tuple(transform.mean), "std": tuple(transform.std)}
        elif isinstance(transform, FrozenSAIB):
            after.append(_SAIB(transform))
        elif not isinstance(transform, transforms.ToTensor):
            operation = _operation(transform, prob)
            if operation is None:
                raise _no_form(transform)
            operations.append(operation)
    kept = [o for o in operations if o.prob]
    return views.Pipeline(views.Crop(**crop), kept, after=after, **given)


def _no_form(transform: Any) -> IECLError:
    return IECLError(
        f"data.views: {type(transform).__name__} has no batched form; per_image knows it"
    )


def _flat(transform: Any, prob: float) -> Iterator[tuple[Any, float]]:
    """Transforms in order, each with the probability that it is applied."""
    if isinstance(transform, transforms.Compose):
        for part in transform.transforms:
            yield from _flat(part, prob)
    elif isinstance(transform, transforms.RandomApply):
        for part in transform.transforms:
            yield from _flat(part, prob * transform.p)
    elif isinstance(getattr(transform, "transform", None), transforms.Compose):
        yield from _flat(transform.transform, prob)
    else:
        yield transform, prob


def keeps_shape(pipeline: Any) -> bool:
    """Whether it resizes the shorter side alone, so that views have their images' shapes."""
    return any(
        isinstance(t, transforms.Resize) and isinstance(t.size, int)
        for t, _ in _flat(pipeline, 1.0)
    )


def decoded(
    dataset: Any, paths: Sequence[Path], *, largest_crop: int, fraction: float, workers: int
) -> Decoded:
    """The host's data set, its images decoded.

    Args:
        dataset: as the host makes it, without a transform.
        paths: folders or files that it is made of; what is decoded is put beside the first.
        largest_crop: side of the largest views made of it. Images of several sizes, or of more
            than twice this, are kept at 8/7 of it (256 for views of 224).
        fraction: the part of the folder that it holds, -1 for all.
        workers: processes that decode.
    """
    pixels = getattr(dataset, "data", None)
    if isinstance(pixels, np.ndarray):  # CIFAR and STL-10 are in memory already
        planar = (
            pixels if pixels.shape[1] == 3 else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        )
        sizes = np.tile(planar.shape[2:], (len(planar), 1))
        labels = getattr(dataset, "targets", None)
        labels = dataset.labels if labels is None else labels
        return Decoded(planar, sizes, np.asarray(labels))
    if hasattr(dataset, "samples"):
        files = [Path(file) for file, _ in dataset.samples]
    elif hasattr(dataset, "files"):
        files = list(dataset.files)
    elif hasattr(dataset, "images"):
        files = [Path(dataset.root) / name for name in dataset.images]
    else:
        files = list(paths)
    variant = "" if fraction < 0 else f"-{fraction:g}"
    variant += f"-and-{len(paths) - 1}" if len(paths) > 1 else ""
    variant += "" if getattr(dataset, "labelled", True) else "-unlabelled"
    return decode(
        lambda index: dataset[index][1:],
        files,
        paths[0],
        len(dataset),
        Stored(2 * largest_crop, -(-8 * largest_crop // 7)),
        variant=variant,
        workers=workers,
    )


class BatchedLoader:
    """Batches ``[index, views, label]`` in the host's format, made on the training device.

    What a batch holds depends on the seed, the epoch and its number alone: on nothing that was
    drawn before it, so that a baseline and its variant see the same views, and a run that goes on
    in the middle of an epoch sees those that it would have seen.

    Args:
        images: what the views are made of.
        pipelines: in the order of the batch's views.
        sampler: the order of the images, whose epoch Lightning sets; it knows the size of a batch,
            the seed, where to begin, and which part of a batch is this process's.
        device: where views are made, asked for at each epoch's start.
    """

    def __init__(
        self,
        images: Decoded,
        pipelines: Sequence[views.Pipeline],
        sampler: EpochOrder,
        device: Callable[[], torch.device] = lambda: torch.device("cpu"),
    ) -> None:
        self.images, self.pipelines, self.sampler = images, list(pipelines), sampler
        self.device = device

    def __len__(self) -> int:
        return len(self.sampler) // self.sampler.batch_size

    def __iter__(self) -> Iterator[list[Any]]:
        size, epoch = self.sampler.batch_size, self.sampler.epoch
        order = torch.tensor([index for _, index in self.sampler])
        device = self.device()
        # what is left of the epoch: all of it, or what a run that goes on has not seen
        batches = order[: len(order) // size * size].split(size)
        for number, index in enumerate(batches, len(self) - len(batches)):
            images, sizes, labels = self.images.take(index)
            images = images.to(device, non_blocking=True)
            generator = self._generator(epoch, number)
            made = [v for p in self.pipelines for v in p.views(images, generator, sizes)]
            yield [index.to(device), made, labels.to(device)]

    def _generator(self, epoch: int, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.sampler.seed, epoch, number, rank()))
