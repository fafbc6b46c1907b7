"""The digits as an image folder: what is written, and what is left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from iecl_solo import digits
from iecl_solo.digits import write_digits
from iecl_solo.errors import IECLError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


def images(root: Path) -> list[Path]:
    return sorted(root.rglob("*.png"))


def state(root: Path) -> dict[Path, tuple[int, bytes]]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.rglob("*") if p.is_file()}


def test_every_digit_once_under_its_label(folder: Path) -> None:
    _, labels = load_digits(return_X_y=True)
    assert len(images(folder)) == len(labels) == 1797
    assert {int(p.stem): int(p.parent.name) for p in images(folder)} == dict(enumerate(labels))


def test_the_split_is_stratified(folder: Path) -> None:
    _, labels = load_digits(return_X_y=True)
    assert len(images(folder / "train")) == 1437
    for label in range(10):
        share = len(images(folder / "test" / str(label))) / (labels == label).sum()
        assert share == pytest.approx(0.2, abs=0.005)


def test_pixels_are_the_digit_upscaled(folder: Path) -> None:
    scanned = load_digits().images / 16 * 255
    # where the centres of 32 pixels lie among the centres of 8
    at = (np.arange(32) + 0.5) / 4 - 0.5
    for path in images(folder)[::100]:
        image = Image.open(path)
        assert (image.mode, image.size) == ("RGB", (32, 32))
        digit = scanned[int(path.stem)]
        rows = np.stack([np.interp(at, range(8), row) for row in digit])
        expected = np.stack([np.interp(at, range(8), column) for column in rows.T]).T
        # the digit and each of the two passes are rounded
        assert np.abs(np.asarray(image, dtype=float) - expected[..., None]).max() <= 1.5


def test_a_second_call_writes_nothing(folder: Path) -> None:
    before = state(folder)
    assert write_digits(folder) == folder
    assert state(folder) == before


def test_the_same_call_writes_the_same_files(folder: Path, tmp_path: Path) -> None:
    again = write_digits(str(tmp_path / "a" / "digits"))
    contents = {p.relative_to(again): p.read_bytes() for p in again.rglob("*") if p.is_file()}
    assert contents == {p.relative_to(folder): data for p, (_, data) in state(folder).items()}


def test_options(tmp_path: Path, folder: Path) -> None:
    root = write_digits(tmp_path / "small", image_size=16, test_fraction=0.5, seed=1)
    assert Image.open(images(root)[0]).size == (16, 16)
    assert len(images(root / "test")) == 899
    other = write_digits(tmp_path / "other", image_size=16, seed=2)
    test = {p.name for p in images(folder / "test")}
    assert {p.name for p in images(other / "test")} != test


def test_an_interrupted_call_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, written = Image.Image.save, []

    def stop_at_ten(self: Image.Image, path: Path) -> None:
        if len(written) == 10:
            raise KeyboardInterrupt
        written.append(path)
        save(self, path)

    monkeypatch.setattr(Image.Image, "save", stop_at_ten)
    with pytest.raises(KeyboardInterrupt):
        write_digits(tmp_path / "digits")
    assert len(written) == 10
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert len(images(write_digits(tmp_path / "digits"))) == 1797


def test_missing_images_are_written_again(tmp_path: Path) -> None:
    root = write_digits(tmp_path / "digits", image_size=8)
    before = {p: data for p, (_, data) in state(root).items()}
    for path in images(root)[::7]:
        path.unlink()
    write_digits(root, image_size=8)
    assert {p: data for p, (_, data) in state(root).items()} == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    assert len(images(write_digits(tmp_path, image_size=8))) == 1797


def test_a_faster_process_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = digits._write

    def slow(new: Path, *settings: object) -> None:
        write(new, *settings)  # type: ignore[arg-type]
        monkeypatch.setattr(digits, "_write", write)
        write_digits(tmp_path / "digits", image_size=8)

    monkeypatch.setattr(digits, "_write", slow)
    assert len(images(write_digits(tmp_path / "digits", image_size=8))) == 1797
    assert [p.name for p in tmp_path.iterdir()] == ["digits"]


def test_something_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(IECLError, match="something else than digits image_size=32"):
        write_digits(tmp_path)
    root = write_digits(tmp_path / "digits", image_size=8)
    before = state(root)
    with pytest.raises(IECLError, match="something else than digits image_size=16"):
        write_digits(root, image_size=16)
    assert state(root) == before


@pytest.mark.parametrize("bad", [{"image_size": 4}, {"test_fraction": 0.0}, {"test_fraction": 1.0}])
def test_impossible_options_are_refused(tmp_path: Path, bad: dict[str, float]) -> None:
    (name,) = bad
    with pytest.raises(IECLError, match=name):
        write_digits(tmp_path / "digits", **bad)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
