"""A report of whatever a store holds: what it says, in four forms, and what it does not claim."""

from __future__ import annotations

import ast
import errno
import json
import re
import shutil
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from support_report import ARMS, BATCH, add_galleries, make_store, rich_store

import iecl_solo.report.sections as report_sections
from iecl_solo.cli.main import main
from iecl_solo.errors import IECLError
from iecl_solo.evaluate import pictures
from iecl_solo.experiments.store import STORE, Store, read_rows
from iecl_solo.report.answer import answer, collapses, mixed
from iecl_solo.report.figures import COLOURS, looks
from iecl_solo.report.page import write_report
from iecl_solo.report.results import read, slug
from iecl_solo.report.sections import overview
from iecl_solo.report.sections.curves import over_seeds
from iecl_solo.report.sections.measures import main_table
from iecl_solo.report.sections.sensitivity import sweeps
from iecl_solo.report.tables import title
from iecl_solo.solo.registry import OBJECTIVES

ROOT = Path(__file__).parents[2]
VOID = {"meta", "link", "br", "hr", "img", "input"}
TWO = {"simclr": ARMS["simclr"], "iecl_simclr": ARMS["iecl_simclr"]}


class Page(HTMLParser):
    """A page's elements, checked to be closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if "id" in dict(attrs):
            self.ids[dict(attrs)["id"]] += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report of everything there is."""
    folder = tmp_path_factory.mktemp("rich")
    write_report(rich_store(folder), folder)
    return folder


def sections(folder: Path) -> set[str]:
    page = Page(folder / "report.html")
    return {a["id"] for tag, a in page.tags if tag == "section" and a["id"]}


def test_page_is_whole_and_alone(rich: Path):
    page = Page(rich / "report.html")
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object", "img"})
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            reference = attributes.get(name) or ""
            assert reference.startswith(("#", "data:")) or not reference, reference
    assert "@import" not in page.source and not re.search(r"url\((?!#)", page.source)
    assert "http" not in re.sub(r"<pre.*?</pre>", "", page.source, flags=re.DOTALL)


def test_ids_are_one_each_and_all_references_are_kept(rich: Path):
    page = Page(rich / "report.html")
    assert [name for name, n in page.ids.items() if n > 1] == []
    wanted = set(re.findall(r'(?:href|aria-labelledby)="#?([\w-]+)"', page.source))
    wanted |= set(re.findall(r"url\(#([^)]+)\)", page.source))
    assert wanted - set(page.ids) == set()


def test_page_is_accessible(rich: Path):
    page = Page(rich / "report.html")
    assert ("html", {"lang": "en"}) in page.tags
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes["role"] == "img" and len(attributes["aria-label"] or "") > 30
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
        if "scroll" in (attributes.get("class") or ""):
            assert attributes["tabindex"] == "0" and attributes["aria-label"]
    # no colour is nailed down: each is a property that the page sets for light and for dark
    drawings = "".join(re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL))
    assert re.findall(r"#[0-9a-f]{6}\b", drawings) == []
    used = set(re.findall(r"var\((--[\w-]+)\)", page.source))
    light, dark = page.source.split("@media (prefers-color-scheme: dark)")
    assert all(f"{name}:" in light and f"{name}:" in dark for name in used)


def test_rich_store_has_every_section(rich: Path):
    assert sections(rich) == {
        *("knn-acc1", "linear-acc1", "query-entropy", "batch-size", "sensitivity", "cost"),
        *("curves", "delta-h", "published", "others", "missing", "runs"),
        *("views", "neighbours", "map"),
    }
    page = Page(rich / "report.html")
    figures = {path.stem for path in (rich / "figures").iterdir()}
    assert page.count("svg") == len(figures)
    kinds = {re.match(r"[a-z]+", name)[0] for name in figures}
    assert kinds == {
        *("forest", "batch", "sensitivity", "curve", "delta", "views", "neighbours", "map"),
    }
    # the same images for each of four arms in three settings; the host has no transform
    assert sum(name.startswith("neighbours-") for name in figures) == 12
    assert sum(name.startswith("views-") for name in figures) == 9
    # both curves of figure 4 in three settings, and the three others folded
    assert sum(name.startswith("curve-") for name in figures) == 15
    tables = {path.stem for path in (rich / "tables").glob("*.csv")}
    assert {path.stem for path in (rich / "tables").glob("*.tex")} == tables - {"runs"}
    assert page.count("table") == len(tables) - 1


def test_poor_store_has_no_empty_section(tmp_path: Path):
    arms = {"simclr": {"method": "simclr"}}
    write_report(make_store(tmp_path, arms=arms, measures=["knn_acc1"]), tmp_path)
    assert sections(tmp_path) == {"knn-acc1", "cost", "others", "runs"}
    page = Page(tmp_path / "report.html")
    assert page.count("svg") == 0
    assert "no difference is tested" in page.text
    assert "pass" not in page.text.split() and "fail" not in page.text.split()


def test_empty_store(tmp_path: Path):
    write_report(Store(tmp_path / STORE), tmp_path)
    assert sections(tmp_path) == {"runs"}
    assert "Nothing can be said yet" in Page(tmp_path / "report.html").text
    assert not (tmp_path / "tables").exists()


def test_store_with_nothing_but_failures(tmp_path: Path):
    store = make_store(tmp_path, arms=TWO, seeds=(0, 1), failed=(0, 1), running=(2,), absent=(3,))
    write_report(store, tmp_path)
    page = Page(tmp_path / "report.html")
    assert sections(tmp_path) == {"missing", "runs"}
    assert (
        "Nothing can be said yet: 0 of 4 runs done, 2 failed, 1 running or interrupted, "
        "1 not started." in page.text
    )
    # the error as it was, escaped; in the table its last line
    assert page.text.count("ValueError: 50 % of <b>x_y</b> & $z$ | w") == 4


