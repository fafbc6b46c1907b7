"""L_reg(f): what keeps the singular values of a backbone's layers near one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from iecl_solo import checks
from iecl_solo.errors import IECLError, unknown_name

MODES = ("penalty", "bilipschitz", "volume")
NORMS = ("reshaped", "convolution")
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_FIRST_ITERATIONS = 15
#: Training steps from one step of inverse iteration to the next, in mode "bilipschitz".
INVERSE_EVERY = 5
_SEED = 0


def spectral_layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of ``module`` that have a spectrum, with their names, in registration order.

    These are every Conv2d (grouped and depthwise too), every Linear, and every
    nn.MultiheadAttention for its input projections (its output projection is a Linear). Subclasses
    count. Norms, biases, embeddings, position tables and layer scales are left alone.

    >>> [name for name, _ in spectral_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))]
    ['0']
    """
    kinds = (nn.Conv2d, nn.Linear, nn.MultiheadAttention)
    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, kinds)]


class SpectralRegularizer(nn.Module):
    """L_reg(f) = sum over layers of max(0, sigma_max - 1)^2, and in one mode a floor as well.

    [IE-CL] (arXiv 2603.12594) asks for spectral normalisation of the query's encoder, "to bound
    E log|det J_f| from below". A cap on sigma_max bounds it from above; it is sigma_min that bounds
    it from below. Hence ``mode="penalty"``, the cap alone as in the paper, and
    ``mode="bilipschitz"`` (ours), which adds max(0, floor - sigma_min)^2 for every layer.

    sigma_max comes from power iteration, started ``power_iterations`` steps from where the last
    call ended (15 steps at construction); sigma_min from one step of inverse iteration on W W^T,
    by Cholesky, likewise warm. Both are attained by a vector, so sigma_max is never overestimated
    and sigma_min never underestimated: nothing is penalised that is within its bounds. The gradient
    is that of u^T W v with u and v held fixed. A vector follows one direction at a time: once the
    penalty has pushed that one below the next, the estimate is too low for some calls; more
    ``power_iterations`` make them fewer.

    ``mode="volume"`` (ours) keeps volume itself, which neither does (docs/lipschitz.md): the sum
    over layers of max(0, 1 - m)^2, m the geometric mean of all singular values of the layer's
    matrix, by one Cholesky factor of its Gram matrix. No layer may shrink volume; none is capped.

    ``norm="reshaped"``: a layer's matrix is its kernel as (out, in * kh * kw); a convolution with g
    groups is g such blocks, of which the extreme one counts. The operator norm of a convolution is
    at most sqrt(kh * kw) times that. ``norm="convolution"``: the norm of the operator itself, with
    its padding, stride and groups, on the image size that it meets in ``backbone`` when that is
    given one (1, *input_size) image; a layer that this pass does not reach is left out. A subclass
    of Conv2d that pads in its own forward is measured without that padding.

    ``fold=True`` (ours): the weight of a convolution whose very output enters a BatchNorm2d is
    taken with the norm's factor weight / sqrt(running_var + eps), as `lipschitz_report` does: the
    map that the network applies. Without it the penalty says nothing about that map: the norm
    divides the kernel's size out again, so that the penalty shrinks the kernels and the network
    stays what it was. The size of the kernel has no gradient here, its direction and the norm's
    factor have.

    The backbone is an argument of the call and never a submodule, so the state dict holds only the
    iterated vectors (``u_0``, ...), and no weight twice. They advance in training mode only. All is
    computed in float32 (float64 for float64 weights), under autocast too. Building one neither
    reads nor moves the global random state.

    Args:
        backbone: the network f, or any other with the same layers.
        mode: "penalty", "bilipschitz" or "volume".
        power_iterations: steps per call, at least 1.
        sigma_min_floor: the floor of mode "bilipschitz".
        norm: "reshaped" or "convolution" (mode "penalty" only).
        fold: whether batch norms are folded into the convolutions before them.
        input_size: (C, H, W) of the images, for ``norm="convolution"`` and ``fold``.

    Raises:
        IECLError: unknown or contradictory options; a backbone without such layers, or called with
            another one than it was built for.

    >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    >>> regularizer = SpectralRegularizer(backbone)
    >>> regularizer(backbone).shape
    torch.Size([])
    >>> [(name, tuple(u.shape)) for name, u in regularizer.state_dict().items()]
    [('u_0', (1, 8)), ('u_1', (1, 4))]
    """

    def __init__(
        self,
        backbone: nn.Module,
        mode: str = "penalty",
        *,
        power_iterations: int = 1,
        sigma_min_floor: float = 0.1,
        norm: str = "reshaped",
        fold: bool = False,
        input_size: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise unknown_name("spectral mode", mode, MODES)
        if norm not in NORMS:
            raise unknown_name("spectral norm", norm, NORMS)
        checks.whole("power_iterations", power_iterations, 1)
        checks.number("sigma_min_floor", sigma_min_floor, 0, 1, above=True)
        if norm == "convolution" and mode != "penalty":
            raise IECLError(f"mode '{mode}' with norm 'convolution': only norm 'reshaped' has it")
        if (norm == "convolution" or fold) != (input_size is not None):
            raise IECLError(
                f"norm '{norm}', fold {fold}, input_size {input_size}: norm 'convolution' and fold "
                "need it, others do not"
            )

        self.mode = mode
        self.power_iterations = power_iterations
        self.sigma_min_floor = sigma_min_floor
        self._calls: int | None = None
        traced = {} if input_size is None else _trace(backbone, input_size)
        sizes = traced if norm == "convolution" else None
        names = {layer: name for name, layer in backbone.named_modules()}
        self._batchnorms = {
            k: names[t.batchnorm] for k, t in traced.items() if fold and t.batchnorm is not None
        }
        self._convolutions: list[str] = []
        self._matrices: dict[str, tuple[int, int, int]] = {}  # (groups, rows, columns)
        for name, layer, weight in _weights(backbone):
            if sizes is not None and _is_spatial(layer):
                if name in sizes:
                    self._convolutions.append(name)
            else:
                self._matrices[name] = _block_shape(layer, weight)
        if not self._matrices and not self._convolutions:
            raise IECLError("spectral regulariser: the backbone has no Conv2d, Linear or attention")
        self._start(backbone, sizes)

    def forward(self, backbone: nn.Module) -> Tensor:
        """The penalty, a float32 scalar on the backbone's device, differentiable in its weights."""
        largest: list[Tensor] = []
        smallest: list[Tensor] = []
        advance = self.mode == "bilipschitz" and self._advances()
        with torch.autocast(next(backbone.parameters()).device.type, enabled=False):
            if self.mode == "volume":
                means = [
                    _mean_log_sigma(_as_matrix(self._weight(backbone, name), groups)).exp()
                    for name, (groups, _, _) in self._matrices.items()
                ]
                # of the mean itself and not of its log, whose gradient is without bound at a batch
                # norm that begins at 0, as the last of a residual branch often does
                return (1 - torch.stack(means)).relu().square().sum()
            for index, name in enumerate(self._matrices):
                weight, matrix = self._matrix(backbone, name)
                sigma, u, v = _largest(
                    matrix, self._read(f"u_{index}", matrix), self.power_iterations
                )
                self._write(f"u_{index}", u)
                largest.append(_SingularValue.apply(weight, sigma, u, v).amax())
                if self.mode == "bilipschitz":
                    low = self._read(f"low_{index}", matrix)
                    sigma, u, v, low = _smallest(matrix, low, 1 if advance else 0)
                    self._write(f"low_{index}", low)
                    smallest.append(_SingularValue.apply(weight, sigma, u, v).amin())
            for index, name in enumerate(self._convolutions, start=len(self._matrices)):
                layer, weight = self._convolution(backbone, name)
                v = self._read(f"u_{index}", weight)
                sigma, v = _convolution_largest(layer, weight, v, self.power_iterations)
                largest.append(sigma.squeeze(0))
                self._write(f"u_{index}", v)
            penalty = (torch.stack(largest) - 1).relu().square().sum()
            if smallest:
                missing = self.sigma_min_floor - torch.stack(smallest)
                penalty = penalty + missing.relu().square().sum()
        return penalty

    def _advances(self) -> bool:
        """Whether this call takes a step of inverse iteration; counts the calls in training."""
        if self._calls is None:  # new or loaded; read once, since a device is waited for
            self._calls = int(self.get_buffer("calls"))
        calls = self._calls
        if self.training:
            self._calls += 1
            self.get_buffer("calls").fill_(self._calls)
        return calls < INVERSE_EVERY or calls % INVERSE_EVERY == 0

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._calls = None

    def extra_repr(self) -> str:
        layers = len(self._matrices) + len(self._convolutions)
        return f"mode={self.mode!r}, power_iterations={self.power_iterations}, layers={layers}"

    @torch.no_grad()
    def _start(self, backbone: nn.Module, sizes: dict[str, _Traced] | None) -> None:
        generator = torch.Generator().manual_seed(_SEED)

        def unit(shape: tuple[int, ...], like: Tensor) -> Tensor:
            vector = torch.randn(shape, generator=generator, dtype=torch.float64)
            return F.normalize(vector.flatten(1), dim=1).view(shape).to(like)

        if self.mode == "volume":  # nothing is iterated
            return
        if self.mode == "bilipschitz":
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        for index, name in enumerate(self._matrices):
            matrix = self._matrix(backbone, name)[1]
            u = unit(matrix.shape[:2], matrix)
            self.register_buffer(f"u_{index}", _largest(matrix, u, _FIRST_ITERATIONS)[1])
            if self.mode == "bilipschitz":
                u = unit((len(matrix), min(matrix.shape[1:])), matrix)
                self.register_buffer(f"low_{index}", _smallest(matrix, u, _FIRST_ITERATIONS)[3])
        for index, name in enumerate(self._convolutions, start=len(self._matrices)):
            layer, weight = self._convolution(backbone, name)
            assert sizes is not None
            v = unit((1, layer.in_channels, *sizes[name].size), weight)
            v = _convolution_largest(layer, weight, v, _FIRST_ITERATIONS)[1]
            self.register_buffer(f"u_{index}", v)

    def _weight(self, backbone: nn.Module, name: str) -> Tensor:
        try:
            weight = _wide(attrgetter(name)(backbone))
            if name in self._batchnorms:
                weight = _folded(weight, backbone.get_submodule(self._batchnorms[name]))
            return weight
        except AttributeError as error:
            raise self._other_backbone(error) from error

    def _matrix(self, backbone: nn.Module, name: str) -> tuple[Tensor, Tensor]:
        weight = self._weight(backbone, name)
        matrix = _as_matrix(weight.detach(), self._matrices[name][0])
        if matrix.shape != self._matrices[name]:
            raise self._other_backbone(f"{name} is {tuple(weight.shape)}")
        return weight, matrix

    def _convolution(self, backbone: nn.Module, name: str) -> tuple[nn.Conv2d, Tensor]:
        weight = self._weight(backbone, name)
        return backbone.get_submodule(name.rpartition(".")[0]), weight  # type: ignore[return-value]

    @staticmethod
    def _other_backbone(error: object) -> IECLError:
        return IECLError(f"spectral regulariser: built for another backbone ({error})")

    def _read(self, name: str, like: Tensor) -> Tensor:
        return self.get_buffer(name).to(like.dtype)

    def _write(self, name: str, value: Tensor) -> None:
        if self.training:
            # no_grad: the graph keeps ``value`` itself, never the buffer, so that a second call
            # before the backward pass is allowed
            with torch.no_grad():
                self.get_buffer(name).copy_(value)


class LayerSpectrum(NamedTuple):
    """What is reported of a layer; ``operator_norm`` is None where it was not measured."""

    sigma_max: float
    sigma_min: float
    operator_norm: float | None = None


@torch.no_grad()
def sigmas(backbone: nn.Module) -> dict[str, tuple[float, float]]:
    """(sigma_max, sigma_min) of every weight, of all its singular values, by its name.

    Of the kernel as (out, in * kh * kw), over all groups; sigma_min is the smallest of the
    min(rows, columns) singular values. NaN for a weight that is not finite. Slow, for reports.

    >>> sigmas(nn.Linear(2, 2).requires_grad_(False).apply(lambda m: nn.init.eye_(m.weight)))
    {'weight': (1.0, 1.0)}
    """
    return {name: _extremes(layer, weight) for name, layer, weight in _weights(backbone)}


def lipschitz_report(
    backbone: nn.Module, input_size: tuple[int, int, int], iterations: int = 50
) -> dict[str, LayerSpectrum]:
    """The spectrum of every layer as it acts in evaluation, with its batch norm folded in.

    One (1, *input_size) image of zeros goes through ``backbone`` in evaluation mode, past its own
    hooks. A convolution whose very output enters a BatchNorm2d or SyncBatchNorm is multiplied by
    |weight| / sqrt(running_var + eps), channel by channel, before its singular values are taken:
    that is the map the network applies, and why a penalty on the kernel alone says little under
    batch norm. ``operator_norm`` is the convolution's on the image size it meets there, by
    ``iterations`` power iterations; a convolution never reached has none.

    >>> report = lipschitz_report(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (3, 8, 8))
    >>> list(report)
    ['0.weight']
    """
    report = {}
    with torch.inference_mode(False), torch.no_grad():
        traced = _trace(backbone, input_size)
        for name, layer, weight in _weights(backbone):
            batchnorm = traced[name].batchnorm if name in traced else None
            if batchnorm is not None:
                weight = weight * _batchnorm_scale(batchnorm).view(-1, 1, 1, 1)
            largest, smallest = _extremes(layer, weight)
            operator: float | None = largest
            if _is_spatial(layer):
                operator = None
                if name in traced:
                    size = traced[name].size
                    operator = _operator_norm(layer, _wide(weight), size, iterations).item()
            report[name] = LayerSpectrum(largest, smallest, operator)
    return report


def convolution_norm(layer: nn.Conv2d, size: tuple[int, int], iterations: int = 100) -> Tensor:
    """The operator norm of a convolution on (H, W) images, a scalar, by power iteration.

    With its padding, stride, dilation and groups, without its bias. Differentiable in its weight.
    Approached from below.

    >>> layer = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    >>> _ = nn.init.constant_(layer.weight, 1 / 9)
    >>> bool(convolution_norm(layer, (16, 16)) < 1)
    True
    """
    return _operator_norm(layer, _wide(layer.weight), size, iterations)


def parametrize_spectral(module: nn.Module) -> nn.Module:
    """Divide every spectral layer's weight by its sigma_max, in place; returns ``module``.

    By torch.nn.utils.parametrizations.spectral_norm, whose matrix is (out, in * kh * kw), for
    grouped convolutions too: a stricter cap than :class:`SpectralRegularizer`'s on those. Names in
    the state dict change (see :func:`plain_state_dict`), and so does the order of parameters(): a
    momentum copy has to be parametrised as well, or be made by copy.deepcopy afterwards. The global
    random state is left as it was; a weight that is parametrised already is left alone.

    >>> linear = parametrize_spectral(nn.Linear(4, 3)).eval()
    >>> bool((torch.linalg.matrix_norm(linear.weight, 2) - 1).abs() < 1e-2)
    True
    """
    weights = _weights(module)
    cuda = {weight.device.index for _, _, weight in weights if weight.is_cuda}
    with torch.random.fork_rng(devices=sorted(cuda)):
        for name, layer, _ in weights:
            attribute = name.rpartition(".")[2]
            if not parametrize.is_parametrized(layer, attribute):
                parametrizations.spectral_norm(layer, attribute)
    return module


@torch.no_grad()
def plain_weights(module: nn.Module) -> dict[str, Tensor]:
    """The effective weight of every parametrised layer under its plain name.

    As in evaluation mode: no power iteration is made, and calling this changes nothing.

    >>> list(plain_weights(parametrize_spectral(nn.Sequential(nn.Linear(4, 3)))))
    ['0.weight']
    """
    with evaluating(module):
        return {
            f"{prefix}{attribute}": getattr(layer, attribute).detach()
            for prefix, layer, attribute in _parametrized(module)
        }


def plain_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``module`` with effective weights under plain names.

    It loads into the plain network with ``strict=True``. To resume, keep the network's own state
    dict: the weights before division and the power iteration's vectors are in that one only.

    >>> plain = plain_state_dict(parametrize_spectral(nn.Linear(4, 3)))
    >>> nn.Linear(4, 3).load_state_dict(plain)
    <All keys matched successfully>
    """
    taken = tuple(
        f"{prefix}parametrizations.{attribute}." for prefix, _, attribute in _parametrized(module)
    )
    plain = {name: v for name, v in module.state_dict().items() if not name.startswith(taken)}
    return {**plain, **plain_weights(module)}


# --- vectors and matrices


class _SingularValue(torch.autograd.Function):
    """sigma = u^T W v with u and v held fixed, for each block of a weight.

    By hand, since autograd would keep a copy of every weight for it.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, sigma: Tensor, u: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(u, v)
        ctx.shape, ctx.transposed = weight.shape, _channels_last(weight)
        return sigma

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None, None]:
        u, v = ctx.saved_tensors
        matrix = (grad[0].unsqueeze(1) * u).unsqueeze(2) * v.unsqueeze(1)
        if not ctx.transposed:
            return matrix.reshape(ctx.shape), None, None, None
        out, channels, height, width = ctx.shape
        kernel = matrix.reshape(out, height, width, channels).permute(0, 3, 1, 2)
        return kernel, None, None, None


