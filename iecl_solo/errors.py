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


def unknown_key(path: str, key: str, allowed: Iterable[str]) -> IECLError:
    """The error for a key of a block that is not one of ``allowed``, with the nearest that is.

    Args:
        path: the block's own key with a dot behind it, or nothing for the whole.
        key: as given.
        allowed: in the order that they are shown in.

    >>> str(unknown_key("iecl.saib.", "patchsize", ["variant", "patch_size"]))
    "unknown key iecl.saib.patchsize: did you mean 'patch_size'? Allowed: variant, patch_size"
    """
    names = list(allowed)
    near = difflib.get_close_matches(key, names, 1, 0.4)
    hint = f" did you mean '{near[0]}'?" if near else ""
    return IECLError(f"unknown key {path}{key}:{hint} Allowed: {', '.join(names)}")


def one_line(error: BaseException) -> str:
    """What an error says, its lines joined; the name of its class where it says nothing.

    >>> one_line(ValueError("a shape\\n  of 3")), one_line(KeyboardInterrupt())
    ('a shape of 3', 'KeyboardInterrupt')
    """
    return " ".join(str(error).split()) or type(error).__name__


def last_line(error: BaseException) -> str:
    """The last line of what an error says, the reason where the others say how it came to it.

    >>> last_line(ImportError("cannot load:\\nno such file")), last_line(KeyboardInterrupt())
    ('no such file', 'KeyboardInterrupt')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
