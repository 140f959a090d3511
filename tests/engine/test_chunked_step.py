"""Prompts in chunks: the same loss, terms and gradients, in memory that does not grow with their number."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

from samlet.data.batches import collate
from samlet.data.configs import AugmentationConfig, DatasetConfig, EverythingConfig, PromptConfig
from samlet.data.sampler import SampleKey
from samlet.distill.answers import is_ambiguous, valid_per_prompt
from samlet.distill.corrections import Corrections
from samlet.distill.projections import build_projections
from samlet.distill.teacher import TeacherTeam
from samlet.engine.chunks import chunks_of, part_of
from samlet.engine.diagnosis import read_terms
from samlet.engine.step import Counts, TrainStep, worth_of_masks
from samlet.losses.configs import TaskLossConfig
from samlet.losses.iou import actual_iou
from samlet.losses.task import task_loss
from samlet.types import Batch, Prompts
from tests.distill.scenes import counts_of, make_sam_teacher, make_student, objectives_of, team_of
from tests.tiny import IMAGE_SIZE, write_scenes

REPOSITORY = Path(__file__).resolve().parents[2]
PROMPT_TERMS: dict[str, dict[str, Any]] = {
    "prompt_embed": {"layer": 1},
    "decoder_mask_token": {},
    "dense_mask_logits": {"w_dice": 0.2},
    "decoder_matching": {},
    "attention_matching": {"encoder": 1, "resample": True},
}
IMAGE_TERMS: dict[str, dict[str, Any]] = {
    "encoder_patch": {},
    "encoder_matching": {"layers": 2, "projection": "learnt"},
    "rkd": {"patches": 8},
}


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    """Grid points on objects and beside them, boxes, and an image without ground truth; in double precision."""
    config = DatasetConfig(
        root=write_scenes(tmp_path_factory.mktemp("scenes")),
        mode="everything",
        grid_points=6,
        labelled_fraction=0.5,
        unlabelled="use",
    )
    dataset = config.build_train(
        image_size=IMAGE_SIZE,
        seed=0,
        prompts=PromptConfig(),
        augmentation=AugmentationConfig(),
        everything=EverythingConfig(unlabelled="negative", max_points=4, boxes=1),
    )
    found = collate([dataset[SampleKey(0, index)] for index in range(4)])
    assert found.background is not None
    assert found.target_of is not None
    assert len(set(found.target_of.tolist())) < len(found.labelled)
    blind = ~(found.labelled | found.background)
    assert min(int(found.labelled.sum()), int(found.background.sum()), int(blind.sum())) > 0
    return found._replace(pixels=found.pixels.double(), masks=found.masks.double(), draw=3)


class Said(NamedTuple):
    """Everything that a step says."""

    loss: torch.Tensor
    raw: dict[str, torch.Tensor]
    seen: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor | None]


def say(batch: Batch, size: int | None, teachers: int = 0, counts: Counts | None = None, **settings: Any) -> Said:
    objectives = objectives_of(**PROMPT_TERMS, **IMAGE_TERMS) if teachers else ()
    sams = [make_sam_teacher(seed).double() for seed in range(1, teachers + 1)]
    team = team_of(objectives, *sams) if sams else TeacherTeam([], [])
    student = make_student().double()
    projections = build_projections(objectives, student, team, [batch]).double()
    step = TrainStep(student, TaskLossConfig(), objectives, prompts_per_chunk=size, projections=projections, **settings)
    loss, terms = step(batch, team.teach(batch), counts_of(batch) if counts is None else counts)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in step.named_parameters()}
    return Said(loss.detach(), terms.raw, terms.seen, gradients)


def assert_same(one: Said, other: Said) -> None:
    """As far as terms, which are summed in single precision, can be the same."""
    assert list(one.raw) == list(other.raw)
    assert list(one.seen) == list(other.seen)
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-6, atol=1e-7)
    for name, value in (one.raw | one.seen).items():
        torch.testing.assert_close(value, (other.raw | other.seen)[name], rtol=2e-6, atol=1e-7)
    for name, gradient in one.gradients.items():
        found = other.gradients[name]
        assert (gradient is None) == (found is None), name
        if gradient is not None:
            assert found is not None
            torch.testing.assert_close(gradient, found, rtol=1e-5, atol=1e-9 + 1e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize(
    ("teachers", "settings"),
    [
        (0, {}),
        (0, {"corrections": Corrections(2, min_cells=1)}),
        (1, {"corrections": Corrections(1, min_cells=1)}),
        (2, {"team": "per_sample", "trust": "hard_mask"}),
        (2, {"team": "per_sample", "trust": "confidence", "corrections": Corrections(1, True, 1)}),
    ],
    ids=["task", "corrected", "a teacher", "two teachers", "two teachers corrected"],
)
def test_chunks_change_nothing(batch: Batch, teachers: int, settings: dict[str, Any]) -> None:
    whole = say(batch, None, teachers, **settings)
    assert_same(whole, say(batch, 7, teachers, **settings))
    assert float(whole.loss) > 0


def test_a_chunk_that_holds_all_prompts_is_the_plain_step_to_the_bit(batch: Batch) -> None:
    whole, chunked = say(batch, None, 2), say(batch, len(batch.labelled), 2)
    assert torch.equal(whole.loss, chunked.loss)
    for name, gradient in whole.gradients.items():
        found = chunked.gradients[name]
        assert (gradient is None) == (found is None), name
        assert gradient is None or found is None or torch.equal(gradient, found), name


def test_each_prompt_gets_its_own_mask_in_each_chunk(batch: Batch) -> None:
    assert batch.target_of is not None
    chunks = [part_of(batch, rows) for rows in chunks_of(batch, 7)]
    assert {len(part.labelled) for part in chunks[:-1]} == {7}
    assert all(part.target_of is None for part in chunks)
    assert torch.equal(torch.cat([part.masks for part in chunks]), batch.masks[batch.target_of])
    assert torch.equal(torch.cat([part.labelled for part in chunks]), batch.labelled)
    assert [len(chunks_of(batch, size)) for size in (None, len(batch.labelled))] == [1, 1]
    stored = batch._replace(answers={"T/iou_predictions": torch.zeros(len(batch.labelled), 4)})
    assert len(chunks_of(stored, 7)) == 1


def test_the_iou_head_hears_of_the_background_and_the_masks_do_not(batch: Batch) -> None:
    """Each of a click's three masks is worth what it has in common with the object of the image that it fits best.

    An image's error is the mean over all that is known.
    """
    assert batch.background is not None
    judged, plain = say(batch, 7), say(batch._replace(background=torch.zeros_like(batch.background)), 7)
    assert torch.equal(judged.raw["task/dice"], plain.raw["task/dice"])
    assert torch.equal(judged.raw["task/focal"], plain.raw["task/focal"])
    student, part = make_student().double(), part_of(batch, slice(0, len(batch.labelled)))
    with torch.no_grad():
        output = student.decode(student.encode(batch.pixels), batch.prompts)
    valid = valid_per_prompt(part, output.low_res_logits.shape[-1])
    errors = task_loss(output.low_res_logits, output.iou_predictions, part.masks, valid, is_ambiguous(part))["iou"]
    objects = part.objects
    assert objects is not None
    worth = torch.stack(
        [
            actual_iou(output.low_res_logits, mask.expand_as(part.masks), valid)
            * (objects.image[number] == batch.prompts.image_index)[:, None]
            for number, mask in enumerate(objects.masks)
        ]
    ).amax(dim=0)
    assert float(worth[batch.background].amax()) > 0
    beside = (output.iou_predictions - worth)[:, 1:].abs().mean(dim=1)
    errors = torch.where(is_ambiguous(part), beside, errors)
    known, index = batch.labelled | batch.background, batch.prompts.image_index
    means = [errors[known & (index == image)].mean() for image in set(index[known].tolist())]
    torch.testing.assert_close(judged.raw["task/iou"].double(), torch.stack(means).mean(), rtol=1e-5, atol=1e-7)


def test_both_masks_of_a_click_on_nested_objects_are_right() -> None:
    """Fitted to one of the objects each, both are told 1; fitted to its own row's object alone, each was told 0 too."""
    small, large = torch.zeros(2, 8, 8)
    large[:6, :6] = small[2:4, 2:4] = 1
    said = torch.stack([large, small, large, torch.zeros(8, 8)]) - 0.5
    prompts = Prompts(torch.zeros(2, dtype=torch.int64), torch.full((2, 1, 2), 12.0), torch.ones(2, 1).long())
    nested = Batch(
        pixels=torch.zeros(1, 3, 32, 32),
        input_sizes=torch.tensor([[32, 32]]),
        prompts=prompts,
        masks=torch.stack([small, large]),
        labelled=torch.ones(2, dtype=torch.bool),
        image_ids=("a",),
        target_of=torch.arange(2),
        background=torch.zeros(2, dtype=torch.bool),
        mask_image=torch.zeros(2, dtype=torch.int64),
    )
    worth = worth_of_masks(part_of(nested, slice(0, 2)), said.expand(2, 4, 8, 8), None)
    assert worth is not None
    assert worth[:, 1:].tolist() == [[1, 1, 0], [1, 1, 0]]


