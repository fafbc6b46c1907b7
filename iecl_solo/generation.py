"""Entropy made at the input, in nats per dimension: of patches as Gaussians, and of the map itself.

`patch_statistics` compares the law of the patches that SAIB made with that of the raw ones;
`log_det` is log|det J| of SAIB with a stochastic gradient. Both train SAIB; to measure a trained
one, `iecl_solo.jacobian` is the exacter tool.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from iecl_solo import checks
from iecl_solo.distributed import sum_over_processes
from iecl_solo.entropy import COVARIANCES
from iecl_solo.errors import IECLError, unknown_name
from iecl_solo.precision import full_precision
from iecl_solo.saib import patchify

__all__ = [
    "PatchStatistics",
    "conditional_entropy",
    "conditional_entropy_bound",
    "log_det",
    "patch_statistics",
]

# Of the mean variance of a raw pixel, added to every variance: noise of 1 % of the deviation, about
# what the rounding to 8 bits is. Directions below it hold no image.
NOISE_FLOOR = 1e-4
# Of an image without any contrast.
VARIANCE_FLOOR = 1e-10

Map = Callable[[Tensor], Tensor]


class PatchStatistics(NamedTuple):
    """Transformed patches against raw ones, each 0-dim and in nats per dimension.

    Attributes:
        delta_h: contrast + beyond_contrast, the entropy that the Gaussian of the patches gained.
        contrast: log of the transformed patches' deviation over the raw ones' (root mean square
            over the dimensions): what any batch norm takes out again.
        beyond_contrast: what is left, 1/(2n) (log det R - log det S) with R the transformed
            covariance scaled to the raw one's trace. No scaling of the images changes it.
        kl: KL(N(mu', S') || N(mu, S)) / n, the paper's KL(p_phi || q) where the paper has it.
    """

    delta_h: Tensor
    contrast: Tensor
    beyond_contrast: Tensor
    kl: Tensor


def patch_statistics(
    raw: Sequence[Tensor],
    made: Sequence[Tensor],
    patch_size: int,
    *,
    covariance: str = "full",
    gather_distributed: bool = True,
) -> PatchStatistics:
    """Entropy gained by the images' patches and their KL, both as Gaussians.

    The patches P in R^n, n = C p^2, of all images and places are one law: mean mu and covariance S
    of the raw ones, mu' and S' of the transformed ones. For Gaussians
    KL = 1/2 [tr(S^-1 S') + (mu' - mu)^T S^-1 (mu' - mu) - n + log det S - log det S'] (IE-CL's
    KL(p_phi || q), arXiv 2603.12594) and Delta H = 1/2 log(det S' / det S). Both covariances have
    noise of 1 % of the raw deviation added, so that n may exceed the number of patches.

    With the total variance held, a Delta H - b KL is greatest at partial whitening (ours):
    s'_i = (a + b) / (b / s_i + m) for the eigenvalues s_i of S, m such that sum s'_i = sum s_i. At
    a = b that is Delta H 0.33 at a KL of 0.15 on CIFAR-10 (p = 4). It is an upper bound of what a
    map can reach; and more than the images gain, since what neighbouring patches share is not seen.

    Under DDP the moments are those of all processes, summed with gradient: every process has the
    same values, and averaging the parameters' gradients gives those of one process with all images.

    Args:
        raw: batches of images (B, C, H, W); no gradient goes there.
        made: what they became, in the same order and sizes.
        patch_size: p.
        covariance: of the KL: "full", or "diagonal" for the sum over the dimensions.
        gather_distributed: sum the moments over all processes. All of them must then call it; one
            that measures alone gives False.

    Returns:
        `PatchStatistics`, float32 or float64, differentiable in ``made``.

    Raises:
        IECLError: nothing to compare, or an unknown covariance.

    Cost: O(B H W C p^2) for the moments and O(n^3) for the determinants.

    >>> x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> doubled = patch_statistics([x], [2 * x], 4)
    >>> round(doubled.contrast.item(), 3), round(abs(doubled.beyond_contrast.item()), 3)
    (0.693, 0.0)
    """
    if not raw or len(raw) != len(made):
        raise IECLError(f"{len(raw)} raw and {len(made)} transformed batches: one of each")
    if covariance not in COVARIANCES:
        raise unknown_name("covariance", covariance, COVARIANCES)
    with full_precision(raw[0].device):
        before, after = (_rows(images, patch_size) for images in (raw, made))
        before = before.detach()
        sums = sum_over_processes if gather_distributed else _alone
        count, total, total_made = sums(
            before.new_tensor([len(before)]), before.sum(0), after.detach().sum(0)
        )
        # moments about the means, which float32 can hold whatever the images' offset
        mean, mean_made = total / count, total_made / count
        dtype = before.dtype
        working = torch.float32 if before.device.type == "mps" else torch.float64
        # float32's products would lose what the noise floor leaves of a direction without variance
        before, after = ((before - mean).to(working), (after - mean_made).to(working))
        second, first_made, second_made = sums(before.T @ before, after.sum(0), after.T @ after)
        cov, cov_made = second / count.to(working), second_made / count.to(working)
        rest = first_made / count.to(working)  # 0 up to rounding; its gradient is not
        cov_made = cov_made - torch.outer(rest, rest)
        shift = (mean_made - mean).to(working) + rest
        return _compare(cov, cov_made, shift, covariance, dtype)


def _compare(
    cov: Tensor, cov_made: Tensor, shift: Tensor, covariance: str, dtype: torch.dtype
) -> PatchStatistics:
    dim = len(cov)
    trace = cov.trace() + VARIANCE_FLOOR
    trace_made = cov_made.trace().clamp(min=VARIANCE_FLOOR)
    floor = NOISE_FLOOR * trace / dim * torch.eye(dim, dtype=cov.dtype, device=cov.device)
    # a constant image has next to no floor, and SAIB can make a covariance of it without full rank
    rounding = 8 * torch.finfo(cov.dtype).eps * trace_made.detach() * torch.eye(dim).to(floor)
    contrast = (trace_made / trace).log() / 2
    scaled = cov_made * (trace / trace_made)
    factor = _cholesky(cov + floor)
    beyond = (_half_logdet(_cholesky(scaled + floor)) - _half_logdet(factor)) / dim
    if covariance == "full":
        columns = torch.cat([cov_made + floor, shift[:, None]], 1)
        solved = torch.cholesky_solve(columns, factor)
        distance = solved[:, :dim].trace() + shift @ solved[:, dim]
        made = _cholesky(cov_made + floor + rounding)
        gained = _half_logdet(made) - _half_logdet(factor)
    else:
        var, var_made = (m.diagonal() + floor.diagonal() for m in (cov, cov_made))
        distance = ((var_made + shift.square()) / var).sum()
        gained = (var_made.log() - var.log()).sum() / 2
    kl = ((distance - dim) / 2 - gained) / dim
    return PatchStatistics(*(v.to(dtype) for v in (contrast + beyond, contrast, beyond, kl)))


def _rows(images: Sequence[Tensor], patch_size: int) -> Tensor:
    """(patches, n) of all images, float32 at least."""
    rows = [rearrange(patchify(x, patch_size), "b n h w -> (b h w) n") for x in images]
    joined = torch.cat(rows)
    return joined.to(torch.promote_types(joined.dtype, torch.float32))


def _alone(*parts: Tensor) -> Iterable[Tensor]:
    return parts


def _cholesky(matrix: Tensor) -> Tensor:
    # _ex: a matrix that is not finite gives NaN, which a gradient scaler can skip, and no error
    return torch.linalg.cholesky_ex(matrix)[0]


def _half_logdet(factor: Tensor) -> Tensor:
    return factor.diagonal().log().sum()


def log_det(
    module: Map,
    x: Tensor,
    *,
    steps: int = 8,
    generator: torch.Generator | None = None,
    probe: Tensor | None = None,
) -> Tensor:
    """log|det J| of the map at each image, estimated, with a stochastic gradient in its weights.

    d log|det J| = tr(J^-1 dJ) = E[v^T J^-1 dJ v] over probes v with E[v v^T] = I (Hutchinson).
    With u from ``steps`` conjugate-gradient steps on J^T J u = v, J^-T v is J u, and the gradient
    is that of (J u)^T (J v) with J u held fixed: one Jacobian-vector product with a graph. The
    value is v^T log(J^T J) v / 2 by the Gauss quadrature that the same steps hold (Ubaru, Chen &
    Saad 2017), so it costs nothing more. Ours, as a whole.

    Bias: none from the probe. From the steps, the error of J u is at most
    2 ((k - 1) / (k + 1))^steps of its size, k the condition number of J: 3e-4 at k = 2, 0.03 at
    k = 4, and 0 from steps = n. The value's own error falls twice as fast.

    Args:
        module: maps (B, ...) to the same shape, each image by itself, differentiable twice.
        x: images (B, ...), float32 or float64.
        steps: conjugate-gradient steps, each one product with J and one with J^T.
        generator: of the probes, one Rademacher vector an image; None is a new one with seed 0.
        probe: the probes themselves, (B, ...); then nothing is drawn.

    Returns:
        (B,) in nats, in x's dtype, differentiable in what the map is made of (not in x).

    Raises:
        IECLError: fewer than one step.

    >>> scale = torch.tensor(2.0, requires_grad=True)
    >>> value = log_det(lambda x: scale * x, torch.zeros(1, 3, 4, 4))
    >>> (gradient,) = torch.autograd.grad(value.sum(), scale)
    >>> round(value.item() / 48, 4), round(gradient.item() / 48, 4)  # log 2 and 1 / 2
    (0.6931, 0.5)
    """
    checks.whole("steps", steps, 1)
    x = x.detach().contiguous()  # forward mode refuses an expanded batch
    if probe is None:
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        bits = torch.randint(0, 2, x.shape, generator=generator, device=generator.device)
        probe = 2 * bits.to(x) - 1
    with full_precision(x.device):
        with torch.no_grad():
            image, value = _solve(module, x, probe.flatten(1), steps)
        if not torch.is_grad_enabled():
            return value
        pushed = torch.func.jvp(module, (x,), (probe,))[1].flatten(1)
        product = (image * pushed).sum(1)
        return value + product - product.detach()


def _solve(module: Map, x: Tensor, v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """J^-T v (B, n), and v^T log(J^T J) v / 2 (B,), by conjugate gradients on J^T J u = v."""
    out, transposed = torch.func.vjp(module, x)[:2]

    def pull(u: Tensor) -> Tensor:
        return transposed(u.view_as(out))[0].flatten(1)

    # J as the transpose of the transpose: the map is not run again for every product
    forward = torch.func.vjp(pull, torch.zeros_like(v))[1]
    energy = v.square().sum(1)
    tolerance = 100 * torch.finfo(v.dtype).eps ** 2 * energy
    residual, direction, squares = v, v, energy
    image = torch.zeros_like(v)
    diagonal, off_diagonal = [], []
    carried = torch.zeros_like(energy)
    for _ in range(min(steps, v.shape[1])):
        pushed = forward(direction)[0]
        curvature = pushed.square().sum(1)
        # solved already (as at the start, where J = I): a node at 1, of weight 0. Where only the
        # curvature is 0, J is singular: a node at 0, of the weight that is left
        solved = squares <= tolerance
        alive = ~(solved | (curvature <= 0))  # NaN stays, to be seen
        length = torch.where(alive, squares / curvature, 0)
        image = image + length[:, None] * pushed
        residual = residual - length[:, None] * pull(pushed)
        squares, before = residual.square().sum(1), squares
        ratio = torch.where(alive & ~(squares <= tolerance), squares / before, 0)
        direction = residual + ratio[:, None] * direction
        diagonal.append(torch.where(alive, 1 / length, solved.to(v)) + carried)
        off_diagonal.append(torch.where(alive, ratio.sqrt() / length, 0))
        carried = torch.where(alive, ratio / length, 0)
        squares = torch.where(alive, squares, 0)
    matrix = torch.diag_embed(torch.stack(diagonal, 1))
    beside = torch.diag_embed(torch.stack(off_diagonal, 1)[:, :-1], 1)
    matrix = (matrix + beside + beside.mT).cpu().double()
    unfit = 0 * matrix.sum((1, 2))  # LAPACK raises on NaN, where a run should read it in its log
    nodes, vectors = torch.linalg.eigh(matrix.nan_to_num(0, 0, 0))
    logs = nodes.clamp(min=torch.finfo(v.dtype).tiny).log()
    quadrature = (vectors[:, 0].square() * logs).sum(1) / 2 + unfit
    return image, energy * quadrature.to(energy)


@torch.no_grad()
def conditional_entropy(
    module: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    noise: Tensor,
    *,
    chunk_size: int = 64,
) -> Tensor:
    """H(X' | X = x) of X' = g(x, e), e ~ N(0, I) of m dimensions, in nats, one draw an image.

    H(e) + E 1/2 log det(J^T J), J = dg/de at x (n, m), H(e) = m/2 log(2 pi e): the entropy on the
    surface of m dimensions in R^n that the noise reaches (by the area formula: ours), exact where
    g(x, .) is injective and an upper bound of it where two noises give one view. In n > m
    dimensions there is no density, and that entropy is minus infinity. So is this one where J has
    not full rank: with m >= n, since the budget takes a direction out.

    Args:
        module: maps (1, ...) and (1, ...) to (1, ...), as a `NoiseSAIB` does.
        x: images (B, C, H, W), float32 or float64.
        noise: draws of e (B, ...), m elements an image.
        chunk_size: columns of J at once.

    Returns:
        (B,) in nats, without gradient: its mean over draws is the entropy.

    Cost: m Jacobian-vector products and O(n m^2) an image.

    >>> x, noise = torch.zeros(1, 3, 4, 4), torch.zeros(1, 48)
    >>> doubled = conditional_entropy(lambda x, e: x + 2 * e.view_as(x), x, noise)
    >>> round(doubled.item() / 48, 4)  # log(2 pi e) / 2 + log 2
    2.1121
    """
    values = []
    with full_precision(x.device):
        for image, draw in zip(x.split(1), noise.split(1), strict=True):

            def pushed(direction: Tensor, image: Tensor = image, draw: Tensor = draw) -> Tensor:
                return torch.func.jvp(lambda e: module(image, e), (draw,), (direction,))[1]

            dim = draw.numel()
            basis = torch.eye(dim, dtype=draw.dtype, device=draw.device).view(dim, *draw.shape)
            rows = torch.func.vmap(pushed, chunk_size=chunk_size)(basis).flatten(1)
            working = rows if rows.device.type == "mps" else rows.double()
            sigma = torch.linalg.svdvals(working)
            # in more dimensions than the view's, and below the products' rounding, is no volume
            rounding = max(rows.shape) * torch.finfo(rows.dtype).eps * sigma[0]
            flat = dim > rows.shape[1] or bool(sigma[-1] <= rounding)
            volume = sigma.new_tensor(-math.inf) if flat else sigma.log().sum()
            values.append(dim / 2 * math.log(2 * math.pi * math.e) + volume.to(x.dtype))
    return torch.stack(values)


def conditional_entropy_bound(budget: float) -> float:
    """The most that H(X' | X) can be in nats per pixel and channel, at a mean absolute step.

    1 + log(2 budget), the entropy of independent Laplace steps, which is greatest at a given mean
    absolute value (Cover & Thomas 2006, sec. 12.1).

    >>> round(conditional_entropy_bound(0.15), 4)
    -0.204
    """
    return 1 + math.log(2 * budget)
