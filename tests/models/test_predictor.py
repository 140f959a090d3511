"""The Predictor's interface and its errors; that its answers are SAM's is in test_parity."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from samlet.errors import SamletError
from samlet.frames import preprocess, resize_longest_side
from samlet.models import Predictor, Sam
from tests.models.sizes import small_sam


@pytest.fixture(scope="module")
def sam() -> Sam:
    return small_sam()


def image(height: int = 50, width: int = 90) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def predictor(sam: Sam) -> Predictor:
    ready = Predictor(sam)
    ready.set_image(image())
    return ready


def test_shapes_and_kinds(predictor: Predictor) -> None:
    masks, iou, low_res = predictor.predict(np.array([[10, 20]]), np.array([1]))
    assert masks.shape == (3, 50, 90)
    assert masks.dtype == bool
    assert iou.shape == (3,)
    assert low_res.shape == (3, 16, 16)
    logits, _, _ = predictor.predict(np.array([[10, 20]]), np.array([1]), return_logits=True)
    assert np.array_equal(logits > 0, masks)
    single, _, _ = predictor.predict(box=np.array([5, 5, 60, 40]), multimask_output=False)
    assert single.shape == (1, 50, 90)
    again, _, _ = predictor.predict(np.array([[10, 20]]), np.array([1]), mask_input=low_res[:1], multimask_output=False)
    assert again.shape == (1, 50, 90)


def test_batches_are_prompts_one_by_one(predictor: Predictor) -> None:
    boxes = torch.tensor([[5.0, 5, 40, 30], [10, 2, 60, 20], [0, 0, 64, 35]])
    together = predictor.predict_torch(boxes=boxes, multimask_output=False, return_logits=True)
    for i in range(3):
        alone = predictor.predict_torch(boxes=boxes[i : i + 1], multimask_output=False, return_logits=True)
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[i : i + 1], theirs, rtol=1e-4, atol=1e-4)


def test_coordinates_are_of_the_original_image(predictor: Predictor) -> None:
    scale = 64 / 90
    numpy_way = predictor.predict(np.array([[30.0, 20.0]]), np.array([1]), return_logits=True)[2]
    point = torch.tensor([[[30 * scale, 20 * 36 / 50]]])
    torch_way = predictor.predict_torch(point, torch.tensor([[1]]))[2][0]
    np.testing.assert_allclose(numpy_way, torch_way.numpy(), rtol=1e-4, atol=1e-4)


def test_the_image_is_prepared_as_in_training(sam: Sam, predictor: Predictor) -> None:
    pixels, input_size = preprocess(image(), 64)
    with torch.no_grad():
        assert torch.equal(predictor.get_image_embedding(), sam.encode(pixels[None]).embedding)
    assert predictor.input_size == input_size == (36, 64)
    assert predictor.original_size == (50, 90)
    assert predictor.features is not None
    assert not predictor.features.requires_grad


def test_bgr_is_rgb_backwards(sam: Sam, predictor: Predictor) -> None:
    other = Predictor(sam)
    other.set_image(image()[..., ::-1], image_format="BGR")
    assert torch.equal(other.get_image_embedding(), predictor.get_image_embedding())


def test_set_torch_image_equals_set_image(sam: Sam, predictor: Predictor) -> None:
    resized = torch.from_numpy(resize_longest_side(image(), 64).copy()).permute(2, 0, 1)[None]
    other = Predictor(sam)
    other.set_torch_image(resized, (50, 90))
    torch.testing.assert_close(other.get_image_embedding(), predictor.get_image_embedding())
    assert (other.original_size, other.input_size) == ((50, 90), (36, 64))
    with pytest.raises(SamletError, match="longest side of 64"):
        other.set_torch_image(torch.zeros(1, 3, 30, 30), (50, 90))


def test_without_an_image(sam: Sam, predictor: Predictor) -> None:
    for bare in (Predictor(sam), predictor):
        bare.reset_image()
        assert bare.features is None
        for call in (bare.predict, bare.predict_torch, bare.get_image_embedding):
            with pytest.raises(SamletError, match="call set_image first"):
                call()


def test_a_refused_image_leaves_the_last_one(predictor: Predictor) -> None:
    before = predictor.get_image_embedding()
    for wrong in (image().astype(np.float32), image()[..., 0], np.zeros((4, 4, 4), np.uint8), [[1]]):
        with pytest.raises(SamletError, match="must be a numpy array of uint8"):
            predictor.set_image(wrong)  # type: ignore[arg-type]
    with pytest.raises(SamletError, match="RGB or BGR"):
        predictor.set_image(image(), "CMYK")  # type: ignore[arg-type]
    assert torch.equal(predictor.get_image_embedding(), before)


def test_points_need_labels(predictor: Predictor) -> None:
    with pytest.raises(SamletError, match="both or neither"):
        predictor.predict(np.array([[1, 2]]))
    with pytest.raises(SamletError, match="both or neither"):
        predictor.predict_torch(point_labels=torch.ones(1, 1))
    with pytest.raises(SamletError, match=r"\(1, 1, 16, 16\)"):
        predictor.predict(mask_input=np.zeros((1, 9, 9), np.float32))


def test_predicting_changes_no_model(sam: Sam) -> None:
    training = small_sam().train()
    with pytest.raises(SamletError, match=r"call sam\.eval\(\) first"):
        Predictor(training).set_image(image())
    before = {n: t.clone() for n, t in sam.state_dict().items()}
    Predictor(sam).set_image(image())
    assert all(torch.equal(t, before[n]) for n, t in sam.state_dict().items())


def test_signatures_are_sam_predictors() -> None:
    expected = {
        "set_image": ["image", "image_format"],
        "set_torch_image": ["transformed_image", "original_image_size"],
        "predict": ["point_coords", "point_labels", "box", "mask_input", "multimask_output", "return_logits"],
        "predict_torch": ["point_coords", "point_labels", "boxes", "mask_input", "multimask_output", "return_logits"],
        "get_image_embedding": [],
        "reset_image": [],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(Predictor, name)).parameters)[1:] == parameters
