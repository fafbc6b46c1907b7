"""What a run needs of this machine and of its data, checked before any work."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from iecl_solo import devices
from iecl_solo.checks import installed
from iecl_solo.errors import IECLError
from iecl_solo.solo.settings import FOLDER_DATASETS, device_count
from iecl_solo.train.processes import launched, variables

#: More processes than this only take each other's cores; 999 would take all memory first.
MOST_PROCESSES = max(16, 4 * (os.cpu_count() or 1))

#: Loggers that are named as the module that each needs, and as the extra that brings it.
_LOGGERS = ("tensorboard", "wandb")


def on_cpu(cfg: DictConfig) -> bool:
    """Whether a configuration trains on the CPU of this machine."""
    return devices.on_cpu(cfg.get("accelerator") or "auto")


def check_device_count(cfg: DictConfig) -> None:
    """Refuse more GPUs than this machine has, or more processes than its CPU can serve.

    Raises:
        IECLError: one line with their number.
    """
    there = torch.cuda.device_count()
    asked = cfg.get("accelerator") in ("gpu", "cuda") and there > 0
    if asked and device_count(cfg) > there:
        raise IECLError(f"devices: {cfg.devices} is more than the {there} of this machine")
    if on_cpu(cfg) and device_count(cfg) > MOST_PROCESSES:
        raise IECLError(
            f"devices: {cfg.devices} is more than the {MOST_PROCESSES} processes that this "
            "machine's CPU is given"
        )


def check_nodes(cfg: DictConfig) -> None:
    """Refuse a run on several machines that was started on one: it would wait for the others.

    Raises:
        IECLError: one line with what each machine needs.
    """
    nodes = int(cfg.get("num_nodes") or 1)
    if nodes > 1 and not launched() and "MASTER_ADDR" not in os.environ:
        raise IECLError(
            f"num_nodes: {nodes} machines, and nothing says where the first one is: start it by "
            "torchrun or SLURM, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each"
        )


def check_loggers(cfg: DictConfig) -> None:
    """Refuse a logger that is not installed, or that nobody is logged in to.

    Raises:
        IECLError: one line with the command that helps.
    """
    for name in _LOGGERS:
        if OmegaConf.select(cfg, f"{name}.enabled", default=False) and not installed(name):
            raise IECLError(
                f"{name}.enabled: {name} is not installed: pip install 'iecl-solo[{name}]'"
            )
    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    if not OmegaConf.select(cfg, "wandb.enabled", default=False) or offline:
        return
    if not cfg.wandb.get("offline", False) and not _logged_in():
        raise IECLError(
            "wandb.enabled: nobody is logged in: wandb login, or wandb.offline=true for later"
        )


def _logged_in() -> bool:
    import wandb

    if "prompt" not in inspect.signature(wandb.login).parameters:
        return wandb.api.api_key is not None  # newer versions let go of it
    if wandb.run is not None:  # an agent's, say: with one, login says no
        return True
    try:
        # one that is not silent asks its server whose key it is, and may wait for it for ever
        with variables({"WANDB_SILENT": "true"}):
            return bool(wandb.login(prompt=False, verify=False))
    finally:
        wandb.teardown()  # it keeps the environment of now: silent, and never offline


def check_classes(cfg: DictConfig) -> None:
    """Refuse folders whose classes are not the same, as when one is a folder too high.

    Raises:
        IECLError: one line with a class that the training set lacks.
    """
    data = cfg.data
    if data.dataset not in FOLDER_DATASETS or data.get("no_labels") or not data.get("val_path"):
        return
    if data.get("format", "image_folder") != "image_folder":
        return
    train, val = (
        {entry.name for entry in Path(path).expanduser().iterdir() if entry.is_dir()}
        for path in (data.train_path, data.val_path)
    )
    extra = sorted(val - train)
    if not extra:
        return
    below = sorted(train, key=lambda name: (not name.startswith("train"), name))
    inside = [name for name in below if (Path(data.train_path) / name / extra[0]).is_dir()]
    hint = f"; is it data.train_path={data.train_path}/{inside[0]}?" if inside else ""
    raise IECLError(
        f"data.val_path: its class '{extra[0]}' is none of the {len(train)} of data.train_path "
        f"({', '.join(sorted(train)[:4])}{', ...' * (len(train) > 4)}){hint}"
    )
