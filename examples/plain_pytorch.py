"""SAIB and the entropy of the query in a plain PyTorch loop: no solo-learn, no Lightning.

python examples/plain_pytorch.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from iecl_solo.entropy import coding_rate, effective_rank
from iecl_solo.saib import SAIB


def views(images: torch.Tensor) -> torch.Tensor:
    """A random shift and some noise, for each image its own."""
    shift = torch.randint(0, 9, (2,)).tolist()
    padded = F.pad(images, (4, 4, 4, 4))
    return padded[..., shift[0] :, shift[1] :][..., :32, :32] + 0.1 * torch.randn_like(images)


def info_nce(z1: torch.Tensor, z2: torch.Tensor, temperature: float = 0.2) -> torch.Tensor:
    """The other view of the same image among all of the batch."""
    return F.cross_entropy(z1 @ z2.T / temperature, torch.arange(len(z1)))


def main(steps: int = 60) -> float:
    torch.manual_seed(0)
    digits = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    digits = F.interpolate(digits, size=32).repeat(1, 3, 1, 1)
    encoder = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, 2), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64)),
    )
    saib = SAIB(32)
    optimizer = torch.optim.Adam([*encoder.parameters(), *saib.parameters()], lr=1e-3)
    for step in range(steps):
        batch = digits[torch.randint(len(digits), (128,))]
        anchor = F.normalize(encoder(views(batch)), dim=1)
        query = F.normalize(encoder(saib(views(batch))), dim=1)
        entropy = coding_rate(query)  # H(Z'), in nats
        loss = info_nce(query, anchor) - 0.01 * entropy
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            rank = effective_rank(query)
            print(f"step {step:3d}  loss {loss:.3f}  H(Z') {entropy:.1f} nats  rank {rank:.1f}")
    return loss.item()


if __name__ == "__main__":
    main()
