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
Count = Callable[..., None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (mark := item.get_closest_marker("counts")) is not None:
            item.user_properties.append((mark.args[0], 1))


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Count:
    """``count("faults injected", 300)``: for tests that try many."""

    def add(what: str, number: int = 1) -> None:
        assert what in COUNTED
        request.node.user_properties.append((what, number))

    return add


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The counts of all tests that passed; under xdist the workers' come with their reports."""
    passed = terminalreporter.stats.get("passed", [])
    found = [p for report in passed if report.when == "call" for p in report.user_properties]
    sums = {what: sum(n for name, n in found if name == what) for what in COUNTED}
    if any(sums.values()):
        line = ", ".join(f"{what}: {number}" for what, number in sums.items())
        terminalreporter.write_line(f"{line}; nothing was lost in any of them")


def pytest_report_header() -> str:
    from iecl_solo.solo.host import find_host

    host = find_host()
    return f"host: {host.describe()}"


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 3 classes of 8 random images."""
    from support import image_folder

    return image_folder(tmp_path_factory.mktemp("images") / "train")