def test_main_table_is_what_pandas_says(rich: Path):
    frame = pd.read_csv(rich / "tables" / "runs.csv")
    own = frame[frame["measure"] == "linear_acc1"].groupby([BATCH, "arm"])["value"]
    table = pd.read_csv(rich / "tables" / "linear-acc1.csv").set_index([BATCH, "arm"])
    for ours, theirs in (("mean", own.mean()), ("sd", own.std()), ("n", own.count())):
        pd.testing.assert_series_equal(
            table[ours].sort_index(), theirs, check_names=False, check_dtype=False
        )
    text = (rich / "report.md").read_text(encoding="utf-8")
    for (batch, arm), row in table.iterrows():
        cell = f"{row['mean']:.2f} ± {row['sd']:.2f}"
        line = next(
            x for x in text.splitlines() if x.startswith(f"| digits | {batch} | ") and cell in x
        )
        assert list(ARMS).index(arm) == [cell in c for c in line.split("|")[3:]].index(True)


def test_differences_are_what_scipy_says(rich: Path):
    frame = pd.read_csv(rich / "tables" / "runs.csv")
    frame = frame[frame["measure"] == "knn_acc1"]
    wide = frame.pivot_table(index=[BATCH, "seed"], columns="arm", values="value")
    table = pd.read_csv(rich / "tables" / "knn-acc1-differences.csv")
    assert len(table) == 9
    for row in table.to_dict("records"):
        both = wide.loc[row[BATCH]][[row["arm"], "simclr"]].dropna()
        test = stats.ttest_rel(both[row["arm"]], both["simclr"])
        low, high = test.confidence_interval()
        assert [row["p"], row["low"], row["high"]] == pytest.approx([test.pvalue, low, high])
        assert row["n"] == len(both)
    ordered = table.sort_values("p")
    by_hand = np.maximum.accumulate(ordered["p"] * np.arange(9, 0, -1)).clip(upper=1)
    assert ordered["p_holm"].tolist() == pytest.approx(by_hand.tolist())


def test_best_and_insignificant_are_marked(rich: Path):
    lines = (rich / "report.md").read_text(encoding="utf-8").splitlines()
    line = next(x for x in lines if x.startswith("| digits | 128 | "))
    baseline, iecl, small, large = (cell.strip() for cell in line.split("|")[3:7])
    assert iecl.startswith("**") and not iecl.endswith("n.s.")
    assert small.endswith("n.s.") and not large.endswith("n.s.")
    assert "**" not in baseline + small + large and "n.s." not in baseline


def test_one_seed_claims_nothing(tmp_path: Path):
    store = make_store(tmp_path, axes={BATCH: [64, 256]}, seeds=(0,))
    write_report(store, tmp_path)
    page = Page(tmp_path / "report.html")
    assert "Not tested (1 seed, too few to test): in k-NN top-1 the largest diff" in page.text
    assert page.text.count("not tested (1 seed, at least 3 are needed)") == 9
    assert page.count("b") == 0  # a lead of one seed is not set off
    # nor does the sign for "not tested" read as "equal"
    assert "≈" not in page.text and "n.s." not in page.text
    assert len(re.findall(r"\d †", page.text)) == 12  # three in a row of the table, and of the map
    table = pd.read_csv(tmp_path / "tables" / "knn-acc1-differences.csv")
    assert table[["p", "p_holm", "low", "high"]].isna().all(axis=None)
    for name in ("knn-acc1", "knn-acc1-differences"):
        tex = (tmp_path / "tables" / f"{name}.tex").read_text(encoding="utf-8")
        assert r"\pm" not in tex.partition(r"\midrule")[2]
    differences = (tmp_path / "tables" / "knn-acc1-differences.tex").read_text(encoding="utf-8")
    assert r"\textbf" not in differences


def test_two_seeds_claim_nothing_however_small_p_is(tmp_path: Path):
    store = make_store(tmp_path, arms=TWO, seeds=(0, 1), spread=1e-6)
    results = read(store)
    assert results.differences["knn_acc1"]["p"].max() < 0.01
    assert answer(results).startswith("Not tested (2 seeds, too few to test): ")


def test_answer_with_its_interval(tmp_path: Path):
    axes = {"method_kwargs.temperature": [0.1, 0.2]}
    results = read(make_store(tmp_path, arms=TWO, seeds=range(5), axes=axes))
    frame = results.of("knn_acc1").pivot_table(
        index=["seed", "setting"], columns="arm", values="value"
    )
    per_seed = (frame["iecl_simclr"] - frame["simclr"]).groupby("seed").mean()
    test = stats.ttest_1samp(per_seed, 0.0)
    low, high = test.confidence_interval()
    assert answer(results) == (
        f"iecl_simclr is ahead of simclr in k-NN top-1 by +{per_seed.mean():.2f} points (95 % "
        f"interval +{low:.2f} to +{high:.2f}), averaged over 2 settings; 5 seeds, paired t, "
        f"p < 0.001."
    )


def test_an_arm_with_a_comma_is_one_arm(tmp_path: Path):
    arms = {**TWO, "all, convex": {"method": "iecl_simclr"}}
    words = answer(read(make_store(tmp_path, arms=arms, seeds=range(5), spread=0.05)))
    assert words.startswith("In k-NN top-1, iecl_simclr and “all, convex” are ahead of simclr; ")


