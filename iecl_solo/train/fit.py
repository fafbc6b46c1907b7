"""Pretrain a configuration once: what the host's main_pretrain.py does, on either solo-learn."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from omegaconf import DictConfig, OmegaConf

from iecl_solo.solo.build import build_model
from iecl_solo.solo.checkpoint import read_checkpoint
from iecl_solo.solo.config import parse_block, plain
from iecl_solo.solo.data import evaluation_datasets, evaluation_loader, pretrain_loader
from iecl_solo.solo.host import Host, find_host
from iecl_solo.solo.settings import device_count
from iecl_solo.train.callbacks.cost import CostMonitor
from iecl_solo.train.callbacks.entropy_monitor import EntropyMonitor, MonitorConfig
from iecl_solo.train.callbacks.epoch_line import EpochLine
from iecl_solo.train.callbacks.seed import EpochSeed, seed_epoch
from iecl_solo.train.complete import complete
from iecl_solo.train.run import Run, versions


def loggers(cfg: DictConfig, folder: Path) -> list[Logger]:
    """CSV unless it is switched off, TensorBoard and W&B if they are switched on."""
    out: list[Logger] = []
    if OmegaConf.select(cfg, "csv.enabled", default=True):
        out.append(CSVLogger(folder, name="logs"))
    if OmegaConf.select(cfg, "tensorboard.enabled", default=False):
        from lightning.pytorch.loggers import TensorBoardLogger

        out.append(TensorBoardLogger(folder, name="tensorboard"))
    if OmegaConf.select(cfg, "wandb.enabled", default=False):
        from lightning.pytorch.loggers import WandbLogger

        out.append(
            WandbLogger(
                name=cfg.name,
                project=cfg.wandb.project,
                entity=cfg.wandb.get("entity"),
                offline=cfg.wandb.get("offline", False),
                save_dir=folder,
            )
        )
    return out


def trainer_arguments(cfg: DictConfig) -> dict[str, Any]:
    """The entries of a configuration that Lightning's Trainer takes, as it wants them today."""
    allowed = inspect.signature(Trainer.__init__).parameters
    given = plain(cfg)
    kwargs = {name: given[name] for name in allowed if given.get(name) is not None}
    kwargs.setdefault("log_every_n_steps", 10)
    accelerator = kwargs.get("accelerator", "auto")
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    if on_cpu:  # it counts processes there and refuses a list of indices
        kwargs["devices"] = device_count(cfg)
    if device_count(cfg) == 1 and kwargs.get("num_nodes", 1) == 1:
        # a process group of one costs its start-up and gives nothing
        kwargs["strategy"] = "auto"
        kwargs.pop("sync_batchnorm", None)
    return kwargs


@contextmanager
def _interruptible(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C stays a KeyboardInterrupt; Lightning exits or returns, by version."""
    try:
        yield
    except SystemExit:
        if not trainer.interrupted:
            raise
    if trainer.interrupted:
        raise KeyboardInterrupt


def fit(
    cfg: DictConfig,
    host: Host,
    run: Run,
    *,
    callbacks: list[Callback] | None = None,
) -> tuple[LightningModule, Trainer]:
    """Train what a completed configuration says, from the run's last checkpoint if it has one.

    The run's folder is claimed once the model is built, so that a configuration that is refused
    leaves none.
    """
    seed_everything(cfg.seed, workers=True, verbose=False)
    model = build_model(cfg, host)
    run.claim(host)
    if OmegaConf.select(cfg, "performance.compile", default=False):
        getattr(model, host.online).compile()
    train = pretrain_loader(cfg, host)
    val = None
    if cfg.data.val_path is not None and not cfg.data.no_labels:
        _, val_set = evaluation_datasets(
            host,
            cfg.data.dataset,
            cfg.data.train_path,
            cfg.data.val_path,
            image_size=cfg.augmentations[0].crop_size,
            data_format=cfg.data.format,
        )
        val = evaluation_loader(val_set, cfg.optimizer.batch_size, cfg.data.num_workers)
    keep: list[Callback] = [EpochSeed(cfg.seed), *(callbacks or [])]
    if cfg.checkpoint.enabled:
        keep.append(
            ModelCheckpoint(
                run.folder,
                filename=run.checkpoint.stem,
                every_n_epochs=cfg.checkpoint.frequency,
                save_on_train_epoch_end=True,
                enable_version_counter=False,
            )
        )
    if OmegaConf.select(cfg, "wandb.enabled", default=False):
        keep.append(LearningRateMonitor("step"))
    monitor = parse_block("monitor", MonitorConfig, cfg.get("monitor"))
    if monitor.every_n_epochs:
        keep.append(EntropyMonitor(host, monitor, run.folder / "monitor.csv"))
    bar = sys.stderr.isatty()
    if not bar:
        keep.append(EpochLine(cfg.name))
    resume: str | None = cfg.get("resume_from_checkpoint")
    if resume is None and run.checkpoint.is_file():
        resume = str(run.checkpoint)
    first_epoch = 0
    if resume is not None:  # a truncated file is refused in one line, before any work
        first_epoch = int(read_checkpoint(resume).get("epoch", -1)) + 1
    trainer = Trainer(
        **trainer_arguments(cfg)
        | {
            "logger": loggers(cfg, run.folder),
            "callbacks": keep,
            "enable_checkpointing": cfg.checkpoint.enabled,
            "enable_progress_bar": bar,
            "enable_model_summary": False,
        },
    )
    seed_epoch(cfg.seed, first_epoch)
    with _interruptible(trainer):
        trainer.fit(model, train, val, ckpt_path=resume)
    return model, trainer


def pretrain(cfg: DictConfig) -> Run:
    """Pretrain a configuration, once: a finished run is left as it is.

    Args:
        cfg: in solo-learn's schema, as composed.

    Returns:
        The run, whose ``result`` is there.

    Raises:
        IECLError: one line for whatever the configuration gets wrong.
    """
    host = find_host()
    cfg = complete(cfg, host)
    run = Run(cfg)
    if run.result is not None:
        run.claim(host)  # refused if the result is of other settings
        print(f"{run.folder} is trained already", flush=True)
        return run
    cost = CostMonitor()
    start = time.perf_counter()
    try:
        model, trainer = fit(cfg, host, run, callbacks=[cost])
    except BaseException:
        run.discard_if_empty()
        raise
    if trainer.is_global_zero:
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        run.finish(
            {
                "method": cfg.method,
                "name": cfg.name,
                "checkpoint": str(run.checkpoint),
                "seconds": time.perf_counter() - start,
                "device": str(model.device),
                **cost.summary(model),
                "metrics": metrics,
                "versions": versions(host),
            }
        )
    return run
