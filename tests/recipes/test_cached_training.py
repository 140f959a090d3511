"""Training on stored features is the same training as beside live teachers; what has gone stale is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

from samlet.config import RunConfig
from samlet.errors import ConfigError, SamletError
from samlet.extraction import Extractor, job_of, pictures_of
from samlet.models import Sam
from samlet.models.decoder_file import load_decoder
from samlet.recipes.extract import extract
from samlet.recipes.store import convert
from samlet.recipes.train import train
from tests.tiny import tiny_config, write_scenes, write_teacher

EVERY_TERM: dict[str, dict[str, Any]] = {
    "encoder_patch": {"student_tap": "blocks.-1", "teacher_tap": "blocks.0", "projection": "learnt"},
    "prompt_embed": {"layer": 1},
    "decoder_mask_token": {},
    "dense_mask_logits": {},
    "encoder_matching": {"layers": 2, "projection": "pca"},
    "decoder_matching": {},
    "attention_matching": {},
    "rkd": {"patches": 8},
}
STILL = {"horizontal_flip": 0.0, "scale": [1.0, 1.0], "brightness": 0.0, "contrast": 0.0, "saturation": 0.0}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("cached") / "scenes")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("teachers")
    first, second = write_teacher(folder / "first.pth", 1), write_teacher(folder / "second.pth", 2)
    return [
        {"name": "first", "checkpoint": str(first), "weight": 0.7},
        {"name": "second", "checkpoint": str(second), "weight": 0.3},
    ]


def config_of(
    scenes: Path, out: Path, teachers: list[dict[str, Any]], *, cached: bool = False, **blocks: Any
) -> RunConfig:
    distillation = {
        "enable": True,
        "use_precomputed_features": cached,
        "precomputed_root": str(out.parent / "stores"),
        **blocks.pop("distillation", EVERY_TERM),
    }
    blocks = {"augmentation": STILL, "extraction": {"dtype": "fp32", "images_per_shard": 4}, **blocks}
    training = {"max_steps": 20, **blocks.pop("training", {})}
    return tiny_config(scenes, out, distillation=distillation, teachers=teachers, training=training, **blocks)


def extract_all(config: RunConfig) -> None:
    for teacher in config.teachers:
        extractor = Extractor(job_of(config, teacher, config.store_of(teacher)))
        for shard in extractor.shards:
            assert extractor.extract(shard, lambda: None) == []


def steps_of(config: RunConfig) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """Every logged step, and the student's last weights."""
    assert train(config) == 0
    rows = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    last = max((config.output_dir / "checkpoints").glob("step-*"))
    weights = safetensors.torch.load_file(last / "student.safetensors")
    return [row for row in rows if row["split"] == "train"], {name: value.numpy() for name, value in weights.items()}


