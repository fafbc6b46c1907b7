"""Pretrain a configuration once: what the host's main_pretrain.py does, on either solo-learn."""

from __future__ import annotations

import copy
import errno
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from iecl_solo.errors import CannotWrite, IECLError, one_line
from iecl_solo.order import seed_all, seeded
from iecl_solo.solo.build import build_model
from iecl_solo.solo.checkpoint import read_checkpoint
from iecl_solo.solo.config import parse_block, plain
from iecl_solo.solo.data import evaluation_datasets, evaluation_loader, pretrain_loader
from iecl_solo.solo.host import Host, find_host
from iecl_solo.solo.registry import split_method
from iecl_solo.solo.settings import device_count, process_count, too_few
from iecl_solo.train.callbacks.alike import Alike
from iecl_solo.train.callbacks.checkpoints import Checkpoints, progress_of
from iecl_solo.train.callbacks.collapse import Collapse
from iecl_solo.train.callbacks.cost import CostMonitor
from iecl_solo.train.callbacks.entropy_monitor import EntropyMonitor, MonitorConfig
from iecl_solo.train.callbacks.finite import Finite
from iecl_solo.train.callbacks.history import History
from iecl_solo.train.callbacks.seed import StepSeed
from iecl_solo.train.callbacks.terminal import Terminal, duration, figures, tell
from iecl_solo.train.callbacks.view_pictures import ViewPictures
from iecl_solo.train.checks import check_nodes, on_cpu
from iecl_solo.train.complete import complete, precision
from iecl_solo.train.keep import KeptCheckpoints, read_newest
from iecl_solo.train.processes import in_processes, launched, ranks
from iecl_solo.train.run import Run, versions
from iecl_solo.train.stop import Signals, noticed

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# what Lightning needs of a checkpoint in order to go on
_RESUMABLE = ("state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers")


def loggers(cfg: DictConfig, folder: Path, wandb_id: str | None = None) -> list[Logger]:
    """CSV unless it is switched off, TensorBoard and W&B if they are switched on.

    Each is told the whole configuration.

    Args:
        cfg: completed.
        folder: where they write.
        wandb_id: of a run that W&B may know already, and goes on with.
    """
    out: list[Logger] = []
    if OmegaConf.select(cfg, "csv.enabled", default=True):
        # a row is on the disk when it is logged: a kill takes none
        out.append(CSVLogger(folder, name="logs", flush_logs_every_n_steps=1))
    if OmegaConf.select(cfg, "tensorboard.enabled", default=False):
        from lightning.pytorch.loggers import TensorBoardLogger

        out.append(TensorBoardLogger(folder, name="tensorboard", default_hp_metric=False))
    if OmegaConf.select(cfg, "wandb.enabled", default=False):
        from lightning.pytorch.loggers import WandbLogger

        out.append(
            WandbLogger(
                name=cfg.name,
                project=cfg.wandb.project,
                entity=cfg.wandb.get("entity"),
                offline=cfg.wandb.get("offline", False),
                save_dir=folder,
                id=wandb_id,
                resume="allow",
            )
        )
    for logger in out:
        logger.log_hyperparams(plain(cfg))
    return out


def trainer_arguments(cfg: DictConfig) -> dict[str, Any]:
    """The entries of a configuration that Lightning's Trainer takes, as it wants them today."""
    allowed = inspect.signature(Trainer.__init__).parameters
    given = plain(cfg)
    kwargs = {name: given[name] for name in allowed if given.get(name) is not None}
    kwargs.setdefault("log_every_n_steps", 10)
    kwargs["precision"] = precision(cfg)
    if on_cpu(cfg):  # it counts processes there and refuses a list of indices
        kwargs["devices"] = device_count(cfg)
        if kwargs.pop("sync_batchnorm", False) and device_count(cfg) > 1:
            rank_zero_only(print)(
                "sync_batchnorm: only GPUs have it; a process on a CPU normalises its own batch"
            )
    if device_count(cfg) == 1 and kwargs.get("num_nodes", 1) == 1:
        # a process group of one costs its start-up and gives nothing
        kwargs["strategy"] = "auto"
        kwargs.pop("sync_batchnorm", None)
    return kwargs


def make_trainer(**arguments: Any) -> Trainer:
    """Lightning's Trainer.

    Raises:
        IECLError: one line with its reason, when it refuses an argument.
    """
    try:
        return Trainer(**arguments)
    except (MisconfigurationException, TypeError, ValueError) as error:
        said = f"Lightning's trainer refuses this configuration: {one_line(error)}"
        raise IECLError(said) from error


@contextmanager
def _interruptible(trainer: Trainer) -> Iterator[None]:
    """A signal stays what it was; Lightning exits or returns, by version."""
    stopped: BaseException | None = None
    try:
        yield
    except SystemExit as error:
        if not trainer.interrupted:
            raise
        stopped = error.__context__
    if trainer.interrupted:
        raise stopped if isinstance(stopped, KeyboardInterrupt) else KeyboardInterrupt


