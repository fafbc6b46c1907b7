"""Statistics over few seeds: means with intervals, paired differences, what they can detect.

The seeds are the sample: every number here is over them and nothing else. A run and its baseline
share the seed (initial weights, order of the data, augmentations), so they are compared in pairs,
by Student's t on the differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from iecl_solo.errors import IECLError

#: Intervals cover 95 %; a difference is called one where Holm's p is below 5 %.
CONFIDENCE = 0.95
ALPHA = 1 - CONFIDENCE

#: The power at which a difference counts as detectable.
POWER = 0.8

#: Fewer seeds than this are never said to show anything: of two, the spread has one degree of
#: freedom, and p < 0.05 is an accident of it as often as not.
MIN_SEEDS = 3


@dataclass(frozen=True)
class Summary:
    """A sample of seeds: its size, mean, standard deviation (n - 1) and 95 % t interval."""

    n: int
    mean: float
    sd: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Summary):
    """The differences of pairs, and the p-value of "they are 0 on average" (two-sided)."""

    p: float


def _finite(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64).ravel()
    return array[np.isfinite(array)]


def _equal(values: np.ndarray) -> bool:
    # differences of equal floats are equal up to rounding only
    return bool(np.ptp(values) <= 1e-9 * max(1.0, float(np.abs(values).max())))


def summarize(values: ArrayLike) -> Summary:
    """Mean, standard deviation and t interval of a sample.

    Args:
        values: one number a seed; NaN and infinities are left out, and ``n`` says how many stayed.

    Returns:
        NaN for the standard deviation and the interval of fewer than two numbers, and for the
        interval of equal ones: without a spread the t test knows nothing.

    Example:
        >>> three = summarize([90.0, 91.0, 92.0])
        >>> print(f"{three.mean:.1f} +- {three.sd:.1f}, {three.low:.2f} to {three.high:.2f}")
        91.0 +- 1.0, 88.52 to 93.48
        >>> summarize([90.0])
        Summary(n=1, mean=90.0, sd=nan, low=nan, high=nan)
    """
    array = _finite(values)
    n = len(array)
    mean = float(array.mean()) if n else math.nan
    if n < 2:
        return Summary(n, mean, math.nan, math.nan, math.nan)
    if _equal(array):
        return Summary(n, mean, 0.0, math.nan, math.nan)
    interval = stats.ttest_1samp(array, 0.0).confidence_interval(CONFIDENCE)
    return Summary(n, mean, float(array.std(ddof=1)), float(interval.low), float(interval.high))


def paired_difference(treatment: ArrayLike, baseline: ArrayLike) -> Difference:
    """The mean of ``treatment - baseline`` over seeds, its t interval and its p-value.

    Args:
        treatment: one number a seed.
        baseline: the same seeds' numbers, in the same order.

    Returns:
        Pairs with a NaN or an infinity are left out. Of fewer than two pairs, and of pairs that
        all differ by the same amount, the t test knows nothing: interval and p are NaN.

    Raises:
        IECLError: when the two are not of one length.

    Example:
        >>> difference = paired_difference([92.0, 93.5, 92.5], [91.0, 92.0, 92.0])
        >>> print(f"{difference.mean:.2f}, {difference.low:.2f} to {difference.high:.2f}")
        1.00, -0.24 to 2.24
        >>> round(difference.p, 4)
        0.0742
    """
    a, b = np.asarray(treatment, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if a.shape != b.shape:
        raise IECLError(f"pairs of {a.size} and {b.size} numbers: as many of each are needed")
    differences = _finite(a - b)
    n = len(differences)
    if n < 2 or _equal(differences):
        mean = float(differences.mean()) if n else math.nan
        sd = 0.0 if n >= 2 else math.nan
        return Difference(n, mean, sd, math.nan, math.nan, math.nan)
    p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return Difference(**asdict(summarize(differences)), p=p)


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's step-down correction for the tests of one table.

    Args:
        p_values: one a test; NaN stays NaN, and does not count as a test.

    Example:
        >>> holm([0.01, 0.04, 0.03, float("nan")]).round(6).tolist()
        [0.03, 0.06, 0.06, nan]
    """
    p = np.array(p_values, dtype=np.float64)
    told = np.isfinite(p)
    if told.sum() > 1:
        p[told] = multipletests(p[told], alpha=ALPHA, method="holm")[1]
    return p


