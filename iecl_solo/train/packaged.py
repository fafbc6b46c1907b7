"""Names of the packaged configurations. Imports nothing heavy, so that help is quick."""

from __future__ import annotations

from iecl_solo.configs import names, variant
from iecl_solo.errors import unknown_name

PACKAGED = "pkg://iecl_solo.configs"


def packaged_configs(folder: str) -> list[str]:
    """Names that ``--config-name`` takes for a command whose configs are in ``folder``."""
    return names(folder)


def check_packaged(folder: str, name: str) -> None:
    """Raise one line, with the nearest name, unless there is such a packaged configuration.

    There are more variants than are listed: those with several objectives.
    """
    listed = packaged_configs(folder)
    if name not in listed and variant(f"{folder}/{name}") is None:
        raise unknown_name("config", name, listed)