@pytest.mark.parametrize("gain", [0.5, -0.5])
def test_what_is_better_lower_is_ahead_below(gain: float, tmp_path: Path):
    other = "climb_simclr"
    for arms, measure in (
        (("iecl_simclr",), "uniformity"),
        (("iecl_simclr", other), "uniformity"),
        (("iecl_simclr", other), "alpha_req"),
    ):
        store = make_store(
            tmp_path / f"{measure} {len(arms)}",
            arms={arm: {"method": arm} for arm in ("simclr", *arms)},
            measures=[measure],
        )
        gains = {"simclr": 0.0, "iecl_simclr": gain, other: -gain}
        for cell in store.cells().to_dict("records"):
            noise = 0.01 * cell["seed"] * gains[cell["arm"]]
            store.finish(cell["id"], {measure: -3 + gains[cell["arm"]] + noise})
        words = answer(read(store))
        if len(arms) == 1:
            assert f"iecl_simclr is {'behind' if gain > 0 else 'ahead of'} simclr in" in words
            continue
        high, low = ("iecl_simclr", other) if gain > 0 else (other, "iecl_simclr")
        if measure == "uniformity":
            assert f", {low} is ahead of simclr, {high} is behind simclr; " in words
        else:  # neither more nor less of it is better
            assert f", {high} is above simclr, {low} is below simclr; " in words


def test_answer_without_a_difference(tmp_path: Path):
    store = make_store(tmp_path, arms=TWO, seeds=range(3), spread=20.0)
    found = answer(read(store))
    assert found.startswith("iecl_simclr is not significantly different from simclr in k-NN top-1")
    assert re.search(r"3 seeds, paired t, p = 0\.\d{3}, minimum detectable difference \d+ p", found)
    assert found.endswith(" points at 80 % power.")
    assert "95 % interval −" in found


@pytest.mark.parametrize("per_doubling", [-1.0, 0.0])
def test_answer_says_what_the_batch_size_does(per_doubling: float, tmp_path: Path):
    store = make_store(tmp_path, arms=TWO, seeds=range(4), axes={BATCH: [64, 128, 512]})
    rng = np.random.default_rng(0)
    slopes = []
    for seed in range(4):
        gains = 5 + per_doubling * np.array([-1, 0, 2]) + rng.normal(0, 0.1, 3)
        # least squares by hand: the sizes' logarithms are 6, 7 and 9, their mean is 22 / 3
        x = np.array([6, 7, 9]) - 22 / 3
        slopes.append((x * gains).sum() / (x * x).sum())
        for size, gain in zip((64, 128, 512), gains, strict=True):
            for arm, value in (("simclr", 70.0 + seed), ("iecl_simclr", 70.0 + seed + gain)):
                store.finish(f"digits-{arm}-({size},)-{seed}", {"knn_acc1": value})
    test = stats.ttest_1samp(slopes, 0.0)
    low, high = test.confidence_interval()
    words = answer(read(store))
    signed = [f"{v:+.2f}".replace("-", "−") for v in (np.mean(slopes), low, high)]
    signed = [v[1:] if v[1:] == "0.00" else v for v in signed]  # no sign where it is rounded off
    amount = "{} points (95 % interval {} to {}) per doubling.".format(*signed)
    assert "is ahead of simclr in k-NN top-1 by +" in words and words.endswith(amount)
    told = "it falls with the batch size" in words
    assert told == (per_doubling != 0) == (test.pvalue < 0.05)


def test_missing_runs_make_no_trend(tmp_path: Path):
    store = make_store(
        tmp_path, arms=TWO, data=("a", "b"), seeds=range(3), axes={BATCH: [64, 128, 512]}
    )
    rng = np.random.default_rng(0)
    for cell in store.cells().to_dict("records"):
        gain = {"a": 1.0, "b": 5.0}[cell["data"]] * (cell["arm"] == "iecl_simclr")
        store.finish(cell["id"], {"knn_acc1": 80 + gain + rng.normal(0, 0.02)})
        if cell["data"] == "b" and cell[BATCH] == 512:
            store.fail(cell["id"], "CUDA out of memory")
    words = answer(read(store))
    assert "; it does not change significantly with the batch size: " in words
    for cell in store.cells().to_dict("records"):  # of two seeds there is no test
        if cell["seed"] == 2:
            store.fail(cell["id"], "killed")
    assert "; whether that changes with the batch size is not tested: " in answer(read(store))
    # where no data set has every size there is nothing to say
    for seed in range(3):
        store.fail(f"a-iecl_simclr-(64,)-{seed}", "killed")
    assert "batch size" not in answer(read(store))


def test_a_gain_in_one_setting_is_not_hidden_by_the_mean(tmp_path: Path):
    store = make_store(tmp_path, arms=TWO, data=("photos", "drawings"))
    gains = {"photos": (5.0, 5.1, 5.2), "drawings": (-9.0, -5.0, -1.0)}
    for cell in store.cells().to_dict("records"):
        gain = gains[cell["data"]][cell["seed"]] * (cell["arm"] == "iecl_simclr")
        store.finish(cell["id"], {"knn_acc1": 80.0 + gain})
    words = answer(read(store))
    assert words.startswith("iecl_simclr is not significantly different from simclr")
    assert "Setting by setting, Holm-corrected over 2 comparisons: iecl_simclr ahead of" in words
    assert "by +5.10 points" in words and words.endswith("(photos).")


def test_an_arm_without_any_pair_is_named(tmp_path: Path):
    store = make_store(tmp_path, arms={"simclr": {}, "a": {}, "b": {}})
    for seed in range(3):
        for arm, gain in (("simclr", 0.0), ("a", 5 + 0.1 * seed)):
            store.finish(f"digits-{arm}-()-{seed}", {"knn_acc1": 80 + gain})
        store.fail(f"digits-b-()-{seed}", "killed")
    assert "a is ahead of simclr, b is not tested" in answer(read(store))


def test_runs_of_two_solo_learns_are_not_compared_without_a_word(tmp_path: Path):
    store = make_store(tmp_path, arms=TWO)
    for arm, version in zip(TWO, ("1.0.2", "1.0.6"), strict=True):
        for seed in range(3):
            versions = {"solo-learn": version}
            store.finish(f"digits-{arm}-()-{seed}", {"knn_acc1": 80.0 + seed}, versions=versions)
    (notice,) = mixed(read(store))
    assert "1.0.2, 1.0.6" in notice
    write_report(store, tmp_path)
    assert notice in (tmp_path / "report.html").read_text().replace("&#39;", "'")