def assert_same_training(online: RunConfig, cached: RunConfig, tolerance: float) -> None:
    (rows, weights), (other_rows, other_weights) = steps_of(online), steps_of(cached)
    assert len(rows) == len(other_rows) == online.training.max_steps
    assert any(name.startswith("distill/") and row[name] > 1e-3 for row in rows for name in row)
    for row, other in zip(rows, other_rows, strict=True):
        assert row.keys() == other.keys()
        for name in (name for name in row if name != "split"):
            assert other[name] == pytest.approx(row[name], rel=tolerance, abs=tolerance), (row["step"], name)
    for name, value in weights.items():
        np.testing.assert_allclose(other_weights[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(("mode", "steps"), [("point", 3), ("box", 3), ("mixed", 20), ("everything", 3)])
def test_cached_equals_online_in_every_term(
    scenes: Path, teachers: list[dict[str, Any]], tmp_path: Path, mode: str, steps: int
) -> None:
    blocks: dict[str, Any] = {
        "dataset": {"root": str(scenes), "objects_per_image": 2, "mode": mode},
        "training": {"max_steps": steps},
    }
    online = config_of(scenes, tmp_path / "online", teachers, **blocks)
    cached = config_of(scenes, tmp_path / "cached", teachers, cached=True, **blocks)
    extract_all(cached)
    assert_same_training(online, cached, 1e-5)


def test_cached_equals_online_with_variants_corrections_and_trust(
    scenes: Path, teachers: list[dict[str, Any]], tmp_path: Path
) -> None:
    blocks: dict[str, Any] = {
        "augmentation": {"variants": 3, "vertical_flip": 0.5, "crop": 0.2},
        "prompts": {"correction_rounds": 1, "correction_min_cells": 1},
        "training": {"max_steps": 8},
    }
    rules = {"dense_mask_logits": {}, "prompt_embed": {}, "team": "per_sample", "trust": "hard_mask"}
    teachers = [teachers[0], {**teachers[1], "image_size": 32}]
    online = config_of(scenes, tmp_path / "online", teachers, distillation=rules, **blocks)
    cached = config_of(scenes, tmp_path / "cached", teachers, distillation=rules, cached=True, **blocks)
    extract_all(cached)
    assert_same_training(online, cached, 1e-5)


def test_one_teacher_stored_and_one_online(scenes: Path, teachers: list[dict[str, Any]], tmp_path: Path) -> None:
    mixed = [{**teachers[0], "precomputed": True}, teachers[1]]
    few: dict[str, Any] = {"training": {"max_steps": 4}, "distillation": {"encoder_patch": {}}}
    online = config_of(scenes, tmp_path / "online", teachers, **few)
    cached = config_of(scenes, tmp_path / "cached", mixed, **few)
    extract_all(config_of(scenes, tmp_path / "cached", teachers[:1], cached=True, **few))
    assert_same_training(online, cached, 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 1e-3), ("int8", 2e-2)])
def test_smaller_numbers_are_close(
    scenes: Path, teachers: list[dict[str, Any]], tmp_path: Path, dtype: str, tolerance: float
) -> None:
    """At the default learning rate; rounded digits grow with every step of AdamW, and faster at a higher one."""
    blocks: dict[str, Any] = {
        "distillation": {"encoder_patch": {}, "prompt_embed": {"layer": 1}, "dense_mask_logits": {}},
        "extraction": {"dtype": dtype, "pack": True},
        "training": {"max_steps": 6, "learning_rate": 2e-4, "warmup_steps": 100},
    }
    online = config_of(scenes, tmp_path / "online", teachers[:1], **blocks)
    cached = config_of(scenes, tmp_path / "cached", teachers[:1], cached=True, **blocks)
    extract_all(cached)
    (rows, weights), (others, other_weights) = steps_of(online), steps_of(cached)
    for row, other in zip(rows, others, strict=True):
        for name in (name for name in row if name.startswith("distill/")):
            assert other[name] == pytest.approx(row[name], rel=tolerance, abs=tolerance), (row["step"], name)
    for name, value in weights.items():
        np.testing.assert_allclose(other_weights[name], value, atol=tolerance, err_msg=name)


ANSWERED = {"encoder_patch": {}, "prompt_embed": {"layer": 1}, "decoder_mask_token": {}, "decoder_matching": {}}


