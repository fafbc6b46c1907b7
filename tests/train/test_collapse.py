"""Complete and dimensional collapse are named, a healthy start is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from support import HOST, image_folder, raw_config

from iecl_solo.train.callbacks.collapse import Collapse, deviation
from iecl_solo.train.complete import complete
from iecl_solo.train.fit import fit, pretrain
from iecl_solo.train.logs import read_metrics
from iecl_solo.train.run import Run


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


class _OnePoint(pl.Callback):
    """Takes from the projector all that tells images apart."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        module.projector[-1].weight.data.zero_()


def test_embeddings_that_become_one_point_are_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    given = {"checkpoint__dir": str(tmp_path), "max_epochs": 4, "monitor__every_n_epochs": 0}
    given |= {"optimizer__batch_size": 24, "optimizer__lr": 1e-4}
    cfg = complete(OmegaConf.create(raw_config("simclr", photos, **given)), HOST)
    run = Run(cfg)
    fit(cfg, HOST, run, callbacks=[_OnePoint()])
    run.release()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "collapse" in line]
    assert line.startswith("simclr  epoch ") and "complete collapse: embeddings deviate" in line
    assert "try a smaller optimizer.lr" in line


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
