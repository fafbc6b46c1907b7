"""A run's folder: whose it is, what is ever removed from it, one process at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from support import HOST, raw_config

from iecl_solo.errors import IECLError
from iecl_solo.solo.checkpoint import read_checkpoint
from iecl_solo.train import fit as fit_module
from iecl_solo.train import run as run_module
from iecl_solo.train.callbacks.cost import CostMonitor, peak_memory_bytes
from iecl_solo.train.complete import complete
from iecl_solo.train.fit import fit, pretrain
from iecl_solo.train.run import Run


def _cfg(images: Path, to: Path, **overrides: Any) -> Any:
    given = {"checkpoint__dir": str(to), "csv__enabled": True, "monitor__every_n_epochs": 0}
    return OmegaConf.create(raw_config("simclr", images, **(given | overrides)))


def _run(images: Path, to: Path, **overrides: Any) -> tuple[Any, Run]:
    cfg = complete(_cfg(images, to, **overrides), HOST)
    return cfg, Run(cfg)


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


class _PowerCut(pl.Callback):
    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


@pytest.fixture
def ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C before the first checkpoint."""

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_module.Trainer, "fit", stopped)


def test_nested_name_keeps_its_checkpoint_and_goes_on_from_it(images: Path, tmp_path: Path):
    cfg, run = _run(images, tmp_path, name="exp1/seed0")
    with pytest.raises(KeyboardInterrupt):
        fit(cfg, HOST, run, callbacks=[_PowerCut()])
    folder = tmp_path / "simclr/exp1/seed0"
    assert run.folder == folder and run.checkpoint == folder / "seed0.ckpt"
    assert read_checkpoint(folder / "seed0.ckpt")["epoch"] == 0
    again = pretrain(_cfg(images, tmp_path, name="exp1/seed0"))
    assert read_checkpoint(again.checkpoint)["epoch"] == 1
    first, second = sorted((folder / "logs").glob("version_*"))
    assert set(pd.read_csv(first / "metrics.csv")["epoch"]) == {0}
    assert set(pd.read_csv(second / "metrics.csv")["epoch"]) == {1}


def test_a_run_that_ends_before_its_last_epoch_is_kept_too(images: Path, tmp_path: Path):
    """As by max_steps, where no epoch's end was due to save."""
    run = pretrain(_cfg(images, tmp_path, max_epochs=9, max_steps=4, checkpoint__frequency=100))
    assert run.result is not None and read_checkpoint(run.checkpoint)["global_step"] == 4


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="Linux alone says it")
def test_peak_memory_is_not_that_of_what_the_process_did_before():
    """A benchmark trains its cells one after the other in one process."""
    cpu = torch.device("cpu")
    held = np.ones(2**25)
    high = peak_memory_bytes(cpu)
    del held
    assert peak_memory_bytes(cpu) > high - 2**24
    strategy: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=cpu))
    monitor = CostMonitor()
    monitor.setup(strategy, pl.LightningModule(), "fit")
    assert peak_memory_bytes(cpu) == monitor._peak(cpu) < high - 2**27


def test_a_home_folder_is_written_out(images: Path, tmp_path: Path, monkeypatch):
    """Shells leave it alone after ``data.train_path=``."""
    monkeypatch.setenv("HOME", str(images.parent))
    given = _cfg(images, tmp_path, data__val_path=f"~/{images.name}")
    given.data.train_path = f"~/{images.name}"
    cfg = complete(given, HOST)
    assert cfg.data.train_path == cfg.data.val_path == str(images)


