"""Files written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from iecl_solo.errors import CannotWrite, IECLError


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a power cut, where its file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, unless they are there.

    Raises:
        IECLError: one line, when it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IECLError(f"{path}: it cannot be made ({error.strerror or error})") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what is to stand at ``path``, once it is whole and on the disk.

    Of several processes that write one path at once, the last one's file stands, whole.

    Raises:
        CannotWrite: one line, when the disk is full or cannot be written to; ``path`` is then what
            it was, and nothing stands beside it.
    """
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CannotWrite(f"{path}: it cannot be written ({error.strerror or error})") from None
        raise
    sync_folder(path.parent)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write whole or not at all; a number that is not finite is written as null.

    Raises:
        CannotWrite: one line, when the disk is full or cannot be written to.
    """
    text = json.dumps(_finite(data), indent=2, allow_nan=False)
    with replacing(path) as part:
        part.write_text(text + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Raises: IECLError, one line, if the file is not JSON."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise IECLError(f"{path}: not valid JSON ({error})") from None
