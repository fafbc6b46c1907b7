"""Images in shards: webdataset's tar files, and Hugging Face data sets saved on disk.

Both are read by place rather than as a stream: a tar's members by their offsets, which are listed
once, and a saved data set through the map of its Arrow files. So an image has a number, and an
epoch is a function of seed and number as for a folder of images (``iecl_solo.order``): each image
once, the same batches on any number of processes, and a run that goes on in mid-epoch reads nothing
of what it has seen. What a stream is for, few files open and read nearly in sequence, comes by the
order: it mixes ``data.shuffle_shards`` shards at a time.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from iecl_solo.checks import installed
from iecl_solo.decoded import fingerprint, made_once
from iecl_solo.errors import IECLError, one_line
from iecl_solo.files import replacing
from iecl_solo.images import SUFFIXES, load_image

#: ``data.format``: the module that reads it, and the extra that brings it.
FORMATS = {"webdataset": ("webdataset", "shards"), "hf": ("datasets", "hf")}

#: Shards that are mixed at a time if ``data.shuffle_shards`` is not given: of ImageNet's usual
#: 140 MB each, what a machine's memory holds beside the training.
MIXED = 64

_ENTRY = np.dtype([("shard", "i4"), ("offset", "i8"), ("size", "i8"), ("label", "i8")])
_OPEN_FILES = 128


class Shards(Protocol):
    """Images in shards, by their number.

    Attributes:
        lengths: images of each shard, in the order of the images' numbers.
        labels: (N,) of integers, -1 where there is none.
        files: what the shards are.
    """

    lengths: list[int]
    labels: np.ndarray
    files: list[Path]

    def read(self, index: int) -> Image.Image:
        """The image of a number, as RGB."""
        ...


def open_shards(data_format: str, path: str) -> Shards:
    """The images of a training or validation path.

    Args:
        data_format: one of ``FORMATS``.
        path: of webdataset, ``DIR/train-{000000..000019}.tar``, a glob, or a folder of tar files;
            of Hugging Face, the folder that ``save_to_disk`` wrote.

    Raises:
        IECLError: one line: what is not there, not installed, or not of that format.
    """
    module, extra = FORMATS[data_format]
    if not installed(module):
        raise IECLError(
            f"data.format: {data_format} needs {module}: pip install 'iecl-solo[{extra}]'"
        )
    return Tars(path) if data_format == "webdataset" else Saved(path)


def tar_files(path: str) -> list[Path]:
    """The tar files that a path stands for, in order.

    Raises:
        IECLError: one line, for a file that is not there, or that is no plain tar.
    """
    from webdataset.shardlists import expand_urls

    folder = Path(path).expanduser()
    if folder.is_dir():
        found = sorted(folder.glob("*.tar"))
    else:
        listed = expand_urls(str(folder))
        found = [Path(f) for p in listed for f in (sorted(glob.glob(p)) if _is_glob(p) else [p])]
    if not found:
        raise IECLError(f"{path}: it holds no *.tar")
    for file in found:
        if not file.is_file():
            raise IECLError(f"{file}: no such file; shards are read from a mounted file system")
        if file.suffix != ".tar":
            raise IECLError(f"{file}: a plain .tar is expected, which is read by offset")
    return found


def _is_glob(path: str) -> bool:
    return any(sign in path for sign in "*?[")


class Tars:
    """webdataset's shards: samples are files of one stem, the image beside ``.cls``, its class.

    Where the images are within the tar files is listed once, into a file in their folder (in the
    user's cache where that may not be written); it is made anew when a shard changes.

    Args:
        path: as ``tar_files`` takes it.
    """

    def __init__(self, path: str) -> None:
        self.files = tar_files(path)
        root = self.files[0].parent
        # the folder may hold other shards, whose index stays: those of the validation images, say
        names = "\n".join(os.path.relpath(file, root) for file in self.files)
        stem = f".shards-of-{hashlib.sha256(os.fsencode(names)).hexdigest()[:8]}"
        key = fingerprint(self.files, root)
        index = made_once(root / "shards", stem, key, ".npy", self._list)
        self._entries: np.ndarray = np.load(index, mmap_mode="r")
        counts = np.bincount(self._entries["shard"], minlength=len(self.files))
        self.lengths, self.labels = counts.tolist(), self._entries["label"]
        self._handles: OrderedDict[int, int] = OrderedDict()

    def _list(self, index: Path) -> None:
        made = np.concatenate([_members(i, file) for i, file in enumerate(self.files)])
        with replacing(index) as part, part.open("wb") as file:
            np.save(file, made)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": OrderedDict()}

    def _handle(self, shard: int) -> int:
        if shard not in self._handles:
            if len(self._handles) >= _OPEN_FILES:
                os.close(self._handles.popitem(last=False)[1])
            self._handles[shard] = os.open(self.files[shard], os.O_RDONLY)
        self._handles.move_to_end(shard)
        return self._handles[shard]

    def read(self, index: int) -> Image.Image:
        shard, offset, size, _ = self._entries[index].tolist()
        data = os.pread(self._handle(shard), size, offset)  # of no file position: forks share it
        return load_image(io.BytesIO(data), f"{index} of {self.files[shard]}")


def _members(number: int, file: Path) -> np.ndarray:
    """Where a shard's images are, and their classes."""
    from webdataset.tariterators import base_plus_ext

    images: dict[str, tuple[int, int]] = {}
    classes: dict[str, int] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                key, ending = base_plus_ext(member.name)
                if key is None or not member.isfile():
                    continue
                if ending == "cls":
                    read = tar.extractfile(member)
                    assert read is not None
                    classes[key] = int(read.read())
                elif f".{ending.rpartition('.')[2].lower()}" in SUFFIXES:
                    images.setdefault(key, (member.offset_data, member.size))
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise IECLError(f"{file}: no shard of webdataset's can be read in it ({error})") from None
    if not images:
        raise IECLError(f"{file}: it holds no image ({', '.join(SUFFIXES)})")
    found = [(number, *place, classes.get(key, -1)) for key, place in images.items()]
    return np.array(found, _ENTRY)


class Saved:
    """A Hugging Face data set as ``save_to_disk`` leaves it: its image column, and its class.

    Args:
        path: the folder.
    """

    def __init__(self, path: str) -> None:
        import datasets

        try:
            found = datasets.load_from_disk(str(Path(path).expanduser()))
        except (FileNotFoundError, ValueError) as error:
            said = f"{path}: no data set saved by `datasets` ({one_line(error)})"
            raise IECLError(said) from None
        if isinstance(found, datasets.DatasetDict):
            splits = ", ".join(f"{path}/{name}" for name in found)
            raise IECLError(f"{path}: it holds several splits; give one of {splits}")
        kinds = found.features
        images = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
        if not images:
            raise IECLError(f"{path}: none of its columns is of images ({', '.join(kinds)} are)")
        classes = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
        classes += [
            name
            for name in ("label", "labels", "fine_label")
            if name in kinds and str(getattr(kinds[name], "dtype", "")).startswith(("int", "uint"))
        ]
        self.path, self.column = path, images[0]
        # bytes, to be decoded as all images are
        self.rows = found.cast_column(self.column, datasets.Image(decode=False))
        self.labels = (
            np.asarray(self.rows.with_format("numpy")[classes[0]][:], dtype=np.int64)
            if classes
            else np.full(len(found), -1)
        )
        self.files = [Path(file["filename"]) for file in found.cache_files]
        # `datasets` saves shards of one size, but for the last ones, which have a row less
        count = max(1, len(self.files))
        self.lengths = [len(part) for part in np.array_split(np.empty(len(found)), count)]

    def read(self, index: int) -> Image.Image:
        found = self.rows[index][self.column]
        source = found["path"] if found["bytes"] is None else io.BytesIO(found["bytes"])
        return load_image(source, f"{index} of {self.path}")


class ShardImages(Dataset):
    """Shards as a data set: ``(index, views, label)``, or ``(image, label)`` for evaluation.

    Args:
        shards: the images.
        transform: of an image; None leaves it alone.
        numbered: whether the index comes first, as in the hosts' pretraining.
        labelled: whether labels are given; 0 stands for all of them if not.
        mixed: shards that an epoch's order mixes at a time, 0 for all.

    Raises:
        IECLError: one line, where labels are wanted and a sample has none.
    """

    def __init__(
        self,
        shards: Shards,
        transform: Callable[[Image.Image], Any] | None,
        *,
        numbered: bool = False,
        labelled: bool = True,
        mixed: int = MIXED,
    ) -> None:
        self.shards, self.transform, self.numbered = shards, transform, numbered
        self.labelled, self.files = labelled, shards.files
        if labelled and len(shards.labels) and int(shards.labels.min()) < 0:
            raise IECLError(
                f"{shards.files[0]}: sample {int(shards.labels.argmin())} has no class; "
                "data.no_labels=true trains without"
            )
        #: read by ``iecl_solo.order``
        self.pieces = pieces(shards.lengths, mixed)

    @property
    def targets(self) -> list[int]:
        """The labels of all images."""
        return self.shards.labels.tolist() if self.labelled else [0] * len(self)

    def __len__(self) -> int:
        return len(self.shards.labels)

    def __getitem__(self, index: int) -> Any:
        image: Any = self.shards.read(index)
        image = image if self.transform is None else self.transform(image)
        label = int(self.shards.labels[index]) if self.labelled else 0
        return (index, image, label) if self.numbered else (image, label)


def pieces(lengths: Sequence[int], mixed: int) -> tuple[Sequence[int], int] | None:
    """What ``EpochOrder`` takes as ``pieces``; None where all shards are mixed anyway.

    >>> pieces([10, 10, 9], 2), pieces([10, 10, 9], 0)
    (([10, 10, 9], 2), None)
    """
    return (lengths, mixed) if 0 < mixed < len(lengths) else None


def class_count(shards: Shards) -> int:
    """The number of classes: one more than the largest label, at least one."""
    return max(1, int(shards.labels.max(initial=0)) + 1)
