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

from samlet.data.images import contained, probe_image, read_image
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