def test_terms_of_a_step_do_not_depend_on_how_images_fall_into_micro_batches(batch: Batch) -> None:
    """Also where an image has negatives and no objects, and another nothing that is known."""
    assert batch.background is not None
    assert batch.target_of is not None
    known = batch.prompts.image_index != int(batch.prompts.image_index[batch.labelled][0])
    emptied = batch._replace(labelled=batch.labelled & known, background=batch.background | (batch.labelled & ~known))
    counts = counts_of(emptied)
    assert counts.judged > counts.labelled > 0
    whole = say(emptied, 5, counts=counts)
    parts = [say(image_of(emptied, number), 5, counts=counts) for number in range(4)]
    for name, value in whole.raw.items():
        torch.testing.assert_close(value, torch.stack([part.raw[name] for part in parts]).sum(), rtol=1e-5, atol=1e-7)


def image_of(batch: Batch, number: int) -> Batch:
    """One of a batch's images alone."""
    assert batch.target_of is not None
    assert batch.mask_image is not None
    rows = torch.nonzero(batch.prompts.image_index == number).flatten()
    own = torch.nonzero(batch.mask_image == number).flatten()
    part = part_of(batch, slice(int(rows[0]), int(rows[-1]) + 1))
    return part._replace(
        masks=batch.masks[own],
        target_of=batch.target_of[rows] - own[0],
        mask_image=torch.zeros_like(own),
        objects=None,
        pixels=batch.pixels[number : number + 1],
        input_sizes=batch.input_sizes[number : number + 1],
        prompts=part.prompts._replace(image_index=torch.zeros(len(rows), dtype=torch.int64)),
        image_ids=(batch.image_ids[number],),
    )


