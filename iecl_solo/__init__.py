"""Incremental-entropy contrastive learning (IE-CL) as an add-on to solo-learn."""

from pathlib import Path

from iecl_solo.version import __version__

__all__ = ["__version__"]

# In a checkout configs/ and patches/ stand beside the package, in an install inside it. With this
# the checkout runs as it is, whether it is the working directory or on PYTHONPATH.
if not (Path(__file__).parent / "configs").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

from iecl_solo.solo import host as _host
from iecl_solo.solo import on_import as _on_import

_host.use_checkout()
_on_import.install()