def test_arms_without_enough_seeds_are_not_called_alike(tmp_path: Path):
    arms = {"simclr": {}, "a": {}, "b": {}}
    store = make_store(tmp_path, arms=arms)

    def said(a: float, *failed: str) -> str:
        gains = {"simclr": np.zeros(3), "a": a + np.array([0.0, 0.2, -1.0]), "b": [9.0, 9.1, 9.3]}
        for arm in arms:
            for seed in range(3):
                cell = f"digits-{arm}-()-{seed}"
                store.finish(cell, {"knn_acc1": 80.0 + gains[arm][seed]})
                if f"{arm}{seed}" in failed:
                    store.fail(cell, "killed")
        return answer(read(store)).partition("): ")[2]

    largest = "the largest difference is +9.00 points, b (1 to 3 seeds, paired t, Holm-corrected"
    words = "In k-NN top-1, a is ahead of simclr, b is not tested; "
    assert said(9.0, "b1", "b2") == f"{words}{largest})."
    words = "In k-NN top-1, a is not significantly different from simclr, b is not tested; "
    found = said(0.0, "b1", "b2")
    assert found.startswith(f"{words}{largest}; minimum detectable difference 2.1 points or more")


def test_arms_of_which_no_seed_is_whole(tmp_path: Path):
    arms = {"simclr": {}, "a": {}, "b": {}}
    store = make_store(tmp_path, arms=arms, data=("x", "y"), seeds=(0, 1))
    for cell in store.cells().to_dict("records"):
        if (cell["data"] == "x") != (cell["seed"] == 0):
            store.fail(cell["id"], "killed")
    words = "So far (6 of 12 runs): No seed of an arm and its baseline has every setting yet."
    assert answer(read(store)) == words
    # where a has seeds by now and b has none, the largest difference is of a
    for cell in store.cells().to_dict("records"):
        if cell["arm"] != "b":
            store.finish(cell["id"], {"knn_acc1": 80.0 + cell["seed"] * (cell["arm"] == "a")})
    assert answer(read(store)).endswith(
        "Not tested (0 to 2 seeds, too few to test): in k-NN top-1 the largest difference is "
        "+0.50 points (95 % interval −5.85 to +6.85), a, averaged over 2 settings."
    )


def test_why_nothing_is_tested(tmp_path: Path):
    store = make_store(tmp_path, arms={"simclr": {}, "a": {}, "b": {}})
    for cell in store.cells().to_dict("records"):
        store.finish(cell["id"], {"knn_acc1": 80.0 + {"simclr": 0, "a": 1, "b": 2}[cell["arm"]]})
    results = read(store)
    assert answer(results) == (
        "Not tested (3 seeds, the same difference at every one): in k-NN top-1 the largest "
        "difference is +2.00 points, b."
    )
    assert main_table(results, "knn_acc1").caption.endswith(
        " †: not tested against its baseline (fewer than 3 seeds, or the same difference at every "
        "seed)."
    )
    store.fail("digits-b-()-1", "killed")
    words = "Not tested (2 to 3 seeds, too few to test or the same difference at every one): in"
    assert words in answer(read(store))


def test_rows_outside_the_grid_do_not_count(tmp_path: Path):
    store = make_store(tmp_path, arms=TWO, seeds=range(4))
    store.begin({"cells": store.meta()["cells"][:4], "seeds": [0, 1]})
    results = read(store)
    assert len(results.cells) == 4 and results.missing == []
    assert results.of("knn_acc1")["seed"].unique().tolist() == [0, 1]


def test_values_that_are_none(tmp_path: Path):
    store = make_store(tmp_path, arms=TWO, seeds=range(3))
    store.finish(store.meta()["cells"][0], {"knn_acc1": float("nan"), "linear_acc1": float("inf")})
    write_report(store, tmp_path)
    page = Page(tmp_path / "report.html")
    assert "no finite value: knn_acc1, linear_acc1" in page.text
    table = pd.read_csv(tmp_path / "tables" / "knn-acc1.csv").set_index("arm")
    assert table["n"].to_dict() == {"simclr": 2, "iecl_simclr": 3}


def test_cost_bars(rich: Path):
    lines = (rich / "report.md").read_text(encoding="utf-8").splitlines()
    rows = [[c.strip() for c in x.split("|")[1:-1]] for x in lines if x.startswith("| digits | 64")]
    cost = {row[2]: row for row in rows if row[3] == "cpu"}
    assert cost["iecl_simclr"][4:8] == [r"1.030 \[1.020, 1.040\]", "pass", "1.020", "pass"]
    assert cost["beta 1"][4:8] == [r"1.200 \[1.190, 1.210\]", "fail", "1.190", "fail"]
    assert cost["simclr"][4:8] == ["–"] * 4


def test_answer_of_a_cost_benchmark(tmp_path: Path):
    arms = {**TWO, "beta 1": ARMS["beta 1"]}
    store = make_store(tmp_path, arms=arms, cost=True, measures=["time_ratio", "memory_ratio"])
    assert answer(read(store)) == (
        "Against a bar of 1.05 × the baseline, iecl_simclr takes 1.030 × the step time and "
        "1.020 × the peak memory (within) and beta 1 takes 1.200 × the step time and 1.190 × the "
        "peak memory (above); the largest over all settings and devices."
    )


def test_published_figures_are_marked_as_theirs(rich: Path):
    page = Page(rich / "report.html")
    # six of the data set that is here; there is nothing to put beside the others
    assert page.text.count("(theirs)") == 6 and "elsewhere" not in page.text
    drawing = next((rich / "figures").glob("batch-size-*")).read_text(encoding="utf-8")
    assert "iecl_simclr, published" in drawing


