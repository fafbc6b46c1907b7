"""EntropyMonitor: it says what the functions say, and does not touch the run."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from support import HOST, batches, build, same_tensors, train_on

from iecl_solo.entropy import coding_rate
from iecl_solo.errors import IECLError
from iecl_solo.jacobian import logabsdet_exact
from iecl_solo.lipschitz import sigmas
from iecl_solo.solo.embed import embed
from iecl_solo.train.callbacks.entropy_monitor import EntropyMonitor, MonitorConfig, measure

SMALL = MonitorConfig(every_n_epochs=1, images=8, delta_h_images=1, probes=2, steps=10)


def test_training_is_the_same_with_it(images: Path, tmp_path: Path):
    plain = train_on(build("iecl_byol", images), batches(3), epochs=2)
    monitor = EntropyMonitor(HOST, SMALL, tmp_path / "monitor.csv")
    seen = train_on(build("iecl_byol", images), batches(3), epochs=2, callbacks=[monitor])
    assert same_tensors(plain.state_dict(), seen.state_dict()) == []


def test_rows_are_by_epoch_and_survive_a_restart(images: Path, tmp_path: Path):
    path = tmp_path / "monitor.csv"
    for _ in range(2):  # the second run measures the same epochs again
        monitor = EntropyMonitor(HOST, SMALL, path)
        train_on(build("iecl_simclr", images), batches(2), epochs=2, callbacks=[monitor])
    frame = pd.read_csv(path)
    assert list(frame["epoch"]) == [0, 1]
    assert frame.notna().all().all()


@pytest.mark.parametrize(("every", "epochs"), [(2, [0, 2, 3]), (10, [0, 3])])
def test_frequency_and_the_last_epoch(every: int, epochs: list[int], images: Path, tmp_path: Path):
    config = MonitorConfig(every_n_epochs=every, images=8, delta_h_images=1, probes=2, steps=4)
    monitor = EntropyMonitor(HOST, config, tmp_path / "m.csv")
    train_on(build("iecl_simclr", images), batches(1), epochs=4, callbacks=[monitor])
    assert list(pd.read_csv(tmp_path / "m.csv")["epoch"]) == epochs


def test_values_are_those_of_the_functions(images: Path):
    model = build("iecl_simclr", images, iecl={"saib": {"outer_skip": True}})
    views = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    values = measure(model, HOST, views, SMALL)
    model.eval()
    query = embed(model, HOST, views[1], query=True)
    assert values["entropy_query"] == pytest.approx(float(coding_rate(query)), rel=1e-4)
    for layer, (largest, smallest) in sigmas(getattr(model, HOST.online)).items():
        assert values[f"sigma_max/{layer}"] == largest <= values["sigma_max"]
        assert values[f"sigma_min/{layer}"] == smallest >= values["sigma_min"]
    exact = logabsdet_exact(model.iecl.saib.double(), views[1][:1].double())
    n = views[1][0].numel()
    # at its initialisation this SAIB is x -> 2x: all of Delta H is scaling
    assert values["delta_h"] == pytest.approx(float(exact) / n, abs=1e-3)
    assert values["delta_h_isotropic"] == pytest.approx(0.6931, abs=1e-3)
    assert values["delta_h_anisotropic"] == pytest.approx(0.0, abs=1e-3)


def test_modes_and_random_state_are_left_alone(images: Path):
    model = build("iecl_byol", images).train()
    modes, state = {n: m.training for n, m in model.named_modules()}, torch.get_rng_state()
    measure(model, HOST, [torch.randn(8, 3, 32, 32, generator=torch.Generator())] * 2, SMALL)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_host_alone_has_no_delta_h(images: Path):
    values = measure(build("simclr", images), HOST, [torch.randn(8, 3, 32, 32)] * 2, SMALL)
    assert "delta_h" not in values and values["kl"] >= 0


def test_impossible_numbers_are_refused():
    with pytest.raises(IECLError, match=r"monitor\.probes: 1 is not allowed, at least 2 is"):
        MonitorConfig(probes=1)


def test_a_run_that_diverged_is_reported_and_goes_on(images: Path, tmp_path: Path):
    model = build("iecl_simclr", images)
    with torch.no_grad():
        next(getattr(model, HOST.online).parameters()).fill_(float("nan"))
    monitor = EntropyMonitor(HOST, SMALL, tmp_path / "m.csv")
    monitor.on_train_batch_start(_Epoch(), model, [None, [torch.randn(8, 3, 32, 32)] * 2], 0)
    model.log_dict = lambda *_, **__: None
    monitor.on_train_epoch_end(_Epoch(), model)
    (row,) = pd.read_csv(tmp_path / "m.csv").to_dict("records")
    assert row["epoch"] == 0 and pd.isna(row["entropy_query"]) and pd.isna(row["effective_rank"])


class _Epoch:
    current_epoch, max_epochs, is_global_zero = 0, 1, True
