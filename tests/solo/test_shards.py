"""Images in tar shards and in saved Hugging Face data sets: each once an epoch, resumable."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_digits
from support import HOST, in_two_processes, raw_config, same_tensors, train_and_note

from iecl_solo.errors import IECLError
from iecl_solo.evaluate.protocol import EvaluationConfig
from iecl_solo.evaluate.run import evaluate
from iecl_solo.order import EpochOrder
from iecl_solo.solo.checkpoint import read_checkpoint
from iecl_solo.solo.data import pretrain_loader
from iecl_solo.solo.shards import ShardImages, open_shards
from iecl_solo.train.complete import complete
from iecl_solo.train.fit import pretrain
from iecl_solo.train.processes import in_processes, ranks
from iecl_solo.train.stop import Stopped

SHARDS, IMAGES = 20, 200


def digits(labelled: bool = True) -> list[tuple[Image.Image, int]]:
    data = load_digits()
    pixels = (data.images[:IMAGES] * 15).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    return [(Image.fromarray(p).convert("RGB"), int(y)) for p, y in zip(pixels, data.target)]  # noqa: B905


def write_webdataset(folder: Path, items: Sequence[tuple[Image.Image, int | None]]) -> str:
    import webdataset

    folder.mkdir(parents=True)
    pattern = str(folder / "train-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=IMAGES // SHARDS, verbose=0) as writer:
        for i, (image, label) in enumerate(items):
            sample = {"__key__": f"{i:05d}", "png": image}
            writer.write(sample if label is None else {**sample, "cls": label})
    return str(folder / f"train-{{000000..{SHARDS - 1:06d}}}.tar")


def write_hf(folder: Path, items: Sequence[tuple[Image.Image, int | None]]) -> str:
    import datasets

    datasets.disable_progress_bars()
    columns = {"image": [image for image, _ in items], "label": [label for _, label in items]}
    classes = datasets.ClassLabel(names=[str(i) for i in range(10)])
    features = datasets.Features({"image": datasets.Image(), "label": classes})
    saved = datasets.Dataset.from_dict(columns, features=features)
    saved.save_to_disk(str(folder), num_shards=SHARDS)
    return str(folder)


WRITERS = {"webdataset": write_webdataset, "hf": write_hf}


@pytest.fixture(scope="module", params=list(WRITERS))
def shards(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    pytest.importorskip({"webdataset": "webdataset", "hf": "datasets"}[request.param])
    path = WRITERS[request.param](tmp_path_factory.mktemp("shards") / "train", digits())
    return {"data__format": request.param, "data__train_path": path}


def given(shards: dict[str, Any], to: Path, **overrides: Any) -> dict[str, Any]:
    settings = {
        "optimizer__batch_size": 10,
        "checkpoint__dir": str(to),
        "monitor__every_n_epochs": 0,
    }
    return raw_config("simclr", to, **{**settings, **shards, **overrides})


def test_every_image_and_label_is_there(shards: dict[str, Any]):
    found = open_shards(shards["data__format"], shards["data__train_path"])
    assert list(found.lengths) == [IMAGES // SHARDS] * SHARDS
    for i in (0, 9, 10, 137, IMAGES - 1):
        image, label = digits()[i]
        assert found.read(i).tobytes() == image.tobytes()
        assert found.labels[i] == label


def test_tars_are_what_webdataset_reads(tmp_path: Path):
    webdataset = pytest.importorskip("webdataset")
    path = write_webdataset(tmp_path / "train", digits())
    found = open_shards("webdataset", path)
    stream = webdataset.WebDataset(path, shardshuffle=False).to_tuple("png", "cls")
    for i, (data, label) in enumerate(stream):
        assert found.read(i).tobytes() == Image.open(io.BytesIO(data)).tobytes()
        assert found.labels[i] == int(label)
    assert i == IMAGES - 1


_PROGRAM = """
from omegaconf import OmegaConf
from iecl_solo.order import seeded
from iecl_solo.solo.data import pretrain_loader
from iecl_solo.solo.host import find_host
from iecl_solo.train.complete import complete

