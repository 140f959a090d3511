"""Whatever lies on disk becomes upright RGB bytes, or an error that names the file."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samlet.data.images import contained, probe_image, read_image, read_picture
from samlet.errors import DataError
from tests.data.builders import picture, save


def test_lossless_formats_give_the_pixels_that_were_saved(tmp_path: Path) -> None:
    pixels = picture()
    for name in ("a.png", "a.bmp", "a.tif", "a.ppm", "A.PNG"):
        assert np.array_equal(read_image(save(pixels, tmp_path / name)), pixels)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
def test_every_mode_becomes_rgb_bytes(tmp_path: Path, mode: str) -> None:
    grey = np.repeat(picture()[..., :1], 3, axis=2)
    path = tmp_path / ("x.tif" if mode in {"CMYK", "YCbCr", "I"} else "x.png")
    if mode in {"I;16", "I"}:
        values = grey[..., 0].astype(np.uint16 if mode == "I;16" else np.int32) * 257
        Image.fromarray(values).save(path)
    else:
        Image.fromarray(grey).convert(mode).save(path)
    read = read_image(path)
    assert read.shape == grey.shape
    assert read.dtype == np.uint8
    assert probe_image(path).size == (48, 64)
    if mode not in {"1", "YCbCr", "P"}:
        assert np.array_equal(read, grey)


def test_transparent_palette_is_looked_up_without_a_warning(tmp_path: Path) -> None:
    image = Image.fromarray(picture()).quantize(16)
    image.save(tmp_path / "p.png", transparency=bytes([0] * 16))
    assert np.array_equal(read_image(tmp_path / "p.png"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = np.zeros((48, 64, 3), np.uint8)
    upright[:16, :16], upright[:16, 48:], upright[32:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # transpose that PIL must undo again
    stored = Image.fromarray(upright)
    if orientation in undo:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    stored.save(path, exif=exif, quality=95)
    read = read_image(path)
    assert probe_image(path).size == (48, 64) == read.shape[:2]
    assert np.abs(read.astype(int) - upright).mean() < 3


def photograph(path: Path, size: tuple[int, int], orientation: int = 1) -> Path:
    """A JPEG of smooth colours with a bright square at (0.25..0.5, 0.25..0.5) of its upright frame."""
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([40 * rows / height, 60 * columns / width, np.full(size, 30.0)], axis=-1).astype(np.uint8)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = 220
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # transpose that PIL must undo again
    stored = Image.fromarray(pixels)
    if orientation in undo:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    stored.save(path, "JPEG", exif=exif, quality=95, subsampling=0)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_smaller_decode_knows_where_the_original_lies(tmp_path: Path, orientation: int) -> None:
    size = (203, 301)  # no multiple of anything, so that the last pixels are covered in part
    path = photograph(tmp_path / "x.jpg", size, orientation)
    for longest, times in ((38, 4), (37, 8), (60, 4), (151, 1), (150, 2), (1000, 1)):
        picture = read_picture(path, longest)
        assert picture.size == size
        assert picture.pixels.shape[:2] == (-(-size[0] // times), -(-size[1] // times))
        x0, y0, x1, y1 = picture.place((75, 50, 150, 101))  # the square
        bright = picture.pixels.astype(float)[..., 2].clip(60, 190) - 60
        middle = [(bright.sum(axis=axis) @ (np.arange(bright.shape[1 - axis]) + 0.5)) / bright.sum() for axis in (0, 1)]
        assert middle == pytest.approx([(x0 + x1) / 2, (y0 + y1) / 2], abs=0.2)
        assert (x1 - x0) * times == pytest.approx(75)
        assert min(picture.extent) >= 0
    assert np.array_equal(read_picture(path, 151).pixels, read_image(path))


def test_only_jpegs_are_decoded_smaller(tmp_path: Path) -> None:
    for name in ("a.png", "a.tif", "a.bmp", "a.webp"):
        path = save(picture((48, 640)), tmp_path / name)
        found = read_picture(path, 8)
        assert found.size == found.pixels.shape[:2] == (48, 640)
        assert found.place((0.3, 1.7, 640, 48)) == (0.3, 1.7, 640, 48)
    strip = photograph(tmp_path / "strip.jpg", (5, 4000))
    assert read_picture(strip, 64).pixels.shape == (2, 1000, 3)  # at least one pixel, and no more than asked for


def _png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def damaged(tmp_path: Path) -> dict[str, Path]:
    """Files that no decoder may be trusted with, by what is wrong."""
    whole = io.BytesIO()
    Image.fromarray(picture((200, 200))).save(whole, "JPEG")
    png = io.BytesIO()
    Image.fromarray(picture()).save(png, "PNG")
    flipped = bytearray(png.getvalue())
    flipped[len(flipped) // 2] ^= 0xFF
    animated = [Image.fromarray(picture(seed=seed)) for seed in range(3)]
    contents = {
        "truncated.jpg": whole.getvalue()[: len(whole.getvalue()) // 2],
        "truncated.png": png.getvalue()[: len(png.getvalue()) // 2],
        "flipped.png": bytes(flipped),
        "empty.jpg": b"",
        "page.jpg": b"<!DOCTYPE html><html>404</html>",
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "bomb.png": _png_header(15_000, 15_000),
        "huge.png": _png_header(60_000, 60_000),
        "nothing.png": _png_header(0, 0),
    }
    paths = {}
    for name, content in contents.items():
        paths[name] = tmp_path / name
        paths[name].write_bytes(content)
    for name in ("animated.gif", "animated.png", "pages.tif"):
        paths[name] = tmp_path / name
        animated[0].save(paths[name], save_all=True, append_images=animated[1:])
    paths["float.tif"] = tmp_path / "float.tif"
    Image.fromarray(np.random.default_rng(0).random((8, 8)).astype(np.float32)).save(paths["float.tif"])
    paths["missing.png"] = tmp_path / "missing.png"
    return paths


def test_damaged_files_are_errors_that_name_them(tmp_path: Path) -> None:
    for name, path in damaged(tmp_path).items():
        try:
            read_image(path)
        except DataError as error:
            text = str(error)
        else:
            pytest.fail(f"{name} was read")
        assert text.startswith(str(path)), text
        assert "\n" not in text


def test_a_phone_photograph_with_a_preview_is_one_image(tmp_path: Path) -> None:
    path = tmp_path / "phone.jpg"
    frames = [Image.fromarray(picture(seed=seed)) for seed in range(2)]
    frames[0].save(path, format="MPO", save_all=True, append_images=frames[1:])
    assert read_image(path).shape == (48, 64, 3)


def test_paths_stay_inside_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    inside = save(picture(), root / "a" / "x.png")
    outside = save(picture(), tmp_path / "secret.png")
    os.symlink(outside, root / "link.png")
    os.symlink(inside, root / "fine.png")
    assert contained(inside, root) == inside
    assert contained(root / "fine.png", root)
    for path in (root / ".." / "secret.png", root / "link.png", outside, root / "a\0b.png"):
        with pytest.raises(DataError):
            contained(path, root)
