"""Entropies of a batch of embeddings in nats, each differentiable, and the KL between two batches.

Every function takes rows ``(B, d)`` and returns a 0-dim tensor on the rows' device. float32 and
float64 are computed as they are, half and bfloat16 in float32, whatever autocast and
``torch.set_float32_matmul_precision`` say, since a log-determinant in half precision is noise.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from iecl_solo import checks
from iecl_solo.distributed import all_gather_batch
from iecl_solo.errors import IECLError, unknown_name
from iecl_solo.precision import full_precision, in_full_precision

__all__ = [
    "ESTIMATORS",
    "all_gather_batch",
    "by_row_blocks",
    "coding_rate",
    "effective_rank",
    "estimate",
    "full_precision",
    "gaussian_entropy",
    "gaussian_kl",
    "in_full_precision",
    "knn_entropy",
    "log_vmf_normalizer",
    "renyi_entropy",
    "vmf_kde_entropy",
]

# A standard deviation of 1e-5: far below any spread worth telling from collapse on the unit sphere
# (where it is 1/sqrt(d)), far above float32's rounding of identical rows.
VARIANCE_FLOOR = 1e-10
# Of the mean variance: bounds the ratio a dead anchor dimension can reach in a diagonal KL.
RELATIVE_VARIANCE_FLOOR = 1e-4
COVARIANCES = ("diagonal", "full")
# Below it two rows count as equal: above float32's rounding of unit rows.
DISTANCE_FLOOR = 1e-6
# RankMe's own.
RANK_EPS = 1e-7
# Elements of a block of rows against all rows: 64 MiB in float32, of which a backward pass holds
# a few. Up to 4096 rows are one block. Not smaller: from 32 MiB on glibc gives memory back at once,
# and what it keeps of smaller blocks comes to more than these.
BLOCK_ELEMENTS = 2**24

P = ParamSpec("P")


def checked_rows(
    z: Tensor, what: str = "embeddings", *, least: int = 1, width: int | None = None
) -> Tensor:
    """Rows (B, d), lifted to float32 if they are in less.

    Args:
        z: the rows.
        what: they are, for the message.
        least: B that is needed.
        width: d that is needed; any if not given.

    Raises:
        IECLError: z is not (B, d), not floating or has too few rows.

    >>> checked_rows(torch.ones(2, 3, dtype=torch.float16)).dtype
    torch.float32
    """
    if z.ndim != 2 or (width is not None and z.shape[1] != width):
        wanted = "d" if width is None else width
        raise IECLError(f"{what} of shape {tuple(z.shape)}: (B, {wanted}) is needed")
    if not z.is_floating_point():
        raise IECLError(f"{what} of dtype {z.dtype}: a floating dtype is needed")
    if z.shape[0] < least or z.shape[1] < 1:
        raise IECLError(f"{what} of shape {tuple(z.shape)}: at least {least} rows of 1 are needed")
    return z if z.dtype.itemsize > 4 else z.float()


def by_row_blocks(function: Callable[[slice], Tensor], rows: int, columns: int) -> Tensor:
    """The rows of ``function(slice(0, rows))``, a block at a time where rows x columns is large.

    For what is computed of all pairs and kept of each row alone: with more than `BLOCK_ELEMENTS`
    pairs only one block is in memory, and it is computed again in the backward pass.

    Args:
        function: from a slice of the rows to one value for each row of it, (rows, ...).
        rows: how many rows.
        columns: elements that a row needs meanwhile.

    Returns:
        The values of all rows, (rows, ...). Differentiable in what the function closes over.

    >>> z = torch.eye(3)
    >>> by_row_blocks(lambda block: (z[block] @ z.T).sum(1), rows=3, columns=3)
    tensor([1., 1., 1.])
    """
    size = max(1, BLOCK_ELEMENTS // max(1, columns))
    if rows <= size:
        return function(slice(0, rows))
    return torch.cat(
        [
            checkpoint(function, slice(i, i + size), use_reentrant=False, preserve_rng_state=False)
            for i in range(0, rows, size)
        ]
    )


def _of_rows(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Check every tensor argument, lift it to float32 at least, and keep it there inside."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **options: P.kwargs) -> Tensor:
        named = inspect.signature(function).bind(*args, **options).arguments
        tensors = {k: checked_rows(v, least=2) for k, v in named.items() if isinstance(v, Tensor)}
        if not tensors:
            given = ", ".join(type(a).__name__ for a in named.values()) or "nothing"
            raise IECLError(f"{function.__name__} of {given}: a tensor is needed")
        others = {k: v for k, v in named.items() if k not in tensors}

        def call(*values: Tensor) -> Tensor:
            return function(**dict(zip(tensors, values, strict=True)), **others)  # type: ignore

        return in_full_precision(call, *tensors.values())

    return wrapped


def _without_nan(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix that LAPACK accepts, and a 0 to add to the result: NaN if the matrix was not finite.

    The spectral decompositions raise on NaN, which would end a run that a gradient scaler saves.
    """
    return matrix.nan_to_num(0, 0, 0), 0 * matrix.detach().sum()


