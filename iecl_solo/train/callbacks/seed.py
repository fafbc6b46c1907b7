"""Each epoch's random numbers depend on the seed and the epoch alone.

So a resumed run sees the batches that the uninterrupted one would have seen, and a method and its
twin see the same ones even if one of them draws more numbers on the way.
"""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything


def seed_epoch(seed: int, epoch: int) -> None:
    """Seed Python, NumPy and torch for an epoch; a prime step keeps neighbouring seeds apart."""
    seed_everything((seed + 1_000_003 * epoch) % 2**32, workers=True, verbose=False)


class EpochSeed(Callback):
    """Seeds every training epoch but the first of this ``fit``.

    Lightning opens the first epoch's loader before any hook is called, so that one has to be
    seeded, by ``seed_epoch``, right before ``trainer.fit``.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._first = True

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not self._first:
            seed_epoch(self.seed, trainer.current_epoch)
        self._first = False
