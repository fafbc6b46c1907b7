"""Does L_reg keep the encoder's log-volume? Measured before and after training, with and without.

    python studies/preservation.py --images cifar10/train

``--images`` is a folder of classes. A small convolutional network with batch norm learns by InfoNCE
on crops, flips and brightness; log-volume is 1/2 log det(J J^T) at held-out images, in nats per
output, in evaluation mode. LeakyReLU: behind a ReLU an output that is off has no volume, and the
log-volume of nearly every image is minus infinity.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from iecl_solo.entropy import effective_rank
from iecl_solo.jacobian import log_volume
from iecl_solo.lipschitz import SpectralRegularizer, lipschitz_report, sigmas

OUTPUTS, SIZE = 48, 16
#: Name of a row: eta and the options of the regulariser.
ARMS: dict[str, tuple[float, dict]] = {
    "none": (0.0, {}),
    "penalty": (0.01, {}),
    "penalty, eta 0.1": (0.1, {}),
    "bilipschitz, floor 0.5, eta 0.1": (0.1, {"mode": "bilipschitz", "sigma_min_floor": 0.5}),
    "penalty, folded": (0.01, {"fold": True}),
    "penalty, folded, eta 0.1": (0.1, {"fold": True}),
    "bilipschitz, folded, floor 0.5, eta 0.1": (
        0.1,
        {"fold": True, "mode": "bilipschitz", "sigma_min_floor": 0.5},
    ),
    "volume, folded, eta 0.1": (0.1, {"fold": True, "mode": "volume"}),
    "volume, folded, eta 1": (1.0, {"fold": True, "mode": "volume"}),
}


def load(root: Path, each: int = 100) -> Tensor:
    files = [f for c in sorted(root.iterdir()) for f in sorted(c.iterdir())[:each]]
    images = [Image.open(f).convert("RGB").resize((SIZE, SIZE)) for f in files]
    x = torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2) / 255
    return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)


def view(x: Tensor) -> Tensor:
    batch = len(x)
    side = (torch.rand(batch) * 0.7 + 0.3).sqrt()
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = side * torch.where(torch.rand(batch) < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = side
    theta[:, :, 2] = (torch.rand(batch, 2) * 2 - 1) * (1 - side)[:, None]
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    crop = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    return crop * (torch.rand(batch, 1, 1, 1) * 0.8 + 0.6)


def encoder() -> nn.Sequential:
    layers: list[nn.Module] = []
    for given, made, stride in ((3, 16, 1), (16, 24, 2), (24, 32, 2), (32, OUTPUTS, 2)):
        conv = nn.Conv2d(given, made, 3, stride, 1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        layers += [conv, nn.BatchNorm2d(made), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def state(network: nn.Module, held_out: Tensor) -> str:
    network.eval()
    volume = log_volume(network, held_out[:8]).mean().item() / OUTPUTS
    report = lipschitz_report(network, (3, SIZE, SIZE)).values()
    kernel = max(largest for largest, _ in sigmas(network).values())
    with torch.no_grad():
        rank = effective_rank(F.normalize(network(held_out), dim=1)).item()
    network.train()
    largest, smallest = max(s.sigma_max for s in report), min(s.sigma_min for s in report)
    return f"{volume:.2f} | {kernel:.2f} | {largest:.2f} | {smallest:.3f} | {rank:.1f}"


def run(name: str, images: Tensor, steps: int, seed: int) -> None:
    eta, options = ARMS[name]
    torch.manual_seed(seed)
    network = encoder()
    head = nn.Sequential(nn.Linear(OUTPUTS, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 48))
    held_out, images = images[::10], images[torch.arange(len(images)) % 10 > 0]
    with torch.no_grad():  # batch norm's statistics, before anything is learned
        for _ in range(30):
            network(view(images[torch.randint(len(images), (64,))]))
    size = {"input_size": (3, SIZE, SIZE)} if options.get("fold") else {}
    regularizer = SpectralRegularizer(network, **options, **size)
    before = state(network, held_out)
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)
    for _ in range(steps):
        x = images[torch.randint(len(images), (64,))]
        z = F.normalize(head(network(torch.cat([view(x), view(x)]))), dim=1)
        logits = (z @ z.T / 0.2).masked_fill(torch.eye(128, dtype=torch.bool), -1e9)
        loss = F.cross_entropy(logits, (torch.arange(128) + 64) % 128)
        optimizer.zero_grad()
        (loss + eta * regularizer(network) if eta else loss).backward()
        optimizer.step()
    if name == "none":
        print(f"| before | {before} | |")
    print(f"| {name} | {state(network, held_out)} | {loss.item():.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    args = parser.parse_args()
    images = load(args.images)
    print(
        "| | log-volume / output | sigma_max, kernel | folded | sigma_min, folded | rank | loss |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in args.arms:
        run(name, images, args.steps, args.seed)


if __name__ == "__main__":
    main()
