"""``data.views: batched``: the host's pipelines applied to batches, and images decoded once."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from support import HOST, config, image_folder, pipeline, raw_config
from torch import Tensor, distributed
from torchvision import transforms

from iecl_solo.errors import IECLError
from iecl_solo.order import seeded
from iecl_solo.saib import SAIB, save_saib
from iecl_solo.solo.batched import BatchedLoader, batched, keeps_shape
from iecl_solo.solo.data import pretrain_loader
from iecl_solo.train.fit import pretrain


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "train")


def loader(images: Path, **overrides: Any) -> BatchedLoader:
    made = pretrain_loader(config("simclr", images, data__views="batched", **overrides), HOST)
    assert isinstance(made, BatchedLoader)
    return made


def same(a: list[Any], b: list[Any]) -> bool:
    tensors = [(a[0], b[0]), *zip(a[1], b[1], strict=True), (a[2], b[2])]
    return all(torch.equal(x, y) for x, y in tensors)


def test_batches_have_the_hosts_format(images: Path):
    crops = [pipeline(), pipeline(num_crops=3, crop_size=16)]
    ours = next(iter(loader(images, augmentations=crops)))
    theirs = next(iter(pretrain_loader(config("simclr", images, augmentations=crops), HOST)))
    assert [v.shape for v in ours[1]] == [v.shape for v in theirs[1]]
    for mine, its in ((ours[0], theirs[0]), (ours[1][0], theirs[1][0]), (ours[2], theirs[2])):
        assert mine.dtype == its.dtype and mine.shape == its.shape
    # the label is that of the image at the index: class0 holds the first eight
    assert torch.equal(ours[2], ours[0] // 8)


def test_views_are_the_hosts_where_nothing_is_random(images: Path):
    # the whole image, never flipped, a fixed brightness, always grey, blurred and solarised
    fixed = pipeline(
        num_crops=1,
        rrc={"enabled": True, "crop_min_scale": 1.0, "crop_max_scale": 1.0},
        horizontal_flip={"prob": 0.0},
        grayscale={"prob": 1.0},
        solarization={"prob": 1.0},
    )
    for size in (32, 20):
        cfg = config(
            "simclr",
            images,
            augmentations=[{**fixed, "crop_size": size, "num_crops": 2}],
            optimizer__batch_size=24,
        )
        views = {}
        for kind in ("per_image", "batched"):
            cfg.data.views = kind
            index, (view, _), _ = next(iter(pretrain_loader(cfg, HOST)))
            views[kind] = view[index.argsort()]
        # two levels of 255, in units of the smallest standard deviation
        assert (views["per_image"] - views["batched"]).abs().max() < 2 / 255 / 0.22


def test_the_hosts_pipelines_are_read_whole(images: Path, tmp_path: Path):
    file = tmp_path / "saib.safetensors"
    save_saib(SAIB(32), file)
    jitter = {"prob": 0.8, "brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.1}
    entry = pipeline(
        color_jitter=jitter,
        grayscale={"prob": 0.2},
        gaussian_blur={"prob": 0.5},
        solarization={"prob": 0.1},
        horizontal_flip={"prob": 0.4},
        mean=[0.1, 0.2, 0.3],
        std=[0.4, 0.5, 0.6],
        saib={"file": str(file), "prob": 0.7},
    )
    (read,) = loader(images, augmentations=[entry]).pipelines
    assert read.crop.scale == (0.2, 1.0) and read.crop.flip == 0.4 and read.copies == 2
    names = [type(o).__name__ for o in read.operations]
    assert names == ["ColorJitter", "Grayscale", "GaussianBlur", "Solarize"]
    assert [o.prob for o in read.operations] == [0.8, 0.2, 0.5, 0.1]
    colour = read.operations[0]
    np.testing.assert_allclose(colour.contrast, (0.7, 1.3))  # type: ignore[attr-defined]
    assert colour.hue == (-0.1, 0.1)  # type: ignore[attr-defined]
    assert read.mean == (0.1, 0.2, 0.3) and read.std == (0.4, 0.5, 0.6)
    assert [o.prob for o in read.after] == [0.7]
    assert all(v.isfinite().all() for v in next(iter(loader(images, augmentations=[entry])))[1])


@pytest.mark.skipif(HOST.name != "main", reason="1.0.2 always crops and cannot equalise")
def test_what_only_main_has(images: Path):
    entry = pipeline(
        rrc={"enabled": False, "crop_min_scale": 1.0, "crop_max_scale": 1.0},
        equalization={"prob": 1.0},
        horizontal_flip={"prob": 0.0},
    )
    ours = next(iter(loader(images, augmentations=[entry], optimizer__batch_size=24)))
    theirs = next(
        iter(
            pretrain_loader(
                config("simclr", images, augmentations=[entry], optimizer__batch_size=24), HOST
            )
        )
    )
    mine, its = ours[1][0][ours[0].argsort()], theirs[1][0][theirs[0].argsort()]
    torch.testing.assert_close(mine, its, atol=1e-4, rtol=1e-4)


def test_a_transform_without_a_batched_form_is_refused():
    with pytest.raises(IECLError, match=r"RandomRotation has no batched form; per_image knows it"):
        batched(transforms.Compose([transforms.RandomRotation(5)]))


def test_an_unknown_kind_of_views_is_refused(images: Path):
    with pytest.raises(IECLError, match=r"data\.views: .*did you mean 'batched'"):
        config("simclr", images, data__views="batch")


# ---- reproducible


def test_a_batch_depends_on_seed_epoch_and_number_alone(images: Path):
    first = loader(images)
    torch.manual_seed(1)
    whole = list(first)
    assert len(whole) == len(first) == 3
    torch.manual_seed(2)
    again = list(loader(images))
    assert all(same(a, b) for a, b in zip(whole, again, strict=True))
    # begun in the middle: the rest is the same, bit for bit
    late = loader(images)
    late.sampler.resume(0, 2)
    (rest,) = list(late)
    assert len(late) == 3 and same(rest, whole[2])
    late.sampler.set_epoch(1)
    assert len(list(late)) == 3  # the next epoch is whole
    # another epoch and another seed give other images in another order
    first.sampler.set_epoch(1)
    assert not same(next(iter(first)), whole[0])
    assert not same(next(iter(loader(images, seed=7))), whole[0])


def test_workers_change_nothing(images: Path):
    none, two = loader(images), loader(images, data__num_workers=2)
    assert all(same(a, b) for a, b in zip(none, two, strict=True))


def test_a_baseline_and_its_variant_see_the_same_views(images: Path):
    cfgs = [config(m, images, data__views="batched") for m in ("simclr", "iecl_simclr")]
    ours, theirs = (list(pretrain_loader(cfg, HOST)) for cfg in cfgs)
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


def test_processes_share_an_epoch(images: Path, monkeypatch: pytest.MonkeyPatch):
    parts = []
    for rank in range(2):
        made = loader(images, optimizer__batch_size=4)
        monkeypatch.setattr(distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        parts.append(list(made))
        assert len(made) == len(parts[-1]) == 3
        monkeypatch.undo()
    seen = torch.cat([batch[0] for part in parts for batch in part])
    assert sorted(seen.tolist()) == list(range(24))
    # an epoch's images in the order of one process with a batch of both
    (first, *_), (second, *_) = parts
    assert torch.equal(
        torch.stack((first[0], second[0]), 1).flatten(), next(iter(loader(images)))[0]
    )
    # the processes draw apart: a view's parameters are not those of its neighbour in the other
    assert not torch.equal(first[1][0], second[1][0])


def test_images_come_in_the_order_of_the_per_image_pipeline(images: Path):
    cfg = config("simclr", images)
    theirs, _ = seeded(pretrain_loader(cfg, HOST), cfg.seed)
    ours, _ = seeded(loader(images), cfg.seed)
    assert [b[0].tolist() for b in ours] == [b[0].tolist() for b in theirs]


# ---- decoded once


def decoded_files(images: Path) -> list[Path]:
    return sorted(images.parent.glob(f".{images.name}.views*.npy"))


def test_images_are_decoded_once_until_the_folder_changes(images: Path, capfd: Any):
    loader(images)
    (file,) = decoded_files(images)
    assert "decoding 24 images" in capfd.readouterr().err
    written = file.stat().st_mtime_ns
    made = loader(images)
    assert "decoding" not in capfd.readouterr().err
    assert file.stat().st_mtime_ns == written
    expected = np.asarray(Image.open(images / "class0" / "3.png")).transpose(2, 0, 1)
    np.testing.assert_array_equal(made.images.images[3], expected)
    # an image is painted over: same name, same size on the disk or not
    Image.new("RGB", (32, 32), (9, 9, 9)).save(images / "class0" / "3.png")
    after = loader(images)
    assert "decoding 24 images" in capfd.readouterr().err
    assert (after.images.images[3] == 9).all()
    assert len(decoded_files(images)) == 1  # the old one is gone
    (images / "class1" / "0.png").unlink()
    assert len(loader(images).images) == 23
    assert len(made.images) == 24  # and what had it mapped keeps it


def test_what_is_made_of_one_folder_is_kept_apart(images: Path, capfd: Any):
    """With labels, without, and a part of it: none takes another's file, or removes it."""
    assert set(loader(images).images.labels) == {0, 1, 2}
    assert set(loader(images, data__no_labels=True).images.labels) == {0}
    part = {"data__fraction": 0.5} if HOST.name == "main" else {"data__no_labels": True}
    loader(images, **part)
    capfd.readouterr()
    assert set(loader(images).images.labels) == {0, 1, 2}
    loader(images, **part)
    assert "decoding" not in capfd.readouterr().err


