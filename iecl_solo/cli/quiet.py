"""Keep the terminal for what the user can act on."""

from __future__ import annotations

import logging
import warnings

_CHATTY = "lightning.pytorch", "pytorch_lightning", "lightning.fabric"


def quiet() -> None:
    """Silence deprecations inside solo-learn and its libraries, and Lightning's announcements."""
    warnings.filterwarnings("ignore", module=r"(solo|timm|torch|torchmetrics|lightning|xformers)\b")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    # solo-learn's advice on schedulers and backbones goes through the root logger
    logging.getLogger().setLevel(logging.ERROR)
