"""Batched operations against PIL's and torchvision's: their parameters' laws, their pixels."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as pil

from iecl_solo.views import (
    ColorJitter,
    Crop,
    Equalize,
    GaussianBlur,
    Grayscale,
    Pipeline,
    Solarize,
    bicubic_weights,
    shift_hue,
)

DRAWS = 10_000
#: A law is refused below this. Of some thirty comparisons, none is by chance (Bonferroni, 1e-2).
REFUSED = 1e-2 / 30


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photographs(count: int = 24, size: tuple[int, int] = (40, 32)) -> Tensor:
    """Smooth coloured images with edges, of uint8: noise would hide what a filter does."""
    g = generator(3)
    coarse = torch.rand(count, 3, 6, 5, generator=g)
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic")
    smooth[:, :, 10:20, 8:24] = torch.rand(count, 3, 1, 1, generator=g)
    smooth += 0.05 * torch.randn(smooth.shape, generator=g)
    return (smooth.clamp(0, 1) * 255).round().to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def levels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()


def apart(ours: Tensor, theirs: list[Image.Image]) -> Tensor:
    """Absolute differences in levels of 255."""
    return (ours * 255 - torch.stack([levels(image) for image in theirs])).abs()


def same_law(ours: Tensor | np.ndarray, theirs: object, what: str) -> None:
    p = ks_2samp(np.asarray(ours), np.asarray(theirs)).pvalue
    assert p > REFUSED, f"{what}: Kolmogorov-Smirnov p = {p:.2g}"


# ---- parameters


@pytest.mark.parametrize(
    ("size", "scale"),
    [((32, 32), (0.08, 1.0)), ((375, 500), (0.2, 1.0)), ((40, 200), (0.5, 1.0))],
)
def test_boxes_have_torchvisions_law(size: tuple[int, int], scale: tuple[float, float]):
    ours = Crop((32, 32), scale).draw(torch.tensor([size]).expand(DRAWS, 2), generator())["box"]
    torch.manual_seed(0)
    blank = torch.zeros(3, *size)
    theirs = np.array(
        [
            transforms.RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3])
            for _ in range(DRAWS)
        ]
    )
    for i, name in enumerate(("top", "left", "height", "width")):
        same_law(ours[:, i], theirs[:, i], name)
    # what depends on two of them at once
    same_law(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3], "area")
    same_law(ours[:, 0] + ours[:, 2], theirs[:, 0] + theirs[:, 2], "bottom")


def test_jitter_has_torchvisions_law():
    ranges = ((0.2, 1.8), (0.0, 2.2), (0.6, 1.4), (-0.1, 0.1))
    parts = ("brightness", "contrast", "saturation", "hue")
    ours = ColorJitter(*ranges).draw(DRAWS, generator())
    torch.manual_seed(0)
    drawn = [transforms.ColorJitter.get_params(*map(list, ranges)) for _ in range(DRAWS)]
    for i, part in enumerate(parts):
        same_law(ours[part], [d[i + 1] for d in drawn], part)
    # all 24 orders, each as often
    codes = (ours["order"] * torch.tensor([64, 16, 4, 1])).sum(1)
    seen = codes.unique(return_counts=True)[1]
    assert len(seen) == math.factorial(4)
    assert (seen - DRAWS / 24).abs().max() < 5 * math.sqrt(DRAWS / 24)
    # an order's ranks are independent of the factors
    assert abs(float(torch.corrcoef(torch.stack([codes.float(), ours["hue"]]))[0, 1])) < 0.05


def test_blur_and_probabilities_have_the_hosts_law():
    random.seed(0)
    sigma = GaussianBlur((0.1, 2.0)).draw(DRAWS, generator())["sigma"]
    same_law(sigma, [random.uniform(0.1, 2.0) for _ in range(DRAWS)], "sigma")
    pipeline = Pipeline(Crop((8, 8), flip=0.5), [Grayscale(0.2), Solarize(0.8)])
    drawn = pipeline.draw(torch.full((DRAWS, 2), 8), generator())
    shares = [
        float(v.float().mean()) for v in (drawn[0]["flipped"], *(d["applied"] for d in drawn[1:]))
    ]
    for share, prob in zip(shares, (0.5, 0.2, 0.8), strict=True):
        assert abs(share - prob) < 4 * math.sqrt(prob * (1 - prob) / DRAWS)


# ---- pixels


@pytest.mark.parametrize("target", [(32, 32), (24, 48), (96, 96)])
def test_crop_is_pils(target: tuple[int, int]):
    images = photographs()
    crop = Crop(target, (0.05, 1.0), flip=0.5)
    drawn = crop.draw(torch.tensor([images.shape[-2:]]).expand(len(images), 2), generator())
    theirs = []
    for image, box, flipped in zip(
        images, drawn["box"].int().tolist(), drawn["flipped"], strict=True
    ):
        one = pil.resized_crop(
            to_pil(image), *box, list(target), transforms.InterpolationMode.BICUBIC
        )
        theirs.append(pil.hflip(one) if flipped else one)
    difference = apart(crop(images, drawn), theirs).flatten()
    # PIL rounds once an axis; which axis comes first, and is cut to [0, 255], is its version's
    assert difference.mean() < 0.4 and difference.quantile(0.999) < 1.5 and difference.max() < 10


def test_whole_image_resize_is_pils():
    images = photographs()
    crop = Crop((25, 20), None)
    drawn = crop.draw(torch.tensor([images.shape[-2:]]).expand(len(images), 2), generator())
    theirs = [pil.resize(to_pil(i), [25, 20], transforms.InterpolationMode.BICUBIC) for i in images]
    assert apart(crop(images, drawn), theirs).max() < 2


def test_bicubic_weights_are_interpolates():
    # another reference, in floats: exact
    images = torch.rand(1, 1, 50, 2, generator=generator())
    for target in (10, 50, 80):
        weights = bicubic_weights(torch.tensor([7.0]), torch.tensor([30.0]), 50, target)
        expected = torch.nn.functional.interpolate(
            images[:, :, 7:37], (target, 2), mode="bicubic", antialias=True
        )
        torch.testing.assert_close(weights[0] @ images[0, 0], expected[0, 0], atol=1e-5, rtol=1e-5)


def test_a_piece_narrower_than_a_pixel_is_that_pixel():
    """As of a very long, thin image that is kept as a square."""
    start, length = torch.tensor([0.6, 3.2, 3.999]), torch.tensor([0.3, 0.2, 0.001])
    weights = bicubic_weights(start, length, source=4, target=2)
    expected = torch.nn.functional.one_hot(torch.tensor([0, 3, 3]), 4).float()
    torch.testing.assert_close(weights, expected[:, None].expand(3, 2, 4))


@pytest.mark.parametrize("part", ["brightness", "contrast", "saturation"])
def test_each_part_of_jitter_is_pils(part: str):
    images = photographs()
    jitter = ColorJitter(**{part: (0.2, 1.8)})
    drawn = jitter.draw(len(images), generator())
    adjust = getattr(pil, f"adjust_{part}")
    theirs = [adjust(to_pil(i), float(f)) for i, f in zip(images, drawn[part], strict=True)]
    assert apart(jitter(images / 255, drawn), theirs).max() < 1.6


def test_hue_is_pils_within_its_own_rounding():
    # PIL keeps hue and saturation in whole levels, and turns by a whole level
    images, turns = photographs(), torch.linspace(-0.5, 0.5, 24)
    theirs = [pil.adjust_hue(to_pil(i), float(t)) for i, t in zip(images, turns, strict=True)]
    difference = apart(shift_hue(images / 255, turns), theirs).flatten()
    assert difference.mean() < 1.2 and difference.quantile(0.99) < 10 and difference.max() < 20
    # in floats, against torchvision's own formula: exact
    expected = torch.stack(
        [pil.adjust_hue(i / 255, float(t)) for i, t in zip(images, turns, strict=True)]
    )
    torch.testing.assert_close(shift_hue(images / 255, turns), expected, atol=1e-5, rtol=0)


def test_jitters_order_is_each_images_own():
    images = photographs()
    jitter = ColorJitter((0.2, 1.8), (0.2, 1.8), (0.2, 1.8), (-0.2, 0.2))
    drawn = jitter.draw(len(images), generator())
    theirs = []
    for n, image in enumerate(images):
        one = to_pil(image)
        for step in range(4):
            part = ("brightness", "contrast", "saturation", "hue")[
                int((drawn["order"][n] == step).nonzero())
            ]
            one = getattr(pil, f"adjust_{part}")(one, float(drawn[part][n]))
        theirs.append(one)
    difference = apart(jitter(images / 255, drawn), theirs)
    assert difference.mean() < 2 and difference.flatten().quantile(0.999) < 15


@pytest.mark.parametrize("sigma", [0.1, 0.4, 0.8, 1.3, 2.0])
def test_blur_is_pils(sigma: float):
    images = photographs()
    ours = GaussianBlur((0.1, 2.0))(images / 255, {"sigma": torch.full((len(images),), sigma)})
    theirs = [to_pil(i).filter(ImageFilter.GaussianBlur(sigma)) for i in images]
    difference = apart(ours, theirs)
    assert difference.max() < 3.5 and difference.mean() < 0.8  # PIL rounds six times


def test_grey_solarize_and_equalize_are_pils():
    images = photographs()
    for ours, theirs, tolerance in (
        (Grayscale(), lambda i: pil.to_grayscale(i, 3), 0.51),
        (Solarize(), ImageOps.solarize, 1e-3),
        (Equalize(), ImageOps.equalize, 1e-3),
    ):
        made = ours((images / 255).clone(), {})
        assert apart(made, [theirs(to_pil(i)) for i in images]).max() < tolerance, ours


def test_equalize_leaves_what_pil_leaves():
    flat = torch.full((1, 3, 20, 20), 77, dtype=torch.uint8)  # one level: no step to divide by
    few = torch.arange(12, dtype=torch.uint8).view(1, 1, 3, 4).expand(1, 3, 3, 4)
    for image in (flat, few):
        assert (
            apart(Equalize()(image / 255, {}), [ImageOps.equalize(to_pil(image[0]))]).max() < 1e-3
        )


# ---- pipelines


def simclr(copies: int = 2) -> Pipeline:
    jitter = ColorJitter((0.2, 1.8), (0.2, 1.8), (0.2, 1.8), (-0.2, 0.2), prob=0.8)
    operations = [jitter, Grayscale(0.2), GaussianBlur(prob=0.5), Solarize(0.2), Equalize(0.2)]
    return Pipeline(
        Crop((32, 32), flip=0.5), operations, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), copies=copies
    )


def test_a_batch_is_what_its_images_are_alone():
    # an operation that mixed images, or took another's parameters, would show here
    images = photographs(150)
    pipeline = simclr(copies=1)
    drawn = pipeline.draw(torch.tensor([images.shape[-2:]]).expand(150, 2), generator())
    (whole,) = pipeline.views(images, generator())
    for n in (0, 7, 63, 64, 149):
        alone = pipeline.apply(
            images[n : n + 1], [{k: v[n : n + 1] for k, v in p.items()} for p in drawn]
        )
        torch.testing.assert_close(whole[n : n + 1], alone, atol=1e-4, rtol=1e-4)


def test_views_depend_on_the_generator_alone():
    images = photographs(100)
    torch.manual_seed(0)
    first = simclr().views(images, generator(5))
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    again = simclr().views(images, generator(5))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], simclr().views(images, generator(6))[0])


def test_images_stored_at_another_size_keep_their_boxes():
    # a wide photograph kept as a square: boxes are drawn in the original, and hit the same place
    wide = photographs(8, (120, 180))
    square = torch.stack(
        [levels(to_pil(i).resize((128, 128), Image.Resampling.BICUBIC)) for i in wide]
    ).to(torch.uint8)
    pipeline = Pipeline(Crop((32, 32)))
    (expected,) = pipeline.views(wide, generator())
    (ours,) = pipeline.views(square, generator(), torch.tensor([[120, 180]]).expand(8, 2))
    assert (ours - expected).abs().mean() < 0.02
