"""A learned SAIB as an augmentation: frozen, with a probability, for tensors and PIL images."""

from __future__ import annotations

import random
from os import PathLike

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import normalize, to_pil_image, to_tensor

from iecl_solo import checks
from iecl_solo.saib import BaseSAIB, load_saib


class FrozenSAIB:
    """Applies a learned SAIB with a probability (ours: a reviewer's question, not in the paper).

    A SAIB with noise draws it by a seed from Python's ``random``, as the host's loaders seed it.

    On a tensor (3, H, W) or (B, 3, H, W), normalised as SAIB saw its images in training, the result
    has the same shape and dtype. A PIL image is normalised, transformed, matched to the mean and
    contrast it had, and made a PIL image of the same size again.

    Args:
        saib: a SAIB, or the file that ``iecl-solo export RUN --saib`` wrote.
        prob: probability that an image is transformed, from Python's ``random``.
        mean: per-channel mean of the normalisation, for PIL images.
        std: per-channel standard deviation of the normalisation, for PIL images.

    Raises:
        IECLError: a probability outside [0, 1], or a file that holds no SAIB.

    Example:
        >>> from iecl_solo.saib import SAIB
        >>> transform = FrozenSAIB(SAIB(32), prob=1.0)
        >>> transform(torch.zeros(3, 32, 32)).shape
        torch.Size([3, 32, 32])
        >>> transform(Image.new("RGB", (32, 32))).size
        (32, 32)
    """

    def __init__(
        self,
        saib: BaseSAIB | str | PathLike[str],
        prob: float = 0.5,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
    ) -> None:
        checks.number("prob", prob, 0, 1)
        self.saib = saib if isinstance(saib, BaseSAIB) else load_saib(saib)
        self.saib.eval().requires_grad_(False)
        self.prob, self.mean, self.std = prob, tuple(mean), tuple(std)

    @torch.no_grad()
    def __call__(self, image: Tensor | Image.Image) -> Tensor | Image.Image:
        if random.random() >= self.prob:
            return image
        if isinstance(image, Image.Image):
            x = normalize(to_tensor(image.convert("RGB")), self.mean, self.std)
            return to_pil_image(self._denormalized(self._transformed(x), x))
        return self._transformed(image)

    def _transformed(self, x: Tensor) -> Tensor:
        batch = x if x.dim() == 4 else x[None]
        images = batch.float()
        generator = torch.Generator(x.device).manual_seed(random.getrandbits(63))
        out = self.saib.realize(images, generator)(images).to(x.dtype)
        return out if x.dim() == 4 else out[0]

    def _denormalized(self, out: Tensor, x: Tensor) -> Tensor:
        # pixels have a range: what SAIB adds by scaling alone would only saturate them
        matched = (out - out.mean()) / out.std().clamp_min(1e-6) * x.std() + x.mean()
        mean, std = torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]
        return (matched * std + mean).clamp(0, 1)

    def __repr__(self) -> str:
        return f"FrozenSAIB(prob={self.prob})"
