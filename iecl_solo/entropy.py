"""Entropies of a batch of embeddings in nats, each differentiable, and the KL between two batches.

Every function takes rows ``(B, d)`` and returns a 0-dim tensor on the rows' device. float32 and
float64 are computed as they are; half and bfloat16 are computed in float32, and autocast is off
inside, since a log-determinant in half precision is noise.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

from iecl_solo.errors import IECLError, unknown_name

__all__ = [
    "ESTIMATORS",
    "coding_rate",
    "estimate",
    "gaussian_entropy",
    "gaussian_kl",
]

# A standard deviation of 1e-5: far below any spread worth telling from collapse on the unit sphere
# (where it is 1/sqrt(d)), far above float32's rounding of identical rows.
VARIANCE_FLOOR = 1e-10
# Of the mean variance: bounds the ratio a dead anchor dimension can reach in a diagonal KL.
RELATIVE_VARIANCE_FLOOR = 1e-4
COVARIANCES = ("diagonal", "full")

P = ParamSpec("P")


def _checked_rows(z: Tensor) -> Tensor:
    if z.ndim != 2:
        raise IECLError(f"embeddings of shape {tuple(z.shape)}: (B, d) is needed")
    if not z.is_floating_point():
        raise IECLError(f"embeddings of dtype {z.dtype}: a floating dtype is needed")
    if z.shape[0] < 2 or z.shape[1] < 1:
        raise IECLError(f"embeddings of shape {tuple(z.shape)}: at least 2 rows of 1 are needed")
    return z if z.dtype == torch.float64 else z.float()


def _in_full_precision(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Check every tensor argument, lift it to float32 at least, and switch autocast off inside."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **options: P.kwargs) -> Tensor:
        rows = [_checked_rows(a) if isinstance(a, Tensor) else a for a in args]
        named = {k: _checked_rows(v) if isinstance(v, Tensor) else v for k, v in options.items()}
        devices = [a.device.type for a in (*rows, *named.values()) if isinstance(a, Tensor)]
        if not devices:
            raise IECLError(f"{function.__name__} of {type(args[0]).__name__}: a tensor is needed")
        with torch.autocast(devices[0], enabled=False):
            return function(*rows, **named)  # type: ignore[arg-type]

    return wrapped


def _check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    if not low <= value <= high:
        allowed = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
        raise IECLError(f"{name}={value}: {allowed} is allowed")


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise IECLError(f"{name}={value}: a positive, finite number is needed")


def _logdet_cholesky(matrix: Tensor) -> Tensor:
    # cholesky_ex: NaN in gives NaN out, which a gradient scaler can skip, where cholesky would end
    # the run; and no device synchronisation
    factor, _ = torch.linalg.cholesky_ex(matrix)
    return 2 * factor.diagonal().log().sum()


def _logdet_identity_plus(rows: Tensor, scale: Tensor | float) -> Tensor:
    """log det(I + scale * rows^T rows) by the smaller Gram matrix: O(B d min(B, d))."""
    gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return _logdet_cholesky(eye + scale * gram)


def _check_covariance(covariance: str, shrinkage: float) -> None:
    if covariance not in COVARIANCES:
        raise unknown_name("covariance", covariance, COVARIANCES)
    _check_range("shrinkage", shrinkage, 0, 1)


def _shrunk_isotropic(centred: Tensor, shrinkage: float) -> Tensor:
    """The multiple s of the identity in S = s I + (1 - a)/(B - 1) X^T X."""
    rows, dim = centred.shape
    mean_variance = centred.square().sum() / ((rows - 1) * dim)
    # with no shrinkage the rank deficit of B <= d would sit below the rounding of the Gram matrix
    at_least = 4 * dim * torch.finfo(centred.dtype).eps
    return max(shrinkage, at_least) * mean_variance + VARIANCE_FLOOR


def _logdet_shrunk(centred: Tensor, shrinkage: float) -> Tensor:
    rows, dim = centred.shape
    isotropic = _shrunk_isotropic(centred, shrinkage)
    scale = (1 - shrinkage) / ((rows - 1) * isotropic)
    return dim * isotropic.log() + _logdet_identity_plus(centred, scale)


@_in_full_precision
def gaussian_entropy(z: Tensor, *, covariance: str = "full", shrinkage: float = 0.1) -> Tensor:
    """Entropy of the Gaussian fitted to the rows: 1/2 log det(2 pi e S), in nats.

    S is the sample covariance (divisor B - 1) drawn towards the sphere of the same trace,
    ``(1 - a) S + a tr(S)/d I`` with a the shrinkage (the form of Ledoit & Wolf 2004, with a fixed
    weight: ours), plus 1e-10 so that a collapsed batch has a finite value. It is the entropy of z
    only if z is Gaussian, and an upper bound of it otherwise (up to the estimate of S).

    Bias: shrinkage raises the value (S and its shrunk form have the same trace, and log det is
    concave), the more the less isotropic S is; with ``shrinkage=0`` and B > d the sample
    covariance lowers it by about d (d + 1) / (4 B), and with B <= d it has no meaning.

    Args:
        z: rows (B, d), B >= 2, any floating dtype and device.
        covariance: "full", or "diagonal" for the sum over dimensions.
        shrinkage: a, 0 to 1. At 0 a relative floor of 4 d eps(dtype) remains.

    Returns:
        A 0-dim tensor in nats, float64 for float64 and float32 otherwise. Differentiable.

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
        logdet = _logdet_shrunk(centred, shrinkage)
    else:
        variance = centred.square().sum(0) / (z.shape[0] - 1)
        shrunk = (1 - shrinkage) * variance + _shrunk_isotropic(centred, shrinkage)
        logdet = shrunk.log().sum()
    return 0.5 * (dim * math.log(2 * math.pi * math.e) + logdet)