@pytest.mark.parametrize(("grid", "said"), [([0.1, 0.3, 1], True), ([0.03, 0.1, 0.3], False)])
def test_choice_at_the_end_of_its_grid_is_said(tmp_path: Path, grid: list[float], said: bool):
    measures = ["knn_acc1", "linear_acc1"]
    evaluation = {"linear": {"lr": grid}}
    store = make_store(tmp_path, arms=TWO, seeds=(0, 1), measures=measures, evaluation=evaluation)
    write_report(store, tmp_path)
    words = "The learning rate chosen was the lowest of its grid (0.1) in 4 of 4 runs"
    assert (words in (tmp_path / "report.md").read_text(encoding="utf-8")) == said


NASTY = "50 % & <b>x_y</b> | {z} #1 $a^2$ ~\\ `c` *d*"


def test_names_are_escaped(tmp_path: Path):
    arms = {"simclr": {"method": "simclr"}, NASTY: {"method": "iecl_simclr"}}
    store = make_store(tmp_path, arms=arms, question=NASTY, name=NASTY, command=NASTY)
    write_report(store, tmp_path)
    page = Page(tmp_path / "report.html")
    assert page.count("b") == page.source.count("<b>")
    assert "<b>x_y" not in page.source and NASTY in page.text
    tex = (tmp_path / "tables" / "knn-acc1.tex").read_text(encoding="utf-8")
    escaped = r"50 \% \& $<$b$>$x\_y$<$/b$>$ \textbar{} \{z\} \#1 \$a\textasciicircum{}2\$ "
    assert escaped + r"\textasciitilde{}\textbackslash{} `c` *d*" in tex
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    head = next(x for x in lines if x.startswith("| data | simclr"))
    assert len(re.findall(r"(?<!\\)\|", head)) == 4


def test_latex_is_balanced_and_escaped(rich: Path):
    for path in (rich / "tables").glob("*.tex"):
        tex = path.read_text(encoding="utf-8")
        for environment in ("table", "tabular"):
            for end in ("begin", "end"):
                assert tex.count(rf"\{end}{{{environment}}}") == 1
        for rule in ("toprule", "midrule", "bottomrule"):
            assert tex.count(rf"\{rule}") == 1
        bare = re.sub(r"\\.", "", tex)
        assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
        assert not re.search(r"[%#]", bare)
        assert tex.isascii(), path.name
        columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", tex)[1])
        body = tex.partition(r"\toprule")[2].partition(r"\bottomrule")[0]
        rows = [row for row in body.replace(r"\midrule", "").split(r"\\") if row.strip()]
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {columns}


def test_markdown_tables_are_well_formed(rich: Path):
    lines = (rich / "report.md").read_text(encoding="utf-8").splitlines()
    rules = [i for i, line in enumerate(lines) if re.fullmatch(r"\|( -+:? \|)+ ?", line)]
    assert len(rules) == len(list((rich / "tables").glob("*.tex")))
    for i in rules:
        assert lines[i - 2] == ""
        columns, j = len(re.findall(r"(?<!\\)\|", lines[i])), i - 1
        while lines[j].startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", lines[j])) == columns
            j += 1
    for name in re.findall(r"\]\((figures/[^)]+)\)", "\n".join(lines)):
        assert (rich / name).is_file()


def test_every_run_is_there_with_its_configuration(rich: Path):
    page = Page(rich / "report.html")
    assert page.text.count("iecl-solo benchmark cell=") == 45
    blocks = re.findall(r'"optimizer": \{', page.source.replace("&#34;", '"'))
    assert len(blocks) == 45
    table = pd.read_csv(rich / "tables" / "configurations.csv").set_index("setting")
    assert table.loc["iecl.beta"].fillna("–").tolist() == ["–", "0.1", "0.01", "1"]
    assert "max_epochs" not in table.index and "max_epochs: 8" in page.source


def test_what_is_null_here_and_absent_there_is_no_difference(tmp_path: Path):
    store = make_store(tmp_path, arms=TWO, seeds=(0, 1))
    for cell in store.meta()["cells"]:
        own = {"iecl": {"eps": None, "beta": 0.1}} if "iecl" in cell else {}
        store.finish(cell, {"knn_acc1": 1.0}, config={"name": cell, "flag": True, **own})
    write_report(store, tmp_path)
    table = pd.read_csv(tmp_path / "tables" / "configurations.csv")
    assert table["setting"].tolist() == ["iecl.beta"]
    assert "flag: true" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_sweep_without_another_axis_is_a_line(tmp_path: Path):
    write_report(make_store(tmp_path), tmp_path)
    drawing = next((tmp_path / "figures").glob("sensitivity-*")).read_text(encoding="utf-8")
    assert all(f">{value}<" in drawing for value in ("0.01", "0.1", "1", "simclr"))


def test_sweeps_are_of_one_setting_and_three_values():
    base = {"method": "iecl_simclr"}
    arms = {"none": {"method": "simclr"}, "all": base}
    arms |= {f"b{b}": {**base, "iecl": {"beta": b}} for b in (0.0, 1.0)}
    arms |= {f"l{v}": {**base, "iecl": {"lambda": v}, "against": None} for v in (0.0, 0.1)}
    arms["two"] = {**base, "iecl": {"beta": 5.0, "lambda": 7.0}}
    configs = {"all": {"iecl": {"beta": 0.5, "lambda": 0.01}}}
    found = {sweep.key: sweep.arms for sweep in sweeps(arms, configs)}
    assert found == {
        "iecl.beta": {0.0: "b0.0", 0.5: "all", 1.0: "b1.0"},
        "iecl.lambda": {0.0: "l0.0", 0.01: "all", 0.1: "l0.1"},
    }
    # without the default's value there are two of each, which is no sweep
    assert sweeps(arms, {}) == []


