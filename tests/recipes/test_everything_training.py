"""Training in mode everything: whole runs, from stores and kept embeddings, killed and resumed; and what it teaches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from samlet.config import RunConfig
from samlet.data.grid import point_grid
from samlet.engine.step import TrainStep
from samlet.errors import ConfigError
from samlet.losses.configs import TaskLossConfig
from samlet.losses.iou import actual_iou
from samlet.recipes.doctor import examine
from samlet.recipes.extract import extract
from samlet.recipes.train import train
from samlet.schema import load_config
from samlet.types import Batch, ImageFeatures, Prompts
from tests.distill.scenes import counts_of, make_student
from tests.recipes.test_resume import weather
from tests.recipes.test_train_processes import run_in_two
from tests.tiny import IMAGE_SIZE, STUDENT, tiny_config, write_scenes, write_teacher

EVERYTHING: dict[str, Any] = {
    "dataset": {"mode": "everything", "grid_points": 6, "labelled_fraction": 0.5, "unlabelled": "use"},
    "everything": {"unlabelled": "negative", "max_points": 8, "boxes": 1},
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def teaching(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    teacher = write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth")
    terms = ("encoder_patch", "prompt_embed", "decoder_mask_token", "dense_mask_logits", "decoder_matching", "rkd")
    return {
        "distillation": {"enable": True, **{term: {"enable": True} for term in terms}},
        "teachers": [{"name": "T", "checkpoint": str(teacher)}],
    }


def rows(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"]


def test_a_run_in_stages_with_every_kind_of_term_and_corrections(
    scenes: Path, tmp_path: Path, teaching: dict[str, Any]
) -> None:
    """The chunk decides about memory, not about what is learnt."""
    stages = [
        {"name": "clicks", "training": {"max_steps": 2}},
        {"name": "corrected", "training": {"max_steps": 2}, "prompts": {"correction_rounds": 1}},
    ]
    seen = []
    for size in (None, 9):
        out = tmp_path / str(size)
        config = tiny_config(scenes, out, **EVERYTHING, **teaching, stages=stages, training={"prompts_per_chunk": size})
        assert train(config) == 0
        seen.append(rows(out))
    whole, chunked = seen
    for one, other in zip(whole, chunked, strict=True):
        assert [one.pop(name) for name in ("split", "stage")] == [other.pop(name) for name in ("split", "stage")]
        assert other == pytest.approx(one, rel=1e-2, abs=1e-4)
    assert all(row["distill/dense_mask_logits"] > 0 for row in whole)
    assert any(row["task/iou"] > 0 and row["task/dice"] > 0 for row in whole)


def test_stored_features_and_kept_embeddings_are_the_same_training(
    scenes: Path, tmp_path: Path, teaching: dict[str, Any]
) -> None:
    blocks: dict[str, Any] = {
        **EVERYTHING,
        "teachers": teaching["teachers"],
        "augmentation": {"variants": 2},
        "extraction": {"dtype": "fp32", "images_per_shard": 4},
    }
    stored = {"use_precomputed_features": True, "precomputed_root": str(tmp_path / "stores")}
    terms = {"enable": True, "encoder_patch": {"enable": False}}
    frozen = {"max_steps": 2, "freeze": ["image_encoder"]}
    assert extract(tiny_config(scenes, tmp_path / "x", distillation={**terms, **stored}, **blocks)) == 0
    found = []
    for name, more, kept in (("online", {}, False), ("stored", stored, True)):
        training = {**frozen, "cache_embeddings": kept}
        config = tiny_config(scenes, tmp_path / name, distillation={**terms, **more}, training=training, **blocks)
        assert train(config) == 0
        found.append(load_file(tmp_path / name / "checkpoints" / "step-00000002" / "student.safetensors"))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=0, atol=1e-5)


def test_with_adapters_the_best_is_the_best_at_automatic_masks(
    scenes: Path, tmp_path: Path, teaching: dict[str, Any]
) -> None:
    config = tiny_config(
        scenes,
        tmp_path / "run",
        **{**EVERYTHING, **teaching},
        model={"kind": "vit_t", "image_size": IMAGE_SIZE, "encoder": STUDENT, "lora": {"rank": 2}},
        training={"max_steps": 4, "learning_rate": 5e-3},
        validation={"every_steps": 1, "metric": "everything_ar", "everything": {"points_per_side": 4}},
    )
    assert train(config) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if line["split"] == "val"]
    assert len({line["everything_ece"] for line in measured}) == 4
    assert all(0 <= line["everything_ar"] <= 1 and "everything_ap" in line for line in measured)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    best = max(measured, key=lambda line: line["everything_ar"])  # the first of equals
    assert (facts["best"], facts["best_step"]) == (best["everything_ar"], best["step"])


def test_the_doctor_examines_it(scenes: Path, tmp_path: Path, teaching: dict[str, Any]) -> None:
    config = tiny_config(
        scenes,
        tmp_path,
        **EVERYTHING,
        **teaching,
        training={"prompts_per_chunk": 9, "max_steps": 2},
        validation={"everything": {"points_per_side": 4}},
    )
    report = examine(config, tmp_path / "place")
    (stage,) = report["stages"]
    milliseconds = stage["milliseconds"]
    assert all(milliseconds[part] > 0 for part in ("teacher", "student", "backward"))
    assert report["healthy"], report["findings"]


def test_kills_change_nothing(scenes: Path, tmp_path: Path, teaching: dict[str, Any]) -> None:
    blocks = {**EVERYTHING, "prompts": {"correction_rounds": 1}, "training": {"prompts_per_chunk": 9}}
    distillation = {"distillation": {"enable": True}, "teachers": teaching["teachers"]}
    weather(scenes, tmp_path, 2, "alone", epochs=2, **blocks, **distillation)


@pytest.mark.slow
def test_two_processes_come_to_the_weights_of_one(scenes: Path, tmp_path: Path, teaching: dict[str, Any]) -> None:
    training = {"max_steps": 3, "batch_size": 2, "accumulation": 2, "prompts_per_chunk": 5}
    blocks = {**EVERYTHING, **teaching, "prompts": {"correction_rounds": 1}, "training": training}
    assert train(tiny_config(scenes, tmp_path / "one", **blocks)) == 0
    two = run_in_two(scenes, tmp_path / "two", **blocks)
    for one_row, two_row in zip(rows(tmp_path / "one"), rows(two), strict=True):
        assert one_row.pop("split") == two_row.pop("split")
        assert one_row == pytest.approx(two_row, rel=2e-3, abs=1e-5)


def scene() -> Batch:
    """Two images of one code each, as an encoder would tell them: an object over the left of one, nothing in the other.

    The image encoder is left out, so that a handful of steps will do.
    """
    codes = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(2, IMAGE_SIZE // 4, IMAGE_SIZE // 4)
    masks[0, :, :10] = 1
    points = torch.from_numpy(point_grid(3, (IMAGE_SIZE, 40))).float().repeat(2, 1)
    image = torch.arange(2).repeat_interleave(9)
    return Batch(
        pixels=torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE),
        input_sizes=torch.full((2, 2), IMAGE_SIZE),
        prompts=Prompts(
            image, torch.stack([points, torch.zeros_like(points)], dim=1), torch.tensor([[1, -1]]).repeat(18, 1)
        ),
        masks=masks,
        labelled=image == 0,
        image_ids=("object", "nothing"),
        embedding=codes[:, :, None, None].expand(-1, -1, IMAGE_SIZE // 16, IMAGE_SIZE // 16).contiguous(),
        target_of=image,
        background=image == 1,
        mask_image=torch.arange(2),
    )


@pytest.mark.parametrize("negative", [True, False])
def test_the_iou_head_is_calibrated_on_objects_and_low_on_the_background(negative: bool) -> None:
    """PITFALLS 26; without negatives it is as sure of nothing as of the object."""
    batch, student = scene(), make_student()
    assert batch.background is not None
    assert batch.embedding is not None
    taught = batch if negative else batch._replace(background=torch.zeros_like(batch.background))
    step = TrainStep(student, TaskLossConfig(), prompts_per_chunk=None)
    optimizer = torch.optim.Adam(student.mask_decoder.parameters(), lr=1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        step(taught, (), counts_of(taught))[0].backward()
        optimizer.step()
    with torch.no_grad():
        output = student.decode(ImageFeatures(batch.embedding, {}), batch.prompts, multimask_output=True)
    iou = actual_iou(output.low_res_logits, batch.masks[batch.prompts.image_index], None)
    on, raw = batch.labelled, output.iou_predictions
    assert float(iou[on].amax(dim=1).mean()) > 0.8
    assert float((raw - iou)[on].abs().mean()) < 0.15
    assert (float(raw[~on].max()) < 0.2) is negative
    assert (float(raw[~on].mean()) > 0.5) is not negative


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["everything.unlabelled=teacher"], r"everything\.unlabelled: leaves points .* nothing is distilled; enable"),
        (
            [
                *(
                    "everything.unlabelled=teacher",
                    "distillation.enable=true",
                    "teachers=[{name: T, checkpoint: t.pt}]",
                ),
                *("distillation.dense_mask_logits.enable=false", "distillation.rkd.enable=true"),
            ],
            r"everything\.unlabelled: leaves points .* no term that is distilled looks at points",
        ),
        (["extraction.decoder_outputs=true"], r"extraction\.decoder_outputs: holds one answer for each object"),
        (["everything.object_share=1.5"], r"everything\.object_share"),
        (["dataset.grid_points=0"], r"dataset\.grid_points"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(tmp_path: Path, settings: list[str], message: str) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "run.yaml"
    path.write_text(f"dataset: {{root: {tmp_path / 'data'}, mode: everything}}\n")
    load_config(RunConfig, path)
    with pytest.raises(ConfigError, match=message):
        load_config(RunConfig, path, settings)


def test_the_keys_of_the_grid_may_stand_beside_other_modes(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "run.yaml"
    path.write_text(f"dataset: {{root: {tmp_path / 'data'}, grid_points: 16}}\neverything: {{unlabelled: teacher}}\n")
    assert load_config(RunConfig, path).dataset.grid_points == 16