def corrected(differences: Sequence[Difference]) -> list[float]:
    """Holm's p of each, over those of them that have seeds enough to be tested; NaN of the others.

    Example:
        >>> two, three = paired_difference([2, 3], [1, 1]), paired_difference([2, 3, 5], [1, 1, 1])
        >>> [round(p, 3) for p in corrected([two, three])]
        [nan, 0.118]
    """
    return [float(p) for p in holm([d.p if d.n >= MIN_SEEDS else math.nan for d in differences])]


def detectable_difference(n: int, sd: float) -> float:
    """The minimum detectable difference of ``n`` pairs at 80 % power.

    Args:
        n: pairs.
        sd: standard deviation of their differences.

    Returns:
        The difference at which the two-sided paired t test at 5 % has a power of 80 %; NaN for
        fewer than two pairs or without a spread.

    Example:
        >>> [round(detectable_difference(n, sd=1.0), 2) for n in (3, 5, 10)]
        [3.26, 1.68, 1.0]
    """
    if n < 2 or not sd > 0:
        return math.nan
    size = TTestPower().solve_power(nobs=n, alpha=ALPHA, power=POWER, alternative="two-sided")
    return float(np.squeeze(size)) * sd


def amount(value: float, unit: str = "") -> str:
    """A difference with two digits and its unit.

    Example:
        >>> amount(1.629, "points"), amount(0.0123), amount(123.4)
        ('1.6 points', '0.012', '123')
    """
    digits = f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"
    return f"{digits} {unit}".rstrip()


def caution(difference: Difference, p_holm: float, unit: str = "") -> str:
    """Why no difference may be claimed; empty where one may.

    Decided in this order: fewer than ``MIN_SEEDS`` pairs; no spread among them; p not below 5 %,
    with the minimum detectable difference; p below 5 % before Holm's correction only.

    Args:
        difference: of the pairs.
        p_holm: its p-value after correction over its table.
        unit: of the differences, "points" for percentages.

    Example:
        >>> caution(paired_difference([92.0], [91.0]), float("nan"))
        'not tested (1 seed, at least 3 are needed)'
        >>> caution(paired_difference([92.0, 93.5, 92.5], [91.0, 92.0, 92.0]), 0.0742, "points")
        'not significantly different (minimum detectable difference 1.6 points at 80 % power)'
    """
    n = difference.n
    if n < MIN_SEEDS:
        return f"not tested ({n} seed{'s' * (n != 1)}, at least {MIN_SEEDS} are needed)"
    if not math.isfinite(difference.p):
        return "not tested (the same difference at every seed)"
    if difference.p < ALPHA and p_holm < ALPHA:
        return ""
    least = detectable_difference(n, difference.sd)
    words = f"minimum detectable difference {amount(least, unit)} at {POWER:.0%} power"
    if difference.p < ALPHA:
        words = "p < 0.05 only before Holm's correction"
    return f"not significantly different ({words.replace('%', ' %')})"


def sign(words: str) -> str:
    """The mark in a table for what ``caution`` says.

    Example:
        >>> sign(""), sign("not tested (1 seed, at least 3 are needed)")
        ('', '†')
        >>> sign("not significantly different (p < 0.05 only before Holm's correction)")
        'n.s.'
    """
    return "" if not words else "†" if words.startswith("not tested") else "n.s."


