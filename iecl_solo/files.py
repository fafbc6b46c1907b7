"""Files written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from iecl_solo.errors import CannotWrite, IECLError

_SUM = "sha256"


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


def _digest(data: Mapping[str, Any]) -> str:
    read = json.loads(json.dumps(_finite(data), allow_nan=False))  # keys are texts, tuples lists
    text = json.dumps(read, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_summed(path: Path, data: Mapping[str, Any]) -> None:
    """``write_json`` with a check sum in it.

    Raises:
        CannotWrite: one line, when the disk is full or cannot be written to.
    """
    write_json(path, {**data, _SUM: _digest(data)})


def read_summed(path: Path) -> dict[str, Any]:
    """What ``write_summed`` wrote; a file without a check sum, of an earlier version, is read too.

    Raises:
        IECLError: one line, if the file is not JSON, or not what was written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.json"
        >>> write_summed(path, {"acc1": 91.5})
        >>> _ = path.write_text(path.read_text().replace("91.5", "97.5"))
        >>> read_summed(path)
        Traceback (most recent call last):
        iecl_solo.errors.IECLError: ...: it is damaged: it is not what was written
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise IECLError(f"{path}: a JSON object is expected")
    written = data.pop(_SUM, None)
    if written is not None and written != _digest(data):
        raise IECLError(f"{path}: it is damaged: it is not what was written")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """Raises: IECLError, one line, if the file is not JSON."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise IECLError(f"{path}: not valid JSON ({error})") from None
