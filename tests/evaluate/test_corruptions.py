"""The corruptions are the library's, the same twice, and stronger at a higher severity."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from iecl_solo.digits import write_digits
from iecl_solo.errors import IECLError
from iecl_solo.evaluate import corruptions
from iecl_solo.evaluate.corruptions import CORRUPTIONS, LEAST, Corrupt, corrupted


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Image.Image:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, classes=[3, 8])
    return Image.open(next(iter(sorted(folder.rglob("*.png"))))).convert("RGB").resize((48, 48))


@pytest.mark.any_host
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_is_seeded_and_grows(name: str, picture: Image.Image):
    library = pytest.importorskip("imagecorruptions")
    assert tuple(library.get_corruption_names()) == CORRUPTIONS
    state = np.random.get_state()[1].copy()
    weak, strong = Corrupt(name, 1)(picture), Corrupt(name, 5)(picture)
    assert (np.random.get_state()[1] == state).all()
    np.random.seed(5)  # whatever was drawn before
    assert np.array_equal(Corrupt(name, 5)(picture), strong)
    clean = np.asarray(picture).astype(float)
    changes = [np.abs(np.asarray(x) - clean).mean() for x in (weak, strong)]
    assert strong.size == picture.size and 0 < changes[0] < changes[1]


def test_they_come_before_the_tensor(images: Path):
    pytest.importorskip("imagecorruptions")
    steps = [transforms.Resize(40), transforms.ToTensor()]
    dataset = ImageFolder(str(images), transforms.Compose(steps))
    other = corrupted(dataset, "contrast", 3)
    assert other[0][0].shape == (3, 40, 40) and other[0][1] == dataset[0][1]
    assert float(other[0][0].std()) < 0.5 * float(dataset[0][0].std())
    assert len(dataset.transform.transforms) == 2  # the data set itself is as it was


def test_bad_input_is_refused(images: Path, picture: Image.Image):
    with pytest.raises(IECLError, match="did you mean 'fog'"):
        Corrupt("fogg", 1)
    with pytest.raises(IECLError, match="severity 6"):
        Corrupt("fog", 6)
    with pytest.raises(IECLError, match=f"31 x 31 pixels, at least {LEAST}"):
        Corrupt("fog", 1)(picture.resize((31, 31)))
    with pytest.raises(IECLError, match="no ToTensor"):
        corrupted(ImageFolder(str(images)), "fog", 1)


def test_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(IECLError, match=r"pip install 'iecl-solo\[corruptions\]'"):
        corruptions.find_library()
