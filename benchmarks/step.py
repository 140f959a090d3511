"""The training step, part by part: data, teacher, student, loss, backward, optimizer; and what the machine could do.

    python benchmarks/step.py [--image-sizes 1024 256] [--objects 8] [--teacher vit_t] [--json ...]

Data is the whole cost of one process, though loaders share it out and overlap it with the rest. The loss's own
backward is told from the networks'. Goals at 1024: nothing but the networks' own arithmetic takes more than a
tenth of the step; 8 objects an image cost at most 1.5x one; channels-last 1.3x the plain way on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import plain
from benchmarks.machine import Bench, Ceilings, Report, add_options, flops_of, start
from benchmarks.models import build, command
from samlet.data.batches import collate
from samlet.data.configs import AugmentationConfig, DatasetConfig, PromptConfig
from samlet.data.dataset import SegmentationDataset
from samlet.data.sampler import SampleKey
from samlet.data.synthetic import write_dataset
from samlet.distill.configs import DistillationConfig
from samlet.distill.objectives import build_objectives
from samlet.distill.teacher import LiveTeacher, TeacherTeam
from samlet.engine.parts import build_optimizer, named_parameters, set_trainable
from samlet.engine.step import Counts, TrainStep, count_images
from samlet.losses.configs import TaskLossConfig
from samlet.models import Sam
from samlet.types import Batch, ImageFeatures, MaskOutput, Prompts

PARTS = ["data", "teacher", "encode", "decode", "loss", "loss backward", "backward", "optimizer"]
NETWORKS = ("teacher", "encode", "decode", "backward")


class Training:
    """A student, its teacher and its data, and the clock that stops at the borders of the parts of a step."""

    def __init__(self, bench: Bench, options: argparse.Namespace, image_size: int, scenes: Path, objects: int) -> None:
        self.bench, self.image_size = bench, image_size
        self.dataset = dataset(scenes, image_size, objects)
        self.batch_size, self.epoch = options.batch, 0
        student = build("vit_t", image_size, options.tiny)
        self.step = TrainStep(student, TaskLossConfig(), build_objectives(DistillationConfig(enable=True)))
        set_trainable(student, (), "frozen")
        parameters = named_parameters(student)
        self.optimizer = build_optimizer(parameters, learning_rate=1e-5, weight_decay=0.01, betas=(0.9, 0.999))
        self.step.to(bench.device)
        teacher = build(options.teacher, image_size, options.tiny).to(bench.device)
        self.team = TeacherTeam([LiveTeacher("teacher", teacher, (), self.step.decoder_taps)], [1.0])
        self.teacher = teacher
        if options.compile:
            student.image_encoder.compile()
            teacher.image_encoder.compile()
        self.marks: list[tuple[str, float]] = []
        self._watch(student)

    def mark(self, part: str) -> None:
        """The part that ends now."""
        self.marks.append((part, self.bench.now()))

    def _watch(self, student: Sam) -> None:
        encode, decode, ask = student.encode, student.decode, self.teacher.decode

        def watched_encode(*args: Any, **kwargs: Any) -> ImageFeatures:
            features = encode(*args, **kwargs)
            self.mark("encode")
            return features

        def watched_decode(*args: Any, **kwargs: Any) -> MaskOutput:
            output = decode(*args, **kwargs)
            self.mark("decode")
            # Autograd runs the youngest nodes first: once this gradient is there, the loss's own backward is over.
            if output.low_res_logits.requires_grad:
                output.low_res_logits.register_hook(lambda _: self.mark("loss backward"))  # type: ignore[no-untyped-call]
            return output

        def watched_teacher(*args: Any, **kwargs: Any) -> MaskOutput:
            output = ask(*args, **kwargs)
            self.mark("teacher")
            return output

        self.teacher.decode = watched_teacher  # type: ignore[method-assign]
        student.encode = watched_encode  # type: ignore[method-assign]
        student.decode = watched_decode  # type: ignore[method-assign]

    def load(self) -> Batch:
        """The next micro-batch on the device: read, decode, augment, collate."""
        keys = [SampleKey(self.epoch, i % len(self.dataset)) for i in range(self.batch_size)]
        self.epoch += 1
        return to_device(collate([self.dataset[key] for key in keys]), self.bench.device)

    def run(self, batch: Batch | None = None) -> dict[str, float]:
        """One optimizer step; seconds of each part (data: where no batch is given)."""
        self.marks = [("begin", self.bench.now())]
        if batch is None:
            batch = self.load()
            self.mark("data")
        counts = Counts(*map(float, count_images([batch])))
        self.optimizer.zero_grad()
        with self.bench.autocast():
            lessons = self.team.teach(batch)
            self.mark("teacher")
            loss, _ = self.step(batch, lessons, counts)
        self.mark("loss")
        loss.backward()
        self.mark("backward")
        torch.nn.utils.clip_grad_norm_(self.step.student.parameters(), 1.0)
        self.optimizer.step()
        self.mark("optimizer")
        spent: dict[str, float] = {}
        for (_, begin), (part, end) in pairwise(self.marks):
            spent[part] = spent.get(part, 0.0) + end - begin
        return spent


def dataset(scenes: Path, image_size: int, objects: int) -> SegmentationDataset:
    """Drawn scenes of the input frame's size, augmented as in training."""
    root = scenes / str(image_size)
    if not root.exists():
        write_dataset(root, num_train=2, num_val=1, image_size=image_size, seed=0)
    return DatasetConfig(root=root, objects_per_image=objects).build_train(
        image_size=image_size, seed=0, prompts=PromptConfig(), augmentation=AugmentationConfig()
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch on the device, images channels-last."""
    prompts = batch.prompts._replace(
        **{name: value.to(device) for name, value in batch.prompts._asdict().items() if value is not None}
    )
    return batch._replace(
        pixels=batch.pixels.to(device).contiguous(memory_format=torch.channels_last),
        input_sizes=batch.input_sizes.to(device),
        prompts=prompts,
        masks=batch.masks.to(device),
        labelled=batch.labelled.to(device),
    )


def with_objects(batch: Batch, count: int) -> Batch:
    """The batch with `count` prompts an image, repeating or leaving out those it has."""
    images = batch.prompts.image_index
    rows = torch.cat([(images == i).nonzero()[:, 0].repeat(count)[:count] for i in range(len(batch.image_ids))])
    kept = {name: value[rows] for name, value in batch.prompts._asdict().items() if value is not None}
    return batch._replace(
        prompts=batch.prompts._replace(**kept), masks=batch.masks[rows], labelled=batch.labelled[rows]
    )


def flops_of_parts(training: Training, batch: Batch) -> dict[str, int]:
    """Operations of the networks' parts; the backward is twice the student's forward, as for every linear layer."""
    student = training.step.student
    with torch.no_grad():
        features = student.encode(batch.pixels)
        encode = flops_of(lambda: student.encode(batch.pixels))
        decode = flops_of(lambda: student.decode(features, batch.prompts))
        teacher = flops_of(lambda: training.team.teach(batch))
    return {"teacher": teacher, "encode": encode, "decode": decode, "backward": 2 * (encode + decode)}


def plain_encode(sam: Sam) -> Callable[..., ImageFeatures]:
    """`sam.encode` by the plain way, without taps."""

    def encode(pixels: torch.Tensor, *_: Any) -> ImageFeatures:
        return ImageFeatures(plain.encode(plain.plain_state(sam), sam.arch, pixels), {})

    return encode


def plain_answer(sam: Sam) -> Callable[..., MaskOutput]:
    """`sam.decode` by the plain way: image by image, a copy of the stream for every prompt, holes as any token."""

    def decode(features: ImageFeatures, prompts: Prompts, **_: Any) -> MaskOutput:
        encoder, state = sam.prompt_encoder, plain.plain_state(sam)
        grid = (features.embedding.shape[2], features.embedding.shape[3])
        masks, iou = [], []
        for image, embedding in enumerate(features.embedding):
            own = prompts.image_index == image
            sparse = encoder.sparse_embeddings(prompts.point_coords[own], prompts.point_labels[own])
            no_mask, image_pe = encoder.no_mask_embed.weight, encoder.get_dense_pe(grid)
            found = plain.decode(state, embedding[None], sparse, image_pe, no_mask, multimask=None)
            masks.append(found[0])
            iou.append(found[1])
        logits = torch.cat(masks)
        return MaskOutput(logits, torch.cat(iou), logits.new_zeros(len(logits), 4, 256), {})

    return decode


def compare_ways(training: Training, batch: Batch) -> dict[str, float]:
    """Milliseconds of a step by our way, with plain encoders, and with all of both networks plain."""
    models = (training.step.student, training.teacher)

    def plainly(*parts: str) -> Callable[[], object]:
        ways: dict[str, Callable[[Sam], object]] = {"encode": plain_encode, "decode": plain_answer}

        def work() -> None:
            own = {(model, part): getattr(model, part) for model, part in product(models, parts)}
            for model, part in own:
                setattr(model, part, ways[part](model))
            training.run(batch)
            for (model, part), way in own.items():
                setattr(model, part, way)

        return work

    works = {"plain": plainly("encode", "decode"), "plain encoders": plainly("encode")}
    return training.bench.interleaved({**works, "ours": lambda: training.run(batch)})


def parts_table(training: Training, batch: Batch, ceilings: Ceilings) -> tuple[list[list[object]], dict[str, float]]:
    """A row for each part (medians), and the same in milliseconds."""
    runs = [training.run() for _ in range(training.bench.repeats + 1)][1:]
    ms = {part: sorted(run[part] for run in runs)[len(runs) // 2] * 1e3 for part in PARTS}
    whole, flops = sum(ms.values()), flops_of_parts(training, batch)
    rows: list[list[object]] = []
    for part, spent in [*ms.items(), ("step", whole)]:
        operations = sum(flops.values()) if part == "step" else flops.get(part)
        limit = None if operations is None else ceilings.limit_ms(operations)
        giga = None if operations is None else operations / 1e9
        rows.append([part, spent, f"{100 * spent / whole:.1f} %", giga, limit])
    return rows, ms


def measure(report: Report, bench: Bench, ceilings: Ceilings, options: argparse.Namespace, size: int) -> None:
    """All tables and figures of one image size."""
    with tempfile.TemporaryDirectory() as folder:
        training = Training(bench, options, size, Path(folder), options.objects)
        batch = with_objects(training.load(), options.objects)
        single = with_objects(batch, 1)
        bench.peak_memory()
        rows, ms = parts_table(training, batch, ceilings)
        header = ["part", "ms", "share", "GFLOP", "limit ms"]
        report.table(f"step at {size}, batch {options.batch}, teacher {options.teacher}", header, rows)
        whole, others = sum(ms.values()), sum(spent for part, spent in ms.items() if part not in NETWORKS)
        figures: dict[str, Any] = {"share that is not the networks' arithmetic": others / whole}
        figures["largest part that is not the networks'"] = max(set(PARTS) - set(NETWORKS), key=lambda p: ms[p])
        figures["images/s"] = options.batch / whole * 1e3
        figures["peak GiB"] = bench.peak_memory()
        counts = bench.interleaved({"one": lambda: training.run(single), "many": lambda: training.run(batch)})
        figures[f"{options.objects} objects over one (goal at most 1.5)"] = counts["many"] / counts["one"]
        if not options.compile:
            ways = compare_ways(training, batch)
            figures["step over the plain networks (goal 1.3 on a CPU)"] = ways["plain"] / ways["ours"]
            figures["step over the plain encoders alone"] = ways["plain encoders"] / ways["ours"]
        report.figures |= {f"{size}: {name}": value for name, value in figures.items()}


def main(arguments: list[str] | None = None) -> int:
    """Measure and report; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add_options(parser)
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[1024, 256])
    parser.add_argument("--objects", type=int, default=8, help="prompts an image")
    parser.add_argument("--batch", type=int, default=1, help="images a step")
    parser.add_argument("--teacher", choices=["vit_t", "vit_b", "vit_l", "vit_h"], default="vit_t")
    options = parser.parse_args(arguments)
    bench = start(options)
    ceilings = bench.ceilings()
    report = Report("Training step", command(__file__, arguments), bench.facts(ceilings))
    for size in options.image_sizes:
        measure(report, bench, ceilings, options, size)
    report.finish(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
