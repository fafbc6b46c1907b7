"""Keep the terminal for what the user can act on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

#: Loggers that announce what a user cannot act on. No one else's is touched.
_ANNOUNCE = ("lightning", "lightning.pytorch", "lightning.fabric")


def _is_news(record: logging.LogRecord) -> bool:
    """False for the host's warning that resuming may fail, which does not apply to our runs."""
    return "might generate issues when resuming" not in record.getMessage()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence deprecations in solo-learn and its libraries, and announcements of no use.

    Within the block alone, and of named loggers alone. Lightning sets its loggers' levels when it
    is imported, so import it before.

    >>> with quiet():
    ...     logging.getLogger("lightning.pytorch").isEnabledFor(logging.WARNING)
    False
    >>> logging.getLogger("lightning.pytorch").isEnabledFor(logging.WARNING)
    True
    """
    loggers = [logging.getLogger(name) for name in _ANNOUNCE]
    before, root = [logger.level for logger in loggers], logging.getLogger()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        root.addFilter(_is_news)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
            root.removeFilter(_is_news)
