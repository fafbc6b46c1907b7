"""Images a second: what is measured, of which pipelines, and the table that is left."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import HOST, config, image_folder, pipeline, raw_config

from iecl_solo.errors import IECLError
from iecl_solo.experiments import throughput
from iecl_solo.experiments.store import Store
from iecl_solo.experiments.throughput import (
    available,
    measure_throughput,
    source,
    write_table,
)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "train")


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(throughput.importlib.util, "find_spec", lambda name: None)
    arms = {"host": 1, "kornia": 2, "batched": 3}
    assert available(arms) == {"host": 1, "batched": 3}
    with pytest.raises(IECLError, match=r"unknown pipeline 'batch': did you mean 'batched'"):
        available({"batch": {}})


@pytest.mark.parametrize("threads", [1, 2])
def test_each_pipeline_gives_the_same_turn(images: Path, threads: int):
    cfg = config("simclr", images)
    for name in ("host", "per_image", "batched"):
        made = source(cfg, name, HOST, batch_size=8, batches=2, threads=threads)
        for _ in range(2):  # and again, as often as it is timed
            turn = list(made)
            assert [len(index) for index, _, _ in turn] == [8, 8], name
            assert [v.shape for v in turn[0][1]] == [(8, 3, 32, 32)] * 2
    assert cfg.data.get("views") is None  # what was given is as it was


def test_peers_are_given_the_same_pipeline(images: Path):
    pytest.importorskip("kornia")
    jitter = {"prob": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
    cfg = config("simclr", images, augmentations=[pipeline(color_jitter=jitter)])
    (_, views, _), *_ = source(cfg, "kornia", HOST, batch_size=8, batches=1, threads=1)
    assert [v.shape for v in views] == [(8, 3, 32, 32)] * 2


@pytest.mark.parametrize("peer", throughput.PEERS)
def test_peers_refuse_another_pipeline_than_simclrs(images: Path, peer: str):
    """Also where they are not installed."""
    cfg = config("simclr", images, augmentations=[pipeline(solarization={"prob": 0.1})])
    with pytest.raises(IECLError, match="SimCLR's two views of one pipeline"):
        source(cfg, peer, HOST, batch_size=8, batches=1, threads=1)


def test_rates_and_ratios_are_of_what_was_timed(images: Path, monkeypatch: pytest.MonkeyPatch):
    # eight images a turn; the second takes a quarter of the first's time
    monkeypatch.setattr(throughput, "interleaved", lambda *_, **__: [[4.0, 8.0], [1.0, 2.0]])
    rates = throughput._rates("training_", [lambda: 8, lambda: 8], 2)
    assert rates["training_images_per_second"] == pytest.approx(8 / 1.5)
    assert rates["training_ratio_to_host"] == 4.0


def test_a_measured_cell(images: Path):
    cfg: Any = config("simclr", images).__class__(raw_config("simclr", images))
    out = measure_throughput(cfg, "batched", HOST, rounds=2, threads=1, start=False)
    for name in ("images_per_second", "training_images_per_second"):
        assert out[name] > 0
    for name in ("ratio_to_host", "training_ratio_to_host"):
        assert 0 < out[f"{name}_low"] <= out[name] <= out[f"{name}_high"]
    host = measure_throughput(cfg, "host", HOST, rounds=2, threads=1, start=False)
    assert host["ratio_to_host"] == 1.0


def test_start_of_a_command(images: Path):
    cfg: Any = config("simclr", images).__class__(raw_config("simclr", images))
    held = torch.ones(2**29)  # 2 GiB of this process, which are not the command's
    out = throughput._start(cfg, "batched", HOST, 1)
    assert 0.5 < out["startup_seconds"] < 300
    assert 2**26 < out["resident_bytes"] < held.nbytes


@pytest.mark.robust
@pytest.mark.any_host
def test_peak_memory_of_a_run_is_of_its_process_alone():
    held = torch.ones(2**29)
    program = "import torch; from iecl_solo.train.callbacks.cost import peak_memory_bytes;"
    program += "print(peak_memory_bytes(torch.device('cpu')))"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert 2**26 < int(said.stdout) < held.nbytes


@pytest.mark.robust
def test_start_of_a_command_that_is_refused(images: Path):
    cfg: Any = config("simclr", images).__class__(raw_config("simclr", images))
    cfg.method = "simclear"
    with pytest.raises(IECLError, match=r"throughput: .*simclear"):
        throughput._start(cfg, "batched", HOST, 1)


def test_the_table_has_a_line_for_each_pipeline_and_threads(tmp_path: Path):
    store = Store(tmp_path / "rows")
    for arm, threads, rate in (("host", 1, 500.0), ("batched", 1, 3000.0), ("lightly", 2, None)):
        cell = {"id": f"{arm}-{threads}", "data": "r18", "arm": arm, "method": "simclr", "seed": 0}
        store.claim({**cell, "against": None, "axes": {"threads": threads}})
        if rate is None:
            store.fail(cell["id"], "ModuleNotFoundError")
        else:
            measured = {"ratio_to_host": rate / 500, "images_per_second": rate}
            store.finish(cell["id"], measured)
    write_table(store, tmp_path / "throughput.csv")
    with (tmp_path / "throughput.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["pipeline"], r["threads"], float(r["ratio_to_host"])) for r in rows] == [
        ("batched", "1", 6.0),
        ("host", "1", 1.0),
    ]
    assert float(rows[0]["images_per_second"]) == 3000.0


def test_the_table_of_a_benchmark_without_threads(tmp_path: Path):
    store = Store(tmp_path / "rows")
    cell = {"id": "host", "data": "r18", "arm": "host", "method": "simclr", "seed": 0}
    store.claim({**cell, "against": None, "axes": {}})
    store.finish("host", {"images_per_second": 500.0})
    write_table(store, tmp_path / "throughput.csv")
    assert (tmp_path / "throughput.csv").read_text() == (
        "pipeline,network,images_per_second\nhost,r18,500.0\n"
    )