def _check_resumable(model: LightningModule, checkpoint: dict[str, Any], path: Path) -> None:
    """Raises: IECLError, one line, when Lightning could not go on from a checkpoint."""
    missing = [key for key in _RESUMABLE if key not in checkpoint]
    if missing:
        raise IECLError(f"checkpoint {path}: it holds no '{missing[0]}' to go on with")
    state = dict(checkpoint["state_dict"])
    model.on_load_checkpoint({**checkpoint, "state_dict": state})
    own = model.state_dict()
    for what, names in (("misses", own.keys() - state.keys()), ("adds", state.keys() - own.keys())):
        if names:
            raise IECLError(
                f"checkpoint {path}: it is of another model ({what} {len(names)} tensors, the "
                f"first is {min(names)})"
            )


def _validation(cfg: DictConfig, host: Host) -> DataLoader | None:
    if cfg.data.val_path is None or cfg.data.no_labels:
        return None
    size = cfg.augmentations[0].crop_size
    _, dataset = evaluation_datasets(host, cfg.data, image_size=size)
    return evaluation_loader(dataset, cfg.optimizer.batch_size, cfg.data.num_workers)


def _labelled(cfg: DictConfig) -> bool:
    """Whether the classes say anything: a single one, as of one folder of photos, does not."""
    return not cfg.data.no_labels and cfg.data.num_classes > 1


