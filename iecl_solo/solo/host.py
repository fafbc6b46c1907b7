"""Which solo-learn is here, and what its generation calls things. The only place that knows."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iecl_solo.errors import HostNotFound, IECLError

MISSING = "solo-learn is not installed; install it with: iecl-solo install-host"


@dataclass(frozen=True)
class Host:
    """The solo-learn that this process imports.

    Attributes:
        version: as its distribution or its setup.py says.
        path: folder of the package ``solo``.
        takes_cfg: methods are built from one OmegaConf ``cfg`` (GitHub main), not from keyword
            arguments (1.0.2 of the package index).
        online: attribute that holds the online network.
        momentum: attribute that holds its moving average.
        methods: the host's own registry, ``solo.methods.METHODS``.
        base_method: ``solo.methods.base.BaseMethod``.
    """

    version: str
    path: Path
    takes_cfg: bool
    online: str
    momentum: str
    methods: dict[str, type]
    base_method: type

    def import_module(self, name: str) -> Any:
        """``solo.<name>``, e.g. ``utils.knn``."""
        return importlib.import_module(f"solo.{name}")

    @property
    def backbones(self) -> Mapping[str, Any]:
        """Backbone names this host accepts."""
        if self.takes_cfg:
            return self.base_method._BACKBONES  # type: ignore[attr-defined]
        return dict.fromkeys(self.base_method._SUPPORTED_ENCODERS)  # type: ignore[attr-defined]

    def describe(self) -> str:
        """One line for logs and reports."""
        return f"solo-learn {self.version}"


def _checkout() -> Path | None:
    """The checkout named by the environment variable SOLO_LEARN.

    Raises:
        IECLError: when it is set to something that is not a solo-learn checkout.
    """
    given = os.environ.get("SOLO_LEARN")
    if not given:
        return None
    root = Path(given).expanduser().resolve()
    if not (root / "solo" / "__init__.py").is_file():
        raise IECLError(f"SOLO_LEARN={given}: not a solo-learn checkout (it has no solo/)")
    return root


def use_checkout() -> None:
    """Put the checkout named by SOLO_LEARN first on the path.

    A name that is no checkout is left for ``find_host`` to refuse: importing the package, for its
    mathematics say, does not need a host.
    """
    with suppress(IECLError):
        root = _checkout()
        if root is not None and str(root) not in sys.path:
            sys.path.insert(0, str(root))


def locate() -> Path | None:
    """Folder of the package ``solo`` that would be imported, without importing it."""
    spec = importlib.util.find_spec("solo")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent


def _version(path: Path) -> str:
    # a checkout's own setup.py comes first: another solo-learn may be installed beside it
    setup = path.parent / "setup.py"
    if setup.is_file():
        found = re.search(r"version\s*=\s*[\"']([^\"']+)[\"']", setup.read_text())
        return found.group(1) if found else "unknown"
    try:
        return importlib.metadata.version("solo-learn")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def find_host() -> Host:
    """Import solo-learn and say what it is.

    Raises:
        HostNotFound: one line, with the command that installs it.
        IECLError: when SOLO_LEARN names something that is not a solo-learn checkout.

    Example:
        >>> find_host().online in ("backbone", "encoder")
        True
    """
    _checkout()
    if locate() is None and "solo" not in sys.modules:
        raise HostNotFound(MISSING)
    import solo.methods
    import solo.methods.base as base

    path = Path(solo.__file__).parent
    takes_cfg = hasattr(base.BaseMethod, "_BACKBONES")
    return Host(
        version=_version(path),
        path=path,
        takes_cfg=takes_cfg,
        online="backbone" if takes_cfg else "encoder",
        momentum="momentum_backbone" if takes_cfg else "momentum_encoder",
        methods=solo.methods.METHODS,
        base_method=base.BaseMethod,
    )