def _factor(matrix: Tensor) -> Tensor:
    # cholesky_ex: NaN in gives NaN out, which a gradient scaler can skip, where cholesky would end
    # the run; and no device synchronisation
    return torch.linalg.cholesky_ex(matrix)[0]


def _logdet(factor: Tensor) -> Tensor:
    return 2 * factor.diagonal().log().sum()


def _small_gram(rows: Tensor) -> Tensor:
    """The smaller of X X^T and X^T X, which share what is not 0: O(B d min(B, d))."""
    return rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows


def _check_covariance(covariance: str, shrinkage: float | None) -> None:
    if covariance not in COVARIANCES:
        raise unknown_name("covariance", covariance, COVARIANCES)
    if shrinkage is not None:
        checks.number("shrinkage", shrinkage, 0, 1)


def _for_logdet(above: Tensor, below: Tensor, freedom: int, estimated: int) -> Tensor:
    """The weight above / below of least squared error, brought to what a log det needs (ours).

    The squared error is that of the large eigenvalues, and its weight, of order 1/n, drowns the
    small ones of a decaying spectrum. So it is multiplied by k/(k + n), k the numbers estimated a
    dimension: nearly untouched with few rows, of order 1/n^2 with many.
    """
    # of a spherical covariance the weight is 1, whatever rounding has left of 0 below
    weight = (above / below.clamp(min=torch.finfo(below.dtype).eps)).clamp(max=1)
    return weight * (estimated / (estimated + freedom))


def _oas(gram: Tensor, freedom: int, dim: int) -> Tensor:
    """The oracle approximating shrinkage (Chen et al. 2010, eq. 23, n the degrees of freedom)."""
    trace = gram.diagonal().sum().clamp(min=torch.finfo(gram.dtype).tiny)
    # tr(S^2) / tr(S)^2, divided first since squares of small numbers underflow
    purity = (gram / trace).square().sum()
    above = (1 - 2 / dim) * purity + 1
    below = (freedom + 1 - 2 / dim) * (purity - 1 / dim)
    return _for_logdet(above, below, freedom, estimated=dim)


def _oas_of_variances(variance: Tensor, freedom: int) -> Tensor:
    """The same aim for a diagonal covariance, of which only the d variances are estimated.

    Each has the sampling variance 2 s^2 / (n + 2), estimated without bias; the best weight is the
    sum of these over that of the squared distances from the mean (Ledoit & Wolf 2004, theorem 2.1,
    on the diagonal: ours).
    """
    dim = len(variance)
    share = variance / variance.sum().clamp(min=torch.finfo(variance.dtype).tiny)
    above = (1 - 1 / dim) * 2 / (freedom + 2) * share.square().sum()
    return _for_logdet(above, (share - 1 / dim).square().sum(), freedom, estimated=1)


def _isotropic(a: Tensor, mean_variance: Tensor, dim: int) -> Tensor:
    """The multiple s of the identity in S = s I + (1 - a)/(B - 1) X^T X."""
    # with no shrinkage the rank deficit of B <= d would sit below the rounding of the Gram matrix
    at_least = 4 * dim * torch.finfo(a.dtype).eps
    return a.clamp(min=at_least) * mean_variance + VARIANCE_FLOOR


