"""SAIB, the learned transform of a view: as the paper has it, with proved expansion, with noise."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Collection, Mapping
from os import PathLike
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

from iecl_solo import checks
from iecl_solo.distributed import rank
from iecl_solo.errors import IECLError, one_line, unknown_name

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
    "relu": F.relu,
    "silu": F.silu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}
# ConvexSAIB needs s' > 0 everywhere: gelu and silu decrease somewhere, relu is flat.
_INCREASING: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "sigmoid": (torch.sigmoid, 1.0),
    "softplus": (F.softplus, float("inf")),
    "tanh": (torch.tanh, 1.0),
}
_CONVEX_GAIN = 0.1
# a stack deeper than the networks that it stands before is a slip, and takes minutes to build
_MOST = {"depth": 100}
_METADATA_KEY = "iecl_solo.saib"


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches: (B, C, H, W) -> (B, C p^2, H/p, W/p), p the ``patch_size``.

    Raises:
        IECLError: H or W is not a multiple of p.

    >>> patchify(torch.zeros(2, 3, 32, 32), 4).shape
    torch.Size([2, 48, 8, 8])
    """
    height, width = x.shape[-2:]
    if height % patch_size or width % patch_size:
        raise _indivisible((height, width), patch_size)
    return rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """The inverse of :func:`patchify`: (B, C p^2, h, w) -> (B, C, h p, w p).

    >>> x = torch.randn(2, 3, 32, 32)
    >>> torch.equal(unpatchify(patchify(x, 4), 4), x)
    True
    """
    return rearrange(patches, "b (c p q) h w -> b c (h p) (w q)", p=patch_size, q=patch_size)


