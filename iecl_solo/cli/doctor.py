"""``iecl-solo doctor``: what is installed, what was patched, and the command for what is missing.

By itself it reads what is installed, in a moment; ``--full`` imports all of it too.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

from iecl_solo.checks import installed
from iecl_solo.errors import HostNotFound, IECLError, last_line
from iecl_solo.version import __version__

#: Distribution: the module that must be importable for training.
REQUIRED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "lightning": "lightning",
    "timm": "timm",
    "torchmetrics": "torchmetrics",
    "hydra-core": "hydra",
    "einops": "einops",
}

#: Extra of this package: the modules it brings, and what they are for.
OPTIONAL = {
    "wandb": (("wandb",), "logging to Weights & Biases"),
    "tensorboard": (("tensorboard",), "logging to TensorBoard"),
    "umap": (("umap", "seaborn"), "UMAP pictures"),
}


@dataclass
class Diagnosis:
    """What the doctor found.

    Attributes:
        facts: (what, value), in the order in which they are told.
        mended: (patch, why it was applied).
        problems: (what keeps training from starting, command that mends it).
        hints: (what is missing and not needed, command that brings it).
    """

    facts: list[tuple[str, str]] = field(default_factory=list)
    mended: list[tuple[str, str]] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    hints: list[tuple[str, str]] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """Whether training can start."""
        return not self.problems


def _look_at_versions(found: Diagnosis) -> None:
    found.facts.append(("iecl-solo", __version__))
    found.facts.append(("python", platform.python_version()))
    missing = [distribution for distribution, module in REQUIRED.items() if not installed(module)]
    for distribution in REQUIRED:
        version = "-" if distribution in missing else importlib.metadata.version(distribution)
        found.facts.append((distribution, version))
    if missing:
        what = f"{', '.join(missing)}: not installed"
        found.problems.append((what, f"pip install {' '.join(missing)}"))


def _misfit() -> str | None:
    """Why torchvision was built for another torch, as its own requirement says."""
    here = importlib.metadata.version("torch").partition("+")[0]
    for requirement in importlib.metadata.requires("torchvision") or []:
        wanted = re.match(r"torch==([0-9.]+)", requirement)
        if wanted and wanted[1] != here:
            return f"it wants torch {wanted[1]}, {here} is installed"
    return None


def _look_at_torch(found: Diagnosis, full: bool) -> None:
    """Whether torchvision was built for this torch, and the devices."""
    reason = _misfit()
    if full:
        try:
            importlib.import_module("torchvision")
        except Exception as error:  # a mismatch shows as one of several errors
            reason = last_line(error)
    if reason is not None:
        problem = f"torchvision does not fit torch ({reason})"
        found.problems.append((problem, "pip install --upgrade torch torchvision"))
    found.facts.append(("devices", ", ".join(_devices())))
    found.facts.append(("precision", _precision()))


def _devices() -> Iterator[str]:
    import torch

    for i in range(torch.cuda.device_count()):
        yield f"cuda:{i} {torch.cuda.get_device_name(i)}"
    if torch.backends.mps.is_available():
        yield "mps"
    yield f"cpu ({torch.get_num_threads()} threads)"


def _precision() -> str:
    """What ``precision: auto`` is here, and why."""
    import torch

    from iecl_solo.devices import fast_bf16

    gpu = torch.cuda.is_available()
    why = fast_bf16(cpu=not gpu)
    if why is None:
        return "auto is 32-true here: bfloat16 is not faster"
    return f"auto is bf16-mixed here: {why}"


def _look_at_host(found: Diagnosis, full: bool) -> None:
    from iecl_solo import patches
    from iecl_solo.solo import host

    try:
        if not full:
            version, path = host.find_version()
            found.facts.append(("host", f"solo-learn {version} in {path}"))
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            here = host.find_host()
    except HostNotFound:
        found.problems.append(("solo-learn: not installed", "iecl-solo install-host"))
    except IECLError as error:
        found.problems.append((str(error), "unset SOLO_LEARN"))
    except Exception as error:  # whatever stops its import is the answer
        lacks = getattr(error, "name", None)
        reason = last_line(error)
        command = f"pip install {lacks}" if lacks else "iecl-solo install-host"
        found.problems.append((f"solo-learn does not import ({reason})", command))
    else:
        found.facts.append(("host", f"{here.describe()} in {here.path}"))
        found.mended += patches.applied()


def _look_at_extras(found: Diagnosis) -> None:
    for extra, (modules, purpose) in OPTIONAL.items():
        if not installed(*modules):
            hint = f"{' or '.join(modules)} is missing: no {purpose}"
            found.hints.append((hint, f"pip install 'iecl-solo[{extra}]'"))


def diagnose(full: bool = False) -> Diagnosis:
    """Look at everything.

    Args:
        full: whether torchvision and the host are imported too, if they are there. What was mended
            in the host is known only then, and so is whatever keeps it from being imported.
    """
    found = Diagnosis()
    _look_at_versions(found)
    if installed("torch", "torchvision"):
        _look_at_torch(found, full)
    _look_at_host(found, full)
    _look_at_extras(found)
    return found


def _lines(found: Diagnosis) -> Iterator[str]:
    width = max(len(what) for what, _ in found.facts) + 2
    for what, value in found.facts:
        yield f"{what:<{width}}{value}"
    if found.mended:
        yield "\nmended in solo-learn:"
        for name, why in found.mended:
            yield textwrap.fill(f"{name}: {why}", 96, initial_indent="  ", subsequent_indent="    ")
    for title, missing in (("optional:", found.hints), ("in the way:", found.problems)):
        if missing:
            yield f"\n{title}"
            yield from (f"  {what}\n    -> {command}" for what, command in missing)
    yield "\nready to train" if found.ready else "\nnot ready to train"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--full", action="store_true", help="import solo-learn too, and say what is mended in it"
    )


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis; 0 if training can start, else 1."""
    found = diagnose(args.full)
    if not args.full:
        what = "solo-learn was found, and not imported"
        found.hints.append((what, "iecl-solo doctor --full"))
    print("\n".join(_lines(found)))
    return 0 if found.ready else 1
