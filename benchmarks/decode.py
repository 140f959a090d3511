"""Decoding a 12-megapixel JPEG in full and smaller: processor time, grey levels, and what an encoder makes of it.

    python benchmarks/decode.py [--weights RUN ...] [--image-size 1024] [--repeats 9]

The picture is drawn: smooth noise with overlaid discs, 4000 x 3000, quality 90, chroma at half resolution. Embeddings
are a vit_t's with random weights, and those of the given runs or weights.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from samlet.data.images import Decoded, read_picture
from samlet.data.transforms import transform_image, whole
from samlet.frames import normalize_and_pad
from samlet.models import Sam, build_sam, load_sam

WIDTH, HEIGHT = 4000, 3000


def draw(path: Path) -> None:
    """Noise of several scales, sensor noise, and two hundred hard-edged discs."""
    rng = np.random.default_rng(0)
    pixels = np.full((HEIGHT, WIDTH, 3), 110, np.float32)
    for cells, strength in ((4, 40), (16, 25), (64, 12), (256, 8), (1000, 5)):
        coarse = rng.normal(0, strength, (cells * 3 // 4, cells, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(coarse[..., channel]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(layer)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    for x, y, radius in rng.uniform((0, 0, 20), (WIDTH, HEIGHT, 200), (200, 3)):
        part = np.s_[max(0, int(y - radius)) : int(y + radius) + 1, max(0, int(x - radius)) : int(x + radius) + 1]
        inside = (columns[part] - x) ** 2 + (rows[part] - y) ** 2 <= radius**2
        pixels[part] += inside[..., None] * rng.uniform(-90, 90, 3).astype(np.float32)
    pixels += rng.normal(0, 3, pixels.shape).astype(np.float32)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Processor time, the median."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1000 * statistics.median(times)


def resized(picture: Decoded, image_size: int) -> np.ndarray:
    """The whole picture in the input frame."""
    geometry = whole(picture.size, image_size)
    return transform_image(picture.pixels, geometry._replace(window=picture.place(geometry.window)))


@torch.no_grad()
def difference_of_embeddings(sam: Sam, full: np.ndarray, scaled: np.ndarray, image_size: int) -> float:
    """rms(scaled - full) / rms(full)."""
    one, other = (sam.encode(normalize_and_pad(found, image_size)[None]).embedding for found in (full, scaled))
    return float((one - other).square().mean().sqrt() / one.square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, nargs="*", default=[], help="runs or checkpoints to encode with, too")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.manual_seed(0)
    models = {"vit_t, random weights": build_sam("vit_t", options.image_size)}
    models |= {str(path): load_sam(path, image_size=options.image_size) for path in options.weights}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photograph.jpg"
        draw(path)
        print(f"{WIDTH} x {HEIGHT}, {path.stat().st_size / 1e6:.1f} MB, to {options.image_size}")
        images = {}
        for name, longest in (("full", math.inf), ("scaled", float(options.image_size))):
            picture = read_picture(path, longest)
            images[name] = resized(picture, options.image_size)
            decode = milliseconds(partial(read_picture, path, longest), options.repeats)
            resize = milliseconds(partial(resized, picture, options.image_size), options.repeats)
            print(f"{name}: {picture.pixels.shape[1]} x {picture.pixels.shape[0]}, {decode:.0f} + {resize:.0f} ms")
    apart = np.abs(images["full"].astype(int) - images["scaled"])
    print(f"grey levels apart: mean {apart.mean():.2f}, 99 % {np.percentile(apart, 99):.0f}, largest {apart.max()}")
    shifted = np.abs(images["full"][:, 1:].astype(int) - images["full"][:, :-1]).mean()
    print(f"for comparison, a shift by one pixel: mean {shifted:.2f}")
    for name, sam in models.items():
        found = difference_of_embeddings(sam.eval(), images["full"], images["scaled"], options.image_size)
        print(f"{name}: embedding, relative rms {found:.4f}")


if __name__ == "__main__":
    main()