def _log_no_accuracy(model: LightningModule) -> None:
    """Keep the host's online classifier out of every log: of one class, it is always right."""
    log = model.log_dict

    def log_dict(metrics: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        of_classifier = re.compile("acc1|acc5|class_loss")
        log({k: v for k, v in metrics.items() if not of_classifier.search(k)}, *args, **kwargs)

    model.log_dict = log_dict  # type: ignore[method-assign, assignment]


def _about(cfg: DictConfig, host: Host, run: Run, *, images: int, at: tuple[int, int]) -> list[str]:
    """What is trained, on what, where and from where on."""
    device = "cpu" if on_cpu(cfg) else str(cfg.get("accelerator") or "auto")
    count = process_count(cfg)
    classes = f"{cfg.data.num_classes} classes" if _labelled(cfg) else "no labels"
    epoch, batches = at
    start = "from the start"
    if at != (0, 0):
        start = f"goes on at epoch {epoch + 1}" + (f", step {batches + 1}" if batches else "")
    lines = [
        f"{cfg.name}: {cfg.method} with {cfg.backbone.name} ({host.describe()}) on {count} "
        f"{device}, {cfg.precision}",
        f"{images} images, {classes}, {cfg.max_epochs} epoch{'s' * (cfg.max_epochs != 1)} in "
        f"batches of {cfg.optimizer.batch_size}; {start}; {run.folder}",
    ]
    plain_method = split_method(cfg.method)[1]
    if count > 1 and host.apart(plain_method):
        lines.append(
            f"{plain_method} of {host.describe()} compares with the images of its own process "
            f"alone: {count} processes of {cfg.optimizer.batch_size} are not one of "
            f"{count * cfg.optimizer.batch_size}"
        )
    warm = OmegaConf.select(cfg, "scheduler.warmup_epochs", default=0)
    if cfg.scheduler.name == "warmup_cosine" and warm > cfg.max_epochs:
        lines.append(
            f"scheduler.warmup_epochs: {warm} is more than max_epochs, {cfg.max_epochs}: the "
            "learning rate never reaches optimizer.lr"
        )
    return lines


def fit(
    cfg: DictConfig,
    host: Host,
    run: Run,
    *,
    callbacks: list[Callback] | None = None,
) -> tuple[LightningModule, Trainer]:
    """Train what a completed configuration says, from the run's last checkpoint if it has one.

    The run's folder is claimed once the model is built, so that a configuration that is refused
    leaves none. When this returns it is still claimed; when it raises it is released.
    """
    seed_everything(cfg.seed, workers=True, verbose=False)
    model = build_model(cfg, host)
    if not _labelled(cfg):
        _log_no_accuracy(model)
    run.claim(host)
    try:
        return model, _fit(cfg, host, run, model, callbacks or [])
    except BaseException:
        run.release()
        raise
    finally:
        if OmegaConf.select(cfg, "wandb.enabled", default=False):
            import wandb

            wandb.finish()  # or the next run of this process would log into this one


def _callbacks(
    cfg: DictConfig, host: Host, run: Run, about: list[str], signals: Signals
) -> list[Callback]:
    """What watches, logs and saves a run, in this order."""
    watching: list[Callback] = [Finite(lambda: run.kept)]
    if OmegaConf.select(cfg, "wandb.enabled", default=False):
        watching.append(LearningRateMonitor("step"))
    monitor = parse_block("monitor", MonitorConfig, cfg.get("monitor"))
    if monitor.every_n_epochs:
        watching.append(EntropyMonitor(host, monitor, run.folder / "monitor.csv"))
        watching.append(ViewPictures(monitor.every_n_epochs))
    terminal = Terminal(cfg.name, about, labelled=_labelled(cfg))
    watching += [Collapse(host, cfg.name), History(run.folder), terminal]
    if cfg.checkpoint.enabled:
        watching.append(
            Checkpoints(
                run.checkpoint,
                cfg.checkpoint.frequency,
                cfg.checkpoint.every_n_steps,
                signals,
                lambda: not run.lost,
            )
        )
    return watching


def _fit(
    cfg: DictConfig, host: Host, run: Run, model: LightningModule, callbacks: list[Callback]
) -> Trainer:
    if OmegaConf.select(cfg, "performance.compile", default=False):
        getattr(model, host.online).compile()
    train, order = seeded(pretrain_loader(cfg, host, lambda: model.device), cfg.seed)
    given = cfg.get("resume_from_checkpoint")
    found = read_newest(run.checkpoint)
    if given is not None and found is None:
        found = Path(given), read_checkpoint(given)
    epoch, batches = 0, 0
    if found is not None:
        _check_resumable(model, found[1], found[0])
        epoch, batches = progress_of(found[1])
    too_few(cfg, order.images, "that decode", process_count(cfg))
    order.resume(epoch, batches)
    about = _about(cfg, host, run, images=order.images, at=(epoch, batches))
    alike = Alike({"data.train_path": order.images, "optimizer.batch_size": order.batch_size})
    signals = Signals()
    watching = _callbacks(cfg, host, run, about, signals)
    trainer = make_trainer(
        **trainer_arguments(cfg)
        | {
            "logger": loggers(cfg, run.folder, run.wandb_id),
            "callbacks": [StepSeed(cfg.seed), alike, *callbacks, *watching],
            "plugins": [KeptCheckpoints(cfg.checkpoint.keep, found)],
            "enable_checkpointing": cfg.checkpoint.enabled,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    )
    seed_all(cfg.seed, epoch)
    with signals.taken(), _interruptible(trainer):
        trainer.fit(
            model,
            train,
            _validation(cfg, host),
            ckpt_path=None if found is None else str(found[0]),
        )
    return trainer


def _one_line(error: Exception, run: Run) -> Exception:
    """A disk that is full, in one line with what was kept; anything else as it is."""
    full = isinstance(error, OSError) and error.errno in _FULL
    if not (full or isinstance(error, CannotWrite) or "No space left on device" in str(error)):
        return error
    said = str(error).splitlines()[0]
    if isinstance(error, OSError):
        said = f"{error.filename or run.folder}: it cannot be written ({error.strerror})"
    return IECLError(f"{said}. {run.kept}The same command goes on when there is room")


def _rank(settings: dict[str, Any]) -> None:
    cfg = OmegaConf.create(settings)
    assert isinstance(cfg, DictConfig)
    pretrain(cfg)
    if dist.is_initialized():
        dist.barrier()  # whoever leaves first takes the store away that the others meet at


def pretrain(cfg: DictConfig) -> Run:
    """Pretrain a configuration, once: a finished run is left as it is.

    With several devices it trains in one fresh process for each, whatever this one is: a command, a
    launcher's worker, a notebook. Under torchrun and SLURM's tasks it is one of them itself.

    Args:
        cfg: in solo-learn's schema, as composed.

    Returns:
        The run, whose ``result`` is there.

    Raises:
        IECLError: one line for whatever the configuration gets wrong.
        Stopped: when a signal ended the run; it is saved.
    """
    with noticed():  # a job may be told before its first step, and after its last
        return _pretrain(cfg)


def _pretrain(cfg: DictConfig) -> Run:
    host = find_host()
    given = copy.deepcopy(cfg)
    cfg = complete(cfg, host)
    run = Run(cfg)
    if run.result is not None:
        run.check()
        print(f"{run.folder} is trained already", flush=True)
        return run
    check_nodes(cfg)
    devices = device_count(cfg)
    if devices > 1 and not launched():
        in_processes(_rank, plain(given), environments=ranks(devices, cfg.num_nodes))
        return run
    cost = CostMonitor()
    try:
        model, trainer = fit(cfg, host, run, callbacks=[cost])
        history = next(c for c in trainer.callbacks if isinstance(c, History))  # type: ignore[attr-defined]
        metrics = history.last | {k: float(v) for k, v in trainer.callback_metrics.items()}
        run.finish(
            {
                "method": cfg.method,
                "name": cfg.name,
                "checkpoint": str(run.checkpoint),
                "seconds": cost.seconds,
                "device": str(model.device),
                **cost.summary(model),
                "metrics": metrics,
                "versions": versions(host),
            }
        )
        if trainer.is_global_zero:
            said = figures(metrics, labelled=_labelled(cfg))
            tell(f"{cfg.name}  trained in {duration(cost.seconds)}  {said}")
    except Exception as error:
        told = _one_line(error, run)
        if told is error:
            raise
        raise told from None
    finally:
        run.release()
    return run
