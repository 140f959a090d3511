"""Global attention of SAM's ViT: three ways to add decomposed relative positions, in time and memory.

    python benchmarks/attention.py [--kind vit_b] [--image-size 1024] [--device cpu] [--threads 1]

One block, batch 1, random weights. `whole bias`: the L x L bias of all heads at once; `indicators`: plain attention of
wider heads, what samlet does on a GPU; `samlet`: what it does here, on a CPU one head at a time. The limit is that of
the products alone, 4 H L^2 d operations at the machine's measured matmul rate.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from samlet.models.attention import attention_by_indicators, positioned_attention, summed_bias

SHAPES = {"vit_b": (12, 64), "vit_l": (16, 64), "vit_h": (16, 80)}
REPEATS = 5


def whole_bias(q: Tensor, k: Tensor, v: Tensor, along_h: Tensor, along_w: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=summed_bias(along_h, along_w))


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Processor time of this thread on a CPU; on a GPU the wall clock, once it has finished."""
    if device.type == "cpu":
        start = time.thread_time()
        run()
        return time.thread_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_extra(run: Callable[[], object], device: torch.device) -> str:
    """Most bytes at once beyond the inputs; only a GPU tells."""
    if device.type == "cpu":
        return "-"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=SHAPES, default="vit_b")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    device = torch.device(given.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    heads, width = SHAPES[given.kind]
    side = given.image_size // 16
    shapes = (width, width, width, side, side)
    inputs = [torch.randn(1, heads, side * side, last, device=device, dtype=dtype) for last in shapes]
    ways: dict[str, Callable[..., Tensor]] = {
        "whole bias": whole_bias,
        "indicators": attention_by_indicators,
        "samlet": positioned_attention,
    }
    one = torch.randn(2048, 2048, device=device, dtype=dtype)
    rate = 2 * 2048**3 / min(seconds(lambda: one @ one, device) for _ in range(REPEATS))
    limit = 4 * heads * side**4 * width / rate
    reference = whole_bias(*inputs)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            taken[name].append(seconds(partial(way, *inputs), device))
    lines = [
        f"{given.kind} at {given.image_size}, {device.type}, {dtype}, {torch.__version__}; "
        f"matmul {rate / 1e9:.0f} GFLOP/s, limit {1000 * limit:.1f} ms",
        "",
        "| way | ms | of whole bias | MiB more | difference |",
        "|---|---:|---:|---:|---:|",
    ]
    base = min(taken["whole bias"])
    for name, way in ways.items():
        best = min(taken[name])
        apart = (way(*inputs) - reference).abs().max() / reference.abs().max()
        extra = peak_extra(partial(way, *inputs), device)
        lines.append(f"| {name} | {1000 * best:.1f} | {best / base:.2f} | {extra} | {apart:.0e} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
