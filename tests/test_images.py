"""Images of the real world: each decodes to what a person sees, or is named in one line."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iecl_solo.errors import IECLError
from iecl_solo.images import image_files, load_image

GRADIENT = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))


def grey(path: Path) -> np.ndarray:
    return np.asarray(load_image(path).convert("L"), dtype=int)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.fromarray(GRADIENT).convert(mode).save(path)
    image = load_image(path)
    assert image.mode == "RGB" and image.size == (64, 64)
    if mode != "1":
        assert abs(grey(path) - GRADIENT.astype(int)).max() <= 3


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path):
    Image.fromarray(GRADIENT.astype(np.uint16) * 257).save(tmp_path / "x.png")
    assert abs(grey(tmp_path / "x.png") - GRADIENT.astype(int)).max() <= 1


def test_floats_are_scaled(tmp_path: Path):
    Image.fromarray((GRADIENT / 255).astype(np.float32)).save(tmp_path / "x.tif")
    assert abs(grey(tmp_path / "x.tif") - GRADIENT.astype(int)).max() <= 1


def test_exif_orientation_is_applied(tmp_path: Path):
    image = Image.fromarray(GRADIENT[:32])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "x.jpg", exif=exif)
    assert load_image(tmp_path / "x.jpg").size == (32, 64)


@pytest.mark.parametrize("odd", [{282: "72"}, {256: "64"}, {274: "six"}])
def test_an_odd_tag_beside_the_orientation_is_no_matter(odd: dict[int, str], tmp_path: Path):
    """As some cameras write them: a resolution or a width that is a text."""
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(GRADIENT[:32]).save(tmp_path / "x.jpg", exif=_with_texts(exif, odd))
    turned = load_image(tmp_path / "x.jpg").size
    assert turned == ((64, 32) if 274 in odd else (32, 64))


def _with_texts(exif: Image.Exif, texts: dict[int, str]) -> bytes:
    """The EXIF block of PIL with more tags, of type ASCII: PIL itself writes the right type."""
    tags = {**{k: ("H", v) for k, v in exif.items()}, **{k: ("s", v) for k, v in texts.items()}}
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags))
    for tag, (kind, value) in sorted(tags.items()):
        data = value.encode() + b"\0" if kind == "s" else struct.pack("<H", value)
        assert len(data) <= 4  # in its place
        block += struct.pack("<HHI", tag, 2 if kind == "s" else 3, len(data) if kind == "s" else 1)
        block += data.ljust(4, b"\0")
    return block + struct.pack("<I", 0)


def test_an_rgb_jpeg_is_what_torchvision_reads(tmp_path: Path):
    from torchvision.datasets.folder import pil_loader

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.jpg")
    path = str(tmp_path / "x.jpg")
    assert np.array_equal(np.asarray(load_image(path)), np.asarray(pil_loader(path)))


def test_one_pixel_and_a_long_row(tmp_path: Path):
    for size in ((1, 1), (20_000, 3)):
        Image.new("RGB", size).save(tmp_path / "x.png")
        assert load_image(tmp_path / "x.png").size == size


def test_what_does_not_decode_is_named(tmp_path: Path):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(GRADIENT).save(whole)
    for name, content in {
        "empty.jpg": b"",
        "text.png": b"not an image",
        "truncated.jpg": whole.read_bytes()[:400],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(IECLError, match=name) as error:
            load_image(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_decompression_bomb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.new("L", (64, 64)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(IECLError, match=r"huge\.png: more than 2,000 pixels"):
        load_image(tmp_path / "huge.png")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("a.jpg", "2024/b.PNG", "2024/trip to Åland/c.webp", "2025/d.tiff"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    (tmp_path / "photos" / "._a.jpg").write_bytes(b"a file system's own")
    return tmp_path / "photos"


def test_any_nesting_and_any_format(photos: Path):
    assert [p.name for p in image_files(photos)] == ["a.jpg", "b.PNG", "c.webp", "d.tiff"]


def test_a_loop_of_links_counts_each_image_once(photos: Path):
    (photos / "2025" / "back").symlink_to(photos, target_is_directory=True)
    assert len(image_files(photos)) == 4


def test_a_linked_folder_is_followed(photos: Path, tmp_path: Path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "album").symlink_to(photos / "2024", target_is_directory=True)
    assert len(image_files(tmp_path / "links")) == 2


def test_several_folders_and_a_list(photos: Path, tmp_path: Path):
    listed = tmp_path / "list.txt"
    listed.write_text("photos/a.jpg\n\nphotos/2024/b.PNG\n")
    assert [p.name for p in image_files(listed)] == ["a.jpg", "b.PNG"]
    assert (
        len(image_files(photos / "2024", photos / "2025", photos / "2024" / "trip to Åland")) == 3
    )


def test_what_is_not_there_is_one_line(photos: Path, tmp_path: Path):
    (tmp_path / "none").mkdir()
    (tmp_path / "list.txt").write_text("photos/a.jpg\nphotos/gone.jpg\n")
    for source, said in {
        tmp_path / "nowhere": "no such folder",
        tmp_path / "none": "holds no image",
        tmp_path / "list.txt": "line 2: photos/gone.jpg",
        photos / "a.jpg": "a text file",
    }.items():
        with pytest.raises(IECLError, match=said):
            image_files(source)
