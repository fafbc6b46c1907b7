"""Keep the terminal for what the user can act on."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """Silence deprecations inside solo-learn and its libraries, and Lightning's announcements."""
    warnings.simplefilter("ignore")
    # not a level on Lightning's loggers: importing it sets those, and that may come later
    logging.disable(logging.WARNING)
