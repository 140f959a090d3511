"""Reading and writing stored features: dtypes and forms, with every check; and the usual ways that they replace.

    python benchmarks/store.py [--maps 64] [--side 64] [--folder FOLDER] [--clock wall] [--json ...]

A map is 256 x side x side. Files are read warm, from the page cache. `read` maps and checks (dtype, shape, sha256);
`decoded` brings a map to float32 besides; `sha256` alone is what the check must cost. The last rows hand out float32
unchecked: numpy.load of an fp16 file with numpy's cast, mapped with torch's cast, and safetensors' own load_file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from samlet.distill.store import Identity, Shard, StoreReader, decoded, open_store

NAMES = ["embedding"]


def identity(dtype: str) -> Identity:
    fields = {
        "teacher": "random", "teacher_kind": "vit_h", "teacher_sha256": "0" * 64, "teacher_image_size": 1024,
        "image_size": 1024, "precision": "fp32", "taps": [], "dtype": dtype, "preprocessing": "0" * 64,
        "augmentation": None, "variants": 1, "outputs": None, "shards": 1, "samlet": "0",
    }  # fmt: skip
    return Identity.model_validate_json(json.dumps(fields))


def write(root: Path, dtype: str, maps: list[np.ndarray], *, pack: bool) -> None:
    kind = open_store(root, identity(dtype), lambda place: place.write_bytes(b"none"))
    shard = Shard(root, "train", 0, kind)
    for number, values in enumerate(maps):
        shard.add(f"{number:05d}", 0, "", "", {NAMES[0]: values})
    shard.finish(pack=pack)


def rate(work: Callable[[], object], count: int, repeats: int, clock: Callable[[], float]) -> float:
    """Maps a second, the best of some repeats: other programs only ever slow one down."""
    times = []
    for _ in range(repeats):
        start = clock()
        work()
        times.append(clock() - start)
    return count / min(times)


def rates_of_a_form(root: Path, repeats: int, clock: Callable[[], float]) -> tuple[float, float, float]:
    """Maps a second: sha256 alone, read, read and decoded."""
    reader = StoreReader(root, "train")
    keys = list(reader.entries)
    held = [reader.read(*key, NAMES)[NAMES[0]].numpy().data for key in keys[:4]]
    works: list[Callable[[], object]] = [
        lambda: [hashlib.sha256(values).digest() for values in held],
        lambda: [reader.read(*key, NAMES) for key in keys],
        lambda: [decoded(reader.read(*key, NAMES)) for key in keys],
    ]
    sha, read, cast = (
        rate(work, count, repeats, clock) for work, count in zip(works, (4, len(keys), len(keys)), strict=True)
    )
    return sha, read, cast


def usual_ways(npy: Path, pack: Path, repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Maps a second of fp16 files to float32, unchecked."""
    files = sorted((npy / "train").glob("*.npy"))
    packs = next((pack / "train" / "packs").glob("*.safetensors"))
    ways: dict[str, Callable[[], object]] = {
        "numpy.load and numpy's cast": lambda: [torch.from_numpy(np.load(f).astype(np.float32)) for f in files],
        "numpy.load mapped and torch's cast": lambda: [
            torch.from_numpy(np.load(f, mmap_mode="c")).float() for f in files
        ],
        "safetensors load_file and torch's cast": lambda: [value.float() for value in load_file(packs).values()],
    }
    return {name: rate(work, len(files), repeats, clock) for name, work in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--maps", type=int, default=64)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the stores are written; a temporary folder by default")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time of one thread")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.thread_time if options.clock == "cpu" else time.perf_counter
    chance = np.random.default_rng(0)
    maps = [chance.normal(size=(256, options.side, options.side)).astype(np.float32) for _ in range(options.maps)]
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        for dtype in ("fp32", "fp16", "int8"):
            for form in ("npy", "pack"):
                root = Path(place, f"{dtype}-{form}")
                start = clock()
                write(root, dtype, maps, pack=form == "pack")
                written = len(maps) / (clock() - start)
                sha, read, cast = rates_of_a_form(root, options.repeats, clock)
                row = {"write": written, "sha256": sha, "read": read, "read, decoded": cast}
                result[f"{dtype} {form}"] = row
        for name, value in usual_ways(
            Path(place, "fp16-npy"), Path(place, "fp16-pack"), options.repeats, clock
        ).items():
            result[name] = {"read, decoded": value}
    for name, row in result.items():
        print(f"{name:40s}" + "".join(f"  {key} {value:.0f}" for key, value in row.items()), "maps/s")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