def match_statistics(x: Tensor, reference: Tensor, eps: float = 1e-6) -> Tensor:
    """Give each channel of each image of ``x`` the mean and deviation of ``reference``.

    Both are (B, C, H, W); the result has the shape and dtype of ``x``. Statistics are taken in
    float32 at least. ``eps`` is added to both variances, so a constant channel stays constant.
    Ours: it takes the scale out of a transformation, of which a batch norm sees nothing anyway.

    >>> x = torch.randn(2, 3, 8, 8)
    >>> torch.allclose(match_statistics(2 * x + 1, x), x, atol=1e-4)
    True
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    given, wanted = x.to(dtype), reference.to(dtype)
    var, mean = torch.var_mean(given, dim=(-2, -1), correction=0, keepdim=True)
    wanted_var, wanted_mean = torch.var_mean(wanted, dim=(-2, -1), correction=0, keepdim=True)
    scale = torch.sqrt((wanted_var + eps) / (var + eps))
    return ((given - mean) * scale + wanted_mean).to(x.dtype)


class BaseSAIB(nn.Module):
    """What the variants share: X (B, C, H, W) -> X' of the same shape and dtype, by patches.

    SAIB stands for Sample Augmentation Incremental Block ([IE-CL], arXiv 2603.12594). Build one of
    `SAIB`, `ConvexSAIB` and `NoiseSAIB`, or by name with `make_saib`.

    Sizes other than ``image_size`` (multi-crop) are taken when they are multiples of
    ``patch_size``; the positional encoding is then interpolated bilinearly. Works under autocast
    and torch.compile, in any floating dtype and memory format, on any device, for B >= 1.

    Attributes:
        variant: the name in `SAIBS`.
        host_gradient: what the gradient of the host's loss is to it, where nothing else is said:
            it trains "with" it or "against" it.
        options: what the constructor was given and chose.
    """

    variant: ClassVar[str]
    host_gradient: ClassVar[str] = "with"
    activations: ClassVar[Collection[str]]
    match_statistics = False

    def __init__(
        self,
        image_size: int | tuple[int, int],
        *,
        channels: int,
        patch_size: int,
        expansion: int,
        depth: int,
        activation: str,
        positional_encoding: bool,
        **own: Any,
    ) -> None:
        super().__init__()
        for name, value in {
            "channels": channels,
            "patch_size": patch_size,
            "expansion": expansion,
            "depth": depth,
        }.items():
            checks.whole(f"SAIB {name}", value, 1, _MOST.get(name))
        if activation not in self.activations:
            raise unknown_name(f"{self.variant} SAIB activation", activation, self.activations)
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        grid = _grid(size, patch_size)
        self.channels = channels
        self.patch_size = patch_size
        self.options: dict[str, Any] = {
            "image_size": size,
            "channels": channels,
            "patch_size": patch_size,
            "expansion": expansion,
            "depth": depth,
            "activation": activation,
            "positional_encoding": positional_encoding,
            **own,
        }
        self._width = channels * patch_size**2
        self._hidden = expansion * self._width
        self._position_grid = grid if positional_encoding else None
        self.steps = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), dtype and device of ``x``."""
        self._check(x)
        out = x
        for step in self.steps:
            added = unpatchify(step(patchify(out, self.patch_size)), self.patch_size)
            out = out + added.to(x.dtype)
        return match_statistics(out, x) if self.match_statistics else out

    def realize(
        self, x: Tensor, generator: torch.Generator | None = None
    ) -> Callable[[Tensor], Tensor]:
        """The map with all that is random in it drawn; of a deterministic variant, itself.

        Args:
            x: images (B, C, H, W) whose number, size and device the draw is for. Of one image, it
                holds for a batch of any size.
            generator: of the draw; None is the variant's own.
        """
        return self

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise IECLError(f"SAIB input {tuple(x.shape)}: (B, {self.channels}, H, W) is needed")

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class SAIB(BaseSAIB):
    """The paper's Sample Augmentation Incremental Block: X (B, C, H, W) -> X', shape kept.

    [IE-CL], arXiv 2603.12594: patches P = patchify(X) + a learned positional encoding, ``depth``
    blocks of 1x1 conv -> s -> 3x3 conv -> s -> 1x1 conv that widen by ``expansion``, a skip around
    each 3x3 (``inner_skip``), a skip around all blocks together (``outer_skip``), and
    X' = X + unpatchify(P'). The paper is silent on p, s, the places of the two skips and the
    initialisation; here p = 4, s = GELU, and the last conv and the positional encoding start at
    zero, so that X' = X at the start.

    The paper's claim that |det J| > 1 almost everywhere does not follow from this: docs/saib.md.

    Args:
        image_size: H = W, or (H, W), in pixels; a multiple of ``patch_size``.
        channels: C.
        patch_size: p.
        expansion: hidden channels over patch channels C p^2.
        depth: number of blocks.
        activation: s: gelu, leaky_relu, relu, silu, softplus or tanh.
        positional_encoding: whether there is one.
        inner_skip: skip around each 3x3 conv.
        outer_skip: skip around the stack. Off (ours): with it P' contains P, so that SAIB begins as
            X' = 2 X, a scaling that the encoder's first batch norm takes out again, and no view.
        match_statistics: give every channel of every output image its input's mean and deviation.
            On (ours): raising the entropy of X' with nothing held is raising the contrast.

    Raises:
        IECLError: an option that is unknown or out of range; an image whose channels or size do
            not fit.

    >>> saib = SAIB(32)
    >>> x = torch.randn(2, 3, 32, 32)
    >>> torch.allclose(saib(x), x, atol=1e-5)
    True
    >>> saib(torch.randn(2, 3, 96, 64)).shape
    torch.Size([2, 3, 96, 64])
    """

    variant = "paper"
    activations = _ACTIVATIONS

    def __init__(
        self,
        image_size: int | tuple[int, int],
        *,
        channels: int = 3,
        patch_size: int = 4,
        expansion: int = 2,
        depth: int = 1,
        activation: str = "gelu",
        positional_encoding: bool = True,
        inner_skip: bool = True,
        outer_skip: bool = False,
        match_statistics: bool = True,
    ) -> None:
        super().__init__(
            image_size,
            channels=channels,
            patch_size=patch_size,
            expansion=expansion,
            depth=depth,
            activation=activation,
            positional_encoding=positional_encoding,
            inner_skip=inner_skip,
            outer_skip=outer_skip,
            match_statistics=match_statistics,
        )
        self.match_statistics = match_statistics
        s = _ACTIVATIONS[activation]
        blocks = [
            _Block(self._width, self._hidden, self._width, s, inner_skip) for _ in range(depth)
        ]
        # Only the last: were the inner ones zero too, the next block would see no image.
        nn.init.zeros_(blocks[-1].contract.weight)
        if blocks[-1].contract.bias is not None:
            nn.init.zeros_(blocks[-1].contract.bias)
        self.steps.append(_PaperStep(self._width, self._position_grid, blocks, outer_skip))


