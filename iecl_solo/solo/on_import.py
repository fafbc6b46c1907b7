"""Register with solo-learn the moment it is imported, in whatever order the imports come.

Importing solo-learn takes seconds and needs its patches in place beforehand; ``import iecl_solo``
should take neither. So it leaves a note on ``sys.meta_path``.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import iecl_solo.patches as patches


def _finish() -> None:
    patches.after_import()
    from iecl_solo.solo.registry import register

    register()


class _SoloFinder(MetaPathFinder):
    """Finds ``solo`` as the other finders do, and acts before and after it is executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "solo":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None or spec.origin is None:
            return spec
        solo_dir, exec_module = Path(spec.origin).parent, spec.loader.exec_module

        def patched_exec(module: ModuleType) -> None:
            patches.before_import(solo_dir)
            exec_module(module)
            _finish()

        spec.loader.exec_module = patched_exec  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register now if solo-learn is imported already, else when it is. Idempotent."""
    if "solo.methods" in sys.modules:
        _finish()
    elif not any(isinstance(finder, _SoloFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _SoloFinder())
