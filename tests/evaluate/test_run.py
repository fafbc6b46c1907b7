"""A run's evaluation: what needs no labels where there are none, and what a report draws of it."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from support import HOST, image_folder, raw_config, script

from iecl_solo.errors import CannotWrite, IECLError
from iecl_solo.evaluate.gallery import make_gallery, read_gallery
from iecl_solo.evaluate.label_free import BETTER, label_free
from iecl_solo.evaluate.load import load_backbone, read_pretrained
from iecl_solo.evaluate.protocol import EvaluationConfig
from iecl_solo.evaluate.run import evaluate, view_features
from iecl_solo.experiments.store import STORE, Store
from iecl_solo.files import read_json
from iecl_solo.solo.config import parse_block
from iecl_solo.train.callbacks import terminal
from iecl_solo.train.fit import pretrain
from iecl_solo.train.run import Run

ROOT = Path(__file__).parents[2]
PROTOCOL = {"linear": {"max_epochs": 2, "augment": False}, "label_free": {"images": 8, "views": 3}}


def _trained(images: Path, folder: Path, method: str, **overrides) -> Run:
    overrides = {"max_epochs": 1, "monitor__every_n_epochs": 0, **overrides}
    given = raw_config(method, images, checkpoint__dir=str(folder), **overrides)
    return pretrain(OmegaConf.create(given))


def _protocol(**given) -> EvaluationConfig:
    return parse_block("evaluation", EvaluationConfig, {**PROTOCOL, **given})


@pytest.fixture(scope="module")
def photos(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of images, as a user's own may be."""
    folder = tmp_path_factory.mktemp("photos") / "holiday"
    folder.mkdir()
    for path in images.rglob("*.png"):
        shutil.copy(path, folder / f"{path.parent.name}-{path.name}")
    return folder


