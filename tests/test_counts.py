"""The line at the end of a test run says that nothing was lost only where that is so."""

from __future__ import annotations

from pathlib import Path

import conftest
import pytest

_TESTS = """
import pytest

@pytest.mark.counts("faults injected")
def test_marked(): assert GOOD

def test_counts_itself(count):
    count("bad inputs tried", 30)
    assert GOOD or not BOTH

@pytest.fixture
def broken(): assert GOOD or not BOTH

@pytest.mark.counts("configurations fuzzed")
def test_set_up(broken): pass

@pytest.mark.counts("faults injected")
def test_sound(): pass

def test_other(): assert GOOD_OTHER
"""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "GOOD, BOTH, GOOD_OTHER = True, True, False",
            "faults injected: 2, bad inputs tried: 30, configurations fuzzed: 1; "
            "nothing was lost in any of them",
        ),
        (
            "GOOD, BOTH, GOOD_OTHER = False, False, True",
            "faults injected: 1, bad inputs tried: 30, configurations fuzzed: 1; "
            "1 of the tests that count failed",
        ),
        (
            "GOOD, BOTH, GOOD_OTHER = False, True, True",
            "faults injected: 1, bad inputs tried: 0, configurations fuzzed: 0; "
            "3 of the tests that count failed",
        ),
    ],
)
def test_the_line_is_true(given: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / f"{tmp_path.name}.py").write_text(f"{given}\n{_TESTS}")  # one module each
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = counts: what a test is one of\n")
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:faulthandler"]
    plugins += ["--import-mode=importlib"]
    pytest.main([str(tmp_path), "-q", *plugins], plugins=[conftest])
    assert said in capsys.readouterr().out.splitlines()
