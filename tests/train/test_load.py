"""From a name and overrides to a model, a loader and a trainer; the package's public names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from support import HOST, raw_config, same_tensors

import iecl_solo
from iecl_solo import IECLError, configure, load
from iecl_solo.solo.checkpoint import read_checkpoint
from iecl_solo.train.compose import compose_pretrain
from iecl_solo.train.fit import pretrain


@pytest.fixture
def mine(tmp_path: Path, images: Path) -> str:
    """A YAML of one's own."""
    path = tmp_path / "mine.yaml"
    cfg = raw_config("iecl_byol", images)
    cfg["checkpoint"]["dir"] = str(tmp_path / "runs")
    path.write_text(json.dumps(cfg))
    return str(path)


def test_three_lines_train_what_the_command_trains(mine: str):
    model, loader, trainer = load(mine, ["iecl.beta=0.5", "max_epochs=2"])
    trainer.fit(model, loader)
    run = pretrain(compose_pretrain(mine, "", ["iecl.beta=0.5", "max_epochs=2"]))
    state = read_checkpoint(run.checkpoint)["state_dict"]
    own = {k: v for k, v in model.state_dict().items() if k in state}
    assert len(own) > 20 and same_tensors(own, state) == []


def test_nothing_is_written(mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    model, loader, trainer = load(mine, ["max_epochs=1"])
    trainer.fit(model, loader)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_trainer_takes_more(mine: str):
    class Count(Callback):
        steps = 0

        def on_train_batch_end(self, *_: object) -> None:
            self.steps += 1

    count = Count()
    _, loader, trainer = loaded = load(mine, callbacks=[count], limit_train_batches=1, max_epochs=1)
    trainer.fit(loaded.model, loader)
    assert count.steps == 1


@pytest.mark.parametrize("name", ["iecl_byol", "climb_byol", "iecl_minc", "minc"])
def test_a_method_of_the_registry_takes_a_completed_configuration(name: str, mine: str):
    """As README has it, on either host."""
    unknown = [] if name.endswith("byol") else ["~method_kwargs.pred_hidden_dim"]
    cfg = configure(mine, [f"method={name}", *unknown])
    assert type(HOST.methods[name](cfg)).__mro__[0] is HOST.methods[name]


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("digits/iecl_simclrr", [], "did you mean 'digits/iecl_simclr'"),
        ("no/such.yaml", [], "no such file"),
        ("digits/iecl_simclr", ["data.train_path=/nowhere"], "data.train_path"),
    ],
)
def test_what_is_wrong_is_one_line(name: str, overrides: list[str], said: str):
    with pytest.raises(IECLError, match=said) as error:
        load(name, overrides)
    assert "\n" not in str(error.value)


def test_public_names_are_where_a_user_looks():
    for name in iecl_solo.__all__:
        assert getattr(iecl_solo, name) is not None
    assert set(iecl_solo.__all__) <= set(dir(iecl_solo))
    assert set(iecl_solo._PUBLIC) | {"__version__"} == set(iecl_solo.__all__)
    from iecl_solo import SAIB

    assert SAIB(32)(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 32, 32)
    with pytest.raises(AttributeError, match="no attribute 'SAIBB'"):
        iecl_solo.SAIBB  # type: ignore[attr-defined]
