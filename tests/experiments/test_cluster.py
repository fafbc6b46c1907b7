"""Clusters, real ones on this machine: a SLURM and a Ray of two nodes, torchrun on two.

What is killed comes back with the weights of the run that nobody touched, bit for bit.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import support_slurm
import yaml
from support import HOST, image_folder, pipeline, raw_config, wait_for
from support_slurm import Slurm, processes

from iecl_solo.cli.main import main
from iecl_solo.experiments.store import STORE, Store
from iecl_solo.solo.checkpoint import read_checkpoint

ROOT = Path(__file__).parents[2]
REASON = support_slurm.missing()
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
needs_slurm = pytest.mark.skipif(REASON is not None, reason=str(REASON))
BESIDE = Path(sys.executable).parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(HOST.path.parent)]),
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "PYTHONUNBUFFERED": "1",
    # of this cluster alone: its nodes and its driver must have the same one
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}


def settings(images: Path) -> dict[str, Any]:
    """What every run of this file is given: 12 steps an epoch, of milliseconds."""
    raw = raw_config("simclr", images, max_epochs=8)
    raw["augmentations"] = [pipeline()]
    kept = ("backbone", "method_kwargs", "optimizer", "scheduler", "augmentations", "max_epochs")
    data = {**raw["data"], "image_size": 32, "val_path": str(images)}
    return {
        **{name: raw[name] for name in kept},
        **{"data": data, "accelerator": "cpu", "devices": 1, "precision": "32-true"},
        "monitor": {"every_n_epochs": 0},
    }


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with support_slurm.running(tmp_path_factory.mktemp("slurm")) as cluster:
        cluster.environment |= {k: ENVIRONMENT[k] for k in ENVIRONMENT if k != "PATH"}
        yield cluster


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two benchmarks' YAMLs, a run's, and 96 images."""
    root = tmp_path_factory.mktemp("world")
    given = settings(image_folder(root / "images", images=32))
    benchmark = {
        "name": "tiny",
        "question": "Does it come back?",
        "data": {"toy": {"config": "custom"}},
        "arms": {name: {"method": name} for name in ("simclr", "iecl_simclr")},
        "seeds": [0],
        "measures": ["knn_acc1"],
        "settings": given,
        "evaluation": {"linear": {"max_epochs": 1, "augment": False}},
        "threads": 1,
    }
    (root / "tiny.yaml").write_text(yaml.safe_dump(benchmark, sort_keys=False))
    run = {**given, "name": "ddp", "method": "iecl_simclr", "strategy": "ddp"}
    run |= {"data": {**given["data"], "val_path": None}, "sync_batchnorm": False}
    run["checkpoint"] = {"enabled": True, "dir": "runs", "frequency": 1}
    (root / "run.yaml").write_text(yaml.safe_dump(run))
    return root


