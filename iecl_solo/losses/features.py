"""What the losses ask of a batch of features, and how they scale it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from iecl_solo import checks
from iecl_solo.entropy import checked_rows
from iecl_solo.errors import IECLError


def checked_pair(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides of B pairs, row by row, in one dtype: the wider of the two, float32 at least.

    Raises:
        IECLError: a side is not (B, d) floating, or the shapes differ.

    >>> checked_pair(torch.ones(2, 3), torch.ones(3, 3))
    Traceback (most recent call last):
    iecl_solo.errors.IECLError: features of shapes (2, 3) and (3, 3): pairs need one shape
    """
    if z1.shape != z2.shape:
        raise IECLError(
            f"features of shapes {tuple(z1.shape)} and {tuple(z2.shape)}: pairs need one shape"
        )
    z1, z2 = checked_rows(z1, "features"), checked_rows(z2, "features")
    dtype = torch.promote_types(z1.dtype, z2.dtype)
    return z1.to(dtype), z2.to(dtype)


def check_mu(mu: float) -> None:
    """Raise unless mu is positive; infinity is."""
    checks.number("mu", mu, 0, above=True, infinite=True)


def scale_features(z: Tensor, mu: float) -> Tensor:
    """Draw every row that is longer than sqrt(mu) back to that length.

    A projection onto the ball and not onto the sphere: the loss itself decides how long a row is
    (its best features have E|phi|^2 = the sum of the d largest eigenvalues of the augmentation
    kernel, with another length for every row), and the ball only bounds what a fourth power would
    make of a row gone astray.

    Args:
        z: rows (B, d), any floating dtype and device.
        mu: the squared radius, > 0; inf leaves the rows as they are.

    Returns:
        Rows (B, d), dtype and device of z. Differentiable.

    >>> scale_features(torch.tensor([[3.0, 4.0], [0.5, 0.0]]), mu=4.0)
    tensor([[1.2000, 1.6000],
            [0.5000, 0.0000]])
    """
    if math.isinf(mu):
        return z
    norms = z.norm(dim=1, keepdim=True)
    radius = norms.new_tensor(math.sqrt(mu))  # of z's dtype, so that a row inside stays what it is
    return z * (radius / norms.clamp(min=radius))