def epoch(number, batches, workers):
    cfg = OmegaConf.create(given["cfg"])
    cfg.data.num_workers = workers
    host = find_host()
    loader, order = seeded(pretrain_loader(complete(cfg, host), host), 5)
    order.resume(number, batches)
    out = [(index, views) for index, views, _ in loader]
    return torch.cat([index for index, _ in out]), torch.cat([v for _, vs in out for v in vs])

# the same order for seen and for resumed images, whoever decodes them
result = [epoch(0, 0, 0), epoch(1, 0, 0), epoch(1, 4, 2)]
"""


@pytest.mark.any_host
def test_two_ranks_see_each_image_once_also_after_a_resume(shards: dict[str, Any], tmp_path: Path):
    cfg = given(shards, tmp_path, data__shuffle_shards=4)
    one, two = in_two_processes(_PROGRAM, {"cfg": cfg}, tmp_path)
    for epoch in range(2):
        seen = torch.cat([one[epoch][0], two[epoch][0]])
        assert (len(one[epoch][0]), len(two[epoch][0])) == (IMAGES // 2, IMAGES // 2)
        assert torch.equal(seen.sort().values, torch.arange(IMAGES))
        # four shards at a time
        first = torch.cat([rank[epoch][0][:20] for rank in (one, two)]) // (IMAGES // SHARDS)
        assert len(first.unique()) == 4
    assert not torch.equal(one[0][0], one[1][0])
    for rank in (one, two):
        assert torch.equal(rank[2][0], rank[1][0][40:])  # 4 batches of 10 were seen
        assert torch.equal(rank[2][1], rank[1][1][80:])  # bit for bit, two views of each


@pytest.mark.robust
def test_two_ranks_train_and_go_on_in_mid_epoch(shards: dict[str, Any], tmp_path: Path):
    """The run is stopped in its second epoch, at its fourth step of ten."""
    two = {"devices": 2, "strategy": "ddp", "max_epochs": 3, "sync_batchnorm": False}
    runs = {}
    for name, stop in (("whole", None), ("cut", (1, 3))):
        raw = given(shards, tmp_path / name, **two)
        noted = tmp_path / f"{name}.notes"
        if stop is not None:
            with pytest.raises(Stopped):
                in_processes(train_and_note, raw, str(noted), stop, environments=ranks(2))
        in_processes(train_and_note, raw, str(noted), None, environments=ranks(2))
        (file,) = (tmp_path / name).rglob("*.ckpt")
        runs[name] = read_checkpoint(file)["state_dict"]
        notes = [json.loads(line) for path in tmp_path.glob(f"{name}.notes*")
                 for line in path.read_text().splitlines()]  # fmt: skip
        for epoch in range(3):
            for rank in range(2):
                seen = [i for r, e, batch in notes if (r, e) == (rank, epoch) for i in batch]
                assert len(seen) == len(set(seen)) == IMAGES // 2
            assert {i for _, e, batch in notes if e == epoch for i in batch} == set(range(IMAGES))
    assert same_tensors(runs["whole"], runs["cut"]) == []


def test_a_run_is_trained_and_evaluated_on_shards(shards: dict[str, Any], tmp_path: Path):
    val = {"data__val_path": shards["data__train_path"], "max_epochs": 1}
    run = pretrain(OmegaConf.create(given(shards, tmp_path, **val)))
    assert run.args["data"]["num_classes"] == 10
    metrics = evaluate(run, EvaluationConfig())
    assert metrics["knn_acc1"] > 10


def test_without_labels(tmp_path: Path):
    pytest.importorskip("webdataset")
    path = write_webdataset(tmp_path / "train", [(image, None) for image, _ in digits()[:40]])
    path = str(Path(path).parent / "*.tar")
    shards = {"data__format": "webdataset", "data__train_path": path}
    with pytest.raises(IECLError, match=r"has no class; data\.no_labels=true"):
        pretrain_loader(complete(OmegaConf.create(given(shards, tmp_path)), HOST), HOST)
    cfg = complete(OmegaConf.create(given(shards, tmp_path, data__no_labels=True)), HOST)
    assert cfg.data.num_classes == 1
    _, _, labels = next(iter(pretrain_loader(cfg, HOST)))
    assert set(labels.tolist()) == {0}


def test_batched_views_of_shards(shards: dict[str, Any], tmp_path: Path):
    cfg = complete(OmegaConf.create(given(shards, tmp_path, data__views="batched")), HOST)
    seen = torch.cat([index for index, _, _ in pretrain_loader(cfg, HOST)])
    assert torch.equal(seen.sort().values, torch.arange(IMAGES))


def test_an_index_is_made_once_and_anew_for_other_shards(tmp_path: Path, monkeypatch: Any):
    pytest.importorskip("webdataset")
    path = write_webdataset(tmp_path / "train", digits())
    first = open_shards("webdataset", path)
    monkeypatch.setattr("iecl_solo.solo.shards._members", None)  # it would be called
    assert len(open_shards("webdataset", path).labels) == len(first.labels)
    Path(first.files[0]).write_bytes(Path(first.files[1]).read_bytes())
    with pytest.raises(TypeError):
        open_shards("webdataset", path)


def test_an_index_replaces_the_earlier_one_of_the_same_shards_alone(tmp_path: Path):
    pytest.importorskip("webdataset")
    path = write_webdataset(tmp_path / "train", digits())
    first, second, *_ = open_shards("webdataset", path).files
    folder = first.parent
    (of_all,) = folder.glob(".shards-*.npy")
    open_shards("webdataset", str(second))
    (of_one,) = set(folder.glob(".shards-*.npy")) - {of_all}
    first.write_bytes(second.read_bytes())
    open_shards("webdataset", path)
    left = set(folder.glob(".shards-*.npy"))
    assert len(left) == 2 and of_one in left and of_all not in left


def test_an_order_in_pieces_is_an_order():
    order = EpochOrder(23, 4, seed=1, pieces=([5, 5, 5, 5, 3], 2))
    assert sorted(index for _, index in order) == list(range(23))
    assert ShardImages.__doc__  # its `pieces` are what the order takes


BAD = {
    "data__train_path=nothing-{0..1}.tar": "no such file",
    "data__dataset=cifar10": "is not for data.dataset: cifar10",
    "data__fraction=0.5": "data.fraction: not with data.format",
    "data__format=webdatset": "did you mean 'webdataset'",
    "data__shuffle_shards=-1": "shuffle_shards",
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(what: str, tmp_path: Path):
    pytest.importorskip("webdataset")
    path = write_webdataset(tmp_path / "train", digits()[:20])
    shards = {"data__format": "webdataset", "data__train_path": str(Path(path).parent)}
    key, _, value = what.partition("=")
    changed = {key: json.loads(value) if value[0] in "-0" else value}
    with pytest.raises(IECLError) as raised:
        complete(OmegaConf.create(given(shards, tmp_path, **changed)), HOST)
    assert BAD[what] in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_column_of_texts_is_no_class(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    columns = {"image": [image for image, _ in digits()[:20]], "label": ["cat"] * 20}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "hf"))
    texts = {"data__format": "hf", "data__train_path": str(tmp_path / "hf")}
    made = given(texts, tmp_path, data__no_labels=True)
    assert complete(OmegaConf.create(made), HOST).data.num_classes == 1
    with pytest.raises(IECLError, match="has no class"):
        pretrain_loader(complete(OmegaConf.create(given(texts, tmp_path)), HOST), HOST)


def test_a_folder_of_splits_names_them(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"x": [1]})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(IECLError, match=r"several splits; give one of .*d/train, .*d/test"):
        open_shards("hf", str(tmp_path / "d"))
    with pytest.raises(IECLError, match=r"none of its columns is of images \(x are\)"):
        open_shards("hf", str(tmp_path / "d" / "train"))