def summary_table(runs: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """``summarize`` over the seeds of each arm.

    Args:
        runs: one row a run, with columns arm, value and those of ``by``.
        by: what a row of the table is, besides the arm.

    Returns:
        Columns ``by``, arm, n, mean, sd, low, high.

    Example:
        >>> runs = pd.DataFrame({"data": "x", "arm": ["a", "a", "b"], "value": [1.0, 3.0, 5.0]})
        >>> summary_table(runs, ["data"])[["arm", "n", "mean"]].values.tolist()
        [['a', 2, 2.0], ['b', 1, 5.0]]
    """
    keys = [*by, "arm"]
    rows: list[dict[Any, Any]] = []
    for key, group in runs.groupby(keys, sort=False, dropna=False):
        assert isinstance(key, tuple)
        rows.append(dict(zip(keys, key, strict=True)) | asdict(summarize(group["value"])))
    return pd.DataFrame(rows, columns=[*keys, "n", "mean", "sd", "low", "high"])


def pairs(runs: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Each run beside the run of the arm it is against, at the same seed.

    Args:
        runs: one row a run, with columns arm, against (an arm, or null), seed, value and ``by``.
        by: what else the two must share.

    Returns:
        Columns ``by``, seed, arm, against, value, baseline; finite pairs only.

    Example:
        >>> runs = pd.DataFrame({"arm": ["a", "b"], "against": [None, "a"], "seed": 0,
        ...                      "value": [1.0, 3.0]})
        >>> pairs(runs, []).values.tolist()
        [[0, 'b', 'a', 3.0, 1.0]]
    """
    own = runs[[*by, "seed", "arm", "against", "value"]].dropna(subset=["against"])
    other = runs[[*by, "seed", "arm", "value"]]
    other = other.rename(columns={"arm": "against", "value": "baseline"})
    both = own.merge(other, on=[*by, "seed", "against"])
    return both[np.isfinite(both["value"]) & np.isfinite(both["baseline"])]


def difference_table(runs: pd.DataFrame, by: Sequence[str], unit: str = "") -> pd.DataFrame:
    """``paired_difference`` of each arm and its baseline, with Holm's correction over the table.

    Args:
        runs: as ``pairs`` takes them.
        by: what a row of the table is, besides the arm.
        unit: of the differences, for the cautions.

    Returns:
        Columns ``by``, arm, against, n, mean, sd, low, high, p, p_holm, detectable, caution.

    Example:
        >>> runs = pd.DataFrame({"arm": list("aaabbb"), "against": [None] * 3 + ["a"] * 3,
        ...                      "seed": [0, 1, 2] * 2, "value": [1.0, 2.0, 3.0, 2.0, 3.1, 3.9]})
        >>> table = difference_table(runs, [])
        >>> table[["arm", "n", "mean", "p_holm"]].round(3).values.tolist()
        [['b', 3, 1.0, 0.003]]
    """
    both = pairs(runs, by)
    keys = [*by, "arm", "against"]
    found: list[tuple[dict[Any, Any], Difference]] = []
    for key, group in both.groupby(keys, sort=False, dropna=False):
        assert isinstance(key, tuple)
        difference = paired_difference(group["value"], group["baseline"])
        found.append((dict(zip(keys, key, strict=True)), difference))
    p_values = corrected([difference for _, difference in found])
    rows = [
        key
        | asdict(difference)
        | {
            "p_holm": p,
            "detectable": detectable_difference(difference.n, difference.sd),
            "caution": caution(difference, p, unit),
        }
        for (key, difference), p in zip(found, p_values, strict=True)
    ]
    columns = ["n", "mean", "sd", "low", "high", "p", "p_holm", "detectable", "caution"]
    return pd.DataFrame(rows, columns=[*keys, *columns])


def difference_of(row: Mapping[str, Any]) -> Difference:
    """The ``Difference`` in a row of ``difference_table``."""
    return Difference(**{field.name: row[field.name] for field in fields(Difference)})