def test_measures_of_one_setting_are_one_table(tmp_path: Path):
    """And the page of runs has it as the committed rows give it."""
    meta, committed = read_rows(ROOT / "docs/rows/beyond.csv")
    store = Store(tmp_path / STORE)
    store.begin(meta)
    for row in committed:
        store.put(row)
    results = read(store)
    (section,) = overview.sections(results)
    (made,) = section.tables
    lines = [made.head, *([cell.text for cell in row] for row in made.rows)]
    table = [f"| {' | '.join(line)} |".replace("[", "(").replace("]", ")") for line in lines]
    assert len(table) == 1 + 7 and table[0].endswith("| random | iecl_simclr − simclr |")
    page = (ROOT / "docs/runs.md").read_text().splitlines()
    assert [line for line in table if line not in page] == []
    rows = pd.read_csv(ROOT / "docs/rows/beyond.csv", skiprows=1)
    of = rows[rows["measure"] == "dense_miou"].set_index(["arm", "seed"])["value"].unstack("seed")
    one, paired = of.loc["simclr"], of.loc["iecl_simclr"] - of.loc["simclr"]
    for found, sign in ((one, ""), (paired, "+")):
        low, high = stats.t.interval(0.95, 2, found.mean(), stats.sem(found))
        expected = f"{found.mean():{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"
        assert expected.replace("-", "−") in table[1]


def test_many_arms_go_down_the_table(tmp_path: Path):
    arms = {"simclr": ARMS["simclr"]} | {f"arm {i}": {"method": "iecl_simclr"} for i in range(9)}
    write_report(make_store(tmp_path, arms=arms, epochs=2), tmp_path)
    tex = (tmp_path / "tables" / "knn-acc1.tex").read_text(encoding="utf-8")
    assert r"\begin{tabular}{lr}" in tex
    # two panels a curve, the baseline in both
    drawings = [p.read_text() for p in (tmp_path / "figures").glob("curve-host-loss-*")]
    assert len(drawings) == 2 and all(">simclr<" in drawing for drawing in drawings)


def test_many_comparisons_have_a_forest_plot_a_setting(tmp_path: Path):
    arms = {"simclr": ARMS["simclr"]} | {f"arm {i}": {"method": "iecl_simclr"} for i in range(9)}
    write_report(make_store(tmp_path, arms=arms, axes={BATCH: [64, 256]}, seeds=(0, 1)), tmp_path)
    forests = sorted((tmp_path / "figures").glob("forest-*"))
    assert [path.name for path in forests] == ["forest-knn-acc1-0.svg", "forest-knn-acc1-1.svg"]
    assert all(f">arm {i}<" in forests[0].read_text(encoding="utf-8") for i in range(9))


def test_report_is_the_same_twice(tmp_path: Path):
    store = make_store(tmp_path, arms=TWO)
    first = write_report(store, tmp_path / "a").read_bytes()
    assert write_report(store, tmp_path / "b").read_bytes() == first


def test_two_reports_of_one_folder_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = make_store(tmp_path / "store", arms=TWO)
    wanted = write_report(store, tmp_path / "alone").read_bytes()
    write_text, begun = Path.write_text, set()

    def slow(path: Path, *args, **kwargs):
        n = write_text(path, *args, **kwargs)
        if path.parent not in begun:  # what another process does before this file is in place
            begun.add(path.parent)
            write_report(store, tmp_path / "both")
        return n

    monkeypatch.setattr(Path, "write_text", slow)
    assert write_report(store, tmp_path / "both").read_bytes() == wanted
    alone, both = (
        {path.relative_to(folder) for path in folder.rglob("*")}
        for folder in (tmp_path / "alone", tmp_path / "both")
    )
    assert len(begun) == 3 and alone == both


