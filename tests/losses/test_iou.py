from __future__ import annotations

import pytest
import torch

from samlet.losses import iou_loss
from samlet.losses.iou import actual_iou, best_fit_iou


def _halves() -> tuple[torch.Tensor, torch.Tensor]:
    """A prediction of the left half against a target of the upper half: IoU 1/3."""
    logits = torch.full((1, 1, 4, 4), -0.2)
    logits[..., :2] = 0.2  # foreground although below 0.5: pitfall 27
    masks = torch.zeros(1, 4, 4)
    masks[:, :2] = 1
    return logits, masks


def test_values_worked_out_by_hand() -> None:
    logits, masks = _halves()
    prediction = torch.tensor([[0.5]])
    assert float(iou_loss(prediction, logits, masks)) == pytest.approx(1 / 6)
    assert float(iou_loss(prediction, logits, masks, kind="mse")) == pytest.approx(1 / 36)


def test_the_covered_share_of_a_cell_is_its_area() -> None:
    masks = torch.tensor([[[1.0, 0.5]]])
    logits = torch.tensor([[[[1.0, 1.0]]]])
    assert float(iou_loss(torch.tensor([[0.75]]), logits, masks)) == pytest.approx(0)
    logits = torch.tensor([[[[1.0, -1.0]]]])
    assert float(iou_loss(torch.tensor([[2 / 3]]), logits, masks)) == pytest.approx(0, abs=1e-6)


def test_the_best_fit_of_a_mask_among_the_objects_of_its_image() -> None:
    logits, upper = _halves()
    left = torch.zeros(1, 4, 4)
    left[..., :2] = 1
    objects, both = torch.cat([upper, left]), logits.expand(3, 1, 4, 4)
    shared = torch.tensor([[True, True], [True, False], [False, False]])
    assert best_fit_iou(both, objects, shared, None).flatten().tolist() == pytest.approx([1, 1 / 3, 0])
    valid = torch.ones(3, 4, 4)
    valid[:, :, 1:] = 0  # one column of four cells: the mask covers all of them, the upper object two
    assert best_fit_iou(both, objects, shared, valid).flatten().tolist() == pytest.approx([1, 1 / 2, 0])
    for number in range(2):
        alone = actual_iou(both, objects[number].expand(3, 4, 4), valid)
        assert torch.allclose(best_fit_iou(both, objects[number][None], shared[:1, :1].expand(3, 1), valid), alone)
    assert best_fit_iou(both, objects[:0], shared[:, :0], None).flatten().tolist() == [0, 0, 0]


def test_an_unknown_kind_is_refused() -> None:
    logits, masks = _halves()
    with pytest.raises(ValueError, match="'l2'"):
        iou_loss(torch.ones(1, 1), logits, masks, kind="l2")  # type: ignore[arg-type]


def test_the_logits_get_no_gradient() -> None:
    logits, masks = _halves()
    logits.requires_grad_()
    prediction = torch.tensor([[0.5]], requires_grad=True)
    iou_loss(prediction, logits, masks).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is None
    assert prediction.grad is not None
    assert float(prediction.grad) > 0


@pytest.mark.parametrize("kind", ["l1", "mse"])
def test_a_raw_score_fitted_to_it_is_the_iou(kind: str) -> None:
    """Pitfall 26: through a sigmoid, raw scores explode to reach 1."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(8, 6, 6, generator=generator)
    logits = torch.randn(8, 1, 6, 6, generator=generator)
    logits[0] = (truth[0] > 0) * 20.0 - 10.0
    raw = torch.zeros(8, 1, requires_grad=True)
    optimizer = torch.optim.SGD([raw], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        iou_loss(raw, logits, truth, kind=kind).backward()  # type: ignore[arg-type, no-untyped-call]
        optimizer.step()
    binary = (logits[:, 0] > 0).float()
    overlap = (binary * truth).sum((1, 2))
    iou = overlap / (binary.sum((1, 2)) + truth.sum((1, 2)) - overlap)
    assert (raw[:, 0] - iou).abs().max() < 0.05
