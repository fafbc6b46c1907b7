"""ImageNet on many GPUs, on paper: what the network asks of loaders, storage and the network cable.

    python studies/cluster_plan.py

The operations of a step, of SimCLR and of its variant at 224 x 224 with a ResNet-50, are counted by
torch.utils.flop_counter on 2 images; all else is arithmetic of the formulas in docs/cluster.md.
What a machine sustains is assumed, and may be given: TFLOP/s of a step and of float32, GB/s of the
links between GPUs, the latency of a collective, images/s that a core decodes and augments.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from omegaconf import DictConfig
from plan import stand_in
from torch.utils.flop_counter import FlopCounterMode

from iecl_solo.experiments.cost import Step
from iecl_solo.saib import make_saib
from iecl_solo.solo.host import find_host
from iecl_solo.train.compose import compose_pretrain

#: Training images, and bytes of a file: the 137.8 GB of ILSVRC 2012's training archive over them.
IMAGES, BYTES = 1_281_167, 137.8e9 / 1_281_167
COUNTED = 2
FLOAT = 4

#: What is counted beside the baseline.
METHODS = ("simclr", "iecl_simclr")
#: Of `iecl.generation.measure: jacobian`: images on each GPU, and conjugate-gradient steps.
JACOBIAN_IMAGES, JACOBIAN_STEPS = 16, 8


def counted(name: str, folder: Path) -> tuple[float, float]:
    """FLOP of a step for one image, and the parameters that are trained."""
    cfg: DictConfig = compose_pretrain("imagenet", name, [])
    cfg.optimizer.batch_size, cfg.precision, cfg.accelerator = COUNTED, "32-true", "cpu"
    cfg.data.dataset, cfg.data.train_path, cfg.data.val_path = "custom", str(folder), None
    cfg.data.num_workers = 0
    step = Step(cfg, find_host())
    trained = sum(p.numel() for p in step.model.parameters() if p.requires_grad)
    return step.flops() / COUNTED, trained


def gathered(gpus: int, batch: int, dim: int) -> float:
    """Bytes that each GPU receives for the embeddings: the query's also back, as a gradient."""
    return 3 * (gpus - 1) * batch * dim * FLOAT


def reduced(gpus: int, parameters: float) -> float:
    """Bytes that each GPU sends for the mean of the weights' gradients, by a ring."""
    return 2 * (gpus - 1) / gpus * parameters * FLOAT


