"""Checkpoints that cannot be lost: written whole, checked when read, the one before kept."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from iecl_solo.errors import IECLError
from iecl_solo.files import replacing
from iecl_solo.solo.checkpoint import read_checkpoint


def older(path: Path) -> list[Path]:
    """The checkpoints of before the one at ``path``, newest first: ``path.1``, ``path.2``, ..."""
    numbered = {
        int(p.name.rpartition(".")[2]): p
        for p in path.parent.glob(f"{glob.escape(path.name)}.*")
        if p.name.rpartition(".")[2].isdigit()
    }
    return [numbered[n] for n in sorted(numbered)]


def write_checkpoint(checkpoint: dict[str, Any], path: Path, keep: int) -> None:
    """Write a checkpoint; at every moment one that can be read is on the disk.

    Those before it do not end in ``.ckpt``: the host's ``main_knn.py`` takes any file that does.

    Args:
        checkpoint: as Lightning makes it.
        path: where the newest one stands.
        keep: how many there may be, the newest one included.

    Raises:
        IECLError: one line, when it cannot be written; those on the disk are as they were.
    """
    with replacing(path) as part:
        # a Python file: torch's own writer hides a full disk behind an assertion
        with part.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's own, at the file's end, over the disk's
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
        if path.is_file():
            before = [path, *older(path)]
            for old in before[max(1, keep - 1) :]:
                old.unlink()
            if keep > 1:
                for number in range(min(len(before), keep - 1), 0, -1):
                    os.replace(before[number - 1], f"{path}.{number}")


def read_newest(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read, and what it holds; None if there is none at all.

    A damaged one is passed over and renamed to ``<name>.damaged``, which is said in one line: for
    the process that has claimed the run.

    Raises:
        IECLError: one line, when there are some and none can be read.
    """
    there = [p for p in (path, *older(path)) if p.is_file()]
    failed: IECLError | None = None
    for candidate in there:
        try:
            found = candidate, read_checkpoint(candidate)
        except IECLError as error:
            failed = failed or error
            continue
        if failed is not None and getattr(rank_zero_only, "rank", 0) == 0:
            for damaged in there[: there.index(candidate)]:
                os.replace(damaged, f"{damaged}.damaged")
            print(f"{failed}; going on from {candidate.name}", flush=True)
        return found
    if failed is not None:
        raise failed
    return None


class KeptCheckpoints(TorchCheckpointIO):
    """Lightning's way to the disk, by ``write_checkpoint`` and ``read_checkpoint``.

    Args:
        keep: how many checkpoints there may be, the newest one included.
        read: a checkpoint that is in memory already, and its path.
    """

    def __init__(self, keep: int, read: tuple[Path, dict[str, Any]] | None = None) -> None:
        self.keep = keep
        self._read = {} if read is None else {str(read[0]): read[1]}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        write_checkpoint(checkpoint, Path(path), self.keep)

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        found = self._read.pop(str(path), None)
        return read_checkpoint(path) if found is None else found
