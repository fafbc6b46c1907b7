"""Entropy made and entropy kept, in nats, on a run as it goes."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from iecl_solo.entropy import coding_rate, effective_rank, gaussian_kl, knn_entropy
from iecl_solo.errors import IECLError
from iecl_solo.jacobian import delta_h_split, log_volume
from iecl_solo.lipschitz import evaluating, sigmas
from iecl_solo.saib import save_saib
from iecl_solo.solo.embed import embed
from iecl_solo.solo.host import Host

_OF_EMBEDDINGS = (
    "entropy_query",
    "entropy_anchor",
    "entropy_query_knn",
    "entropy_anchor_knn",
    "kl",
    "effective_rank",
)


@dataclass
class MonitorConfig:
    """The ``monitor:`` block.

    Attributes:
        every_n_epochs: measure in every n-th epoch and in the last one; 0 switches it off.
        images: images whose embeddings are measured (a batch's first ones).
        delta_h_images: images at which SAIB's Jacobian is measured.
        probes: random probes of log|det J|, at least 2 for a standard error.
        steps: Lanczos steps of log|det J|.
        volume_images: images at which the encoder's log-volume is measured, one vector-Jacobian
            product for each of its outputs; 0 leaves it out.
    """

    every_n_epochs: int = 10
    images: int = 256
    delta_h_images: int = 4
    probes: int = 4
    steps: int = 20
    volume_images: int = 0

    def __post_init__(self) -> None:
        least = {"images": 2, "delta_h_images": 1, "probes": 2, "steps": 2}
        for name, value in vars(self).items():
            if value < least.get(name, 0):
                raise IECLError(
                    f"monitor.{name}: {value} is not allowed, at least {least.get(name, 0)} is"
                )


def measure(
    model: LightningModule, host: Host, views: list[Tensor], config: MonitorConfig
) -> dict[str, float]:
    """All that can be said of a method's entropies on given views, in eval mode.

    Args:
        model: a method of the host, or its twin.
        host: the solo-learn in use.
        views: two or more batches (B, 3, H, W) of large crops of the same images.
        config: how many images and probes.

    Returns:
        By name: ``entropy_query`` and ``entropy_anchor`` (coding rate) and the same with ``_knn``,
        ``kl``, ``effective_rank``, ``sigma_max`` and ``sigma_min`` over the encoder's layers and of
        each one (``sigma_max/LAYER``); with a SAIB ``delta_h`` in nats per dimension, its standard
        error and its two parts; with ``volume_images`` the encoder's ``log_volume``. Entropies in
        nats. Of a run whose embeddings are not finite any more, NaN for those that are of
        embeddings, and no others.

    The global random state is neither read nor moved.
    """
    objective: Any = getattr(model, "iecl", None)
    query_view = objective.views.query[0] if objective is not None else 1
    anchor_view = 1 - query_view if query_view < 2 else 0
    with evaluating(model), torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        query_x, anchor_x = (views[v][: config.images].float() for v in (query_view, anchor_view))
        query = embed(model, host, query_x, query=True)
        anchor = embed(model, host, anchor_x)
        if not (query.isfinite().all() and anchor.isfinite().all()):
            return dict.fromkeys(_OF_EMBEDDINGS, float("nan"))  # the run has diverged
        out = (
            coding_rate(query),
            coding_rate(anchor),
            knn_entropy(query),
            knn_entropy(anchor),
            gaussian_kl(query, anchor),
            effective_rank(anchor),
        )
        values = dict(zip(_OF_EMBEDDINGS, map(float, out), strict=True))
        network = getattr(model, host.online)
        spectrum = sigmas(network)
        values["sigma_max"] = max(largest for largest, _ in spectrum.values())
        values["sigma_min"] = min(smallest for _, smallest in spectrum.values())
        for layer, (largest, smallest) in spectrum.items():
            values[f"sigma_max/{layer}"], values[f"sigma_min/{layer}"] = largest, smallest
        if objective is not None and objective.saib is not None:
            generator = torch.Generator(query_x.device).manual_seed(0)
            delta = delta_h_split(
                objective.saib,
                query_x[: config.delta_h_images],
                probes=config.probes,
                steps=config.steps,
                generator=generator,
            )
            values["delta_h"] = delta.nats_per_dimension
            values["delta_h_stderr"] = delta.stderr / delta.dimensions
            values["delta_h_isotropic"] = delta.isotropic_per_dimension
            values["delta_h_anisotropic"] = delta.anisotropic_per_dimension
        if config.volume_images:
            volume = log_volume(network, anchor_x[: config.volume_images])
            values["log_volume"] = float(volume.mean())
    return values


class EntropyMonitor(Callback):
    """Logs ``measure`` of the epoch's first batch, to the run's loggers and to a CSV.

    SAIB as it was then is kept beside the CSV, so that its views over training can be looked at.

    Args:
        host: the solo-learn in use.
        config: how often, and on how much.
        path: the CSV; one row a measured epoch, with the seconds it took.
    """

    def __init__(self, host: Host, config: MonitorConfig, path: Path) -> None:
        self.host, self.config, self.path = host, config, path
        self._views: list[Tensor] | None = None

    def _due(self, trainer: Trainer) -> bool:
        last = trainer.current_epoch + 1 == trainer.max_epochs
        return last or trainer.current_epoch % self.config.every_n_epochs == 0

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0 and self._due(trainer):
            self._views = [v[: self.config.images].detach() for v in batch[1][:2]]

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        views, self._views = self._views, None
        if views is None or not trainer.is_global_zero:
            return
        start = time.perf_counter()
        values = measure(module, self.host, views, self.config)
        values["monitor_seconds"] = time.perf_counter() - start
        module.log_dict({f"monitor_{k}": v for k, v in values.items()}, rank_zero_only=True)
        images = len(views[0])  # that the figures are of: a batch may have fewer than asked for
        self._write({"epoch": trainer.current_epoch, "images": images, **values})
        saib = getattr(getattr(module, "iecl", None), "saib", None)
        if saib is not None:
            save_saib(
                saib, self.path.parent / f"saib-epoch-{trainer.current_epoch:04d}.safetensors"
            )

    def _write(self, row: dict[str, float]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = self._earlier(lambda epoch: epoch < row["epoch"])
        names = list(dict.fromkeys([*row, *(k for r in rows for k in r)]))
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows([*rows, row])

    def _earlier(self, keep: Callable[[float], bool]) -> list[dict[str, Any]]:
        """Rows of a run that was interrupted, without those that are measured again."""
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if keep(float(row["epoch"]))]
