"""Which versions of Python and of the libraries work: fresh environments, a short list of tests.

    python studies/version_matrix.py --to /tmp/matrix --rows docs/rows/version_matrix.csv

needs uv on the path, and the Pythons (``--pythons`` names others). For each Python and each column
it makes an environment under ``--to``, installs the project and solo-learn 1.0.2 in it, runs the
tests, writes the digits and pretrains on them for an epoch, and removes the environment. A column
is ``oldest`` (all libraries at the lower bounds of setup.cfg), ``newest``, or one library at its
lower bound with the others at their newest. Rows that are there are not run again; ``--only`` takes
those whose Python and column are named, as in ``3.10/oldest``.
"""

from __future__ import annotations

import argparse
import configparser
import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
#: The libraries whose ranges are tried; torchvision follows torch.
LIBRARIES = ("torch", "lightning", "timm", "torchmetrics", "hydra-core")
#: Of the lower bounds that have no build for a Python, the first release that has one.
FIRST = {("torch", "3.13"): "2.6.0"}  # with a torchvision
TESTS = (
    "tests/test_saib.py",
    "tests/solo/test_wrapper.py",
    "tests/train/test_resume.py::test_every_n_steps_and_a_power_cut",
)
TESTERS = ("pytest", "pytest-timeout", "hypothesis")
COLUMNS = ("python", "column", *LIBRARIES, "works", "said")


def lower_bounds() -> dict[str, str]:
    """Of what setup.cfg requires, by library."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].split()
    found = (re.fullmatch(r"([\w-]+)>=([\d.]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def pinned(python: str, column: str) -> list[str]:
    """Requirements of a column, beside the project's own."""
    bounds = lower_bounds()
    names = bounds if column == "oldest" else {} if column == "newest" else [column]
    pins = {name: FIRST.get((name, python), bounds[name]) for name in names}
    pins.pop("filelock", None)  # its bound is that of what it offers, not of what was tried
    return [f"{name}=={version}" for name, version in pins.items()]


class Failed(Exception):
    """A step of a cell, with the last line of what it said."""


class Cell:
    """One environment.

    Args:
        python: the interpreter's version.
        column: what is installed in it.
        to: where it is made.
    """

    def __init__(self, python: str, column: str, to: Path) -> None:
        self.python, self.column = python, column
        self.folder = to / f"{python}-{column}"
        self.bin = self.folder / "bin"
        own = {"VIRTUAL_ENV": str(self.folder), "OMP_NUM_THREADS": "1"}
        self.environment = {**os.environ, **own, "UV_CACHE_DIR": str(to / "cache")}
        for name in ("PYTHONPATH", "SOLO_LEARN"):
            self.environment.pop(name, None)

    def run(self, *command: str | Path, what: str) -> str:
        """Raises: Failed."""
        done = subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        (self.folder.parent / f"{self.folder.name}.log").open("a").write(done.stdout)
        if done.returncode:
            errors = re.findall(r"^(?:E\s+|\w*Error: )(\S.*)$", done.stdout, re.MULTILINE)
            last = errors or done.stdout.strip().splitlines()[-1:]
            raise Failed(f"{what}: {' '.join(last[0].split())[:200] if last else ''}")
        return done.stdout

    def install(self) -> None:
        """Raises: Failed."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.run("uv", "venv", "--seed", "--python", self.python, self.folder, what="venv")
        # the project first, so that its pins meet its own requirements
        wanted = ["--editable", str(ROOT), *pinned(self.python, self.column), *TESTERS]
        self.run("uv", "pip", "install", *wanted, what="install")
        self.run(self.bin / "iecl-solo", "install-host", "--from", "index", what="host")

    def try_out(self) -> None:
        """Raises: Failed."""
        # what another version warns of is not what is tried
        quiet = ["-q", "-x", "-W", "ignore", "-p", "no:cacheprovider"]
        self.run(self.bin / "python", "-m", "pytest", *quiet, *TESTS, what="tests")
        digits, runs = self.folder / "digits", self.folder / "runs"
        self.run(self.bin / "iecl-solo", "digits", digits, what="digits")
        train = ["pretrain", "--config-name", "digits/iecl_simclr", "max_epochs=1"]
        data = [f"data.train_path={digits}/train", f"data.val_path={digits}/test"]
        where = [f"checkpoint.dir={runs}", "accelerator=cpu", "data.num_workers=0"]
        self.run(self.bin / "iecl-solo", *train, *data, *where, what="pretrain")

    def versions(self) -> dict[str, str]:
        """What was installed, by library."""
        code = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
        found = self.run(self.bin / "python", "-c", code, *LIBRARIES, what="versions")
        return dict(zip(LIBRARIES, found.split(), strict=True))

    def row(self) -> dict[str, object]:
        """Its outcome."""
        row: dict[str, object] = {"python": self.python, "column": self.column}
        try:
            self.install()
            row |= self.versions()
            self.try_out()
            row |= {"works": "yes", "said": ""}
        except Failed as failed:
            row |= {"works": "no", "said": str(failed)}
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        return row


def main() -> int:
    """0 if every cell works."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--to", type=Path, required=True, help="where environments are made")
    parser.add_argument("--rows", type=Path, default=Path("version_matrix.csv"))
    parser.add_argument("--pythons", nargs="+", default=PYTHONS)
    parser.add_argument("--columns", nargs="+", default=["oldest", "newest"])
    parser.add_argument("--only", nargs="+", help="cells, PYTHON/COLUMN")
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    if arguments.rows.is_file():
        with arguments.rows.open(newline="") as file:
            rows = [dict(row) for row in csv.DictReader(file)]
    pairs = [(p, c) for p in arguments.pythons for c in arguments.columns]
    if arguments.only:
        pairs = [(p, c) for p, _, c in (cell.partition("/") for cell in arguments.only)]
    for python, column in pairs:
        if any((row["python"], row["column"]) == (python, column) for row in rows):
            continue
        rows.append(Cell(python, column, arguments.to.resolve()).row())
        print(" ".join(str(rows[-1].get(name, "")) for name in COLUMNS), flush=True)
        rows.sort(key=lambda row: (str(row["column"]), str(row["python"])))
        with arguments.rows.open("w", newline="") as file:
            out = csv.DictWriter(file, COLUMNS)
            out.writeheader()
            out.writerows(rows)
    return int(any(row["works"] != "yes" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
