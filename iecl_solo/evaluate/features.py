"""Features of any folder of images by a trained backbone, in batches; it can be resumed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset

from iecl_solo.checks import installed
from iecl_solo.decoded import fingerprint
from iecl_solo.errors import IECLError, unknown_name
from iecl_solo.evaluate.load import Pretrained, load_backbone
from iecl_solo.files import replacing
from iecl_solo.images import image_files, load_image
from iecl_solo.solo.data import evaluation_transform
from iecl_solo.solo.host import Host

FORMATS = (".parquet", ".npy", ".csv")


class Images(Dataset):
    """Image files, each through a transform, without labels.

    Args:
        files: their paths, or whatever else ``read`` takes.
        transform: from an RGB image to a tensor (3, H, W).
        read: the RGB image of one of ``files``.
    """

    def __init__(
        self,
        files: Sequence[Any],
        transform: Callable[[Any], torch.Tensor],
        read: Callable[[Any], Any] = load_image,
    ) -> None:
        self.files, self.transform, self.read = files, transform, read

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.transform(self.read(self.files[i]))


def find_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is the fastest one that is here.

    Raises:
        IECLError: one line, when it is not here.

    >>> find_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise IECLError(f"--device {name}: it is not here ({reason})") from None
    return torch.device(name)


def check_file(to: Path) -> None:
    """Refuse a file that could not be written, before the work.

    Raises:
        IECLError: one line: it is a folder, its format is unknown, or parquet's library is missing.
    """
    if to.is_dir():
        raise IECLError(f"--to {to}: it is a folder, a file is needed")
    if to.suffix not in FORMATS:
        raise IECLError(f"--to {to}: {unknown_name('format', to.suffix, FORMATS)}")
    if to.suffix == ".parquet" and not installed("pyarrow"):
        raise IECLError(f"--to {to}: pyarrow is missing: pip install 'iecl-solo[parquet]'")
    with replacing(to.with_name(f"{to.name}.try")) as part:
        part.touch()
    to.with_name(f"{to.name}.try").unlink()


def write_features(to: Path, paths: list[str], features: np.ndarray) -> None:
    """Write features in the format that the file's name says.

    Args:
        to: parquet (columns ``path`` and ``features``, lists of float32), csv (``path``, ``f0``,
            ``f1``, ...), or npy ((N, d) float32; the paths are in ``FILE.paths.txt``).
        paths: of the images.
        features: (N, d).
    """
    with replacing(to) as part:
        if to.suffix == ".npy":
            with part.open("wb") as file:
                np.save(file, features)
        elif to.suffix == ".parquet":
            pd.DataFrame({"path": paths, "features": list(features)}).to_parquet(part)
        else:
            frame = pd.DataFrame(features, columns=[f"f{i}" for i in range(features.shape[1])])
            frame.insert(0, "path", paths)
            frame.to_csv(part, index=False)
    if to.suffix == ".npy":  # what the features are of, once they are there
        with replacing(to.with_name(f"{to.name}.paths.txt")) as names:
            names.write_text("".join(f"{path}\n" for path in paths))


class _Parts:
    """Batches of features beside the file; they count for these files and this checkpoint."""

    def __init__(
        self, to: Path, files: list[Path], root: Path, checkpoint: Path, batch_size: int
    ) -> None:
        of_model = (str(checkpoint.resolve()), checkpoint.stat().st_mtime_ns, batch_size)
        digest = fingerprint(files, root, str(root.resolve()), *of_model)
        self._folder = to.with_name(f"{to.name}.{digest}.parts")
        self._batch, self._total = batch_size, len(files)
        self._count = 0
        while self._file(self._count).is_file():
            self._count += 1

    def _file(self, i: int) -> Path:
        return self._folder / f"{i:06d}.npy"

    @property
    def done(self) -> int:
        """Images whose features are there."""
        return min(self._count * self._batch, self._total)

    def add(self, features: np.ndarray) -> None:
        """Keep a batch."""
        with replacing(self._file(self._count)) as part, part.open("wb") as file:
            np.save(file, features)
        self._count += 1

    def all(self) -> np.ndarray:
        """Every batch, in order."""
        return np.concatenate([np.load(self._file(i)) for i in range(self._count)])

    def remove(self) -> None:
        """Remove the batches, and what a kill in a write left, now that the file is there."""
        for file in self._folder.glob("[0-9]*.npy*"):
            file.unlink(missing_ok=True)
        self._folder.rmdir()


def embed_images(
    pretrained: Pretrained,
    host: Host,
    source: Path,
    to: Path,
    *,
    batch_size: int = 256,
    num_workers: int = 4,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[int, int]:
    """Write the features of every image below a folder; an interrupted call is resumed.

    Args:
        pretrained: the checkpoint; images are shown as in its evaluation.
        host: the solo-learn in use.
        source: a folder of images, however nested, in any mix of formats; or a text file of paths.
        to: see ``write_features``.
        batch_size: images at a time.
        num_workers: processes that read images.
        device: where the backbone runs.
        progress: told how many images are done, and of how many, after each batch.

    Returns:
        Number of images N and of features d.

    Raises:
        IECLError: one line, for a folder without images, an image that does not decode, or a file
            that cannot be written.
    """
    check_file(to)
    files = image_files(source)
    root = source if source.is_dir() else source.parent
    paths = [Path(os.path.relpath(file, root)).as_posix() for file in files]
    cfg = pretrained.cfg
    transform = evaluation_transform(host, cfg.data.dataset, cfg.augmentations[0].crop_size)
    backbone = load_backbone(pretrained, host).to(device).eval()
    parts = _Parts(to, files, root, pretrained.path, batch_size)
    left = Images(files[parts.done :], transform)
    with torch.inference_mode():
        for images in DataLoader(left, batch_size, num_workers=num_workers):
            parts.add(backbone(images.to(device)).float().cpu().numpy())
            progress(parts.done, len(paths))
    features = parts.all()
    write_features(to, paths, features)
    parts.remove()
    return features.shape
