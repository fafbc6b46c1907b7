"""Checkpoints that cannot be lost: full disks, kills in mid-write, damaged bytes."""

from __future__ import annotations

import multiprocessing
import random
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Count
from omegaconf import OmegaConf
from support import HOST, raw_config, same_tensors

from iecl_solo.cli.main import main
from iecl_solo.errors import CannotWrite, IECLError
from iecl_solo.evaluate.load import read_pretrained
from iecl_solo.files import read_json, write_json
from iecl_solo.solo.checkpoint import read_checkpoint
from iecl_solo.train.fit import pretrain
from iecl_solo.train.keep import KeptCheckpoints, older, read_newest, write_checkpoint
from iecl_solo.train.run import Run

pytestmark = pytest.mark.any_host


def _cfg(images: Path, to: Path, **overrides: Any) -> Any:
    given = {"checkpoint__dir": str(to), "max_epochs": 3, "monitor__every_n_epochs": 0}
    return OmegaConf.create(raw_config("iecl_simclr", images, **(given | overrides)))


def _checkpoint(n: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(n)
    state = {f"layer{i}.weight": torch.randn(40, 40, generator=generator) for i in range(4)}
    return {"state_dict": state, "epoch": n, "names": ["a", 2.5, None]}


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return (
        a.keys() == b.keys()
        and a["state_dict"].keys() == b["state_dict"].keys()
        and same_tensors(a["state_dict"], b["state_dict"]) == []
        and {k: v for k, v in a.items() if k != "state_dict"}
        == {k: v for k, v in b.items() if k != "state_dict"}
    )


@pytest.mark.parametrize("name", ["run.ckpt", "lr[0.1].ckpt"])
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_so_many_are_kept_newest_first(keep: int, name: str, tmp_path: Path):
    path = tmp_path / name
    for n in range(5):
        write_checkpoint(_checkpoint(n), path, keep)
        there = [path, *older(path)]
        assert [read_checkpoint(p)["epoch"] for p in there] == list(range(n, max(-1, n - keep), -1))
    # main_knn.py takes any file that ends in .ckpt
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".ckpt")] == [name]
    assert len(list(tmp_path.iterdir())) == keep
    write_checkpoint(_checkpoint(5), path, 1)  # fewer than before
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_no_damage_is_read_as_something_else(tmp_path: Path, count: Count):
    """Flipped bits, cut files, 200 random bytes: refused in one line, or nothing was changed."""
    path, given = tmp_path / "run.ckpt", _checkpoint(0)
    write_checkpoint(given, path, 1)
    whole, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        place = rng.randrange(len(whole))
        kind = rng.choice(["flip", "cut", "noise"])
        if kind == "flip":
            damaged[place] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del damaged[place:]
        else:
            damaged[place : place + 200] = rng.randbytes(len(damaged[place : place + 200]))
        path.write_bytes(damaged)
        try:
            assert _same(read_checkpoint(path), given)
        except IECLError as error:
            assert "\n" not in str(error) and "weights_only" not in str(error)
            refused += 1
    assert refused > 280
    count("faults injected", 300)


class _Stranger:
    pass


def test_advice_to_let_a_file_run_code_is_not_passed_on(tmp_path: Path):
    torch.save({"state_dict": {}, "more": _Stranger()}, tmp_path / "a.ckpt")
    with pytest.raises(IECLError, match="only tensors and plain values") as refused:
        read_checkpoint(tmp_path / "a.ckpt")
    assert "weights_only" not in str(refused.value) and "_Stranger" in str(refused.value)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", None])
