"""EntropyMonitor: it says what the functions say, and does not touch the run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from support import HOST, batches, build, same_tensors, train_on

from iecl_solo.entropy import coding_rate, effective_rank, gaussian_kl
from iecl_solo.errors import IECLError
from iecl_solo.generation import conditional_entropy, patch_statistics
from iecl_solo.jacobian import logabsdet_exact
from iecl_solo.lipschitz import sigmas
from iecl_solo.solo.embed import embed
from iecl_solo.train.callbacks import entropy_monitor
from iecl_solo.train.callbacks.entropy_monitor import EntropyMonitor, MonitorConfig, measure

SMALL = MonitorConfig(1, images=8, delta_h_images=1, probes=2, steps=10, share=1)


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
    config = MonitorConfig(every, images=8, delta_h_images=1, probes=2, steps=4, share=1)
    monitor = EntropyMonitor(HOST, config, tmp_path / "m.csv")
    train_on(build("iecl_simclr", images), batches(1), epochs=4, callbacks=[monitor])
    assert list(pd.read_csv(tmp_path / "m.csv")["epoch"]) == epochs


def test_values_are_those_of_the_functions(images: Path):
    saib = {"outer_skip": True, "match_statistics": False}
    model = build("iecl_simclr", images, iecl={"saib": saib})
    views = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    values = measure(model, HOST, views, SMALL)
    model.eval()
    query = embed(model, HOST, views[1], "query")
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
    assert values["delta_h_contrast"] == pytest.approx(0.6931, abs=1e-3)
    assert values["delta_h_beyond_contrast"] == pytest.approx(0.0, abs=1e-3)
    # x -> 2 x: 1/2 (4 - 1) - log 2
    assert values["patch_kl"] == pytest.approx(1.5 - 0.6931, abs=0.01)


@pytest.mark.parametrize("space", ["input", "embedding"])
@pytest.mark.parametrize("placement", ["query", "anchor", "both"])
@pytest.mark.parametrize("method", ["iecl_byol", "iecl_simclr"])
def test_query_and_anchor_are_those_of_the_loss(
    method: str, placement: str, space: str, images: Path
):
    """The momentum network and SAIB on the anchor, as the terms of a step have them."""
    kl = {"space": space} | ({"covariance": "full"} if space == "embedding" else {})
    model = build(method, images, iecl={"placement": placement, "kl": kl})
    with torch.no_grad():
        for i, p in enumerate(model.iecl.saib.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        if hasattr(model, HOST.momentum):  # as after training: not the online one's weights
            for p in getattr(model, HOST.momentum).parameters():
                p.mul_(1.2).add_(0.01)
    model.eval()
    views = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    momentum = hasattr(model, HOST.momentum)
    q = model.iecl.views.query[0]
    a = 1 - q
    saib, online = model.iecl.saib, getattr(model, HOST.online)
    with torch.no_grad():
        query_x = saib(views[q]) if placement != "anchor" else views[q]
        anchor_x = saib(views[a]) if placement != "query" else views[a]
        query = model.projector(online(query_x))
        if momentum:
            anchor = model.momentum_projector(getattr(model, HOST.momentum)(anchor_x))
        else:
            anchor = model.projector(online(anchor_x))
        raw = F.normalize(model.projector(online(views[a])), dim=-1)
    query, anchor = F.normalize(query, dim=-1), F.normalize(anchor, dim=-1)
    values = measure(model, HOST, views, SMALL)
    covariance = kl.get("covariance", "diagonal")
    expected = gaussian_kl(query, anchor, covariance=covariance) / query.shape[1]
    assert values["kl"] == pytest.approx(expected.item(), rel=1e-4)
    assert values["entropy_query"] == pytest.approx(coding_rate(query).item(), rel=1e-4)
    assert values["entropy_anchor"] == pytest.approx(coding_rate(anchor).item(), rel=1e-4)
    assert values["effective_rank"] == pytest.approx(effective_rank(raw).item(), rel=1e-4)
    placed = views[a] if placement == "anchor" else views[q]
    patches = patch_statistics([placed], [saib(placed)], 4)
    assert values["patch_kl"] == pytest.approx(patches.kl.item(), rel=1e-4)


def test_noise_is_measured_fixed_and_its_entropy_written(images: Path, tmp_path: Path):
    block = {
        "saib": {"variant": "noise", "noise_channels": 2, "budget": {"start": 0.2, "hold": "none"}}
    }
    model = build("iecl_simclr", images, iecl=block)
    views = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = (measure(model, HOST, views, SMALL) for _ in range(2))
    assert first == second and same_tensors(kept, model.state_dict()) == []
    saib = model.iecl.saib.eval()
    few = views[1][:1]
    exact = logabsdet_exact(saib.realize(few), few)
    assert first["delta_h"] == pytest.approx(exact.item() / few.numel(), abs=0.02)
    noise = saib.draw(few)
    expected = conditional_entropy(saib, few, noise).item() / noise.numel()
    assert first["conditional_entropy"] == pytest.approx(expected, rel=1e-4)
    assert first["budget"] == pytest.approx(0.2)
    assert first["conditional_entropy_bound"] == pytest.approx(1 + math.log(0.4))
    monitor = EntropyMonitor(HOST, SMALL, tmp_path / "monitor.csv")
    train_on(model.train(), batches(2), callbacks=[monitor])
    row = pd.read_csv(tmp_path / "monitor.csv").iloc[0]
    assert row.notna().all() and row["delta_h_beyond_contrast"] == pytest.approx(
        row["delta_h"] - row["delta_h_contrast"]
    )


def test_modes_and_random_state_are_left_alone(images: Path):
    model = build("iecl_byol", images).train()
    modes, state = {n: m.training for n, m in model.named_modules()}, torch.get_rng_state()
    measure(model, HOST, [torch.randn(8, 3, 32, 32, generator=torch.Generator())] * 2, SMALL)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_host_alone_has_no_delta_h(images: Path):
    values = measure(build("simclr", images), HOST, [torch.randn(8, 3, 32, 32)] * 2, SMALL)
    assert "delta_h" not in values and values["kl"] >= 0


class _Slow:
    """A clock that stands still, but for a step, a product with SAIB's Jacobian, and the rest."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, product: float, besides: float) -> None:
        self.now, self.product, self.besides = 0.0, product, besides
        monkeypatch.setattr(entropy_monitor, "measure", self._measure)
        monkeypatch.setattr(entropy_monitor, "delta_h_split", self._delta_h)

    def _delta_h(self, _: object, x: torch.Tensor, *, probes: int, steps: int) -> None:
        self.now += self.product * len(x) * probes * steps

    def _measure(self, *given: Any) -> dict[str, float]:
        config = given[-1]
        self._delta_h(None, torch.zeros(config.delta_h_images), probes=config.probes, steps=20)
        self.now += self.besides
        return {"entropy_query": 1.0}