def test_a_full_disk_is_one_line_and_leaves_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    store = make_store(tmp_path, arms=TWO)
    page = write_report(store, tmp_path).read_bytes()

    def full(path: Path, *args, **kwargs):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["report", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "it cannot be written (No space left on device)" in err and err.count("\n") == 1
    assert (tmp_path / "report.html").read_bytes() == page
    assert not list(tmp_path.rglob("*.part"))


def test_names_in_other_letters_have_files_of_their_own(tmp_path: Path):
    names = ["数据", "照片", "knn_acc1/花", "knn_acc1", "é", "è", "–", "a"]
    assert len({slug(name) for name in names}) == len(names)
    assert all(re.fullmatch(r"[a-z0-9-]+", slug(name)) for name in names)
    # a setting without a value is no other letter
    assert [slug(name) for name in ("knn_acc1/stl10", "digits-–")] == ["knn-acc1-stl10", "digits"]
    store = make_store(tmp_path, arms=TWO, measures=["knn_acc1", "knn_acc1/花"])
    for i, cell in enumerate(store.meta()["cells"]):
        store.finish(cell, {"knn_acc1": 80.0 + i, "knn_acc1/花": 50.0 + i})
    write_report(store, tmp_path)
    page = Page(tmp_path / "report.html")
    assert [name for name, n in page.ids.items() if n > 1] == []
    for measure, mean in (("knn_acc1", 82.0), ("knn_acc1/花", 52.0)):
        table = pd.read_csv(tmp_path / "tables" / f"{slug(measure)}.csv").set_index("arm")
        assert table.loc["simclr", "mean"] == mean


@pytest.mark.parametrize("given", ["folder", "file"])
def test_command(given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    store = make_store(tmp_path, arms=TWO, seeds=(0,))
    path = tmp_path if given == "folder" else store.path
    to = [] if given == "folder" else ["--to", str(tmp_path / "elsewhere")]
    assert main(["report", str(path), *to]) == 0
    page = (tmp_path if given == "folder" else tmp_path / "elsewhere") / "report.html"
    out = capsys.readouterr().out
    assert out.startswith("Not tested (1 seed, too few to test)") and str(page) in out
    assert page.is_file()


def test_command_without_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(tmp_path)]) == 2
    assert "no rows are in it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_command_on_a_folder_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "docs" / STORE).mkdir(parents=True)
    (tmp_path / "docs" / STORE / "a.csv").write_text("a\n1\n")
    assert main(["report", str(tmp_path / "docs")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "no rows are in it" in lines[0]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.csv", "docs", STORE]


def _meta(**changes: object):
    """Change what the first line of a CSV says of the benchmark."""

    def change(lines: list[str]) -> list[str]:
        meta = json.loads(lines[0].removeprefix("# ")) | changes
        return [f"# {json.dumps(meta)}", *lines[1:]]

    return change


def _line(old: str, new: str):
    def change(lines: list[str]) -> list[str]:
        assert old in lines[2]
        return [*lines[:2], lines[2].replace(old, new), *lines[3:]]

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: [*lines[:3], lines[3][: lines[3].rindex(",")]], "line 4 is not whole"),
        (lambda lines: [*lines[:3], lines[3][: lines[3].rindex("cpu")]], "line 4 is not whole"),
        (lambda lines: [*lines[:3], f"{lines[3]},,"], "line 4 is not whole"),
        (lambda lines: [lines[0], "id,data,arm"], "no column against"),
        (lambda lines: ["# [1,2]", *lines[1:]], "[1, 2] is not what a benchmark was"),
        (_line("{}", "[1]"), "line 3: axes: [1] is not a block of keys"),
        (_line("digits-iecl", "../../digits-iecl"), "line 3: id '../../digits-iecl"),
        (_meta(cells=5), "cells: 5 is not a list"),
        (_meta(cells=[[1]]), "cells: [1] is not a text"),
        (_meta(measures="knn_acc1"), "measures: 'knn_acc1' is not a list"),
        (_meta(axes={"a": 1}), "axes.a: 1 is not a list"),
        (_meta(arms=[1]), "arms: [1] is not a block of keys"),
        (_meta(question=5), "question: 5 is not a text"),
        (_meta(published=[{"data": "digits"}]), "no value that is a number"),
    ],
)
def test_damaged_csv_is_one_line(change, said: str, tmp_path: Path, capsys):
    store = make_store(tmp_path / "a", arms=TWO, seeds=(0,))
    store.export()
    file = tmp_path / "b" / "rows.csv"
    file.parent.mkdir()
    file.write_text("\n".join(change(store.csv.read_text().splitlines())))
    assert main(["report", str(file)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0] and str(file) in lines[0]
    assert [p.name for p in file.parent.iterdir()] == ["rows.csv"]


@pytest.mark.parametrize("cell", ["../x", "a/b", "", "_benchmark"])
def test_an_id_names_a_file_of_the_store(cell: str, tmp_path: Path):
    store = Store(tmp_path / STORE)
    row = {"data": "d", "arm": "a", "against": None, "method": "m", "axes": {}, "seed": 0}
    with pytest.raises(IECLError, match="a file's name"):
        store.put({**row, "id": cell, "metrics": {}})
    with pytest.raises(IECLError, match="a file's name"):
        store.claim({**row, "id": cell})
    assert [p.name for p in tmp_path.rglob("*")] == [STORE]


def test_json_of_a_configuration_is_whole(tmp_path: Path):
    write_report(make_store(tmp_path, arms=TWO, seeds=(0,)), tmp_path)
    source = (tmp_path / "report.html").read_text(encoding="utf-8").replace("&#34;", '"')
    blocks = [b for b in re.findall(r"<pre[^>]*>(\{.*?)</pre>", source, flags=re.DOTALL)]
    assert [json.loads(b)["method"] for b in blocks] == ["simclr", "iecl_simclr"]


def test_a_section_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "dummy.py").write_text(
        "from iecl_solo.report.section import Section\n\n\n"
        "def sections(results):\n"
        "    return [Section('dummy', 'A dummy', 15, words=[f'{len(results.cells)} runs'])]\n"
    )
    monkeypatch.setattr(report_sections, "__path__", [*report_sections.__path__, str(tmp_path)])
    write_report(make_store(tmp_path, arms=TWO), tmp_path)
    page = Page(tmp_path / "report.html")
    own = [a["id"] for tag, a in page.tags if tag == "section"]
    assert own.index("dummy") == own.index("knn-acc1") + 1 and "6 runs" in page.text
    assert "## A dummy" in (tmp_path / "report.md").read_text(encoding="utf-8")
    sys.modules.pop("iecl_solo.report.sections.dummy")


def test_no_objective_is_named_in_the_report():
    folder = Path(report_sections.__file__).parents[1]
    names = "|".join(objective.name for objective in OBJECTIVES)
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {
            ast.get_docstring(node, clean=False)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        }
        for node in ast.walk(tree):  # examples in docstrings may
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = re.search(rf"\b({names})_(?!solo)", node.value)
                assert node.value in docs or not named, f"{path}: {node.value}"


def test_terms_are_called_as_their_objective_says():
    assert title("iecl_kl") == "KL of the embeddings (nats per dimension)"
    assert title("climb_entropy_bound") == "upper bound on H(Z) (nats)"
    assert title("iecl_some_new_term") == "some new term"


def test_nothing_is_bold_where_nothing_is_significant(tmp_path: Path):
    write_report(make_store(tmp_path, arms=TWO, seeds=range(3), spread=20.0), tmp_path)
    page = Page(tmp_path / "report.html")
    assert page.count("b") == 0 and "Bold: the highest" not in page.text
    assert "not significantly different (minimum detectable difference" in page.text


def test_baseline_is_bold_only_where_all_else_is_significantly_below(tmp_path: Path):
    arms = {**TWO, "bad": {"method": "iecl_simclr"}, "same": {"method": "iecl_simclr"}}
    store = make_store(tmp_path, arms=arms, seeds=range(4), measures=["knn_acc1"])
    for seed in range(4):
        for arm, value in (("simclr", 80), ("iecl_simclr", 70), ("bad", 60), ("same", 79)):
            noise = np.random.default_rng(seed).normal(0, 0.1) * (arm != "simclr")
            noise += seed * (arm == "same") - (seed % 2) * 4 * (arm == "same")
            store.finish(f"digits-{arm}-()-{seed}", {"knn_acc1": value + noise})
    line = [x for x in main_table(read(store), "knn_acc1").rows[0]]
    assert [cell.bold for cell in line[1:]] == [False] * 4  # "same" may be as good
    for seed in range(4):
        store.finish(f"digits-same-()-{seed}", {"knn_acc1": 75 + 0.1 * seed})
    line = [x for x in main_table(read(store), "knn_acc1").rows[0]]
    assert [cell.bold for cell in line[1:]] == [True, False, False, False]