@pytest.mark.counts("faults injected")
def test_damaged_newest_falls_back_to_the_one_before(
    damage: bytes | None, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    whole = pretrain(_cfg(images, tmp_path / "whole"))
    run = pretrain(_cfg(images, tmp_path / "cut"))
    (run.folder / "result.json").unlink()
    content = bytearray(run.checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    run.checkpoint.write_bytes(content if damage is None else damage)
    with pytest.raises(IECLError, match="cannot be read"):
        read_pretrained(run.folder)  # to evaluate another epoch than was asked for would be wrong
    capsys.readouterr()
    again = pretrain(_cfg(images, tmp_path / "cut"))
    said = capsys.readouterr().out.splitlines()
    (line,) = [line for line in said if "cannot be read" in line]
    assert line.endswith("going on from iecl_simclr.ckpt.1")
    a, b = (read_checkpoint(r.checkpoint) for r in (whole, again))
    assert same_tensors(a["state_dict"], b["state_dict"]) == []
    assert read_newest(again.checkpoint) is not None


@pytest.mark.parametrize("key", ["loops", "optimizer_states", "state_dict", "callbacks"])
@pytest.mark.counts("faults injected")
def test_missing_key_is_one_line(key: str, images: Path, tmp_path: Path):
    run = pretrain(_cfg(images, tmp_path, max_epochs=1, checkpoint__keep=1))
    (run.folder / "result.json").unlink()
    checkpoint = torch.load(run.checkpoint, weights_only=True)
    del checkpoint[key]
    torch.save(checkpoint, run.checkpoint)
    with pytest.raises(IECLError, match=f"it holds no '{key}'"):
        pretrain(_cfg(images, tmp_path, max_epochs=1, checkpoint__keep=1))


@pytest.mark.counts("faults injected")
def test_missing_tensor_is_one_line(images: Path, tmp_path: Path):
    run = pretrain(_cfg(images, tmp_path, max_epochs=1))
    (run.folder / "result.json").unlink()
    checkpoint = torch.load(run.checkpoint, weights_only=True)
    del checkpoint["state_dict"]["projector.0.weight"]
    torch.save(checkpoint, run.checkpoint)
    with pytest.raises(IECLError, match=r"misses 1 tensors, the first is projector\.0\.weight"):
        pretrain(_cfg(images, tmp_path, max_epochs=1))


# --- full disks --------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def _fill(disk: Path, leave: int) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
        file.truncate(max(0, file.tell() - leave))


def _after_the_first_save(monkeypatch: pytest.MonkeyPatch, do: Callable[[], None]) -> None:
    save = KeptCheckpoints.save_checkpoint

    def save_and_do(*given: Any, **more: Any) -> None:
        save(*given, **more)
        do()

    monkeypatch.setattr(KeptCheckpoints, "save_checkpoint", save_and_do)


@pytest.mark.parametrize("leave", [0, 50_000], ids=["logs", "checkpoint"])
@pytest.mark.counts("faults injected")
def test_full_disk_is_one_line_and_the_same_command_goes_on(
    leave: int, small_disk: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without a byte left the CSV's row is the first to fail, with a few the checkpoint is."""
    whole = pretrain(_cfg(images, tmp_path / "whole"))
    with monkeypatch.context() as patched:
        _after_the_first_save(patched, lambda: _fill(small_disk, leave))
        with pytest.raises(IECLError, match="No space left on device") as refused:
            pretrain(_cfg(images, small_disk))
    run = small_disk / "iecl_simclr/iecl_simclr"
    said = str(refused.value)
    assert "\n" not in said and f"Kept: {run / 'iecl_simclr.ckpt'}" in said
    assert said.endswith("The same command goes on when there is room")
    assert not list(small_disk.rglob("*.part"))
    assert read_checkpoint(run / "iecl_simclr.ckpt")["epoch"] == 0
    (small_disk / "filler").unlink()
    again = pretrain(_cfg(images, small_disk))
    a, b = (read_checkpoint(r.checkpoint) for r in (whole, again))
    assert same_tensors(a["state_dict"], b["state_dict"]) == []


@pytest.mark.counts("faults injected")
def test_full_disk_at_the_result(
    small_disk: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    finish = Run.finish
    with monkeypatch.context() as patched:

        def full(run: Run, result: Any) -> None:
            _fill(small_disk, 0)
            finish(run, result)

        patched.setattr(Run, "finish", full)
        config = small_disk.parent / "a.yaml"
        config.write_text(OmegaConf.to_yaml(_cfg(images, small_disk, max_epochs=1)))
        command = ["pretrain", "--config-path", str(config.parent), "--config-name", "a"]
        assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "result.json: it cannot be written (No space left on device). Kept: " in line
    assert not list(small_disk.rglob("result.json*"))
    (small_disk / "filler").unlink()
    assert main(command) == 0
    assert list(small_disk.rglob("result.json"))


@pytest.mark.counts("faults injected")
def test_limit_on_a_files_size(tmp_path: Path):
    """What a quota does, without the right to mount: the file before stays, no other is left."""
    path = tmp_path / "run.ckpt"
    write_checkpoint(_checkpoint(0), path, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(CannotWrite, match=r"it cannot be written \(File too large\)"):
            write_checkpoint(_checkpoint(1), path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["run.ckpt"]
    assert _same(read_checkpoint(path), _checkpoint(0))


# --- kills -------------------------------------------------------------------------------------


def _write_on_and_on(path: Path, written: Any) -> None:
    n = 0
    while True:
        n += 1
        tensor = torch.full((600, 600), float(n))
        write_checkpoint({"state_dict": {"w": tensor}, "epoch": n}, path, 2)
        written.set()


def test_kill_in_mid_write_loses_nothing(tmp_path: Path, count: Count):
    """Thirty kills at random moments of a process that writes without a pause."""
    rng, forked = random.Random(1), multiprocessing.get_context("fork")
    cut = 0
    for kill in range(30):
        path = tmp_path / str(kill) / "run.ckpt"
        path.parent.mkdir()
        written = forked.Event()
        writer = forked.Process(target=_write_on_and_on, args=(path, written))
        writer.start()
        assert written.wait(60)
        time.sleep(rng.uniform(0.0, 0.1))
        writer.kill()
        writer.join()
        cut += any(path.parent.glob("*.part"))
        found = read_newest(path)
        assert found is not None
        w, n = found[1]["state_dict"]["w"], found[1]["epoch"]
        assert torch.equal(w, torch.full((600, 600), float(n)))
        assert not list(path.parent.glob("*.damaged"))  # the newest was whole, if not in place
    assert cut > 3  # some did hit a write
    count("faults injected", 30)


# --- numbers that are not ----------------------------------------------------------------------


def test_json_has_no_nan(tmp_path: Path):
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": [1.0, float("inf")], "c": {"d": 2.0}})
    assert "NaN" not in (tmp_path / "a.json").read_text()
    assert read_json(tmp_path / "a.json") == {"a": None, "b": [1.0, None], "c": {"d": 2.0}}


@pytest.mark.counts("faults injected")
def test_model_that_is_not_finite_is_not_read(images: Path, tmp_path: Path):
    run = pretrain(_cfg(images, tmp_path, max_epochs=1))
    checkpoint = torch.load(run.checkpoint, weights_only=True)
    name = next(k for k in checkpoint["state_dict"] if k.startswith(f"{HOST.online}."))
    weight = checkpoint["state_dict"][name]
    weight[(0,) * weight.dim()] = float("nan")
    torch.save(checkpoint, run.checkpoint)
    for command in ("inspect", "export"):
        to = [] if command == "inspect" else ["--to", str(tmp_path / "out.safetensors")]
        assert main([command, str(run.folder), *to]) == 2