def test_stored_answers_to_fixed_prompts_need_no_decoder(
    scenes: Path, teachers: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks: dict[str, Any] = {
        "distillation": ANSWERED,
        "prompts": {"fixed": True},
        "augmentation": {"variants": 2},
        "training": {"max_steps": 5},
        "extraction": {"dtype": "fp32", "decoder_outputs": True},
    }
    online = config_of(scenes, tmp_path / "online", teachers, **blocks)
    cached = config_of(scenes, tmp_path / "cached", teachers, cached=True, **blocks)
    extract_all(cached)

    def load_without_decoder(path: Path) -> Sam:
        sam = load_decoder(path)
        monkeypatch.setattr(sam, "decode", None)
        return sam

    monkeypatch.setattr("samlet.engine.assembly.load_decoder", load_without_decoder)
    assert_same_training(online, cached, 1e-5)


def test_an_edited_mask_makes_stored_answers_stale(
    scenes: Path, teachers: list[dict[str, Any]], tmp_path: Path
) -> None:
    own = tmp_path / "scenes"
    shutil.copytree(scenes, own)
    config = config_of(
        own,
        tmp_path / "run",
        teachers[:1],
        cached=True,
        distillation=ANSWERED,
        prompts={"fixed": True},
        training={"max_steps": 6},
        extraction={"decoder_outputs": True},
    )
    extract_all(config)
    for mask in (images_of(config)[0].parent.parent / "mask").rglob("*.png"):
        Image.fromarray(np.roll(np.asarray(Image.open(mask)), 16, axis=1)).save(mask)
    with pytest.raises(SamletError, match=r"other prompts.*samlet extract"):
        train(config)


@pytest.mark.parametrize(
    ("blocks", "loc"),
    [
        ({}, ("prompts", "fixed")),
        ({"prompts": {"fixed": True, "correction_rounds": 1}}, ("prompts", "correction_rounds")),
        (
            {"prompts": {"fixed": True}, "extraction": {"decoder_outputs": True, "dense_mask_logits": False}},
            ("extraction", "dense_mask_logits"),
        ),
    ],
)
def test_what_stored_answers_cannot_do_is_a_mistake(
    scenes: Path, teachers: list[dict[str, Any]], tmp_path: Path, blocks: dict[str, Any], loc: tuple[str, ...]
) -> None:
    blocks = {"extraction": {"decoder_outputs": True}, "distillation": {"encoder_patch": {}}, **blocks}
    config = config_of(scenes, tmp_path / "run", teachers, cached=True, **blocks)
    assert [found for found, _ in config.mistakes()] == [loc]


def test_a_store_trains_without_the_teacher_file(scenes: Path, tmp_path: Path) -> None:
    weights = write_teacher(tmp_path / "teacher.pth")
    cached = config_of(scenes, tmp_path / "cached", [{"name": "T", "checkpoint": str(weights)}], cached=True)
    extract_all(cached)
    weights.unlink()
    alone = config_of(scenes, tmp_path / "alone", [{"name": "T"}], cached=True, training={"max_steps": 2})
    assert train(alone) == 0


def test_a_run_does_not_go_on_with_a_store_of_other_numbers(scenes: Path, tmp_path: Path) -> None:
    weights = write_teacher(tmp_path / "teacher.pth")
    cached = config_of(
        scenes, tmp_path / "run", [{"name": "T", "checkpoint": str(weights)}], cached=True, training={"max_steps": 2}
    )
    extract_all(cached)
    store = cached.store_of(cached.teachers[0])
    assert train(cached) == 0
    shutil.move(store, tmp_path / "former")
    assert convert(tmp_path / "former", store, dtype="fp16", pack=None) == 0
    with pytest.raises(ConfigError, match=r"run\.json: 'T' is read from another store: dtype is 'fp32' there, 'fp16'"):
        train(cached)
    shutil.rmtree(store)
    shutil.move(tmp_path / "former", store)
    assert train(cached) == 0


def test_colours_alone_may_vary_over_a_plain_store(
    scenes: Path, teachers: list[dict[str, Any]], tmp_path: Path
) -> None:
    colours = {"horizontal_flip": 0.0, "scale": [1.0, 1.0], "brightness": 0.4}
    config = config_of(
        scenes, tmp_path / "run", teachers[:1], cached=True, augmentation=colours, training={"max_steps": 2}
    )
    extract_all(config)
    assert train(config) == 0


class TestStale:
    """Each change is refused, by the name of what differs, before the first step."""

    @pytest.fixture
    def config(self, scenes: Path, teachers: list[dict[str, Any]], tmp_path: Path) -> RunConfig:
        own = tmp_path / "scenes"
        shutil.copytree(scenes, own)
        few: dict[str, Any] = {"training": {"max_steps": 1}, "distillation": {"encoder_patch": {}}}
        made = config_of(own, tmp_path / "run", teachers[:1], cached=True, **few)
        extract_all(made)
        return made

    def again(self, config: RunConfig, **blocks: Any) -> RunConfig:
        plain = config.model_dump(mode="json", by_alias=True)
        for name, block in blocks.items():
            plain[name] = {**plain[name], **block} if isinstance(block, dict) else block
        return RunConfig.model_validate_json(json.dumps(plain))

    def test_nothing_changed(self, config: RunConfig) -> None:
        assert train(config) == 0

    def test_batch_size_and_workers_do_not_count(self, config: RunConfig) -> None:
        assert train(self.again(config, training={"batch_size": 3, "num_workers": 1})) == 0

    def test_another_teacher(self, config: RunConfig, tmp_path: Path) -> None:
        other = write_teacher(tmp_path / "other.pth", seed=9)
        with pytest.raises(SamletError, match="teacher_sha256"):
            train(self.again(config, teachers=[{"name": "first", "checkpoint": str(other)}]))

    def test_another_tap(self, config: RunConfig) -> None:
        distillation = {"encoder_patch": {"teacher_tap": "blocks.1", "student_tap": "blocks.1", "projection": "pca"}}
        with pytest.raises(SamletError, match=r"taps.*blocks.1"):
            train(self.again(config, distillation=distillation))

    def test_another_input_size_of_the_teacher(self, config: RunConfig, teachers: list[dict[str, Any]]) -> None:
        with pytest.raises(SamletError, match="teacher_"):
            train(self.again(config, teachers=[{**teachers[0], "image_size": 32}]))

    def test_variants_that_are_not_there(self, config: RunConfig) -> None:
        with pytest.raises(SamletError, match="augmentation"):
            train(self.again(config, augmentation={"variants": 2, "horizontal_flip": 0.5}))

    def test_an_edited_image(self, config: RunConfig) -> None:
        path = images_of(config)[0]
        pixels = np.asarray(Image.open(path)).copy()
        pixels[0, 0] ^= 255
        Image.fromarray(pixels).save(path)
        with pytest.raises(SamletError, match=rf"{path.name}.*changed.*samlet extract"):
            train(config)
        extract_all(config)
        assert train(config) == 0

    def test_an_added_image(self, config: RunConfig) -> None:
        first = images_of(config)[0]
        masks = first.parent.parent / "mask"
        shutil.copy(first, first.with_name(f"added{first.suffix}"))
        shutil.copytree(masks / first.stem, masks / "added")
        with pytest.raises(SamletError, match=r"added.*samlet extract"):
            train(config)
        extract_all(config)
        assert train(config) == 0

    def test_a_damaged_file(self, config: RunConfig) -> None:
        for path in config.store_of(config.teachers[0]).rglob("*_embedding.npy"):
            content = bytearray(path.read_bytes())
            content[-5] ^= 1
            path.write_bytes(bytes(content))
        with pytest.raises(SamletError, match=r"_embedding.npy.*samlet store verify"):
            train(config)


def images_of(config: RunConfig) -> list[Path]:
    return sorted(record.image_path for record in pictures_of(config, "train").records)


def test_an_augmentation_that_no_store_holds_is_a_mistake(
    scenes: Path, teachers: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = config_of(scenes, tmp_path / "run", teachers, cached=True, augmentation={"horizontal_flip": 0.5})
    assert [loc for loc, _ in config.mistakes()] == [("augmentation", "variants")]
    online = config_of(scenes, tmp_path / "run", teachers, augmentation={"horizontal_flip": 0.5})
    assert list(online.mistakes()) == []
    with pytest.raises(ConfigError, match=r"augmentation\.variants"):
        extract(online)


def test_attention_of_the_encoder_cannot_be_stored(
    scenes: Path, teachers: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = config_of(
        scenes, tmp_path / "run", teachers, cached=True, distillation={"attention_matching": {"encoder": 1}}
    )
    assert [loc for loc, _ in config.mistakes()] == [("distillation", "attention_matching", "encoder")]


def test_a_teacher_without_weights_needs_a_store(scenes: Path, tmp_path: Path) -> None:
    config = config_of(scenes, tmp_path / "run", [{"name": "T"}])
    assert [loc for loc, _ in config.mistakes()] == [("teachers", 0, "checkpoint")]