class _Steps(Callback):
    """Each takes 100 s."""

    def __init__(self, clock: _Slow) -> None:
        self.clock = clock

    def on_train_batch_end(self, *_: object) -> None:
        self.clock.now += 100.0


#: Seconds of a product and of the rest: in which epochs what is measured, of 200 s each.
SLOW = {
    (0.001, 0.1): [(0, 4, 4), (1, 4, 4), (2, 4, 4), (3, 4, 4)],
    (0.03, 0.1): [(0, 1, 4), (1, 2, 4), (2, 1, 4), (3, 2, 4)],
    (0.06, 0.0): [(0, 1, 3), (1, 1, 3), (2, 1, 3), (3, 1, 3)],
    # what cannot be afforded: Delta H, then epochs
    (1.0, 0.1): [(0, 0, 4), (1, 0, 4), (2, 0, 4), (3, 0, 4)],
    (0.001, 6.0): [(0, 4, 4), (3, 4, 4)],
}


@pytest.mark.parametrize("seconds", SLOW)
def test_it_keeps_to_its_share_of_the_time(
    seconds: tuple[float, float],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    clock, path = _Slow(monkeypatch, *seconds), tmp_path / "monitor.csv"
    monitor = EntropyMonitor(HOST, MonitorConfig(1, images=8), path, lambda: clock.now)
    model = build("iecl_simclr", images)
    train_on(model, batches(2), epochs=4, callbacks=[_Steps(clock), monitor])
    frame = pd.read_csv(path)
    rows = frame[["epoch", "delta_h_images", "probes"]].values.tolist()
    assert [tuple(row) for row in rows] == SLOW[seconds]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("monitor ")]
    less = {row[1:] for row in SLOW[seconds]} - {(4, 4)}
    assert len(said) == len(less) + (len(frame) < 4)
    assert all("would take over 2 % of the time so far (monitor.share)" in line for line in said)
    if len(frame) == 4 and seconds[0] < 1:
        training = 200.0 * (frame["epoch"] + 1)
        assert (frame["monitor_seconds"].cumsum() <= 0.02 * training).all()


def test_impossible_numbers_are_refused():
    with pytest.raises(IECLError, match=r"monitor\.probes: 1 is not allowed, .* from 2 up"):
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
