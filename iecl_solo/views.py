"""Random views of whole batches: solo-learn's augmentations, each image with its own parameters.

Every operation draws its parameters first, on the CPU and from the generator that it is given, and
is then applied: so the same generator gives the same views on any device, and either half can be
compared with PIL's and torchvision's by itself.

Pixels are float32 in [0, 1], (B, 3, H, W). Where PIL rounds to whole levels after each operation,
nothing is rounded here (equalisation apart, which counts levels), so that a result is within about
one level of 255 of PIL's; hue and blur, which PIL computes in whole levels, a few (the tests say).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

#: Parameters of an operation, by name; the first dimension of each counts the images.
Parameters = dict[str, Tensor]
Range = tuple[float, float]

# ITU-R 601-2, PIL's conversion to grey
_GREY = (0.299, 0.587, 0.114)
# Pixels of a CPU's chunk: small enough that a chunk stays in the cache from operation to operation
_CHUNK_PIXELS = 64 * 32 * 32


def _uniform(low: float, high: float, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.rand(tuple(shape), generator=generator) * (high - low) + low


def _column(values: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1)."""
    return values[:, None, None, None]


def grey(x: Tensor) -> Tensor:
    """Luma of RGB images: (B, 3, H, W) to (B, 1, H, W)."""
    red, green, blue = x.unbind(1)
    out = red * _GREY[0]
    return out.add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2]).unsqueeze_(1)


