"""Run a solo-learn's own tests without the add-on and with it, and say what fails and why.

    python studies/host_suite.py PATH

PATH is a checkout of solo-learn or its unpacked wheel: a folder that holds ``solo`` and ``tests``.
The tests run in a copy of it. With the add-on means: as under ``python -m iecl_solo``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent

# Python runs this in every process, those that a test starts included
_WITH_THE_ADD_ON = """
import iecl_solo.patches
iecl_solo.patches.for_script()
"""

#: What an error says: what the test lacks. Nothing of this is the host's fault or the stack's.
LACKS = {
    r"URLError|ConnectionError|name resolution|Max retries": "needs the network",
    r"No module named 'nvidia": "needs NVIDIA DALI",
}

#: Tests of 1.0.2 that are wrong on today's stack themselves: they look for the last epoch's file
#: by trainer.current_epoch, which since Lightning 1.6 is one more than that after training. The
#: files are there.
_EPOCH = "looks for a file of the epoch after the last"
OWN_FAULTS = {
    "tests.utils.test_checkpointer::test_checkpointer": _EPOCH,
    "tests.utils.test_auto_umap::test_auto_umap": _EPOCH,
}


@dataclass(frozen=True)
class Result:
    """One test: its name, and why it failed ("" if it passed)."""

    name: str
    reason: str


def _reason(case: ElementTree.Element) -> str:
    problem = next((e for e in case if e.tag in ("failure", "error")), None)
    if problem is None:
        return "skipped" if case.find("skipped") is not None else ""
    text = f"{problem.get('message', '')}\n{problem.text or ''}"
    for pattern, lack in LACKS.items():
        if re.search(pattern, text):
            return lack
    errors = re.findall(r"^E\s+(\S.*)$", text, re.MULTILINE)
    return (errors[-1] if errors else text.strip().splitlines()[0])[:160]


def _results(report: Path) -> list[Result]:
    cases = ElementTree.parse(report).iter("testcase")
    named = [
        (f"{c.get('classname') or ''}::{c.get('name')}".lstrip(":"), _reason(c)) for c in cases
    ]
    return [Result(name, OWN_FAULTS.get(name, why) if why else "") for name, why in named]


def run_suite(host: Path, with_add_on: bool) -> list[Result]:
    """The results of every test of the host in the folder ``host``."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, customize = Path(temporary, "host"), Path(temporary, "customize")
        for package in ("solo", "tests"):
            shutil.copytree(host / package, folder / package)
        customize.mkdir()
        (customize / "sitecustomize.py").write_text(_WITH_THE_ADD_ON if with_add_on else "")
        paths = [customize, folder, ROOT] if with_add_on else [customize, folder]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            # a test of 1.0.2 starts "python3"
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "MPLBACKEND": "agg",
        }
        environment.pop("SOLO_LEARN", None)
        report = Path(temporary, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", "."]
        command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", "-W", "ignore"]
        command += [f"--junitxml={report}", "tests"]
        subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=False)
        return _results(report)


def _print(title: str, results: list[Result]) -> None:
    failed = [result for result in results if result.reason]
    print(f"{title}: {len(results) - len(failed)} passed, {len(failed)} failed")
    for reason, count in Counter(result.reason for result in failed).most_common():
        print(f"  {count} x {reason}")
        for result in failed:
            if result.reason == reason:
                print(f"      {result.name}")


def main() -> int:
    """0 if nothing fails with the add-on but what lacks a network, an extra or a newer test."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="checkout or unpacked wheel of solo-learn")
    path = parser.parse_args().path
    if not all((path / package / "__init__.py").is_file() for package in ("solo", "tests")):
        parser.error(f"{path}: it has no packages solo and tests")
    _print("without the add-on", run_suite(path, with_add_on=False))
    mended = run_suite(path, with_add_on=True)
    _print("with the add-on", mended)
    accounted = {"", *LACKS.values(), *OWN_FAULTS.values()}
    return int(any(result.reason not in accounted for result in mended))


if __name__ == "__main__":
    sys.exit(main())
