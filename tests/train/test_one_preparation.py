"""Every way in accepts and refuses the same: all of them come through ``complete``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from support import HOST, raw_config

from iecl_solo.errors import IECLError
from iecl_solo.experiments import compare as compare_module
from iecl_solo.experiments.cost import Step
from iecl_solo.train import fit as fit_module
from iecl_solo.train.complete import complete
from iecl_solo.train.fit import pretrain


class Accepted(Exception):
    """The way in has come as far as training."""


def _stop(*_: Any, **__: Any) -> None:
    raise Accepted


def _compare(cfg: DictConfig) -> None:
    compare_module.compare(cfg)


def _cost(cfg: DictConfig) -> None:
    Step(cfg, HOST)
    raise Accepted


def _complete(cfg: DictConfig) -> None:
    complete(cfg, HOST)
    raise Accepted


WAYS: dict[str, Callable[[DictConfig], Any]] = {
    "complete": _complete,
    "pretrain": pretrain,
    "compare": _compare,
    "cost": _cost,
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt objective": ({"objectives": ["iecl", "climp"]}, "did you mean 'climb'"),
    "objectives that are no list": ({"objectives": "iecl"}, "objectives"),
    "an unknown method": ({"method": "iecl_simclrr"}, r"did you mean '(iecl_)?simclr'"),
    "an objective's key": ({"iecl": {"bet": 1}}, "did you mean 'beta'"),
    "a number that is none": ({"optimizer.lr": "fast"}, "optimizer.lr"),
    "a monitor's key": ({"monitor": {"imagess": 3}}, "did you mean 'images'"),
    "a name outside": ({"name": "../elsewhere"}, "name"),
}


def _config(images: Path, folder: Path, **changes: Any) -> DictConfig:
    cfg = OmegaConf.create(raw_config("iecl_simclr", images))
    assert isinstance(cfg, DictConfig)
    cfg.checkpoint = {"enabled": True, "dir": str(folder / "runs")}
    cfg.compare = {"dir": str(folder / "compare")}
    cfg.data.val_path = str(images)
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


@pytest.fixture(autouse=True)
def _no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_module, "fit", _stop)
    monkeypatch.setattr(compare_module, "in_processes", _stop)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", REFUSED)
def test_all_refuse_the_same(way: str, case: str, images: Path, tmp_path: Path):
    changes, said = REFUSED[case]
    with pytest.raises(IECLError, match=said) as error:
        WAYS[way](_config(images, tmp_path, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("changes", [{}, {"objectives": ["iecl", "climb"]}, {"objectives": []}])
def test_all_accept_the_same(way: str, changes: dict[str, Any], images: Path, tmp_path: Path):
    with pytest.raises(Accepted):
        WAYS[way](_config(images, tmp_path, **copy.deepcopy(changes)))


def test_a_cost_of_objectives_is_that_of_the_variant(images: Path, tmp_path: Path):
    both = Step(_config(images, tmp_path, method="simclr", objectives=["iecl", "climb"]), HOST)
    assert type(both.model).__name__ == "IECLCLIMBSimCLR"
