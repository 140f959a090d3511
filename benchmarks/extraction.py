"""Extraction: how much of its time is the network's, and how many images a second it brings into a store.

    python benchmarks/extraction.py --data DATA/potholes [--kind vit_b] [--image-size 1024] [--images 4] [--dtype fp16]

The teacher has random weights; images are real. Processor time, so that a shared machine does not count: `network` is
that of the thread that runs the encoder, `all` that of the whole process with its readers and its writer. On a GPU
the wall clock counts instead. Goal on a CPU with vit_b at 1024: the network has 90 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from samlet.config import RunConfig
from samlet.extraction import Extractor, ShardName, job_of
from samlet.models import build_sam, save_sam_safetensors

GOAL = 0.9


class Timed(Extractor):
    """An extractor that counts what its encoder takes."""

    network = 0.0

    def encode(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Count, and encode."""
        start = clock(self.device)
        found = super().encode(pixels)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.network += clock(self.device) - start
        return found


def clock(device: torch.device) -> float:
    return time.perf_counter() if device.type == "cuda" else time.thread_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a data set")
    parser.add_argument("--kind", default="vit_b", choices=["vit_t", "vit_b", "vit_l", "vit_h"])
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--images", type=int, default=4, help="computed at most, in whole shards of about one")
    parser.add_argument("--dtype", default="fp16", choices=["fp32", "fp16", "int8"])
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        extractor = Timed(job(given, Path(folder)))
        shards = sorted((shard for shard in extractor.shards if extractor.missing(shard)), key=crowd(extractor))
        done, start, wall = 0, time.process_time(), time.perf_counter()
        for shard in shards:
            if done >= given.images:
                break
            done += len(extractor.missing(shard))
            extractor.extract(shard, lambda: None)
        spent = time.perf_counter() - wall if extractor.device.type == "cuda" else time.process_time() - start
    share = extractor.network / spent
    sys.stdout.write(
        f"{given.kind} at {given.image_size}, {done} images, {extractor.device.type}, {given.threads} threads: "
        f"{spent / done:.2f} s an image, the network has {100 * share:.1f} % "
        f"(goal {100 * GOAL:.0f} %: {'reached' if share >= GOAL else 'not reached'})\n"
    )


def crowd(extractor: Extractor) -> Callable[[ShardName], int]:
    return lambda shard: len(extractor.missing(shard))


def job(given: argparse.Namespace, folder: Path) -> str:
    torch.manual_seed(0)
    save_sam_safetensors(build_sam(given.kind, given.image_size), folder / "teacher.safetensors")
    plain = {
        "model": {"image_size": given.image_size},
        "dataset": {"root": str(given.data)},
        "augmentation": {"enable": False},
        "distillation": {"enable": True, "use_precomputed_features": True, "precomputed_root": str(folder)},
        "teachers": [{"name": "teacher", "checkpoint": str(folder / "teacher.safetensors")}],
        "extraction": {"dtype": given.dtype, "images_per_shard": 1},
    }
    config = RunConfig.model_validate_json(json.dumps(plain))
    return job_of(config, config.teachers[0], folder / "store")


if __name__ == "__main__":
    main()
