"""Every example in a docstring runs and prints what it says; the floors keep their order."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import iecl_solo.patches
import pytest
import torch

import iecl_solo

ROOT = Path(iecl_solo.__file__).parent
PATCHES = Path(iecl_solo.patches.__file__).parent
MODULES = sorted(
    {
        ".".join(("iecl_solo", *path.relative_to(root).with_suffix("").parts)).removesuffix(
            ".__init__"
        )
        for root, folder in ((ROOT, ROOT), (PATCHES.parent, PATCHES))
        for path in folder.rglob("*.py")
        if path.name != "__main__.py"
    }
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str):
    torch.manual_seed(0)  # what an example draws is not what the test before it left behind
    module = importlib.import_module(name)
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
    result = doctest.testmod(module, optionflags=options, extraglobs=vars(module))
    assert result.failed == 0


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


GROUND = ["saib.py", "entropy.py", "jacobian.py", "lipschitz.py"]
GROUND += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "losses").glob("*.py"))


@pytest.mark.parametrize("name", GROUND)
def test_ground_floor_is_mathematics_alone(name: str):
    allowed = ("torch", "einops", "iecl_solo.errors", "iecl_solo.entropy", "safetensors")
    allowed += ("iecl_solo.losses",)
    standard = ("math", "json", "os", "collections", "contextlib", "dataclasses", "functools")
    standard += ("typing", "inspect", "itertools", "warnings", "operator", "__future__")
    strangers = {i for i in imports(ROOT / name) if not i.startswith(allowed + standard)}
    assert strangers == set()


def test_only_the_bridge_imports_the_host():
    strangers = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if "solo" not in path.relative_to(ROOT).parts[:-1]
        and any(i == "solo" or i.startswith("solo.") for i in imports(path))
    }
    assert strangers == set()


def test_objectives_know_nothing_above_them():
    for path in (ROOT / "objectives").glob("*.py"):
        assert not any(
            i.startswith(("iecl_solo.solo", "iecl_solo.cli", "lightning", "hydra", "omegaconf"))
            for i in imports(path)
        )
