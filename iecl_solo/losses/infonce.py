"""InfoNCE over many embeddings: the pairs are formed a block at a time, and never all in memory."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from iecl_solo import checks
from iecl_solo.distributed import all_gather_batch, rank
from iecl_solo.entropy import by_row_blocks, checked_rows
from iecl_solo.errors import IECLError, unknown_name
from iecl_solo.precision import in_full_precision

POSITIVES = ("joint", "each")


def info_nce(
    z: Tensor,
    indexes: Tensor,
    *,
    temperature: float = 0.1,
    positives: str = "joint",
    gather_distributed: bool = True,
) -> Tensor:
    """InfoNCE, or NT-Xent, of the embeddings of all views: a mean over rows, in nats.

    For a row i and s_ij = u_i^T u_j / temperature, u = z / |z|, with P(i) the other rows of its
    image (van den Oord et al. 2018; Chen et al. 2020, "SimCLR", eq. 1):

    - "joint": -log(sum_(p in P(i)) exp s_ip / sum_(j != i) exp s_ij), what solo-learn's GitHub main
      computes (L_in of Khosla et al. 2020, eq. 3, up to a constant);
    - "each": the mean over p in P(i) of -log(exp s_ip / sum_(j != i) exp s_ij), what solo-learn
      1.0.2 computes for two views (L_out of Khosla et al. 2020, eq. 2).

    With one positive a row, which two views without duplicates have, both are NT-Xent. Value and
    gradient are those of the whole matrix of pairs, up to the order of summation.

    Args:
        z: embeddings (N, d) of all views, N = 2 B for two of them, any floating dtype and device;
            normalised inside.
        indexes: (N,) integers, equal for the rows of one image, or of one class: the positives of a
            row are all others of its index.
        temperature: > 0.
        positives: "joint" or "each".
        gather_distributed: compare with the rows of all processes, with gradients; as many in each.
            The mean is over this process's rows, so that the gradient under DistributedDataParallel
            is that of one process that holds all rows.

    Returns:
        A 0-dim tensor, float64 for float64 and float32 otherwise, whatever the autocast. A row
        without a positive makes it inf ("joint") or NaN ("each", and if it is the only row), as in
        solo-learn. Differentiable once.

    Raises:
        IECLError: the shapes do not fit, z is not floating, indexes is, or an option is out of
            range.

    Cost: O(N M d) time, M the rows of all processes, plus half of it again in the backward pass
        where N M is above 2^24; memory O(M d) beyond that.

    >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> round(info_nce(z, torch.tensor([0, 1, 0, 1]), temperature=1.0).item(), 4)  # log(1 + 2 / e)
    0.5514
    """
    z = checked_rows(z, "features")
    if indexes.shape != z.shape[:1] or indexes.is_floating_point():
        raise IECLError(
            f"indexes of shape {tuple(indexes.shape)} and dtype {indexes.dtype}: "
            f"({len(z)},) integers are needed"
        )
    checks.number("temperature", temperature, 0, above=True)
    if positives not in POSITIVES:
        raise unknown_name("positives", positives, POSITIVES)
    indexes = indexes.detach()
    others, other_indexes, first = z, indexes, 0
    if gather_distributed:
        others, other_indexes = all_gather_batch(z), all_gather_batch(indexes)
        first = rank() * len(z)
    numbers = torch.arange(len(others), device=z.device)

    def loss(z: Tensor, others: Tensor) -> Tensor:
        rows, columns = F.normalize(z, dim=-1), F.normalize(others, dim=-1)

        def of_block(block: slice) -> Tensor:
            own = numbers[first : first + len(rows)][block, None] == numbers
            positive = (indexes[block, None] == other_indexes) & ~own
            similarity = rows[block] @ columns.T / temperature
            log_sum = similarity.masked_fill(own, -math.inf).logsumexp(1)
            if positives == "joint":
                return log_sum - similarity.masked_fill(~positive, -math.inf).logsumexp(1)
            return log_sum - similarity.masked_fill(~positive, 0).sum(1) / positive.sum(1)

        return by_row_blocks(of_block, len(rows), len(columns)).mean()

    return in_full_precision(loss, z, others)