@pytest.fixture(scope="module")
def unlabelled(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("unlabelled")
    return _trained(photos, folder, "iecl_simclr", data__no_labels=True)


@pytest.fixture(scope="module")
def labelled(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("labelled")
    return _trained(images, folder, "simclr", data__val_path=str(images))


def test_without_labels_there_is_no_accuracy(unlabelled: Run):
    found = evaluate(unlabelled, _protocol())
    assert set(BETTER) <= set(found) and "query_entropy" in found
    assert [name for name in found if "acc" in name] == []
    gallery = read_gallery(unlabelled.folder)
    assert gallery is not None and set(gallery.labels) == {-1} and gallery.same.all()
    assert len(gallery.before) == len(gallery.after) == 6  # SAIB changed the views
    assert gallery.before.shape == (6, 32, 32, 3) and gallery.before.dtype == np.uint8


def test_with_labels_they_are_there_where_asked(labelled: Run):
    assert set(BETTER).isdisjoint(evaluate(labelled, _protocol()))
    found = evaluate(labelled, _protocol(measures=["label_free"]))
    assert set(BETTER) <= set(found) and "knn_acc1" in found
    assert [name for name in found if name.endswith("_acc5")] == []  # there are three classes
    assert read_json(labelled.folder / "evaluation.json")["protocol"]["measures"] == ["label_free"]
    gallery = read_gallery(labelled.folder)
    assert gallery is not None and set(gallery.labels) == {0, 1, 2}
    assert len(gallery.before) == 0  # the host's own method has no transform


def test_a_long_evaluation_says_how_far_it_is(
    labelled: Run, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(terminal, "BETWEEN", 0.0)
    evaluate(labelled, _protocol(linear={"max_epochs": 3, "augment": True}))
    first, second = [line for line in capsys.readouterr().out.splitlines() if "epochs" in line]
    assert "  epochs  1 of 3  " in first and "  epochs  2 of 3  " in second


def test_views_are_seeded_and_of_one_image_each(labelled: Run):
    pretrained = read_pretrained(labelled.checkpoint)
    backbone = load_backbone(pretrained, HOST).eval()
    before = torch.get_rng_state()
    first = view_features(pretrained.cfg, HOST, backbone, 8, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.shape[:2] == (8, 5)
    assert torch.equal(first, view_features(pretrained.cfg, HOST, backbone, 8, 5))
    assert len(first.flatten(0, 1).unique(dim=0)) == 40  # no view twice
    assert label_free(first[:, 0], first)["alignment"] > 0


def test_gallery_holds_the_nearest_images():
    # three tight groups: the neighbours of an image are those of its own
    angles = torch.arange(3).repeat_interleave(4) * 2.0 + 0.01 * torch.arange(12)
    features = torch.stack([angles.cos(), angles.sin()], 1)
    labels = torch.arange(3).repeat_interleave(4)
    made = make_gallery(features, labels, lambda i: np.full((2, 2, 3), i, np.uint8))
    shown = made.pictures[:, 0, 0, 0].astype(int)
    for query, row, same in zip(made.queries, made.neighbours, made.same, strict=True):
        group = [int(i) for i in shown[row]]
        assert shown[query] not in group and len(set(group)) == len(group) == 5
        assert {i // 4 for i in group[:3]} == {shown[query] // 4}
        assert same.tolist() == [i // 4 == shown[query] // 4 for i in group]


def test_gallery_comes_back_from_its_folder(tmp_path: Path):
    assert read_gallery(tmp_path) is None
    features = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    made = make_gallery(features, None, lambda i: np.zeros((2, 2, 3), np.uint8))
    made.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["gallery.npz"]
    found = read_gallery(tmp_path)
    assert found is not None
    assert all(np.array_equal(vars(made)[name], value) for name, value in vars(found).items())
    (tmp_path / "gallery.npz").write_bytes(b"half")
    assert read_gallery(tmp_path) is None


def test_a_gallery_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def written_in_part(to: Any, **arrays: np.ndarray) -> None:
        to.write(b"half") if hasattr(to, "write") else Path(to).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    features = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    made = make_gallery(features, None, lambda i: np.zeros((2, 2, 3), np.uint8))
    monkeypatch.setattr(np, "savez_compressed", written_in_part)
    with pytest.raises(CannotWrite, match=r"gallery.npz: it cannot be written \(No space left"):
        made.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_measure_is_refused():
    with pytest.raises(IECLError, match="did you mean 'label_free'"):
        _protocol(measures=["labelfree"])


def test_retrieval_by_label_and_by_name(labelled: Run):
    protocol = _protocol(
        measures=["retrieval"],
        retrieval={"k": [1, 5], "pattern": r"(?P<source>class\d)/(?P<object>\d+)"},
    )
    found = evaluate(labelled, protocol)
    assert 0 <= found["recall_at_1"] <= found["recall_at_5"] <= 100
    assert 0 <= found["same_object_recall_at_1"] <= found["same_object_recall_at_5"] <= 100


def test_runs_of_one_benchmark_are_judged_by_anothers_images(
    labelled: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    given = image_folder(tmp_path / "made", images=24)
    for part, artists in (("train", "ab"), ("test", "cd")):
        for i, path in enumerate(sorted(given.rglob("*.png"))):
            stem = Path(part, path.parent.name, f"{i // 2}_{artists[i % 2]}")
            for root, suffix, mode in (
                ("datasets/drawings", ".jpg", "RGB"),
                ("masks", ".png", "1"),
            ):
                to = Path(root, stem).with_suffix(suffix)
                to.parent.mkdir(parents=True, exist_ok=True)
                Image.open(path).convert(mode).save(to)
    masks = script(ROOT / "studies/drawings_masks.py")
    masks.write(Path("datasets/drawings"), Path("masks"), Path("datasets/drawings-dense"))
    study, source = script(ROOT / "studies/carried_over.py"), Path("source")
    shutil.copytree(labelled.folder, source / "runs/simclr/a")
    store = Store(source / STORE)
    store.begin({"name": "own", "axes": {}, "settings": {}})
    row = {"data": "x", "arm": "simclr", "against": None, "method": "simclr", "axes": {}, "seed": 3}
    for name in ("a", "failed"):
        assert store.claim({"id": name, **row})
    store.finish("a", {"knn_acc1": -1.0}, device="cpu", seconds=1.0, config={})
    store.fail("failed", "of something")
    (made,) = study.carry_over(source, "drawings", Path("to")).rows()
    found = made["metrics"]
    assert {"knn_acc1", "linear_acc1", "same_object_recall_at_1", "dense_miou"} <= set(found)
    assert (made["id"], made["data"], made["seed"]) == ("a", "drawings", 3)
    # as an evaluation of the run itself finds it, where that data set is one of its own
    drawings = {"dataset": "custom", "train_path": "datasets/drawings/train"}
    drawings["val_path"] = "datasets/drawings/test"
    protocol = _protocol(knn={"k": [5, 10, 20, 50]}, datasets={"drawings": drawings})
    assert evaluate(labelled, protocol)["knn_acc1/drawings"] == found["knn_acc1"]
    # typed again, it makes nothing again
    monkeypatch.setattr(study, "evaluate_on", None)
    assert study.carry_over(source, "drawings", Path("to")).csv.is_file()
    with pytest.raises(IECLError, match="did you mean 'drawings'"):
        study.carry_over(source, "drawing", Path("to"))


def test_corruptions_are_a_mean_of_the_named_ones(labelled: Run):
    pytest.importorskip("imagecorruptions")
    chosen = {"corruptions": ["contrast", "gaussian_noise"], "severities": [1, 5], "images": 9}
    found = evaluate(labelled, _protocol(measures=["corruptions"], corruptions=chosen))
    for measure in ("knn_acc1", "linear_acc1"):
        each = [found[f"{measure}/corrupted: {name}"] for name in chosen["corruptions"]]
        assert found[f"{measure}/corrupted"] == pytest.approx(sum(each) / 2)
    with pytest.raises(IECLError, match="did you mean 'contrast'"):
        _protocol(corruptions={"corruptions": ["contrst"]})
    with pytest.raises(IECLError, match="severities"):
        _protocol(corruptions={"severities": [0]})
