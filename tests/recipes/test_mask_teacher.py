"""Training on a teacher's automatic masks: found once, kept, stored, and never those of something else."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from samlet import labelling, mask_extraction
from samlet.config import RunConfig
from samlet.data.dataset import SegmentationDataset
from samlet.data.images import read_image
from samlet.data.sampler import SampleKey
from samlet.distill.kept_masks import FOLDER, read_masks
from samlet.distill.store.checking import check
from samlet.engine import automatic_masks
from samlet.engine.device import build_accelerator
from samlet.engine.facts import facts_of_start
from samlet.engine.run_dir import RunDir
from samlet.errors import ConfigError, DataError, SamletError
from samlet.labelling import label_by_teacher, search_settings, training_images
from samlet.models.amg import AmgSettings, AutomaticMasks, save_tuned
from samlet.recipes.doctor import examine
from samlet.recipes.extract import extract
from samlet.recipes.store import verify
from samlet.recipes.train import train
from samlet.run import plain_config
from samlet.schema import load_config
from tests.distill.automatic import found
from tests.tiny import tiny_config, write_scenes, write_teacher

GRID: dict[str, Any] = {"points_per_side": 3, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
SHORT: dict[str, Any] = {"max_steps": 2}


@pytest.fixture(autouse=True)
def _unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # which only a power cut would notice


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Scenes, 4 and 1, and a teacher."""
    folder = tmp_path_factory.mktemp("made")
    return write_scenes(folder / "scenes", train=4, val=1), write_teacher(folder / "teacher.pth")


