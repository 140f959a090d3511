"""Many prompts on one image: `Sam.decode` beside the plain way, which expands the image stream for every prompt.

    python benchmarks/decoder.py [--prompts 64] [--json benchmarks/results/decoder-cpu.json]

Goal: at least 2x over the plain way in one chunk, with the same outputs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import plain
from benchmarks.machine import Report, add_options, flops_of, largest_error, start
from benchmarks.models import build, command
from samlet.models import Sam, make_prompts
from samlet.types import ImageFeatures, MaskOutput, Prompts

GOAL = 2.0


def main(arguments: list[str] | None = None) -> int:
    """Measure and report; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--multimask", action="store_true", help="three masks a prompt in place of one")
    options = parser.parse_args(arguments)
    bench = start(options)
    ceilings = bench.ceilings()
    sam = build("vit_t", 64 if options.tiny else 1024, options.tiny).to(bench.device)
    features, prompts = random_image(sam), random_points(sam, options.prompts)
    state = plain.plain_state(sam)

    def reference() -> torch.Tensor:
        return plain_decode(sam, state, features, prompts, options.multimask)

    def one_by_one() -> torch.Tensor:
        rows = [slice(i, i + 1) for i in range(options.prompts)]
        parts = [Prompts(prompts.image_index[i], prompts.point_coords[i], prompts.point_labels[i]) for i in rows]
        return torch.cat([plain_decode(sam, state, features, part, options.multimask) for part in parts])

    def ours() -> MaskOutput:
        return sam.decode(features, prompts, multimask_output=options.multimask)

    with torch.no_grad(), bench.autocast():
        error = largest_error(ours().low_res_logits, reference())
        times = bench.interleaved({"plain, one chunk": reference, "plain, one by one": one_by_one, "Sam.decode": ours})
        flops = {"plain, one chunk": flops_of(reference), "Sam.decode": flops_of(ours)}
    report = Report("Many prompts on one image", command(__file__, arguments), bench.facts(ceilings))
    rows = [
        [name, ms, ms / options.prompts, times["plain, one chunk"] / ms]
        + ([flops[name] / 1e9, ceilings.limit_ms(flops[name])] if name in flops else [None, None])
        for name, ms in times.items()
    ]
    header = ["way", "ms", "ms a prompt", "speed-up", "GFLOP", "limit ms"]
    report.table(f"{options.prompts} prompts, image of {sam.image_size} pixels", header, rows)
    ratio = times["plain, one chunk"] / times["Sam.decode"]
    report.figures = {
        "speed-up over the plain way": ratio,
        "speed-up over the plain way one by one": times["plain, one by one"] / times["Sam.decode"],
        f"goal {GOAL}x": "reached" if ratio >= GOAL else "not reached",
        "largest difference of the logits, in units of the largest": error,
    }
    report.finish(options.json)
    return 0


def random_image(sam: Sam) -> ImageFeatures:
    """An embedding with the statistics that the neck's LayerNorm gives."""
    grid = sam.image_size // 16
    return ImageFeatures(torch.randn(1, 256, grid, grid, device=sam.pixel_mean.device), {})


def random_points(sam: Sam, count: int) -> Prompts:
    """One click each."""
    device = sam.pixel_mean.device
    points = torch.rand(count, 1, 2, device=device) * sam.image_size
    ones = torch.ones(count, 1, dtype=torch.int64, device=device)
    return make_prompts(torch.zeros(count, dtype=torch.int64, device=device), points, ones)


def plain_decode(
    sam: Sam, state: plain.State, features: ImageFeatures, prompts: Prompts, multimask: bool
) -> torch.Tensor:
    """The logits by the plain way, from the same prompt embeddings."""
    encoder, embedding = sam.prompt_encoder, features.embedding
    sparse = encoder.sparse_embeddings(prompts.point_coords, prompts.point_labels)
    image_pe = encoder.get_dense_pe((embedding.shape[2], embedding.shape[3]))
    no_mask = encoder.no_mask_embed.weight
    return plain.decode(state, embedding, sparse, image_pe, no_mask, multimask=multimask)[0]


if __name__ == "__main__":
    sys.exit(main())
