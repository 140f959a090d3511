"""A few made-up images with prompts, a tiny student and tiny teachers, for whatever compares the two."""

from __future__ import annotations

import json
from typing import Any

import torch

from samlet.distill.configs import TERMS, DistillationConfig
from samlet.distill.objectives import Objective, build_objectives
from samlet.distill.teacher import LiveTeacher, TeacherTeam
from samlet.engine.step import Counts, count_images
from samlet.losses.configs import TaskLossConfig
from samlet.models import Sam, build_sam
from samlet.types import Batch, Prompts
from tests.tiny import IMAGE_SIZE, STUDENT, TEACHER

NO_TASK = TaskLossConfig(focal=0.0, dice=0.0, iou=0.0)
SIZES = [(64, 64), (64, 40), (24, 64)]  # the second and third images are padded


def make_batch(*images: int, draw: int = 0) -> Batch:
    """Images by number, each the same in any company: a click with a hole beside it, and a box."""
    pixels, coords, low = [], [], IMAGE_SIZE // 4
    for image in images:
        generator = torch.Generator().manual_seed(image)
        shown = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        shown[:, SIZES[image][0] :] = 0
        shown[:, :, SIZES[image][1] :] = 0
        pixels.append(shown)
        coords.append(torch.rand(2, 2, 2, generator=generator) * 24)
    count = 2 * len(images)
    prompts = Prompts(
        torch.arange(len(images)).repeat_interleave(2),
        torch.cat(coords),
        torch.tensor([[1, -1], [2, 3]]).repeat(len(images), 1),
        absent=torch.tensor([[False, True], [False, False]]).repeat(len(images), 1),
    )
    return Batch(
        pixels=torch.stack(pixels),
        input_sizes=torch.tensor([SIZES[image] for image in images]),
        prompts=prompts,
        masks=torch.zeros(count, low, low),
        labelled=torch.zeros(count, dtype=torch.bool),
        image_ids=tuple(f"image {image}" for image in images),
        draw=draw,
    )


def make_student(seed: int = 0) -> Sam:
    torch.manual_seed(seed)
    return build_sam("vit_t", IMAGE_SIZE, **STUDENT).eval()


def make_sam_teacher(seed: int = 1, image_size: int = IMAGE_SIZE, **sizes: Any) -> Sam:
    torch.manual_seed(seed)
    return build_sam("vit_b", image_size, **{**TEACHER, **sizes})


def team_of(objectives: tuple[Objective, ...], *sams: Sam) -> TeacherTeam:
    """Teachers that tap what the objectives ask for, all with the same share."""
    encoder_taps = sorted({tap for objective in objectives for tap in objective.teacher_taps})
    decoder_taps = sorted({tap for objective in objectives for tap in objective.decoder_taps})
    teachers = [LiveTeacher(f"teacher.{i}", sam, encoder_taps, decoder_taps) for i, sam in enumerate(sams)]
    return TeacherTeam(teachers, [1 / len(sams)] * len(sams))


def objectives_of(**terms: dict[str, Any]) -> tuple[Objective, ...]:
    """These terms alone."""
    blocks: dict[str, Any] = {name: {"enable": False} for name in TERMS}
    blocks |= {name: {"enable": True, **settings} for name, settings in terms.items()}
    return build_objectives(DistillationConfig.model_validate_json(json.dumps({"enable": True, **blocks})))


def counts_of(batch: Batch) -> Counts:
    return Counts(*map(float, count_images([batch])))
