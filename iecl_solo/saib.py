"""SAIB, the learned transformation of a view: as the paper has it, and with proved expansion."""

from __future__ import annotations

import json
from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

from iecl_solo.errors import IECLError, unknown_name

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
    "relu": F.relu,
    "silu": F.silu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}
# The convex variant needs s' > 0 everywhere: gelu and silu decrease somewhere, relu is flat.
_INCREASING: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "sigmoid": (torch.sigmoid, 1.0),
    "softplus": (F.softplus, float("inf")),
    "tanh": (torch.tanh, 1.0),
}
_DEFAULT_ACTIVATION = {"paper": "gelu", "convex": "tanh"}
_CONVEX_GAIN = 0.1
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


class SAIB(nn.Module):
    """The stochastic-augmentation block of IE-CL: X (B, C, H, W) -> X' of the same shape and dtype.

    ``variant="paper"`` ([IE-CL], arXiv 2603.12594): patches P = patchify(X) + a learned positional
    encoding, ``depth`` blocks of 1x1 conv -> s -> 3x3 conv -> s -> 1x1 conv that widen by
    ``expansion``, a skip around each 3x3 (``inner_skip``), a skip around all blocks together
    (``outer_skip``), and X' = X + unpatchify(P'). The paper is silent on p, s, the places of the
    two skips and the initialisation; here p = 4, s = GELU, and the last conv and the positional
    encoding start at zero. So at the start X' = 2 X exactly with ``outer_skip`` (P' contains P),
    and X' = X exactly without. The paper's claim that |det J| > 1 almost everywhere does not
    follow from this: see docs/saib.md.

    ``variant="convex"`` (ours): X' = X + K^T s(K X + b), ``depth`` times over, K the linear stack
    patchify -> 1x1 conv -> 3x3 conv, K^T its exact transpose, s increasing (s' > 0), b a bias plus
    the positional encoding. The Jacobian of one step, I + K^T diag(s') K, is symmetric with every
    eigenvalue >= 1: log|det J| >= 0, and > 0 unless K = 0. Compositions keep log|det J| >= 0, not
    the symmetry. A bounded s bounds the displacement, see :meth:`displacement_bound`. K starts
    small and not at zero, because at K = 0 its own gradient vanishes.

    Sizes other than ``image_size`` (multi-crop) are taken when they are multiples of
    ``patch_size``; the positional encoding is then interpolated bilinearly. Works under autocast
    and torch.compile, in any floating dtype and memory format, on any device, for B >= 1.

    Args:
        image_size: H = W, or (H, W), in pixels; a multiple of ``patch_size``.
        variant: "paper" or "convex".
        channels: C.
        patch_size: p.
        expansion: hidden channels over patch channels C p^2.
        depth: number of blocks (paper) or steps (convex).
        activation: s; paper: gelu (default), leaky_relu, relu, silu, softplus, tanh; convex: tanh
            (default), sigmoid, softplus.
        positional_encoding: whether there is one.
        inner_skip: skip around each 3x3 conv; paper only.
        outer_skip: skip around the stack; paper only.
        match_statistics: set the mean and standard deviation of every channel of every output
            image to its input's. This breaks the convex variant's guarantee.

    Raises:
        IECLError: an option that is unknown, out of range or without meaning for the variant; an
            image whose channels or size do not fit.

    >>> saib = SAIB(32)
    >>> x = torch.randn(2, 3, 32, 32)
    >>> torch.equal(saib(x), 2 * x)
    True
    >>> saib(torch.randn(2, 3, 96, 64)).shape
    torch.Size([2, 3, 96, 64])
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        *,
        variant: str = "paper",
        channels: int = 3,
        patch_size: int = 4,
        expansion: int = 2,
        depth: int = 1,
        activation: str | None = None,
        positional_encoding: bool = True,
        inner_skip: bool = True,
        outer_skip: bool = True,
        match_statistics: bool = False,
    ) -> None:
        super().__init__()
        if variant not in _DEFAULT_ACTIVATION:
            raise unknown_name("SAIB variant", variant, _DEFAULT_ACTIVATION)
        for name, value in {
            "channels": channels,
            "patch_size": patch_size,
            "expansion": expansion,
            "depth": depth,
        }.items():
            if value < 1:
                raise IECLError(f"SAIB {name} {value}: at least 1 is needed")
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        grid = _grid(size, patch_size)
        activation = _DEFAULT_ACTIVATION[variant] if activation is None else activation

        self.variant = variant
        self.channels = channels
        self.patch_size = patch_size
        self.match_statistics = match_statistics
        self.options: dict[str, Any] = {
            "image_size": size,
            "variant": variant,
            "channels": channels,
            "patch_size": patch_size,
            "expansion": expansion,
            "depth": depth,
            "activation": activation,
            "positional_encoding": positional_encoding,
            "inner_skip": inner_skip,
            "outer_skip": outer_skip,
            "match_statistics": match_statistics,
        }

        width = channels * patch_size**2
        hidden = expansion * width
        position_grid = grid if positional_encoding else None
        self.steps = nn.ModuleList()
        if variant == "paper":
            if activation not in _ACTIVATIONS:
                raise unknown_name("SAIB activation", activation, _ACTIVATIONS)
            s = _ACTIVATIONS[activation]
            blocks = [_Block(width, hidden, s, inner_skip) for _ in range(depth)]
            self.steps.append(_PaperStep(width, position_grid, blocks, outer_skip))
        else:
            for name, skip in {"inner_skip": inner_skip, "outer_skip": outer_skip}.items():
                if not skip:
                    raise IECLError(f"SAIB {name}=False: the convex variant has no such skip")
            if activation not in _INCREASING:
                raise unknown_name("convex SAIB activation", activation, _INCREASING)
            for _ in range(depth):
                self.steps.append(_ConvexStep(width, hidden, position_grid, activation))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), dtype and device of ``x``."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise IECLError(f"SAIB input {tuple(x.shape)}: (B, {self.channels}, H, W) is needed")
        out = x
        for step in self.steps:
            out = out + unpatchify(step(patchify(out, self.patch_size)), self.patch_size).to(
                x.dtype
            )
        return match_statistics(out, x) if self.match_statistics else out

    @torch.no_grad()
    def displacement_bound(self) -> float:
        """A bound on max |X' - X| over all pixels and all inputs, in the units of X (ours).

        For one step it is sup|s| times the induced infinity norm of K^T; over ``depth`` steps
        these add up.

        Raises:
            IECLError: nothing bounds it (paper variant, softplus, matched statistics).

        >>> saib = SAIB(32, variant="convex")
        >>> x = 100 * torch.randn(2, 3, 32, 32)
        >>> bool((saib(x) - x).abs().max() <= saib.displacement_bound())
        True
        """
        if self.variant != "convex" or self.match_statistics:
            raise IECLError(
                "displacement_bound: only the convex variant without match_statistics has one"
            )
        if self.options["activation"] == "softplus":
            raise IECLError("displacement_bound: softplus is unbounded; tanh and sigmoid are not")
        return sum(
            step.displacement_bound() for step in self.steps if isinstance(step, _ConvexStep)
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class _Block(nn.Module):
    """1x1 conv -> s -> 3x3 conv -> s -> 1x1 conv on patches (B, C p^2, h, w)."""

    def __init__(
        self, width: int, hidden: int, s: Callable[[Tensor], Tensor], inner_skip: bool
    ) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, hidden, 1)
        self.mix = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.contract = nn.Conv2d(hidden, width, 1)
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
        # Only the last: were the inner ones zero too, the next block would see no image.
        nn.init.zeros_(blocks[-1].contract.weight)
        if blocks[-1].contract.bias is not None:
            nn.init.zeros_(blocks[-1].contract.bias)

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


def save_saib(saib: SAIB, path: str | PathLike[str]) -> None:
    """Write weights and constructor options to one safetensors file at ``path``.

    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "saib.safetensors")
    >>> save_saib(SAIB(32, variant="convex"), path)
    >>> load_saib(path).variant
    'convex'
    """
    from safetensors.torch import save_file

    state = {name: value.detach().contiguous() for name, value in saib.state_dict().items()}
    save_file(state, path, metadata={_METADATA_KEY: json.dumps(saib.options)})


def load_saib(path: str | PathLike[str]) -> SAIB:
    """The SAIB that :func:`save_saib` wrote, on the CPU, in the dtype it was saved in.

    Raises:
        IECLError: the file is missing, damaged, or no SAIB.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise IECLError(f"SAIB file '{path}': {_one_line(error)}") from error
    if _METADATA_KEY not in metadata:
        raise IECLError(f"SAIB file '{path}': a safetensors file, but not of a SAIB")
    try:
        # meta: no initialisation, so that loading leaves the random state alone
        with torch.device("meta"):
            saib = SAIB(**json.loads(metadata[_METADATA_KEY]))
        saib.load_state_dict(state, assign=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise IECLError(f"SAIB file '{path}': {_one_line(error)}") from error
    return saib


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