class ConvexSAIB(BaseSAIB):
    """A SAIB whose map expands whatever its weights are (ours): X (B, C, H, W) -> X'.

    X' = X + K^T s(K X + b), ``depth`` times over, K the linear stack patchify -> 1x1 conv -> 3x3
    conv, K^T its exact transpose, s increasing (s' > 0), b a bias plus the positional encoding. The
    Jacobian of one step, I + K^T diag(s') K, is symmetric with every eigenvalue >= 1:
    log|det J| >= 0, and > 0 unless K = 0 (docs/saib.md has the proof). Compositions keep
    log|det J| >= 0, not the symmetry. A bounded s bounds the displacement, see
    :meth:`displacement_bound`. K starts small and not at zero, because at K = 0 its own gradient
    vanishes.

    Args:
        image_size: H = W, or (H, W), in pixels; a multiple of ``patch_size``.
        channels: C.
        patch_size: p.
        expansion: hidden channels over patch channels C p^2.
        depth: number of steps.
        activation: s: tanh, sigmoid or softplus.
        positional_encoding: whether there is one.
        match_statistics: as of `SAIB`. Off, since it breaks the guarantee.

    Raises:
        IECLError: as `SAIB`.

    >>> ConvexSAIB(32)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 3, 32, 32])
    """

    variant = "convex"
    activations = _INCREASING

    def __init__(
        self,
        image_size: int | tuple[int, int],
        *,
        channels: int = 3,
        patch_size: int = 4,
        expansion: int = 2,
        depth: int = 1,
        activation: str = "tanh",
        positional_encoding: bool = True,
        match_statistics: bool = False,
    ) -> None:
        super().__init__(
            image_size,
            channels=channels,
            patch_size=patch_size,
            expansion=expansion,
            depth=depth,
            activation=activation,
            positional_encoding=positional_encoding,
            match_statistics=match_statistics,
        )
        self.match_statistics = match_statistics
        for _ in range(depth):
            self.steps.append(
                _ConvexStep(self._width, self._hidden, self._position_grid, activation)
            )

    @torch.no_grad()
    def displacement_bound(self) -> float:
        """A bound on max |X' - X| over all pixels and all inputs, in the units of X (ours).

        For one step it is sup|s| times the induced infinity norm of K^T; over ``depth`` steps
        these add up.

        Raises:
            IECLError: nothing bounds it (softplus, matched statistics).

        >>> saib = ConvexSAIB(32)
        >>> x = 100 * torch.randn(2, 3, 32, 32)
        >>> bool((saib(x) - x).abs().max() <= saib.displacement_bound())
        True
        """
        if self.match_statistics:
            raise IECLError("displacement_bound: with match_statistics nothing bounds it")
        if self.options["activation"] == "softplus":
            raise IECLError("displacement_bound: softplus is unbounded; tanh and sigmoid are not")
        return sum(
            step.displacement_bound() for step in self.steps if isinstance(step, _ConvexStep)
        )


