"""Stochastic log|det J| of random SAIBs against the exact value, and what it costs at full size.

    python studies/logdet_table.py --cases 100

First the cost of one call at 3 x 224 x 224, each in a process of its own: seconds, and peak memory
above what was held before (of the process on a CPU, of the allocator on a GPU). Then, for each
variant and size, a case is one SAIB with random weights and one image: how many exact values lie
within 3 standard errors of the mean over probes, the mean error in standard errors, the root mean
square error and the exact value in nats per dimension, and the seconds of a stochastic and an exact
value. With 8 probes a perfect estimator has 2 % outside (Student's t, 7 degrees of freedom), with
16 probes 0.9 %.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from iecl_solo.jacobian import LogDet, delta_h_split, logabsdet, logabsdet_exact
from iecl_solo.saib import make_saib

# name: (options of SAIB, whether its Jacobian is symmetric)
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "paper": ({"variant": "paper", "match_statistics": False, "outer_skip": True}, False),
    "paper-no-skip": ({"variant": "paper", "match_statistics": False}, False),
    "convex": ({"variant": "convex"}, True),
    "convex-depth-2": ({"variant": "convex", "depth": 2}, False),
}
T = TypeVar("T")

SIZES = (8, 16)
FULL_SIZE = 224


@dataclass(frozen=True)
class Row:
    variant: str
    size: int
    cases: int
    within_3: int
    mean_z: float
    error_per_dim: float
    nats_per_dim: float
    stochastic_s: float
    exact_s: float


def random_saib(variant: str, size: int, seed: int) -> nn.Module:
    """A SAIB away from its initialisation, which is (nearly) the identity or 2 X."""
    options, _ = VARIANTS[variant]
    torch.manual_seed(seed)
    module = make_saib(image_size=size, **options)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        nn.init.normal_(parameter, std=0.5 if parameter.ndim == 1 else fan_in**-0.5)
    return module.eval()


def timed(function: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cost(variant: str, batch: int, chunk_size: int | None, device: str) -> str:
    module = random_saib(variant, FULL_SIZE, seed=0).to(device)
    x = torch.randn(batch, 3, FULL_SIZE, FULL_SIZE, device=device)
    symmetric = VARIANTS[variant][1]
    with torch.no_grad():
        module(x)
    before = peak_bytes()
    split, seconds = timed(
        lambda: delta_h_split(module, x, symmetric=symmetric, chunk_size=chunk_size)
    )
    grown = (peak_bytes() - before) / 2**20
    size = f"3x{FULL_SIZE}x{FULL_SIZE}"
    setting = f"{variant} {size}, B={batch}, chunk_size={chunk_size}"
    return f"{setting}: {seconds:.1f} s, peak memory +{grown:.0f} MiB\n  {split}"


def report_cost(device: str) -> None:
    settings = [
        (variant, batch, chunk_size, device)
        for variant in ("convex", "paper")
        for batch, chunk_size in ((1, 1), (1, None), (8, None))
    ]
    # a peak never falls, so each has a process of its own
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for setting in settings:
            print(pool.apply(cost, setting), flush=True)


def row(variant: str, size: int, cases: int, probes: int, device: str) -> Row:
    symmetric = VARIANTS[variant][1]
    exact: list[Tensor] = []
    means: list[Tensor] = []
    stderrs: list[Tensor] = []
    seconds = [0.0, 0.0]
    for seed in range(cases):
        module = random_saib(variant, size, seed).to(device)
        x = torch.randn(1, 3, size, size, device=device)
        generator = torch.Generator().manual_seed(seed)

        def stochastic(module=module, x=x, generator=generator) -> LogDet:
            return logabsdet(module, x, probes=probes, generator=generator, symmetric=symmetric)

        def full(module=module, x=x) -> Tensor:
            return logabsdet_exact(module, x)

        (mean, stderr), took = timed(stochastic)
        value, took_exact = timed(full)
        exact.append(value)
        means.append(mean)
        stderrs.append(stderr)
        seconds = [seconds[0] + took, seconds[1] + took_exact]
    truth, mean = torch.cat(exact), torch.cat(means)
    z = (mean - truth) / torch.cat(stderrs)
    dimensions = 3 * size**2
    return Row(
        variant=variant,
        size=size,
        cases=cases,
        within_3=int((z.abs() <= 3).sum()),
        mean_z=z.mean().item(),
        error_per_dim=((mean - truth).square().mean().sqrt() / dimensions).item(),
        nats_per_dim=truth.mean().item() / dimensions,
        stochastic_s=seconds[0] / cases,
        exact_s=seconds[1] / cases,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--probes", type=int, default=16, help="of the cases; the cost is of 8")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", default="logdet_table.csv")
    options = parser.parse_args()
    report_cost(options.device)
    names = [field.name for field in fields(Row)]
    print("".join(f"{name:>16}" for name in names))
    with open(options.output, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for variant in VARIANTS:
            for size in SIZES:
                measured = row(variant, size, options.cases, options.probes, options.device)
                cells = asdict(measured)
                writer.writerow(cells)
                shown = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in cells.values()]
                print("".join(f"{cell:>16}" for cell in shown), flush=True)


if __name__ == "__main__":
    main()
