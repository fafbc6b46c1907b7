"""Several devices from the command line: two processes are one, and they end together."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from support import (
    HOST,
    image_folder,
    in_two_processes,
    note_command_line,
    pipeline,
    raw_config,
    wait_for,
)

from iecl_solo.cli.main import main
from iecl_solo.experiments.store import STORE, Store
from iecl_solo.solo.checkpoint import read_checkpoint
from iecl_solo.train.complete import complete
from iecl_solo.train.fit import _about
from iecl_solo.train.processes import in_processes
from iecl_solo.train.run import Run

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(HOST.path.parent)]),
    "OMP_NUM_THREADS": "1",
}
BESIDE = Path(sys.executable).parent

#: What the same command is started by.
STARTS = {
    "console script": [str(BESIDE / "iecl-solo")],
    "module": [sys.executable, "-m", "iecl_solo"],
    "torchrun": [str(BESIDE / "torchrun"), "--nproc-per-node=2", "-m", "iecl_solo"],
}
TWO = ["devices=2", "strategy=ddp", "optimizer.batch_size=16"]
FOUR = ["devices=4", "strategy=ddp", "optimizer.batch_size=8"]
ONE = ["devices=1", "optimizer.batch_size=32"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 images that are always seen whole, and a method that takes each by itself.

    MoCo's loss is a mean over images; SimCLR's of the hosts has the negatives of one process alone.
    """
    root = tmp_path_factory.mktemp("devices")
    images = image_folder(root / "images", classes=4)
    whole = {"enabled": True, "crop_min_scale": 1.0, "crop_max_scale": 1.0}
    raw = raw_config(
        "iecl_mocov2plus",
        images,
        backbone={"name": "timm/test_vit", "kwargs": {"img_size": 32, "patch_size": 8}},
        augmentations=[pipeline(rrc=whole, horizontal_flip={"prob": 0.0})],
        sync_batchnorm=True,  # as packaged; a CPU has none
        strategy="auto",
    )
    (root / "two.yaml").write_text(yaml.safe_dump(raw))
    return root


def command(world: Path, to: Path, *overrides: str) -> list[str]:
    source = ["--config-path", str(world), "--config-name", "two"]
    return ["pretrain", *source, f"checkpoint.dir={to}", *overrides]