def log_det() -> float:
    """FLOP of log|det J| on each GPU, whatever the batch: products with J and J^T.

    A product with J^T is a pass backward through SAIB, of as many operations as one forward, and a
    product with J is the transpose of that. There is one forward pass, two products a step, and at
    the end a product with J and its gradient.
    """
    saib, x = make_saib("paper", 224), torch.randn(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        saib(x)
    return JACOBIAN_IMAGES * counter.get_total_flops() * (1 + 2 * JACOBIAN_STEPS + 4)


def moments(batch: int, patch: int = 4, size: int = 224) -> tuple[float, float]:
    """FLOP of the KL's patch statistics on each GPU, forward and backward, and bytes summed."""
    n, rows = 3 * patch**2, batch * (size // patch) ** 2
    floats = 1 + 2 * n + 2 * n**2 + n
    return 3 * 2 * 2 * rows * n**2, 2 * floats * FLOAT


def coding_rate(images: int, dim: int) -> float:
    """FLOP of log det (I + c Z^T Z), the same on each GPU: the Gram matrix, and Cholesky."""
    side = min(images, dim)
    return 3 * 2 * images * dim * side + side**3


def pairwise(images: int, dim: int) -> float:
    """FLOP of an estimator of all pairs (knn, vmf_kde, renyi), repeated on each GPU."""
    return 3 * 2 * images**2 * dim


@dataclass(frozen=True)
class Machine:
    """What a machine sustains: assumed, and to be replaced by your own's figures.

    Attributes:
        batch: images on each GPU.
        sustained: TFLOP/s of a step.
        float32: TFLOP/s in float32.
        link: GB/s of a GPU to those of other machines.
        latency: microseconds of a collective operation.
        per_core: images/s that a core decodes, with two views of each.
    """

    batch: int = 64
    sustained: float = 65.0
    float32: float = 30.0
    link: float = 25.0
    latency: float = 50.0
    per_core: float = 60.0


def _figure(value: float) -> str:
    """Two digits that count, or a whole number.

    >>> _figure(0.0547), _figure(2.0), _figure(656382.6)
    ('0.055', '2.0', '656,383')
    """
    if value >= 10:
        return f"{value:,.0f}"
    digits = 1 - math.floor(math.log10(value))
    return f"{value:.{digits}f}"


def table(
    flop: float, parameters: float, gpus: Sequence[int], machine: Machine, epochs: int
) -> tuple[list[str], list[str]]:
    """The table of docs/cluster.md, and the sentences below it.

    Args:
        flop: of a step, for one image.
        parameters: that are trained.
        gpus: how many, a column each.
        machine: what is assumed.
        epochs: of the training.
    """
    dim, step = 128, machine.batch * flop / (machine.sustained * 1e12)
    jacobian = log_det() / machine.float32 / 1e9
    kl, summed = moments(machine.batch)
    kl_ms = kl / machine.float32 / 1e9 + 4 * machine.latency / 1e3
    columns = []
    for count in gpus:
        images = count * machine.batch
        rate = images / step
        gradients = reduced(count, parameters)
        received = gathered(count, machine.batch, dim)
        embeddings_ms = received / machine.link / 1e6 + 3 * machine.latency / 1e3
        coding_ms = coding_rate(images, dim) / machine.float32 / 1e9
        pairs_ms = pairwise(images, dim) / machine.float32 / 1e9
        columns.append(
            {
                f"GPUs, {machine.batch} images on each": [count],
                "images a step": [images],
                "steps an epoch": [IMAGES // images],
                "images a second that the network takes": [rate],
                f"hours for {epochs} epochs": [IMAGES * epochs / rate / 3600],
                "storage, GB/s (JPEG)": [rate * BYTES / 1e9],
                "memory, GB/s (decoded once at 256 x 256, `data.views=batched`)": [
                    rate * 3 * 256**2 / 1e9
                ],
                "CPU cores for per-image views": [rate / machine.per_core],
                "a step, ms": [step * 1e3],
                "gradients, MB and ms (beside the backward pass)": [
                    gradients / 1e6,
                    gradients / machine.link / 1e6,
                ],
                "embeddings, MB and ms": [received / 1e6, embeddings_ms],
                "KL statistics, kB and ms": [summed / 1e3, kl_ms],
                "log-det by the Jacobian (`iecl.generation.measure=jacobian`), ms": [jacobian],
                "coding rate, ms": [coding_ms],
                "an estimator of all pairs (`vmf_kde`, `knn`, `renyi`), ms": [pairs_ms],
            }
        )
    lines = []
    for name in columns[0]:
        cells = [
            ", ".join(f"{v:,}" if isinstance(v, int) else _figure(v) for v in column[name])
            for column in columns
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.insert(1, "| --- " * (len(columns) + 1) + "|")
    tenth = 0.1 * step
    pairs = (tenth * machine.float32 * 1e12 / (6 * dim)) ** 0.5
    of_embeddings = tenth * machine.link * 1e9 / (3 * dim * FLOAT)
    return lines, [
        f"all pairs take a tenth of a step at {pairs:,.0f} images a step",
        f"embeddings take a tenth of a step's time at {of_embeddings:,.0f} images a step",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--epochs", type=int, default=100)
    for field in fields(Machine):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default)
    args = vars(parser.parse_args())
    gpus, epochs = args.pop("gpus"), args.pop("epochs")
    with tempfile.TemporaryDirectory() as temporary:
        folder = stand_in(Path(temporary))
        known = {name: counted(name, folder) for name in METHODS}
    base = known["simclr"][0]
    for name, (flop, parameters) in known.items():
        print(
            f"{name}: {flop / 1e9:.1f} GFLOP an image ({flop / base:.3f} x simclr), "
            f"{parameters / 1e6:.1f} million parameters"
        )
    lines, below = table(*known["iecl_simclr"], gpus, Machine(**args), epochs)
    print("\n".join(["", *lines, "", *below]))


if __name__ == "__main__":
    main()
