"""What a patch is: one fault of solo-learn on today's stack, and how it is mended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple


class Stage(Enum):
    """When a patch is applied."""

    BEFORE_IMPORT = "before solo is imported"
    AFTER_IMPORT = "after solo is imported"
    SCRIPT = "in a script run through python -m iecl_solo"


@dataclass(frozen=True)
class Patch:
    """One fault and its remedy.

    Attributes:
        name: unique among all patches.
        stage: when it is looked for and mended.
        versions: the solo-learns that were seen to have it; told to people, never tested for.
        symptom: how it shows.
        remedy: what is done about it.
        present: whether the fault is really there, given the folder of the package ``solo``.
        apply: mends it. Called once in a process, only where ``present`` said yes.
    """

    name: str
    stage: Stage
    versions: str
    symptom: str
    remedy: str
    present: Callable[[Path], bool]
    apply: Callable[[], None]


class Applied(NamedTuple):
    """What was mended in this process, and why."""

    name: str
    why: str