def test_a_name_that_is_no_text_and_a_link_to_nothing(images: Path):
    os.rename(images / "class0/3.png", os.fsencode(images / "class0") + b"/caf\xe9.png")
    assert len(loader(images).images) == 24
    (images / "class0/gone.png").symlink_to("nowhere.png")
    with pytest.raises(IECLError, match=r"gone\.png"):
        loader(images)
    assert len(loader(images, data__on_error="skip").images) == 24


def test_without_a_crop_only_square_images_are_batched(tmp_path: Path):
    folder = image_folder(tmp_path / "train")
    for file in folder.rglob("*.png"):
        Image.new("RGB", (48, 32)).save(file)
    crop = transforms.Compose([transforms.Resize(32, transforms.InterpolationMode.BICUBIC)])
    assert keeps_shape(crop) and not keeps_shape(transforms.Compose([transforms.ToTensor()]))
    if HOST.name == "main":  # the other has no such key
        cfg = config("simclr", folder, data__views="batched")
        for pipeline_of in cfg.augmentations:
            pipeline_of.rrc.enabled = False
        with pytest.raises(IECLError, match="are not square; per_image keeps"):
            pretrain_loader(cfg, HOST)


def test_images_of_several_sizes_keep_their_own(tmp_path: Path):
    folder = image_folder(tmp_path / "train")
    Image.new("RGB", (100, 50), (1, 2, 3)).save(folder / "class0" / "7.png")
    made = loader(folder)
    assert made.images.images.shape == (24, 3, 37, 37)  # 8/7 of a view of 32
    assert made.images.sizes[7].tolist() == [50, 100]
    assert [tuple(v.shape) for v in next(iter(made))[1]] == [(8, 3, 32, 32)] * 2


