"""What the package raises when it is given something it cannot use: always one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class IECLError(ValueError):
    """Bad input. The message is one line: what was given, what is allowed, the nearest valid name.

    >>> raise IECLError("batch size 1: at least 2 are needed")
    Traceback (most recent call last):
    iecl_solo.errors.IECLError: batch size 1: at least 2 are needed
    """


class CannotWrite(IECLError):
    """The disk is full, or refuses a file for another reason."""


class HostNotFound(IECLError):
    """No solo-learn can be imported, and what was asked for needs one."""


def unknown_name(what: str, given: object, allowed: Iterable[str]) -> IECLError:
    """The error for a name that is not one of ``allowed``, with the nearest that is.

    >>> str(unknown_name("estimator", "codingrate", ["coding_rate", "gaussian"]))
    "unknown estimator 'codingrate': did you mean 'coding_rate'? Allowed: coding_rate, gaussian"
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.5)
    hint = f" did you mean '{near[0]}'?" if near else ""
    # a registry can hold a thousand names; the nearest ones are what a reader can use
    shown = names if len(names) <= 40 else difflib.get_close_matches(str(given), names, 10, 0.0)
    more = "" if len(shown) == len(names) else f", ... ({len(names)} in all)"
    return IECLError(f"unknown {what} '{given}':{hint} Allowed: {', '.join(shown)}{more}")
