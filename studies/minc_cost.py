"""What MINC and the spectral contrastive loss cost as the batch grows, up to 65,536 embeddings.

    python studies/minc_cost.py

Seconds and memory of one value and gradient (the best of three, each case in a process of its own;
memory is the peak above what was held before, of the process on a CPU, of the allocator on a GPU).
Embeddings are those of two views, so that spectral compares half of them with the other half; it is
the loss as it is used, which forms (d, d) moments and no pairs where those are less. A
case that would need more than ``--limit`` GiB is told so and not estimated.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from iecl_solo.losses import MINCLoss, spectral_contrastive_loss

LOSSES = ("minc", "spectral")
SIZES = tuple(2**k for k in range(10, 17))
OUT_OF_MEMORY = "out of memory"


def make_loss(name: str, dim: int, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    if name == "spectral":
        return spectral_contrastive_loss
    loss = MINCLoss(dim).to(device)
    return lambda z1, z2: loss(torch.cat([z1, z2]), torch.cat([z2, z1]))


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_memory(device: str, gib: float) -> None:
    """From here on, more than this is an error and not the end of other people's processes."""
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def case(name: str, embeddings: int, dim: int, device: str, gib: float, out: Connection) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, embeddings // 2, dim, generator=generator).to(device)
    z1, z2 = (view.clone().requires_grad_() for view in z)
    loss = make_loss(name, dim, device)
    loss(z1[:2], z2[:2]).backward()  # what is loaded at the first call is not the loss's
    before = peak_bytes(device)
    limit_memory(device, gib)
    seconds = []
    try:
        for _ in range(3):
            z1.grad = z2.grad = None
            start = time.perf_counter()
            loss(z1, z2).backward()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error):
            raise
        out.send(None)
        return
    out.send((min(seconds), (peak_bytes(device) - before) / 2**20))


def measure(*arguments: object) -> tuple[float, float] | None:
    """Seconds and MiB, or None for a case that ran out of memory."""
    context = multiprocessing.get_context("spawn")  # a peak never falls within a process
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=case, args=(*arguments, send))
    process.start()
    send.close()
    try:
        result = receive.recv()
    except EOFError:  # it was killed, or its own traceback is on the screen
        result = None
    process.join()
    if process.exitcode not in (0, -9):
        raise SystemExit(f"{arguments}: exit status {process.exitcode}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--limit", type=float, default=8.0, help="GiB that a case may take")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", default="minc_cost.csv")
    options = parser.parse_args()
    print(f"d = {options.dim}, {options.device}, {torch.get_num_threads()} threads")
    print(f"{'embeddings':>10}" + "".join(f"{n + ' s':>14}{n + ' MiB':>14}" for n in LOSSES))
    with open(options.output, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["loss", "embeddings", "seconds", "mib"])
        for size in SIZES:
            line = f"{size:>10}"
            for name in LOSSES:
                found = measure(name, size, options.dim, options.device, options.limit)
                writer.writerow([name, size, *(found or (OUT_OF_MEMORY, OUT_OF_MEMORY))])
                line += f"{found[0]:>14.4f}{found[1]:>14.1f}" if found else f"{OUT_OF_MEMORY:>28}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
