"""Linear probes on features computed beforehand: a grid of learning rates as one batched model.

R linear layers see the same batches in the same order, from the same initial weights, so their
forward and backward passes are two matrix products together. Each one is what it would be alone:
softmax regression by SGD with momentum and step decays, as the host's ``LinearModel`` trains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iecl_solo.errors import IECLError

#: Rows of features whose logits are there at once when a probe is judged.
ROWS = 8192

#: The host's momentum, where its configuration does not give another one.
MOMENTUM = 0.9


@dataclass(frozen=True)
class Probes:
    """R linear layers.

    Attributes:
        rates: (R,) their learning rates.
        weight: (R, C, d).
        bias: (R, C).
    """

    rates: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """(B, d) to (B, R, C)."""
        out = F.linear(x, self.weight.flatten(0, 1), self.bias.flatten())
        return out.unflatten(1, self.bias.shape)

    @torch.no_grad()
    def accuracies(self, features: Tensor, labels: Tensor) -> list[tuple[float, float]]:
        """Top-1 and top-5 accuracy in per cent of each; NaN for one that diverged.

        Args:
            features: (N, d).
            labels: (N,).
        """
        device, top = self.weight.device, min(5, self.bias.shape[1])
        right = torch.zeros(len(self.rates), 2, device=device)
        for x, y in zip(features.split(ROWS), labels.split(ROWS), strict=True):
            ranked = self.logits(x.to(device)).topk(top, dim=-1).indices
            hits = ranked == y.to(device)[:, None, None]
            right += torch.stack([hits[..., 0], hits.any(-1)], -1).sum(0)
        finite = (self.weight.isfinite().flatten(1).all(1) & self.bias.isfinite().all(1))[:, None]
        shares = torch.where(finite, 100 * right / len(labels), torch.nan)
        return [(float(top1), float(top5)) for top1, top5 in shares.tolist()]


def epoch_order(rows: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch shows the rows; it depends on the seed and the epoch alone."""
    generator = torch.Generator().manual_seed((seed + 1_000_003 * epoch) % 2**63)
    return torch.randperm(rows, generator=generator)


def initial_layer(dim: int, classes: int, seed: int) -> nn.Linear:
    """The layer that all probes begin from, initialised as ``nn.Linear`` is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(dim, classes)


@torch.no_grad()
def fit_probes(
    features: Tensor,
    labels: Tensor,
    rates: Sequence[float],
    *,
    classes: int,
    max_epochs: int,
    decay_epochs: Sequence[int] = (),
    batch_size: int = 256,
    momentum: float = MOMENTUM,
    weight_decay: float = 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Probes:
    """Train one linear layer for each learning rate, all of them in one pass over the features.

    Args:
        features: (N, d), on any device; batches of them go to ``device``.
        labels: (N,) in [0, classes).
        rates: learning rates as SGD applies them (not per 256 images).
        classes: C.
        max_epochs: passes over the features.
        decay_epochs: after each of these epochs the rates fall to a tenth.
        batch_size: rows of a step; the last batch of an epoch may be smaller.
        momentum: of SGD.
        weight_decay: of SGD, on weights and biases as in the host.
        seed: of the initial layer and of the order of the rows.
        device: where to train.

    Returns:
        The layers after the last epoch.

    Raises:
        IECLError: when there is no rate or no row.

    Example:
        >>> x, y = torch.eye(4), torch.arange(4)
        >>> probes = fit_probes(x, y, [0.001, 1.0], classes=4, max_epochs=50, batch_size=4)
        >>> probes.accuracies(x, y)[1]
        (100.0, 100.0)
    """
    if not len(rates) or not len(features):
        raise IECLError(f"linear probe of {len(rates)} rates on {len(features)} features")
    layer = initial_layer(features.shape[1], classes, seed).to(device)
    count = len(rates)
    weight = layer.weight.detach().float().repeat(count, 1, 1)
    bias = layer.bias.detach().float().repeat(count, 1)
    base = torch.tensor(list(rates), dtype=torch.float32, device=device)
    probes = Probes(base, weight, bias)
    buffers = torch.zeros_like(weight), torch.zeros_like(bias)
    for epoch in range(max_epochs):
        lr = base * 0.1 ** sum(epoch >= end for end in decay_epochs)
        for index in epoch_order(len(features), seed, epoch).split(batch_size):
            rows = index.to(features.device)
            x, y = features[rows].to(device), labels[rows.to(labels.device)].to(device)
            # d cross-entropy / d logits, averaged over the batch
            residual = probes.logits(x).softmax(-1)
            residual -= F.one_hot(y, classes)[:, None]
            residual /= len(x)
            gradients = (
                (residual.flatten(1).T @ x).unflatten(0, bias.shape),
                residual.sum(0),
            )
            for value, gradient, buffer in zip((weight, bias), gradients, buffers, strict=True):
                if weight_decay:
                    gradient = gradient + weight_decay * value
                buffer.mul_(momentum).add_(gradient)
                value -= lr.view(-1, *[1] * (value.dim() - 1)) * buffer
    return probes
