"""What a value may be, checked in one wording: the key, what was given, what is allowed.

Each takes the key and the value first and raises an IECLError if the value is not allowed. Beside
them ``installed``, for what is optional.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from iecl_solo.errors import IECLError, unknown_name


def refusal(key: str, given: Any, allowed: str) -> IECLError:
    """The error for a value that is not allowed.

    >>> str(refusal("optimizer.lr", "fast", "a number above 0"))
    "optimizer.lr: 'fast' is not allowed, a number above 0 is"
    """
    return IECLError(f"{key}: {given!r} is not allowed, {allowed} is")


def _interval(low: float | None, high: float | None, above: bool) -> str:
    if low is None:
        return "" if high is None else f" up to {high}"
    begin = f" above {low}" if above else f" from {low}"
    if high is not None:
        return f"{begin} and up to {high}" if above else f"{begin} to {high}"
    return begin if above else f"{begin} up"


def _inside(given: float, low: float | None, high: float | None, above: bool) -> bool:
    too_low = low is not None and (given <= low if above else given < low)
    return not too_low and (high is None or given <= high)


def one_of(key: str, given: Any, allowed: Iterable[Any]) -> None:
    """A value out of a list; the nearest one is named.

    >>> one_of("scheduler.name", "stepp", ["step", "none"])
    Traceback (most recent call last):
    iecl_solo.errors.IECLError: scheduler.name: unknown value 'stepp': did you mean 'step'? ...
    """
    names = list(allowed)
    if given not in names:
        raise IECLError(f"{key}: {unknown_name('value', given, map(str, names))}")


def whole(key: str, given: Any, low: int | None = None, high: int | None = None) -> None:
    """A whole number, within bounds that are allowed themselves.

    >>> whole("seed", -1, 0)
    Traceback (most recent call last):
    iecl_solo.errors.IECLError: seed: -1 is not allowed, a whole number from 0 up is
    """
    of_kind = isinstance(given, Integral) and not isinstance(given, bool)
    if not of_kind or not _inside(given, low, high, above=False):
        raise refusal(key, given, f"a whole number{_interval(low, high, above=False)}")


def number(
    key: str,
    given: Any,
    low: float | None = None,
    high: float | None = None,
    *,
    above: bool = False,
    infinite: bool = False,
) -> None:
    """A number that is finite, unless infinity is allowed too, within bounds.

    Args:
        key: what is checked.
        given: its value.
        low: the least that is allowed.
        high: the most that is allowed.
        above: whether ``low`` itself is not allowed.
        infinite: whether infinity is.

    >>> number("optimizer.lr", 0, 0, above=True)
    Traceback (most recent call last):
    iecl_solo.errors.IECLError: optimizer.lr: 0 is not allowed, a number above 0 is
    >>> number("grayscale.prob", 5, 0, 1)
    Traceback (most recent call last):
    iecl_solo.errors.IECLError: grayscale.prob: 5 is not allowed, a number from 0 to 1 is
    """
    of_kind = isinstance(given, Real) and not isinstance(given, bool)
    if not of_kind or math.isnan(given) or (math.isinf(given) and not infinite):
        raise refusal(key, given, f"a number{_interval(low, high, above)}")
    if not _inside(given, low, high, above):
        raise refusal(key, given, f"a number{_interval(low, high, above)}")


def flag(key: str, given: Any) -> None:
    """True or false.

    >>> flag("csv.enabled", "abc")
    Traceback (most recent call last):
    iecl_solo.errors.IECLError: csv.enabled: 'abc' is not allowed, true or false is
    """
    if not isinstance(given, bool):
        raise refusal(key, given, "true or false")


def text(key: str, given: Any) -> None:
    """A name or a path."""
    if not isinstance(given, (str, os.PathLike)) or not str(given).strip():
        raise refusal(key, given, "a text")


def folder_to_write(key: str, given: Any) -> None:
    """A folder that is there and can be written to, or that can be made.

    >>> folder_to_write("checkpoint.dir", "/dev/null/runs")
    Traceback (most recent call last):
    iecl_solo.errors.IECLError: checkpoint.dir: /dev/null/runs: /dev/null is not a directory
    """
    text(key, given)
    path = Path(given).expanduser().absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    if not there.is_dir():
        raise IECLError(f"{key}: {given}: {there} is not a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise IECLError(f"{key}: {given}: {there} cannot be written to")


def installed(*modules: str) -> bool:
    """Whether all modules can be imported, without importing them.

    >>> installed("torch"), installed("torch", "no_such_module")
    (True, False)
    """
    specs = [importlib.util.find_spec(module) for module in modules]
    # a mere folder of that name has no origin: W&B leaves one called wandb where it ran
    return all(spec is not None and spec.origin is not None for spec in specs)
