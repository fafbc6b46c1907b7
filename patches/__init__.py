"""What solo-learn needs to run on today's stack.

One patch a fault, each looked for before it is mended. Nothing heavy is imported here: the patches
import what they need when they are called.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from iecl_solo.patches.checkpoints import PLAIN_CHECKPOINTS, RESUMED_BUFFERS
from iecl_solo.patches.configuration import DEVICE_COUNT
from iecl_solo.patches.few_classes import FEW_CLASSES
from iecl_solo.patches.imports import DISTUTILS, ONE_LIGHTNING, SCHEDULE
from iecl_solo.patches.lightning2 import (
    CLIP_GRADIENTS,
    TRAIN_BATCH_END,
    UMAP_LOADERS,
    VALIDATION_EPOCH_END,
)
from iecl_solo.patches.metrics import KNN_METRIC
from iecl_solo.patches.momentum import MOMENTUM_RATE, MOMENTUM_STEP
from iecl_solo.patches.no_cuda import NO_CUDA
from iecl_solo.patches.optimizer import LARS_CLOSURE
from iecl_solo.patches.patch import Applied, Patch, Stage
from iecl_solo.patches.trainer import TRAINER_ARGUMENTS
from iecl_solo.patches.whitening import WHITENING

__all__ = ["PATCHES", "Applied", "Patch", "after_import", "applied", "before_import", "for_script"]

# in the order in which they are applied
PATCHES = [
    ONE_LIGHTNING,
    SCHEDULE,
    DISTUTILS,
    VALIDATION_EPOCH_END,
    TRAIN_BATCH_END,
    CLIP_GRADIENTS,
    TRAINER_ARGUMENTS,
    UMAP_LOADERS,
    WHITENING,
    LARS_CLOSURE,
    KNN_METRIC,
    FEW_CLASSES,
    PLAIN_CHECKPOINTS,
    RESUMED_BUFFERS,
    MOMENTUM_RATE,
    MOMENTUM_STEP,
    DEVICE_COUNT,
    NO_CUDA,
]

_applied: dict[str, Applied] = {}


def _present(patch: Patch, solo_dir: Path) -> bool:
    try:
        return patch.present(solo_dir)
    except (ImportError, AttributeError):
        return False  # this solo-learn has nothing of the kind, so it has not the fault


def _apply(stage: Stage, solo_dir: Path) -> None:
    for patch in PATCHES:
        if patch.stage is stage and patch.name not in _applied and _present(patch, solo_dir):
            patch.apply()
            _applied[patch.name] = Applied(patch.name, patch.symptom)


def before_import(solo_dir: Path) -> None:
    """Mend what keeps the host in the folder ``solo_dir`` from being imported. Idempotent."""
    _apply(Stage.BEFORE_IMPORT, solo_dir)


def after_import() -> None:
    """Mend the host that this process has imported. Idempotent."""
    _apply(Stage.AFTER_IMPORT, Path(str(sys.modules["solo"].__file__)).parent)


def for_script() -> None:
    """Mend what only a host's or a user's own script runs into. Idempotent.

    Such a script may import Lightning before it imports solo, so the modules that the host needs
    must be there from the start.
    """
    spec = importlib.util.find_spec("solo")
    if spec is not None and spec.origin is not None:
        before_import(Path(spec.origin).parent)
    _apply(Stage.SCRIPT, Path())


def applied() -> list[Applied]:
    """What was mended in this process, in the order of ``PATCHES``."""
    return [_applied[patch.name] for patch in PATCHES if patch.name in _applied]
