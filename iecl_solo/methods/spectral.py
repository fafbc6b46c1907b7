"""The method ``spectral``: the spectral contrastive loss on the host's embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, product

import torch
from torch import Tensor

from iecl_solo.losses.features import check_mu
from iecl_solo.losses.spectral import spectral_contrastive_loss
from iecl_solo.methods.protocol import Method


@dataclass
class SpectralConfig:
    """``method_kwargs`` of spectral.

    Attributes:
        proj_hidden_dim: width of the projector.
        proj_output_dim: d.
        mu: embeddings longer than sqrt(mu) are drawn back to that length; inf leaves them.
    """

    proj_hidden_dim: int = 2048
    proj_output_dim: int = 256
    mu: float = 3.0

    def __post_init__(self) -> None:
        check_mu(self.mu)


class Spectral(Method):
    """HaoChen et al. 2021: pairs across two crops, those of one image left out.

    The mean over every two crops of which one is large.

    >>> z = torch.eye(4)
    >>> Spectral(SpectralConfig())([z, z], [], [], 0.0).item()
    -2.0
    """

    name = "spectral"
    Config = SpectralConfig

    def __init__(self, config: SpectralConfig) -> None:
        super().__init__(config)
        self.mu = config.mu

    def forward(
        self, large: list[Tensor], small: list[Tensor], momentum: list[Tensor], progress: float
    ) -> Tensor:
        pairs = [*combinations(large, 2), *product(large, small)]
        losses = [spectral_contrastive_loss(z1, z2, mu=self.mu) for z1, z2 in pairs]
        return torch.stack(losses).mean()
