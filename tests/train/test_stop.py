"""A scheduler's notice: who asks for the job again, and how often."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf
from support import end_by_a_notice

from iecl_solo.cli import hydra_app
from iecl_solo.experiments import cell as cells
from iecl_solo.experiments.grid import read_benchmark
from iecl_solo.experiments.store import STORE, Store
from iecl_solo.train import fit, stop
from iecl_solo.train.processes import in_processes
from iecl_solo.train.stop import NOTICES, Signals, Stopped, queued_again


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The jobs of an array that SLURM was asked to queue again."""
    jobs: list[str] = []
    for name, value in {"JOB_ID": "8", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(stop, "requeue", lambda job: jobs.append(job) or "queued")
    return jobs


@pytest.mark.parametrize("number", NOTICES)
def test_a_notice_asks_once(number: signal.Signals, asked: list[str]):
    stopped = queued_again(Stopped(number, "saved"))
    assert stopped.said == "saved; queued"
    assert queued_again(stopped) is stopped
    assert asked == ["7_1"]


def test_other_signals_and_other_ranks_do_not_ask(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
):
    queued_again(Stopped(signal.SIGTERM, "saved"))
    # srun's tasks have no RANK; Lightning knows theirs
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    queued_again(Stopped(signal.SIGUSR1, "saved"))
    assert asked == []


def test_a_notice_that_comes_twice_still_waits_for_the_step():
    """SLURM sends it to every process of a step, and a parent hands it on."""
    signals = Signals()
    with signals.taken():
        signals.stepping = True
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGUSR1
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_notice_before_the_first_step_asks_too(asked: list[str], monkeypatch: pytest.MonkeyPatch):
    told = lambda *_: os.kill(os.getpid(), signal.SIGUSR1)  # noqa: E731
    monkeypatch.setattr(fit, "complete", told)
    with pytest.raises(Stopped):
        fit.pretrain(OmegaConf.create({}))
    assert asked == ["7_1"]


@pytest.mark.any_host
def test_a_notice_after_the_training_asks_too(asked: list[str], monkeypatch: pytest.MonkeyPatch):
    """The run's process, as of compare's evaluation, and the command that waits for it."""
    with pytest.raises(Stopped) as stopped:
        in_processes(end_by_a_notice)
    assert stopped.value.code == 128 + signal.SIGUSR1
    assert "could not be queued again" in str(stopped.value)  # there is no SLURM
    given = hydra_app.read_arguments("compare", "pretrain", ["--config-name", "digits/simclr"])
    told = lambda *_: os.kill(os.getpid(), signal.SIGUSR1)  # noqa: E731
    monkeypatch.setattr("iecl_solo.cli.compare.compare", told)
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with pytest.raises(Stopped):
        hydra_app.run(given, "iecl_solo.cli.compare")
    assert signal.signal(signal.SIGUSR1, before) == signal.SIG_IGN
    assert asked == ["7_1"]


@pytest.mark.parametrize("number", NOTICES)
def test_a_notice_in_a_cells_evaluation_gives_the_cell_back(
    number: signal.Signals, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    benchmark = read_benchmark(
        {
            **{"name": "b", "question": "?", "dir": str(tmp_path), "seeds": [0]},
            **{"measures": ["knn_acc1"], "arms": {"simclr": {"method": "simclr"}}},
            "data": {"digits": {"config": "digits"}},
        }
    )
    (one,) = cells.cells(benchmark)
    monkeypatch.setitem(
        cells._KINDS, "training", lambda *_: os.kill(os.getpid(), number) or {"metrics": {}}
    )
    with pytest.raises(Stopped):
        cells.run_cell(benchmark, one)
    assert asked == ["7_1"]
    store = Store(tmp_path / STORE)
    assert not list(store.path.glob("*.lock"))
    assert store.claim(one.row())
