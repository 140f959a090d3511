"""Training the decoder on embeddings that were computed before: the same run, without the image encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from samlet.artefacts import sha256_of
from samlet.config import RunConfig
from samlet.data.sampler import SampleKey
from samlet.errors import ConfigError, SamletError
from samlet.models import Sam
from samlet.recipes import train as recipe
from samlet.recipes.train import train
from samlet.run import Run, plain_config
from samlet.schema import load_config
from tests.tiny import tiny_config, write_scenes, write_teacher

VARIED: dict[str, Any] = {"variants": 2, "horizontal_flip": 0.5, "scale": [0.75, 1.5]}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), train=4, val=1)


def decoder_only(scenes: Path, out: Path, *, cached: bool, **blocks: Any) -> RunConfig:
    training = {"epochs": 3, "freeze": ["image_encoder"], "cache_embeddings": cached, **blocks.pop("training", {})}
    return tiny_config(scenes, out, training=training, **{"augmentation": VARIED, **blocks})


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_it_equals_the_run_that_encodes_and_runs_no_encoder(scenes: Path, tmp_path: Path) -> None:
    distilling = {
        "distillation": {"enable": True, "encoder_patch": {"enable": False}},
        "teachers": [{"name": "T", "checkpoint": str(write_teacher(tmp_path / "teacher.pth"))}],
    }
    assert train(decoder_only(scenes, tmp_path / "plain", cached=False, **distilling)) == 0

    def step(run: Run, window: Any) -> Any:
        def encode(sam: Sam, *args: Any, **kwargs: Any) -> Any:
            assert sam is not run.student, "the student's encoder ran in a step"
            return encoded(sam, *args, **kwargs)

        encoded = Sam.encode
        with patch.object(Sam, "encode", encode):
            return original(run, window)

    original = recipe.optimizer_step
    with patch.object(recipe, "optimizer_step", step):
        assert train(decoder_only(scenes, tmp_path / "cached", cached=True, **distilling)) == 0
    for plain, cached in zip(rows(tmp_path / "plain"), rows(tmp_path / "cached"), strict=True):
        assert plain.pop("split") == cached.pop("split")
        assert cached == pytest.approx(plain, rel=1e-3, abs=1e-4)
    left, right = (load_file(tmp_path / name / "student.safetensors") for name in ("plain", "cached"))
    assert all(torch.equal(left[name], right[name]) for name in left if name.startswith("image_encoder."))
    for name, value in left.items():
        close = torch.isclose(value, right[name], rtol=0, atol=1e-4)  # Adam divides by what may be near 0
        assert close.float().mean() > 0.99, name


def test_variants_come_in_turn(scenes: Path, tmp_path: Path) -> None:
    config = decoder_only(scenes, tmp_path / "run", cached=False)
    data = config.dataset.build_train(
        image_size=config.model.image_size, seed=0, prompts=config.prompts, augmentation=config.augmentation
    )
    samples = [data[SampleKey(epoch, 1)] for epoch in range(4)]
    assert torch.equal(samples[0].pixels, samples[2].pixels)
    assert torch.equal(samples[1].pixels, samples[3].pixels)
    assert not torch.equal(samples[0].pixels, samples[1].pixels)
    coords = [sample.prompts.point_coords for sample in (samples[0], samples[2])]
    assert coords[0].shape != coords[1].shape or not torch.equal(*coords)  # prompts are drawn anew


def test_embeddings_are_kept_found_damaged_and_computed_again(scenes: Path, tmp_path: Path) -> None:
    config = decoder_only(scenes, tmp_path / "run", cached=True)
    assert train(config) == 0
    files = sorted((tmp_path / "run/embeddings").rglob("*.npy"))
    assert len(files) == 4 * 2  # images, variants
    assert np.load(files[0], allow_pickle=False).shape == (256, 4, 4)
    before = {file: (sha256_of(file), file.stat().st_mtime_ns) for file in files}
    content = bytearray(files[5].read_bytes())
    content[-1] ^= 1
    files[5].write_bytes(bytes(content))
    (files[0].parent / "manifest.json").touch()
    assert train(config) == 0
    after = {file: (sha256_of(file), file.stat().st_mtime_ns) for file in files}
    assert {file: found[0] for file, found in after.items()} == {file: found[0] for file, found in before.items()}
    assert [file.parent.name for file in files if after[file][1] == before[file][1]] == ["variant-000"] * 4


def test_a_resume_in_the_middle_changes_no_bit(scenes: Path, tmp_path: Path) -> None:
    stages = [
        {"name": "still", "augmentation": {"enable": False}, "training": {"epochs": 1}},
        {"name": "varied", "training": {"epochs": 2}},
    ]
    saves = {"checkpoint": {"every_steps": 1}, "stages": stages}
    calm, stopped = (decoder_only(scenes, tmp_path / name, cached=True, **saves) for name in ("calm", "stopped"))
    assert train(calm) == 0

    def stop(run: Run, window: Any) -> Any:
        if run.state.step == 3:
            raise SamletError("stopped")
        return original(run, window)

    original = recipe.optimizer_step
    with patch.object(recipe, "optimizer_step", stop), pytest.raises(SamletError, match="stopped"):
        train(stopped)
    assert train(stopped) == 0
    assert (calm.output_dir / "metrics.jsonl").read_bytes() == (stopped.output_dir / "metrics.jsonl").read_bytes()
    assert sha256_of(calm.output_dir / "student.safetensors") == sha256_of(stopped.output_dir / "student.safetensors")
    assert len(list((tmp_path / "calm/embeddings").iterdir())) == 2  # one fingerprint for each augmentation


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ({"training": {"freeze": []}}, r"training\.cache_embeddings: keeps what the image encoder says, so it must"),
        ({"training": {"unfreeze_epoch": 1}}, r"training\.cache_embeddings: keeps what the image encoder says"),
        ({"augmentation": {}}, r"training\.cache_embeddings: each epoch's augmentation makes new images"),
        (
            {"stages": [{"name": "a", "training": {"freeze": []}}]},
            r"stages\.0\.training\.cache_embeddings: keeps what the image encoder says",
        ),
        (
            {"stages": [{"name": "a", "training": {"cache_embeddings": False}}]},
            r"stages\.0\.training\.cache_embeddings: is one for the whole run",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(scenes: Path, tmp_path: Path, blocks: dict[str, Any], said: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(plain_config(decoder_only(scenes, tmp_path / "run", cached=True, **blocks))))
    with pytest.raises(ConfigError, match=said):
        load_config(RunConfig, path)


def test_terms_of_the_image_encoder_are_refused(scenes: Path, tmp_path: Path) -> None:
    distilling = {
        "distillation": {"enable": True, "encoder_patch": {"student_tap": "neck_conv", "teacher_tap": "neck_conv"}},
        "teachers": [{"name": "T", "checkpoint": str(write_teacher(tmp_path / "teacher.pth"))}],
    }
    with pytest.raises(ConfigError, match=r"the encoder does not run, and neck_conv of it is compared"):
        train(decoder_only(scenes, tmp_path / "run", cached=True, **distilling))
