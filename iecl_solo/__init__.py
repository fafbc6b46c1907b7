"""Incremental-entropy contrastive learning (IE-CL) as an add-on to solo-learn.

Importing it takes neither torch nor solo-learn, and registers with the latter the moment that is
imported. The names below are imported when they are first asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iecl_solo.version import __version__

if TYPE_CHECKING:
    from iecl_solo.augment import FrozenSAIB
    from iecl_solo.entropy import coding_rate, gaussian_kl
    from iecl_solo.errors import IECLError
    from iecl_solo.jacobian import delta_h_split, log_volume, logabsdet
    from iecl_solo.lipschitz import SpectralRegularizer
    from iecl_solo.losses.minc import MINCLoss
    from iecl_solo.losses.spectral import spectral_contrastive_loss
    from iecl_solo.objectives.climb import CLIMB
    from iecl_solo.objectives.iecl import IECL
    from iecl_solo.objectives.protocol import Objective
    from iecl_solo.saib import SAIB, load_saib, save_saib
    from iecl_solo.solo.wrapper import with_objective
    from iecl_solo.train.load import Loaded, configure, load

#: Where each public name is defined.
_PUBLIC = {
    "CLIMB": "objectives.climb",
    "FrozenSAIB": "augment",
    "IECL": "objectives.iecl",
    "IECLError": "errors",
    "Loaded": "train.load",
    "MINCLoss": "losses.minc",
    "Objective": "objectives.protocol",
    "SAIB": "saib",
    "SpectralRegularizer": "lipschitz",
    "coding_rate": "entropy",
    "delta_h_split": "jacobian",
    "gaussian_kl": "entropy",
    "configure": "train.load",
    "load": "train.load",
    "load_saib": "saib",
    "log_volume": "jacobian",
    "logabsdet": "jacobian",
    "save_saib": "saib",
    "spectral_contrastive_loss": "losses.spectral",
    "with_objective": "solo.wrapper",
}

__all__ = [
    "CLIMB",
    "IECL",
    "SAIB",
    "FrozenSAIB",
    "IECLError",
    "Loaded",
    "MINCLoss",
    "Objective",
    "SpectralRegularizer",
    "__version__",
    "coding_rate",
    "configure",
    "delta_h_split",
    "gaussian_kl",
    "load",
    "load_saib",
    "log_volume",
    "logabsdet",
    "save_saib",
    "spectral_contrastive_loss",
    "with_objective",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _beside(name: str) -> None:
    """Import ``iecl_solo.<name>`` from where a checkout has it: beside the package.

    An install has it inside. The checkout's root itself is not made a place for modules of the
    package, since it holds others: tests, docs, the package once more.
    """
    folder = Path(__file__).parent.parent / name
    full = f"{__name__}.{name}"
    spec = importlib.util.spec_from_file_location(full, folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[full] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    globals()[name] = module


if not (Path(__file__).parent / "configs").is_dir():
    _beside("configs")
    _beside("patches")

from iecl_solo.solo import host as _host  # noqa: E402  (they need the two above)
from iecl_solo.solo import on_import as _on_import  # noqa: E402

_host.use_checkout()
_on_import.install()