@_in_full_precision
def coding_rate(z: Tensor, *, eps: float = 0.5) -> Tensor:
    """Coding rate 1/2 log det(I + d/(B eps^2) Z^T Z) of the rows, in nats.

    The number of nats to code a row of z up to a mean squared error eps^2 (Yu et al. 2020,
    "Maximal Coding Rate Reduction", eq. 1; Ma et al. 2007), not centred, as there. The default
    estimator: finite and smooth for every batch, B < d and collapse included.

    It is not differential entropy: it has a floor of 0 and counts scale against eps. For centred
    Gaussian rows and eps -> 0 it tends to the entropy minus d/2 log(2 pi e eps^2 / d). Its own
    bias, against d/(eps^2) E[z z^T] in place of the batch mean, is downward (log det is concave).

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
    _check_positive("eps", eps)
    rows, dim = z.shape
    scale = dim / (rows * eps**2)
    # rows so long that 1 is lost in the rounding of the Gram matrix: there the ridge grows with it
    energy = scale * z.detach().square().sum()
    ridge = (4 * torch.finfo(z.dtype).eps * energy).clamp(min=1)
    return 0.5 * (min(rows, dim) * ridge.log() + _logdet_identity_plus(z, scale / ridge))


def _kl_diagonal(query: Tensor, anchor: Tensor) -> Tensor:
    def moments(z: Tensor) -> tuple[Tensor, Tensor]:
        variance = z.var(0)
        return z.mean(0), variance + RELATIVE_VARIANCE_FLOOR * variance.mean() + VARIANCE_FLOOR

    (mean_q, var_q), (mean_a, var_a) = moments(query), moments(anchor)
    # two logs: that of the ratio is -inf in float32 for a collapsed query
    log_ratio = var_q.log() - var_a.log()
    shift = (mean_q - mean_a).square()
    return 0.5 * ((var_q - var_a + shift) / var_a - log_ratio).sum()


def _kl_full(query: Tensor, anchor: Tensor, shrinkage: float) -> Tensor:
    dim = query.shape[1]
    mean_q, mean_a = query.mean(0), anchor.mean(0)
    centred_q, centred_a = query - mean_q, anchor - mean_a
    isotropic_q = _shrunk_isotropic(centred_q, shrinkage)
    isotropic_a = _shrunk_isotropic(centred_a, shrinkage)
    eye = torch.eye(dim, dtype=query.dtype, device=query.device)
    weight_q = (1 - shrinkage) / (query.shape[0] - 1)
    weight_a = (1 - shrinkage) / (anchor.shape[0] - 1)
    # of the anchor only, hence without gradient: the one d^3 step costs no backward pass
    factor, _ = torch.linalg.cholesky_ex(isotropic_a * eye + weight_a * centred_a.T @ centred_a)
    trace_inverse = torch.linalg.solve_triangular(factor, eye, upper=False).square().sum()
    columns = torch.cat([centred_q * math.sqrt(weight_q), (mean_q - mean_a)[None]]).T
    whitened = torch.linalg.solve_triangular(factor, columns, upper=False).square().sum()
    logdet_a = 2 * factor.diagonal().log().sum()
    logdet_q = _logdet_shrunk(centred_q, shrinkage)
    return 0.5 * (isotropic_q * trace_inverse + whitened - dim + logdet_a - logdet_q)


@_in_full_precision
def gaussian_kl(
    query: Tensor, anchor: Tensor, *, covariance: str = "diagonal", shrinkage: float = 0.1
) -> Tensor:
    """KL(N(mu', S') || N(mu, S)) in nats, query = (mu', S'), anchor = (mu, S), each fitted to rows.

    1/2 [tr(S^-1 S') + (mu - mu')^T S^-1 (mu - mu') - d + log det S - log det S'], IE-CL's
    KL(p_phi || q). **The anchor carries no gradient**: it is detached here (ours).

    "diagonal" compares the variances, each with 1e-4 of its batch's mean variance added, so that a
    dimension that is constant in the anchor alone costs much and not infinitely much. "full"
    shrinks both covariances as `gaussian_entropy` does. 0 for equal batches, never negative up to
    rounding (about d eps(dtype) for "full"). Bias: for batches from one and the same Gaussian the
    diagonal value is about d/B for B = B' >> 1, and not 0, since both sides are fitted.

    Args:
        query: rows (B', d), B' >= 2, any floating dtype and device.
        anchor: rows (B, d), B >= 2; B may differ from B'.
        covariance: "diagonal" or "full".
        shrinkage: of "full", 0 to 1; "diagonal" does not use it.

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


ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "coding_rate": coding_rate,
    "gaussian": gaussian_entropy,
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
Allowed: coding_rate, gaussian
    """
    if name not in ESTIMATORS:
        raise unknown_name("estimator", name, ESTIMATORS)
    allowed = [p for p in inspect.signature(ESTIMATORS[name]).parameters if p != "z"]
    for option in options:
        if option not in allowed:
            raise unknown_name(f"option of {name}", option, allowed)
    return ESTIMATORS[name](z, **options)
