"""Freezing and thawing (PITFALLS 29, 30)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from samlet.engine.parts import build_optimizer, calibrate_batch_norm, named_parameters, set_trainable
from samlet.models import Sam, build_sam
from tests.tiny import IMAGE_SIZE, STUDENT, TEACHER

NECK = "image_encoder.neck.0.weight"


@pytest.fixture
def student() -> Sam:
    torch.manual_seed(0)
    return build_sam("vit_t", IMAGE_SIZE, **STUDENT)


def optimizer_of(student: Sam) -> torch.optim.AdamW:
    return build_optimizer(named_parameters(student), learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.99))


def one_step(student: Sam, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))
    loss = student.encode(pixels).embedding.square().mean()
    loss = loss + torch.stack([parameter.square().sum() for parameter in student.mask_decoder.parameters()]).sum()
    torch.autograd.backward(loss)
    optimizer.step()


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_a_frozen_encoder_stays_as_it_is_to_the_bit(student: Sam, batch_norm: str) -> None:
    before = {name: value.clone() for name, value in student.state_dict().items()}
    set_trainable(student, ["image_encoder"], batch_norm)
    optimizer = optimizer_of(student)
    for seed in range(2):
        one_step(student, optimizer, seed)
    for name, value in student.state_dict().items():
        if name.startswith("image_encoder."):
            assert torch.equal(value, before[name]), name
    name = "mask_decoder.iou_token.weight"
    assert not torch.equal(student.get_parameter(name), before[name])


def test_thawed_weights_move_with_the_same_optimizer(student: Sam) -> None:
    set_trainable(student, ["image_encoder"], "frozen")
    optimizer = optimizer_of(student)
    one_step(student, optimizer, 0)
    before = student.get_parameter(NECK).clone()
    set_trainable(student, [], "frozen")
    one_step(student, optimizer, 1)
    assert not torch.equal(student.get_parameter(NECK), before)


def test_batch_norm_follows_the_data_only_where_asked(student: Sam) -> None:
    name = next(name for name in student.state_dict() if name.endswith("running_mean"))
    for batch_norm, moves in (("frozen", False), ("train", True)):
        before = student.state_dict()[name].clone()
        set_trainable(student, [], batch_norm)
        one_step(student, optimizer_of(student), 0)
        assert torch.equal(student.state_dict()[name], before) is not moves


def test_calibrated_statistics_are_those_of_the_images_and_stay(student: Sam) -> None:
    images = torch.randn(6, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0)) * 3 + 1
    stem = next(module for module in student.modules() if isinstance(module, torch.nn.BatchNorm2d))
    seen: list[torch.Tensor] = []
    conv = student.image_encoder.get_submodule("patch_embed.seq.0.c")
    calibrate_batch_norm(student, torch.chunk(images, 3))
    with torch.no_grad():
        seen = [conv(part) for part in torch.chunk(images, 3)]
    expected = torch.stack([maps.mean(dim=(0, 2, 3)) for maps in seen]).mean(dim=0)
    torch.testing.assert_close(stem.running_mean, expected, rtol=1e-4, atol=1e-5)
    assert stem.momentum == 0.1
    before = {name: value.clone() for name, value in student.state_dict().items() if "running" in name}
    set_trainable(student, [], "calibrated")
    one_step(student, optimizer_of(student), 0)
    assert all(torch.equal(student.state_dict()[name], value) for name, value in before.items())


def test_every_parameter_is_in_the_optimizer_once(student: Sam) -> None:
    set_trainable(student, ["mask_decoder"], "frozen")
    held = [id(parameter) for group in optimizer_of(student).param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in student.parameters())


PROMPTS_AND_TOKENS = {
    *(f"prompt_encoder.point_embeddings.{kind}.weight" for kind in range(4)),
    "prompt_encoder.not_a_point_embed.weight",
    "prompt_encoder.no_mask_embed.weight",
    "mask_decoder.iou_token.weight",
    "mask_decoder.mask_tokens.weight",
}
TABLES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "vit_t": (STUDENT, {f"image_encoder.layers.{stage}.blocks.0.attn.attention_biases" for stage in (1, 2, 3)}),
    "vit_b": (
        TEACHER,
        {f"image_encoder.blocks.{block}.attn.rel_pos_{side}" for block in (0, 1) for side in "hw"}
        | {"image_encoder.pos_embed"},
    ),
}


@pytest.mark.parametrize("kind", TABLES)
def test_norms_biases_and_tables_alone_do_not_decay(kind: str) -> None:
    sizes, tables = TABLES[kind]
    sam = build_sam(kind, IMAGE_SIZE, **sizes)
    exempt = {id(parameter) for parameter in optimizer_of(sam).param_groups[1]["params"]}
    found = {name for name, parameter in sam.named_parameters() if id(parameter) in exempt}
    vectors = {name for name, parameter in sam.named_parameters() if parameter.ndim < 2}  # of norms, and biases
    assert vectors <= found
    assert found - vectors == tables | PROMPTS_AND_TOKENS
