"""What every loss owes: shapes, gradients, and a value that no batch split, resolution or padding can change."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from samlet.losses import (
    attention_matching_loss,
    decoder_mask_token_loss,
    decoder_matching_loss,
    dense_mask_logits_loss,
    dice_loss,
    encoder_matching_loss,
    encoder_patch_loss,
    focal_loss,
    iou_loss,
    prompt_embed_loss,
    rkd_loss,
)


class Case(NamedTuple):
    """A loss, its two tensors for n items on a grid of g cells, and whether it has a grid."""

    loss: Callable[..., Tensor]
    student: Callable[[Tensor, int, int], Tensor]
    teacher: Callable[[Tensor, int, int], Tensor]
    grid: bool = True


def _iou_of_fixed_logits(predictions: Tensor, masks: Tensor, *rest: Tensor | None, **options: str) -> Tensor:
    logits = (2 * masks - 1)[:, None].expand(-1, 3, -1, -1).detach()
    return iou_loss(predictions, logits, masks.detach(), *rest, **options)  # type: ignore[arg-type]


def _two_layers(student: Tensor, teacher: Tensor, valid: Tensor | None = None, **options: str) -> Tensor:
    """encoder_matching on the maps and on their first channels, as a second layer of another width."""
    of_student, of_teacher = [student, student[:, :4]], [teacher, teacher[:, :4]]
    covered = None if valid is None else [valid, valid]
    return encoder_matching_loss(of_student, of_teacher, covered, **options)  # type: ignore[arg-type]


def _attention_of_scores(student: Tensor, teacher: Tensor, **options: str) -> Tensor:
    """attention_matching as a function of scores, so that what goes in has no constraint."""
    wide = [side.to(torch.promote_types(side.dtype, torch.float32)).softmax(dim=-1) for side in (student, teacher)]
    return attention_matching_loss(*wide, **options)  # type: ignore[arg-type]


def _draw(*shape: int) -> Callable[[Tensor, int, int], Tensor]:
    """Noise of a shape in which 0 stands for n and -1 for g, from the numbers in `source`."""

    def draw(source: Tensor, n: int, g: int) -> Tensor:
        sizes = [n if size == 0 else g if size == -1 else size for size in shape]
        count = int(torch.tensor(sizes).prod())
        return source[:count].reshape(sizes).clone()

    return draw


def _shares(source: Tensor, n: int, g: int) -> Tensor:
    return _draw(0, -1, -1)(source, n, g).sigmoid()


CASES = {
    "encoder_patch": Case(encoder_patch_loss, _draw(0, 6, -1, -1), _draw(0, 6, -1, -1)),
    "prompt_embed": Case(prompt_embed_loss, _draw(0, 6, -1, -1), _draw(0, 6, -1, -1)),
    "decoder_mask_token": Case(decoder_mask_token_loss, _draw(0, 4, 6), _draw(0, 4, 6), grid=False),
    "dense_mask_logits": Case(dense_mask_logits_loss, _draw(0, 3, -1, -1), _draw(0, 3, -1, -1)),
    "encoder_matching": Case(_two_layers, _draw(0, 6, -1, -1), _draw(0, 6, -1, -1)),
    "decoder_matching": Case(decoder_matching_loss, _draw(0, 6, -1, -1), _draw(0, 6, -1, -1)),
    "attention_matching": Case(_attention_of_scores, _draw(0, 2, 4, 6), _draw(0, 2, 4, 6), grid=False),
    "rkd": Case(rkd_loss, _draw(0, 5, 6), _draw(0, 5, 4), grid=False),
    "focal": Case(focal_loss, _draw(0, 3, -1, -1), _shares),
    "dice": Case(dice_loss, _draw(0, 3, -1, -1), _shares),
    "iou": Case(_iou_of_fixed_logits, _draw(0, 3), _shares),
}
DISTILLATION = [
    "encoder_patch",
    "prompt_embed",
    "decoder_mask_token",
    "dense_mask_logits",
    "encoder_matching",
    "decoder_matching",
    "attention_matching",
    "rkd",
]
every_case = pytest.mark.parametrize("name", sorted(CASES))
every_distillation = pytest.mark.parametrize("name", DISTILLATION)
every_grid = pytest.mark.parametrize("name", sorted(name for name, case in CASES.items() if case.grid))


def _noise(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4096, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _pair(name: str, n: int = 3, g: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    case = CASES[name]
    return case.student(_noise(1, dtype), n, g), case.teacher(_noise(2, dtype), n, g)


def _padding(n: int, g: int) -> Tensor:
    valid = torch.ones(n, g, g, dtype=torch.float64)
    valid[0, :, -1] = 0
    valid[1, -1] = 0.25
    return valid


@every_case
def test_smoke(name: str) -> None:
    student, teacher = _pair(name, dtype=torch.float32)
    loss = CASES[name].loss(student, teacher)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert loss > 0


@every_case
def test_exception(name: str) -> None:
    case = CASES[name]
    student, teacher = _pair(name)
    with pytest.raises(ValueError, match=r"\(3, .*\(2, |\(2, .*\(3, "):
        case.loss(student, teacher[:2])
    with pytest.raises(ValueError, match="'sum'"):
        case.loss(student, teacher, reduction="sum")
    if case.grid:
        with pytest.raises(ValueError, match=r"\(3, 4, 5\)"):
            case.loss(student, teacher, torch.ones(3, 4, 5))


@every_case
@pytest.mark.parametrize("n", [0, 1, 5])
def test_cardinality(name: str, n: int) -> None:
    student, teacher = _pair(name, n=n)
    assert CASES[name].loss(student, teacher, reduction="none").shape == (n,)
    assert torch.isfinite(CASES[name].loss(student, teacher))


@every_case
def test_gradcheck(name: str) -> None:
    student, teacher = _pair(name, n=2, g=3)
    loss = CASES[name].loss
    if CASES[name].grid:
        loss = partial(loss, valid=_padding(2, 3)) if name != "iou" else loss
    assert torch.autograd.gradcheck(lambda value: loss(value, teacher), (student.requires_grad_(),))


@every_case
def test_compiles_without_graph_breaks(name: str) -> None:
    torch.compiler.reset()  # all losses share the wrapper that is compiled, and it may not be compiled without end
    student, teacher = _pair(name, dtype=torch.float32)
    loss = CASES[name].loss
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(student, teacher), loss(student, teacher))


@every_case
def test_a_batch_is_the_mean_of_its_items(name: str) -> None:
    """Pitfalls 7 and 10: not only the first image, and no image twice."""
    case = CASES[name]
    student, teacher = _pair(name)
    extra = (_padding(3, 4),) if case.grid else ()
    items = case.loss(student, teacher, *extra, reduction="none")
    alone = [
        case.loss(student[k : k + 1], teacher[k : k + 1], *(valid[k : k + 1] for valid in extra)) for k in range(3)
    ]
    torch.testing.assert_close(items, torch.stack(alone))
    torch.testing.assert_close(case.loss(student, teacher, *extra), items.mean())


@every_grid
def test_resolution_does_not_matter(name: str) -> None:
    """Pitfall 9: the same picture on a grid three times as fine costs the same."""
    case = CASES[name]
    student, teacher = _pair(name)

    def finer(value: Tensor) -> Tensor:
        return value.repeat_interleave(3, -1).repeat_interleave(3, -2) if value.shape[-2:] == (4, 4) else value

    valid = _padding(3, 4)
    torch.testing.assert_close(
        case.loss(finer(student), finer(teacher), finer(valid)), case.loss(student, teacher, valid)
    )


@every_grid
def test_padding_has_neither_value_nor_gradient(name: str) -> None:
    """Pitfall 49: what lies in the padding may be anything."""
    case = CASES[name]
    student, teacher = _pair(name)
    valid = _padding(3, 4)
    valid[1] = 1
    before = case.loss(student, teacher, valid)
    changed, other = student.clone(), teacher.clone()
    other[0, ..., -1] = 0.75
    if changed.ndim == 4:
        changed[0, ..., -1] = 50.0
    changed.requires_grad_()
    after = case.loss(changed, other, valid)
    torch.testing.assert_close(after, before)
    after.backward()  # type: ignore[no-untyped-call]
    assert changed.grad is not None
    if changed.ndim == 4:
        assert not changed.grad[0, ..., -1].any()
        assert changed.grad[0, ..., :-1].any()


@every_grid
def test_nothing_valid_costs_nothing_and_stays_finite(name: str) -> None:
    student, teacher = _pair(name)
    loss = CASES[name].loss(student.requires_grad_(), teacher, torch.zeros(3, 4, 4))
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    student, teacher = (value.to(dtype) for value in _pair(name))
    exact = case.loss(student.float(), teacher.float())
    with torch.autocast("cpu", dtype):
        assert case.loss(student, teacher).dtype == torch.float32
        torch.testing.assert_close(case.loss(student, teacher), exact, rtol=0, atol=0)


@every_distillation
def test_student_equal_to_teacher_costs_nothing(name: str) -> None:
    """Pitfall 2, and DESIGN 5: at least 0, and least at student = teacher."""
    student, teacher = _pair(name)
    same = teacher.clone().requires_grad_()
    loss = CASES[name].loss(same, teacher)
    loss.backward()  # type: ignore[no-untyped-call]
    assert abs(loss.item()) < 1e-12
    assert same.grad is not None
    assert same.grad.abs().max() < 1e-9
    assert CASES[name].loss(student, teacher) > 0.01


@every_distillation
def test_gradient_reaches_the_student_alone(name: str) -> None:
    """Pitfall 1: a detached student trains nothing."""
    student, teacher = (value.requires_grad_() for value in _pair(name))
    CASES[name].loss(student, teacher).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert student.grad.flatten(1).abs().sum(1).min() > 0, "some item has no gradient"
    assert teacher.grad is None


@every_distillation
def test_a_step_down_the_gradient_nears_the_teacher(name: str) -> None:
    student, teacher = _pair(name)
    start = CASES[name].loss(student, teacher)
    for _ in range(300):
        student = student.detach().requires_grad_()
        loss = CASES[name].loss(student, teacher, reduction="none").sum()
        (gradient,) = torch.autograd.grad(loss, student)
        student = student - 2.0 * gradient
    assert CASES[name].loss(student, teacher) < start / 20


@pytest.mark.parametrize(
    "name",
    [
        "encoder_patch",
        "prompt_embed",
        "dense_mask_logits",
        "encoder_matching",
        "decoder_matching",
        "attention_matching",
    ],
)
def test_permuted_channels_or_masks_are_another_thing(name: str) -> None:
    """Pitfalls 2 and 11: channels are compared with their own, masks with those of the same index."""
    _, teacher = _pair(name)
    assert CASES[name].loss(teacher.roll(1, dims=1), teacher) > 0.01


@every_distillation
def test_mismatched_channels_are_refused(name: str) -> None:
    """Pitfall 4: nothing is averaged, tiled or broadcast in silence."""
    student, teacher = _pair(name)
    with pytest.raises(ValueError, match=r"same (shape|images and patches)"):
        CASES[name].loss(student, teacher[:, :1])