class NoiseSAIB(BaseSAIB):
    """A SAIB with noise (ours): X' = X + D(X, e), e ~ N(0, I), a step of bounded size.

    A deterministic map makes of each image another one, always the same: H(X' | X) is minus
    infinity, and only what is random given the image makes views. Here the paper's stack works on
    the patches and ``noise_channels`` channels of normal noise joined, and its output is scaled so
    that the mean |X' - X| of each image is the budget. The nearest published work is viewmaker
    networks (Tamkin et al. 2021), which bound the step by an l1 ball, as here, and train it against
    the encoder by a second optimiser; here the host's gradient is reversed at SAIB's output.

    The noise comes from a random stream of its own, which goes on from call to call in training
    mode, is part of the state dict, and is another one in each process. The global random state is
    neither read nor moved (but for the seed it was given last, when a NoiseSAIB is built). In
    evaluation mode each call draws the same noise, so that a measurement can be repeated.

    Args:
        image_size: H = W, or (H, W), in pixels; a multiple of ``patch_size``.
        channels: C.
        patch_size: p.
        expansion: hidden channels over patch channels C p^2.
        depth: number of blocks; the first one sees the noise.
        activation: s: gelu, leaky_relu, relu, silu, softplus or tanh.
        positional_encoding: whether there is one.
        inner_skip: skip around each 3x3 conv.
        noise_channels: k, channels of noise at each patch.
        budget: mean absolute step of each image, in the units of X: of images that are normalised,
            as the host's pipelines do it, in standard deviations of the data.

    Raises:
        IECLError: as `SAIB`; a budget that is not positive.

    >>> saib, x = NoiseSAIB(32, budget=0.1), torch.randn(2, 3, 32, 32)
    >>> (saib(x) - x).abs().mean((1, 2, 3))
    tensor([0.1000, 0.1000], grad_fn=<MeanBackward1>)
    >>> torch.equal(saib(x), saib(x)), torch.equal(saib.eval()(x), saib(x))
    (False, True)
    """

    variant = "noise"
    host_gradient = "against"
    activations = _ACTIVATIONS
    log_budget: Tensor

    def __init__(
        self,
        image_size: int | tuple[int, int],
        *,
        channels: int = 3,
        patch_size: int = 4,
        expansion: int = 2,
        depth: int = 1,
        activation: str = "gelu",
        positional_encoding: bool = True,
        inner_skip: bool = True,
        noise_channels: int = 16,
        budget: float = 0.15,
    ) -> None:
        super().__init__(
            image_size,
            channels=channels,
            patch_size=patch_size,
            expansion=expansion,
            depth=depth,
            activation=activation,
            positional_encoding=positional_encoding,
            inner_skip=inner_skip,
            noise_channels=noise_channels,
            budget=budget,
        )
        checks.whole("SAIB noise_channels", noise_channels, 1)
        checks.number("SAIB budget", budget, 0, above=True)
        self.noise_channels = noise_channels
        widths = [self._width + noise_channels, *[self._width] * (depth - 1)]
        s = _ACTIVATIONS[activation]
        self.position = _position(self._width, self._position_grid)
        # No zero start: the step's size is the budget's business, and 0 has no direction.
        self.blocks = nn.Sequential(
            *(_Block(width, self._hidden, self._width, s, inner_skip) for width in widths)
        )
        # a buffer, since a run may move it: see iecl_solo.objectives.iecl
        self.register_buffer("log_budget", torch.tensor(math.log(budget)))
        self.stream = RandomStream()

    @property
    def budget(self) -> float:
        """The mean absolute step of each image as it is now."""
        return self.log_budget.exp().item()

    @torch.compiler.disable
    def draw(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Noise for a batch: (B, k, H / p, W / p), x's dtype and device."""
        self._check(x)
        height, width = _grid(x.shape[-2:], self.patch_size)
        if generator is None:
            generator = self.stream.next(x.device)
        noise = torch.randn(
            (len(x), self.noise_channels, height, width),
            generator=generator,
            device=generator.device,
        )
        return noise.to(x)

    def realize(
        self, x: Tensor, generator: torch.Generator | None = None
    ) -> Callable[[Tensor], Tensor]:
        return functools.partial(self, noise=self.draw(x, generator))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), dtype and device of ``x``.

        Args:
            x: images (B, C, H, W).
            noise: (B, k, H / p, W / p), or (1, ...) to be the same for all; None draws it.
        """
        self._check(x)
        patches = patchify(x, self.patch_size)
        if noise is None:
            noise = self.draw(x)
        joined = torch.cat(
            [_add_position(patches, self.position), noise.expand(len(x), -1, -1, -1)], 1
        )
        step = unpatchify(self.blocks(joined), self.patch_size)
        step = step.to(torch.promote_types(step.dtype, torch.float32))
        size = step.abs().mean((1, 2, 3), keepdim=True).clamp(min=torch.finfo(step.dtype).tiny)
        return x + (step * (self.log_budget.exp() / size)).to(x.dtype)


#: The variants by the name that a configuration and an exported file have for them.
SAIBS: dict[str, type[BaseSAIB]] = {c.variant: c for c in (SAIB, ConvexSAIB, NoiseSAIB)}


def make_saib(variant: str, image_size: int | tuple[int, int], **options: Any) -> BaseSAIB:
    """The SAIB of a variant's name.

    Raises:
        IECLError: an unknown variant, an option that it does not have, or what its class refuses.

    >>> type(make_saib("convex", 32, depth=2)).__name__
    'ConvexSAIB'
    """
    if variant not in SAIBS:
        raise unknown_name("SAIB variant", variant, SAIBS)
    known = list(inspect.signature(SAIBS[variant]).parameters)[1:]
    for name in options:
        if name not in known:
            raise unknown_name(f"option of the {variant} SAIB", name, known)
    return SAIBS[variant](image_size, **options)


class RandomStream(nn.Module):
    """A stream of random numbers of its own, saved and resumed with the module that has it.

    Each draw is of a generator seeded by (the seed that torch was given last when this was built,
    the process's rank, how many draws there were), so that resuming needs two numbers on any
    device. They are the module's extra state.

    >>> _ = torch.manual_seed(0)
    >>> stream, other = RandomStream(), RandomStream()
    >>> first = torch.rand(2, generator=stream.next(torch.device("cpu")))
    >>> other.load_state_dict(stream.state_dict())
    <All keys matched successfully>
    >>> cpu = torch.device("cpu")
    >>> second, again = (torch.rand(2, generator=s.next(cpu)) for s in (stream, other))
    >>> torch.equal(first, second), torch.equal(second, again)
    (False, True)
    """

    def __init__(self) -> None:
        super().__init__()
        self._seed, self._draws = torch.initial_seed() % 2**63, 0

    def next(self, device: torch.device) -> torch.Generator:
        """The generator of the next draw; in evaluation mode always that of the first."""
        self._draws += self.training
        place = f"{rank()}/{self._draws}" if self.training else "0/0"
        name = f"{self._seed}/{place}"
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self._seed, self._draws], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self._seed, self._draws = state.tolist()


class _Block(nn.Module):
    """1x1 conv -> s -> 3x3 conv -> s -> 1x1 conv on patches (B, channels, h, w)."""

    def __init__(
        self, given: int, hidden: int, made: int, s: Callable[[Tensor], Tensor], inner_skip: bool
    ) -> None:
        super().__init__()
        self.expand = nn.Conv2d(given, hidden, 1)
        self.mix = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.contract = nn.Conv2d(hidden, made, 1)
        self.s = s
        self.inner_skip = inner_skip

    def forward(self, patches: Tensor) -> Tensor:
        hidden = self.s(self.expand(patches))
        mixed = self.s(self.mix(hidden))
        return self.contract(hidden + mixed if self.inner_skip else mixed)


class _PaperStep(nn.Module):
    """P -> P': positional encoding, a stack of blocks, a skip around the stack."""

    def __init__(
        self, width: int, grid: tuple[int, int] | None, blocks: list[_Block], outer_skip: bool
    ) -> None:
        super().__init__()
        self.position = _position(width, grid)
        self.blocks = nn.Sequential(*blocks)
        self.outer_skip = outer_skip

    def forward(self, patches: Tensor) -> Tensor:
        patches = _add_position(patches, self.position)
        out = self.blocks(patches)
        return patches + out if self.outer_skip else out


class _ConvexStep(nn.Module):
    """P -> K^T s(K P + b), the gradient of the convex function sum S(K P + b), S' = s."""

    def __init__(
        self, width: int, hidden: int, grid: tuple[int, int] | None, activation: str
    ) -> None:
        super().__init__()
        self.expand = nn.Parameter(torch.empty(hidden, width, 1, 1))
        self.mix = nn.Parameter(torch.empty(hidden, hidden, 3, 3))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.position = _position(hidden, grid)
        self.s, self.sup = _INCREASING[activation]
        # expand is an isometry and mix keeps |K P|^2 near gain^2 |P|^2, so that the mean eigenvalue
        # of the Jacobian starts near 1 + gain^2. Zero would be a point where no gradient moves K.
        nn.init.orthogonal_(self.expand)
        nn.init.normal_(self.mix, std=_CONVEX_GAIN / (9 * hidden) ** 0.5)

    def forward(self, patches: Tensor) -> Tensor:
        inner = F.conv2d(F.conv2d(patches, self.expand), self.mix, self.bias, padding=1)
        outer = self.s(_add_position(inner, self.position))
        return F.conv_transpose2d(F.conv_transpose2d(outer, self.mix, padding=1), self.expand)

    def displacement_bound(self) -> float:
        kernel = einsum(self.mix, self.expand[..., 0, 0], "o m i j, m c -> o c i j")
        return self.sup * reduce(kernel.abs(), "o c i j -> c", "sum").max().item()


def _position(width: int, grid: tuple[int, int] | None) -> nn.Parameter | None:
    return None if grid is None else nn.Parameter(torch.zeros(1, width, *grid))


def _add_position(patches: Tensor, position: Tensor | None) -> Tensor:
    if position is None:
        return patches
    grid = patches.shape[-2:]
    if position.shape[-2:] != grid:
        position = F.interpolate(position, size=grid, mode="bilinear", align_corners=False)
    return patches + position


def _grid(size: tuple[int, ...], patch_size: int) -> tuple[int, int]:
    if len(size) != 2 or min(size) < 1:
        raise IECLError(f"SAIB image_size {size}: a positive side or (height, width) is needed")
    height, width = size
    if height % patch_size or width % patch_size:
        raise _indivisible((height, width), patch_size)
    return height // patch_size, width // patch_size


def _indivisible(size: tuple[int, int], patch_size: int) -> IECLError:
    height, width = size
    below = [max(side // patch_size, 1) * patch_size for side in size]
    above = [-(-side // patch_size) * patch_size for side in size]
    divisors = [p for p in range(1, min(size) + 1) if height % p == 0 and width % p == 0]
    return IECLError(
        f"image size {height}x{width}: not a multiple of patch_size {patch_size}; nearest sizes "
        f"{below[0]}x{below[1]}, {above[0]}x{above[1]}; patch sizes that divide it: "
        f"{', '.join(map(str, divisors))}"
    )


def save_saib(
    saib: BaseSAIB, path: str | PathLike[str], about: Mapping[str, Any] | None = None
) -> None:
    """Write weights and constructor options to one safetensors file at ``path``.

    Args:
        saib: any variant.
        path: of the file.
        about: what else its metadata is to say, such as the normalisation of the images that it
            was trained on; what is no string is written as JSON.

    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "saib.safetensors")
    >>> save_saib(ConvexSAIB(32), path)
    >>> load_saib(path).variant
    'convex'
    """
    from safetensors.torch import save_file

    state = {name: value.detach().contiguous() for name, value in saib.state_dict().items()}
    options = {"variant": saib.variant, **saib.options}
    options["sha256"] = _digest(options, state)
    more = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (about or {}).items()}
    save_file(state, path, metadata={**more, _METADATA_KEY: json.dumps(options)})


def load_saib(path: str | PathLike[str]) -> BaseSAIB:
    """The SAIB that :func:`save_saib` wrote, on the CPU, in the dtype it was saved in.

    Files of version 0.1, where the variants were one class, are read too.

    Raises:
        IECLError: the file is missing, damaged, or no SAIB.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise IECLError(f"SAIB file '{path}': {one_line(error)}") from error
    if _METADATA_KEY not in metadata:
        raise IECLError(f"SAIB file '{path}': a safetensors file, but not of a SAIB")
    try:
        given = json.loads(metadata[_METADATA_KEY])
        written = given.pop("sha256", None)  # files of before 0.2 have none
        if written is not None and written != _digest(given, state):
            raise IECLError("it is damaged: it is not what was written")
        options = _of_its_variant(given)
        # meta: no initialisation, so that loading leaves the random state alone
        with torch.device("meta"):
            saib = make_saib(**options)
        saib.load_state_dict(state, assign=True)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise IECLError(f"SAIB file '{path}': {one_line(error)}") from error
    return saib


def _digest(options: dict[str, Any], state: dict[str, Tensor]) -> str:
    """SHA-256 of all that a file says, since safetensors has no check sum of its own."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _of_its_variant(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a file, without the skips that version 0.1 wrote for a variant that has none."""
    if options["variant"] == "convex":
        return {k: v for k, v in options.items() if k not in ("inner_skip", "outer_skip")}
    return options
