"""Training and test set for evaluation: what both host's folders make of classes."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from support import HOST

from iecl_solo.errors import IECLError
from iecl_solo.solo.data import evaluation_datasets


def folders(root: Path, train: str, test: str) -> dict[str, str]:
    for part, classes in (("train", train), ("test", test)):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(root / part / name / "0.png")
    paths = {"train_path": str(root / "train"), "val_path": str(root / "test")}
    return {"dataset": "custom", **paths}


def test_a_class_has_one_number_in_both_sets(tmp_path: Path):
    """Also where the test set lacks a class, after which the folder's own numbers are others."""
    sets = evaluation_datasets(HOST, folders(tmp_path, "abcd", "bd"), image_size=8)
    train, test = ({Path(f).parent.name: label for f, label in s.samples} for s in sets)
    assert train == {"a": 0, "b": 1, "c": 2, "d": 3} and test == {"b": 1, "d": 3}
    assert [int(label) for _, label in sets[1]] == sets[1].targets == [1, 3]


def test_a_class_that_was_never_trained_is_one_line(tmp_path: Path):
    with pytest.raises(IECLError, match="its class 'x' is none of the 2 of"):
        evaluation_datasets(HOST, folders(tmp_path, "ab", "ax"), image_size=8)
