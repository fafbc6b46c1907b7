"""A run that diverges stops at once, says where, and keeps its last finite checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from omegaconf import OmegaConf
from support import HOST, build, online, raw_config

from iecl_solo import devices
from iecl_solo.errors import IECLError
from iecl_solo.solo.checkpoint import read_checkpoint
from iecl_solo.train.callbacks.finite import SKIPPED_STEPS, Finite, largest
from iecl_solo.train.complete import _say_once, complete, precision
from iecl_solo.train.fit import fit, pretrain
from iecl_solo.train.run import Run


def _cfg(method: str, images: Path, to: Path, **overrides: Any) -> Any:
    given = {"checkpoint__dir": str(to), "max_epochs": 6, "monitor__every_n_epochs": 0}
    return OmegaConf.create(raw_config(method, images, **(given | overrides)))


class _Spoil(pl.Callback):
    """Makes one number of the model NaN or infinite before a given step."""

    def __init__(self, epoch: int, spoil: Any) -> None:
        self.epoch, self.spoil = epoch, spoil

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            self.spoil(module)


def _running_variance(module: Any) -> torch.Tensor:
    return next(b for k, b in module.named_buffers() if k.endswith("running_var"))


def _spoil_weight(module: Any) -> None:
    weight = next(iter(online(module).parameters())).data
    weight[(0,) * weight.dim()] = float("nan")


def _spoil_buffer(module: Any) -> None:
    _running_variance(module)[0] = float("inf")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(_spoil_weight, r"train_\w*loss is nan"), (_spoil_buffer, "the buffer .*running_var is inf")],
)
@pytest.mark.counts("faults injected")
def test_first_number_that_is_not_finite_stops_the_run(
    spoil: Any, said: str, images: Path, tmp_path: Path
):
    cfg = complete(_cfg("simclr", images, tmp_path), HOST)
    run = Run(cfg)
    with pytest.raises(IECLError, match=said) as stopped:
        fit(cfg, HOST, run, callbacks=[_Spoil(2, spoil)])
    assert str(stopped.value).startswith("epoch 3, step 1: ") and "\n" not in str(stopped.value)
    assert f"Kept: {run.checkpoint}" in str(stopped.value)
    assert read_checkpoint(run.checkpoint)["epoch"] == 1  # which refuses what is not finite
    assert run.result is None


@pytest.mark.counts("faults injected")
def test_gradient_alone(images: Path, tmp_path: Path):
    """A finite loss whose gradient is not, as of a norm at zero."""

    def spoil(module: Any) -> None:
        weight = next(iter(online(module).parameters()))
        weight.register_hook(lambda gradient: gradient * float("inf"))

    cfg = complete(_cfg("simclr", images, tmp_path), HOST)
    with pytest.raises(IECLError, match=r"step 1: the gradient of .*conv1.* is (nan|-?inf)"):
        fit(cfg, HOST, Run(cfg), callbacks=[_Spoil(1, spoil)])


@pytest.mark.parametrize(
    "given", [{"optimizer__lr": 1e6}, {"iecl__lambda": 1e30, "optimizer__lr": 1.0}]
)
@pytest.mark.counts("faults injected")
def test_absurd_settings_end_in_a_line(given: dict[str, Any], images: Path, tmp_path: Path):
    with pytest.raises(IECLError, match=r"epoch \d+, step \d+: .* is (nan|-?inf)"):
        pretrain(_cfg("iecl_simclr", images, tmp_path, max_epochs=20, **given))
    for path in tmp_path.rglob("*.ckpt*"):
        read_checkpoint(path)


def test_largest_sees_every_number():
    for value in (float("nan"), float("inf"), -float("inf")):
        tensors = [torch.ones(3), torch.ones(2, 2, dtype=torch.float64), torch.ones(1)]
        tensors[1][1, 1] = value
        peak = largest(tensors)
        assert peak is not None and not bool(peak.isfinite())
    # a sum of squares would overflow
    assert float(largest([torch.tensor([3e38, -1.0])])) == pytest.approx(3e38)
    assert largest([torch.tensor(3)]) is None


def test_loss_scaling_may_skip_steps(images: Path):
    """float16's scaler finds its scale by overflows: only one that finds none has diverged."""
    model = build("simclr", images)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    trainer: Any = type("T", (), {})()
    trainer.current_epoch, trainer.callback_metrics = 0, {"train_loss_step": torch.tensor(1.0)}
    trainer.precision_plugin = type("P", (), {"scaler": object()})()
    finite = Finite()
    for step in range(SKIPPED_STEPS):
        finite.on_before_optimizer_step(trainer, model, None)
        finite.on_train_batch_end(trainer, model, {"loss": torch.tensor(1.0)}, None, step)
    finite.on_before_optimizer_step(trainer, model, None)
    with pytest.raises(IECLError, match="the gradient of"):
        finite.on_train_batch_end(trainer, model, {"loss": torch.tensor(1.0)}, None, 20)


@pytest.mark.parametrize("given", ["bf16-true", "64-true", "7", "foo", "16-true"])
def test_other_precisions_are_refused(given: str, images: Path, tmp_path: Path):
    with pytest.raises(IECLError, match="precision: unknown value '"):
        pretrain(_cfg("simclr", images, tmp_path, precision=given))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "cpu_flags", "expected"),
    [
        ("auto", "fpu avx512f avx512_bf16", "bf16-mixed"),
        ("auto", "fpu amx_bf16", "bf16-mixed"),
        ("auto", "fpu avx2 avx512f", "32-true"),
        (32, "fpu avx512_bf16", "32-true"),
        ("bf16", "fpu", "bf16-mixed"),
        (16, "fpu", "bf16-mixed"),
    ],
)
def test_precision_is_resolved_and_recorded(
    given: Any,
    cpu_flags: str,
    expected: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    _say_once.cache_clear()
    info = tmp_path / "cpuinfo"
    info.write_text(f"model name : x\nflags : {cpu_flags}\n")
    monkeypatch.setattr(devices, "Path", lambda _: info)
    cfg = complete(_cfg("simclr", images, tmp_path, precision=given), HOST)
    assert cfg.precision == precision(cfg) == expected
    said = capsys.readouterr().out
    assert ("16-mixed is bf16-mixed on a CPU" in said) == (given == 16)
    assert said.count("slower than float32") == (given in ("bf16", 16))


def test_bf16_trains_and_is_recorded(images: Path, tmp_path: Path):
    run = pretrain(_cfg("iecl_simclr", images, tmp_path, precision="bf16-mixed", max_epochs=1))
    assert run.args["precision"] == "bf16-mixed" and run.result is not None