@pytest.mark.usefixtures("ctrl_c")
def test_second_identical_command_takes_nothing_from_the_first(images: Path, tmp_path: Path):
    _, first = _run(images, tmp_path)
    first.claim(HOST)
    before = _files(tmp_path)
    with pytest.raises((IECLError, KeyboardInterrupt)) as refused:
        pretrain(_cfg(images, tmp_path))
    assert _files(tmp_path) == before and "simclr/simclr/args.json" in before
    assert f"is being trained by process {os.getpid()}" in str(refused.value)
    first.release()


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.counts("faults injected")
def test_what_a_user_set_aside_stays(images: Path, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        pretrain(_cfg(images, tmp_path))
    assert not any(p.is_file() for p in tmp_path.rglob("*"))  # nothing of a run that did nothing
    _, run = _run(images, tmp_path)
    run.claim(HOST)
    (run.folder / "simclr.ckpt").write_bytes(b"half")
    run.release()
    (run.folder / "simclr.ckpt").rename(run.folder / "broken.ckpt")
    for name in ("notes.txt", "logs/version_0/metrics.csv", "saib-epoch-0000.safetensors"):
        (run.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (run.folder / name).write_text("mine")
    before = _files(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        pretrain(_cfg(images, tmp_path))
    after = _files(tmp_path)
    assert {name: after.get(name) for name in before} == before


@pytest.mark.usefixtures("ctrl_c")
def test_files_that_were_there_before_a_run_stay(images: Path, tmp_path: Path):
    """The folder existed, with files named as a run's are: none of them is this process's."""
    folder = tmp_path / "simclr/simclr"
    (folder / "logs/version_0").mkdir(parents=True)
    for name in ("monitor.csv", "logs/version_0/metrics.csv", "logs/mine.txt", "thesis.tex"):
        (folder / name).write_text("precious")
    before = _files(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        pretrain(_cfg(images, tmp_path))
    assert _files(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["../../precious", "/precious", "a/../../b", "a//b", ".", "..", "a\nb", "x" * 300]
)
def test_name_outside_of_the_checkpoints_is_refused(name: str, images: Path, tmp_path: Path):
    with pytest.raises(IECLError, match=r"^name: ") as refused:
        pretrain(_cfg(images, tmp_path / "runs", name=name))
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_number_as_a_name(images: Path, tmp_path: Path):
    _, run = _run(images, tmp_path, name=7)
    assert run.checkpoint == tmp_path / "simclr/7/7.ckpt"


_HOLD = """
import sys, time
from omegaconf import OmegaConf
from iecl_solo.solo.host import find_host
from iecl_solo.train.run import Run
run = Run(OmegaConf.load(sys.argv[1]))
run.claim(find_host())
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.any_host
@pytest.mark.counts("faults injected")
def test_lock_of_a_killed_process_is_taken_over_at_once(images: Path, tmp_path: Path):
    cfg, run = _run(images, tmp_path)
    (tmp_path / "cfg.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path / "cfg.yaml")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(IECLError, match=f"is being trained by process {holder.pid} "):
        run.claim(HOST)
    holder.kill()
    holder.wait()
    start = time.monotonic()
    run.claim(HOST)
    assert time.monotonic() - start < 5
    run.release()


@pytest.mark.counts("faults injected")
def test_lock_of_another_machine_is_taken_over_when_it_shows_no_life(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(run_module, "LEASE", 2.0)
    _, run = _run(images, tmp_path)
    run.claim(HOST)
    lock = run.folder / ".lock"
    of_us = lock.read_text()
    run.release()
    run.folder.mkdir(parents=True)
    host = next(line for line in of_us.splitlines() if line.startswith("host="))
    lock.write_text(of_us.replace(host, "host=node17"))  # whose power is cut: nothing touches it
    run.claim(HOST)
    assert "on node17 trains here; waiting" in capsys.readouterr().out
    run.release()
    assert not lock.exists()


def test_remains_of_a_killed_write_are_removed(images: Path, tmp_path: Path):
    _, run = _run(images, tmp_path)
    run.folder.mkdir(parents=True)
    (run.folder / "simclr.ckpt.part").write_bytes(b"half")
    run.claim(HOST)
    assert not list(run.folder.glob("*.part"))
    run.release()
