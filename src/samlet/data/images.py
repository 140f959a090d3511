"""Reading pictures safely: whatever lies on disk becomes RGB bytes, always the same ones, or a `DataError`.

PIL alone decodes, from a short list of formats (so that no PostScript interpreter is started), and never a
picture that is far larger on the screen than on disk. OpenCV hands out half-grey pictures for truncated files.
"""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from samlet.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import UInt8

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
MAX_PIXELS = 89_478_485  # PIL's own line between a large photograph and a decompression bomb

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MIRRORS_X, _MIRRORS_Y = frozenset({2, 3, 6, 7}), frozenset({3, 4, 7, 8})  # turns after which an axis runs backwards
_SWAPS = frozenset({5, 6, 7, 8})  # turns that lay a picture on its side
_REDUCTIONS = (8, 4, 2)  # that libjpeg can decode at
# What PIL's decoders raise on damaged bytes; they have no common ancestor of their own.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
           MemoryError, struct.error, zlib.error)  # fmt: skip


class ImageInfo(NamedTuple):
    """What an image's header says; nothing is decoded for it."""

    size: tuple[int, int]  # (H, W), upright
    format: str
    mode: str
    turned: bool  # EXIF asks for a rotation or a mirroring


class Decoded(NamedTuple):
    """An image, upright; a large JPEG perhaps decoded smaller than it is."""

    pixels: UInt8[np.ndarray, "h w 3"]
    size: tuple[int, int]  # (H, W) of the original frame
    extent: tuple[float, float, float, float]  # (x0, y0, x1, y1) of the original frame in `pixels`

    def place(self, window: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        """A window (x0, y0, x1, y1) of the original frame in `pixels`."""
        (height, width), (left, top, right, bottom) = self.size, self.extent
        across, down = (right - left) / width, (bottom - top) / height
        x0, y0, x1, y1 = window
        return left + x0 * across, top + y0 * down, left + x1 * across, top + y1 * down


def is_image_name(path: Path) -> bool:
    """Whether a file is called like an image; upper case counts."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def contained(path: Path, root: Path) -> Path:
    """`path` if it really lies under `root` once `..` and symbolic links are followed.

    Raises:
        DataError: it does not, or its name holds a NUL.
    """
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (ValueError, OSError, RuntimeError) as error:
        raise DataError(f"{str(path)!r}: is not a usable path ({error}); rename it") from error
    if not inside:
        raise DataError(f"{path}: leads out of {root}; files of a data set must lie inside its folder")
    return path


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[Image.Image]:
    """An image whose header was read; whatever a decoder raises becomes one sentence that names the file.

    Remarks on metadata (odd EXIF) say nothing on the picture and are passed over.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            if path.is_dir():
                raise DataError(f"{path}: is a folder, where an {kind} is wanted; name the file")
            _refuse_empty(path)
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                _check_header(image, path)
                yield image
        except DataError:
            raise
        except FileNotFoundError as error:
            raise DataError(f"{path}: there is no such {kind}") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(f"{path}: is larger than {MAX_PIXELS} pixels; make it smaller") from error
        except _DAMAGE as error:
            reason = " ".join(str(error).split()).replace(f" '{path}'", "") or type(error).__name__
            raise DataError(f"{path}: cannot be read as an {kind} ({reason}); replace or remove it") from error


def _refuse_empty(path: Path) -> None:
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"{path}: is empty (0 bytes); replace or remove it")


def _check_header(image: Image.Image, path: Path) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{path}: is larger than {MAX_PIXELS} pixels; make it smaller")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a phone's MPO is a photograph with a preview behind it
        raise DataError(f"{path}: holds {frames} frames; save the one you mean as a single image")


def _check_png(path: Path) -> None:
    """Compare the checksum of every chunk, which PIL leaves out where pixels are stored."""
    content = memoryview(path.read_bytes())
    place = len(_PNG_SIGNATURE)
    while place + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        end = place + 8 + length
        if end + 4 > len(content):
            raise DataError(f"{path}: is cut off; replace or remove it")
        if zlib.crc32(content[place + 4 : end]) != struct.unpack_from(">I", content, end)[0]:
            raise DataError(f"{path}: is damaged (a checksum differs); replace or remove it")
        place = end + 4


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # PIL turns these itself while loading
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except _DAMAGE:  # damaged EXIF says nothing; the picture may be sound all the same
        return 1


def _sixteen_bit(image: Image.Image, path: Path) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise DataError(f"{path}: holds values outside 0..65535; save it with 8 or 16 bits a channel")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _load(image: Image.Image, path: Path) -> None:
    if image.format == "PNG":
        _check_png(path)
    image.load()


def to_rgb(image: Image.Image, path: Path) -> Image.Image:
    """Any of PIL's modes as RGB: 16 bits become value / 257, alpha is dropped, palettes are looked up.

    Raises:
        DataError: the mode holds no picture in a known range (floating point).
    """
    if image.mode == "F":
        raise DataError(f"{path}: holds floating-point values; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        image = _sixteen_bit(image, path)
    if image.mode in {"P", "PA", "LA", "La", "RGBa"}:
        image = image.convert("RGBA")
    return image.convert("RGB")


def read_image(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """An image file as RGB bytes, upright as its EXIF orientation says.

    Raises:
        DataError: missing, damaged, truncated, of a foreign format, animated, or a decompression bomb.
    """
    return read_picture(path, math.inf).pixels


def read_picture(path: Path, longest: float) -> Decoded:
    """An image file; a JPEG at 1/2, 1/4 or 1/8 of its size where its longest side then still has `longest` pixels.

    Raises:
        DataError: as `read_image`.
    """
    with _opened(path, "image") as image:
        orientation = _orientation(image)
        size = image.size
        reduction = _reduce(image, longest)
        _load(image, path)
        rgb = to_rgb(image, path)
        upright = rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb
        width, height = reversed(size) if orientation in _SWAPS else size
        x0 = upright.width - width / reduction if orientation in _MIRRORS_X else 0.0
        y0 = upright.height - height / reduction if orientation in _MIRRORS_Y else 0.0
        extent = (x0, y0, x0 + width / reduction, y0 + height / reduction)
        return Decoded(np.array(upright), (height, width), extent)


def _reduce(image: Image.Image, longest: float) -> int:
    """Have a JPEG decoded smaller, and how many times; its sides round up, the last pixel may be covered in part."""
    most = next((times for times in _REDUCTIONS if max(image.size) >= times * longest), 1)
    width, height = image.size
    drafted = image.draft(None, (max(1, width // most), max(1, height // most))) if most > 1 else None
    return 1 if drafted is None else round(width / drafted[1][2])


def probe_image(path: Path) -> ImageInfo:
    """Size, format and mode from an image's header.

    Raises:
        DataError: as `read_image`, as far as the header shows it.
    """
    with _opened(path, "image") as image:
        orientation = _orientation(image)
        height, width = image.size if orientation in _SWAPS else reversed(image.size)
        return ImageInfo((height, width), image.format or "?", image.mode, orientation in _TURNS)


def read_values(path: Path) -> UInt8[np.ndarray, "H W"] | np.ndarray:
    """A mask file's stored numbers: palette indices, grey values (8 or 16 bits), or (H, W, C) colours.

    Raises:
        DataError: as `read_image`.
    """
    with _opened(path, "image of a mask") as image:
        _load(image, path)
        if image.mode == "F":
            raise DataError(f"{path}: holds floating-point values; save it with 8 or 16 bits")
        return np.array(image)
