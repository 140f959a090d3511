from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samlet.engine.overlays import (
    FINER,
    MARGIN,
    NEGATIVE_COLOUR,
    PALETTE,
    PANEL,
    POSITIVE_COLOUR,
    DrawnPrompts,
    mean_iou,
    save_answer,
    save_overlay,
    with_masks,
)


def _scene(height: int = 60, width: int = 90) -> tuple[np.ndarray, np.ndarray]:
    image = np.full((height, width, 3), 90, np.uint8)
    masks = np.zeros((2, height, width), np.bool_)
    masks[0, 10:40, 10:40] = True
    masks[1, 20:50, 50:80] = True
    return image, masks


def _has(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((np.abs(picture.astype(int) - colour).max(axis=-1) < 12).any())


def test_a_row_of_panels(tmp_path: Path) -> None:
    image, masks = _scene()
    path = tmp_path / "new" / "overlay.png"
    prompts = DrawnPrompts(np.array([[20.0, 20.0]]), None, np.array([[50.0, 20.0, 80.0, 50.0]]))
    save_overlay(path, image, prompts, {"ground truth": masks, "teacher": masks, "student": np.zeros_like(masks)})
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[1] == 5 * (PANEL + MARGIN) + MARGIN
    columns = [pixels[MARGIN:-40, MARGIN + k * (PANEL + MARGIN) :][:, :PANEL] for k in range(5)]
    assert not _has(columns[0], POSITIVE_COLOUR)
    assert _has(columns[1], POSITIVE_COLOUR)
    assert not np.array_equal(columns[0], columns[2])
    np.testing.assert_array_equal(columns[2], columns[3])
    np.testing.assert_array_equal(columns[0], columns[4])  # the student saw nothing: the bare image


def test_the_same_bytes_again(tmp_path: Path) -> None:
    image, masks = _scene()
    for name in ("a.png", "b.png"):
        save_overlay(tmp_path / name, image, DrawnPrompts(), {"ground truth": masks, "student": masks[::-1]})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_single_mask_may_come_without_its_axis(tmp_path: Path) -> None:
    image, masks = _scene()
    for name, value in (("a.png", masks[0]), ("b.png", masks[:1])):
        save_overlay(tmp_path / name, image, DrawnPrompts(), {"student": value})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_objects_have_their_own_colours_and_small_ones_lie_on_top() -> None:
    canvas = Image.new("RGB", (90, 60), (0, 0, 0))
    _, masks = _scene()
    masks[0] = True
    pixels = np.asarray(with_masks(canvas, masks)).astype(int)
    background, inside = pixels[55, 5], pixels[35, 65]
    assert np.abs(background - np.array(PALETTE[0]) * 0.42).max() < 4
    assert np.argmax(inside) == np.argmax(PALETTE[1])


def test_mean_iou() -> None:
    _, masks = _scene()
    assert mean_iou(masks, masks) == 1
    other = masks.copy()
    other[0] = False
    assert mean_iou(other, masks) == 0.5
    assert mean_iou(np.zeros_like(masks), np.zeros_like(masks)) == 0


@pytest.mark.parametrize("size", [(1, 1), (3, 700), (700, 3), (40, 40)])
def test_any_size_of_image(tmp_path: Path, size: tuple[int, int]) -> None:
    image = np.zeros((*size, 3), np.uint8)
    mask = np.ones(size, np.bool_)
    point = np.array([[size[1] - 1, size[0] - 1]])
    save_overlay(tmp_path / "a.png", image, DrawnPrompts(point), {"ground truth": mask, "student": mask})
    save_answer(tmp_path / "b.png", image, DrawnPrompts(point), mask)
    assert (tmp_path / "a.png").stat().st_size > 0


def test_an_answer_keeps_the_size_of_the_image(tmp_path: Path) -> None:
    image = np.full((480, 700, 3), 90, np.uint8)
    mask = np.zeros((480, 700), np.bool_)
    mask[100:200, 300:400] = True
    prompts = DrawnPrompts(np.array([[350, 150], [20, 30]]), np.array([1, 0]))
    save_answer(tmp_path / "a.png", image, prompts, mask)
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (480, 700, 3)
    assert _has(pixels[140:160, 340:360], POSITIVE_COLOUR)
    assert _has(pixels[20:40, 10:30], NEGATIVE_COLOUR)
    assert pixels[180, 320].argmax() == np.argmax(PALETTE[0])
    assert pixels[400, 600].tolist() == [90, 90, 90]


def test_masks_of_another_size_or_number_are_refused(tmp_path: Path) -> None:
    image, masks = _scene()
    with pytest.raises(ValueError, match="student"):
        save_overlay(tmp_path / "a.png", image, DrawnPrompts(), {"student": masks[:, :-1]})
    with pytest.raises(ValueError, match="1 masks and the ground truth 2"):
        save_overlay(tmp_path / "a.png", image, DrawnPrompts(), {"ground truth": masks, "student": masks[:1]})
    with pytest.raises(ValueError, match="mask"):
        save_answer(tmp_path / "a.png", image, DrawnPrompts(), masks[0, :, :-1])
    assert FINER > 1
    assert not list(tmp_path.iterdir())