def test_what_lies_on_no_object_is_never_corrected(batch: Batch) -> None:
    assert batch.background is not None
    student = make_student().double()
    team = team_of((), make_sam_teacher().double())
    step = TrainStep(
        student,
        TaskLossConfig(),
        objectives_of(dense_mask_logits={}),
        corrections=Corrections(1, min_cells=1),
    )
    with torch.no_grad(), patch.object(student, "decode", wraps=student.decode) as decode:
        step(batch, team.teach(batch), counts_of(batch))
    absent = decode.call_args_list[1].args[1].absent
    assert absent is not None
    assert bool(absent[batch.background, -1].all())
    assert not bool(absent[~batch.background, -1].all())


def test_the_doctor_reads_the_same_terms_and_gradients(batch: Batch) -> None:
    objectives = objectives_of(dense_mask_logits={}, encoder_patch={})
    single = batch._replace(pixels=batch.pixels.float(), masks=batch.masks.float())
    team = team_of(objectives, make_sam_teacher())
    readings = []
    for chunk in (None, 7):
        step = TrainStep(make_student(), TaskLossConfig(), objectives, prompts_per_chunk=chunk)
        readings.append(read_terms(step, single, team.teach, counts_of(single)))
    one, other = readings
    assert other.student_iou == pytest.approx(one.student_iou, rel=1e-5)
    assert other.teacher_iou == pytest.approx(one.teacher_iou, rel=1e-5)
    for name, term in one.terms.items():
        assert other.terms[name].raw == pytest.approx(term.raw, rel=1e-4)
        assert other.terms[name].gradients == pytest.approx(term.gradients, rel=1e-2, abs=1e-6)
        assert other.terms[name].milliseconds > 0


def peak_of(image_size: int, prompts: int, objects: int, size: int | None, *, tiny: bool) -> float:
    """Most main memory, in MiB, of a step's forward and backward pass in a process of its own."""
    script = Path(__file__).with_name("peak_of_step.py")
    arguments = [str(value) for value in (image_size, prompts, objects, size or 0, int(tiny))]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'src'}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout.split()[-1])


def test_memory_does_not_grow_with_the_number_of_prompts() -> None:
    few, many = (peak_of(IMAGE_SIZE, prompts, 50, 32, tiny=True) for prompts in (64, 1024))
    assert many < 1.1 * few


@pytest.mark.slow
def test_a_thousand_points_and_fifty_objects_at_full_size_fit_into_four_gibibytes() -> None:
    assert peak_of(1024, 1024, 50, 8, tiny=False) < 4 * 1024


def test_answers_of_no_gradient_are_not_computed_again(batch: Batch) -> None:
    student = make_student().double()
    step = TrainStep(student, TaskLossConfig(), prompts_per_chunk=7)
    with torch.no_grad(), patch.object(student, "decode", wraps=student.decode) as decode:
        step(batch, (), counts_of(batch))
    calls = [len(call.args[1].image_index) for call in decode.call_args_list]
    assert sum(calls) == len(batch.labelled)
    assert max(calls) == 7
