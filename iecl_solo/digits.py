"""scikit-learn's handwritten digits as an image folder: a data set that needs no network."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from iecl_solo import checks
from iecl_solo.errors import CannotWrite, IECLError
from iecl_solo.files import make_folder

# what the folder was written with; it is written last, so a folder that has it is complete
_MARKER = ".written"


def _marker(image_size: int, test_fraction: float, seed: int, classes: Sequence[int]) -> str:
    which = "" if len(classes) == 10 else f" classes={list(classes)}"
    return f"digits image_size={image_size} test_fraction={test_fraction} seed={seed}{which}"


def _written_with(root: Path) -> str | None:
    file = root / _MARKER
    return file.read_text() if file.is_file() else None


def _is_complete(root: Path, marker: str, classes: Sequence[int]) -> bool:
    from sklearn.datasets import load_digits

    images = sum(1 for _ in root.glob("t*/*/*.png"))
    wanted = np.isin(load_digits().target, classes).sum()
    return _written_with(root) == marker and images == wanted


def _write(
    root: Path, image_size: int, test_fraction: float, seed: int, classes: Sequence[int]
) -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    pixels = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    train, _ = train_test_split(
        np.arange(len(labels)), test_size=test_fraction, stratify=labels, random_state=seed
    )
    in_train = set(train.tolist())
    for index, label in enumerate(labels):
        if label not in classes:
            continue
        folder = root / ("train" if index in in_train else "test") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels[index]).resize(
            (image_size, image_size), Image.Resampling.BILINEAR
        )
        image.convert("RGB").save(folder / f"{index:04d}.png")


def write_digits(
    root: str | Path,
    image_size: int = 32,
    test_fraction: float = 0.2,
    seed: int = 0,
    classes: Sequence[int] | None = None,
) -> Path:
    """Write the 1,797 digits of scikit-learn's ``load_digits`` as ``root/{train,test}/<0-9>/``.

    Files are RGB PNGs named by the digit's index, upscaled from 8 x 8 by bilinear interpolation;
    the split is stratified by class. A folder that is complete is left alone. Anything else is
    written to a temporary sibling and moved into place, so that an interrupted call leaves
    nothing that could be taken for the data. Images that are missing from a folder written here
    are written again.

    Args:
        root: the folder; its parent is made if need be.
        image_size: height and width of the images, in pixels.
        test_fraction: part of the images that goes to ``test``.
        seed: of the split.
        classes: the digits to write; all ten if not given.

    Returns:
        ``root``.

    Raises:
        IECLError: an impossible ``image_size`` or ``test_fraction``, or a ``root`` that holds
            something else than the images asked for.

    Example:
        >>> import tempfile
        >>> root = write_digits(Path(tempfile.mkdtemp()) / "digits")
        >>> len(list(root.glob("train/*/*.png"))), len(list(root.glob("test/*/*.png")))
        (1437, 360)
    """
    root = Path(root)
    checks.whole("digits: image_size", image_size, 8)
    checks.number("digits: test_fraction", test_fraction, 0.01, 0.99)
    classes = sorted(set(range(10) if classes is None else classes))
    if not classes or not set(classes) <= set(range(10)):
        raise IECLError(f"digits: classes {classes} are not allowed, 0 to 9 are")
    marker = _marker(image_size, test_fraction, seed, classes)
    if _is_complete(root, marker, classes):
        return root
    if _written_with(root) == marker:
        _write(root, image_size, test_fraction, seed, classes)
        return root
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise IECLError(
            f"digits: {root} holds something else than {marker}; remove it or name another folder"
        )
    make_folder(root.parent)
    try:
        beside = tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent)
    except OSError as error:
        raise CannotWrite(f"{root}: it cannot be made ({error.strerror})") from None
    with beside as temporary:
        new = Path(temporary) / root.name
        _write(new, image_size, test_fraction, seed, classes)
        (new / _MARKER).write_text(marker)
        try:
            new.replace(root)
        except OSError:
            # another process may have been faster
            if not _is_complete(root, marker, classes):
                raise
    return root


def write_masks(digits: str | Path, root: str | Path) -> Path:
    """The digits of ``write_digits`` with masks: ``root/{train,val}/{images,masks}``.

    A pixel of at least half the ink's height is of its digit's class, 1 to 10; the others are the
    background, 0. A folder that is complete is left alone.

    Args:
        digits: the folder that ``write_digits`` wrote.
        root: the folder; its parent is made if need be.

    Returns:
        ``root``.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> root = write_masks(write_digits(folder / "digits"), folder / "masks")
        >>> len(list(root.glob("val/masks/*.png"))), len(list(root.glob("val/images/*.png")))
        (360, 360)
        >>> mask = np.asarray(Image.open(next(root.glob("val/masks/*.png"))))
        >>> len(np.unique(mask))
        2
    """
    digits, root = Path(digits), Path(root)
    made = f"masks of {_written_with(digits)}"
    if _written_with(root) == made:
        return root
    for part, name in (("train", "train"), ("test", "val")):
        for file in sorted((digits / part).glob("*/*.png")):
            image = Image.open(file)
            ink = np.asarray(image.convert("L")) >= 128
            for kind, picture in (
                ("images", image),
                ("masks", Image.fromarray(np.uint8(ink * (int(file.parent.name) + 1)))),
            ):
                folder = root / name / kind
                folder.mkdir(parents=True, exist_ok=True)
                picture.save(folder / file.name)
    (root / _MARKER).write_text(made)
    return root
