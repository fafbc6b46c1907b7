"""Modules that solo-learn 1.0.2 imports and that today's stack does not have. Before its import."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

from iecl_solo.patches.patch import Patch, Stage

_LIGHTNING = "lightning.pytorch"
_OLD_LIGHTNING = "pytorch_lightning"
_BOLTS = "pl_bolts.optimizers.lr_scheduler"


def _imports(solo_dir: Path, module: str) -> bool:
    """Whether any file of the host imports ``module``."""
    line = re.compile(rf"^\s*(?:import|from)\s+{module}\b", re.MULTILINE)
    return any(line.search(file.read_text("utf-8")) for file in solo_dir.rglob("*.py"))


def _offer(name: str, **attributes: object) -> None:
    """A module that is made here, and the packages above it, under ``name``."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:i]))
        module.__path__ = []
        sys.modules[module.__name__] = module
        if i > 1:
            setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], module)
    for attribute, value in attributes.items():
        setattr(sys.modules[name], attribute, value)


# --- pytorch_lightning -------------------------------------------------------------------------


def _lightning_is_another(solo_dir: Path) -> bool:
    if not _imports(solo_dir, _OLD_LIGHTNING):
        return False
    # a package of that name has classes of its own, though they are lightning.pytorch's copies
    return sys.modules.get(_OLD_LIGHTNING) is not importlib.import_module(_LIGHTNING)


def _alias_lightning() -> None:
    importlib.import_module(_LIGHTNING)
    for name in [n for n in sys.modules if n.split(".")[0] == _OLD_LIGHTNING]:
        del sys.modules[name]
    for name in [n for n in sys.modules if n == _LIGHTNING or n.startswith(_LIGHTNING + ".")]:
        sys.modules[_OLD_LIGHTNING + name.removeprefix(_LIGHTNING)] = sys.modules[name]


ONE_LIGHTNING = Patch(
    name="one-lightning",
    stage=Stage.BEFORE_IMPORT,
    versions="1.0.2",
    symptom="its methods are modules of pytorch_lightning, which lightning.pytorch's Trainer "
    "refuses; without that package it does not import",
    remedy="pytorch_lightning and its submodules are lightning.pytorch's",
    present=_lightning_is_another,
    apply=_alias_lightning,
)


# --- pl_bolts ----------------------------------------------------------------------------------


def _bolts_is_missing(solo_dir: Path) -> bool:
    if not _imports(solo_dir, "pl_bolts"):
        return False
    try:
        return not hasattr(importlib.import_module(_BOLTS), "LinearWarmupCosineAnnealingLR")
    except Exception:  # lightning-bolts fails in several ways beside today's Lightning
        return True


def _offer_schedule() -> None:
    from iecl_solo.patches.schedule import LinearWarmupCosineAnnealingLR

    _offer(_BOLTS, LinearWarmupCosineAnnealingLR=LinearWarmupCosineAnnealingLR)


SCHEDULE = Patch(
    name="warmup-cosine-schedule",
    stage=Stage.BEFORE_IMPORT,
    versions="1.0.2",
    symptom="it takes its schedule from lightning-bolts, which does not import beside Lightning 2",
    remedy="a module of that name offers iecl_solo.patches.schedule's",
    present=_bolts_is_missing,
    apply=_offer_schedule,
)


# --- distutils ---------------------------------------------------------------------------------


def strtobool(value: str) -> int:
    """1 for a word that says yes, 0 for one that says no; as distutils had it.

    Raises:
        ValueError: for any other word.

    Example:
        >>> strtobool("True"), strtobool("off")
        (1, 0)
    """
    word = value.lower()
    if word in ("y", "yes", "t", "true", "on", "1"):
        return 1
    if word in ("n", "no", "f", "false", "off", "0"):
        return 0
    raise ValueError(f"invalid truth value '{value}'")


def _distutils_is_missing(solo_dir: Path) -> bool:
    if not _imports(solo_dir, "distutils"):
        return False
    try:
        # the host imports the package alone, and reaches for its submodule
        return not hasattr(importlib.import_module("distutils"), "util")
    except ImportError:
        return True


def _offer_distutils() -> None:
    try:
        importlib.import_module("distutils.util")
    except ImportError:
        _offer("distutils.util", strtobool=strtobool)


DISTUTILS = Patch(
    name="distutils",
    stage=Stage.BEFORE_IMPORT,
    versions="1.0.2",
    symptom="dino uses distutils.util, which Python has no longer since 3.12",
    remedy="where setuptools offers no distutils either, a module of that name has strtobool",
    present=_distutils_is_missing,
    apply=_offer_distutils,
)
