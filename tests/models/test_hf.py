"""Hugging Face's SamModel folders: the same answers as transformers' own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from samlet.errors import CheckpointError
from samlet.models import Sam, load_sam, make_prompts
from tests.models.reference import close, fill

transformers: Any = pytest.importorskip("transformers")
SIZE = 96


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "image_size": SIZE,
            "global_attn_indexes": [1],
            "window_size": 4,
            "mlp_dim": 40,
        },
        prompt_encoder_config={"image_size": SIZE},
        mask_decoder_config={"mlp_dim": 64},
    )
    model = transformers.SamModel(config).eval()
    fill(model)
    folder = tmp_path_factory.mktemp("hf") / "sam"
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def ours(saved: tuple[Any, Path]) -> Sam:
    return load_sam(saved[1])


def test_sizes(ours: Sam) -> None:
    assert ours.image_size == SIZE
    assert ours.arch["window_size"] == 4
    assert ours.arch["global_attn_indexes"] == [1]
    assert ours.arch["num_heads"] == 3
    assert ours.arch["decoder_mlp_dim"] == 64


def test_embedding(saved: tuple[Any, Path], ours: Sam) -> None:
    pixels = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        close(ours.encode(pixels).embedding, saved[0].get_image_embeddings(pixels), 2e-5)


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("kind", ["points", "box", "mask"])
def test_masks_and_iou(saved: tuple[Any, Path], ours: Sam, kind: str, multimask: bool) -> None:
    pixels = torch.randn(1, 3, SIZE, SIZE)
    points, labels = torch.rand(2, 3, 2) * SIZE, torch.tensor([[1, 0, 1], [1, 1, 0]])
    boxes = torch.tensor([[5.0, 6.0, 40.0, 50.0], [20.0, 1.0, 90.0, 60.0]])
    mask = torch.randn(1, 1, SIZE // 4, SIZE // 4)
    given: dict[str, Any] = {"points": {"input_points": points[None], "input_labels": labels[None]}}
    given["box"] = {"input_boxes": boxes[None]}
    given["mask"] = {"input_points": points[None, :1], "input_labels": labels[None, :1], "input_masks": mask}
    index = torch.zeros(1 if kind == "mask" else 2, dtype=torch.long)
    prompts = {
        "points": make_prompts(index, points, labels) if kind == "points" else None,
        "box": make_prompts(index, boxes=boxes) if kind == "box" else None,
        "mask": make_prompts(index, points[:1], labels[:1], mask_input=mask) if kind == "mask" else None,
    }[kind]
    assert prompts is not None
    with torch.no_grad():
        theirs = saved[0](pixel_values=pixels, multimask_output=multimask, **given[kind])
        answer = ours.decode(ours.encode(pixels), prompts, multimask)
    close(answer.low_res_logits, theirs.pred_masks[0], 2e-5)
    close(answer.iou_predictions, theirs.iou_scores[0], 2e-5)


def rewritten(folder: Path, to: Path, block: str | None, name: str, value: object) -> Path:
    """A copy of the folder with one setting of its config changed."""
    to.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (config if block is None else config.setdefault(block, {}))[name] = value
    (to / "config.json").write_text(json.dumps(config))
    (to / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return to


@pytest.mark.parametrize(
    ("block", "name", "value"),
    [
        (None, "model_type", "sam_hq"),
        ("vision_config", "patch_size", 8),
        ("vision_config", "hidden_act", "relu"),
        ("vision_config", "use_rel_pos", False),
        ("mask_decoder_config", "num_attention_heads", 4),
        ("mask_decoder_config", "attention_downsample_rate", 1),
    ],
)
def test_settings_that_sam_does_not_have_are_refused(
    saved: tuple[Any, Path], tmp_path: Path, block: str | None, name: str, value: object
) -> None:
    folder = rewritten(saved[1], tmp_path / "copy", block, name, value)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{name} is "):
        load_sam(folder)


@pytest.mark.parametrize("twin", [True, False])
def test_the_shared_positional_matrix_may_be_stored_once_or_twice(
    saved: tuple[Any, Path], tmp_path: Path, twin: bool
) -> None:
    folder = rewritten(saved[1], tmp_path / "copy", None, "note", "x")
    state = load_file(folder / "model.safetensors")
    names = ["shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding"]
    matrix = next(state[name] for name in names if name in state)
    for name in names:
        state.pop(name, None)
    state |= {name: matrix.clone() for name in (names if twin else names[1:])}
    save_file(state, folder / "model.safetensors")
    found = load_sam(folder).prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    assert torch.equal(found, matrix)


def test_a_missing_tensor_is_named(saved: tuple[Any, Path], tmp_path: Path) -> None:
    folder = rewritten(saved[1], tmp_path / "copy", None, "note", "x")
    state = load_file(folder / "model.safetensors")
    del state["mask_decoder.upscale_conv1.bias"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"misses mask_decoder\.output_upscaling\.0\.bias"):
        load_sam(folder)
