"""A run that is stopped anywhere ends as the one that was not: weights, optimiser and logs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from support import HOST, raw_config, same_tensors
from torch.utils.data import DataLoader, Dataset

from iecl_solo.order import EpochOrder, SteadyLoader, seeded
from iecl_solo.solo.checkpoint import read_checkpoint
from iecl_solo.train.complete import complete
from iecl_solo.train.fit import fit, pretrain
from iecl_solo.train.logs import read_metrics
from iecl_solo.train.run import Run
from iecl_solo.train.stop import SIGNALS, Stopped

ROOT = Path(__file__).parents[2]


def _cfg(method: str, images: Path, to: Path, **overrides: Any) -> Any:
    given = {
        "checkpoint__dir": str(to),
        "max_epochs": 3,
        "optimizer__batch_size": 4,
        "monitor__every_n_epochs": 0,
        "data__val_path": str(images),
    }
    return OmegaConf.create(raw_config(method, images, **(given | overrides)))


class _At(pl.Callback):
    """Does something at the end of one step of one epoch."""

    def __init__(self, epoch: int, step: int, do: Any) -> None:
        self.epoch, self.step, self.do = epoch, step, do

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.step):
            self.do()


def _stopped(cfg: Any, at: _At, expected: type[BaseException]) -> BaseException:
    cfg = complete(cfg, HOST)
    with pytest.raises(expected) as raised:
        fit(cfg, HOST, Run(cfg), callbacks=[at])
    return raised.value


def _assert_same(whole: Run, again: Run) -> None:
    a, b = (read_checkpoint(run.checkpoint) for run in (whole, again))
    assert a["global_step"] == b["global_step"]
    assert same_tensors(a["state_dict"], b["state_dict"]) == []
    for old, new in zip(a["optimizer_states"], b["optimizer_states"], strict=True):
        for key in old["state"]:
            assert torch.equal(
                old["state"][key]["momentum_buffer"], new["state"][key]["momentum_buffer"]
            )
    rows, again_rows = (read_metrics(run.folder) for run in (whole, again))
    columns = [c for c in rows if not c.endswith("_step")]
    pd.testing.assert_frame_equal(rows[columns], again_rows[columns], check_exact=True)


def _kill(number: int) -> Any:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("method", "number", "workers"),
    [
        ("iecl_byol", signal.SIGTERM, 2),
        ("dino", signal.SIGUSR1, 0),
        ("iecl_climb_simclr", signal.SIGINT, 0),
        ("simclr", signal.SIGTERM, 0),
    ],
)
@pytest.mark.counts("faults injected")
def test_signal_in_mid_epoch_saves_and_goes_on_bit_for_bit(
    method: str, number: int, workers: int, images: Path, tmp_path: Path
):
    # a network that draws in each step
    draws = {"backbone__kwargs": {"drop_path_rate": 0.5}} if method == "iecl_byol" else {}
    whole = pretrain(_cfg(method, images, tmp_path / "whole", **draws))
    given = {**draws, "data__num_workers": workers}
    cut = _cfg(method, images, tmp_path / "cut", **given)
    stopped = _stopped(cut, _At(1, 2, _kill(number)), Stopped)
    assert isinstance(stopped, Stopped) and stopped.code == 128 + number
    assert "saved at epoch 2, step 3 of it" in str(stopped)
    saved = read_checkpoint(tmp_path / f"cut/{method}/{method}/{method}.ckpt")
    assert saved["global_step"] == 9
    again = pretrain(_cfg(method, images, tmp_path / "cut", **given))
    _assert_same(whole, again)


@pytest.mark.counts("faults injected")
def test_batched_views_go_on_bit_for_bit(images: Path, tmp_path: Path):
    batched = {"data__views": "batched"}
    whole = pretrain(_cfg("iecl_simclr", images, tmp_path / "whole", **batched))
    cut = _cfg("iecl_simclr", images, tmp_path / "cut", **batched)
    assert "step 3 of it" in str(_stopped(cut, _At(1, 2, _kill(signal.SIGTERM)), Stopped))
    _assert_same(whole, pretrain(_cfg("iecl_simclr", images, tmp_path / "cut", **batched)))


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.counts("faults injected")
def test_signal_in_the_last_step_of_an_epoch(epoch: int, images: Path, tmp_path: Path):
    """After the last epoch too, so that an evaluation does not begin; the rerun completes it."""
    whole = pretrain(_cfg("byol", images, tmp_path / "whole"))
    stopped = _stopped(
        _cfg("byol", images, tmp_path / "cut"), _At(epoch, 5, _kill(signal.SIGTERM)), Stopped
    )
    assert f"the end of epoch {epoch + 1}" in str(stopped)
    again = pretrain(_cfg("byol", images, tmp_path / "cut"))
    assert again.result is not None
    _assert_same(whole, again)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.counts("faults injected")
def test_signal_before_the_first_step_leaves_nothing(number: int, images: Path, tmp_path: Path):
    """Nor does a run leave its handlers to what comes after it."""

    class Told(pl.Callback):
        def on_sanity_check_start(self, trainer: Any, module: Any) -> None:
            os.kill(os.getpid(), number)

    before = [signal.getsignal(n) for n in SIGNALS]
    cfg = complete(_cfg("simclr", images, tmp_path), HOST)
    with pytest.raises(KeyboardInterrupt) as stopped:
        fit(cfg, HOST, Run(cfg), callbacks=[Told()])
    assert isinstance(stopped.value, Stopped) and stopped.value.code == 128 + number
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert [signal.getsignal(n) for n in SIGNALS] == before


@pytest.mark.counts("faults injected")
def test_every_n_steps_and_a_power_cut(images: Path, tmp_path: Path):
    """The step that was saved, not the one that was cut, is gone on from."""
    every = {"checkpoint__every_n_steps": 4}

    def power_cut() -> None:
        raise RuntimeError("power cut")

    whole = pretrain(_cfg("iecl_byol", images, tmp_path / "whole", **every))
    cut = _cfg("iecl_byol", images, tmp_path / "cut", **every)
    _stopped(cut, _At(1, 4, power_cut), RuntimeError)
    saved = read_checkpoint(tmp_path / "cut/iecl_byol/iecl_byol/iecl_byol.ckpt")
    assert saved["global_step"] == 8
    _assert_same(whole, pretrain(_cfg("iecl_byol", images, tmp_path / "cut", **every)))


@pytest.mark.counts("faults injected")
def test_with_accumulated_gradients(images: Path, tmp_path: Path):
    """A save in the middle of an accumulation would lose its first half.

    With a momentum network, which is updated once a step of the optimiser.
    """
    given = {"accumulate_grad_batches": 2}
    whole = pretrain(_cfg("byol", images, tmp_path / "whole", **given))
    stopped = _stopped(
        _cfg("byol", images, tmp_path / "cut", **given),
        _At(1, 2, _kill(signal.SIGTERM)),
        Stopped,
    )
    assert "step 4 of it" in str(stopped)
    _assert_same(whole, pretrain(_cfg("byol", images, tmp_path / "cut", **given)))


@pytest.mark.counts("faults injected")
def test_killed_before_its_result_the_run_is_completed(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patched:

        def killed(*_: Any) -> None:
            raise RuntimeError("kill -9")

        patched.setattr(Run, "finish", killed)
        with pytest.raises(RuntimeError, match="kill -9"):
            pretrain(_cfg("iecl_simclr", images, tmp_path))
    folder = tmp_path / "iecl_simclr/iecl_simclr"
    logs = folder / "logs/version_0/metrics.csv"
    lines = logs.read_text().splitlines()
    logs.write_text("\n".join(lines[:-1]) + "\n")  # the last epoch's row is logged after its save
    assert read_metrics(folder)["train_iecl_kl_epoch"].isna()[2]
    run = pretrain(_cfg("iecl_simclr", images, tmp_path))
    result = json.loads((folder / "result.json").read_text(), parse_constant=pytest.fail)
    assert run.result == result
    assert result["seconds"] > 18 * result["seconds_per_step"] > 0
    metrics = read_metrics(folder)
    assert sorted(metrics.index) == [0, 1, 2]
    for name in ("train_iecl_kl_epoch", "train_acc1_epoch", "val_acc1"):
        assert result["metrics"][name] == pytest.approx(metrics[name].iloc[-1]), name


@pytest.mark.counts("faults injected")
def test_seconds_are_those_of_all_legs(images: Path, tmp_path: Path):
    cfg = _cfg("simclr", images, tmp_path)
    from iecl_solo.train.callbacks.cost import CostMonitor

    cost = CostMonitor()
    cost._began -= 1000.0  # the first leg took long
    first = complete(_cfg("simclr", images, tmp_path), HOST)

    class Stop(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fit(first, HOST, Run(first), callbacks=[cost, Stop()])
    result = pretrain(cfg).result
    assert result is not None and 1000 < result["seconds"] < 1500


class _Draws(Dataset):
    """An item is its index and what the three generators draw; it counts what it decoded."""

    decoded: list[int] = []

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        self.decoded.append(index)
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))


class _Blocked(Dataset):
    """The signals that the process which reads an image does not hear."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> list[int]:
        return sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def test_workers_are_deaf_to_whatever_ends_a_run():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    (blocked,) = SteadyLoader(_Blocked(), batch_size=None, num_workers=1)
    assert set(SIGNALS) <= set(blocked)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


