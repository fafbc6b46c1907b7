"""How time and memory grow: losses and estimators with the batch, SAIB and Delta H with the image.

    python studies/scaling.py
    python studies/scaling.py --largest-batch 2048 --largest-image 64

Each case is a process of its own, of one thread: seconds of processor time of one value and
gradient (the best of three), and MiB of the process's peak above what it held before. The last
table holds the exponents p of seconds and MiB ~ size^p, fitted to the larger half of the sizes,
where constants no longer count. A case above ``--limit`` GiB is told so. Losses of pairs are beside
the same loss over the whole matrix of pairs.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from iecl_solo.entropy import ESTIMATORS, gaussian_kl
from iecl_solo.jacobian import delta_h_split
from iecl_solo.losses import MINCLoss, spectral_contrastive_loss
from iecl_solo.losses.infonce import info_nce
from iecl_solo.saib import SAIB, ConvexSAIB

BATCHES = tuple(2**k for k in range(5, 16))
IMAGES = (32, 48, 64, 96, 128, 160, 224)


def whole_info_nce(z: Tensor) -> Tensor:
    """NT-Xent as it is mostly written, every pair in one matrix."""
    half = len(z) // 2
    u = F.normalize(z, dim=1)
    similarity = (u @ u.T / 0.1).fill_diagonal_(-math.inf)
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(half))


def of_batch(name: str, size: int, dim: int) -> Callable[[], object]:
    """One value and gradient at ``size`` embeddings, of two views where a loss compares two."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(size, dim, generator=generator, requires_grad=True)
    half = size // 2
    minc = MINCLoss(dim)
    values: dict[str, Callable[[], Tensor]] = {
        "InfoNCE, blocks": lambda: info_nce(z, torch.arange(half).repeat(2)),
        "InfoNCE, whole": lambda: whole_info_nce(z),
        "spectral": lambda: spectral_contrastive_loss(z[:half], z[half:]),
        "MINC": lambda: minc(z, z.detach().roll(half, 0)),
        "Gaussian KL": lambda: gaussian_kl(z[:half], z[half:]),
        **{f"H, {n}": lambda f=f: f(F.normalize(z, dim=1)) for n, f in ESTIMATORS.items()},
    }
    return lambda: values[name]().backward()


def of_image(name: str, size: int) -> Callable[[], object]:
    """SAIB on eight images, there and back; Delta H of two, forty products."""
    torch.manual_seed(0)
    variant = ConvexSAIB if "convex" in name else SAIB
    saib = variant(size)
    images = torch.randn(8, 3, size, size)
    if name.startswith("Delta H"):
        frozen = saib.eval().requires_grad_(False)
        return lambda: delta_h_split(frozen, images[:2], probes=2, steps=10)
    return lambda: saib(images).square().mean().backward()


OF_BATCH = (
    "InfoNCE, blocks",
    "InfoNCE, whole",
    "spectral",
    "MINC",
    "Gaussian KL",
    *tuple(f"H, {name}" for name in ESTIMATORS),
)
OF_IMAGE = ("SAIB", "SAIB, convex", "Delta H", "Delta H, convex")


def _case(name: str, size: int, smallest: int, dim: int, gib: float, out: Connection) -> None:
    torch.set_num_threads(1)

    def make(n: int) -> Callable[[], object]:
        return of_batch(name, n, dim) if name in OF_BATCH else of_image(name, n)

    make(smallest)()  # what is loaded at the first call is not the case's
    run = make(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # an error, not the machine's end
    seconds: list[float] = []
    try:
        while len(seconds) < 3 and sum(seconds) < 20:
            start = time.process_time()
            run()
            seconds.append(time.process_time() - start)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error):
            raise
        out.send(None)
        return
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    out.send((min(seconds), peak / 2**10))


def measure(*arguments: object) -> tuple[float, float] | None:
    """Seconds and MiB, or None for a case that would take more than the limit."""
    context = multiprocessing.get_context("spawn")  # a peak never falls within a process
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_case, args=(*arguments, send))
    process.start()
    send.close()
    try:
        found = receive.recv()
    except EOFError:  # its own traceback is on the screen
        found = None
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"{arguments}: exit status {process.exitcode}")
    return found


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The slope of log values over log sizes, of the larger half; NaN where nothing grows.

    >>> round(exponent([1, 2, 4, 8], [9, 9, 16, 64]), 3)
    2.0
    """
    points = [(s, v) for s, v in zip(sizes, values, strict=True) if v > 0]
    points = points[len(points) // 2 :]
    if len(points) < 2:
        return float("nan")
    x, y = np.log(np.array(points, dtype=float)).T
    return float(np.polyfit(x, y, 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--largest-batch", type=int, default=BATCHES[-1])
    parser.add_argument("--largest-image", type=int, default=IMAGES[-1])
    parser.add_argument("--limit", type=float, default=8.0, help="GiB that a case may take")
    parser.add_argument("--output", default="scaling.csv")
    options = parser.parse_args()
    batches = [b for b in BATCHES if b <= options.largest_batch]
    images = [i for i in IMAGES if i <= options.largest_image]
    slopes = []
    with open(options.output, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "size", "seconds", "mib"])
        for names, sizes in ((OF_BATCH, batches), (OF_IMAGE, images)):
            for name in names:
                done: list[tuple[int, float, float]] = []
                for size in sizes:
                    found = measure(name, size, sizes[0], options.dim, options.limit)
                    writer.writerow([name, size, *(found or ("out of memory", ""))])
                    file.flush()
                    if found is None:
                        break
                    done.append((size, *found))
                    print(
                        f"{name:>18}{size:>8}{found[0]:>12.5f} s{found[1]:>10.1f} MiB", flush=True
                    )
                measured = [d[0] for d in done]
                slopes.append((name, *(exponent(measured, [d[i] for d in done]) for i in (1, 2))))
    print("\n| | exponent of time | of memory |\n| --- | --- | --- |")
    for name, seconds, mib in slopes:
        print(f"| {name} | {seconds:.2f} | {mib:.2f} |")


if __name__ == "__main__":
    main()
