"""MINC: the spectral contrastive loss against a summary of all points instead of each of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from iecl_solo import checks
from iecl_solo.distributed import mean_over_processes
from iecl_solo.errors import IECLError
from iecl_solo.losses.features import check_mu, checked_pair, scale_features
from iecl_solo.precision import full_precision, in_full_precision


def cosine_decay(base: float, final: float, progress: float) -> float:
    """A decay that goes from ``base`` to ``final`` by half a cosine (ours: the paper is silent).

    The shape of BYOL's schedule for the target network. Early the features move fast, and an old
    second moment is of other features; late they stand, and a longer average has less variance.

    >>> [round(cosine_decay(0.9, 0.99, t), 3) for t in (0.0, 0.5, 1.0)]
    [0.9, 0.945, 0.99]
    """
    return final - (final - base) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


class MINCLoss(nn.Module):
    """L_MINC = E[-2 phi(x)^T sg(phi_xi(x')) + phi(x)^T sg(Lambda) phi(x)], sg: no gradient.

    Guo, Avila Pires, Khetarpal, Schuurmans & Dai 2025, "Representation Learning via Non-Contrastive
    Mutual Information", arXiv 2504.16667. phi_xi is a moving average of the network and Lambda one
    of the second moment E[phi phi^T] of its features.

    With both views on both sides (``loss(cat(z1, z2), cat(z2, z1))``), ``base_decay`` 0 and phi_xi
    = phi the gradient is half of `spectral_contrastive_loss`'s over all pairs, the diagonal
    included: exactly, for any B and d. The value is another one: it is no longer minimised.

    The paper is silent on these; ours are:

    - Lambda is taken of the queries, not of the targets. Under the fast dynamics phi =
      Lambda^-1 phi_xi a common scale s then goes to s^(1/3) and settles; with the targets' Lambda
      it would go to 1/s and back.
    - This batch is in Lambda before Lambda is used, so that decay 0 is the batch's own moment.
    - Lambda begins at 0 and is divided by the weight it has gathered (Adam's bias correction,
      exact for a decay that changes), so that the first step sees the first batch's own moment.
    - The decay goes from ``base_decay`` to ``final_decay`` by `cosine_decay`.
    - ``mu``, as in the spectral contrastive loss; features are otherwise not scaled.

    Args:
        dim: d.
        base_decay: of Lambda at the start, 0 (each batch's own second moment) to below 1.
        final_decay: of Lambda at the end; None for ``base_decay`` throughout.
        mu: rows longer than sqrt(mu) are drawn back to that length; inf leaves them as they are.
        gather_distributed: average the batch's second moment over all processes, a (d, d)
            exchange. The gradient under DistributedDataParallel is then that of one process that
            holds all rows.

    Attributes:
        moving_moment: (d, d) buffer, the moving average before its bias correction.
        moving_weight: 0-dim buffer, the weight gathered in it: 1 minus the product of the decays.

    Both are in the state dict, in float32 whatever autocast says (``.double()`` for float64).

    Raises:
        IECLError: dim < 1, or an option is out of range.

    >>> loss = MINCLoss(2, base_decay=0.9)
    >>> z = torch.eye(2)
    >>> loss(z, z).item()  # -2 + 1/2: Lambda is I/2
    -1.5
    >>> loss.second_moment
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """

    moving_moment: Tensor
    moving_weight: Tensor

    def __init__(
        self,
        dim: int,
        *,
        base_decay: float = 0.9,
        final_decay: float | None = None,
        mu: float = math.inf,
        gather_distributed: bool = True,
    ) -> None:
        super().__init__()
        checks.whole("dim", dim, 1)
        final_decay = base_decay if final_decay is None else final_decay
        for name, decay in (("base_decay", base_decay), ("final_decay", final_decay)):
            if not 0 <= decay < 1:
                raise checks.refusal(name, decay, "a number from 0 to below 1")
        check_mu(mu)
        self.base_decay, self.final_decay = base_decay, final_decay
        self.mu, self.gather_distributed = mu, gather_distributed
        self.register_buffer("moving_moment", torch.zeros(dim, dim))
        self.register_buffer("moving_weight", torch.zeros(()))

    @property
    def second_moment(self) -> Tensor:
        """Lambda, (d, d), bias-corrected; 0 before the first batch."""
        return self.moving_moment / self.moving_weight.clamp(
            min=torch.finfo(self.moving_weight.dtype).tiny
        )

    @torch.no_grad()
    def _update(self, query: Tensor, progress: float) -> None:
        moment = query.T @ query / len(query)
        if self.gather_distributed:
            moment = mean_over_processes(moment)
        decay = cosine_decay(self.base_decay, self.final_decay, progress)
        # one overflow that a gradient scaler skips must not stay in the average for good
        weight = (1 - decay) * moment.isfinite().all().to(self.moving_weight.dtype)
        self.moving_moment.lerp_(moment.nan_to_num(0, 0, 0).to(self.moving_moment.dtype), weight)
        self.moving_weight.lerp_(torch.ones_like(self.moving_weight), weight)

    def forward(self, query: Tensor, target: Tensor, progress: float = 0.0) -> Tensor:
        """The loss of B pairs; in training mode Lambda takes the queries in first.

        Args:
            query: phi(x), features (B, d), any floating dtype and device.
            target: phi_xi(x'), features (B, d) of the same images; it is detached here.
            progress: how much of the training is done, 0 to 1, for the decay's schedule.

        Returns:
            A 0-dim tensor, float64 for float64 and float32 otherwise. Differentiable in the query.

        Raises:
            IECLError: the features are not (B, d) floating, of one shape and of this d.

        Cost: O(B d^2) time, O(B d + d^2) memory.
        """
        query, target = checked_pair(query, target)
        if query.shape[1] != len(self.moving_moment):
            raise IECLError(
                f"features of {query.shape[1]} dimensions: {len(self.moving_moment)} are needed"
            )
        query, target = scale_features(query, self.mu), scale_features(target.detach(), self.mu)
        if self.training:
            with full_precision(query.device):
                self._update(query.detach(), progress)
        moment = self.second_moment.to(query.dtype)

        def loss(query: Tensor) -> Tensor:
            attraction = (query * target).sum(1).mean()
            return (query @ moment * query).sum(1).mean() - 2 * attraction

        return in_full_precision(loss, query)
