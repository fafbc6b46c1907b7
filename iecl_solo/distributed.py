"""The processes of a run, and what they gather from each other; alone there is one, of rank 0."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """How many processes there are.

    >>> world_size()
    1
    """
    return dist.get_world_size() if _grouped() else 1


def rank() -> int:
    """The number of this process among them, from 0.

    >>> rank()
    0
    """
    return dist.get_rank() if _grouped() else 0


def all_gather_batch(z: Tensor) -> Tensor:
    """The rows of all processes (W * B, d), in the order of rank, with gradients; alone, z itself.

    An entropy of W * B rows is not the mean of W entropies of B rows, so it has to be taken of the
    gathered batch. Every process then computes the same loss L, and the backward pass of the
    gathering sums the W equal gradients: z of each process gets W dL/dz. DistributedDataParallel
    averages the parameters' gradients over the W processes, and the two factors cancel: the
    gradient is exactly that of one process that holds all W * B rows.

    Args:
        z: this process's rows (B, d), the same shape in every process.

    Returns:
        The rows (W * B, d), dtype and device of z.

    >>> all_gather_batch(torch.eye(3)).shape
    torch.Size([3, 3])
    """
    if world_size() == 1:
        return z
    from torch.distributed.nn.functional import all_gather  # absent in builds without distributed

    return torch.cat(all_gather(z))


def sum_over_processes(*parts: Tensor) -> Iterable[Tensor]:
    """Each part summed over all processes, with gradients; alone, as it is.

    Args:
        *parts: of one dtype and device, of the same shapes in every process.

    >>> list(sum_over_processes(torch.ones(2)))
    [tensor([1., 1.])]
    """
    if world_size() == 1:
        return parts
    from torch.distributed.nn.functional import all_reduce  # absent without distributed

    joined = all_reduce(torch.cat([part.flatten() for part in parts]))
    pieces = joined.split([part.numel() for part in parts])
    return [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]


def mean_over_processes(statistic: Tensor) -> Tensor:
    """The mean of a statistic of equal batches over all processes, without gradient.

    >>> mean_over_processes(torch.ones(2))
    tensor([1., 1.])
    """
    statistic = statistic.detach()
    if world_size() > 1:
        statistic = statistic.clone()
        dist.all_reduce(statistic)
        statistic /= world_size()
    return statistic
