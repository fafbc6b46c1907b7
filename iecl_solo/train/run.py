"""A run's folder: its settings, its checkpoint, its result, and what may happen to them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from iecl_solo.errors import IECLError
from iecl_solo.files import make_folder, read_json, write_json
from iecl_solo.solo.config import flatten, plain
from iecl_solo.solo.host import Host
from iecl_solo.version import __version__

ARGS, RESULT = "args.json", "result.json"  # args.json is what the host's main_knn.py reads

#: Seconds without a sign of life after which a run on another machine counts as dead.
LEASE = 60.0

_LOCK = ".lock"
# what training writes into a run's folder before its first checkpoint
_WRITTEN = (
    *(ARGS, "monitor.csv", "saib-epoch-*.safetensors", "*.part"),
    *("logs/version_*/metrics.csv", "logs/version_*/hparams.yaml"),
    *("tensorboard/version_*/events.out.tfevents.*", "tensorboard/version_*/hparams.yaml"),
    "wandb/**/*",
)

_PACKAGES = ("torch", "torchvision", "lightning", "timm", "torchmetrics", "numpy")
# where a run lies and how fast it goes do not make it another run
_INDIFFERENT = ("checkpoint", "wandb_run_id", "data.num_workers", "monitor.share", "versions")


def versions(host: Host) -> dict[str, str]:
    """Versions of everything that a figure depends on."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "iecl-solo": __version__,
        "solo-learn": host.version,
        "python": platform.python_version(),
        **found,
    }


