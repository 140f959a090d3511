"""Teachers of another size, precision and place: the same lesson in the student's frame."""

from __future__ import annotations

import pytest
import torch

from samlet.distill.frames import features_at, output_at, prompts_at
from samlet.distill.teacher import LiveTeacher, TeacherTeam, lesson
from samlet.models import Sam, build_sam
from samlet.types import POSITIVE, Batch, ImageFeatures, MaskOutput, Prompts
from tests.tiny import IMAGE_SIZE, STUDENT, TEACHER

LARGER = 2 * IMAGE_SIZE


@pytest.fixture(scope="module")
def batch() -> Batch:
    torch.manual_seed(3)
    grid = IMAGE_SIZE // 4
    prompts = Prompts(
        torch.tensor([0, 1]), torch.tensor([[[10.0, 20.0]], [[40.5, 3.0]]]), torch.tensor([[POSITIVE]] * 2)
    )
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    sizes = torch.full((2, 2), IMAGE_SIZE)
    return Batch(pixels, sizes, prompts, torch.zeros(2, grid, grid), torch.tensor([True, True]), ("a", "b"))


def make(image_size: int = IMAGE_SIZE) -> Sam:
    torch.manual_seed(1)
    return build_sam("vit_b", image_size, **TEACHER)


def shapes(features: ImageFeatures, output: MaskOutput) -> list[tuple[int, ...]]:
    maps = [features.embedding, *features.taps.values(), output.low_res_logits, output.mask_tokens]
    return [tuple(value.shape) for value in (*maps, *output.taps.values())]


def test_a_larger_teacher_answers_in_the_students_frame(batch: Batch) -> None:
    own, larger = (
        lesson(LiveTeacher("T", make(size), ("blocks.-1",), ("prompted.1",)), 1.0, batch)
        for size in (IMAGE_SIZE, LARGER)
    )
    assert shapes(larger.features, larger.answer(batch.prompts)) == shapes(own.features, own.answer(batch.prompts))


def test_prompts_keep_their_place_in_another_frame(batch: Batch) -> None:
    there = prompts_at(batch.prompts, IMAGE_SIZE, LARGER)
    torch.testing.assert_close((there.point_coords + 0.5) / LARGER, (batch.prompts.point_coords + 0.5) / IMAGE_SIZE)
    back = prompts_at(there, LARGER, IMAGE_SIZE)
    torch.testing.assert_close(back.point_coords, batch.prompts.point_coords)


def test_maps_keep_their_place_in_another_frame() -> None:
    side = IMAGE_SIZE // 4
    logits = torch.full((1, 4, 2 * side, 2 * side), -4.0)
    logits[..., : side // 2, side:] = 4.0
    output = MaskOutput(logits, torch.zeros(1, 4), torch.zeros(1, 4, 256), {})
    seen = output_at(output, LARGER, IMAGE_SIZE).low_res_logits[0, 0] > 0
    expected = torch.zeros(side, side, dtype=torch.bool)
    expected[: side // 4, side // 2 :] = True
    assert torch.equal(seen, expected)


def test_features_of_the_same_size_are_left_alone(batch: Batch) -> None:
    features = ImageFeatures(torch.randn(1, 256, 4, 4), {"blocks.0": torch.randn(1, 256, 8, 8)})
    assert features_at(features, IMAGE_SIZE, IMAGE_SIZE) is features
    smaller = features_at(features, LARGER, IMAGE_SIZE)
    assert smaller.taps["blocks.0"].shape[-1] == 4


def test_a_teacher_that_waits_in_main_memory_says_the_same(batch: Batch) -> None:
    there, away = LiveTeacher("there", make()), LiveTeacher("away", make(), offload=True)
    torch.testing.assert_close(away.encode(batch).embedding, there.encode(batch).embedding)
    assert {parameter.device.type for parameter in away.sam.image_encoder.parameters()} == {"cpu"}


@pytest.mark.parametrize("kind", ["vit_b", "vit_t"])
def test_half_the_memory_costs_little_precision(batch: Batch, kind: str) -> None:
    sizes = TEACHER if kind == "vit_b" else STUDENT
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(build_sam(kind, IMAGE_SIZE, **sizes))
    full = LiveTeacher("full", models[0], ("blocks.-1",)).encode(batch)
    half = LiveTeacher("half", models[1], ("blocks.-1",), precision=torch.bfloat16)
    said = half.encode(batch)
    assert {parameter.dtype for parameter in half.sam.image_encoder.parameters()} == {torch.bfloat16}
    assert said.embedding.dtype == said.taps["blocks.-1"].dtype == torch.float32
    difference = (said.embedding - full.embedding).norm() / full.embedding.norm()
    assert 0 < float(difference) < 0.05
    assert half.decode(said, batch.prompts).low_res_logits.isfinite().all()


def test_a_teacher_of_no_share_is_not_asked(batch: Batch) -> None:
    team = TeacherTeam([LiveTeacher("one", make()), LiveTeacher("none", make())], [1.0, 0.0])
    assert [each.name for each in team.teach(batch)] == ["one"]
