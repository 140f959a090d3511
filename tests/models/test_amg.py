"""The automatic generator: its parts against naive ones, its two forms against each other, its promises."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from samlet.errors import SamletError
from samlet.frames import postprocess_masks
from samlet.models import AmgSettings, AutomaticMaskGenerator, Sam, make_prompts
from samlet.models.amg import regions
from samlet.models.amg.boxes import Crop, boxes_of, crops_of, cut_by_crop, nms
from samlet.models.amg.fast import STRIDES
from samlet.models.amg.full_size import Enlarger
from samlet.models.amg.points import coarse_to_fine, near, point_grid, point_grids
from samlet.types import ImageFeatures
from tests.models.amg_stand_in import Blobs, scene
from tests.models.sizes import small_sam

KEYS = ["segmentation", "area", "bbox", "predicted_iou", "point_coords", "stability_score", "crop_box"]
# x, y, radius, height; all on the coarse lattice of 8 x 8 points over 128 x 128 pixels
EASY = np.array([[24.0, 24, 9, 40], [72, 24, 10, 40], [24, 72, 8, 40], [72, 72, 11, 40]])


@pytest.fixture(scope="module")
def sam() -> Sam:
    return small_sam()


def noise(height: int = 50, width: int = 70) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def lenient(sam: Sam, **changes: Any) -> AutomaticMaskGenerator:
    """A generator that keeps something of random weights."""
    given: dict[str, Any] = {"points_per_side": 6, "pred_iou_thresh": -1.0, "stability_score_thresh": 0.1}
    given["stability_score_offset"] = 0.05  # the logits of random weights lie within 1
    return AutomaticMaskGenerator(sam, **{**given, **changes})


def on_blobs(sam: Sam, **changes: Any) -> AutomaticMaskGenerator:
    given: dict[str, Any] = {"points_per_side": 8, "pred_iou_thresh": 0.75, "stability_score_thresh": 0.5}
    generator = AutomaticMaskGenerator(sam, **{**given, **changes})
    generator.predictor = Blobs(EASY, image_size=128)
    return generator


def naive_nms(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    """Pair by pair, in the float32 of torchvision."""
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        for j in kept:
            w = min(boxes[i][2], boxes[j][2]) - max(boxes[i][0], boxes[j][0])
            h = min(boxes[i][3], boxes[j][3]) - max(boxes[i][1], boxes[j][1])
            both = max(w, np.float32(0)) * max(h, np.float32(0))
            area = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (boxes[i], boxes[j]))
            if area > both and float(both / (area - both)) > threshold:
                break
        else:
            kept.append(i)
    return kept


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(0, 60), st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]))
def test_nms_is_the_naive_one(seed: int, count: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 12, (count, 2))  # small whole numbers: ties, equal boxes, boxes without area
    boxes = np.concatenate([corners, corners + rng.integers(0, 8, (count, 2))], axis=1).astype(np.float32)
    scores = rng.integers(0, 5, count).astype(np.float32)
    assert nms(boxes, scores, threshold).tolist() == naive_nms(boxes, scores, threshold)


def test_an_overlap_of_the_threshold_is_none() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 5]], np.float32)
    assert nms(boxes, np.array([1.0, 0.5]), 0.5).tolist() == [0, 1]
    assert nms(boxes, np.array([1.0, 0.5]), 0.49).tolist() == [0]
    assert nms(boxes, np.array([1.0, 0.5]), 0.49, slack=np.array([0.0, 0.1])).tolist() == [0, 1]


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 3), st.floats(0, 1))
def test_crops_cover_the_image(height: int, width: int, layers: int, overlap: float) -> None:
    crops = crops_of((height, width), layers, overlap)
    assert crops[0] == Crop(0, 0, width, height, 0)
    for layer in range(layers + 1):
        seen = np.zeros((height, width), dtype=bool)
        for crop in crops:
            assert 0 <= crop.x0 < crop.x1 <= width
            assert 0 <= crop.y0 < crop.y1 <= height
            if crop.layer == layer:
                seen[crop.y0 : crop.y1, crop.x0 : crop.x1] = True
        assert seen.all()


def test_crops_are_sams() -> None:
    assert [crop.box for crop in crops_of((333, 250), 1, 512 / 1500)] == [
        (0, 0, 250, 333),
        (0, 0, 168, 209),
        (0, 124, 168, 333),
        (83, 0, 250, 209),
        (83, 124, 250, 333),
    ]


def test_boxes_are_of_the_first_and_last_pixel() -> None:
    masks = torch.zeros(3, 8, 9, dtype=torch.bool)
    masks[0, 2:5, 3:7] = True
    masks[1, 7, 8] = True
    assert boxes_of(masks).tolist() == [[3, 2, 6, 4], [8, 7, 8, 7], [0, 0, 0, 0]]


def test_a_box_at_an_inner_edge_is_cut() -> None:
    crop, size = Crop(0, 0, 100, 200, 1), (200, 300)
    boxes = np.array([[50, 50, 79, 90], [50, 50, 80, 90], [0, 0, 40, 199], [50, 50, 101, 90]], np.float32)
    assert cut_by_crop(boxes, crop, size).tolist() == [False, True, False, True]


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1))
def test_run_lengths_are_the_mask(seed: int, height: int, width: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    (rle,) = regions.encode(np.ascontiguousarray(mask.T)[None])
    assert np.array_equal(regions.decode(rle), mask)
    runs = regions.counts(rle)
    assert sum(runs) == mask.size
    assert sum(runs[1::2]) == mask.sum() == regions.areas([rle])[0]


def test_long_runs_are_read() -> None:
    mask = np.zeros((1200, 1300), dtype=bool)
    mask[5:1100, 400:1290] = True
    (rle,) = regions.encode(np.ascontiguousarray(mask.T)[None])
    assert np.array_equal(regions.decode(rle), mask)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 0.9), st.integers(1, 12))
def test_no_small_region_is_left(seed: int, share: float, area: int) -> None:
    mask = np.random.default_rng(seed).random((14, 17)) < share
    found, changed = regions.without_small_regions(mask, area)
    assert changed == (not np.array_equal(found, mask))
    for pixels in (~found, found):
        labels, count = ndimage.label(pixels, structure=np.ones((3, 3)))
        sizes = np.bincount(labels.ravel(), minlength=2)[1:]
        if pixels is found and count == 1:
            continue  # the largest island stays, however small
        assert (sizes[:count] >= area).all() or pixels is not found


def test_small_regions_by_hand() -> None:
    mask = np.zeros((12, 12), dtype=bool)
    mask[1:9, 1:9] = True
    mask[3, 3] = mask[4, 4] = False  # one hole, across a corner
    mask[11, 11] = True
    whole = np.zeros_like(mask)
    whole[1:9, 1:9] = True
    assert np.array_equal(regions.without_small_regions(mask, 3)[0], whole)
    kept, changed = regions.without_small_regions(mask, 2)
    assert changed
    assert not kept[3, 3]
    assert not kept[11, 11]
    assert np.array_equal(regions.without_small_regions(whole, 70)[0], whole)  # under 70 pixels, but the largest


def test_points_lie_in_the_middle_of_their_cells() -> None:
    assert point_grid(2).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    assert [len(grid) for grid in point_grids(8, 3, 2)] == [64, 16, 4, 1]
    assert [len(grid) for grid in point_grids(2, 2, 4)] == [4, 1, 1]


@pytest.mark.parametrize("side", [1, 2, 3, 8, 13])
def test_stages_share_out_the_points(side: int) -> None:
    stages = coarse_to_fine(point_grid(side), STRIDES)
    assert sorted(np.concatenate(stages).tolist()) == list(range(side * side))
    if side == 8:
        assert [len(stage) for stage in stages] == [9, 55]


def test_only_what_is_near_hope_or_never_asked_is_worth_it() -> None:
    grid = point_grid(8)
    asked, hopeful = np.zeros(64, dtype=bool), np.zeros(64, dtype=bool)
    assert near(grid, asked, hopeful, 2).all()
    asked[:] = True
    hopeful[0] = True
    assert np.flatnonzero(near(grid, asked, hopeful, 2)).tolist() == [0, 1, 2, 8, 9, 10, 16, 17, 18]


def test_the_signature_is_sams() -> None:
    names = list(inspect.signature(AutomaticMaskGenerator).parameters)
    settings = [name for name in AmgSettings().as_dict() if name not in ("fast", "min_mask_region_area")]
    assert names[:14] == ["model", *settings, "point_grids", "min_mask_region_area", "output_mode"]
    generator = AutomaticMaskGenerator(small_sam())
    assert generator.settings == AmgSettings()
    assert AutomaticMaskGenerator.of(small_sam(), AmgSettings(box_nms_thresh=0.3)).settings.box_nms_thresh == 0.3


@pytest.mark.parametrize("fast", [False, True])
def test_what_is_returned_is_what_it_says(sam: Sam, fast: bool) -> None:
    image = noise()
    found = lenient(sam, fast=fast).generate(image)
    assert found
    for mask in found:
        assert list(mask) == KEYS
        pixels = mask["segmentation"]
        assert pixels.shape == (50, 70)
        assert pixels.sum() == mask["area"]
        x0, y0, x1, y1 = boxes_of(torch.from_numpy(pixels)[None])[0]
        assert mask["bbox"] == [x0, y0, x1 - x0, y1 - y0]
        assert mask["crop_box"] == [0, 0, 70, 50]
        assert mask["stability_score"] >= np.float32(0.1)
    scores = [mask["predicted_iou"] for mask in found]
    assert scores == sorted(scores, reverse=True)


def test_three_modes_of_output_are_one_mask(sam: Sam) -> None:
    image = noise()
    binary, plain, coco = (
        [m["segmentation"] for m in lenient(sam, output_mode=mode).generate(image)]
        for mode in ("binary_mask", "uncompressed_rle", "coco_rle")
    )
    assert len(binary) == len(plain) == len(coco) > 0
    for mask, runs, rle in zip(binary, plain, coco, strict=True):
        assert np.array_equal(regions.decode(rle), mask)
        assert runs == {"size": [50, 70], "counts": regions.counts(rle)}
        assert isinstance(rle["counts"], str)


def test_a_mask_is_where_logits_exceed_zero(sam: Sam) -> None:
    """Each kept mask is one of the three answers to its own click, cut at 0."""
    image = noise()
    generator = lenient(sam, fast=False, box_nms_thresh=1.0)
    found = generator.find(image)
    assert found.rles
    generator.predictor.set_image(image)
    answers = generator.predictor.at_points(found.points.astype(float), None)
    logits = postprocess_masks(answers.low_res_logits, (46, 64), (50, 70), 64)
    for i, rle in enumerate(found.rles):
        k = int((answers.iou[i] - float(found.predicted_iou[i])).abs().argmin())
        assert (regions.decode(rle) != (logits[i, k] > 0).numpy()).mean() < 1e-3


def test_points_are_prompts_of_one_point(sam: Sam) -> None:
    predictor = lenient(sam).predictor
    predictor.set_image(noise())
    points = point_grid(3) * np.array([70, 50])
    together = predictor.at_points(points, None)
    assert together.low_res_logits.shape == (9, 3, 16, 16)
    for i in range(9):
        alone = predictor.at_points(points[i : i + 1], None)
        torch.testing.assert_close(alone.low_res_logits[0], together.low_res_logits[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_decoder_leaves_out_what_is_estimated_low(sam: Sam, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samlet.models.mask_decoder.CHUNK_TOKENS", chunk * 16)
    generator = torch.Generator().manual_seed(0)
    features = ImageFeatures(torch.randn(1, 256, 4, 4, generator=generator), {})
    points = torch.rand(7, 1, 2, generator=generator) * 64
    prompts = make_prompts(torch.zeros(7, dtype=torch.long), points, torch.ones(7, 1, dtype=torch.long))
    with torch.no_grad():
        everything = sam.decode(features, prompts, True, taps=["prompted.2", "upscaled"])
        best = everything.iou_predictions.max(dim=1).values
        for min_iou in (float(best.sort().values[3]), 1e9, -1e9):
            some = sam.decode(features, prompts, True, taps=["prompted.2", "upscaled"], min_iou=min_iou)
            assert some.kept is not None
            assert some.kept.tolist() == (best > min_iou).tolist()
            for name in ("low_res_logits", "iou_predictions", "mask_tokens"):
                torch.testing.assert_close(getattr(some, name), getattr(everything, name)[some.kept])
            for name, value in some.taps.items():
                torch.testing.assert_close(value, everything.taps[name][some.kept])
    assert everything.kept is None


def same_masks(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """Whether both hold the same masks with the same scores, in the same order."""
    return len(one) == len(other) and all(
        np.array_equal(a["segmentation"], b["segmentation"])
        and {k: a[k] for k in KEYS[1:]} == {k: b[k] for k in KEYS[1:]}
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("crop_n_layers", [0, 1])
def test_on_easy_images_both_forms_agree(sam: Sam, crop_n_layers: int) -> None:
    """Where the best estimated click of each thing lies on the coarse grid."""
    image = scene(128, 128)
    plain = on_blobs(sam, fast=False, crop_n_layers=crop_n_layers).generate(image)
    quick = on_blobs(sam, fast=True, crop_n_layers=crop_n_layers)
    found = quick.generate(image)
    assert len(plain) >= 4
    if crop_n_layers == 0:
        assert same_masks(plain, found)
    for mask in plain:  # each has its like
        ious = [
            (m["segmentation"] & mask["segmentation"]).sum() / (m["segmentation"] | mask["segmentation"]).sum()
            for m in found
        ]
        assert max(ious) > 0.9


def test_the_fast_form_clicks_less(sam: Sam) -> None:
    image = scene(128, 128)
    for side, most in ((8, 64), (16, 240)):  # a coarse grid is asked whole
        plain, quick = (on_blobs(sam, fast=fast, points_per_side=side) for fast in (False, True))
        plain.find(image)
        quick.find(image)
        assert isinstance(plain.predictor, Blobs)
        assert isinstance(quick.predictor, Blobs)
        assert sum(plain.predictor.asked) == side**2
        assert sum(quick.predictor.asked) <= most


@pytest.mark.parametrize("fast", [False, True])
def test_an_empty_mask_is_none_whatever_the_thresholds(sam: Sam, fast: bool) -> None:
    """SAM keeps it at a threshold of 0; no reader of annotations takes it."""
    found = lenient(sam, points_per_side=4, fast=fast, stability_score_thresh=0.0).find(scene(90, 70))
    areas = regions.areas(list(found.rles))
    assert len(areas)
    assert areas.min() > 0


@pytest.mark.parametrize("fast", [False, True])
def test_the_memory_budget_changes_no_answer(sam: Sam, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    largest: list[int] = []
    plainly = Enlarger._some

    def watched(self: Enlarger, low_res: torch.Tensor) -> Any:
        largest.append(len(low_res) * 4 * (self.image_size**2 + 150 * 140))
        return plainly(self, low_res)

    monkeypatch.setattr(Enlarger, "_some", watched)
    image = scene(150, 140)
    roomy = on_blobs(sam, fast=fast).generate(image)
    assert max(largest) > 3_000_000 or fast
    largest.clear()
    tight = on_blobs(sam, fast=fast, memory_budget=3_000_000).generate(image)
    assert 0 < max(largest) <= 3_000_000
    assert same_masks(roomy, tight)
    assert Enlarger(Crop(0, 0, 9, 9, 0), (9, 9), (9, 9), 64, AmgSettings(), 1).at_a_time(torch.device("cpu")) == 1


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("shape", [(1, 90), (90, 1), (1, 1), (7, 300)])
def test_strips_are_images(sam: Sam, shape: tuple[int, int], fast: bool) -> None:
    for crop_n_layers in (0, 2):
        generator = lenient(sam, points_per_side=4, fast=fast, crop_n_layers=crop_n_layers)
        generator.settings = AmgSettings.from_dict({**generator.settings.as_dict(), "stability_score_thresh": 0.0})
        assert all(mask["segmentation"].shape == shape for mask in generator.generate(noise(*shape)))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("crop_n_layers", [0, 1])
def test_nothing_found_is_an_empty_list(sam: Sam, fast: bool, crop_n_layers: int) -> None:
    for harsh in ({"pred_iou_thresh": 1e6}, {"stability_score_thresh": 1.1}):
        generator = lenient(sam, fast=fast, crop_n_layers=crop_n_layers, min_mask_region_area=5, **harsh)
        assert generator.generate(noise()) == []
        found = generator.find(noise())
        assert found.boxes.shape == (0, 4)
        assert found.points.shape == (0, 2)
        assert found.size == (50, 70)


def test_small_regions_go_and_duplicates_of_changed_masks_with_them(sam: Sam) -> None:
    image = noise()
    found = lenient(sam, min_mask_region_area=40).generate(image)
    assert found
    for mask in found:
        assert not regions.without_small_regions(mask["segmentation"], 40)[1] or mask["area"] < 40
        x0, y0, x1, y1 = boxes_of(torch.from_numpy(mask["segmentation"])[None])[0]
        assert mask["bbox"] == [x0, y0, x1 - x0, y1 - y0]


def test_point_grids_of_ones_own(sam: Sam) -> None:
    centre = [np.array([[0.5, 0.5]])]
    found = lenient(sam, points_per_side=None, point_grids=centre, stability_score_thresh=0.0).find(noise())
    assert (found.points == [35, 25]).all()
    assert 1 <= len(found.rles) <= 3


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"points_per_side": None}, "points_per_side and point_grids"),
        ({"point_grids": [np.zeros((1, 2))]}, "points_per_side and point_grids"),
        ({"output_mode": "png"}, "output_mode 'png'"),
        ({"points_per_side": None, "point_grids": [np.full((1, 2), 2.0)]}, r"point_grids\[0\]"),
        ({"points_per_side": None, "point_grids": [np.zeros((1, 2))], "crop_n_layers": 1}, "needs 2"),
        ({"points_per_batch": 0}, "points_per_batch: must be at least 1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(sam: Sam, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(SamletError, match=told):
        AutomaticMaskGenerator(sam, **arguments)


def test_what_is_no_image_or_no_still_model_is_refused(sam: Sam) -> None:
    with pytest.raises(SamletError, match="must be a numpy array of uint8"):
        lenient(sam).generate(noise().astype(np.float32))
    training = small_sam().train()
    with pytest.raises(SamletError, match=r"call sam\.eval\(\) first"):
        lenient(training).generate(noise())
    assert training.training


def test_the_model_is_left_as_it_was(sam: Sam) -> None:
    before = {name: tensor.clone() for name, tensor in sam.state_dict().items()}
    lenient(sam).generate(noise())
    assert all(torch.equal(tensor, before[name]) for name, tensor in sam.state_dict().items())
    assert not sam.training
