"""Whom to believe, object by object: teams and trust."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from samlet.distill.configs import TrustRule
from samlet.distill.shares import agreement, shares_of
from samlet.types import POSITIVE, Batch, MaskOutput, Prompts

GRID = 8


@dataclass
class Answers:
    """Rectangles of so many of the eight rows, and how sure the model is of each."""

    rows: list[int]
    sure: list[float]

    def output(self) -> MaskOutput:
        """The same mask for all four outputs, the first single click excepted."""
        masks = torch.zeros(len(self.rows), 4, GRID, GRID) - 5.0
        for index, rows in enumerate(self.rows):
            masks[index, :, :rows] = 5.0
        return MaskOutput(masks, torch.tensor(self.sure)[:, None].expand(-1, 4), torch.zeros(1), {})


@pytest.fixture
def batch() -> Batch:
    """Two images: the first with two labelled objects of 4 rows, the second with one object without ground truth."""
    masks = torch.zeros(3, GRID, GRID)
    masks[:2, :4] = 1
    prompts = Prompts(torch.tensor([0, 0, 1]), torch.zeros(3, 2, 2), torch.tensor([[POSITIVE, POSITIVE]] * 3))
    sizes = torch.full((2, 2), 4 * GRID)
    labelled = torch.tensor([True, True, False])
    return Batch(torch.zeros(2, 3, 4 * GRID, 4 * GRID), sizes, prompts, masks, labelled, ("a", "b"))


GOOD = Answers([4, 2, 3], [0.5, 0.9, 0.2])  # IoU 1.0, 0.5, unknown
POOR = Answers([8, 4, 5], [0.9, 0.1, 0.7])  # IoU 0.5, 1.0, unknown
STUDENT = Answers([2, 4, 1], [0.3, 0.3, 0.3])  # IoU 0.5, 1.0


def test_static_shares_are_the_weights(batch: Batch) -> None:
    shares = shares_of([0.7, 0.3], batch, STUDENT.output(), [GOOD.output(), POOR.output()])
    torch.testing.assert_close(shares.per_prompt, torch.tensor([[0.7] * 3, [0.3] * 3]))
    torch.testing.assert_close(shares.per_image, torch.tensor([[0.7] * 2, [0.3] * 2]))
    assert shares.truth.tolist() == [1, 1, 1]


def test_per_sample_the_best_by_truth_wins_and_without_it_the_most_confident(batch: Batch) -> None:
    teachers = [GOOD.output(), POOR.output()]
    shares = shares_of([0.9, 0.1], batch, STUDENT.output(), teachers, team="per_sample")
    assert shares.per_prompt.tolist() == [[1, 0, 0], [0, 1, 1]]
    assert shares.per_image.tolist() == [[0.5, 0], [0.5, 1]]


def test_a_hard_mask_counts_most_where_the_teacher_is_right_and_the_student_wrong(batch: Batch) -> None:
    shares = shares_of([1.0], batch, STUDENT.output(), [GOOD.output()], trust="hard_mask")
    expected = [torch.sigmoid(torch.tensor(ratio - 1.0)).item() for ratio in (1.0 / 0.5, 0.5 / 1.0)]
    torch.testing.assert_close(shares.per_prompt[0], torch.tensor([*expected, 1.0]), rtol=1e-4, atol=1e-5)
    assert shares.truth.tolist() == [1, 1, 1]


def test_confidence_divides_between_teacher_and_truth(batch: Batch) -> None:
    shares = shares_of([1.0], batch, STUDENT.output(), [GOOD.output()], trust="confidence")
    torch.testing.assert_close(shares.per_prompt[0], torch.tensor([0.5, 0.9, 1.0]))
    torch.testing.assert_close(shares.truth, torch.tensor([0.5, 0.1, 1.0]))


@pytest.mark.parametrize("trust", ["constant", "hard_mask", "confidence"])
def test_without_ground_truth_the_teacher_counts_in_full(batch: Batch, trust: TrustRule) -> None:
    shares = shares_of([1.0], batch, STUDENT.output(), [POOR.output()], trust=trust)
    assert float(shares.per_prompt[0, 2]) == 1.0


def test_a_single_click_is_judged_by_the_best_of_three(batch: Batch) -> None:
    labels = batch.prompts.point_labels.clone()
    labels[:, 1] = -1
    click = batch._replace(prompts=batch.prompts._replace(point_labels=labels))
    output = GOOD.output()
    logits = output.low_res_logits.clone()
    logits[0] = -5.0
    logits[0, 2, :4] = 5.0  # only one of the three is right, and mask 0 is empty
    shares = shares_of(
        [0.5, 0.5], click, STUDENT.output(), [POOR.output(), output._replace(low_res_logits=logits)], team="per_sample"
    )
    assert shares.per_prompt[:, 0].tolist() == [0, 1]


def test_agreement_is_the_iou_between_teachers(batch: Batch) -> None:
    found = agreement(batch, [GOOD.output(), POOR.output()])
    torch.testing.assert_close(found, torch.tensor([4 / 8, 2 / 4, 3 / 5]))
    three = agreement(batch, [GOOD.output(), POOR.output(), GOOD.output()])
    torch.testing.assert_close(three, (2 * found + 1) / 3)
