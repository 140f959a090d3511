"""Clicks of correction: in the error, of the right sign, a pure function of step, image and prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from samlet.data.batches import collate
from samlet.data.configs import AugmentationConfig, DatasetConfig, PromptConfig
from samlet.data.sampler import SampleKey
from samlet.data.synthetic import write_dataset
from samlet.distill.corrections import Corrections, corrected, draws, uniform_cell
from samlet.engine.step import Counts, TrainStep, count_images
from samlet.frames import valid_cells
from samlet.losses.configs import TaskLossConfig
from samlet.models import build_sam
from samlet.types import NEGATIVE, PADDING, POSITIVE, Batch, MaskOutput
from tests.tiny import IMAGE_SIZE, STUDENT

GRID = IMAGE_SIZE // 4


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    """Shapes that no other test draws."""
    root: Path = tmp_path_factory.mktemp("held_out")
    write_dataset(root, num_train=4, num_val=1, image_size=IMAGE_SIZE, seed=1234)
    dataset = DatasetConfig(root=root, objects_per_image=4, labelled_fraction=0.5, unlabelled="use").build_train(
        image_size=IMAGE_SIZE, seed=7, prompts=PromptConfig(), augmentation=AugmentationConfig(enable=False)
    )
    return collate([dataset[SampleKey(0, index)] for index in range(4)])._replace(draw=11)


def saying(masks: torch.Tensor) -> MaskOutput:
    """A model that answers every prompt with these masks, sure of itself."""
    count = len(masks)
    logits = torch.where(masks > 0.5, 8.0, -8.0)[:, None].expand(-1, 4, -1, -1)
    return MaskOutput(logits, torch.ones(count, 4), torch.zeros(count, 4, 256), {})


def shifted(masks: torch.Tensor) -> torch.Tensor:
    """Masks that are wrong on two sides: they miss at the left and overshoot at the right."""
    return F.pad(masks, (3, 0))[..., :GRID]


def cell_of(batch: Batch, row: int) -> tuple[int, int]:
    """(row, column) of the low-res cell in which the last click of a prompt lies."""
    x, y = batch.prompts.point_coords[row, -1].tolist()
    assert 0 <= x < IMAGE_SIZE
    assert 0 <= y < IMAGE_SIZE
    return int(y // 4), int(x // 4)


def test_clicks_land_in_the_error_with_the_right_sign(batch: Batch) -> None:
    teacher = torch.rand(batch.masks.shape, generator=torch.Generator().manual_seed(0))
    said = shifted(batch.masks)
    prompts = corrected(batch, saying(said), [(1.0, saying(teacher))], Corrections(1, min_cells=1), draws(batch, 0))
    wanted = torch.where(batch.labelled[:, None, None], batch.masks, teacher) > 0.5
    valid = valid_cells(batch.input_sizes, GRID, IMAGE_SIZE)[batch.prompts.image_index] > 0.5
    error = (wanted != (said > 0.5)) & valid
    assert prompts.absent is not None
    asked = batch._replace(prompts=prompts)
    for row in range(len(error)):
        assert bool(prompts.absent[row, -1]) is not bool(error[row].any())
        if error[row].any():
            place = cell_of(asked, row)
            assert error[row][place]
            assert int(prompts.point_labels[row, -1]) == (POSITIVE if wanted[row][place] else NEGATIVE)
    assert {int(label) for label in prompts.point_labels[:, -1]} >= {POSITIVE, NEGATIVE}
    torch.testing.assert_close(prompts.point_coords[:, :-1], batch.prompts.point_coords)


def test_a_small_error_gets_no_click(batch: Batch) -> None:
    said = batch.masks.clone()
    said[:, 0, 0] = 1 - (said[:, 0, 0] > 0.5).float()
    labelled = batch._replace(labelled=torch.ones_like(batch.labelled))
    for cells, clicked in ((1, True), (2, False)):
        prompts = corrected(labelled, saying(said), [], Corrections(1, min_cells=cells), draws(batch, 0))
        assert prompts.absent is not None
        assert bool((~prompts.absent[:, -1]).all()) is clicked
    assert set(prompts.point_labels[:, -1].tolist()) == {PADDING}


def test_without_truth_and_teacher_there_is_no_click(batch: Batch) -> None:
    prompts = corrected(batch, saying(1 - batch.masks), [], Corrections(1), draws(batch, 0))
    assert prompts.absent is not None
    assert torch.equal(~prompts.absent[:, -1], batch.labelled)


def test_clicks_do_not_depend_on_the_split_and_change_with_step_and_round(batch: Batch) -> None:
    whole = draws(batch, 0)
    for image, name in enumerate(batch.image_ids):
        own = batch.prompts.image_index == image
        alone = batch._replace(
            image_ids=(name,),
            prompts=batch.prompts._replace(image_index=torch.zeros(int(own.sum()), dtype=torch.long)),
        )
        assert torch.equal(draws(alone, 0), whole[own])
    assert not torch.equal(draws(batch, 1), whole)
    assert not torch.equal(draws(batch._replace(draw=12), 0), whole)


def test_cells_are_drawn_uniformly() -> None:
    allowed = torch.zeros(1, 4, 4, dtype=torch.bool)
    places = [(0, 1), (2, 3), (3, 0)]
    for row, column in places:
        allowed[0, row, column] = True
    count = 3000
    draw = torch.from_numpy(np.random.default_rng(0).random(count))
    rows, columns = uniform_cell(allowed.expand(count, -1, -1), draw)
    found = [int(((rows == row) & (columns == column)).sum()) for row, column in places]
    assert sum(found) == count
    assert min(found) > 0.3 * count
    assert [int(value) for value in uniform_cell(allowed, torch.tensor([1 - 1e-17], dtype=torch.float64))[0]] == [3]


def test_the_mask_goes_back_in_where_asked_for(batch: Batch) -> None:
    said = saying(shifted(batch.masks))
    prompts = corrected(batch, said, [], Corrections(1, mask_input=True), draws(batch, 0))
    assert prompts.mask_input is not None
    torch.testing.assert_close(prompts.mask_input, said.low_res_logits[:, :1])


@pytest.mark.parametrize("mask_input", [False, True])
def test_the_loss_is_the_mean_over_rounds_and_reaches_the_student(batch: Batch, mask_input: bool) -> None:
    torch.manual_seed(0)
    student = build_sam("vit_t", IMAGE_SIZE, **STUDENT).eval()
    counts = Counts(*map(float, count_images([batch])))
    settings = Corrections(2, mask_input=mask_input, min_cells=1)
    step = TrainStep(student, TaskLossConfig(), corrections=settings)
    loss, terms = step(batch, (), counts)
    loss.backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in student.parameters())
    single = TrainStep(student, TaskLossConfig())
    expected, asked = [], batch
    with torch.no_grad():
        for number in range(3):
            expected.append(single(asked, (), counts)[1].raw["task/dice"])
            output = student.decode(student.encode(asked.pixels), asked.prompts)
            asked = asked._replace(prompts=corrected(asked, output, [], settings, draws(asked, number)))
    torch.testing.assert_close(terms.raw["task/dice"].detach(), torch.stack(expected).mean(), rtol=1e-4, atol=1e-6)
