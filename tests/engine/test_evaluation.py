from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from samlet.data import EvalImage
from samlet.engine import evaluation
from samlet.engine.evaluation import (
    ObjectScores,
    choose_device,
    correction_click,
    evaluate_sam,
    headline,
    join_scores,
    summarize,
)
from samlet.errors import DataError, SamletError
from samlet.frames import postprocess_masks
from samlet.models import Predictor, Sam, build_sam
from samlet.types import ImageFeatures, MaskOutput, Prompts
from tests.tiny import IMAGE_SIZE, STUDENT

ALL = ("point", "clicks_1", "clicks_3", "box")
LOW = IMAGE_SIZE // 4


class Images:
    """Validation images that need no files: rectangles on noise, portrait and landscape."""

    def __init__(self, count: int = 3, objects: int = 3) -> None:
        self.items = [self._draw(np.random.default_rng(seed), objects) for seed in range(count)]

    @staticmethod
    def _draw(rng: np.random.Generator, objects: int) -> EvalImage:
        height, width = int(rng.integers(40, 60)), int(rng.integers(60, 100))
        masks = np.zeros((objects, height, width), np.bool_)
        boxes = np.zeros((objects, 4), np.float32)
        for mask, box in zip(masks, boxes, strict=True):
            y, x = rng.integers(0, 20, 2)
            h, w = rng.integers(5, 20, 2)
            mask[y : y + h, x : x + w] = True
            box[:] = x, y, x + w, y + h
        points = (boxes[:, :2] + boxes[:, 2:]) // 2
        image = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        return EvalImage("drawn", image, masks, points, boxes)

    def __len__(self) -> int:
        return len(self.items)

    def item(self, index: int) -> EvalImage:
        return self.items[index]