@pytest.fixture
def scenes(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """Scenes that a test may change."""
    return Path(shutil.copytree(made[0], tmp_path / "scenes"))


def halves(pixels: np.ndarray) -> AutomaticMasks:
    """A stand-in for a generator: the left and the upper half, whatever the image shows."""
    left, upper = (np.zeros(pixels.shape[:2], np.bool_) for _ in range(2))
    left[:, : pixels.shape[1] // 2] = upper[: pixels.shape[0] // 2] = True
    return found([left, upper], (pixels.shape[0], pixels.shape[1]))


@pytest.fixture
def _halves(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (labelling, mask_extraction):
        monkeypatch.setattr(module, "generator_of", lambda sam, settings: halves)


def config_of(scenes: Path, teacher: Path, out: Path, **blocks: Any) -> RunConfig:
    return tiny_config(
        scenes,
        out,
        mask_teacher={"enable": True, **GRID, **blocks.pop("mask_teacher", {})},
        teachers=blocks.pop("teachers", [{"name": "T", "checkpoint": str(teacher)}]),
        training={**SHORT, **blocks.pop("training", {})},
        **{"augmentation": {"enable": False}, **blocks},
    )


def stored(scenes: Path, teacher: Path, out: Path, root: Path, **blocks: Any) -> RunConfig:
    distillation = {"precomputed_root": str(root), **blocks.pop("distillation", {})}
    masks = {"precomputed": True, **blocks.pop("mask_teacher", {})}
    return config_of(scenes, teacher, out, mask_teacher=masks, distillation=distillation, **blocks)


def labelled(config: RunConfig) -> SegmentationDataset:
    accelerator: Accelerator = build_accelerator(config.training)
    return label_by_teacher(config, training_images(config), accelerator, RunDir(config.output_dir)).data


def objects(data: SegmentationDataset) -> dict[str, list[np.ndarray]]:
    made = dict[str, list[np.ndarray]]()
    for record in data.records:
        size = read_image(record.image_path).shape[:2]
        masks = record.open_masks((size[0], size[1])) if record.open_masks else ()
        made[record.image_id] = [masks.read(n) for n in range(len(masks))] if masks else []
    return made


def equal(left: dict[str, list[np.ndarray]], right: dict[str, list[np.ndarray]]) -> bool:
    return left.keys() == right.keys() and all(
        len(left[name]) == len(right[name])
        and all(np.array_equal(a, b) for a, b in zip(left[name], right[name], strict=True))
        for name in left
    )


@contextmanager
def searched() -> Iterator[list[str]]:
    """The images whose masks are found meanwhile."""
    names, real = list[str](), automatic_masks.compute

    def compute(asked: Any, *rest: Any) -> Any:
        names.append(asked.item.image.stem)
        return real(asked, *rest)

    with pytest.MonkeyPatch.context() as patch:
        for module in (labelling, mask_extraction):
            patch.setattr(module, "compute", compute)
        yield names


def test_stored_masks_are_those_that_the_run_would_find(made: tuple[Path, Path], tmp_path: Path) -> None:
    """With the real generator on a random teacher."""
    online = labelled(config_of(*made, tmp_path / "online", mask_teacher={"method": "replace_gt"}))
    ahead = stored(*made, tmp_path / "ahead", tmp_path / "stores", mask_teacher={"method": "replace_gt"})
    assert extract(ahead) == 0
    assert not (tmp_path / "stores" / "T" / "manifest.json").exists()  # nothing is distilled: masks are all it holds
    with searched() as names:
        assert equal(objects(labelled(ahead)), objects(online))
    assert names == []
    assert all(objects(online).values())


@pytest.mark.usefixtures("_halves")
@pytest.mark.parametrize("method", ["replace_gt", "gt_override", "dual_supervision"])
def test_each_method_trains_every_mode_with_distillation(made: tuple[Path, Path], tmp_path: Path, method: str) -> None:
    truth = objects(training_images(config_of(*made, tmp_path / "run")))
    config = config_of(
        *made,
        tmp_path / "run",
        mask_teacher={"method": method},
        distillation={"enable": True, "encoder_patch": {}, "dense_mask_logits": {}},
        dataset={"mode": {"replace_gt": "point", "gt_override": "mixed"}.get(method, "everything"), "grid_points": 4},
        augmentation={"enable": True},
    )
    seen = objects(labelled(config))
    for name, own in truth.items():
        kept = 0 if method == "replace_gt" else len(own)
        assert all(np.array_equal(a, b) for a, b in zip(seen[name], own[:kept], strict=False))
        assert len(seen[name]) - kept in ((2,) if method != "gt_override" else (0, 1, 2))
    assert train(config) == 0
    rows = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row["distill/dense_mask_logits"] > 0 for row in rows if row["split"] == "train")


@pytest.mark.usefixtures("_halves")
def test_images_without_masks_are_labelled_by_the_teacher(
    scenes: Path, made: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.rmtree(scenes / "train" / "mask")
    config = config_of(scenes, made[1], tmp_path / "run", mask_teacher={"method": "replace_gt"})
    assert config.dataset.unlabelled == "refuse"  # which asks for ground truth, and none is read here
    sample = labelled(config)[SampleKey(0, 0)]
    assert sample.labelled.all()
    assert train(config) == 0
    beside = config_of(scenes, made[1], tmp_path / "other", mask_teacher={"method": "gt_override"})
    with pytest.raises(DataError, match="have no masks"):
        train(beside)


@pytest.mark.usefixtures("_halves")
def test_masks_are_found_once_and_a_stop_keeps_them(made: tuple[Path, Path], tmp_path: Path) -> None:
    calm, stopped = (config_of(*made, tmp_path / name) for name in ("calm", "stopped"))
    assert train(calm) == 0
    real = automatic_masks.compute

    def compute(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelling, "compute", compute)
        assert train(stopped) == 143
    kept = tmp_path / "stopped" / "automatic_masks"
    assert len(list(kept.iterdir())) == 1
    (kept / ".b.json.1.2.tmp").write_text("half")
    with searched() as names:
        assert train(stopped) == 0
    assert len(names) == 3
    with searched() as names:
        assert train(stopped) == 0
    assert names == []
    for name in ("student.safetensors", "metrics.jsonl"):
        assert (tmp_path / "calm" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name
    assert not list(kept.glob(".*"))


@pytest.mark.usefixtures("_halves")
def test_a_run_goes_on_with_masks_of_the_same_making_alone(made: tuple[Path, Path], tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.pth"
    shutil.copy(made[1], teacher)
    config = config_of(made[0], teacher, tmp_path / "run")
    assert train(config) == 0
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["mask_teacher"]
    assert (facts["teacher_kind"], facts["settings"]["points_per_side"]) == ("vit_b", 3)
    assert len(facts["masks_sha256"]) == 64
    changed = config_of(made[0], teacher, tmp_path / "run", mask_teacher={"method": "replace_gt"})
    with pytest.raises(ConfigError, match=r"mask_teacher\.method was 'gt_override', is 'replace_gt'"):
        train(changed)
    assert train(config_of(made[0], teacher, tmp_path / "run", mask_teacher={"points_per_batch": 7})) == 0
    write_teacher(teacher, seed=9)
    with searched() as names, pytest.raises(ConfigError, match=r"run\.json: this run learns from other .*teacher_sha"):
        train(config)
    assert names == []


def test_the_configuration_s_digest_knows_the_masks(made: tuple[Path, Path], tmp_path: Path) -> None:
    def digest(**masks: Any) -> str:
        plain = plain_config(config_of(*made, tmp_path / "run", mask_teacher=masks))
        return str(facts_of_start(plain, 1, [])["config_sha256"])

    assert digest() == digest(points_per_batch=8)
    assert digest(pred_iou_thresh=None) == digest(pred_iou_thresh=0.88)  # run.json knows what they came to
    assert len({digest(), digest(iou_threshold=0.4), digest(method="replace_gt"), digest(enable=False)}) == 4
    assert digest(enable=False) == digest(enable=False, iou_threshold=0.4)


@pytest.mark.usefixtures("_halves")
def test_the_store_is_added_to_and_repaired_image_by_image(
    scenes: Path, made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = stored(scenes, made[1], tmp_path / "run", tmp_path / "stores")
    masks = tmp_path / "stores" / "T" / FOLDER / "train"
    with searched() as names:
        assert extract(config) == 0
    assert len(names) == 4
    assert "images      4, 4 to search" in capsys.readouterr().out
    whole = {place.name: place.read_bytes() for place in masks.iterdir()}
    with searched() as names:
        assert extract(config) == 0
    assert names == []
    first, second, *_ = sorted((scenes / "train" / "image").iterdir())
    Image.fromarray(np.asarray(Image.open(first))[::-1]).save(first)
    (masks / f"{second.stem}.json").write_text("{}")
    with searched() as names:
        assert extract(config) == 0
    assert sorted(names) == [first.stem, second.stem]
    assert (masks / f"{second.stem}.json").read_bytes() == whole[f"{second.stem}.json"]
    assert train(config) == 0


@pytest.mark.usefixtures("_halves")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("weights", "teacher_sha256 is '.*' there"),
        ("settings", r"settings\.points_per_side is 3 there, 4 is wanted"),
        ("size", "image_size is 64 there, 96 is wanted"),
        ("image", "image_sha256 is"),
        ("damage", "damaged"),
        ("missing", "missing: there are no automatic masks of"),
    ],
)
def test_stale_or_damaged_masks_are_refused_by_the_name_of_the_field(
    scenes: Path, made: tuple[Path, Path], tmp_path: Path, change: str, said: str
) -> None:
    assert extract(stored(scenes, made[1], tmp_path / "run", tmp_path / "stores")) == 0
    teacher, more = made[1], dict[str, Any]()
    image = sorted((scenes / "train" / "image").iterdir())[1]
    place = tmp_path / "stores" / "T" / FOLDER / "train" / f"{image.stem}.json"
    if change == "weights":
        teacher = write_teacher(tmp_path / "other.pth", seed=5)
    elif change == "settings":
        more = {"mask_teacher": {"points_per_side": 4}}
    elif change == "size":
        more = {"teachers": [{"name": "T", "checkpoint": str(teacher), "image_size": 96}]}
    elif change == "image":
        Image.fromarray(np.asarray(Image.open(image))[::-1]).save(image)
    elif change == "damage":
        place.write_bytes(place.read_bytes().replace(b"0.9", b"0.8", 1))
    else:
        place.unlink()
    config = stored(scenes, teacher, tmp_path / "run", tmp_path / "stores", **more)
    with pytest.raises(DataError, match=f"{said}.*samlet extract"):
        train(config)
    if change in ("weights", "settings", "size"):  # days of somebody's search
        before = {path: path.read_bytes() for path in place.parent.iterdir()}
        with pytest.raises(DataError, match=f"holds masks of another making: {said}.*give another folder, or remove"):
            extract(config)
        assert {path: path.read_bytes() for path in place.parent.iterdir()} == before
        shutil.rmtree(tmp_path / "stores" / "T" / FOLDER)
    assert extract(config) == 0
    assert train(config) == 0


@pytest.mark.usefixtures("_halves")
def test_stored_features_and_answers_are_of_the_same_objects(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Crops and fixed prompts depend on the objects, so extraction and training must have the same ones."""
    blocks: dict[str, Any] = {
        "augmentation": {"variants": 2, "scale": [1.5, 2.0]},
        "prompts": {"fixed": True},
        "extraction": {"decoder_outputs": True, "dtype": "fp32"},
        "dataset": {"mode": "point"},
        "mask_teacher": {"method": "dual_supervision", "precomputed": None},
    }
    distillation = {"enable": True, "encoder_patch": {}, "dense_mask_logits": {}}
    ahead = {**distillation, "use_precomputed_features": True}
    config = stored(*made, tmp_path / "cached", tmp_path / "stores", distillation=ahead, **blocks)
    assert extract(config) == 0
    assert train(config) == 0
    assert train(config_of(*made, tmp_path / "online", distillation=distillation, **blocks)) == 0
    left, right = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("online", "cached")
    )
    assert [row["loss"] for row in left if "loss" in row] == pytest.approx(
        [row["loss"] for row in right if "loss" in row], rel=1e-4
    )
    store = tmp_path / "stores" / "T"
    assert check(store).sound
    assert verify(store) == 0
    damaged = next((store / FOLDER / "train").iterdir())
    damaged.write_text("{}")
    assert verify(store) == 2
    assert verify(store, repair_it=True) == 0
    assert not damaged.exists()
    assert check(store).missing_masks == [damaged]  # the image's features are there, and its masks are not
    assert verify(store, repair_it=True) == 2
    assert extract(config) == 0
    assert verify(store) == 0


@pytest.mark.usefixtures("_halves")
def test_masks_are_read_without_the_teacher_s_weights(made: tuple[Path, Path], tmp_path: Path) -> None:
    config = stored(*made, tmp_path / "run", tmp_path / "stores")
    with pytest.raises(DataError, match="holds no automatic masks yet"):
        train(stored(*made, tmp_path / "none", tmp_path / "stores", teachers=[{"name": "T"}]))
    assert extract(config) == 0
    assert train(stored(*made, tmp_path / "run2", tmp_path / "stores", teachers=[{"name": "T"}])) == 0


@pytest.mark.usefixtures("_halves")
def test_the_doctor_looks_for_the_masks_of_its_own_images_alone(made: tuple[Path, Path], tmp_path: Path) -> None:
    config = config_of(*made, tmp_path / "run", training={"batch_size": 1, "max_steps": 9})
    with pytest.MonkeyPatch.context() as patch, searched() as names:
        patch.setattr("samlet.recipes.doctor.BATCHES_TO_MEASURE", 1)
        (tmp_path / "place").mkdir()
        examine(config, tmp_path / "place")
    assert len(names) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("_halves")
def test_an_image_that_cannot_be_read_is_refused_or_skipped(
    scenes: Path, made: tuple[Path, Path], tmp_path: Path
) -> None:
    image = sorted((scenes / "train" / "image").iterdir())[2]
    content = bytearray(image.read_bytes())
    content[-40] ^= 1  # its header still reads
    image.write_bytes(bytes(content))
    with pytest.raises(DataError, match=image.name):
        train(config_of(scenes, made[1], tmp_path / "refusing"))
    skipping = {"dataset": {"broken": "skip"}}
    assert train(config_of(scenes, made[1], tmp_path / "skipping", **skipping)) == 0
    config = stored(scenes, made[1], tmp_path / "run", tmp_path / "stores", **skipping)
    assert extract(config) == 0
    assert train(config) == 0


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ({"teachers": []}, "teachers: mask_teacher.enable is true, but there is no teacher"),
        ({"mask_teacher": {"teacher": "U"}}, r"mask_teacher\.teacher: there is no such teacher; there are T"),
        ({"mask_teacher": {"precomputed": True}}, r"distillation\.precomputed_root: is null"),
        ({"teachers": [{"name": "T"}]}, r"teachers\.0\.checkpoint: is null, and its automatic masks are found online"),
        (
            {
                "distillation": {"enable": True, "use_precomputed_features": True, "precomputed_root": "stores"},
                "mask_teacher": {"precomputed": False},
            },
            r"mask_teacher\.precomputed: what is stored of an image depends on its masks",
        ),
        (
            {"dataset": {"labelled_repeat": 2}, "mask_teacher": {"method": "replace_gt"}},
            r"dataset\.labelled_repeat: repeats images for their ground truth",
        ),
        (
            {"stages": [{"name": "a", "mask_teacher": {"enable": True}}]},
            r"stages\.0\.mask_teacher: is one for the whole run",
        ),
        ({"mask_teacher": {"iou_threshold": 0.0}}, r"mask_teacher\.iou_threshold: must be greater than 0"),
    ],
)
def test_what_does_not_go_together_is_refused(
    made: tuple[Path, Path], tmp_path: Path, blocks: dict[str, Any], said: str
) -> None:
    plain = plain_config(config_of(*made, tmp_path / "run"))
    for name, block in blocks.items():
        plain[name] = {**plain[name], **block} if isinstance(block, dict) else block
    place = tmp_path / "run.json"
    place.write_text(json.dumps(plain))
    with pytest.raises(ConfigError, match=said):
        load_config(RunConfig, place)


def test_kept_masks_say_what_they_were_made_with(made: tuple[Path, Path], tmp_path: Path) -> None:
    config = config_of(*made, tmp_path / "run", mask_teacher={"fast": False, "box_nms_thresh": 0.9})
    labelled(config)
    kept = read_masks(next((tmp_path / "run" / "automatic_masks").iterdir()))
    assert kept.facts.settings == {**kept.facts.settings, **GRID, "fast": False, "box_nms_thresh": 0.9}
    assert kept.facts.image_size == 64


def test_thresholds_tuned_for_the_teacher_are_used_unless_said_otherwise(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher.pth"
    shutil.copy(made[1], teacher)
    left_open = {"pred_iou_thresh": None, "stability_score_thresh": None}

    def thresholds(config: RunConfig) -> tuple[float, float]:
        settings = search_settings(config)
        return settings.pred_iou_thresh, settings.stability_score_thresh

    config = config_of(made[0], teacher, tmp_path / "run", mask_teacher=left_open)
    assert thresholds(config) == (0.88, 0.95)
    save_tuned(teacher, AmgSettings(pred_iou_thresh=0.0, stability_score_thresh=0.25, points_per_side=7), image_size=64)
    assert thresholds(config) == (0.0, 0.25)
    assert search_settings(config).points_per_side == 3
    said = config_of(made[0], teacher, tmp_path / "run", mask_teacher={**left_open, "stability_score_thresh": 0.5})
    assert thresholds(said) == (0.0, 0.5)
    ahead = stored(made[0], teacher, tmp_path / "run", tmp_path / "stores", mask_teacher=left_open)
    assert extract(ahead) == 0
    assert any(objects(labelled(ahead)).values())
    kept = read_masks(next((tmp_path / "stores" / "T" / FOLDER / "train").iterdir()))
    assert kept.facts.settings["stability_score_thresh"] == 0.25
    nameless = stored(*made, tmp_path / "other", tmp_path / "stores", teachers=[{"name": "T"}], mask_teacher=left_open)
    assert equal(objects(labelled(nameless)), objects(labelled(ahead)))
    save_tuned(teacher, AmgSettings(), image_size=32)
    with pytest.raises(SamletError, match="was tuned at an image size of 32, and 64 is asked for"):
        labelled(config)


def test_a_teacher_that_finds_nothing_is_no_secret(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harsh = {"pred_iou_thresh": 1.0}
    alone = config_of(*made, tmp_path / "alone", mask_teacher={"method": "replace_gt", **harsh})
    with pytest.raises(DataError, match=r"T: found no mask on any image; lower .*`samlet tune-amg .*teacher\.pth"):
        train(alone)
    assert not (tmp_path / "alone" / "checkpoints").exists()
    beside = config_of(*made, tmp_path / "beside", mask_teacher={"method": "gt_override", **harsh})
    assert train(beside) == 0
    assert "warning: T: found no mask on any image" in capsys.readouterr().out
    report = examine(alone, tmp_path / "place")
    (finding,) = [one for one in report["findings"] if "the whole gradient is 0" in one["text"]]
    assert finding["level"] == "warning"