def started(start: str, arguments: list[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*STARTS[start], *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (p for p in folder.rglob("*.ckpt") if "prev" not in p.name)
    return read_checkpoint(file)["state_dict"]


def logged(folder: Path) -> pd.DataFrame:
    (file,) = folder.rglob("metrics.csv")
    frame = pd.read_csv(file).groupby("epoch").last()
    return frame[sorted(c for c in frame if c.endswith("_epoch"))]


def assert_equal(a: Path, b: Path) -> None:
    one, two = weights(a), weights(b)
    assert set(one) == set(two)
    for name, tensor in one.items():
        if "queue" in name:  # the same keys in another order
            continue
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    pd.testing.assert_frame_equal(logged(b), logged(a), rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def one(world: Path) -> Path:
    """The run of one process on whole batches."""
    assert main(command(world, world / "one", *ONE)) == 0
    return world / "one"


@pytest.mark.parametrize(
    "start",
    [
        "module",
        pytest.param("torchrun", marks=[pytest.mark.robust, pytest.mark.any_host]),
        pytest.param("console script", marks=pytest.mark.robust),
    ],
)
def test_two_processes_are_one(
    start: str, one: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    if not Path(STARTS[start][0]).is_file():
        pytest.skip(f"{STARTS[start][0]} is not installed")
    two = [*TWO, f"data.num_workers={int(start == 'torchrun')}"]  # a worker each
    process = started(start, command(world, tmp_path, *two))
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert out.count("checkpoint: ") == 1, out
    assert out.count("epoch 2/2") == 1, out
    assert_equal(one, tmp_path)
    assert main(command(world, tmp_path, *TWO)) == 0
    assert "trained already" in capsys.readouterr().out


@pytest.mark.robust
def test_four_processes_are_one(one: Path, world: Path, tmp_path: Path):
    process = started("module", command(world, tmp_path, *FOUR))
    out, error = process.communicate(timeout=500)
    assert process.returncode == 0, error
    assert "on 4 cpu" in out and out.count("checkpoint: ") == 1, out
    assert_equal(one, tmp_path)


UNEVEN = """
from iecl_solo.errors import IECLError
from iecl_solo.train.callbacks.alike import Alike
result = ""
Alike({"data.train_path": 32}).on_train_start(None, None)
try:
    Alike({"data.train_path": 32, "batch": 8 + rank}).on_train_start(None, None)
except IECLError as error:
    result = str(error)
"""


@pytest.mark.any_host
def test_uneven_batches_are_one_line(tmp_path: Path):
    """What processes have is compared before the first step: gloo would abort in a later one."""
    for said in in_two_processes(UNEVEN, None, tmp_path):
        assert said == (
            "batch: the process of rank 0 has 8, that of rank 1 has 9; all of them need the same"
        )


def test_a_run_says_that_negatives_are_of_one_process(images: Path, tmp_path: Path):
    for method, devices in (("simclr", 2), ("iecl_simclr", 2), ("simclr", 1), ("byol", 2)):
        given = raw_config(method, images, devices=devices, checkpoint__dir=str(tmp_path))
        cfg = complete(OmegaConf.create(given), HOST)
        lines = _about(cfg, HOST, Run(cfg), images=24, at=(0, 0))
        apart = [line for line in lines if "compares with the images of its own process" in line]
        expected = HOST.name == "index" and "simclr" in method and devices == 2
        assert len(apart) == expected, lines
        assert not expected or apart[0].endswith("2 processes of 8 are not one of 16")


@pytest.mark.robust
@pytest.mark.any_host
def test_a_cell_of_a_benchmark_on_two_devices(world: Path, tmp_path: Path):
    raw = yaml.safe_load((world / "two.yaml").read_text())
    kept = ("backbone", "augmentations", "method_kwargs", "max_epochs", "precision", "accelerator")
    optimizer = {"name": "sgd", "kwargs": None, "lr": 0.1, "classifier_lr": 0.1}
    data = {"train_path": str(world / "images"), "val_path": str(world / "images")}
    benchmark = {
        "name": "tiny",
        "question": "Are two devices one?",
        "data": {"toy": {"config": "custom", "settings": {"data": {**data, "num_workers": 0}}}},
        "arms": {
            "one": {"method": "iecl_mocov2plus", "optimizer": {"batch_size": 32}, "devices": 1},
            "two": {
                "method": "iecl_mocov2plus",
                "optimizer": {"batch_size": 16},
                "devices": 2,
                "strategy": "ddp",
            },
        },
        "seeds": [0],
        "measures": ["knn_acc1"],
        "settings": {
            **{name: raw[name] for name in kept},
            "optimizer": optimizer,
            "scheduler": {"warmup_epochs": 1},
            "sync_batchnorm": True,
            "monitor": {"every_n_epochs": 0},
        },
        "evaluation": {"linear": {"max_epochs": 1, "augment": False}},
        "threads": 1,
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(benchmark))
    source = ["--config-path", str(tmp_path), "--config-name", "tiny", f"dir={tmp_path}/out"]
    process = started("module", ["benchmark", *source])
    out, error = process.communicate(timeout=400)
    assert process.returncode == 0, out + error
    assert "cell 2 of 2" in out
    cells = Store(tmp_path / "out" / STORE, create=False).cells().set_index("arm")
    assert (cells["status"] == "done").all()
    assert cells.loc["two", "config"]["devices"] == 2
    runs = {arm: next((tmp_path / "out/runs").glob(f"*/toy-{arm}-*")) for arm in cells.index}
    assert_equal(runs["one"], runs["two"])


def children(pid: int) -> list[int]:
    """Processes that a process started and that are no helper of multiprocessing's."""
    command = ["ps", "-ww", "-o", "pid=", "-o", "args=", "--ppid", str(pid)]
    listed = subprocess.run(command, capture_output=True)
    lines = [line.split(None, 1) for line in listed.stdout.decode().splitlines()]
    return [int(number) for number, args in lines if "spawn_main" in args]


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks into /proc")


@pytest.mark.robust
@pytest.mark.any_host
@needs_proc
@pytest.mark.counts("faults injected")
def test_a_rank_that_dies_ends_the_others_in_one_line(world: Path, tmp_path: Path):
    process = started("module", command(world, tmp_path, *TWO, "max_epochs=2000"))
    wait_for(lambda: list(tmp_path.rglob("*.ckpt")), 200)
    both = children(process.pid)
    assert len(both) == 2
    os.kill(both[1], signal.SIGKILL)
    start = time.monotonic()
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - start < 60
    assert process.returncode == 2
    assert error.splitlines()[-1] == "iecl-solo: the process of rank 1 was killed by SIGKILL"
    assert "Traceback" not in error
    assert not any(map(alive, both))


@pytest.mark.robust
@pytest.mark.any_host
@needs_proc
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.counts("faults injected")
def test_compare_takes_its_training_with_it(number: signal.Signals, world: Path, tmp_path: Path):
    arguments = command(world, tmp_path, "max_epochs=2000", f"compare.dir={tmp_path / 'out'}")
    arguments += [f"data.val_path={world / 'images'}", *ONE]
    process = started("module", ["compare", *arguments[1:]])
    wait_for(lambda: list(tmp_path.rglob("*.ckpt")), 200)
    (child,) = children(process.pid)
    process.send_signal(number)
    process.communicate(timeout=60)
    wait_for(lambda: not alive(child), 40)


@pytest.mark.robust
@pytest.mark.any_host
@pytest.mark.counts("faults injected")
def test_a_run_that_died_at_once_does_not_refuse_the_next(world: Path, tmp_path: Path):
    """Killed before its first checkpoint, with other settings than the next has."""
    process = started("module", command(world, tmp_path, *ONE, "max_epochs=2000"))
    wait_for(lambda: list(tmp_path.rglob("args.json")), 200)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    for checkpoint in tmp_path.rglob("*.ckpt"):
        checkpoint.unlink()  # in case that it came that far
    (args,) = tmp_path.rglob("args.json")
    assert json.loads(args.read_text())["max_epochs"] == 2000
    done = started("module", command(world, tmp_path, *ONE, "max_epochs=1"))
    _, error = done.communicate(timeout=200)
    assert done.returncode == 0, error


@pytest.mark.any_host
def test_a_child_sees_the_command_line_and_starts_workers_as_its_parent(tmp_path: Path):
    in_processes(note_command_line, str(tmp_path / "seen"))
    (line,) = (tmp_path / "seen").read_text().splitlines()
    # solo-learn's data sets cannot be pickled for workers that are spawned
    assert json.loads(line) == [None, sys.argv, multiprocessing.get_start_method()]
