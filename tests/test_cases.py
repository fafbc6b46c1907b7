"""studies/cases.py: its rows are those of its cases, what it names is there, and it can say no."""

from __future__ import annotations

import ast
import csv
from pathlib import Path
from types import ModuleType

import pytest
from support import script

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "docs/rows/cases.csv"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return script(ROOT / "studies/cases.py")


def test_the_rows_are_those_of_the_script(study: ModuleType):
    with ROWS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == [case.state for case in study.CASES]
    for row in rows:
        if row["test"]:
            continue
        assert row["right"] == "yes", row
        assert (row["code"] == "0") == (row["expected"] == "works"), row


def test_every_test_that_a_case_names_is_there(study: ModuleType):
    named = {case.test for case in study.CASES if case.test}
    assert named
    for test in named:
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_cases_are_one_each_and_are_commands_or_tests(study: ModuleType):
    assert len({case.state for case in study.CASES}) == len(study.CASES)
    assert all(bool(case.command) != bool(case.test) for case in study.CASES)


def test_some_are_typed(study: ModuleType, tmp_path: Path):
    """One that is refused, one that is not there; each leaves nothing."""
    cases = [case for case in study.CASES if case.name in ("seed=abc", "crop_min_scale=5")]
    assert len(cases) == 2
    study.make_world(tmp_path, cases)
    before = sorted(tmp_path.rglob("*"))
    for case in cases:
        row = study.row_of(case, tmp_path)
        assert row["right"] == "yes" and row["code"] == 2, row
        assert case.name.partition("=")[0] in str(row["line"])
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_not_one_line_is_not_right(study: ModuleType):
    line = "iecl-solo: seed: 'abc' is not allowed\n"
    assert study.Outcome(2, "", line, 1.0).right(works=False)
    for code, err in (
        (0, line),  # accepted
        (None, line),  # no answer
        (2, ""),
        (2, line + line),
        (1, f"Traceback (most recent call last):\n{line}"),
        (1, "ValueError: seed"),
    ):
        assert not study.Outcome(code, "", err, 1.0).right(works=False)
    assert study.Outcome(0, "done", "", 1.0).right(works=True)
    assert not study.Outcome(2, "", line, 1.0).right(works=True)


def test_a_command_without_an_answer_is_ended(study: ModuleType, tmp_path: Path):
    found = study.typed(["doctor"], tmp_path, limit=0.0)
    assert found.code is None and not found.right(works=True)
