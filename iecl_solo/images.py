"""Images on disk: which files they are, and one of them as RGB."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from iecl_solo.errors import IECLError

#: What counts as an image, whatever the case of its letters; solo-learn's own list.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def load_image(source: str | os.PathLike[str] | BytesIO, name: str | None = None) -> Image.Image:
    """An image file as RGB, upright.

    As torchvision's loader has it (``convert("RGB")``), but for two things: an EXIF orientation is
    applied, and 16-bit and 32-bit grey values are scaled to 8 bits instead of clipped.

    Args:
        source: its path, or its bytes as a file.
        name: what an error calls it, if not by its path.

    Raises:
        IECLError: one line that names the file, when it does not decode or is too large.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "grey16.png"
        >>> Image.fromarray(np.full((2, 2), 0x8080, dtype=np.uint16)).save(path)
        >>> load_image(path).getpixel((0, 0))
        (128, 128, 128)
    """
    path = source if name is None else name
    try:
        opened = nullcontext(source) if isinstance(source, BytesIO) else open(source, "rb")  # noqa: SIM115
        with opened as file:
            image: Image.Image = Image.open(file)
            image.load()
        image = _upright(image)
        if image.mode.startswith(("I", "F")):
            image = _to_8_bits(image)
        return image.convert("RGB")
    except Image.DecompressionBombError:
        raise IECLError(
            f"image {path}: more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; scale it down"
        ) from None
    except (OSError, SyntaxError, ValueError) as error:  # PIL's decoders raise all three
        text = str(error).splitlines()
        reason = text[0] if text and "cannot identify" not in text[0] else "no image"
        raise IECLError(f"image {path}: it does not decode ({reason})") from None


#: What turns an image upright, by the EXIF tag 274, Orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image) -> Image.Image:
    # not ImageOps.exif_transpose: it writes the other tags anew, and fails at one of a wrong type
    try:
        turn = _TURNS.get(image.getexif().get(274, 1))
    except Exception:  # whatever a damaged block makes PIL raise; the pixels are there
        return image
    return image if turn is None else image.transpose(turn)


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    if image.mode != "F":
        scale = 1 / 257 if values.max(initial=0) < 2**16 else 255 / (2**31 - 1)
    else:  # floats come as 0 to 1 or as 0 to 255
        scale = 255.0 if values.max(initial=0) <= 1 else 1.0
    return Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))


def image_files(*sources: str | os.PathLike[str]) -> list[Path]:
    """The images of folders and of lists, each file once, in a fixed order.

    Args:
        sources: folders, searched at any depth (links are followed, loops are not), or text files
            with a path a line, relative to the text file's folder.

    Raises:
        IECLError: one line, for a source that is not there, holds no image, or lists one that is
            not there.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "2025" / "may").mkdir(parents=True)
        >>> Image.new("RGB", (2, 2)).save(folder / "2025" / "may" / "a.PNG")
        >>> [path.name for path in image_files(folder)]
        ['a.PNG']
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            images = list(_below(path))
        elif path.is_file():
            images = list(_listed(path))
        else:
            raise IECLError(f"{source}: no such folder or file")
        if not images:
            raise IECLError(f"{source}: it holds no image ({', '.join(SUFFIXES)})")
        found |= dict.fromkeys(images)
    return list(found)


def _below(folder: Path) -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        here = os.stat(root)
        if (here.st_dev, here.st_ino) in seen:  # a link back, or a second way to the same folder
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(root, name)


def in_loops(files: Iterable[str], root: str) -> set[str]:
    """Files that are reached through a link from below a folder back to it or above it.

    Args:
        files: paths below ``root``, as a search that follows links gives them.
        root: the folder that was searched; links above it do not matter.
    """
    looped = {root.rstrip("/"): False}

    def through(folder: str) -> bool:
        if folder not in looped:
            above = os.path.dirname(folder)
            back = Path(folder).is_symlink() and Path(above).resolve().is_relative_to(
                Path(folder).resolve()
            )
            looped[folder] = above != folder and (back or through(above))
        return looped[folder]

    return {file for file in files if through(os.path.dirname(file))}


def _listed(file: Path) -> Iterator[Path]:
    try:
        lines = file.read_text().splitlines()
    except UnicodeDecodeError:
        raise IECLError(f"{file}: a text file with a path a line is expected") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            path = file.parent / Path(line.strip()).expanduser()
            if not path.is_file():
                raise IECLError(f"{file}, line {number}: {line.strip()}: no such file")
            yield path
