"""Entropy made and entropy kept, in nats, on a run as it goes."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from iecl_solo import checks
from iecl_solo.entropy import coding_rate, effective_rank, knn_entropy
from iecl_solo.files import replacing
from iecl_solo.generation import (
    conditional_entropy,
    conditional_entropy_bound,
    patch_statistics,
)
from iecl_solo.jacobian import delta_h_split, log_volume
from iecl_solo.lipschitz import evaluating, sigmas
from iecl_solo.objectives.protocol import Objective
from iecl_solo.saib import BaseSAIB, NoiseSAIB, save_saib
from iecl_solo.solo.embed import embed
from iecl_solo.solo.host import Host
from iecl_solo.solo.wrapper import transforming

_OF_EMBEDDINGS = (
    "entropy_query",
    "entropy_anchor",
    "entropy_query_knn",
    "entropy_anchor_knn",
    "kl",
    "effective_rank",
)
#: All that ``measure`` can say of a run, of single layers aside.
MONITORED = (
    *_OF_EMBEDDINGS,
    *("sigma_max", "sigma_min", "log_volume", "delta_h", "delta_h_stderr", "delta_h_isotropic"),
    *("delta_h_anisotropic", "delta_h_contrast", "delta_h_beyond_contrast", "patch_kl"),
    *("conditional_entropy", "conditional_entropy_bound", "budget"),
)
#: What Delta H was measured with, columns of the CSV.
_OF_DELTA_H = ("delta_h_images", "probes")
# Dimensions of the noise of an image up to which its Jacobian is formed: 64x64 pixels at p = 4.
_MOST_NOISE = 4096


@dataclass
class MonitorConfig:
    """The ``monitor:`` block.

    Attributes:
        every_n_epochs: measure in every n-th epoch and in the last one; 0 switches it off.
        images: images whose embeddings are measured (a batch's first ones).
        delta_h_images: images at which SAIB's Jacobian is measured; 0 leaves Delta H out.
        probes: random probes of log|det J|, at least 2 for a standard error.
        steps: Lanczos steps of log|det J|.
        volume_images: images at which the encoder's log-volume is measured, one vector-Jacobian
            product for each of its outputs; 0 leaves it out.
        share: of the training's time so far, the most that measuring may take; 1 is no limit. A
            measurement that would take more has its Delta H at fewer images, then by fewer probes,
            then not at all, and an epoch is left out. The first epoch that is due and the last one
            are always measured, without a Delta H if need be.
    """

    every_n_epochs: int = 10
    images: int = 256
    delta_h_images: int = 4
    probes: int = 4
    steps: int = 20
    volume_images: int = 0
    share: float = 0.02

    def __post_init__(self) -> None:
        least = {"images": 2, "probes": 2, "steps": 2}
        checks.number("monitor.share", self.share, 0, 1, above=True)
        for name, value in vars(self).items():
            if name != "share":
                checks.whole(f"monitor.{name}", value, least.get(name, 0))


def measure(
    model: LightningModule, host: Host, views: list[Tensor], config: MonitorConfig
) -> dict[str, float]:
    """All that can be said of a method's entropies on given views, in eval mode.

    Args:
        model: a method of the host, or a variant of it.
        host: the solo-learn in use.
        views: two or more batches (B, 3, H, W) of large crops of the same images.
        config: how many images and probes.

    Returns:
        By name, query and anchor as the loss has them (momentum network, placement of SAIB):
        ``entropy_query`` and ``entropy_anchor`` (coding rate, nats) and the same with ``_knn``;
        ``kl`` of the two in nats per dimension; ``effective_rank`` of the online network's
        embeddings of raw views; ``sigma_max`` and ``sigma_min`` over the encoder's layers and of
        each one (``sigma_max/LAYER``); with ``volume_images`` the encoder's ``log_volume``.

        With a SAIB, in nats per dimension: ``delta_h`` (E log|det J|), its standard error and its
        two parts by the Frobenius norm; ``delta_h_contrast``, the log of the views' deviation over
        the raw ones', and ``delta_h_beyond_contrast``, the rest, which no batch norm takes out;
        ``patch_kl`` of the views' patches from the raw ones. Of one with noise also
        ``conditional_entropy`` per noise dimension (up to 4,096 of them; it costs as many products
        of the Jacobian in the noise), ``conditional_entropy_bound`` per pixel, and ``budget``; its
        ``delta_h`` is that of the map at one fixed noise.

        Of a run whose embeddings are not finite any more, NaN for those that are of embeddings, and
        no others.

    The global random state is neither read nor moved.
    """
    objective = transforming(model)
    divergence = (objective or Objective()).divergence
    query_view = objective.views.query[0] if objective is not None else 1
    anchor_view = 1 - query_view if query_view < 2 else 0
    with evaluating(model), torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        query_x, anchor_x = (views[v][: config.images].float() for v in (query_view, anchor_view))
        query = embed(model, host, query_x, "query")
        anchor = embed(model, host, anchor_x, "anchor")
        if not (query.isfinite().all() and anchor.isfinite().all()):
            return dict.fromkeys(_OF_EMBEDDINGS, float("nan"))  # the run has diverged
        out = (
            coding_rate(query),
            coding_rate(anchor),
            knn_entropy(query),
            knn_entropy(anchor),
            divergence(query, anchor),
            effective_rank(embed(model, host, anchor_x)),
        )
        values = dict(zip(_OF_EMBEDDINGS, map(float, out), strict=True))
        network = getattr(model, host.online)
        spectrum = sigmas(network)
        values["sigma_max"] = max(largest for largest, _ in spectrum.values())
        values["sigma_min"] = min(smallest for _, smallest in spectrum.values())
        for layer, (largest, smallest) in spectrum.items():
            values[f"sigma_max/{layer}"], values[f"sigma_min/{layer}"] = largest, smallest
        if objective is not None and isinstance(objective.transformer, BaseSAIB):
            untouched = objective.transform(query_x, query_view, "online") is query_x
            x = anchor_x if untouched else query_x
            values |= _of_saib(objective.transformer, x, config)
        if config.volume_images:
            volume = log_volume(network, anchor_x[: config.volume_images])
            values["log_volume"] = float(volume.mean())
    return values


def _of_saib(saib: BaseSAIB, x: Tensor, config: MonitorConfig) -> dict[str, float]:
    generator = torch.Generator(x.device).manual_seed(0)
    few = x[: config.delta_h_images]
    # one process alone measures: the others would never come
    patches = patch_statistics([x], [saib(x)], saib.patch_size, gather_distributed=False)
    contrast = float(patches.contrast)
    values = {"delta_h_contrast": contrast, "patch_kl": float(patches.kl)}
    if len(few):
        delta = delta_h_split(
            saib.realize(few[:1]),  # of one image's noise, which then is every image's
            few,
            probes=config.probes,
            steps=config.steps,
            generator=generator,
        )
        values = {
            "delta_h": delta.nats_per_dimension,
            "delta_h_stderr": delta.stderr / delta.dimensions,
            "delta_h_isotropic": delta.isotropic_per_dimension,
            "delta_h_anisotropic": delta.anisotropic_per_dimension,
            "delta_h_contrast": contrast,
            "delta_h_beyond_contrast": delta.nats_per_dimension - contrast,
            "patch_kl": float(patches.kl),
        }
    if isinstance(saib, NoiseSAIB):
        if len(few) and (noise := saib.draw(few))[0].numel() <= _MOST_NOISE:
            entropy = conditional_entropy(saib, few, noise)
            values["conditional_entropy"] = float(entropy.mean()) / noise[0].numel()
        values["conditional_entropy_bound"] = conditional_entropy_bound(saib.budget)
        values["budget"] = saib.budget
    return values


class EntropyMonitor(Callback):
    """Logs ``measure`` of the epoch's first batch, to the run's loggers and to a CSV.

    SAIB as it was then is kept beside the CSV, so that its views over training can be looked at.
    It keeps to ``config.share`` of the time so far, of this leg of the run. What it measures less
    for that is in the CSV, and said once.

    Args:
        host: the solo-learn in use.
        config: how often, and on how much.
        path: the CSV; one row a measured epoch, with what it was measured on and the seconds.
        clock: in seconds.
    """

    def __init__(
        self,
        host: Host,
        config: MonitorConfig,
        path: Path,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.host, self.config, self.path, self._clock = host, config, path, clock
        self._views: list[Tensor] | None = None
        self._began = clock()
        self._spent = 0.0  # on measuring
        self._besides = 0.0  # of the last measurement, without its Delta H
        self._trial, self._each = 0.0, 0.0  # what a trial took, and what it says of a probe
        self._said: set[str] = set()

    def _last(self, trainer: Trainer) -> bool:
        return trainer.current_epoch + 1 == trainer.max_epochs

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._began = self._clock()

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        due = self._last(trainer) or trainer.current_epoch % self.config.every_n_epochs == 0
        # its first batch; of an epoch that is gone on with, the first of the rest
        if self._views is None and due:
            self._views = [v[: self.config.images].detach() for v in batch[1][:2]]

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        views, self._views = self._views, None
        if views is None or not trainer.is_global_zero:
            return
        start = self._clock()
        config = self._affordable(module, views, last=self._last(trainer))
        self._say(trainer.current_epoch, config)
        if config is None:
            return
        begun = self._clock()
        values = measure(module, self.host, views, config)
        end = self._clock()
        of_delta_h = self._each * config.delta_h_images * config.probes
        self._besides = max(0.0, end - begun - of_delta_h)
        self._spent += end - start
        values["monitor_seconds"] = end - start
        module.log_dict({f"monitor_{k}": v for k, v in values.items()}, rank_zero_only=True)
        # that the figures are of: a batch may have fewer than asked for
        sample = {"images": len(views[0]), **{name: getattr(config, name) for name in _OF_DELTA_H}}
        self._write({"epoch": trainer.current_epoch, **sample, **values})
        objective = transforming(module)
        if objective is not None and isinstance(objective.transformer, BaseSAIB):
            save_saib(
                objective.transformer,
                self.path.parent / f"saib-epoch-{trainer.current_epoch:04d}.safetensors",
            )

    def _affordable(
        self, module: LightningModule, views: list[Tensor], last: bool
    ) -> MonitorConfig | None:
        """What is measured within the share; None for nothing."""
        config = self.config
        if config.share == 1:
            return config
        training = self._clock() - self._began - self._spent
        left = config.share * training - self._spent
        if not last and self._besides > left:
            return None
        objective = transforming(module)
        if objective is None or not isinstance(objective.transformer, BaseSAIB):
            return config
        if config.delta_h_images and not (self._each and self._trial > 0.1 * left):
            self._try(module, objective.transformer, views[0][:1].float())
        probes = int((left - self._besides) / self._each) if self._each else config.probes
        images = min(config.delta_h_images, probes // config.probes)
        if images >= 1 or not config.delta_h_images:
            return replace(config, delta_h_images=max(0, images))
        if probes >= 2:
            return replace(config, delta_h_images=1, probes=probes)
        return replace(config, delta_h_images=0)

    def _try(self, module: LightningModule, saib: BaseSAIB, image: Tensor) -> None:
        """How long a probe at an image takes, by a tenth of its steps."""
        start, steps = self._clock(), max(2, self.config.steps // 10)
        with evaluating(module), torch.autocast(module.device.type, enabled=False):
            delta_h_split(saib.realize(image), image, probes=2, steps=steps)
        self._trial = self._clock() - start
        self._each = self._trial / (2 * steps) * self.config.steps

    def _say(self, epoch: int, config: MonitorConfig | None) -> None:
        """Where less is measured than was asked for, and how much; once for each amount."""
        asked = self.config
        if config == asked:
            return
        if config is None:
            said = "nothing is measured in some epochs"
        elif not config.delta_h_images:
            said = "Delta H is not measured in some epochs"
        else:
            said = f"Delta H at {config.delta_h_images} of {asked.delta_h_images} images"
            if config.probes < asked.probes:
                said += f", by {config.probes} of {asked.probes} probes"
        if said not in self._said:
            print(
                f"monitor  epoch {epoch + 1}: {said}; more would take over {100 * asked.share:g} % "
                "of the time so far (monitor.share)",
                flush=True,
            )
        self._said.add(said)

    def _write(self, row: dict[str, float]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = self._earlier(row["epoch"])
        names = list(dict.fromkeys([*row, *(k for r in rows for k in r)]))
        with replacing(self.path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows([*rows, row])

    def _earlier(self, epoch: float) -> list[dict[str, Any]]:
        """Rows of a run that was interrupted, without those that are measured again."""
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if float(row["epoch"]) < epoch]
