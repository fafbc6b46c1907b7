"""The benchmark's statistics against examples worked by hand, a textbook, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from iecl_solo.errors import IECLError
from iecl_solo.report.statistics import (
    ALPHA,
    MIN_SEEDS,
    POWER,
    caution,
    corrected,
    detectable_difference,
    difference_table,
    holm,
    paired_difference,
    pairs,
    summarize,
    summary_table,
)

# Student's own example (1908, "The probable error of a mean"): hours of sleep gained by ten
# patients on two drugs
LAEVO = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
DEXTRO = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]


def test_summary_by_hand():
    # 2, 4, 4, 6: mean 4; squares of deviations 4 + 0 + 0 + 4 = 8; variance 8/3; and t of 3
    # degrees of freedom at 97.5 % is 3.1824 in every table
    summary = summarize([2, 4, 4, 6])
    sd = math.sqrt(8 / 3)
    half = 3.1824 * sd / math.sqrt(4)
    assert (summary.n, summary.mean) == (4, 4.0)
    assert summary.sd == pytest.approx(sd)
    assert (summary.low, summary.high) == pytest.approx((4 - half, 4 + half), abs=1e-4)


def test_paired_difference_by_hand():
    # the differences are 1.2 2.4 1.3 1.3 0 1 1.8 0.8 4.6 1.4: sum 15.8, sum of squares 38.58;
    # variance (38.58 - 15.8^2 / 10) / 9 = 1.5129; t = 1.58 / sqrt(0.15129) = 4.0621; t of 9
    # degrees of freedom at 97.5 % is 2.2622; Student's t puts 0.00283 beyond 4.0621
    difference = paired_difference(LAEVO, DEXTRO)
    half = 2.2622 * math.sqrt(1.5129 / 10)
    assert difference.n == 10
    assert difference.mean == pytest.approx(1.58)
    assert difference.sd == pytest.approx(math.sqrt(1.5129), abs=1e-4)
    assert (difference.low, difference.high) == pytest.approx((1.58 - half, 1.58 + half), abs=1e-4)
    assert difference.p == pytest.approx(0.00283, abs=1e-5)


def test_pairing_matters():
    # unpaired, the two samples are not significantly different: the spread of patients hides it
    unpaired = stats.ttest_ind(LAEVO, DEXTRO).pvalue
    assert unpaired > ALPHA > paired_difference(LAEVO, DEXTRO).p


def test_holm_textbook():
    # 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1, and none below the one before it
    corrected = holm([0.01, 0.04, 0.03, 0.005])
    assert corrected == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_counts_only_what_was_tested():
    corrected = holm([0.02, math.nan, 0.03])
    assert corrected[[0, 2]] == pytest.approx([0.04, 0.04])
    assert math.isnan(corrected[1])
    assert np.isnan(holm([math.nan])).all()
    assert len(holm([])) == 0


def test_too_few_seeds_make_no_test_of_a_table():
    few = paired_difference([2.0, 3.0], [1.0, 1.5])
    enough = [paired_difference([2, 3, 5], [1, 1, 1]), paired_difference([2, 3, 3.1], [1, 1, 1])]
    found = corrected([few, *enough])
    assert math.isnan(found[0])
    assert found[1:] == pytest.approx(holm([d.p for d in enough]).tolist())


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_detectable_difference_has_its_power(n: int):
    # the power at that difference, from the noncentral t itself
    shift = detectable_difference(n, sd=2.0) / 2.0 * math.sqrt(n)
    critical = stats.t.ppf(1 - ALPHA / 2, n - 1)
    power = stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift)
    assert power == pytest.approx(POWER, abs=1e-3)


def test_interval_and_p_keep_their_promise():
    rng = np.random.default_rng(0)
    draws = [paired_difference(row, np.zeros(4)) for row in rng.normal(1.0, 3.0, (2000, 4))]
    covered = np.mean([d.low <= 1.0 <= d.high for d in draws])
    assert covered == pytest.approx(0.95, abs=0.015)
    # p < 5 % and an interval without 0 are the same statement
    assert all((d.p < ALPHA) == (d.low > 0 or d.high < 0) for d in draws)


@pytest.mark.parametrize("values", [[], [1.0], [math.nan, 1.0, math.inf]])
def test_too_few_have_no_interval(values: list[float]):
    summary = summarize(values)
    difference = paired_difference(values, [0.0] * len(values))
    assert summary.n == difference.n == min(len(values), 1)
    assert math.isnan(summary.low) and math.isnan(summary.sd)
    assert math.isnan(difference.low) and math.isnan(difference.p)


@pytest.mark.parametrize("values", [[95.0, 95.0], [0.1 + 0.2, 0.3, 0.3]])
def test_equal_values_have_no_interval(values: list[float]):
    # an interval of width 0 would say that the mean is known exactly
    summary = summarize(values)
    assert (summary.n, summary.sd) == (len(values), 0.0)
    assert summary.mean == pytest.approx(values[0])
    assert math.isnan(summary.low) and math.isnan(summary.high)


def test_equal_differences_are_no_evidence():
    # 0.3 - 0.1 and 0.2 differ in the last bit: a t test of them would report p = 1e-16
    difference = paired_difference([0.3, 0.2, 0.2], [0.1, 0.0, 0.0])
    assert difference.sd == 0
    assert math.isnan(difference.p) and math.isnan(difference.low)
    assert "same difference" in caution(difference, math.nan)


def test_pairs_of_unequal_length_are_refused():
    with pytest.raises(IECLError, match="3 and 2 numbers"):
        paired_difference([1, 2, 3], [1, 2])


def test_cautions():
    clear = [1.0, 1.1, 0.9]
    zero = [0.0, 0.0, 0.0]
    assert caution(paired_difference(clear, zero), 0.01) == ""
    # however small p is, fewer than three seeds claim nothing
    two = paired_difference([1.0, 1.0001], [0.0, 0.0])
    assert two.n == MIN_SEEDS - 1 and two.p < 1e-3
    assert caution(two, two.p) == "not tested (2 seeds, at least 3 are needed)"
    assert "only before Holm" in caution(paired_difference(clear, zero), 0.06)
    unclear = paired_difference([1.0, -2.0, 3.0], zero)
    least = detectable_difference(3, unclear.sd)
    assert least > unclear.mean
    assert caution(unclear, 1.0, "nats") == (
        "not significantly different (minimum detectable difference "
        f"{least:.2g} nats at 80 % power)"
    )


def runs() -> pd.DataFrame:
    """Two arms against one baseline in two settings; one run of an arm is missing."""
    rows = [
        ("x", "base", None, 0, 50.0),
        ("x", "base", None, 1, 52.0),
        ("x", "base", None, 2, 54.0),
        ("x", "b", "base", 2, 55.5),
        ("x", "b", "base", 0, 51.0),
        ("x", "b", "base", 1, 52.9),
        ("x", "c", "base", 0, 40.0),
        ("x", "c", "base", 1, 50.0),
        ("y", "base", None, 0, 10.0),
        ("y", "b", "base", 0, 11.0),
        ("y", "b", "base", 7, 99.0),
    ]
    return pd.DataFrame(rows, columns=["data", "arm", "against", "seed", "value"])


def test_summary_table_is_by_setting_and_arm():
    table = summary_table(runs(), ["data"]).set_index(["data", "arm"])
    assert table.loc[("x", "base"), ["n", "mean", "sd"]].tolist() == [3, 52.0, 2.0]
    assert table.loc[("y", "b"), "n"] == 2
    assert len(table) == 5


def test_pairs_share_setting_and_seed():
    both = pairs(runs(), ["data"]).set_index(["data", "arm", "seed"])
    assert len(both) == 6  # seed 7 of b on y has no baseline
    assert both.loc[("x", "b", 2), ["value", "baseline"]].tolist() == [55.5, 54.0]


def test_difference_table():
    table = difference_table(runs(), ["data"]).set_index(["data", "arm"])
    assert len(table) == 3
    told = table.loc[("x", "b")]
    own = paired_difference([51.0, 52.9, 55.5], [50.0, 52.0, 54.0])
    assert told[["n", "mean", "p"]].tolist() == pytest.approx([3, own.mean, own.p])
    # c's two seeds are too few for a test, and y's one seed makes none
    assert told["p_holm"] == pytest.approx(own.p) and math.isnan(table.loc[("x", "c"), "p_holm"])
    assert table.loc[("x", "c"), "caution"] == "not tested (2 seeds, at least 3 are needed)"
    assert table.loc[("y", "b"), "caution"] == "not tested (1 seed, at least 3 are needed)"
    assert math.isnan(table.loc[("y", "b"), "p"])


def test_tables_of_nothing_keep_their_columns():
    nothing = runs().iloc[:0]
    assert list(summary_table(nothing, ["data"]))[:3] == ["data", "arm", "n"]
    assert "p_holm" in difference_table(nothing, ["data"])
    baselines = runs()[runs()["against"].isna()]
    assert difference_table(baselines, ["data"]).empty
