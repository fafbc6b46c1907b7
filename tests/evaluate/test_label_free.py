"""Measures without labels against slow references, written out or by other libraries."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import eigh
from scipy.stats import linregress
from support import script
from torch import Tensor

from iecl_solo.errors import IECLError
from iecl_solo.evaluate.label_free import (
    BETTER,
    alignment,
    alpha_req,
    label_free,
    lidar,
    rankme,
    uniformity,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=[torch.float32, torch.float64])
def views(request: pytest.FixtureRequest) -> Tensor:
    """(30, 4, 7): images apart along a few directions, their views around them."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.2, 0.1])
    images = torch.randn(30, 1, 7, generator=generator) * scale
    noise = 0.4 * torch.randn(30, 4, 7, generator=generator)
    return (images + noise + 1).to(request.param)


def _perplexity(values: np.ndarray) -> float:
    total, entropy = float(sum(values)), 0.0
    for value in values:
        p = value / total + 1e-7
        entropy -= p * math.log(p)
    return math.exp(entropy)


def test_rankme(views: Tensor):
    x = views[:, 0].double().numpy()
    # singular values the slow way: of the Gram matrix
    values = np.sqrt(np.clip(np.linalg.eigvalsh(x.T @ x), 0, None))
    assert rankme(views[:, 0]) == pytest.approx(_perplexity(values), rel=1e-6)


def test_lidar(views: Tensor):
    x = views.double().numpy()
    images, count, dim = x.shape
    mean, within, between = x.mean((0, 1)), 1e-4 * np.eye(dim), np.zeros((dim, dim))
    for i in range(images):
        own = x[i].mean(0)
        between += np.outer(own - mean, own - mean) / (images - 1)
        for j in range(count):
            within += np.outer(x[i, j] - own, x[i, j] - own) / (images * (count - 1))
    # the same eigenvalues by the generalised problem
    values = np.clip(eigh(between, within, eigvals_only=True), 0, None)
    assert lidar(views) == pytest.approx(_perplexity(values), rel=1e-6)


def test_lidar_does_not_count_what_views_change():
    generator = torch.Generator().manual_seed(1)
    images, views = torch.randn(200, 1, 6, generator=generator), 8
    noise = torch.randn(200, views, 6, generator=generator)
    kept = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    # half of the directions tell images apart, the other half only views
    x = 10 * images * kept + 0.1 * noise * kept + 10 * noise * (1 - kept)
    assert lidar(x) == pytest.approx(3, abs=0.1) and rankme(x.flatten(0, 1)) > 5.5


def test_alpha_req(views: Tensor):
    x = views[:, 0].double().numpy()
    spectrum = np.sort(np.linalg.eigvalsh(np.cov(x.T)))[::-1]
    for first, last in ((1, 7), (3, 5)):
        own = np.arange(first, last + 1)
        slope = linregress(np.log(own), np.log(spectrum[first - 1 : last])).slope
        assert alpha_req(views[:, 0], (first, last)) == pytest.approx(-slope, rel=1e-6)


def test_alpha_req_leaves_out_what_is_only_rounding():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) @ torch.randn(
        4, 20, generator=torch.Generator().manual_seed(1)
    )
    x = x.double()
    assert 0 < alpha_req(x, (1, 100)) < 5 and math.isnan(alpha_req(x, (4, 100)))


def test_uniformity(views: Tensor):
    x = [row / np.linalg.norm(row) for row in views[:, 0].double().numpy()]
    values = [math.exp(-2 * float(((a - b) ** 2).sum())) for a, b in combinations(x, 2)]
    assert uniformity(views[:, 0]) == pytest.approx(math.log(np.mean(values)), rel=1e-6)


def test_uniformity_by_blocks_is_that_of_pdist():
    x = torch.randn(4500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = torch.nn.functional.normalize(x)
    whole = torch.pdist(unit).square().mul(-2).exp().mean().log()
    assert uniformity(x) == pytest.approx(float(whole), rel=1e-9)


def test_alignment(views: Tensor):
    x = views.double().numpy()
    found = []
    for image in x:
        unit = [row / np.linalg.norm(row) for row in image]
        found += [float(((a - b) ** 2).sum()) for a, b in combinations(unit, 2)]
    assert alignment(views) == pytest.approx(np.mean(found), rel=1e-6)


def test_all_by_name(views: Tensor):
    found = label_free(views[:, 0], views)
    assert list(found) == list(BETTER) and all(map(math.isfinite, found.values()))


@pytest.mark.parametrize("measure", [rankme, alpha_req, uniformity])
def test_another_shape_is_refused(measure):
    with pytest.raises(IECLError, match=r"\(N, d\)"):
        measure(torch.zeros(3, 2, 2))


@pytest.mark.parametrize("measure", [lidar, alignment])
def test_one_view_is_refused(measure):
    with pytest.raises(IECLError, match="1 view an image: at least 2 are needed"):
        measure(torch.zeros(3, 1, 2))


def test_the_study_ranks_runs_by_each_measures_own_direction():
    study = script(ROOT / "studies/label_free_ranking.py")
    better = {"rankme": 1, "alpha_req": -1, "uniformity": -1, "alignment": -1}
    rows = [
        {"data": "a", "metrics": {"knn_acc1": i, **{k: 1 + i * s for k, s in better.items()}}}
        for i in range(6)
    ]
    rows = [
        {**r, "metrics": {**r["metrics"], "alpha_req": 4 - r["metrics"]["knn_acc1"] / 2}}
        for r in rows
    ]
    rows[0]["metrics"]["alpha_req"] = -3.0  # as far from 1 on the other side
    table = study.ranking(rows).set_index("measure")
    assert (table["runs"] == 6).all()
    assert table["rho"].to_dict() == pytest.approx(dict.fromkeys(table.index, 1.0))
    with pytest.raises(IECLError, match="label_free"):
        study.ranking([{"data": "a", "metrics": {"knn_acc1": 1.0}}])


def test_the_ranking_of_docs_runs_is_that_of_its_rows():
    study = script(ROOT / "studies/label_free_ranking.py")
    table = study.ranking(study.finished_rows(ROOT / "docs/rows/methods_digits.csv"))
    page = (ROOT / "docs/runs.md").read_text()
    for name, measure in (("RankMe", "rankme"), ("LiDAR", "lidar"), ("uniformity", "uniformity")):
        (row,) = table[table["measure"] == measure].to_dict("records")
        assert f"| {row['runs']} | {name} | {row['rho']:.2f} | {row['p']:.2f} |" in page