class ScriptedSam(nn.Module):
    """Answers with what a script says for the n-th decode; remembers what it was asked."""

    def __init__(self, script: Callable[[int, Prompts, int], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.image_size = IMAGE_SIZE
        self.weight = nn.Parameter(torch.zeros(1))
        self.script = script
        self.encoded = 0
        self.asked: list[tuple[Prompts, bool | None]] = []

    def encode(self, pixels: Tensor) -> ImageFeatures:
        self.encoded += len(pixels)
        return ImageFeatures(pixels, {})

    def decode(self, features: ImageFeatures, prompts: Prompts, multimask_output: bool | None) -> MaskOutput:
        self.asked.append((prompts, multimask_output))
        masks = 3 if multimask_output else 1
        logits, iou = self.script(len(self.asked) - 1, prompts, masks)
        return MaskOutput(logits, iou, torch.zeros(len(logits), 4, 256), {})


def _constant(value: float) -> Callable[[int, Prompts, int], tuple[Tensor, Tensor]]:
    def script(_: int, prompts: Prompts, masks: int) -> tuple[Tensor, Tensor]:
        count = len(prompts.image_index)
        return torch.full((count, masks, LOW, LOW), value), torch.zeros(count, masks)

    return script


def _scripted(script: Callable[[int, Prompts, int], tuple[Tensor, Tensor]]) -> tuple[ScriptedSam, Sam]:
    model = ScriptedSam(script)
    return model, cast(Sam, model)


@pytest.fixture(scope="module")
def sam() -> Iterator[Sam]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield build_sam("vit_t", IMAGE_SIZE, **STUDENT).eval()


def _iou(predicted: np.ndarray, truth: np.ndarray) -> float:
    return float((predicted & truth).sum() / max((predicted | truth).sum(), 1))


def test_agrees_with_the_predictor_used_by_hand(sam: Sam) -> None:
    """Points, boxes and corrections as a user of SAM's own interface would make them, object by object."""
    images = Images()
    scores = evaluate_sam(sam, images, ("point", "clicks_1", "clicks_2", "box"))
    expected = []
    predictor = Predictor(sam)
    for item in images.items:
        predictor.set_image(item.image)
        for truth, point, box in zip(item.masks, item.points, item.boxes, strict=True):
            masks, iou, low_res = predictor.predict(point[None], np.array([1]), multimask_output=True)
            mask, low = masks[iou.argmax()], low_res[iou.argmax()]
            row, coords, labels = [_iou(mask, truth)], [point], [1]
            for _ in range(2):
                click = correction_click(mask, truth)
                assert click is not None
                coords, labels = [*coords, np.array(click[:2], np.float32)], [*labels, click.label]
                masks, _, low_res = predictor.predict(
                    np.stack(coords), np.array(labels), mask_input=low[None], multimask_output=False
                )
                mask, low = masks[0], low_res[0]
                row.append(_iou(mask, truth))
            masks, _, _ = predictor.predict(box=box, multimask_output=False)
            expected.append([*row, _iou(masks[0], truth)])
    np.testing.assert_allclose(scores.iou, expected, atol=0.02)  # a batch rounds otherwise: a pixel may flip
    np.testing.assert_allclose(scores.dice, 2 * scores.iou / (1 + scores.iou), rtol=1e-12)
    assert scores.area.tolist() == [int(mask.sum()) for item in images.items for mask in item.masks]


def test_two_evaluations_agree_to_the_bit_and_shards_join_to_the_whole(sam: Sam) -> None:
    """Pitfall 34; and each process of a run may take every n-th image."""
    images = Images()
    whole = evaluate_sam(sam, images, ALL)
    again = evaluate_sam(sam, images, ALL)
    shards = [evaluate_sam(sam, images, ALL, indices=range(rank, 3, 2)) for rank in (1, 0)]
    for other in (again, join_scores(shards)):
        assert other.kinds == whole.kinds
        for ours, theirs in zip(whole[1:], other[1:], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert len(whole.area) == 9


def test_the_model_is_left_as_it_was(sam: Sam) -> None:
    images = Images(count=1)
    calm = evaluate_sam(sam, images)
    sam.train()
    sam.prompt_encoder.eval()
    modes = [module.training for module in sam.modules()]
    state = {name: value.clone() for name, value in sam.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        scores = evaluate_sam(sam, images)
    assert [module.training for module in sam.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in sam.state_dict().items())
    assert all(parameter.grad is None for parameter in sam.parameters())
    np.testing.assert_array_equal(scores.iou, calm.iou)
    sam.eval()


def test_predicting_nothing_counts_0_and_is_not_left_out() -> None:
    """Pitfall 42."""
    _, sam = _scripted(_constant(-1.0))
    scores = evaluate_sam(sam, Images(), ALL)
    assert len(scores.area) == 9
    assert not scores.iou.any()
    assert summarize(scores)["prompts"]["box"]["miou"] == 0


def test_a_mask_is_where_logits_are_above_0() -> None:
    """Pitfall 27."""
    _, sam = _scripted(_constant(0.01))
    images = Images(count=1)
    scores = evaluate_sam(sam, images)
    expected = images.items[0].masks.mean(axis=(1, 2))
    np.testing.assert_allclose(scores.iou[:, 0], expected)


def test_the_padding_is_no_part_of_a_mask() -> None:
    """Pitfall 49: everything below the image is claimed, and nothing of it counts."""

    def script(_: int, prompts: Prompts, masks: int) -> tuple[Tensor, Tensor]:
        logits = torch.full((len(prompts.image_index), masks, LOW, LOW), -1.0)
        logits[..., LOW // 2 + 1 :, :] = 1.0
        return logits, torch.zeros(len(logits), masks)

    image = np.zeros((32, 64, 3), np.uint8)
    masks = np.ones((1, 32, 64), np.bool_)
    item = EvalImage("wide", image, masks, np.array([[32, 16]], np.float32), np.array([[0, 0, 64, 32]], np.float32))
    images = Images(count=1)
    images.items = [item]
    assert not evaluate_sam(_scripted(script)[1], images).iou.any()


def test_of_three_masks_the_most_trusted_is_taken() -> None:
    def script(_: int, prompts: Prompts, masks: int) -> tuple[Tensor, Tensor]:
        logits = torch.full((len(prompts.image_index), masks, LOW, LOW), -1.0)
        logits[:, -1] = 1.0
        trust = torch.linspace(-3, -1, masks).expand(len(logits), -1)
        return logits, trust

    model, sam = _scripted(script)
    scores = evaluate_sam(sam, Images(count=1), ("point", "clicks_1", "box"))
    assert (scores.iou > 0).all()
    assert [multimask for _, multimask in model.asked] == [False, True, False]


def test_the_image_is_encoded_once_and_prompts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfall 33, and memory: a thousand objects do not become one batch."""
    images = Images(count=2, objects=7)
    model, sam = _scripted(_constant(0.01))
    whole = evaluate_sam(sam, images, ALL)
    assert model.encoded == 2
    monkeypatch.setattr(evaluation, "MAX_PROMPTS", 3)
    model, sam = _scripted(_constant(0.01))
    few = evaluate_sam(sam, images, ALL)
    np.testing.assert_array_equal(few.iou, whole.iou)
    assert model.encoded == 2
    assert max(len(prompts.image_index) for prompts, _ in model.asked) == 3
    monkeypatch.setattr(evaluation, "MAX_PIXELS", 1)
    model, sam = _scripted(_constant(0.01))
    evaluate_sam(sam, images)
    assert {len(prompts.image_index) for prompts, _ in model.asked} == {1}


def test_corrections_feed_back_the_logits_and_leave_a_perfect_mask_alone() -> None:
    """Object 0 is right from the start; object 1 gets one more click each round, where the error is."""
    item = Images(count=1, objects=1).items[0]
    grid = torch.full((1, 1, LOW, LOW), -1.0)
    grid[..., :8, :8] = 1.0
    frame = (IMAGE_SIZE, IMAGE_SIZE)
    square = (postprocess_masks(grid, frame, frame, IMAGE_SIZE)[0] > 0).numpy().repeat(2, axis=0)
    square[1, 32:48, :32] = True
    images = Images(count=1)
    images.items = [
        item._replace(
            image=np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
            masks=square,
            points=np.array([[8, 8], [8, 8]], np.float32),
            boxes=np.array([[0, 0, 32, 32], [0, 0, 32, 48]], np.float32),
        )
    ]

    def script(turn: int, prompts: Prompts, masks: int) -> tuple[Tensor, Tensor]:
        logits = torch.full((len(prompts.image_index), masks, LOW, LOW), -5.0 - turn)
        logits[..., :8, :8] = 5.0 + turn
        return logits, torch.zeros(len(logits), masks)

    model, sam = _scripted(script)
    scores = evaluate_sam(sam, images, ("point", "clicks_1", "clicks_3"))
    assert scores.iou[0].tolist() == [1.0, 1.0, 1.0]
    assert scores.iou[1].tolist() == [square[0].sum() / square[1].sum()] * 3
    assert [len(prompts.image_index) for prompts, _ in model.asked] == [2, 1, 1, 1]
    assert [prompts.point_labels.tolist()[-1] for prompts, _ in model.asked] == [
        [1, -1],
        [1, 1, -1],
        [1, 1, 1, -1],
        [1, 1, 1, 1, -1],
    ]
    x, y = model.asked[1][0].point_coords[0, 1].tolist()
    assert 0 <= x < 32 <= y < 48
    for turn in (1, 2, 3):
        fed = model.asked[turn][0].mask_input
        assert fed is not None
        assert fed.shape == (1, 1, LOW, LOW)
        assert float(fed.max()) == 5.0 + turn - 1


@pytest.mark.parametrize("kind", ["clicks_0", "clicks_", "clicks_x", "scribble", "points"])
def test_an_unknown_prompt_is_refused(kind: str) -> None:
    with pytest.raises(SamletError, match=kind):
        evaluate_sam(_scripted(_constant(0.0))[1], Images(count=1), (kind,))


def test_correction_click_where_the_object_was_missed() -> None:
    truth = np.zeros((20, 20), np.bool_)
    truth[2:9, 3:10] = True
    truth[15:18, 15:18] = True  # a smaller miss
    click = correction_click(np.zeros_like(truth), truth)
    assert click == (6, 5, 1)


def test_correction_click_where_the_mask_overshoots() -> None:
    truth = np.zeros((20, 20), np.bool_)
    truth[:5, :5] = True
    predicted = truth.copy()
    predicted[5:, 5:] = True
    predicted[0, 0] = False
    click = correction_click(predicted, truth)
    assert click is not None
    assert click.label == 0
    assert (click.x, click.y) == (12, 12)


def test_the_largest_error_is_the_largest_that_hangs_together() -> None:
    truth = np.zeros((20, 30), np.bool_)
    predicted = np.zeros_like(truth)
    predicted[::2, ::2] = True  # 150 single pixels too many
    truth[1:4, 1:4] = True
    truth &= ~predicted
    truth[10:13, 20:23] = predicted[10:13, 20:23] = False
    truth[10:13, 20:23] = True
    assert correction_click(predicted, truth) == (21, 11, 1)


def test_no_click_on_a_perfect_mask_and_missed_wins_a_tie() -> None:
    truth = np.zeros((10, 10), np.bool_)
    truth[2:5, 2:5] = True
    assert correction_click(truth.copy(), truth) is None
    moved = np.roll(truth, 5, axis=1)
    click = correction_click(moved, truth)
    assert click == (3, 3, 1)


def _scores() -> ObjectScores:
    """Two images: one object of 0.2 and 0.4 and 0.6, one of 1.0."""
    iou = np.array([[0.2], [0.4], [0.6], [1.0]])
    return ObjectScores(
        ("box",), np.array([0, 0, 0, 5]), np.array([0, 1, 2, 0]), np.array([1023, 1024, 9215, 9216]), iou, iou / 2
    )


def test_summary_worked_out_by_hand() -> None:
    summary = summarize(_scores())
    box = summary["prompts"]["box"]
    assert (summary["images"], summary["objects"]) == (2, 4)
    assert box["miou"] == pytest.approx(0.55)
    assert box["mdice"] == pytest.approx(0.275)
    assert box["miou_over_images"] == pytest.approx((0.4 + 1.0) / 2)
    assert {size: facts["objects"] for size, facts in box["by_size"].items()} == {"small": 1, "medium": 2, "large": 1}
    assert box["by_size"]["medium"]["miou"] == pytest.approx(0.5)
    assert box["miou_interval"] == pytest.approx([0.4, 1.0])  # both draws of one image twice are in the 95 %
    assert headline(_scores()) == {"box_miou": pytest.approx(0.55), "box_mdice": pytest.approx(0.275)}


def test_the_interval_is_seeded_and_of_the_right_width() -> None:
    rng = np.random.default_rng(1)
    iou = rng.uniform(size=(400, 1))
    numbers = np.arange(400)
    scores = ObjectScores(("point",), numbers, numbers * 0, numbers + 1, iou, iou)
    point = summarize(scores)["prompts"]["point"]
    low, high = point["miou_interval"]
    assert low < point["miou"] < high
    assert high - low == pytest.approx(2 * 1.96 * iou.std() / 20, rel=0.15)
    assert summarize(scores) == summarize(scores)
    assert summarize(scores, seed=1) != summarize(scores)
    assert "miou_interval" not in summarize(scores, resamples=0)["prompts"]["point"]


def test_a_size_without_objects_has_no_mean() -> None:
    scores = ObjectScores(("box",), np.zeros(1, int), np.zeros(1, int), np.array([5]), np.ones((1, 1)), np.ones((1, 1)))
    assert summarize(scores)["prompts"]["box"]["by_size"]["large"] == {"objects": 0, "miou": None, "mdice": None}


def test_no_objects_at_all_is_an_error() -> None:
    scores = evaluate_sam(_scripted(_constant(0.0))[1], Images(count=1), indices=())
    for measure in (headline, summarize):
        with pytest.raises(DataError, match="no object"):
            measure(scores)


def test_an_image_without_objects_is_not_even_encoded() -> None:
    model, sam = _scripted(_constant(0.0))
    images = Images(count=2, objects=0)
    assert len(evaluate_sam(sam, images).area) == 0
    assert model.encoded == 0


def test_progress_is_told_once_an_image() -> None:
    seen: list[int] = []
    evaluate_sam(_scripted(_constant(0.0))[1], Images(), on_image=lambda: seen.append(1))
    assert len(seen) == 3


def test_choose_device() -> None:
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(SamletError, match="tpu"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        assert choose_device("auto").type == "cpu"
        with pytest.raises(SamletError, match="no CUDA GPU"):
            choose_device("cuda")
