"""``data.on_error: skip``: the same images are left out everywhere, and they are counted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from support import HOST, raw_config, same_tensors

from iecl_solo import decoded
from iecl_solo.errors import IECLError
from iecl_solo.evaluate.protocol import EvaluationConfig, LinearProtocol
from iecl_solo.evaluate.run import evaluate
from iecl_solo.order import seeded
from iecl_solo.solo.checkpoint import read_checkpoint
from iecl_solo.solo.data import evaluation_datasets, pretrain_loader
from iecl_solo.train.complete import complete
from iecl_solo.train.fit import pretrain
from iecl_solo.train.stop import Stopped

#: Of the 24: cut off, empty, and a text.
BROKEN = ("class0/3.png", "class1/0.png", "class2/7.png")


@pytest.fixture
def photos(images: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    shutil.copytree(images, folder)
    whole = (folder / BROKEN[0]).read_bytes()
    for name, content in zip(BROKEN, (whole[: len(whole) // 2], b"", b"no image"), strict=True):
        (folder / name).write_bytes(content)
    return folder


def _cfg(method: str, photos: Path, **given: Any) -> Any:
    given = {"data__on_error": "skip", "optimizer__batch_size": 7, **given}
    given.setdefault("checkpoint__dir", str(photos.parent / "runs"))
    return OmegaConf.create(raw_config(method, photos, monitor__every_n_epochs=0, **given))


def _seen(method: str, photos: Path, **given: Any) -> tuple[list[int], list[int]]:
    """Indices and labels of an epoch, in the order of its batches."""
    cfg = complete(_cfg(method, photos, **given), HOST)
    loader, order = seeded(pretrain_loader(cfg, HOST), 5)
    order.resume(1, 0)
    batches = [(index, labels) for index, _, labels in loader]
    index, labels = (torch.cat(parts).tolist() for parts in zip(*batches, strict=True))
    return index, labels


def test_both_ways_and_both_methods_see_the_same_images(
    photos: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    index, labels = _seen("simclr", photos)
    said = capsys.readouterr().out
    assert "3 of 24 images do not decode and are skipped, the first is class0/3.png" in said
    assert sorted(index) == list(range(21)) and sorted(labels) == [0] * 7 + [1] * 7 + [2] * 7
    assert [label for _, label in sorted(zip(index, labels, strict=True))] == sorted(labels)
    # what was found is known from now on
    monkeypatch.setattr(decoded, "_Broken", pytest.fail)
    assert _seen("iecl_simclr", photos, data__num_workers=1) == (index, labels)
    assert _seen("simclr", photos, data__views="batched") == (index, labels)
    assert capsys.readouterr().out.count("3 of 24 images") == 2


def test_images_without_labels(photos: Path, capsys: pytest.CaptureFixture):
    for views in ("per_image", "batched"):
        index, _ = _seen("simclr", photos, data__no_labels=True, data__views=views)
        assert sorted(index) == list(range(21))
        assert "3 of 24 images do not decode" in capsys.readouterr().out


def test_a_file_that_was_mended_is_seen(photos: Path, images: Path):
    assert len(_seen("simclr", photos, optimizer__batch_size=2)[0]) == 20
    for name in BROKEN:
        shutil.copy(images / name, photos / name)
    assert len(_seen("simclr", photos, optimizer__batch_size=2)[0]) == 24


def test_without_it_the_file_is_named(photos: Path):
    with pytest.raises(IECLError, match=r"\.png: it does not decode"):
        pretrain(_cfg("simclr", photos, data__on_error="raise"))


def test_too_few_that_decode(photos: Path):
    with pytest.raises(IECLError, match="batch_size: 22 is more than the 21 images that decode"):
        pretrain(_cfg("simclr", photos, optimizer__batch_size=22))
    for file in photos.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(IECLError, match="none of its 24 images decodes"):
        pretrain(_cfg("simclr", photos))


@pytest.mark.robust
def test_a_run_is_stopped_resumed_and_evaluated(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Bit for bit what it is without the stop; its evaluation leaves out the same images."""
    given = {"max_epochs": 2, "data__val_path": str(photos)}
    whole = pretrain(_cfg("simclr", photos, **given))
    to = {"checkpoint__dir": str(tmp_path / "cut"), "checkpoint__every_n_steps": 1}
    from iecl_solo.train.callbacks.finite import Finite

    taken = Finite.on_train_batch_end

    def stop(self: Any, trainer: Any, *args: Any) -> None:
        taken(self, trainer, *args)
        if trainer.global_step == 5:
            raise Stopped(15, "stopped")

    with monkeypatch.context() as patched:
        patched.setattr(Finite, "on_train_batch_end", stop)
        with pytest.raises(Stopped):
            pretrain(_cfg("simclr", photos, **given, **to))
    again = pretrain(_cfg("simclr", photos, **given, **to))
    a, b = (read_checkpoint(run.checkpoint)["state_dict"] for run in (whole, again))
    assert same_tensors(a, b) == []
    found = evaluate(whole, EvaluationConfig(linear=LinearProtocol(max_epochs=0)))
    assert torch.tensor(found["knn_acc1"]).isfinite()


@pytest.mark.counts("bad inputs tried")
@pytest.mark.parametrize("views", ["per_image", "batched"])
def test_a_loop_of_links_counts_each_image_once(views: str, images: Path, tmp_path: Path):
    """torchvision follows it forty times, and calls all classes by the one with the link."""
    folder = tmp_path / "photos"
    shutil.copytree(images, folder)
    (folder / "class1" / "back").symlink_to(folder, target_is_directory=True)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(images / "class2/0.png", tmp_path / "elsewhere/more.png")
    (folder / "class2" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    # and the folder itself may be given by a link, or lie behind a loop
    (tmp_path / "here").symlink_to(tmp_path, target_is_directory=True)
    for root in (folder, tmp_path / "here" / "photos"):
        given = {"data__on_error": None, "data__views": views, "optimizer__batch_size": 5}
        cfg = complete(_cfg("simclr", root, data__no_labels=False, **given), HOST)
        loader = pretrain_loader(cfg, HOST)
        labels = torch.cat([labels for _, _, labels in loader]).tolist()
        assert len(loader.dataset if views == "per_image" else loader.images) == 25
        assert len(labels) == 25 and labels.count(0) == labels.count(1) == 8
    data = {"dataset": "custom", "train_path": str(folder), "val_path": str(folder)}
    for found in evaluation_datasets(HOST, data, image_size=32):
        assert len(found) == 25