def _given(data: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key; an empty block says nothing."""
    return {key: value for key, value in flatten(data).items() if value != {}}


def check_name(name: object) -> str:
    """A run's name: one or more path components below ``checkpoint.dir``, never outside it.

    Raises:
        IECLError: one line, for a name that is absolute, empty or climbs.

    >>> check_name("exp1/seed0")
    'exp1/seed0'
    >>> check_name("../seed0")
    Traceback (most recent call last):
    iecl_solo.errors.IECLError: name: '../seed0' is not allowed, 'seed0' or 'exp1/seed0' is: ...
    """
    parts = str(name).split("/")
    if not isinstance(name, (str, int)) or any(
        p in ("", ".", "..") or "\\" in p or not p.isprintable() for p in parts
    ):
        raise IECLError(
            f"name: {str(name)!r} is not allowed, 'seed0' or 'exp1/seed0' is: "
            "one or more folders below checkpoint.dir"
        )
    if longest := max((p for p in parts if len(p.encode()) > 200), key=len, default=""):
        raise IECLError(f"name: {longest[:20]!r}... is longer than the 200 bytes of a file's name")
    return str(name)


class Run:
    """The folder of one pretraining run, ``<checkpoint.dir>/<method>/<name>``.

    One process trains in it at a time: the one that has claimed it. Under several devices that is
    rank zero, and ``claim``, ``finish`` and ``release`` do nothing on the others.

    Args:
        cfg: the completed configuration.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.folder = Path(cfg.checkpoint.dir) / cfg.method / cfg.name
        self.checkpoint = self.folder / f"{self.folder.name}.ckpt"
        self.args: dict[str, Any] = plain(cfg)
        self._lock: SoftFileLease | None = None
        # what stood in the folder before this process made the run; None if it did not make it
        self._found: set[Path] | None = None

    @property
    def result(self) -> dict[str, Any] | None:
        """The finished run's result, None before it has finished."""
        path = self.folder / RESULT
        return read_json(path) if path.is_file() else None

    def check(self) -> None:
        """Refuse a folder that holds a run with other settings, which must not be lost.

        What died before its first checkpoint is no run: nothing of it can be lost.

        Raises:
            IECLError: one line with the first setting that differs.
        """
        path = self.folder / ARGS
        if not path.is_file() or self._died_at_once:
            return
        old, new = _given(read_json(path)), _given(self.args)
        for key in sorted({*old, *new}):
            if key.startswith(_INDIFFERENT) or old.get(key) == new.get(key):
                continue
            raise IECLError(
                f"{self.folder} holds a run with other settings ({key}: {old.get(key)!r} "
                f"there, {new.get(key)!r} here); give another name=... or delete it"
            )

    @property
    def _died_at_once(self) -> bool:
        return not self.has_checkpoint and not (self.folder / RESULT).is_file()

    @rank_zero_only
    def claim(self, host: Host) -> None:
        """Make the folder this process's, or go on with the run that is in it.

        Raises:
            IECLError: when it holds a run with other settings, or another process trains in it.
        """
        self.check()
        make_folder(self.folder)
        self._acquire()
        self.check()  # of what the other process may have written meanwhile
        for part in self.folder.glob("*.part"):  # of a process that was killed as it wrote
            part.unlink()
        path = self.folder / ARGS
        if not path.is_file() or self._died_at_once:
            self._found = {p for p in self.folder.rglob("*") if p.name != _LOCK}
            logs = bool((self.args.get("wandb") or {}).get("enabled"))
            wandb_id = secrets.token_hex(4) if logs else None
            write_json(path, {**self.args, "wandb_run_id": wandb_id, "versions": versions(host)})

    def _acquire(self) -> None:
        """Take the folder's lock; that of a process that is dead is taken over.

        A file with its owner's name rather than a lock of the kernel's: it holds on NFS, and
        between machines. On this machine the owner is looked up; of another one the file must go
        without a sign of life for ``LEASE`` seconds.
        """
        lock = SoftFileLease(self.folder / _LOCK, lease_duration=LEASE, is_singleton=False)
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                owner = lock.owner
                with SoftFileLease(self.folder / f"{_LOCK}.{os.getpid()}") as own:
                    here = own.owner
                if owner is None or here is None or owner.hostname == here.hostname:
                    raise
                print(
                    f"{self.folder}: process {owner.pid} on {owner.hostname} trains here; "
                    f"waiting up to {1.5 * LEASE:.0f} s for a sign of its life",
                    flush=True,
                )
                lock.acquire(timeout=1.5 * LEASE)
        except (Timeout, LeaseSettingsMismatch):
            owner = lock.owner
            who = f"process {owner.pid} on {owner.hostname}" if owner else "another process"
            raise IECLError(
                f"{self.folder} is being trained by {who}; "
                "wait until that has ended, or give another name=..."
            ) from None
        self._lock = lock

    @property
    def wandb_id(self) -> str | None:
        """By which W&B knows the run, on all its legs."""
        path = self.folder / ARGS
        return read_json(path).get("wandb_run_id") if path.is_file() else None

    @property
    def kept(self) -> str:
        """One sentence about the newest checkpoint, for the line that a run ends with."""
        if self.checkpoint.is_file():
            return f"Kept: {self.checkpoint}. "
        return "There is no checkpoint yet. "

    @property
    def lost(self) -> bool:
        """Whether another process has taken the folder, this one having been suspended."""
        return self._lock is not None and self._lock.compromise is not None

    @rank_zero_only
    def finish(self, result: Mapping[str, Any]) -> None:
        """Record the result; from now on the run is not trained again."""
        write_json(self.folder / RESULT, result)

    @rank_zero_only
    def release(self) -> None:
        """Let others train in the folder; of a run without a checkpoint leave nothing behind.

        Only files that this process wrote are removed: those which a run writes, in a run that
        this process began, and that were not there before.
        """
        if self._lock is None:
            return
        empty = self._found is not None and not (self.lost or self.has_checkpoint or self.result)
        if empty:
            self._remove_own(self._found or ())
        self._lock.release()
        self._lock = None
        if empty:
            with suppress(OSError):  # another process may be in it already
                self.folder.rmdir()

    @property
    def has_checkpoint(self) -> bool:
        """Whether a checkpoint of any age is there."""
        return any(self.folder.glob("*.ckpt*"))

    def _remove_own(self, found: Iterable[Path]) -> None:
        new = {p for pattern in _WRITTEN for p in self.folder.glob(pattern)} - set(found)
        for path in new:
            if not path.is_dir():
                path.unlink(missing_ok=True)
        folders = {d for p in new for d in (p, *p.parents) if d.is_dir()} - set(found)
        for folder in sorted(folders, key=lambda f: len(f.parts), reverse=True):
            if self.folder in folder.parents:
                with suppress(OSError):  # not empty: something else's
                    folder.rmdir()