def _channels_last(weight: Tensor) -> bool:
    return (
        weight.ndim == 4
        and not weight.is_contiguous()
        and weight.is_contiguous(memory_format=torch.channels_last)
    )


def _as_matrix(weight: Tensor, groups: int) -> Tensor:
    """(groups, rows, columns), without a copy: the columns' order is of no consequence."""
    if _channels_last(weight):
        weight = weight.permute(0, 2, 3, 1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


@torch.no_grad()
def _largest(matrix: Tensor, u: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """sigma_max (n,), left and right vectors of matrices (n, rows, columns), from ``u``."""
    for _ in range(iterations):
        v = F.normalize(_left(u, matrix), dim=1)
        image = _right(matrix, v)
        u = _unit(image, u)
    return torch.linalg.vector_norm(image, dim=1), u, v


def _gram(matrix: Tensor) -> Tensor:
    """M M^T or M^T M of matrices (n, rows, columns), over the shorter side."""
    return matrix @ matrix.mT if matrix.shape[1] <= matrix.shape[2] else matrix.mT @ matrix


@torch.no_grad()
def _smallest(
    matrix: Tensor, u: Tensor, iterations: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sigma_min (n,), left and right vectors, and the one on the shorter side, from ``u``."""
    wide = matrix.shape[1] <= matrix.shape[2]
    if iterations:
        gram = _gram(matrix)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        # The shift keeps Cholesky safe when sigma_min is nearly zero, and leaves the vectors be.
        diagonal += 1e-5 * diagonal.mean(1, keepdim=True) + torch.finfo(gram.dtype).eps
        factor = torch.linalg.cholesky_ex(gram).L
    for _ in range(iterations):
        u = _unit(torch.cholesky_solve(u.unsqueeze(2), factor).squeeze(2), u)
    image = _left(u, matrix) if wide else _right(matrix, u)
    # where sigma_min is 0 any direction raises it, and none is given
    anywhere = torch.arange(1, image.shape[1] + 1, device=image.device).cos().to(image)
    other = _unit(image, F.normalize(anywhere, dim=0).expand_as(image))
    left, right = (u, other) if wide else (other, u)
    return torch.linalg.vector_norm(image, dim=1), left, right, u


def _mean_log_sigma(matrix: Tensor) -> Tensor:
    """Mean log singular value of matrices (n, rows, columns), over the shorter side's number."""
    gram = _gram(matrix)
    # as in _smallest: a singular value of nearly zero is one of 0.3 % of their root mean square
    diagonal = gram.diagonal(dim1=1, dim2=2)
    floor = 1e-5 * diagonal.mean(1, keepdim=True) + torch.finfo(gram.dtype).eps
    factor = torch.linalg.cholesky_ex(gram + torch.diag_embed(floor.expand_as(diagonal))).L
    return factor.diagonal(dim1=1, dim2=2).log().mean()


def _convolution_largest(
    layer: nn.Conv2d, weight: Tensor, v: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """Operator norm (1,) and its right vector (1, C, H, W), from ``v``; bias left out."""
    for _ in range(iterations):
        # outside inference mode, since the transpose of the map is its gradient
        with torch.inference_mode(False), torch.enable_grad():
            x = v.detach().clone().requires_grad_()
            image = _convolve(layer, weight.detach(), x)
            (back,) = torch.autograd.grad(image, x, image.detach())
        v = _unit(back.flatten(1), v.flatten(1)).view_as(v)
    return torch.linalg.vector_norm(_convolve(layer, weight, v).flatten(1), dim=1), v


def _operator_norm(
    layer: nn.Conv2d, weight: Tensor, size: tuple[int, int], iterations: int
) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    v = torch.randn(1, layer.in_channels, *size, generator=generator).to(weight)
    return _convolution_largest(layer, weight, v / v.norm(), iterations)[0].squeeze(0)


def _convolve(layer: nn.Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    return layer._conv_forward(x, weight, None)


def _left(vector: Tensor, matrix: Tensor) -> Tensor:
    return torch.bmm(vector.unsqueeze(1), matrix).squeeze(1)


def _right(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.bmm(matrix, vector.unsqueeze(2)).squeeze(2)


def _unit(vector: Tensor, fallback: Tensor) -> Tensor:
    """Rows at norm 1. A zero weight would erase the direction for good, so the last one is kept."""
    norm = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    usable = (norm > torch.finfo(norm.dtype).tiny) & (norm < float("inf"))
    return torch.where(usable, vector / norm, fallback)


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _extremes(layer: nn.Module, weight: Tensor) -> tuple[float, float]:
    if not weight.isfinite().all():  # a run that diverged is reported, not ended, by this
        return float("nan"), float("nan")
    rows = _wide(weight).reshape(_block_shape(layer, weight))
    if weight.dtype == torch.float64 or weight.device.type == "mps":  # which has no float64
        values = torch.linalg.svdvals(rows)
    else:  # four times as fast, and in float64 no less exact than the decomposition in float32
        values = torch.linalg.eigvalsh(_gram(rows.double())).clamp(min=0).sqrt()
    return values.max().item(), values.min().item()


def _block_shape(layer: nn.Module, weight: Tensor) -> tuple[int, int, int]:
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return groups, weight.shape[0] // groups, weight[0].numel()


# --- networks


class _Traced(NamedTuple):
    size: tuple[int, int]
    batchnorm: nn.BatchNorm2d | nn.SyncBatchNorm | None


def _weights(module: nn.Module) -> list[tuple[str, nn.Module, Tensor]]:
    """(name of the weight, its layer, the weight) for each spectral layer."""
    found = []
    # evaluation: to read a parametrised weight while training is to move its power iteration
    with evaluating(module):
        for name, layer in spectral_layers(module):
            attention = isinstance(layer, nn.MultiheadAttention)
            for attribute in _ATTENTION_WEIGHTS if attention else ("weight",):
                weight = getattr(layer, attribute)
                if weight is not None:
                    found.append((f"{name}.{attribute}" if name else attribute, layer, weight))
    return found


def _is_spatial(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether the operator norm is not simply the kernel's, as a 1x1's without copied edges is."""
    if not isinstance(layer, nn.Conv2d):
        return False
    repeats = layer.padding_mode != "zeros" and layer.padding not in ("valid", "same", (0, 0))
    return layer.kernel_size != (1, 1) or repeats


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each submodule's own mode again."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, training in modes.items():
            child.training = training


@torch.no_grad()
def _trace(backbone: nn.Module, input_size: tuple[int, int, int]) -> dict[str, _Traced]:
    """For each convolution an image reaches: its input's (H, W), and the batch norm after it."""
    names = {layer: name for name, layer, _ in _weights(backbone) if isinstance(layer, nn.Conv2d)}
    sizes: dict[str, tuple[int, int]] = {}
    batchnorms: dict[str, nn.BatchNorm2d | nn.SyncBatchNorm] = {}
    outputs: list[tuple[str, Tensor]] = []

    def after_convolution(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        sizes.setdefault(names[layer], (args[0].shape[-2], args[0].shape[-1]))  # type: ignore[index]
        outputs.append((names[layer], output))  # type: ignore[index]

    def before_batchnorm(batchnorm: nn.Module, args: tuple[Tensor]) -> None:
        for name, output in outputs:
            if output is args[0]:
                batchnorms[name] = batchnorm  # type: ignore[assignment]

    handles = [layer.register_forward_hook(after_convolution) for layer in names]
    for layer in backbone.modules():
        # with batch statistics there is no fixed factor to fold
        is_batchnorm = isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm))
        if is_batchnorm and layer.running_var is not None:
            handles.append(layer.register_forward_pre_hook(before_batchnorm))
    image = next(backbone.parameters()).new_zeros(1, *input_size)
    try:
        with evaluating(backbone):
            # forward itself: a host may have hooked the backbone to transform a view
            backbone.forward(image)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _Traced(size, batchnorms.get(name)) for name, size in sizes.items()}


def _batchnorm_scale(batchnorm: nn.BatchNorm2d | nn.SyncBatchNorm) -> Tensor:
    """(C,) the factor that each channel meets in evaluation."""
    assert batchnorm.running_var is not None
    scale = torch.rsqrt(batchnorm.running_var + batchnorm.eps)
    return scale if batchnorm.weight is None else scale * batchnorm.weight.abs()


def _folded(weight: Tensor, batchnorm: nn.Module) -> Tensor:
    """The kernel times the norm's factor, without a gradient of the kernel's size by channel."""
    length = weight.flatten(1).norm(dim=1).clamp(min=torch.finfo(weight.dtype).tiny)
    # the running variance follows the kernel's square: shrinking it only seems to shrink the map
    factor = _batchnorm_scale(batchnorm) * length.detach() / length  # type: ignore[arg-type]
    return weight * factor.view(-1, *[1] * (weight.ndim - 1))


def _parametrized(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """(prefix, layer, attribute) for each tensor that :func:`parametrize_spectral` took over."""
    return [
        (f"{name}." if name else "", layer, attribute)
        for name, layer in module.named_modules()
        if parametrize.is_parametrized(layer)
        for attribute, stack in layer.parametrizations.items()
        if hasattr(stack[0], "_u")
    ]
