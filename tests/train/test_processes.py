"""Processes of one run that fail together."""

from __future__ import annotations

import time

import pytest

from iecl_solo.errors import IECLError
from iecl_solo.train.processes import in_processes, ranks

_FAILS_OR_WAITS = """
import os, time
from iecl_solo.errors import IECLError
if os.environ["LOCAL_RANK"] == "1":
    raise IECLError("no more")
time.sleep(600)
"""


@pytest.mark.any_host
@pytest.mark.counts("faults injected")
def test_one_that_fails_ends_one_that_waits():
    start = time.monotonic()
    with pytest.raises(IECLError, match=r"^no more$"):
        in_processes(exec, _FAILS_OR_WAITS, environments=ranks(2))
    assert time.monotonic() - start < 60
