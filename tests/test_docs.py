"""Every example in a docstring runs and prints what it says; the floors keep their order."""

from __future__ import annotations

import ast
import csv
import doctest
import importlib
import re
import sys
import tempfile
from pathlib import Path

import iecl_solo.patches
import pytest
import torch
from support import script

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
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where they leave what they write
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
            if node.module == "iecl_solo":
                found |= {f"iecl_solo.{alias.name}" for alias in node.names}
    return found


#: The floors, lowest first: what stands on one imports from its own and from those below.
FLOORS = (
    ("errors", "checks", "devices", "version", "files", "quiet", "images", "decoded", "order",
     "views", "distributed", "precision", "saib", "entropy", "jacobian", "generation", "lipschitz",
     "losses", "augment", "digits", "patches", "configs"),
    ("objectives", "methods"),
    ("solo",),
    ("train",),
    ("evaluate", "experiments", "report"),
    ("cli",),
)  # fmt: skip
#: Within the floor of what is made of runs the arrows go one way too.
ORDER = ("evaluate", "experiments", "report")
MATHEMATICS = (
    "distributed", "precision", "saib", "entropy", "jacobian", "generation", "lipschitz", "losses"
)  # fmt: skip


def floor(package: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if package in names)


def own_imports(path: Path) -> set[str]:
    """First names below iecl_solo that a file imports."""
    return {i.split(".")[1] for i in imports(path) if i.startswith("iecl_solo.")}


def files_of(package: str) -> list[Path]:
    one = ROOT / f"{package}.py"
    folder = PATCHES if package == "patches" else ROOT / package
    return [one] if one.is_file() else sorted(folder.rglob("*.py"))


def test_every_package_has_its_floor():
    there = {p.stem for p in ROOT.glob("*.py")} | {
        p.name for p in ROOT.iterdir() if (p / "__init__.py").is_file()
    }
    named = {name for names in FLOORS for name in names}
    assert there - {"__init__", "__main__"} <= named
    assert all(files_of(name) for name in named - {"configs"})


@pytest.mark.parametrize("package", [name for names in FLOORS for name in names])
def test_no_floor_imports_a_higher_one(package: str):
    for path in files_of(package):
        for other in own_imports(path):
            assert floor(other) <= floor(package), f"{path} imports iecl_solo.{other}"
            if package in ORDER and other in ORDER:
                assert ORDER.index(other) <= ORDER.index(package), f"{path} imports {other}"


@pytest.mark.parametrize("package", MATHEMATICS)
def test_mathematics_stands_alone(package: str):
    allowed = ("torch", "einops", "safetensors", "iecl_solo.errors", "iecl_solo.checks")
    allowed += tuple(f"iecl_solo.{name}" for name in MATHEMATICS)
    for path in files_of(package):
        foreign = {i for i in imports(path) if i.split(".")[0] not in sys.stdlib_module_names}
        assert {i for i in foreign if not i.startswith(allowed)} <= {"iecl_solo"}


def test_only_the_bridge_imports_the_host():
    strangers = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if "solo" not in path.relative_to(ROOT).parts[:-1]
        and any(i == "solo" or i.startswith("solo.") for i in imports(path))
    }
    assert strangers == set()


@pytest.mark.parametrize("package", FLOORS[1])
def test_objectives_know_no_framework(package: str):
    for path in files_of(package):
        assert not any(i.startswith(("lightning", "hydra", "omegaconf")) for i in imports(path))


def test_the_list_of_what_users_type_names_tests_that_are_there():
    root = Path(__file__).parents[1]
    with (root / "docs/rows/users.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 50 and all(row["command"] and row["now"] for row in rows)
    named = [name for row in rows for name in re.findall(r"tests/[^\s;]+", row["test"])]
    assert len(named) >= len(rows) - 1
    for name in named:
        path, _, test = name.partition("::")
        assert not test or f"def {test.partition('[')[0]}(" in (root / path).read_text(), name


def test_lower_bounds_are_those_of_the_version_matrix():
    """A row that works has them, and CONTRIBUTING.md's table is the rows."""
    checkout = ROOT.parent
    matrix = script(checkout / "studies/version_matrix.py")
    with (checkout / "docs/rows/version_matrix.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    page = (checkout / "CONTRIBUTING.md").read_text()
    for row in rows:
        cells = [row["python"], row["column"], *(row[name] for name in matrix.LIBRARIES)]
        assert f"| {' | '.join(cells)} | {row['works']}" in page
    (oldest,) = (row for row in rows if (row["python"], row["column"]) == ("3.10", "oldest"))
    assert oldest["works"] == "yes"
    bounds = matrix.lower_bounds()
    for name in matrix.LIBRARIES:
        low, tried = bounds[name].split("."), oldest[name].split(".")
        assert tried[: len(low)] == low and set(tried[len(low) :]) <= {"0"}, name
