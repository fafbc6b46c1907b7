"""The order of images and the randomness of their views: a function of seed, epoch and place.

So a run can go on in the middle of an epoch, with any number of workers, without decoding what it
has seen; and a baseline and its variant see the same views, however many numbers one of them draws.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from iecl_solo.distributed import rank, world_size


def seed_of(*place: int) -> int:
    """63 bits that depend on all of ``place``, those of neighbouring places unrelated.

    >>> seed_of(5, 0, 1) == seed_of(5, 0, 1), seed_of(5, 0, 1) == seed_of(5, 1, 0)
    (True, False)
    """
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_cpu(*place: int) -> None:
    """Seed Python, NumPy and torch on the CPU by ``seed_of(*place)``, in 20 microseconds."""
    seed = seed_of(*place)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def seed_all(*place: int) -> None:
    """The same on all of torch's devices, in a third of a millisecond."""
    seed_cpu(*place)
    torch.manual_seed(seed_of(*place))


class EpochOrder(DistributedSampler):
    """A random order of the images, as pairs (epoch, index).

    Of several processes each takes every n-th, so that together they see the batches that one
    process with their joint batch size would see. What does not fill a batch is left out.

    Args:
        images: how many there are.
        batch_size: of one process.
        seed: the run's seed.
        pieces: of images in shards, how many each shard holds, and how many shards are mixed at a
            time. The shards come in a random order, and within each so many of them the images do:
            few shards are read from at a time. None mixes all images.

    Example:
        >>> order = EpochOrder(6, 1, seed=0, pieces=([2, 2, 2], 1))
        >>> [index // 2 for _, index in order]
        [1, 1, 0, 0, 2, 2]
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        seed: int,
        pieces: tuple[Sequence[int], int] | None = None,
    ) -> None:
        # not the base class's: that asks for the process group, which comes later
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.pieces = pieces
        self.epoch = 0
        self._seen = (0, 0)

    def resume(self, epoch: int, batches: int) -> None:
        """Begin with ``epoch``, without its first ``batches`` batches."""
        self.epoch, self._seen = epoch, (epoch, batches)

    def __len__(self) -> int:
        return self.images // world_size()

    def _order(self, generator: torch.Generator) -> torch.Tensor:
        if self.pieces is None:
            return torch.randperm(self.images, generator=generator)
        lengths, mixed = self.pieces
        shards = torch.arange(self.images).split(list(lengths))
        by_chance = torch.randperm(len(shards), generator=generator).tolist()
        parts = []
        for first in range(0, len(shards), mixed):
            part = torch.cat([shards[i] for i in by_chance[first : first + mixed]])
            parts.append(part[torch.randperm(len(part), generator=generator)])
        return torch.cat(parts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = self._order(generator)[rank() :: world_size()][: len(self)]
        epoch, batches = self._seen
        first = batches * self.batch_size if epoch == self.epoch else 0
        return iter([(self.epoch, index) for index in order[first:].tolist()])


class SeededViews(Dataset):
    """A data set indexed by (epoch, index); these and the seed decide an image's views.

    Args:
        dataset: whose transforms draw from Python's, NumPy's or torch's random numbers.
        seed: the run's seed.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: tuple[int, int]) -> Any:
        epoch, index = place
        seed_cpu(self.seed, epoch, index)
        return self.dataset[index]


class SteadyLoader(DataLoader):
    """A loader whose workers do not die of what ends their owner, which saves first.

    Terminals, ``timeout`` and schedulers signal every process of a job. A worker that died of it
    would leave its owner in the middle of a step, without the next batch. They end with it.
    """

    def __iter__(self) -> Any:
        # a child begins with its parent's mask, so that there is no moment without it
        ends = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
        others = set(multiprocessing.active_children())
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            _DEAF.update(set(multiprocessing.active_children()) - others)
            if {os.getpid()} != _OWNERS:  # a child that is forked has lost what its parent ends by
                _OWNERS.clear()
                _OWNERS.add(os.getpid())
                Finalize(None, _end_workers, exitpriority=100)


#: Workers that hear no SIGTERM, and the process that ends them.
_DEAF: WeakSet[BaseProcess] = WeakSet()
_OWNERS: set[int] = set()


def _end_workers() -> None:
    """End the workers of iterators that are still held when their owner exits.

    multiprocessing sends them SIGTERM then and waits for them, for ever if they do not hear it.
    """
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises where a worker is killed
    for process in multiprocessing.active_children():
        if process in _DEAF:
            process.kill()


def seeded(loader: Any, seed: int) -> tuple[Any, EpochOrder]:
    """A loader of the same batches' size, workers and views, in a resumable order.

    Args:
        loader: shuffled, as the host's script makes it; one that has such an order stays as it is.
        seed: the run's seed.

    Returns:
        The loader, and its order.
    """
    if isinstance(loader.sampler, EpochOrder):
        return loader, loader.sampler
    pieces = getattr(loader.dataset, "pieces", None)
    order = EpochOrder(len(loader.dataset), loader.batch_size, seed, pieces)
    return (
        SteadyLoader(
            SeededViews(loader.dataset, seed),
            batch_size=loader.batch_size,
            sampler=order,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            drop_last=True,
        ),
        order,
    )