def test_collapse_is_named(tmp_path: Path):
    arms = {**TWO, "beta 1": ARMS["beta 1"]}
    store = make_store(tmp_path, arms=arms, seeds=(0, 1))
    ranks = {"simclr": 27.0, "iecl_simclr": 3.0, "beta 1": 1.2}
    for arm, rank in ranks.items():
        for seed in (0, 1):
            store.finish(f"digits-{arm}-()-{seed}", {"knn_acc1": 50.0, "effective_rank": rank})
    assert collapses(read(store)) == [
        "Dimensional collapse: the embeddings of iecl_simclr have effective rank 3, simclr's 27.",
        "Collapse: the embeddings of beta 1 have effective rank 1.2, simclr's 27.",
    ]
    write_report(store, tmp_path)
    assert "effective rank 3, simclr's 27." in Page(tmp_path / "report.html").text
    assert "effective rank 3, simclr's 27." in (tmp_path / "report.md").read_text()


def test_epochs_are_counted_from_one(tmp_path: Path):
    results = read(make_store(tmp_path, arms=TWO, epochs=3))
    assert over_seeds(results, "host_loss", 0, "simclr").index.tolist() == [1, 2, 3]


def test_folder_of_images_goes_by_its_own_name(tmp_path: Path):
    store = make_store(tmp_path, arms=TWO, seeds=(0, 1), data=("custom",), running=(3,))
    for cell in store.meta()["cells"][:3]:
        config = {"data": {"dataset": "custom", "train_path": "datasets/digits/train"}}
        store.finish(cell, {"knn_acc1": 1.0}, config=config)
    results = read(store)
    assert results.settings == [("digits",)] and len(results.cells) == 4


def test_folder_of_images_does_not_take_another_data_sets_name(tmp_path: Path):
    store = make_store(tmp_path, arms=TWO, seeds=(0, 1), data=("custom", "digits"))
    for cell in store.meta()["cells"]:
        config = {"data": {"dataset": "custom", "train_path": "datasets/digits/train"}}
        store.finish(cell, {"knn_acc1": 1.0}, config=config)
    results = read(store)
    assert results.settings == [("custom",), ("digits",)]
    assert results.differences["knn_acc1"]["n"].tolist() == [2, 2]


def test_top5_is_left_out_with_five_classes_or_fewer(tmp_path: Path):
    store = make_store(tmp_path, arms=TWO, seeds=(0,))
    for cell, classes in zip(store.meta()["cells"], (5, 6), strict=True):
        metrics = {"knn_acc1": 90.0, "knn_acc5": 100.0, "knn_acc5/other": 99.0}
        store.finish(cell, metrics, config={"data": {"num_classes": classes}})
    runs = read(store).runs
    assert (runs["measure"] == "knn_acc5").sum() == 1
    assert (runs["measure"] == "knn_acc5/other").sum() == 2


def test_kind_of_page(tmp_path: Path):
    for meta, words in (
        ({"preset": "smoke", "kind": "training"}, "Benchmark, smoke preset"),
        ({"preset": None, "kind": "training"}, "Benchmark"),
        ({"preset": None}, "Comparison"),
    ):
        folder = tmp_path / words
        write_report(make_store(folder, arms=TWO, seeds=(0,), **meta), folder)
        assert f'<p class="kind">{words}</p>' in (folder / "report.html").read_text()


def test_wide_tables_stack_on_a_telephone(rich: Path):
    page = Page(rich / "report.html")
    heads = [a.get("data-head") for tag, a in page.tags if tag == "td"]
    assert all(heads) and "verdict" in heads
    assert sum(a.get("class") == "stacks" for tag, a in page.tags if tag == "table") > 5
    narrow = page.source.partition("@media (max-width: 40rem)")[2].partition("@media print")[0]
    assert "attr(data-head)" in narrow and "pre-wrap" in narrow


def test_without_labels_the_report_judges_by_what_needs_none(tmp_path: Path):
    # a comparison asks about some of what needs no labels itself: that is not said twice
    measures = ["knn_acc1", "linear_acc1", "lidar", "query_entropy"]
    store = make_store(tmp_path, arms=TWO, seeds=(0, 1), measures=measures)
    add_galleries(tmp_path, store, labelled=False)
    results = read(store)
    assert results.measures == ["rankme", "lidar", "uniformity", "query_entropy"]
    assert "in RankMe, effective rank of the features iecl_simclr is" in answer(results)
    write_report(store, tmp_path)
    page = Page(tmp_path / "report.html")
    assert {"rankme", "lidar", "uniformity", "neighbours", "map"} <= sections(tmp_path)
    assert "top-1" not in page.text and "Framed" not in page.text


def test_pictures_are_found_beside_the_store_wherever_it_was_made(tmp_path: Path):
    store = make_store(tmp_path / "here", arms=TWO, seeds=(0,))
    add_galleries(tmp_path / "here", store)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = read(Store(tmp_path / "there" / STORE))
    assert [arm for _, arm, _, _ in moved.galleries] == list(TWO)
    shutil.rmtree(tmp_path / "there" / "runs")
    assert read(Store(tmp_path / "there" / STORE)).galleries == []


def test_all_figures_have_the_same_colours():
    assert pictures._COLOURS[:2] == (COLOURS["series-0"], COLOURS["series-1"])
    drawn = looks(["simclr", "iecl_simclr"], {"iecl_simclr": "simclr"})
    assert [look.colour for look in drawn.values()] == list(pictures._COLOURS[:2])
