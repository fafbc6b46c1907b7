"""The spectral contrastive loss, MINC's baseline."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from iecl_solo.distributed import all_gather_batch
from iecl_solo.errors import IECLError, unknown_name
from iecl_solo.losses.features import check_mu, checked_pair, scale_features
from iecl_solo.precision import in_full_precision

PAIRS = ("cross", "all")


def _sum_of_squares(rows: Tensor, columns: Tensor) -> Tensor:
    """Sum of (r^T c)^2 over all rows r and columns c, by what is smaller: pairs or moments."""
    # B^2 d multiplications against 2 B d^2
    if len(rows) < 2 * rows.shape[1]:
        return (rows @ columns.T).square().sum()
    moment = rows.T @ rows
    return (moment * (moment if columns is rows else columns.T @ columns)).sum()


def _same_image(z1: Tensor, z2: Tensor) -> Tensor:
    """Sum over i of (z1_i^T z2_i)^2."""
    return (z1 * z2).sum(1).square().sum()


def _independent_pairs(z1: Tensor, z2: Tensor, pairs: str, include_diagonal: bool) -> Tensor:
    """The mean of (phi(x)^T phi(y))^2 over the pairs that stand for independent x and y."""
    num_images = len(z1)
    if pairs == "cross":
        total, views = _sum_of_squares(z1, z2), 1
        same = _same_image(z1, z2)
    else:
        both = torch.cat([z1, z2])
        total, views = _sum_of_squares(both, both), 4
        same = _same_image(z1, z1) + _same_image(z2, z2) + 2 * _same_image(z1, z2)
    if include_diagonal:
        return total / (views * num_images**2)
    return (total - same) / (views * num_images * (num_images - 1))


def spectral_contrastive_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    mu: float = math.inf,
    pairs: str = "cross",
    include_diagonal: bool = False,
    gather_distributed: bool = True,
) -> Tensor:
    """L_SC = -2 E[phi(x)^T phi(x')] + E[(phi(x)^T phi(y))^2], y independent of x (no unit).

    HaoChen, Wei, Gaidon & Ma 2021, "Provable Guarantees for Self-Supervised Deep Learning with
    Spectral Contrastive Loss", eq. 6. Up to a constant it is the squared distance of phi phi^T from
    the normalised augmentation kernel, so its minimisers span that kernel's top d eigenvectors.

    A batch has no independent pairs but those of two images. ``pairs`` says which embeddings are
    compared, ``include_diagonal`` whether those of one image are too:

    - "cross": view 1 of image i with view 2 of image j, the B (B - 1) pairs of HaoChen et al.
    - "all": both views with both views, 4 B (B - 1) pairs: also unbiased, with less variance.
    - "all" with the diagonal: all (2 B)^2 pairs, a row with itself and with its other view
      included. Biased by O(1/B), and the pairs of which MINC's gradient is exactly half.

    The sum over all pairs is also the trace of a product of two (d, d) second moments, of which the
    pairs of one image are then taken off: by that from B = 2 d on, by the pairs below. Value and
    gradient are the same.

    Args:
        z1: features of the first views (B, d), B >= 2, any floating dtype and device; row i of both
            is the same image.
        z2: features of the second views (B, d).
        mu: rows longer than sqrt(mu) are drawn back to that length, as HaoChen et al. do; inf
            leaves them as they are.
        pairs: "cross" or "all".
        include_diagonal: whether pairs of one image count among the independent ones.
        gather_distributed: take the pairs over all processes' rows, with gradients. The gradient
            under DistributedDataParallel is then that of one process that holds all rows.

    Returns:
        A 0-dim tensor, float64 for float64 and float32 otherwise. Differentiable in both views.

    Raises:
        IECLError: the views are not (B, d) floating and of one shape, B < 2 without the diagonal,
            or an option is out of range.

    Cost: O(B d min(B, d)) time, O(B d + min(B, d)^2) memory, B over all processes.

    >>> z = torch.eye(2)  # -2 + (0 + 0) / 2
    >>> spectral_contrastive_loss(z, z).item()
    -2.0
    >>> spectral_contrastive_loss(z, z, include_diagonal=True).item()  # -2 + (1 + 1) / 4
    -1.5
    """
    check_mu(mu)
    if pairs not in PAIRS:
        raise unknown_name("pairs", pairs, PAIRS)
    z1, z2 = checked_pair(z1, z2)
    if gather_distributed:
        z1, z2 = all_gather_batch(z1), all_gather_batch(z2)
    if len(z1) < 2 and not include_diagonal:
        raise IECLError(f"features of {len(z1)} image: at least 2 make an independent pair")

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        z1, z2 = scale_features(z1, mu), scale_features(z2, mu)
        positive = (z1 * z2).sum(1).mean()
        return _independent_pairs(z1, z2, pairs, include_diagonal) - 2 * positive

    return in_full_precision(loss, z1, z2)