class Operation(Protocol):
    """What a pipeline applies to some of the images."""

    @property
    def prob(self) -> float:
        """Probability that an image is changed."""
        ...

    def draw(self, count: int, generator: torch.Generator) -> Parameters:
        """Parameters for ``count`` images, on the CPU."""
        ...

    def __call__(self, x: Tensor, parameters: Parameters) -> Tensor:
        """(B, 3, H, W) to the same; parameters are on the images' device. May change ``x``."""
        ...


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast, saturation and hue, in an order drawn for each image.

    As torchvision's ``ColorJitter`` on PIL images; a range that is None leaves its part out.

    Example:
        >>> jitter = ColorJitter(brightness=(0.5, 0.5))
        >>> jitter(torch.ones(1, 3, 2, 2), jitter.draw(1, torch.Generator())).max()
        tensor(0.5000)
    """

    brightness: Range | None = None
    contrast: Range | None = None
    saturation: Range | None = None
    hue: Range | None = None
    prob: float = 1.0

    def draw(self, count: int, generator: torch.Generator) -> Parameters:
        """``order``: at which of four steps each of the four parts comes; and the factors."""
        identity = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
        # a permutation for each image: the ranks of four independent uniforms
        drawn = {"order": torch.rand(count, 4, generator=generator).argsort(1).argsort(1)}
        for part, nothing in identity.items():
            low, high = getattr(self, part) or (nothing, nothing)
            drawn[part] = _uniform(low, high, (count,), generator)
        return drawn

    def __call__(self, x: Tensor, parameters: Parameters) -> Tensor:
        order = parameters["order"]
        # the first three are one formula, f x + (1 - f) y: y is black, the mean grey, or the grey;
        # so each step is done for all images at once, whichever part each has there
        parts = [n for n in ("brightness", "contrast", "saturation") if getattr(self, n)]
        for step in range(4):
            factor = torch.ones_like(parameters["hue"])
            weight = {}
            for part in parts:
                here = order[:, _PARTS.index(part)] == step
                factor = torch.where(here, parameters[part], factor)
                weight[part] = here * (1 - parameters[part])
            if "contrast" in parts or "saturation" in parts:
                luma = grey(x)
            x = x.mul_(_column(factor))
            if "saturation" in parts:
                base = luma * _column(weight["saturation"])
                if "contrast" in parts:
                    base += luma.mean((1, 2, 3), keepdim=True) * _column(weight["contrast"])
                x += base
            elif "contrast" in parts:
                x += luma.mean((1, 2, 3), keepdim=True) * _column(weight["contrast"])
            x.clamp_(0, 1)
            if self.hue:
                (chosen,) = (order[:, _PARTS.index("hue")] == step).nonzero(as_tuple=True)
                if len(chosen):
                    x[chosen] = shift_hue(x[chosen], parameters["hue"][chosen])
        return x


_PARTS = ("brightness", "contrast", "saturation", "hue")


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of RGB images, value and saturation kept.

    Args:
        x: (B, 3, H, W) in [0, 1].
        turns: (B,), parts of a full turn.
    """
    red, green, blue = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    # sextants from red; where chroma is 0 the hue has no effect
    scale = 1 / chroma.clamp_min(1e-8)
    hue = torch.where(
        value == red,
        (green - blue) * scale,
        torch.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    hue += 6 * turns[:, None, None]
    # distance on the circle of sextants from each channel's own: red 0, green 2, blue 4
    centre = torch.tensor([0.0, 2.0, 4.0], device=x.device).view(1, 3, 1, 1)
    away = hue[:, None] - centre
    away -= (away * (1 / 6)).round_().mul_(6)
    # a channel is at its height within one sextant of its own, at its depth beyond two
    away = away.abs_().sub_(1).clamp_(0, 1)
    return away.mul_(chroma[:, None]).neg_().add_(value[:, None])


@dataclass(frozen=True)
class _WithoutParameters:
    """An operation that does the same to every image it is applied to."""

    prob: float = 1.0

    def draw(self, count: int, generator: torch.Generator) -> Parameters:
        """Nothing is drawn."""
        return {}


@dataclass(frozen=True)
class Grayscale(_WithoutParameters):
    """All three channels become the luma.

    Example:
        >>> Grayscale()(torch.rand(2, 3, 4, 4), {}).std(1).max() < 1e-6
        tensor(True)
    """

    def __call__(self, x: Tensor, parameters: Parameters) -> Tensor:
        return grey(x).expand_as(x)


@dataclass(frozen=True)
class GaussianBlur:
    """PIL's ``GaussianBlur``: three box filters of fractional width, whose variances add up.

    Sources: Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box
    filtering" (2011), which PIL follows; edges are continued by their last pixel.

    Args:
        sigma: range of the standard deviation, in pixels.
        prob: probability that an image is blurred.
    """

    sigma: Range = (0.1, 2.0)
    prob: float = 1.0

    def draw(self, count: int, generator: torch.Generator) -> Parameters:
        """``sigma``: (B,)."""
        return {"sigma": _uniform(*self.sigma, (count,), generator)}

    def __call__(self, x: Tensor, parameters: Parameters) -> Tensor:
        rows, columns = x.shape[-2:]
        # the widest box, known without asking the device
        reach = int(_box_radius(torch.tensor(self.sigma[1]))) + 1
        blur = _box_matrix(parameters["sigma"], rows, reach)
        across = blur if rows == columns else _box_matrix(parameters["sigma"], columns, reach)
        return _separable(x, blur, across)


def _box_radius(sigma: Tensor) -> Tensor:
    """Half the width of the box that, applied three times, has the variance of a Gaussian."""
    variance = sigma.square() / 3
    whole = ((12 * variance + 1).sqrt_().sub_(1) / 2).floor_()
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return whole + rest / (6 * (variance - (whole + 1).square()))


def _box_matrix(sigma: Tensor, size: int, reach: int) -> Tensor:
    """(B, size, size): the three boxes along one axis, edges continued."""
    radius = _box_radius(sigma)[:, None, None]
    to = torch.arange(size, device=sigma.device)
    distance = (to[:, None] - torch.arange(-reach, size + reach, device=sigma.device)).abs()
    box = (radius + 1 - distance).clamp_(0, 1) / (2 * radius + 1)
    matrix = box[..., reach:-reach].contiguous()
    matrix[..., 0] += box[..., :reach].sum(-1)
    matrix[..., -1] += box[..., -reach:].sum(-1)
    return matrix @ matrix @ matrix


def _separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Each image's own linear maps along its rows and its columns, to [0, 1] after each as in PIL.

    Args:
        x: (B, 3, H, W).
        rows: (B, h, H).
        columns: (B, w, W).

    Returns:
        (B, 3, h, w).
    """
    batch, channels, height, width = x.shape
    wide = torch.bmm(x.reshape(batch, channels * height, width), columns.mT)
    wide = wide.clamp_(0, 1).view(batch, channels, height, -1)
    # channels beside the columns: one product an image where broadcasting would make three
    beside = wide.transpose(1, 2).reshape(batch, height, -1)
    out = torch.bmm(rows, beside).clamp_(0, 1)
    return out.view(batch, rows.shape[1], channels, -1).transpose(1, 2)


@dataclass(frozen=True)
class Solarize(_WithoutParameters):
    """Pixels of at least half are inverted, as ``ImageOps.solarize`` does.

    Example:
        >>> Solarize()(torch.tensor([0.25, 0.75]).expand(1, 3, 1, 2), {})[0, 0]
        tensor([[0.2500, 0.2500]])
    """

    def __call__(self, x: Tensor, parameters: Parameters) -> Tensor:
        # levels 127 and 128 change places: between them nothing jumps
        return torch.minimum(x, 1 - x)


@dataclass(frozen=True)
class Equalize(_WithoutParameters):
    """Each channel's histogram of 256 levels is made flat, as ``ImageOps.equalize`` does."""

    def __call__(self, x: Tensor, parameters: Parameters) -> Tensor:
        levels = (x * 255).round_().long().flatten(2)
        counts = torch.zeros(*levels.shape[:2], 256, dtype=torch.long, device=x.device)
        counts.scatter_add_(2, levels, torch.ones_like(levels))
        last = counts.gather(2, levels.amax(2, keepdim=True))
        step = (levels.shape[2] - last).div(255, rounding_mode="floor")
        below = counts.cumsum(2) - counts
        table = (below + step // 2).div(step.clamp_min(1), rounding_mode="floor").clamp_(max=255)
        out = table.gather(2, levels)
        # a channel of too few pixels to fill its levels stays what it was
        return torch.where(step > 0, out, levels).view_as(x) / 255


@dataclass(frozen=True)
class Crop:
    """A box of each image, resized to ``size`` by PIL's antialiased bicubic filter.

    The box is that of torchvision's ``RandomResizedCrop``; with ``scale`` None it is the whole
    image. An image can be flipped on the way: every later operation commutes with that.

    Args:
        size: height and width of the views.
        scale: range of the box's area, in parts of the image's.
        ratio: range of the box's width over its height.
        flip: probability of a horizontal flip.
    """

    size: tuple[int, int]
    scale: Range | None = (0.08, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    flip: float = 0.0

    def draw(self, sizes: Tensor, generator: torch.Generator) -> Parameters:
        """Boxes in whole pixels of images whose (height, width) are the rows of ``sizes``."""
        height, width = sizes.double().unbind(1)
        box = torch.stack([torch.zeros_like(height), torch.zeros_like(height), height, width])
        if self.scale is not None:
            box = self._draw_boxes(height, width, generator)
        flipped = torch.rand(len(sizes), generator=generator) < self.flip
        return {"box": box.T.float(), "flipped": flipped}

    def _draw_boxes(self, height: Tensor, width: Tensor, generator: torch.Generator) -> Tensor:
        # ten attempts, then the largest box in the middle that has an allowed ratio
        assert self.scale is not None
        shape = (10, len(height))
        area = height * width * _uniform(*self.scale, shape, generator)
        low, high = torch.tensor(self.ratio).log().tolist()
        ratio = _uniform(low, high, shape, generator).exp()
        w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first = fits.int().argmax(0, keepdim=True)
        w, h = w.gather(0, first)[0], h.gather(0, first)[0]
        top = (torch.rand(len(height), generator=generator) * (height - h + 1)).floor()
        left = (torch.rand(len(height), generator=generator) * (width - w + 1)).floor()
        narrow, wide = width / height < self.ratio[0], width / height > self.ratio[1]
        w_middle = torch.where(wide, (height * self.ratio[1]).round(), width)
        h_middle = torch.where(narrow, (width / self.ratio[0]).round(), height)
        middle = torch.stack(
            [
                ((height - h_middle) / 2).floor(),
                ((width - w_middle) / 2).floor(),
                h_middle,
                w_middle,
            ]
        )
        return torch.where(fits.any(0), torch.stack([top, left, h, w]), middle)

    def __call__(self, images: Tensor, parameters: Parameters) -> Tensor:
        """(B, 3, H, W) of uint8, and boxes in its pixels, to (B, 3, *size) in [0, 1]."""
        top, left, height, width = parameters["box"].unbind(1)
        rows = bicubic_weights(top, height, images.shape[2], self.size[0])
        columns = bicubic_weights(left, width, images.shape[3], self.size[1])
        columns = torch.where(parameters["flipped"][:, None, None], columns.flip(1), columns)
        return _separable(images.float(), rows, columns.div_(255))


def bicubic_weights(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """Weights by which a piece of a line is resized: PIL's bicubic filter, which does not alias.

    Args:
        start: (B,), where each piece begins, in pixels.
        length: (B,), its length; the pixels beyond it have no weight.
        source: pixels of the whole line.
        target: pixels of the result.

    Returns:
        (B, target, source), rows summing to 1.

    Example:
        >>> whole = bicubic_weights(torch.zeros(1), torch.full((1,), 4.0), source=4, target=4)
        >>> torch.equal(whole[0], torch.eye(4))
        True
    """
    scale = (length / target)[:, None, None]
    at = torch.arange(source, device=start.device) + 0.5
    centre = torch.arange(target, device=start.device)[:, None] + 0.5
    t = centre * scale + start[:, None, None] - at
    t = t.mul_(1 / scale.clamp_min(1)).abs_()
    # Keys' cubic, a = -1/2, without a branch: what holds within 2, and what is added within 1
    outer, inner = (2 - t).clamp_min_(0), (1 - t).clamp_min_(0)
    weights = (outer - 1).mul_(outer).mul_(outer).mul_(0.5)
    weights += (1 - 2 * inner).mul_(inner).mul_(inner)
    within = (at >= start[:, None]) & (at < (start + length)[:, None])
    # a piece between two pixels' centres is of the pixel that it lies in
    lies_in = (start + length / 2).floor().clamp(0, source - 1)[:, None] == at - 0.5
    within |= lies_in & ~within.any(1, keepdim=True)
    weights *= within[:, None]
    return weights.div_(weights.sum(2, keepdim=True))


@dataclass(frozen=True)
class Pipeline:
    """One entry of ``augmentations:``: a crop, operations each with a probability, normalisation.

    Args:
        crop: what makes views of images.
        operations: in order.
        mean: of each channel, subtracted at the end.
        std: of each channel, divided by at the end.
        after: operations on the normalised views, in order.
        copies: views of each image.

    Example:
        >>> pipeline = Pipeline(Crop((8, 8)), [Solarize(prob=0.5)], copies=2)
        >>> images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
        >>> [tuple(v.shape) for v in pipeline.views(images, torch.Generator())]
        [(4, 3, 8, 8), (4, 3, 8, 8)]
    """

    crop: Crop
    operations: Sequence[Operation] = ()
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    after: Sequence[Operation] = ()
    copies: int = 1

    def draw(self, sizes: Tensor, generator: torch.Generator) -> list[Parameters]:
        """Parameters of the crop and of each operation, and which images it is ``applied`` to."""
        drawn = [self.crop.draw(sizes, generator)]
        for operation in (*self.operations, *self.after):
            applied = torch.rand(len(sizes), generator=generator) < operation.prob
            drawn.append({"applied": applied, **operation.draw(len(sizes), generator)})
        return drawn

    def apply(self, images: Tensor, drawn: list[Parameters]) -> Tensor:
        """(B, 3, H, W) of uint8 to normalised views (B, 3, h, w), contiguous."""
        box, *parameters = drawn
        x = self.crop(images, _to(box, images.device))
        for operation, given in zip(self.operations, parameters, strict=False):
            x = _apply(operation, x, given)
        mean, std = (
            torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (self.mean, self.std)
        )
        x = ((x - mean) / std).contiguous()
        for operation, given in zip(self.after, parameters[len(self.operations) :], strict=True):
            x = _apply(operation, x, given)
        return x

    @torch.no_grad()
    def views(
        self, images: Tensor, generator: torch.Generator, sizes: Tensor | None = None
    ) -> list[Tensor]:
        """``copies`` views of each image.

        Args:
            images: (B, 3, H, W) of uint8, on the device where the views are wanted.
            generator: of the CPU; it alone decides the views.
            sizes: (B, 2), what height and width each image had before it was stored at (H, W):
                boxes are drawn in these.
        """
        stored = torch.tensor(images.shape[-2:])
        sizes = stored.expand(len(images), 2) if sizes is None else sizes
        out = []
        for _ in range(self.copies):
            drawn = self.draw(sizes, generator)
            drawn[0]["box"] = drawn[0]["box"] * (stored / sizes).repeat(1, 2)
            pieces = self._pieces(images)
            views = [
                self.apply(images[piece], [{k: v[piece] for k, v in p.items()} for p in drawn])
                for piece in pieces
            ]
            out.append(views[0] if len(views) == 1 else torch.cat(views))
        return out

    def _pieces(self, images: Tensor) -> list[slice]:
        """The whole batch for an accelerator; what stays in the cache for a CPU."""
        step = len(images)
        if images.device.type == "cpu":
            largest = max(images.shape[2] * images.shape[3], self.crop.size[0] * self.crop.size[1])
            step = max(1, _CHUNK_PIXELS // largest)
        return [slice(i, i + step) for i in range(0, len(images), step)]


def _to(parameters: Parameters, device: torch.device) -> Parameters:
    return {k: v.to(device, non_blocking=True) for k, v in parameters.items()}


def _apply(operation: Operation, x: Tensor, parameters: Parameters) -> Tensor:
    """The operation on the images that it was drawn for."""
    # found on the CPU, where the parameters are: the device is not waited for
    (applied,) = parameters["applied"].nonzero(as_tuple=True)
    if not len(applied):
        return x
    mine = {k: v[applied] for k, v in parameters.items() if k != "applied"}
    mine = _to(mine, x.device)
    if len(applied) == len(x):
        return operation(x, mine)
    chosen = applied.to(x.device, non_blocking=True)
    x[chosen] = operation(x[chosen], mine)
    return x
