"""Encode: `Sam.encode` beside the plain way of writing the same network, and beside what the machine could do.

    python benchmarks/encoder.py [--kinds vit_t vit_b] [--compile] [--json benchmarks/results/encoder-cpu.json]

Plain: channels-first, BatchNorm apart, softmax written out, padded windows computed. Goal for vit_t: at least 1.3x on a
CPU. On CUDA the default is vit_t to vit_h in bf16.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import plain
from benchmarks.machine import Bench, Ceilings, Report, add_options, flops_of, largest_error, start
from benchmarks.models import build, command

GOAL = 1.3
KINDS = {"cpu": ["vit_t", "vit_b"], "cuda": ["vit_t", "vit_b", "vit_l", "vit_h"]}
HEADER = ["kind", "plain ms", "ours ms", "speed-up", "images/s", "GFLOP", "limit ms", "of limit", "GiB", "difference"]


def main(arguments: list[str] | None = None) -> int:
    """Measure and report; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--kinds", nargs="+", choices=KINDS["cuda"], help="default: what the device can carry")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args(arguments)
    bench = start(options)
    ceilings = bench.ceilings()
    report = Report("Encode", command(__file__, arguments), bench.facts(ceilings))
    kinds = options.kinds or KINDS[bench.device.type]
    rows = [measure(kind, bench, ceilings, options) for kind in kinds]
    report.table(f"batch {options.batch}, {options.image_size} pixels, compile {options.compile}", HEADER, rows)
    report.figures = {f"{row[0]}: speed-up over the plain way": row[3] for row in rows}
    if "vit_t" in kinds:
        ratio = float(str(rows[kinds.index("vit_t")][3]))
        report.figures[f"vit_t, goal {GOAL}x"] = "reached" if ratio >= GOAL else "not reached"
    report.finish(options.json)
    return 0


@torch.no_grad()
def measure(kind: str, bench: Bench, ceilings: Ceilings, options: argparse.Namespace) -> list[object]:
    """One row of the table."""
    sam = build(kind, options.image_size, options.tiny).to(bench.device)
    pixels = torch.randn(options.batch, 3, options.image_size, options.image_size, device=bench.device)
    state = plain.plain_state(sam)
    last = pixels.contiguous(memory_format=torch.channels_last)
    with bench.autocast():
        flops = flops_of(lambda: sam.encode(last))
        if options.compile:
            sam.image_encoder.compile()
        error = largest_error(sam.encode(last).embedding, plain.encode(state, sam.arch, pixels))
        times = bench.interleaved(
            {"plain": lambda: plain.encode(state, sam.arch, pixels), "ours": lambda: sam.encode(last)}
        )
        bench.peak_memory()
        sam.encode(last)
    limit, ours = ceilings.limit_ms(flops), times["ours"]
    rate, share = options.batch / ours * 1e3, limit / ours
    ratio = times["plain"] / ours
    return [kind, times["plain"], ours, ratio, rate, flops / 1e9, limit, share, bench.peak_memory(), error]


if __name__ == "__main__":
    sys.exit(main())
