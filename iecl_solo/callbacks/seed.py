"""Each epoch's random numbers depend on the seed and the epoch alone.

So a resumed run sees the batches that the uninterrupted one would have seen, and a method and its
twin see the same ones even if one of them draws more numbers on the way.
"""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything


class EpochSeed(Callback):
    """Seeds Python, NumPy and torch at the start of every training epoch.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        # a prime step keeps neighbouring seeds' epochs apart
        seed_everything(
            (self.seed + 1_000_003 * trainer.current_epoch) % 2**32, workers=True, verbose=False
        )
