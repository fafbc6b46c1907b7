"""ImageNet on many GPUs, on paper: what the network asks of loaders, storage and the network cable.

    python studies/cluster_plan.py

The operations of a step, of SimCLR and of its variant at 224 x 224 with a ResNet-50, are counted by
torch.utils.flop_counter on 2 images; all else is arithmetic of the formulas in docs/cluster.md.
What a machine sustains is assumed, and may be given: TFLOP/s of a step and of float32, GB/s of the
links between GPUs, the latency of a collective, images/s that a core decodes and augments.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pandas as pd
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--batch", type=int, default=64, help="images on each GPU")
    parser.add_argument("--sustained", type=float, default=65, help="TFLOP/s of a step")
    parser.add_argument("--float32", type=float, default=30, help="TFLOP/s in float32")
    parser.add_argument("--link", type=float, default=25, help="GB/s of a GPU between machines")
    parser.add_argument("--latency", type=float, default=50, help="microseconds of a collective")
    parser.add_argument("--per-core", type=float, default=60, help="images/s, two views each")
    parser.add_argument("--epochs", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = stand_in(Path(temporary))
        known = {name: counted(name, folder) for name in METHODS}
    base = known["simclr"][0]
    for name, (flop, parameters) in known.items():
        print(
            f"{name}: {flop / 1e9:.1f} GFLOP an image ({flop / base:.3f} x simclr), "
            f"{parameters / 1e6:.1f} million parameters"
        )
    flop, parameters = known["iecl_simclr"]
    dim, step = 128, args.batch * flop / (args.sustained * 1e12)
    rows, jacobian = {}, log_det()
    for gpus in args.gpus:
        images = gpus * args.batch
        rate = images / step
        kl, summed = moments(args.batch)
        pairs = pairwise(images, dim) / (args.float32 * 1e12)
        rows[gpus] = {
            "images a step": images,
            "steps an epoch": IMAGES // images,
            "images/s": rate,
            f"hours of {args.epochs} epochs": IMAGES * args.epochs / rate / 3600,
            "GB/s from storage, JPEG": rate * BYTES / 1e9,
            "GB/s from memory, decoded at 256": rate * 3 * 256**2 / 1e9,
            "cores for per-image views": rate / args.per_core,
            "ms a step": step * 1e3,
            "gradients, MB a GPU": reduced(gpus, parameters) / 1e6,
            "gradients, ms (beside the backward pass)": reduced(gpus, parameters) / args.link / 1e6,
            "embeddings, MB a GPU": gathered(gpus, args.batch, dim) / 1e6,
            "embeddings, ms": gathered(gpus, args.batch, dim) / args.link / 1e6
            + 3 * args.latency / 1e3,
            "KL statistics, ms": kl / args.float32 / 1e9 + 4 * args.latency / 1e3,
            "KL statistics, KB summed": summed / 1e3,
            "log-det, ms": jacobian / args.float32 / 1e9,
            "coding rate, ms": coding_rate(images, dim) / args.float32 / 1e9,
            "estimator of all pairs, ms": pairs * 1e3,
        }
    frame = pd.DataFrame(rows)
    frame.columns = [f"{gpus} GPUs" for gpus in rows]
    print(frame.to_string(float_format=lambda v: f"{v:,.3g}" if v < 100 else f"{v:,.0f}"))
    tenth = 0.1 * step
    limit = (tenth * args.float32 * 1e12 / (6 * dim)) ** 0.5
    print(f"all pairs take a tenth of a step at {limit:,.0f} images a step")
    limit = 2 * parameters / (3 * dim)
    print(f"embeddings are as many bytes as gradients at {limit:,.0f} images a step")
    limit = tenth * args.link * 1e9 / (3 * dim * FLOAT)
    print(f"embeddings take a tenth of a step at {limit:,.0f} images a step")


if __name__ == "__main__":
    main()
