"""The method ``minc``: MINC on the host's embeddings and its momentum network's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from iecl_solo.losses.minc import MINCLoss
from iecl_solo.methods.protocol import Method


@dataclass
class MINCConfig:
    """``method_kwargs`` of minc; all but the widths are MINCLoss's.

    Attributes:
        proj_hidden_dim: width of the projector.
        proj_output_dim: d.
        base_decay: of Lambda at the start; 0 is each batch's own second moment.
        final_decay: of Lambda at the end.
        mu: embeddings longer than sqrt(mu) are drawn back to that length; inf leaves them.
    """

    proj_hidden_dim: int = 2048
    proj_output_dim: int = 256
    base_decay: float = 0.9
    final_decay: float = 0.99
    mu: float = 3.0


class MINC(Method):
    """Guo et al. 2025: each crop against Lambda, and against the momentum network's embedding of
    every other large crop.

    >>> z = torch.eye(4)
    >>> MINC(MINCConfig(proj_output_dim=4))([z, z], [], [z, z], 0.0).item()  # -2 + 1/4
    -1.75
    """

    name = "minc"
    momentum = True
    Config = MINCConfig

    def __init__(self, config: MINCConfig) -> None:
        super().__init__(config)
        self.loss = MINCLoss(
            config.proj_output_dim,
            base_decay=config.base_decay,
            final_decay=config.final_decay,
            mu=config.mu,
        )

    def forward(
        self, large: list[Tensor], small: list[Tensor], momentum: list[Tensor], progress: float
    ) -> Tensor:
        pairs = [
            (query, target)
            for t, target in enumerate(momentum)
            for q, query in enumerate([*large, *small])
            if q != t
        ]
        queries, targets = zip(*pairs, strict=True)
        return self.loss(torch.cat(queries), torch.cat(targets), progress)
