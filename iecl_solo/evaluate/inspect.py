"""The entropies of a finished run, measured again as its monitor measured them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd
from lightning.pytorch import LightningModule
from torch import Tensor

from iecl_solo.evaluate.load import Pretrained, first_views, load_method
from iecl_solo.solo.config import parse_block, plain
from iecl_solo.solo.data import pretrain_set
from iecl_solo.solo.host import Host
from iecl_solo.train.callbacks.entropy_monitor import MonitorConfig, measure
from iecl_solo.train.logs import read_log


class Inspected(NamedTuple):
    """What ``inspect`` measured, and what there is to draw of it.

    Attributes:
        values: measures by name; a layer's own has a ``/`` in its name.
        sample: ``images`` that count, out of how many (``of``), their ``epoch`` and ``seed``.
        model: the whole trained method.
        views: (B, 3, H, W) each, that were measured.
        monitor: the run's ``monitor.csv``; None where it has none.
    """

    values: dict[str, float]
    sample: dict[str, int]
    model: LightningModule
    views: list[Tensor]
    monitor: pd.DataFrame | None


def inspect(pretrained: Pretrained, host: Host, given: Mapping[str, int | None]) -> Inspected:
    """Every measure of a checkpoint, on the first views of its epoch.

    With nothing given, on the very views that the monitor measured last, so that both say the same.

    Args:
        pretrained: the checkpoint; its configuration's batch size is set to what is measured.
        host: the solo-learn in use.
        given: values of the ``monitor:`` block; None stands for the run's own.

    Raises:
        IECLError: one line, for a value that is not allowed, or images that cannot be read.
    """
    cfg, log = pretrained.cfg, pretrained.path.parent / "monitor.csv"
    monitor = read_log(log) if log.is_file() else None
    available = len(pretrain_set(cfg, host, None))
    own = plain(cfg.get("monitor")) or {}
    if monitor is not None and len(monitor):  # it may have measured less than was asked for
        last = monitor.iloc[-1].dropna()
        if last.get("delta_h_images"):  # whoever asks has the time that the training had not
            own |= {name: int(last[name]) for name in ("delta_h_images", "probes") if name in last}
    own |= {name: value for name, value in given.items() if value is not None}
    config = parse_block("monitor", MonitorConfig, own)
    batch = given.get("images") or cfg.optimizer.batch_size
    cfg.optimizer.batch_size = min(batch, available)
    model = load_method(pretrained, host)
    epoch = int(pretrained.checkpoint["epoch"])
    views = first_views(cfg, host, epoch)
    values = measure(model, host, views, config)
    images = min(config.images, len(views[0]))
    sample = {"images": images, "epoch": epoch, "seed": cfg.seed, "of": available}
    return Inspected(values, sample, model, views, monitor)
