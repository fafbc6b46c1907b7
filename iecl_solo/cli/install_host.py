"""``iecl-solo install-host``: solo-learn beside today's torch, whatever it asks for itself."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from iecl_solo.errors import IECLError

INDEX, GITHUB = "index", "github"
REQUIREMENT = "solo-learn==1.0.2"
REPOSITORY = "https://github.com/vturrisi/solo-learn"

#: What the host imports and this package does not bring: module, distribution. Its torch, timm and
#: Lightning are this package's own requirements, in today's versions.
NEEDS = {"einops": "einops", "tqdm": "tqdm", "scipy": "scipy", "sklearn": "scikit-learn"}

_OFFLINE = re.compile(
    r"resolve host|name resolution|Failed to (establish|connect)|[Uu]nreachable|"
    r"Connection (refused|timed out)|Couldn't connect|ProxyError",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--from",
        dest="source",
        default=INDEX,
        metavar="index|github|PATH",
        help="the package index (1.0.2, the default), GitHub's main branch, or a checkout of it",
    )


def run(args: argparse.Namespace) -> int:
    """Install it with the Python that runs this, without its dependencies.

    Raises:
        IECLError: one line, for a PATH that is no checkout, without a network, or when pip fails.
    """
    missing = [dist for module, dist in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        _pip("install", *missing, what=" ".join(missing))
    with tempfile.TemporaryDirectory() as temporary:
        requirement, environment = _requirement(args.source, Path(temporary))
        _pip(
            "install",
            "--no-deps",
            "--force-reinstall",
            requirement,
            what=args.source,
            **environment,
        )
    distribution = _installed()
    _remove_tests(distribution)
    also = f", and {', '.join(missing)}" if missing else ""
    print(f"installed solo-learn {distribution.version} from {args.source}{also}")
    print("iecl-solo doctor says whether it is ready")
    return 0


def _requirement(source: str, temporary: Path) -> tuple[str, dict[str, str]]:
    """What pip is to install, and the environment variables for it."""
    if source == INDEX:
        return REQUIREMENT, {}
    # setup.py imports pkg_resources, which setuptools 82 dropped. pip builds in an environment of
    # its own; a constraint on that one leaves the user's setuptools as it is. Older pips read the
    # first variable for such environments, those from 25.3 on the second.
    constraint = temporary / "build.txt"
    constraint.write_text("setuptools<82\n")
    own = os.environ.get("PIP_CONSTRAINT", "")
    environment = {
        "PIP_CONSTRAINT": f"{own} {constraint}".strip(),
        "PIP_BUILD_CONSTRAINT": str(constraint),
    }
    if source == GITHUB:
        if shutil.which("git") is None:
            raise IECLError("install-host --from github: git is not installed")
        return f"git+{REPOSITORY}", environment
    return str(_copy_of_checkout(Path(source), temporary)), environment


def _copy_of_checkout(checkout: Path, temporary: Path) -> Path:
    """What its setup.py needs, elsewhere: pip leaves build/ and egg-info where it builds."""
    root = checkout.expanduser()
    if not ((root / "setup.py").is_file() and (root / "solo" / "__init__.py").is_file()):
        raise IECLError(
            f"install-host --from {checkout}: not a solo-learn checkout (it has no setup.py and "
            f"solo/); {INDEX}, {GITHUB} and the path of a checkout are allowed"
        )
    copy = temporary / "checkout"
    shutil.copytree(root / "solo", copy / "solo", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*root.glob("*.py"), *root.glob("*.txt"), *root.glob("*.md")):
        shutil.copy(file, copy)
    return copy


def _pip(*arguments: str, what: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode == 0:
        return
    if _OFFLINE.search(done.stdout):
        raise IECLError(
            f"install-host --from {what}: no network; a checkout is installed by --from PATH"
        )
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error:", "fatal:"))]
    reason = (errors or lines or ["it said nothing"])[-1].strip()
    raise IECLError(f"install-host --from {what}: pip failed ({reason})")


def _installed() -> importlib.metadata.Distribution:
    importlib.invalidate_caches()
    found = importlib.metadata.distributions(name="solo-learn")
    # a checkout on the path may hold metadata too; what pip installed has a record of its files
    return next(distribution for distribution in found if distribution.read_text("RECORD"))


def _remove_tests(distribution: importlib.metadata.Distribution) -> None:
    """Remove the host's tests from site-packages, and nothing that another package put there.

    They install as a top-level package ``tests``. A user's own folder of that name is hidden by it
    wherever it has no ``__init__.py``, and no one runs them from there: they are written for the
    stack of 2021. Only files that solo-learn's own record lists are removed; pip uninstalls it
    afterwards as before.
    """
    listed = [file for file in distribution.files or [] if file.parts[0] == "tests"]
    for file in listed:
        Path(str(distribution.locate_file(file))).unlink(missing_ok=True)
    folders = {parent for file in listed for parent in file.parents if parent.parts}
    for folder in sorted(folders, key=lambda f: len(f.parts), reverse=True):
        path = Path(str(distribution.locate_file(folder)))
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
