from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from samlet.cli import app
from samlet.data.opening import open_split
from samlet.engine.naming import Named, name_checkpoints
from samlet.errors import CheckpointError, DataError, SamletError
from samlet.models import load_sam
from samlet.recipes.evaluate import evaluate, markdown
from tests.data.builders import picture, save
from tests.data.test_formats import DISCS, annotation, coco, entry, uncompressed
from tests.tiny import STUDENT, write_scenes, write_teacher


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), train=3, val=2)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_teacher(folder / "teacher.pth")
    write_teacher(folder / "base.pt", seed=2)
    return folder


def test_several_checkpoints_side_by_side_and_the_same_bytes_again(
    tmp_path: Path, scenes: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(weights / "base.pt"), f"big one={weights / 'teacher.pth'}"]
    for name in ("a", "b"):
        report = evaluate(given, scenes, image_size=64, out=tmp_path / name, clicks=(1, 2), device="cpu")
    for name in ("evaluate.json", "evaluate.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    written = json.loads((tmp_path / "a" / "evaluate.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(report))
    assert sorted(written["checkpoints"]) == ["base", "big one"]
    facts = written["checkpoints"]["base"]
    assert facts["images"] == 2
    assert facts["kind"] == "vit_b"
    assert facts["parameters"] == sum(p.numel() for p in load_sam(weights / "base.pt", image_size=64).parameters())
    assert sorted(facts["prompts"]) == ["box", "clicks_1", "clicks_2", "point"]
    low, high = facts["prompts"]["point"]["miou_interval"]
    assert 0 <= low <= facts["prompts"]["point"]["miou"] <= high <= 1
    shown = capsys.readouterr().out
    assert "big one" in shown
    assert "mDice" in shown
    table = markdown(report)
    assert "| base |" in table
    assert "+2 clicks" in table
    assert f"{100 * facts['prompts']['box']['miou']:.1f} [" in table


def test_a_split_may_be_named_or_be_the_data_itself(scenes: Path) -> None:
    assert open_split(scenes, "val", "auto").image_ids == open_split(scenes / "val", "val", "auto").image_ids
    assert len(open_split(scenes, "train", "auto")) == 3
    assert len(open_split(scenes / "train", "val", "auto")) == 3


def test_a_split_a_format_or_a_folder_that_is_not_there(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split 'test'"):
        open_split(scenes, "test", "auto")
    with pytest.raises(DataError, match="format: 'voc'"):
        open_split(scenes, "val", "voc")
    with pytest.raises(DataError, match="nowhere"):
        open_split(tmp_path / "nowhere", "val", "auto")


def test_a_folder_without_images_is_named_itself(tmp_path: Path, scenes: Path) -> None:
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=r"bare: there is no image"):
        open_split(tmp_path / "bare", "val", "auto")
    shutil.copytree(scenes / "val" / "image", tmp_path / "set" / "val")
    with pytest.raises(DataError, match=r"val: no image of the validation split 'val' has masks"):
        open_split(tmp_path / "set", "val", "auto")


def test_the_other_names_of_a_split_and_an_annotation_file(tmp_path: Path, scenes: Path) -> None:
    shutil.copytree(scenes / "val", tmp_path / "valid")
    assert open_split(tmp_path, "val", "auto").image_ids == open_split(scenes, "val", "auto").image_ids
    file = coco(tmp_path / "annotations" / "instances_val.json", [entry()], [annotation(uncompressed(DISCS[0]))])
    save(picture(), tmp_path / "images" / "val2017" / "a.png")
    assert open_split(file, "val", "auto").image_ids == ("a",)


@pytest.mark.parametrize("count", ["0", "-3"])
def test_no_image_is_no_evaluation(scenes: Path, count: str) -> None:
    done = CliRunner().invoke(app, ["evaluate", "none.pt", str(scenes), "--max-images", count])
    assert done.exit_code == 2
    assert "max-images" in done.output


def test_names_of_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "run.1" / "best").mkdir(parents=True)
    (tmp_path / "a=b.pt").touch()
    (tmp_path / "a.pt").touch()
    given = [str(tmp_path / name) for name in ("run.1", "a=b.pt", "a.pt")]
    assert [one.name for one in name_checkpoints(given)] == ["run.1", "a=b", "a"]
    assert name_checkpoints([str(tmp_path / "run.1" / "best")])[0].name == "run.1"
    assert name_checkpoints([f"x={tmp_path / 'a.pt'}"]) == [Named("x", tmp_path / "a.pt")]


def test_checkpoints_that_cannot_be_told_apart_or_found(tmp_path: Path) -> None:
    (tmp_path / "a.pt").touch()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.pt").touch()
    with pytest.raises(CheckpointError, match="called 'a' too"):
        name_checkpoints([str(tmp_path / "a.pt"), str(tmp_path / "b" / "a.pt")])
    with pytest.raises(CheckpointError, match="no such file"):
        name_checkpoints([str(tmp_path / "none.pt")])
    with pytest.raises(CheckpointError, match="none to evaluate"):
        name_checkpoints([])


def test_a_model_in_the_place_of_the_data_is_named(tmp_path: Path, scenes: Path) -> None:
    for name in ("a.pt", "b.safetensors", "run/best/student.safetensors", "hf/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    a, b, run, hf = (tmp_path / name for name in ("a.pt", "b.safetensors", "run", "hf"))
    cases: tuple[tuple[list[Path | str], list[Path | str]], ...] = (
        ([scenes, a], [a, scenes]),
        ([scenes, b, run], [b, run, scenes]),
        ([f"mine={a}", hf], [a, hf, "my_images/"]),
    )
    for given, meant in cases:
        *checkpoints, data = given
        with pytest.raises(DataError) as caught:
            evaluate([str(one) for one in checkpoints], Path(data), device="cpu")
        said = f"{data}: is a model, and the data set comes last; write samlet evaluate {' '.join(map(str, meant))}"
        assert str(caught.value) == said


def test_out_must_not_be_a_file(tmp_path: Path, scenes: Path, weights: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(SamletError, match="is a file"):
        evaluate(
            [str(weights / "base.pt")],
            scenes,
            image_size=64,
            out=tmp_path / "out",
            clicks=(),
            device="cpu",
            max_images=1,
        )


def test_real_photographs(tmp_path: Path, shared: Path) -> None:
    write_teacher(tmp_path / "student.pt", kind="vit_t", **STUDENT)
    report = evaluate(
        [str(tmp_path / "student.pt")],
        shared / "data" / "potholes",
        image_size=64,
        out=tmp_path / "out",
        clicks=(1,),
        device="cpu",
        max_images=2,
    )
    assert report["checkpoints"]["student"]["images"] == 2