_HELD = """
import multiprocessing
from iecl_solo.order import SteadyLoader

def hold():
    global batches  # until the interpreter is gone
    batches = iter(SteadyLoader(list(range(100)), batch_size=2, num_workers=1))
    print(next(batches).tolist(), flush=True)

if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=hold)
    child.start()
    child.join()
    print("child", child.exitcode, flush=True)
    hold()
"""


def test_a_process_that_holds_its_loader_ends_all_the_same():
    """It waited for ever for a worker that heard no SIGTERM."""
    done = subprocess.run(
        [sys.executable, "-c", _HELD], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    said = (done.returncode, done.stdout, done.stderr)
    assert said == (0, "[0, 1]\nchild 0\n[0, 1]\n", "")


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_is_exact_and_decodes_nothing(workers: int):
    def batches(epoch: int, seen: int, workers: int = 0) -> list[Any]:
        loader, order = seeded(DataLoader(_Draws(), batch_size=3, num_workers=workers), 5)
        order.resume(epoch, seen)
        assert len(loader) == 6
        _Draws.decoded = []
        return [torch.stack([v.double() for v in batch]) for batch in loader]

    whole = batches(1, 0)
    assert len(_Draws.decoded) == 18
    rest = batches(1, 4, workers)
    assert len(_Draws.decoded) == (6 if workers == 0 else 0)
    assert len(rest) == 2 and all(map(torch.equal, whole[4:], rest))
    other = batches(2, 0)
    assert not torch.equal(whole[0], other[0])
    drawn = torch.cat(whole, 1)[1:]
    assert len(drawn.unique()) == drawn.numel()  # no two images, or generators, draw alike


def test_processes_share_the_batches_of_one(monkeypatch: pytest.MonkeyPatch):
    one = list(EpochOrder(20, 4, seed=3))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    ranks = []
    for rank in range(2):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        ranks.append(list(EpochOrder(20, 2, seed=3)))
    for batch in range(5):
        both = [place for rank in ranks for place in rank[2 * batch : 2 * batch + 2]]
        assert sorted(both) == sorted(one[4 * batch : 4 * batch + 4])


def test_monitor_measures_an_epoch_that_is_gone_on_with(images: Path, tmp_path: Path):
    small = {"images": 4, "delta_h_images": 1, "probes": 2, "steps": 2, "every_n_epochs": 1}
    given = {f"monitor__{k}": v for k, v in small.items()}
    cut = _cfg("simclr", images, tmp_path, **given)
    _stopped(cut, _At(1, 2, _kill(signal.SIGTERM)), Stopped)
    run = pretrain(_cfg("simclr", images, tmp_path, **given))
    assert list(pd.read_csv(run.folder / "monitor.csv")["epoch"]) == [0, 1, 2]
