"""torchvision's data sets by name, from files on disk, for probe, k-NN and fine-tuning."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from support import HOST, raw_config
from torchvision import datasets, transforms

from iecl_solo.errors import IECLError
from iecl_solo.evaluate.protocol import EvaluationConfig
from iecl_solo.evaluate.run import evaluate
from iecl_solo.evaluate.transfer import augmenting, names, torchvision_sets
from iecl_solo.solo.config import parse_block
from iecl_solo.train.fit import pretrain


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten made-up images a batch in CIFAR-10's own files, whose checksums are left unchecked."""
    root = tmp_path_factory.mktemp("torchvision")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        labels = [(i + j) % 7 for j in range(14)]
        means = 30 * np.array(labels)[:, None]
        pixels = (means + rng.integers(0, 30, (14, 3072))).astype(np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return root


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *args: True)


def test_parts_are_the_training_and_the_test_part(cifar: Path, unchecked):
    plain = transforms.Compose([transforms.ToTensor()])
    train, test = torchvision_sets("CIFAR10", cifar, plain, plain)
    assert (len(train), len(test)) == (70, 14) and train[0][0].shape == (3, 32, 32)


def test_what_is_not_there_is_said_and_not_downloaded(tmp_path: Path):
    plain = transforms.Compose([transforms.ToTensor()])
    with pytest.raises(IECLError, match="did you mean 'Flowers102'"):
        torchvision_sets("Flower102", tmp_path, plain, plain)
    with pytest.raises(IECLError, match="no such folder"):
        torchvision_sets("STL10", tmp_path / "elsewhere", plain, plain)
    for name in ("Flowers102", "STL10", "OxfordIIITPet", "CIFAR100", "DTD", "FGVCAircraft"):
        assert name in names()
        with pytest.raises(IECLError, match=f"^torchvision's {name} in .*it is not downloaded$"):
            torchvision_sets(name, tmp_path, plain, plain)
    assert list(tmp_path.iterdir()) == []


def test_training_images_are_cropped_at_random(cifar: Path, unchecked):
    shown = transforms.Compose([transforms.Resize(16), transforms.ToTensor()])
    train, test = torchvision_sets("CIFAR10", cifar, augmenting(shown, 16), shown)
    first, again = train[0][0], train[0][0]
    assert first.shape == test[0][0].shape == (3, 16, 16) and not first.equal(again)


def test_transfer_by_name(images: Path, tmp_path: Path, cifar: Path, unchecked):
    given = raw_config(
        "simclr",
        images,
        data__val_path=str(images),
        max_epochs=1,
        monitor__every_n_epochs=0,
        checkpoint__dir=str(tmp_path),
    )
    run = pretrain(OmegaConf.create(given))
    protocol = {
        "linear": {"max_epochs": 3, "augment": False, "lr": [0.1, 1.0]},
        "datasets": {"cifar": {"torchvision": "CIFAR10", "root": str(cifar)}},
    }
    if HOST.name == "main":  # 1.0.2 only trains the last layer
        protocol["finetune"] = {
            "fractions": [0.5],
            "max_epochs": 1,
            "batch_size": 8,
            "lr": [0.01, 0.1],
        }
    found = evaluate(run, parse_block("evaluation", EvaluationConfig, protocol))
    # seven classes by their brightness: far above chance without any training
    assert found["knn_acc1/cifar"] > 40 and found["linear_lr/cifar"] in (0.1, 1.0)
    assert found["knn_acc5/cifar"] >= found["knn_acc1/cifar"] and "knn_acc5" not in found
    if HOST.name == "main":
        assert 0 <= found["finetune_50_acc1/cifar"] <= 100
