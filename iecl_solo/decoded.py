"""A data set's images decoded once, into a file that every later run and process maps.

The file lies beside the data set (in the user's cache where that may not be written), holds
uncompressed pixels, and is read through the page cache: a data set that fits in memory is in memory
after its first epoch, once for all processes. It is made anew when a file of the data set changes.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from iecl_solo.errors import IECLError
from iecl_solo.files import read_json, write_json
from iecl_solo.images import load_image

#: Changed whenever what the file holds changes.
_FORMAT = "1"


@dataclass(frozen=True)
class Stored:
    """At which size images are kept.

    Args:
        largest: images that are all of one size, no side longer than this, are kept as they are.
        square: all others are resized to a square of this side; their own size is kept beside them,
            so that boxes can be drawn as they would be in the original.
    """

    largest: int
    square: int


@dataclass(frozen=True)
class Decoded:
    """Images in memory, or mapped into it.

    Attributes:
        images: (N, 3, H, W) of uint8.
        sizes: (N, 2), height and width that each image had in its file.
        labels: (N,).
    """

    images: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W), sizes (B, 2) and labels (B,) at (B,) indices, copied."""
        at = indices.numpy()
        return (
            torch.from_numpy(self.images[at]),
            torch.from_numpy(self.sizes[at].astype(np.int64)),
            torch.from_numpy(self.labels[at].astype(np.int64)),
        )


def fingerprint(files: Sequence[Path], root: Path, *settings: object) -> str:
    """Changes when a file is added, removed, renamed or written to, or a setting is another."""
    digest = hashlib.sha256(repr((_FORMAT, settings)).encode())
    for path in files:
        try:
            stat = path.stat()
            state = f"{stat.st_size}\0{stat.st_mtime_ns}"
        except OSError:  # a link to nothing, which is found out when it is read
            state = "gone"
        digest.update(os.fsencode(os.path.relpath(path, root)) + f"\0{state}\n".encode())
    return digest.hexdigest()[:16]


def made_once(root: Path, stem: str, key: str, ending: str, make: Callable[[Path], object]) -> Path:
    """What is made of a data set and kept beside it, made now or by an earlier run.

    Several processes may call this at once, also on several machines that share the folder: one
    makes it, the others wait for it. What was made under an earlier key is removed.

    Args:
        root: the data set's folder or file.
        stem: the file's name up to the key, a different one for all that is made of ``root``.
        key: its ``fingerprint``.
        ending: of the name.
        make: writes the file whole, or not at all.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp()) / "photos"
        >>> made_once(root, ".photos.note", "0" * 16, ".txt", Path.touch).name
        '.photos.note-0000000000000000.txt'
    """
    folder = cache_folder(root)
    path = folder / f"{stem}-{key}{ending}"
    if path.is_file():
        return path
    with FileLock(folder / f"{stem}.lock"):
        if not path.is_file():  # another process may have made it meanwhile
            # of this stem alone: that of another variant goes on where this one's key begins
            for old in folder.glob(f"{glob.escape(stem)}-{'[0-9a-f]' * 16}{ending}*"):
                old.unlink(missing_ok=True)  # whoever has it mapped keeps it
            make(path)
    return path


class _Pixels(Dataset):
    """(pixels (3, H, W), height, width, label) of each image, ``square`` if that is given.

    Of an image that does not decode, its error: one raised in a worker would not stay one line.
    """

    def __init__(self, read: Callable[[int], tuple[Image.Image, int]], count: int) -> None:
        self.read, self.count = read, count
        self.square: int | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, int, int] | IECLError:
        try:
            image, label = self.read(index)
        except IECLError as error:
            return error
        except OSError as error:
            return IECLError(f"image {index} of the data set does not decode ({error})")
        width, height = image.size
        if self.square is not None:
            image = image.resize((self.square, self.square), Image.Resampling.BICUBIC)
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1), height, width, int(label)