def _shrunk(centred: Tensor, shrinkage: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """(s, w, log det S) of S = s I + w X^T X."""
    rows, dim = centred.shape
    gram = _small_gram(centred)
    a = _oas(gram, rows - 1, dim) if shrinkage is None else gram.new_tensor(shrinkage)
    isotropic = _isotropic(a, gram.diagonal().sum() / ((rows - 1) * dim), dim)
    weight = (1 - a) / (rows - 1)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    logdet = dim * isotropic.log() + _logdet(_factor(eye + weight / isotropic * gram))
    return isotropic, weight, logdet


@_of_rows
def gaussian_entropy(
    z: Tensor, *, covariance: str = "full", shrinkage: float | None = None
) -> Tensor:
    """Entropy of the Gaussian fitted to the rows: 1/2 log det(2 pi e S), in nats.

    S is the sample covariance (divisor B - 1) drawn towards the sphere of the same trace,
    ``(1 - a) S + a tr(S)/d I``, plus 1e-10 so that a collapsed batch has a finite value. By default
    a is the rows' own: the oracle approximating shrinkage (Chen, Wiesel, Eldar & Hero 2010,
    "Shrinkage Algorithms for MMSE Covariance Estimation", eq. 23), times d/(d + B - 1) (ours),
    since a log det needs the small eigenvalues, and the squared error that OAS minimises does not
    see them. The diagonal has its like. It is the entropy of z only if z is Gaussian, and an upper
    bound of it otherwise (up to the estimate of S).

    Bias: shrinkage raises the value (S and its shrunk form have the same trace, and log det is
    concave), by default as 1/B^2, the more the steeper the spectrum: with a factor of 1000 from
    the largest variance to the smallest +0.1 nats at d = 16, B = 256; +26 at d = 128, B = 256;
    -0.1 at B = 2048. The sample covariance lowers it, by about d (d + 1) / (4 B) for B > d: with a
    factor of 4, -0.2 at d = 16, B = 256; -6 at d = 128, B = 256; +0.7 at B = 32. So for B near d or
    below compare values of one B and one d alone. float32 tells eigenvalues down to about 1e-6 of
    the largest; give rows of a steeper spectrum (patches of images) in float64.

    Args:
        z: rows (B, d), B >= 2, any floating dtype and device.
        covariance: "full", or "diagonal" for the sum over dimensions.
        shrinkage: a, 0 to 1, or None for the rows' own. A relative floor of 4 d eps(dtype) remains.

    Returns:
        A 0-dim tensor in nats, float64 for float64 and float32 otherwise. Differentiable, through a
        too.

    Raises:
        IECLError: z is not (B, d) floating with B >= 2, or an option is out of range.

    Cost: O(B d min(B, d)) full, O(B d) diagonal.

    >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> round(gaussian_entropy(z).item(), 4)  # log(2 pi e) + log(2/3)
    2.4324
    """
    _check_covariance(covariance, shrinkage)
    dim = z.shape[1]
    centred = z - z.mean(0)
    if covariance == "full":
        logdet = _shrunk(centred, shrinkage)[2]
    else:
        freedom = z.shape[0] - 1
        variance = centred.square().sum(0) / freedom
        if shrinkage is None:
            a = _oas_of_variances(variance, freedom)
        else:
            a = variance.new_tensor(shrinkage)
        logdet = ((1 - a) * variance + _isotropic(a, variance.mean(), dim)).log().sum()
    return 0.5 * (dim * math.log(2 * math.pi * math.e) + logdet)


def _factor_of_identity_plus(gram: Tensor) -> Tensor:
    """Cholesky factor of I + gram, and of more where 1 is lost in the rounding of gram."""
    lost = 4 * len(gram) * torch.finfo(gram.dtype).eps
    return _factor(gram + (lost * gram.detach().diagonal()).clamp(min=1).diag())


@_of_rows
def coding_rate(z: Tensor, *, eps: float = 0.5) -> Tensor:
    """Coding rate 1/2 log det(I + d/(B eps^2) Z^T Z) of the rows, in nats.

    The number of nats to code a row of z up to a mean squared error eps^2 (Yu et al. 2020,
    "Maximal Coding Rate Reduction", eq. 1; Ma et al. 2007), not centred, as there. The default
    estimator: finite and smooth for every batch, B < d and collapse included.

    It is not differential entropy: it has a floor of 0 and counts scale against eps. For centred
    Gaussian rows and eps -> 0 it tends to the entropy minus d/2 log(2 pi e eps^2 / d). Its own
    bias, against d/(eps^2) E[z z^T] in place of the batch mean, is downward (log det is concave):
    -0.16 of 12.4 nats at d = 16, B = 256; -10 of 100 at d = 128, B = 256; -57 at d = 128, B = 32.

    Args:
        z: rows (B, d), B >= 2, any floating dtype and device. IE-CL gives it L2-normalised rows.
        eps: the distortion, > 0.

    Returns:
        A 0-dim tensor in nats, float64 for float64 and float32 otherwise. Differentiable.

    Raises:
        IECLError: z is not (B, d) floating with B >= 2, or eps is not positive.

    Cost: O(B d min(B, d)), by the smaller of the two Gram matrices (Sylvester).

    >>> round(coding_rate(torch.eye(4)).item(), 4)  # 4/2 log(1 + 4/(4 * 0.25))
    3.2189
    """
    checks.number("eps", eps, 0, above=True)
    rows, dim = z.shape
    scale = dim / (rows * eps**2)
    mean = z.mean(0)
    centred = z - mean
    if rows <= dim:
        # a reflection of the rows, which the determinant does not see, makes the mean a row of its
        # own: the others' products are then not lost in the rounding of its square
        root = math.sqrt(rows)
        apart = torch.cat([root * mean[None], centred[1:] + centred[:1] / (root - 1)])
        return 0.5 * _logdet(_factor_of_identity_plus(scale * apart @ apart.T))
    factor = _factor_of_identity_plus(scale * centred.T @ centred)
    along = torch.linalg.solve_triangular(factor, mean[:, None], upper=False).square().sum()
    return 0.5 * (_logdet(factor) + (scale * rows * along).log1p())


def _kl_diagonal(query: Tensor, anchor: Tensor) -> Tensor:
    def moments(z: Tensor) -> tuple[Tensor, Tensor]:
        variance = z.var(0)
        return z.mean(0), variance + RELATIVE_VARIANCE_FLOOR * variance.mean() + VARIANCE_FLOOR

    (mean_q, var_q), (mean_a, var_a) = moments(query), moments(anchor)
    # two logs: that of the ratio is -inf in float32 for a collapsed query
    log_ratio = var_q.log() - var_a.log()
    shift = (mean_q - mean_a).square()
    return 0.5 * ((var_q - var_a + shift) / var_a - log_ratio).sum()


def _kl_full(query: Tensor, anchor: Tensor, shrinkage: float | None) -> Tensor:
    dim = query.shape[1]
    mean_q, mean_a = query.mean(0), anchor.mean(0)
    centred_q, centred_a = query - mean_q, anchor - mean_a
    isotropic_q, weight_q, logdet_q = _shrunk(centred_q, shrinkage)
    isotropic_a, weight_a, _ = _shrunk(centred_a, shrinkage)
    eye = torch.eye(dim, dtype=query.dtype, device=query.device)
    # of the anchor only, hence without gradient: the one d^3 step costs no backward pass
    factor = _factor(isotropic_a * eye + weight_a * centred_a.T @ centred_a)

    def whitened(rows: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor, rows.T, upper=False).square().sum()

    trace = isotropic_q * whitened(eye) + weight_q * whitened(centred_q)
    shift = whitened((mean_q - mean_a)[None])
    return 0.5 * (trace + shift - dim + _logdet(factor) - logdet_q)


@_of_rows
def gaussian_kl(
    query: Tensor,
    anchor: Tensor,
    *,
    covariance: str = "diagonal",
    shrinkage: float | None = None,
) -> Tensor:
    """KL(N(mu', S') || N(mu, S)) in nats, query = (mu', S'), anchor = (mu, S), each fitted to rows.

    1/2 [tr(S^-1 S') + (mu - mu')^T S^-1 (mu - mu') - d + log det S - log det S'], IE-CL's
    KL(p_phi || q). **The anchor carries no gradient**: it is detached here (ours).

    "diagonal" compares the variances, each with 1e-4 of its batch's mean variance added, so that a
    dimension that is constant in the anchor alone costs much and not infinitely much. "full"
    shrinks both covariances as `gaussian_entropy` does. 0 for equal batches, never negative, up to
    rounding: of "full" about d eps(dtype) times the condition number of the shrunk S, which at
    shrinkage 0 and B <= d is all of float32's digits.

    Bias: for batches from one and the same Gaussian the value is not 0, since both sides are
    fitted: about 2 d/B diagonal and d (d + 3) / (2 B) full, B = B' >> d. A shrinkage that does not
    fall with B hides what happens to the small eigenvalues: partly whitened patches of 4x4 at a KL
    of 0.146 nats a dimension read 0.024 at a fixed 0.1, whatever B, and 0.149 by default (B = 8192,
    float64).

    Args:
        query: rows (B', d), B' >= 2, any floating dtype and device.
        anchor: rows (B, d), B >= 2; B may differ from B'.
        covariance: "diagonal" or "full".
        shrinkage: of "full", 0 to 1, or None for each side's own as in `gaussian_entropy`;
            "diagonal" does not use it.

    Returns:
        A 0-dim tensor in nats, float64 if either side is and float32 otherwise. Differentiable in
        the query.

    Raises:
        IECLError: the dimensions differ, a batch is not (B, d) floating with B >= 2, or an option
            is out of range.

    Cost: O((B + B') d) diagonal; O((B + B') d^2 + d^3) full, the d^3 without a backward pass.

    >>> anchor = torch.tensor([[-1.0], [1.0]])
    >>> round(gaussian_kl(anchor + 2, anchor).item(), 3)  # 1/2 (2^2 / 2)
    1.0
    """
    _check_covariance(covariance, shrinkage)
    if query.shape[1] != anchor.shape[1]:
        raise IECLError(f"query of {query.shape[1]} dimensions, anchor of {anchor.shape[1]}")
    dtype = torch.promote_types(query.dtype, anchor.dtype)
    query, anchor = query.to(dtype), anchor.detach().to(dtype)
    if covariance == "diagonal":
        return _kl_diagonal(query, anchor)
    return _kl_full(query, anchor, shrinkage)


def _squared_distances(centred: Tensor, block: slice) -> Tensor:
    """Of a block of the rows to all, (b, B), by products of the rows, centred to be rounded less.

    Exactly 0 from a row to itself.
    """
    norms = centred.square().sum(1)
    squared = torch.addmm(norms, centred[block], centred.T, alpha=-2) + norms[block, None]
    return squared.clamp(min=0).masked_fill(_own(centred, block), 0)


def _own(z: Tensor, block: slice) -> Tensor:
    """(b, B): where a row of the block meets itself."""
    index = torch.arange(len(z), device=z.device)
    return index[block, None] == index


@_of_rows
def knn_entropy(z: Tensor, *, num_neighbors: int = 3) -> Tensor:
    """Kozachenko-Leonenko estimate psi(B) - psi(k) + log V_d + d/B sum_i log r_i, in nats.

    r_i is the distance from row i to its k-th nearest neighbour, V_d the volume of the unit ball
    (Kozachenko & Leonenko 1987; in the digamma form of Kraskov et al. 2004, eq. 20). A k above
    B - 1 is taken as B - 1. Equal rows have r = 0 and an entropy of minus infinity: distances are
    held at 1e-6 or more, and a row at that floor gives no gradient.

    Bias: upward in high d, where the density is not flat over r, and hardly less for more rows
    (order B^(-2/d)): -0.01 nats at d = 2, B = 256; 1.3 at d = 16; 33 at d = 128 (29 at B = 2048).

    Rows on the unit sphere fill only d - 1 dimensions, so there the value has no limit in B: it
    falls by log(B)/(d - 1). It still rises and falls with the surface entropy, d/(d - 1) times as
    fast.

    Args:
        z: rows (B, d), B >= 2, any floating dtype and device.
        num_neighbors: k, >= 1. Larger: less variance, more bias.

    Returns:
        A 0-dim tensor in nats, float64 for float64 and float32 otherwise. Differentiable almost
        everywhere (the choice of the neighbour is held fixed).

    Raises:
        IECLError: z is not (B, d) floating with B >= 2, or num_neighbors < 1.

    Cost: O(B^2 d) time, O(B d) memory beyond B = 4096, where pairs are formed in blocks.

    >>> z = torch.tensor([[0.0], [1.0]])  # psi(2) - psi(1) + log 2 + log 1
    >>> round(knn_entropy(z, num_neighbors=1).item(), 4)
    1.6931
    """
    checks.whole("num_neighbors", num_neighbors, 1)
    rows, dim = z.shape
    k = min(num_neighbors, rows - 1)
    # which is nearest, in a tight cluster far from the mean, float32's products cannot tell
    wide = z.detach() if z.device.type == "mps" else z.detach().double()
    centred = wide - wide.mean(0)

    def nearest(block: slice) -> Tensor:
        others = _squared_distances(centred, block).masked_fill(_own(centred, block), math.inf)
        return others.topk(k, largest=False).indices[:, -1]

    with torch.no_grad():
        neighbor = by_row_blocks(nearest, rows, rows)
    # the one distance needed, from the difference itself: the Gram matrix rounds small ones away
    squared = (z - z[neighbor]).square().sum(1).clamp(min=DISTANCE_FLOOR**2)
    counts = torch.tensor([float(rows), float(k)], dtype=torch.float64).digamma()
    log_ball = dim / 2 * math.log(math.pi) - math.lgamma(dim / 2 + 1)
    return (counts[0] - counts[1]).item() + log_ball + dim / 2 * squared.log().mean()


# Debye's polynomials U_1..U_4 of DLMF 10.41.10: divisor, and coefficients of p^k, p^(k+2), ...
_DEBYE = (
    (24, (3, -5)),
    (1152, (81, -462, 385)),
    (414720, (30375, -369603, 765765, -425425)),
    (39813120, (4465125, -94121676, 349922430, -446185740, 185910725)),
)
# From this order on four polynomials give log I to 2e-8; lower orders recur down from it.
_DEBYE_ORDER = 16


def _log_bessel_debye(order: float, kappa: Tensor) -> Tensor:
    """log(kappa^-order I_order(kappa)) by the uniform expansion, DLMF 10.41.3.

    In this scaling the logarithms of kappa cancel, so that kappa = 0 is a point like any other.
    """
    root = torch.sqrt(1 + (kappa / order).square())
    p = 1 / root
    series = torch.zeros_like(p)
    for k, (divisor, coefficients) in enumerate(_DEBYE, start=1):
        polynomial = sum(c * p ** (k + 2 * i) for i, c in enumerate(coefficients))
        series = series + polynomial / (divisor * order**k)
    exponent = order * (root - torch.log1p(root) - math.log(order))
    return exponent - 0.5 * (root.log() + math.log(2 * math.pi * order)) + series.log1p()


def _log_bessel(order: float, kappa: Tensor) -> Tensor:
    """log(kappa^-order I_order(kappa)) for any order >= 0 and kappa >= 0."""
    steps = max(0, math.ceil(_DEBYE_ORDER - order))
    top = order + steps
    value = _log_bessel_debye(top, kappa)
    if not steps:
        return value
    # J_(n-1) = 2 n J_n + kappa^2 J_(n+1) for J_n = kappa^-n I_n: nothing is subtracted
    ratio = (_log_bessel_debye(top + 1, kappa) - value).exp()
    for step in range(steps):
        gain = 2 * (top - step) + kappa.square() * ratio
        value, ratio = value + gain.log(), 1 / gain
    return value


def log_vmf_normalizer(d: int, kappa: Tensor | float) -> Tensor:
    """log C_d(kappa) of the von Mises-Fisher density C_d(kappa) exp(kappa mu^T x) on S^(d-1).

    C_d(kappa) = kappa^(d/2-1) / ((2 pi)^(d/2) I_(d/2-1)(kappa)) (Mardia & Jupp 2000, eq. 9.3.4);
    the density is with respect to the surface measure, so C_d(0) is 1 over the sphere's area. The
    Bessel function is Debye's uniform expansion (DLMF 10.41.3), from order 16 down by recurrence
    (our combination), which neither underflows nor overflows: within 2e-8 nats, and 4e-9 of its
    size, of the exact value for d from 2 to 4096 and kappa from 0 to 1e5.

    Args:
        d: dimension of the space, >= 2.
        kappa: concentration, >= 0; a number, or a tensor of any shape and floating dtype. Worked
            out in float64 (float32 on devices without it).

    Returns:
        A tensor in nats of kappa's shape, device and dtype (float64 for a number), with a gradient
        in kappa: minus the mean resultant length A_d(kappa).

    Raises:
        IECLError: d < 2, or a number kappa that is negative or not finite.

    Cost: O(1) for each element of kappa.

    >>> round(log_vmf_normalizer(3, 2.0).item(), 6)  # kappa / (4 pi sinh kappa)
    -3.126244
    >>> round(log_vmf_normalizer(2, 0.0).exp().item() * 2 * math.pi, 6)
    1.0
    """
    if d < 2:
        raise IECLError(f"d={d}: a sphere needs at least 2 dimensions")
    if not isinstance(kappa, Tensor):
        if not 0 <= kappa < math.inf:
            raise IECLError(f"kappa={kappa}: a finite number of at least 0 is needed")
        kappa = torch.tensor(kappa, dtype=torch.float64)
    working = torch.float32 if kappa.device.type == "mps" else torch.float64
    log_bessel = _log_bessel(d / 2 - 1, kappa.to(working))
    return (-d / 2 * math.log(2 * math.pi) - log_bessel).to(kappa.dtype)


@_of_rows
def vmf_kde_entropy(z: Tensor, *, concentration: float = 10.0) -> Tensor:
    """Leave-one-out kernel estimate of the entropy on the sphere, in nats.

    -1/B sum_i log p_i, p_i = 1/(B-1) sum_(j != i) C_d(kappa) exp(kappa u_i^T u_j), u = z / |z|: the
    resubstitution estimate (Beirlant et al. 1997, sec. 2.2) with a von Mises-Fisher kernel (Hall,
    Watson & Cabrera 1987). With respect to the sphere's surface measure, so its greatest value is
    the log of the area, at the uniform law, and the cross-entropy of the law with itself smoothed:
    never below the entropy in expectation. For the uniform law all the bias is that of few rows
    (0.18 nats at d = 16, B = 32; 0.05 at B = 256; 0.001 at d = 128). For others it grows as the law
    gets narrower than the kernel: for a vMF law of concentration d and the default kernel 0.006
    nats at d = 2, 1.5 at d = 16 (kappa 16) and 27 at d = 128 (kappa 128), B = 256.

    Args:
        z: rows (B, d), B >= 2, d >= 2, any floating dtype and device; normalised inside (rows
            shorter than 1e-6 are divided by 1e-6).
        concentration: the kernel's kappa, > 0.

    Returns:
        A 0-dim tensor in nats, float64 for float64 and float32 otherwise. Differentiable.

    Raises:
        IECLError: z is not (B, d) floating with B >= 2 and d >= 2, or concentration is not
            positive.

    Cost: O(B^2 d) time, O(B d) memory beyond B = 4096, where pairs are formed in blocks.

    >>> z = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> round(vmf_kde_entropy(z, concentration=1e-3).item(), 4)  # a flat kernel: log(2 pi)
    1.8379
    """
    checks.number("concentration", concentration, 0, above=True)
    unit = F.normalize(z, eps=1e-6)

    def log_kernels(block: slice) -> Tensor:
        exponent = concentration * unit[block] @ unit.T
        return exponent.masked_fill(_own(unit, block), -math.inf).logsumexp(1)

    log_mean = by_row_blocks(log_kernels, len(z), len(z)).mean() - math.log(len(z) - 1)
    return -log_vmf_normalizer(z.shape[1], concentration).item() - log_mean


@_of_rows
def renyi_entropy(z: Tensor, *, alpha: float = 2.0, bandwidth: float = math.sqrt(0.5)) -> Tensor:
    """Matrix-based Renyi entropy 1/(1 - alpha) log tr(A^alpha) of the rows, in nats.

    A_ij = exp(-|z_i - z_j|^2 / (2 bandwidth^2)) / B, a Gram matrix of trace 1 (Sanchez Giraldo, Rao
    & Principe 2015, "Measures of entropy from data using infinitely divisible kernels", eq. 7).
    Rows enter as they are. alpha = 1 is the von Neumann limit -tr(A log A).

    alpha = 2 is the default since it needs no eigenvalues (tr A^2 is the squared Frobenius norm):
    O(B^2 d) and a smooth gradient for every batch. With the default bandwidth and unit rows it is
    then minus Wang & Isola's (2020) uniformity at t = 2, pairs (i, i) included. Small alpha weighs
    rare directions more, alpha -> 1 all eigenvalues alike.

    It is not differential entropy: it lies between 0 (equal rows) and log B (rows far apart in
    bandwidths), where its gradient dies. For alpha = 2 its expectation is near -log(1/B + (1 - 1/B)
    E exp(-|z - z'|^2 / bandwidth^2)), so it rises with B; against that its bias is below 0.05 nats
    for every law, d and B of studies/entropy_table.py.

    Args:
        z: rows (B, d), B >= 2, any floating dtype and device.
        alpha: order, > 0.
        bandwidth: the kernel's standard deviation, > 0, in the units of z.

    Returns:
        A 0-dim tensor in nats, float64 for float64 and float32 otherwise. Differentiable; for
        alpha other than 2 eigenvalues within float64's rounding of 0 (B eps of the largest, and of
        the distances 4 eps of the largest squared norm over bandwidth^2) are 0 and give no
        gradient.

    Raises:
        IECLError: z is not (B, d) floating with B >= 2, or an option is not positive.

    Cost: for alpha = 2 O(B^2 d) time and O(B d) memory beyond B = 4096, where pairs are formed in
        blocks; otherwise O(B^2 d + B^3) time and O(B^2) memory, in float64 (of eigenvalues there
        are no blocks).

    >>> z = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [100.0, 100.0]])
    >>> round(renyi_entropy(z).item(), 4)  # log 4
    1.3863
    """
    checks.number("alpha", alpha, 0, above=True)
    checks.number("bandwidth", bandwidth, 0, above=True)
    if alpha == 2:
        centred = z - z.mean(0)

        def squared_kernels(block: slice) -> Tensor:
            return (_squared_distances(centred, block) / -(bandwidth**2)).exp().sum(1)

        return 2 * math.log(len(z)) - by_row_blocks(squared_kernels, len(z), len(z)).sum().log()
    # float32's rounding of an eigenvalue that is 0 is no small thing to the power of a small alpha
    wide = (z.cpu() if z.device.type == "mps" else z).double()
    centred = wide - wide.mean(0)
    distances = _squared_distances(centred, slice(0, len(z)))
    matrix, zero_or_nan = _without_nan((distances / (-2 * bandwidth**2)).exp() / len(z))
    eigenvalues = torch.linalg.eigvalsh(matrix)
    # what the decomposition rounds, and what the distances did before it: those of equal rows are
    # differences of squared norms, exactly 0 on some machines and not on others
    squares = 4 * centred.detach().square().sum(1).amax() / bandwidth**2
    rounding = torch.finfo(matrix.dtype).eps * (len(z) * eigenvalues.detach().amax() + squares)
    present = eigenvalues[eigenvalues > rounding]
    if alpha == 1:
        value = torch.special.entr(present).sum()
    else:
        # in logarithms: a large alpha's powers underflow
        value = (alpha * present.log()).logsumexp(0) / (1 - alpha)
    return (value + zero_or_nan).to(z)


@_of_rows
def effective_rank(z: Tensor) -> Tensor:
    """RankMe: exp of the entropy of the singular values, normalised to sum 1. A number of
    dimensions, 1 to min(B, d).

    Garrido et al. 2023, "RankMe", eq. 1 and 2 (Roy & Vetterli 2007), not centred, as there. For
    monitoring: it follows the rank and is blind to scale.

    Args:
        z: rows (B, d), B >= 2, any floating dtype and device.

    Returns:
        A 0-dim tensor (a count, not nats), float64 for float64 and float32 otherwise.
        Differentiable. 1 for zero rows.

    Raises:
        IECLError: z is not (B, d) floating with B >= 2.

    Cost: O(B d min(B, d)).

    >>> round(effective_rank(torch.eye(5)).item(), 3)
    5.0
    """
    matrix, zero_or_nan = _without_nan(z)
    singular = torch.linalg.svdvals(matrix) + zero_or_nan
    total = singular.sum()
    # zero rows: no share, and a gradient that half precision can hold
    share = singular / torch.where(total > 0, total, 1) + RANK_EPS
    return torch.special.entr(share).sum().exp()


ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "coding_rate": coding_rate,
    "gaussian": gaussian_entropy,
    "knn": knn_entropy,
    "vmf_kde": vmf_kde_entropy,
    "renyi": renyi_entropy,
}


def estimate(name: str, z: Tensor, **options: object) -> Tensor:
    """The entropy of the rows by the estimator that a config names.

    Args:
        name: a key of `ESTIMATORS`.
        z: rows (B, d), B >= 2, any floating dtype and device.
        **options: the estimator's own keyword arguments.

    Returns:
        A 0-dim tensor in nats.

    Raises:
        IECLError: the name or an option is unknown (the nearest valid one is named), or the
            estimator refuses the rows or an option's value.

    >>> round(estimate("coding_rate", torch.eye(4), eps=0.5).item(), 4)
    3.2189
    >>> estimate("coding_rates", torch.eye(4))
    Traceback (most recent call last):
    iecl_solo.errors.IECLError: unknown estimator 'coding_rates': did you mean 'coding_rate'? \
Allowed: coding_rate, gaussian, knn, renyi, vmf_kde
    """
    if name not in ESTIMATORS:
        raise unknown_name("estimator", name, ESTIMATORS)
    allowed = [p for p in inspect.signature(ESTIMATORS[name]).parameters if p != "z"]
    for option in options:
        if option not in allowed:
            raise unknown_name(f"option of {name}", option, allowed)
    return ESTIMATORS[name](z, **options)
