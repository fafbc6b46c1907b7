"""Files written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iecl_solo.errors import IECLError


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=2) + "\n")
    os.replace(part, path)


def read_json(path: Path) -> dict[str, Any]:
    """Raises: IECLError, one line, if the file is not JSON."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise IECLError(f"{path}: not valid JSON ({error})") from None
