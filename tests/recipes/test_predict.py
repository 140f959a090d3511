from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samlet.errors import SamletError
from samlet.models import Predictor, load_sam
from samlet.recipes.predict import BoxPrompt, PointPrompt, parse_box, parse_point, predict
from tests.tiny import write_teacher


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("weights") / "teacher.pth")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.mark.parametrize(
    "prompt",
    [
        (["20,30"], None, True),
        (["20,30", "60.5,10,0"], None, False),
        ([], "10,5,70,45", False),
        (["20,30"], "10,5,80,50", False),
    ],
)
def test_the_mask_of_the_predictor(
    tmp_path: Path,
    weights: Path,
    image: Path,
    capsys: pytest.CaptureFixture[str],
    prompt: tuple[list[str], str | None, bool],
) -> None:
    points, box, multimask = prompt
    out, overlay = tmp_path / "mask.png", tmp_path / "overlay.png"
    prediction = predict(weights, image, points=points, box=box, out=out, overlay=overlay, image_size=64, device="cpu")
    with Image.open(out) as picture:
        mask = np.asarray(picture)
        assert picture.mode == "L"
    assert mask.shape == (50, 80)
    assert set(np.unique(mask)) <= {0, 255}
    np.testing.assert_array_equal(mask > 0, prediction.mask)
    predictor = Predictor(load_sam(weights, image_size=64))
    predictor.set_image(np.asarray(Image.open(image)))
    clicks = [parse_point(text) for text in points]
    masks, scores, _ = predictor.predict(
        point_coords=np.array([click[:2] for click in clicks], np.float32) if clicks else None,
        point_labels=np.array([click.label for click in clicks]) if clicks else None,
        box=np.array(parse_box(box), np.float32) if box else None,
        multimask_output=multimask,
    )
    np.testing.assert_array_equal(masks[scores.argmax()], prediction.mask)
    assert prediction.predicted_iou == pytest.approx(float(scores.max()))
    assert overlay.stat().st_size > 1000
    assert "predicted IoU" in capsys.readouterr().out


def test_parsing() -> None:
    assert parse_point("3,4.5") == PointPrompt(3, 4.5, 1)
    assert parse_point(" 3, 4 ,0") == PointPrompt(3, 4, 0)
    assert parse_box("1,2,3,4") == BoxPrompt(1, 2, 3, 4)


@pytest.mark.parametrize("text", ["", "3", "3;4", "3,4,2", "3,4,1,1", "x,4", "nan,4", "inf,1", "3,,4"])
def test_a_point_that_cannot_be_read(text: str) -> None:
    with pytest.raises(SamletError, match=r"--point .*write x,y"):
        parse_point(text)


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,x", "5,2,3,4", "1,4,3,4", "1,2,3,inf"])
def test_a_box_that_cannot_be_read(text: str) -> None:
    with pytest.raises(SamletError, match="--box"):
        parse_box(text)


@pytest.mark.parametrize(
    ("points", "box", "named"),
    [
        (["80,10"], None, "80 x 50"),
        (["10,50"], None, "outside"),
        (["-1,5"], None, "--point -1,5"),
        ([], "10,10,81,20", "--box 10,10,81,20"),
        ([], "-1,10,20,20", "reaches outside"),
        ([], None, "--point x,y or --box"),
    ],
)
def test_prompts_outside_the_image_or_none_at_all(
    tmp_path: Path, image: Path, points: list[str], box: str | None, named: str
) -> None:
    """Nothing is loaded for them: the checkpoint does not even exist."""
    with pytest.raises(SamletError, match=named):
        predict(tmp_path / "none.pt", image, points=points, box=box, out=tmp_path / "mask.png")
    assert not (tmp_path / "mask.png").exists()


@pytest.mark.parametrize("link", [False, True])
def test_the_image_is_never_written_over(tmp_path: Path, image: Path, link: bool) -> None:
    """Refused before the checkpoint is opened: it does not even exist."""
    before, same = image.read_bytes(), tmp_path / "sub" / ".." / "image.png"
    (tmp_path / "sub").mkdir()
    if link:
        same = tmp_path / "link.png"
        same.hardlink_to(image)
    with pytest.raises(SamletError, match=r"--out .*is the image itself"):
        predict(tmp_path / "none.pt", image, points=["1,1"], out=same)
    with pytest.raises(SamletError, match=r"--overlay .*is the image itself"):
        predict(tmp_path / "none.pt", image, points=["1,1"], out=tmp_path / "mask.png", overlay=same)
    with pytest.raises(SamletError, match=r"--overlay .*is --out as well"):
        predict(tmp_path / "none.pt", image, points=["1,1"], out=tmp_path / "m.png", overlay=same.parent / "m.png")
    assert image.read_bytes() == before


def test_files_that_cannot_be_used(tmp_path: Path, image: Path, weights: Path) -> None:
    with pytest.raises(SamletError, match=r"mask\.jpg"):
        predict(weights, image, points=["1,1"], out=tmp_path / "mask.jpg")
    with pytest.raises(SamletError, match=r"none\.png"):
        predict(weights, tmp_path / "none.png", points=["1,1"])
    with pytest.raises(SamletError, match=r"none\.pt"):
        predict(tmp_path / "none.pt", image, points=["1,1"], out=tmp_path / "mask.png")