def decode(
    read: Callable[[int], tuple[Image.Image, int]],
    files: Sequence[Path],
    root: Path,
    count: int,
    stored: Stored,
    *,
    variant: str = "",
    workers: int = 0,
) -> Decoded:
    """The data set's pixels, decoded now or by an earlier run.

    Several processes may call this at once, as ``made_once`` says.

    Args:
        read: the image and label at an index.
        files: all files that the images come from.
        root: the data set's folder or file; the decoded file is put beside it.
        count: number of images.
        stored: at which size they are kept.
        variant: tells apart what is made of the same folder (a part of it, say).
        workers: processes that decode.

    Raises:
        IECLError: one line, when an image does not decode or the file does not fit on the disk.
    """
    root = root.resolve()
    key = fingerprint(files, root, count, stored)
    pixels = _Pixels(read, count)
    path = made_once(
        root,
        f".{root.name}.views{variant}",
        key,
        ".npy",
        lambda path: _write(path, pixels, stored, workers),
    )
    records: np.ndarray = np.load(path, mmap_mode="r")
    return Decoded(records["image"], records["size"], records["label"])


class _Broken(Dataset):
    """Whether each of some files does not decode."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> bool:
        try:
            load_image(self.files[index])
        except IECLError:
            return True
        return False


def undecodable(files: Sequence[Path], root: Path, workers: int = 0) -> set[Path]:
    """Those of a data set's images that do not decode, looked for now or by an earlier run.

    Every image is decoded once; the answer is kept beside the data set until one of its files
    changes, so that every run, and every process of one, leaves out the same images.

    Args:
        files: the images.
        root: the data set's folder.
        workers: processes that decode.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp()) / "photos"
        >>> root.mkdir()
        >>> _ = (root / "a.png").write_bytes(b"no image")
        >>> [path.name for path in undecodable([root / "a.png"], root)]
        ['a.png']
    """
    root = root.expanduser().resolve()

    def look(file: Path) -> None:
        print(f"looking among {len(files)} images for undecodable ones", file=sys.stderr)
        loader: Any = DataLoader(_Broken(files), batch_size=None, num_workers=workers)
        broken = [i for i, is_broken in enumerate(loader) if is_broken]
        write_json(file, {"undecodable": [os.path.relpath(files[i], root) for i in broken]})

    file = made_once(root, f".{root.name}.undecodable", fingerprint(files, root), ".json", look)
    names = set(read_json(file)["undecodable"])
    return {path for path in files if os.path.relpath(path, root) in names}


def cache_folder(root: Path) -> Path:
    """Where what is made of a data set stands: beside it, or in the user's cache."""
    if os.access(root.parent, os.W_OK):
        return root.parent
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    folder = cache / "iecl-solo" / hashlib.sha256(str(root).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class _OtherSize(Exception):
    """An image is of another size than the first."""


def _unchanged(item: Any) -> Any:
    return item


def _shape(pixels: _Pixels) -> tuple[int, ...]:
    first = pixels[0]
    if isinstance(first, IECLError):
        raise first
    return first[0].shape


def _write(path: Path, pixels: _Pixels, stored: Stored, workers: int) -> None:
    if max(_shape(pixels)) > stored.largest:
        pixels.square = stored.square
    part = path.with_name(f"{path.name}.part")
    try:
        try:
            _fill(part, pixels, workers)
        except _OtherSize:
            pixels.square = stored.square
            _fill(part, pixels, workers)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _fill(part: Path, pixels: _Pixels, workers: int) -> None:
    shape = _shape(pixels)
    dtype = np.dtype([("image", "u1", shape), ("size", "i4", (2,)), ("label", "i8")])
    needed, free = dtype.itemsize * len(pixels), shutil.disk_usage(part.parent).free
    if needed > free:  # a mapped file on a full disk would kill the process
        raise IECLError(
            f"data.views: batched needs {needed / 2**30:.1f} GiB for decoded images in "
            f"{part.parent}, which has {free / 2**30:.1f} GiB; per_image needs none"
        )
    print(f"decoding {len(pixels)} images, once, into {part.stem}", file=sys.stderr, flush=True)
    records = np.lib.format.open_memmap(part, "w+", dtype, (len(pixels),))
    loader: Any = DataLoader(pixels, batch_size=None, num_workers=workers, collate_fn=_unchanged)
    for index, item in enumerate(loader):
        if isinstance(item, IECLError):
            raise item
        image, height, width, label = item
        if image.shape != shape:
            raise _OtherSize
        records[index] = (image, (height, width), label)
    records.flush()
