"""The scripts of examples/ are short, run, and learn what they say."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pytest
from support import script
from support_report import make_store

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    return script(EXAMPLES / f"{name}.py")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_examples_are_short(path: Path):
    assert len(path.read_text().splitlines()) < 60


def test_plain_pytorch_learns():
    # ln(128) - 0.01 * H is what guessing gives
    assert example("plain_pytorch").main(steps=30) < math.log(128) - 1


def test_lightning_module_logs_the_terms():
    logged = example("lightning_module").main(epochs=1)
    assert {"kl", "entropy", "regularizer"} <= set(logged)
    assert all(math.isfinite(value) for value in logged.values())


def test_reading_a_store(tmp_path: Path):
    store = make_store(tmp_path / "rows")
    table = example("read_store").main(str(store.path))
    difference = table["iecl_simclr"] - table["simclr"]
    assert len(table) and (table["difference"] - difference).abs().max() < 1e-12


def test_shards_of_a_folder(images: Path, tmp_path: Path):
    pytest.importorskip("webdataset")
    from iecl_solo.solo.shards import open_shards

    assert example("write_shards").write(images, tmp_path / "shards", size=0.03) == 24
    found = open_shards("webdataset", str(tmp_path / "shards"))
    assert len(found.lengths) > 2
    assert sorted(found.labels.tolist()) == sorted([0, 1, 2] * 8)