def typed(world: Path, name: str, *overrides: str) -> list[str]:
    command = "pretrain" if name == "run" else "benchmark"
    return [command, "--config-path", str(world), "--config-name", name, *overrides]


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each run's weights, buffers and all, by method."""
    found = {}
    for file in sorted(folder.rglob("*.ckpt")):
        digest = hashlib.sha256()
        for name, tensor in sorted(read_checkpoint(file)["state_dict"].items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        found[file.parent.parent.name] = digest.hexdigest()[:16]
    return found


@pytest.fixture(scope="module")
def straight(world: Path) -> Path:
    """Both cells, run here without a break."""
    assert main(typed(world, "tiny", f"dir={world}/straight")) == 0
    return world / "straight"


def assert_same(a: Path, b: Path) -> None:
    """The same weights, measures and curves."""
    print("weights", hashes(a), hashes(b))
    assert hashes(a) == hashes(b)
    stores = [Store(folder / STORE, create=False) for folder in (a, b)]
    one, two = (s.curves().sort_values(["cell", "name", "epoch"]) for s in stores)
    assert len(one) > 20
    # the loss of the epoch that was broken is a mean that was taken up again
    assert one.drop(columns="value").values.tolist() == two.drop(columns="value").values.tolist()
    assert one["value"].tolist() == pytest.approx(two["value"].tolist(), rel=1e-6)


_STARTED: list[subprocess.Popen[bytes]] = []


def started(
    arguments: list[str], to: Path, environment: dict[str, str] = ENVIRONMENT
) -> subprocess.Popen[bytes]:
    """A command, under way; all that it says is in ``<to>.log``."""
    with Path(f"{to}.log").open("w") as log:
        process = subprocess.Popen(arguments, env=environment, stdout=log, stderr=subprocess.STDOUT)
    _STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def _none_is_left() -> Iterator[None]:
    yield
    for process in _STARTED:
        if process.poll() is None:
            process.kill()
            process.wait()


def benchmark(slurm: Slurm, world: Path, to: Path, *overrides: str) -> subprocess.Popen[bytes]:
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=main"]
    launcher += ["hydra.launcher.cpus_per_task=2", "hydra.launcher.mem_gb=2"]
    arguments = typed(world, "tiny", f"dir={to}", *launcher, *overrides)
    return started([sys.executable, "-m", "iecl_solo", *arguments], to, slurm.environment)


def end_of(process: subprocess.Popen[bytes], to: Path) -> str:
    """What a command said, once it has ended well."""
    assert process.wait(timeout=600) == 0, Path(f"{to}.log").read_text()
    return Path(f"{to}.log").read_text()


def pause(variable: str, checkpoints: Path, pattern: str, what: str = "submitit.core") -> int:
    """Halt a job's training once it has saved; its process."""
    wait_for(lambda: list(checkpoints.glob(pattern)))
    (pid,) = processes(what, f"{variable}\0", f"{sys.executable} ")
    os.kill(pid, signal.SIGSTOP)
    return pid


def go_on_after(pid: int, number: signal.Signals, seconds: float) -> None:
    """Let a halted process go on once a signal waits for it; SLURM may do so itself."""

    def told() -> bool:
        try:
            status = dict(
                line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            )
        except OSError:
            return True
        return bool(int(status["ShdPnd"], 16) & 1 << (number - 1)) or "T" not in status["State"]

    wait_for(told, seconds)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def more_time(slurm: Slurm, job: str) -> None:
    """Once a job is queued again: a slow machine may come to its time limit many times."""
    wait_for(lambda: slurm.job(job)["Restarts"] != "0")
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=30")


@needs_slurm
def test_a_notice_and_a_time_limit_give_the_cells_back(
    slurm: Slurm, world: Path, straight: Path, tmp_path: Path
):
    """Two cells, one job array: one is told by scancel, the other by its time limit."""
    to = tmp_path / "out"
    process = benchmark(
        slurm,
        world,
        to,
        "hydra.launcher.timeout_min=2",
        "+hydra.launcher.additional_parameters.signal=USR1@20",
    )
    pids = [
        pause(f"SLURM_ARRAY_TASK_ID={task}", to, f"runs/{method}/*/*.ckpt")
        for task, method in enumerate(("simclr", "iecl_simclr"))
    ]
    (array,) = {line.split("_")[0] for line in slurm("squeue", "-h", "-o", "%F_%K").split()}
    slurm("scancel", "--signal=USR1", f"{array}_0")
    go_on_after(pids[0], signal.SIGUSR1, 20)
    go_on_after(pids[1], signal.SIGUSR1, 200)
    more_time(slurm, f"{array}_1")
    end_of(process, to)
    for task in range(2):
        job = slurm.job(f"{array}_{task}")
        assert int(job["Restarts"]) >= 1 and job["JobState"] == "COMPLETED"
        logs = sorted(to.glob(f"hydra/.submitit/{array}_{task}/*_log.*"))
        said = "".join(log.read_text() for log in logs)
        assert f"job {array}_{task} goes back to its queue" in said
        assert "goes on at epoch" in said
    assert_same(straight, to)


@needs_slurm
def test_a_node_that_dies_loses_its_cells_alone(
    slurm: Slurm, world: Path, straight: Path, tmp_path: Path
):
    """And a second `benchmark` finishes them, from their last checkpoint."""
    to, limit = tmp_path / "out", "hydra.launcher.timeout_min=30"
    no = "+hydra.launcher.additional_parameters.no_requeue=true"
    process = benchmark(slurm, world, to, limit, no)
    pid = pause("SLURMD_NODENAME=n2", to, "runs/*/*/*.ckpt")
    lost = Path(f"/proc/{pid}/environ").read_text().split("SLURM_ARRAY_TASK_ID=")[1].split("\0")[0]
    (array,) = {line.split("_")[0] for line in slurm("squeue", "-h", "-o", "%F_%K").split()}
    slurm.kill_node("n2")
    other = f"{array}_{1 - int(lost)}"
    wait_for(lambda: slurm.job(other)["JobState"] == "COMPLETED", 200)
    wait_for(lambda: slurm.job(f"{array}_{lost}")["JobState"] == "NODE_FAIL", 200)
    process.send_signal(signal.SIGINT)  # without accounting submitit cannot know that it is gone
    process.wait(timeout=60)
    states = Store(to / STORE, create=False).cells()["status"]
    assert sorted(states) == ["done", "running"]
    out = end_of(benchmark(slurm, world, to, limit, no), to)
    assert "1 of 2 cells to run" in out
    assert_same(straight, to)
    slurm("slurmd", "-N", "n2")
    wait_for(lambda: slurm("sinfo", "-h", "-n", "n2", "-o", "%T").strip() == "idle", 60)


@pytest.fixture(scope="module")
def alone(world: Path) -> Path:
    """The run of two processes that one command starts."""
    to = world / "alone"
    arguments = typed(world, "run", f"checkpoint.dir={to}", "devices=2")
    end_of(started([sys.executable, "-m", "iecl_solo", *arguments], to), to)
    return to


@needs_slurm
@pytest.mark.parametrize("nodes", [1, 2])
def test_two_tasks_of_a_job_are_one_run(
    slurm: Slurm, world: Path, alone: Path, tmp_path: Path, nodes: int
):
    """On one node and on two; the first is told by its time limit, and goes on after it."""
    to, log = tmp_path / "runs", tmp_path / "log"
    size = [f"devices={2 // nodes}", f"num_nodes={nodes}"]
    line = [sys.executable, "-m", "iecl_solo", *typed(world, "run", f"checkpoint.dir={to}", *size)]
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\nexport MASTER_ADDR=127.0.0.1\nsrun {' '.join(line)}\n")
    given = [f"--nodes={nodes}", f"--ntasks-per-node={2 // nodes}", f"--output={log}"]
    # one of them comes to its time limit
    given += [f"--time={2 if nodes == 1 else 30}", "--signal=USR1@20", "--open-mode=append"]
    job = slurm("sbatch", "--parsable", *given, str(script)).strip()
    if nodes == 1:
        pid = pause("SLURM_PROCID=0", to, "*/*/*.ckpt", "-m iecl_solo")
        go_on_after(pid, signal.SIGUSR1, 200)
        more_time(slurm, job)
    ended = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
    wait_for(lambda: slurm.job(job)["JobState"] in ended, 300)
    assert slurm.job(job)["JobState"] == "COMPLETED", log.read_text()
    assert int(slurm.job(job)["Restarts"]) >= 2 - nodes, log.read_text()
    assert log.read_text().count("trained in") == 1
    print("weights", hashes(alone), hashes(to))
    assert hashes(alone) == hashes(to)


def test_torchrun_on_two_nodes_is_one_run(world: Path, alone: Path, tmp_path: Path):
    to = tmp_path / "runs"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [str(BESIDE / "torchrun"), "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    start += [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=1", "-m", "iecl_solo"]
    arguments = typed(world, "run", f"checkpoint.dir={to}", "devices=1", "num_nodes=2")
    nodes = [started([*start, *arguments], tmp_path / f"node{node}") for node in range(2)]
    said = [end_of(process, tmp_path / f"node{node}") for node, process in enumerate(nodes)]
    assert sum(text.count("trained in") for text in said) == 1
    print("weights", hashes(alone), hashes(to))
    assert hashes(alone) == hashes(to)


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Ray cluster of two nodes, a cell on each at a time."""
    folder = tmp_path_factory.mktemp("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    same = ["--block", "--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats"]
    command = [str(BESIDE / "ray"), "start", *same]
    head = ["--head", f"--port={port}", "--include-dashboard=false", "--node-ip-address=127.0.0.1"]
    head += [f"--temp-dir={tempfile.mkdtemp(prefix='ray')}"]  # sockets' paths must be short
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for node, given in enumerate((head, [f"--address=127.0.0.1:{port}"])):
            with (folder / f"node{node}.log").open("w") as log:
                nodes.append(
                    subprocess.Popen(
                        [*command, *given],
                        env=ENVIRONMENT,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
            wait_for(lambda n=node: "Ray runtime started" in (folder / f"node{n}.log").read_text())
        yield f"127.0.0.1:{port}"
    finally:
        for process in reversed(nodes):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)


def test_a_worker_of_ray_that_is_killed_is_run_again(
    ray: str, world: Path, straight: Path, tmp_path: Path
):
    to = tmp_path / "out"
    launcher = ["hydra/launcher=ray", f"++hydra.launcher.ray.init.address={ray}"]
    launcher += ["++hydra.launcher.ray.init.object_store_memory=null"]
    arguments = typed(world, "tiny", f"dir={to}", *launcher)
    process = started([sys.executable, "-m", "iecl_solo", *arguments], to)
    wait_for(lambda: list(to.glob("runs/simclr/*/*.ckpt")), 400)
    cells = Store(to / STORE, create=False).cells().set_index("arm")
    os.kill(int(cells.loc["simclr", "owner"].rpartition(":")[2]), signal.SIGKILL)
    said = end_of(process, to)
    assert "goes on at epoch" in said
    assert_same(straight, to)
