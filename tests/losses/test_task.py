from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from samlet.losses import dice_loss, focal_loss, iou_loss, task_loss
from samlet.losses.task import chosen_masks

TERMS = ["dice", "focal", "iou"]


class Scene(NamedTuple):
    logits: Tensor
    predictions: Tensor
    masks: Tensor
    valid: Tensor

    def at(self, where: slice) -> Scene:
        return Scene(*(value[where] for value in self))


def _scene() -> Scene:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, 6, 6, generator=generator, dtype=torch.float64)
    predictions = torch.rand(5, 4, generator=generator, dtype=torch.float64)
    masks = (torch.rand(5, 6, 6, generator=generator, dtype=torch.float64) > 0.6).double()
    valid = torch.ones(5, 6, 6, dtype=torch.float64)
    valid[2:, 4:] = 0
    return Scene(logits, predictions, masks, valid)


def _all(value: bool) -> Tensor:
    return torch.full((5,), value)


def test_smoke_and_cardinality() -> None:
    terms = task_loss(*_scene(), torch.tensor([True, False, True, False, True]))
    assert sorted(terms) == TERMS
    assert all(term.shape == (5,) and torch.isfinite(term).all() for term in terms.values())
    empty = task_loss(*_scene().at(slice(0)), torch.zeros(0, dtype=torch.bool))
    assert all(term.shape == (0,) for term in empty.values())


def test_exceptions_name_the_shapes() -> None:
    logits, predictions, masks, valid = _scene()
    with pytest.raises(ValueError, match=r"\(5, 3, 6, 6\)"):
        task_loss(logits[:, :3], predictions, masks, valid, _all(True))
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 4\)"):
        task_loss(logits, predictions[:, :3], masks, valid, _all(True))
    with pytest.raises(ValueError, match=r"\(4, 6, 6\) for \(5, 4, 6, 6\)"):
        task_loss(logits, predictions, masks[:4], valid, _all(True))
    with pytest.raises(ValueError, match=r"\(5, 6, 5\)"):
        task_loss(logits, predictions, masks, valid[..., :5], _all(True))
    with pytest.raises(ValueError, match=r"\(4,\) and \(5,\)"):
        task_loss(logits, predictions, masks, valid, _all(True)[:4])


def test_a_clear_prompt_trains_mask_0_alone() -> None:
    logits, predictions, masks, valid = _scene()
    logits.requires_grad_()
    predictions.requires_grad_()
    terms = task_loss(logits, predictions, masks, valid, _all(False))
    torch.testing.assert_close(terms["focal"], focal_loss(logits[:, :1], masks, valid, reduction="none"))
    torch.testing.assert_close(terms["dice"], dice_loss(logits[:, :1], masks, valid, reduction="none"))
    torch.testing.assert_close(
        terms["iou"], iou_loss(predictions[:, :1], logits[:, :1], masks, valid, reduction="none")
    )
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert predictions.grad is not None
    assert logits.grad[:, 0].any()
    assert not logits.grad[:, 1:].any()
    assert not predictions.grad[:, 1:].any()


def test_an_ambiguous_prompt_trains_the_best_of_three_and_every_iou_of_them() -> None:
    """Pitfall 28: best by loss, not by the predicted IoU."""
    logits, predictions, masks, valid = _scene()
    best = torch.tensor([1, 2, 3, 1, 2])
    truth = (2 * masks - 1) * 4
    logits[torch.arange(5), best] = truth
    logits[:, 0] = 2 * truth  # better still, but not on offer
    predictions[torch.arange(5), best] = -5.0  # the head has no say
    logits.requires_grad_()
    predictions.requires_grad_()
    terms = task_loss(logits, predictions, masks, valid, _all(True))
    chosen = logits.detach()[torch.arange(5), best][:, None]
    torch.testing.assert_close(terms["focal"], focal_loss(chosen, masks, valid, reduction="none"))
    torch.testing.assert_close(terms["dice"], dice_loss(chosen, masks, valid, reduction="none"))
    three = iou_loss(predictions[:, 1:], logits[:, 1:], masks, valid, reduction="none")
    torch.testing.assert_close(terms["iou"], three)
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert predictions.grad is not None
    trained = logits.grad.flatten(2).abs().sum(2) > 0
    assert trained.nonzero()[:, 1].tolist() == best.tolist()
    assert (predictions.grad != 0).tolist() == [[False, True, True, True]] * 5


def test_the_weights_decide_which_mask_is_best() -> None:
    masks = torch.zeros(1, 8, 8)
    masks[:, 0, 0] = 1
    logits = torch.full((1, 4, 8, 8), -9.0)
    logits[:, 1] = -3.0  # sees nothing: good by focal, bad by dice
    logits[:, 2] = -9.0
    logits[:, 2, 0] = 9.0  # finds the object and seven cells too many: good by dice
    logits[:, 3] = 9.0
    arguments = (logits, torch.zeros(1, 4), masks, None, torch.tensor([True]))
    by_focal = task_loss(*arguments, w_focal=1.0, w_dice=0.0)
    by_dice = task_loss(*arguments, w_focal=0.0, w_dice=1.0)
    assert by_focal["focal"] < by_dice["focal"]
    assert by_dice["dice"] < by_focal["dice"]


def test_prompts_do_not_influence_each_other() -> None:
    ambiguous = torch.tensor([True, False, True, False, True])
    together = task_loss(*_scene(), ambiguous)
    alone = [task_loss(*_scene().at(slice(k, k + 1)), ambiguous[k : k + 1]) for k in range(5)]
    for name in TERMS:
        torch.testing.assert_close(together[name], torch.cat([terms[name] for terms in alone]))


def test_gradcheck() -> None:
    logits, predictions, masks, valid = _scene()
    ambiguous = torch.tensor([True, False, True, False, True])

    def total(logits: Tensor, predictions: Tensor) -> Tensor:
        return torch.stack(list(task_loss(logits, predictions, masks, valid, ambiguous).values())).sum()

    assert torch.autograd.gradcheck(total, (logits.requires_grad_(), predictions.requires_grad_()))


def test_compiles_without_graph_breaks() -> None:
    torch.compiler.reset()
    arguments = (*_scene(), _all(True))
    compiled = torch.compile(task_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), task_loss(*arguments))


def test_autocast_changes_nothing() -> None:
    arguments = Scene(*(value.float() for value in _scene()))
    exact = task_loss(*arguments, _all(True))
    with torch.autocast("cpu", torch.bfloat16):
        terms = task_loss(*arguments, _all(True))
    torch.testing.assert_close(terms, exact, rtol=0, atol=0)


def test_the_padding_has_no_say_in_which_mask_is_best() -> None:
    masks = torch.zeros(1, 8, 8)
    masks[:, :4, :4] = 1
    valid = torch.zeros(1, 8, 8)
    valid[:, :4] = 1
    logits = (torch.stack([masks, masks, masks, masks], dim=1) * 2 - 1) * 6
    logits[:, 1, 4:] = 6.0  # right where it counts, wrong in the padding
    logits[:, 2, :4] *= 0.5
    logits[:, 3] = 0.0
    ambiguous = torch.tensor([True])
    assert chosen_masks(logits, masks, valid, ambiguous).tolist() == [1]
    assert chosen_masks(logits, masks, None, ambiguous).tolist() == [2]
    terms = task_loss(logits, torch.zeros(1, 4), masks, valid, ambiguous)
    torch.testing.assert_close(terms["focal"], focal_loss(logits[:, 1:2], masks, valid, reduction="none"))
