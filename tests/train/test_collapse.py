"""Complete and dimensional collapse are named, a healthy start is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from support import HOST, image_folder, raw_config

from iecl_solo.train.callbacks.collapse import Collapse, deviation
from iecl_solo.train.fit import pretrain
from iecl_solo.train.logs import read_metrics


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("photos") / "train", images=24)


def _lines(
    method: str, photos: Path, to: Path, capsys: pytest.CaptureFixture, **given: Any
) -> list[str]:
    overrides = {"checkpoint__dir": str(to), "max_epochs": 8, "monitor__every_n_epochs": 0}
    cfg = raw_config(method, photos, **(overrides | {"optimizer__batch_size": 24} | given))
    run = pretrain(OmegaConf.create(cfg))
    logged = read_metrics(run.folder)
    assert logged["monitor_z_deviation"].between(0, 1.001).all()
    assert logged["monitor_z_effective_rank"].between(1, 16).all()
    return [line for line in capsys.readouterr().out.splitlines() if "collapse" in line]


def test_without_its_variance_term_vicreg_collapses(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Only invariance is left to learn, and one point has it."""
    only = {"var_loss_weight": 0.0, "cov_loss_weight": 0.0, "sim_loss_weight": 25.0}
    given = {f"method_kwargs__{k}": v for k, v in only.items()}
    (line,) = _lines("vicreg", photos, tmp_path, capsys, max_epochs=16, optimizer__lr=0.5, **given)
    assert "complete collapse: embeddings deviate by 0.0" in line and "try a smaller" in line


@pytest.mark.parametrize("method", ["vicreg", "simclr", "iecl_byol"])
def test_healthy_runs_are_not_accused(
    method: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert _lines(method, photos, tmp_path, capsys) == []


def test_dimensional_collapse_is_named_once_when_it_lasts():
    watch = Collapse(HOST, "run")
    z = F.normalize(torch.randn(200, 2) @ torch.randn(2, 128), dim=-1)  # two of 128 dimensions
    rank = {"z_deviation": float(deviation(z)), "z_effective_rank": 1.9}
    assert watch._lines(rank, 127) == []  # it may be rising
    (line,) = watch._lines(rank, 127)
    assert "dimensional collapse: embeddings have effective rank 1.9 of 127" in line
    assert watch._lines(rank, 127) == []


def test_untrained_network_that_spreads_is_not_accused():
    watch = Collapse(HOST, "run")
    for value in (0.01, 0.02, 0.03, 0.045):
        assert watch._lines({"z_deviation": value, "z_effective_rank": 9.0}, 16) == []


def test_deviation_of_the_sphere_is_one():
    z = F.normalize(torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert float(deviation(z)) == pytest.approx(1.0, abs=1e-3)
    per_dimension = z.std(0, correction=0).pow(2).mean().sqrt()
    assert float(deviation(z)) == pytest.approx(float(per_dimension) * 8.0, rel=1e-4)
