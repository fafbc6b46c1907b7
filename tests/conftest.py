"""Every test of the host runs on whichever solo-learn is imported (SOLO_LEARN names a checkout)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings

torch.set_num_threads(1)  # the models are too small for more

# the same examples in every run, whatever ran before; to make one smaller takes minutes
settings.register_profile(
    "project",
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
)
settings.load_profile("project")

#: What the tests of reliability count, in the order in which it is printed.
COUNTED = ("faults injected", "bad inputs tried", "configurations fuzzed")
#: What a test carries that counts in its own way.
_COUNTS = "counts"
Count = Callable[..., None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (mark := item.get_closest_marker("counts")) is not None:
            item.user_properties.append((mark.args[0], 1))
        if "count" in getattr(item, "fixturenames", ()):
            item.user_properties.append((_COUNTS, 0))


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Count:
    """``count("faults injected", 300)``: for tests that try many."""

    def add(what: str, number: int = 1) -> None:
        assert what in COUNTED
        request.node.user_properties.append((what, number))

    return add


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The counts of all tests that passed, and how many of those that count did not.

    Under xdist the workers' come with their reports; a worker that died left one without any.
    """
    stats = terminalreporter.stats
    passed = [report for report in stats.get("passed", []) if report.when == "call"]
    found = [p for report in passed for p in report.user_properties]
    sums = {what: sum(n for name, n in found if name == what) for what in COUNTED}
    failed = {
        report.nodeid
        for report in (*stats.get("failed", []), *stats.get("error", []))
        if getattr(report, "when", None) not in ("setup", "call", "teardown")
        or {name for name, _ in report.user_properties} & {*COUNTED, _COUNTS}
    }
    if any(sums.values()) or failed:
        line = ", ".join(f"{what}: {number}" for what, number in sums.items())
        lost = f"{len(failed)} of the tests that count failed" if failed else "nothing was lost"
        terminalreporter.write_line(f"{line}; {lost}{'' if failed else ' in any of them'}")


def pytest_report_header() -> str:
    from iecl_solo.solo.host import find_host

    host = find_host()
    return f"host: {host.describe()}"


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 3 classes of 8 random images."""
    from support import image_folder

    return image_folder(tmp_path_factory.mktemp("images") / "train")