def test_an_image_that_does_not_decode_is_one_line(images: Path):
    (images / "class1" / "2.png").write_bytes(b"no image")
    for workers in (0, 2):
        with pytest.raises(IECLError, match=r"2\.png: it does not decode") as error:
            loader(images, data__num_workers=workers)
        assert "\n" not in str(error.value)
    assert not list(images.parent.glob(".train.views*.npy*"))


def test_without_labels(tmp_path: Path):
    folder = image_folder(tmp_path / "train", classes=1, images=16) / "class0"
    _, views, labels = next(iter(loader(folder, data__no_labels=True)))
    assert (labels == 0).all() and views[0].shape == (8, 3, 32, 32)


def _decode(folder: str, ready: Any, out: Any) -> None:
    ready.wait()
    made = loader(Path(folder))
    out.put(int(made.images.images.sum(dtype=np.int64)))


def test_processes_that_start_together_decode_once(tmp_path: Path, capfd: Any):
    folder = image_folder(tmp_path / "train", images=40)
    context = multiprocessing.get_context("fork")
    ready, out = context.Event(), context.Queue()
    processes = [context.Process(target=_decode, args=(str(folder), ready, out)) for _ in range(4)]
    for process in processes:
        process.start()
    time.sleep(0.1)
    ready.set()
    sums = {out.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(sums) == 1 and len(decoded_files(folder)) == 1
    assert capfd.readouterr().err.count("decoding") == 1


def test_a_folder_that_may_not_be_written_is_decoded_elsewhere(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, cfg = os.access, config("simclr", images, data__views="batched")
    monkeypatch.setattr(
        os, "access", lambda p, mode: False if Path(p) == images.parent else real(p, mode)
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pretrain_loader(cfg, HOST)
    assert not decoded_files(images)
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 1


# ---- training


@pytest.mark.parametrize("method", ["simclr", "iecl_byol"])
def test_trains_end_to_end_and_twice_alike(method: str, images: Path, tmp_path: Path):
    weights: list[dict[str, Tensor]] = []
    for name in ("a", "b"):
        raw = raw_config(
            method, images, data__views="batched", checkpoint__dir=str(tmp_path / name)
        )
        run = pretrain(OmegaConf.create(raw))
        assert run.result is not None
        weights.append(torch.load(run.checkpoint, weights_only=False)["state_dict"])
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key
