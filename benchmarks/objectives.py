"""What each distillation term adds to a training step of the student: time, and tensors alive at the peak.

    python benchmarks/objectives.py [--image-size 1024] [--prompts 8] [--repeats 3] [--json ...]

The teacher is not run: its taps are random tensors of ViT-B's shapes, its answers those of a fresh decoder. A step is
the student's forward, the task loss, one term with all that is tapped and projected for it, and the backward. Memory
counts the tensors that live at once, on any device, without what a kernel needs for itself.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import Bench, Report, add_options, start
from benchmarks.models import build, command
from samlet.distill.configs import TERMS, DistillationConfig
from samlet.distill.layers import PLACES
from samlet.distill.objectives import Objective, build_objectives
from samlet.distill.projections import build_projections, fit_projections
from samlet.distill.teacher import TeacherTeam
from samlet.engine.parts import set_trainable
from samlet.engine.step import Counts, TrainStep
from samlet.losses.configs import TaskLossConfig
from samlet.models import Sam, make_prompts
from samlet.types import Batch, ImageFeatures, MaskOutput, Prompts

CHANNELS, HEADS = 768, 12  # of ViT-B
TWO_BLOCKS: dict[str, Any] = {"student_tap": "blocks.-2", "teacher_tap": "blocks.-2"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "encoder_patch": ("encoder_patch", {}),
    "encoder_patch of blocks, learnt": ("encoder_patch", {**TWO_BLOCKS, "projection": "learnt"}),
    "encoder_patch of blocks, pca": ("encoder_patch", {**TWO_BLOCKS, "projection": "pca"}),
    "prompt_embed, layer 1": ("prompt_embed", {"layer": 1}),
    "decoder_mask_token": ("decoder_mask_token", {}),
    "dense_mask_logits": ("dense_mask_logits", {}),
    "encoder_matching, 4 layers": ("encoder_matching", {}),
    "decoder_matching": ("decoder_matching", {}),
    "attention_matching, decoder": ("attention_matching", {}),
    "attention_matching, 2 layers of the encoder": (
        "attention_matching",
        {"decoder": (), "encoder": 2, "resample": True},
    ),
    "rkd, 64 patches": ("rkd", {}),
}


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors made under it that are alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


class RandomTeacher:
    """Taps of ViT-B's shapes without ViT-B's arithmetic; each is drawn once."""

    def __init__(self, student: Sam, objectives: tuple[Objective, ...], batch: Batch) -> None:
        self.name, self.image_size = "teacher", student.image_size
        self.grid, self.device = student.image_size // 16, batch.pixels.device
        embedding = self._noise(len(batch.image_ids), 256, self.grid, self.grid)
        wanted = {tap for objective in objectives for tap in objective.teacher_taps}
        self.features = ImageFeatures(embedding, {tap: self._tap(tap, len(batch.image_ids)) for tap in wanted})
        decoder_taps = tuple({tap for objective in objectives for tap in objective.decoder_taps})
        with torch.no_grad():
            self.output = student.decode(self.features, batch.prompts, taps=decoder_taps)

    def _noise(self, *shape: int) -> torch.Tensor:
        noise: torch.Tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        return noise

    def _tap(self, name: str, images: int) -> torch.Tensor:
        if name.startswith("attention."):
            rows = self._noise(images, HEADS, PLACES, self.grid**2).softmax(dim=-1)
            return torch.unflatten(rows, 3, (self.grid, self.grid))
        return self._noise(images, CHANNELS, self.grid, self.grid)

    def encode(self, batch: Batch) -> ImageFeatures:
        """The same features for every batch."""
        return self.features

    def decode(self, features: ImageFeatures, prompts: Prompts) -> MaskOutput:
        """The same answers for all prompts."""
        return self.output


class Cost(NamedTuple):
    """A student's step with one term, or with none."""

    run: Callable[[], object]
    peak: int  # bytes


def random_batch(bench: Bench, image_size: int, prompts: int) -> Batch:
    """One image that fills the input frame, and single clicks on it."""
    low = image_size // 4
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(prompts, 1, 2, generator=generator) * image_size
    asked = make_prompts(torch.zeros(prompts, dtype=torch.long), points, torch.ones(prompts, 1, dtype=torch.long))
    held = {name: value.to(bench.device) for name, value in asked._asdict().items() if value is not None}
    pixels = torch.randn(1, 3, image_size, image_size, generator=generator).to(bench.device)
    return Batch(
        pixels=pixels.contiguous(memory_format=torch.channels_last),
        input_sizes=torch.tensor([[image_size, image_size]], device=bench.device),
        prompts=asked._replace(**held),
        masks=(torch.rand(prompts, low, low, generator=generator) > 0.5).float().to(bench.device),
        labelled=torch.ones(prompts, dtype=torch.bool, device=bench.device),
        image_ids=("image",),
    )


def cost_of(bench: Bench, student: Sam, batch: Batch, terms: dict[str, dict[str, Any]]) -> Cost:
    """A step with these terms, and the tensors that it holds at its peak."""
    blocks = {name: {"enable": name in terms, **terms.get(name, {})} for name in TERMS}
    objectives = build_objectives(DistillationConfig.model_validate({"enable": bool(terms), **blocks}))
    team = TeacherTeam([RandomTeacher(student, objectives, batch)], [1.0])
    projections = build_projections(objectives, student, team, [batch])
    fit_projections(projections, objectives, team, [batch])
    step = TrainStep(student, TaskLossConfig(), objectives, projections=projections).to(bench.device)
    lessons = team.teach(batch) if objectives else ()

    def run() -> None:
        step.zero_grad()
        with bench.autocast():
            loss, _ = step(batch, lessons, Counts(1, 1, 1))
        loss.backward()

    run()
    step.zero_grad()
    with LiveTensors() as tensors:
        run()
    return Cost(run, tensors.peak)


def main(arguments: list[str] | None = None) -> int:
    """Measure and report; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=8)
    options = parser.parse_args(arguments)
    bench = start(options)
    report = Report("Distillation terms", command(__file__, arguments), bench.facts(bench.ceilings()))
    student = build("vit_t", options.image_size, options.tiny).to(bench.device)
    set_trainable(student, (), "frozen")
    batch = random_batch(bench, options.image_size, options.prompts)
    costs = {"none": cost_of(bench, student, batch, {})}
    for name, (term, settings) in CASES.items():
        costs[name] = cost_of(bench, student, batch, {term: settings})
    times = bench.interleaved({name: cost.run for name, cost in costs.items()})
    alone = costs["none"]
    report.table(
        f"one term beside the task loss, vit_t at {options.image_size}, {options.prompts} prompts",
        ["term", "ms added", "of the step", "MB added at the peak"],
        [
            [name, ms - times["none"], f"{100 * (ms / times['none'] - 1):.1f} %", (costs[name].peak - alone.peak) / 1e6]
            for name, ms in times.items()
            if name != "none"
        ],
    )
    report.figures |= {"step without a term, ms": times["none"], "its tensors at the peak, MB": alone.peak / 1e6}
    report.finish(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
