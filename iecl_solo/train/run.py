"""A run's folder: its settings, its checkpoint, its result, and what may happen to them."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from iecl_solo.errors import IECLError
from iecl_solo.files import read_json, write_json
from iecl_solo.solo.config import flatten, plain
from iecl_solo.solo.host import Host
from iecl_solo.version import __version__

ARGS, RESULT = "args.json", "result.json"  # args.json is what the host's main_knn.py reads

_PACKAGES = ("torch", "torchvision", "lightning", "timm", "torchmetrics", "numpy")
# where a run lies and how fast it goes do not make it another run
_INDIFFERENT = ("checkpoint", "wandb_run_id", "data.num_workers", "versions")


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


class Run:
    """The folder of one pretraining run, ``<checkpoint.dir>/<method>/<name>``.

    Args:
        cfg: the completed configuration.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.folder = Path(cfg.checkpoint.dir) / cfg.method / cfg.name
        self.checkpoint = self.folder / f"{cfg.name}.ckpt"
        self.args: dict[str, Any] = plain(cfg)
        self._claimed = False

    @property
    def result(self) -> dict[str, Any] | None:
        """The finished run's result, None before it has finished."""
        path = self.folder / RESULT
        return read_json(path) if path.is_file() else None

    def claim(self, host: Host) -> None:
        """Make the folder this run's, or go on with it if it is.

        Raises:
            IECLError: when it holds a run with other settings, which must not be lost.
        """
        path = self.folder / ARGS
        if path.is_file():
            old, new = _given(read_json(path)), _given(self.args)
            for key in sorted({*old, *new}):
                if key.startswith(_INDIFFERENT) or old.get(key) == new.get(key):
                    continue
                raise IECLError(
                    f"{self.folder} holds a run with other settings ({key}: {old.get(key)!r} "
                    f"there, {new.get(key)!r} here); give another name=... or delete it"
                )
        else:
            write_json(path, {**self.args, "wandb_run_id": None, "versions": versions(host)})
        self._claimed = True

    def finish(self, result: Mapping[str, Any]) -> None:
        """Record the result; from now on the run is not trained again."""
        write_json(self.folder / RESULT, result)

    def discard_if_empty(self) -> None:
        """Leave nothing behind of a run that failed before its first checkpoint."""
        if not self._claimed or self.checkpoint.is_file():
            return
        for path in sorted(self.folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        if self.folder.is_dir():
            self.folder.rmdir()
