"""The 15 corruptions of ImageNet-C at 5 severities, put into an evaluation set's own transform.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019, arXiv 1903.12261; by the package ``imagecorruptions-imaug``.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import zlib
from typing import Any

import numpy as np
from PIL import Image
from torchvision import transforms

from iecl_solo.errors import IECLError, unknown_name

#: In the paper's order: noise, blur, weather, digital.
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
SEVERITIES = (1, 2, 3, 4, 5)

#: The library's own least height and width.
LEAST = 32


def find_library() -> Any:
    """The package ``imagecorruptions``.

    Raises:
        IECLError: one line, where it is not installed.
    """
    try:
        return importlib.import_module("imagecorruptions")
    except ImportError as error:
        raise IECLError(
            f"evaluation.measures: corruptions needs a package that is not here ({error.name}): "
            "pip install 'iecl-solo[corruptions]'"
        ) from None


class Corrupt:
    """One corruption at one severity, as a transform of PIL images.

    The random numbers are drawn from the image's own pixels: an image is corrupted in the same way
    for every run, in any order and in any process, and the global random state is left alone.

    Args:
        name: one of ``CORRUPTIONS``.
        severity: 1 to 5.

    Raises:
        IECLError: for another name or severity, or an image below 32 pixels.
    """

    def __init__(self, name: str, severity: int) -> None:
        if name not in CORRUPTIONS:
            raise unknown_name("corruption", name, CORRUPTIONS)
        if severity not in SEVERITIES:
            raise IECLError(f"severity {severity} is not allowed, 1 to 5 are")
        self.name, self.severity = name, severity

    def __call__(self, image: Image.Image) -> Image.Image:
        pixels = np.asarray(image.convert("RGB"))
        if min(pixels.shape[:2]) < LEAST:
            raise IECLError(
                f"corruptions: an image of {pixels.shape[1]} x {pixels.shape[0]} pixels, at least "
                f"{LEAST} x {LEAST} are needed"
            )
        library = find_library()
        seed = zlib.crc32(pixels.tobytes() + f"{self.name} {self.severity}".encode())
        # some draw from NumPy's global state, some from a generator of their own
        takes = "seed" in inspect.signature(library.corruption_dict[self.name]).parameters
        own = {"seed": seed} if takes else {}
        state = np.random.get_state()
        try:
            np.random.seed(seed)
            changed = library.corrupt(pixels, self.severity, self.name, **own)
        finally:
            np.random.set_state(state)
        return Image.fromarray(np.uint8(changed))


def corrupted(dataset: Any, name: str, severity: int) -> Any:
    """An evaluation set whose images are corrupted as the network would see them.

    Args:
        dataset: with a torchvision ``Compose`` that turns images into tensors; it is not changed.
        name: one of ``CORRUPTIONS``.
        severity: 1 to 5.

    Raises:
        IECLError: where there is no such transform, and for another name or severity.
    """
    steps = list(getattr(getattr(dataset, "transform", None), "transforms", []))
    place = next((i for i, s in enumerate(steps) if isinstance(s, transforms.ToTensor)), None)
    if place is None:
        raise IECLError("corruptions: the data set's transform has no ToTensor to come before")
    steps.insert(place, Corrupt(name, severity))
    other = copy.copy(dataset)
    other.transform = transforms.Compose(steps)
    if hasattr(other, "transforms"):  # torchvision's data sets keep it a second time
        other.transforms = type(other.transforms)(other.transform, other.target_transform)
    return other
