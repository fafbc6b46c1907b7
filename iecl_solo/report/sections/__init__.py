"""The page's sections, one file each; a file that is put here is a section, with no list to join.

A file defines ``sections(results)``, which returns what it has to say of a store's rows; a section
that is empty is left out. A ``Section`` says where it stands by its ``place``.
"""

from __future__ import annotations

import importlib
import pkgutil

from iecl_solo.report.results import Results
from iecl_solo.report.section import Section


def all_sections(results: Results) -> list[Section]:
    """What every file of this folder has to say, in the page's order."""
    found: list[Section] = []
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        found += importlib.import_module(f"{__name__}.{name}").sections(results)
    found = [s for s in found if s.words or s.tables or s.pictures or s.folded]
    return sorted(found, key=lambda section: section.place)
