"""LoRA: merged equals unmerged, only the factors train, and nobody who loads the files notices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from samlet.engine.ema import AverageStudent
from samlet.engine.parts import set_trainable
from samlet.errors import ConfigError
from samlet.models import Sam, build_sam, load_sam, save_sam_safetensors, save_sam_upstream
from samlet.models.configs import EncoderConfig, LoraConfig, ModelConfig
from samlet.models.lora import add_lora, load_merged_state, lora_state, merge_lora, merged_state
from samlet.types import MaskOutput, Prompts
from tests.tiny import IMAGE_SIZE, STUDENT, TEACHER

ATTENTION = ["image_encoder.*.attn.qkv", "image_encoder.*.attn.proj"]
TARGETS = {
    "vit_t": [*ATTENTION, "image_encoder.*.mlp.fc1", "image_encoder.neck.*", "image_encoder.*.conv1.c"],
    "vit_b": [*ATTENTION, "image_encoder.*.lin1", "image_encoder.patch_embed.proj"],
}
DECODER = ["mask_decoder.transformer.*.q_proj", "mask_decoder.output_upscaling.*"]


def build(kind: str, *targets: str) -> Sam:
    torch.manual_seed(0)
    sam = build_sam(kind, IMAGE_SIZE, **(STUDENT if kind == "vit_t" else TEACHER)).eval()
    if targets:
        add_lora(sam, rank=2, alpha=3.0, targets=targets)
    return sam


@pytest.fixture(params=["vit_t", "vit_b"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def move(sam: Sam) -> Sam:
    """Give every factor values, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sam.named_parameters():
            if name.endswith(("lora_A", "lora_B")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return sam


@torch.no_grad()
def answer(sam: Sam) -> MaskOutput:
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(2))
    prompts = Prompts(torch.tensor([0]), torch.tensor([[[20.0, 30.0]]]), torch.tensor([[1]]))
    return sam.decode(sam.encode(pixels), prompts)


def test_it_begins_as_the_model_it_adapts(kind: str) -> None:
    plain, adapted = build(kind), build(kind, *TARGETS[kind], *DECODER)
    assert torch.equal(answer(plain).low_res_logits, answer(adapted).low_res_logits)


def test_merged_equals_unmerged_to_the_bit(kind: str) -> None:
    plain, adapted = build(kind), move(build(kind, *TARGETS[kind], *DECODER))
    before = answer(adapted)
    assert not torch.allclose(answer(plain).low_res_logits, before.low_res_logits, atol=1e-3)
    other = build(kind)
    other.load_state_dict(merged_state(adapted))
    merge_lora(adapted)
    assert set(adapted.state_dict()) == set(plain.state_dict())
    for sam in (other, adapted):
        after = answer(sam)
        assert torch.equal(after.low_res_logits, before.low_res_logits)
        assert torch.equal(after.iou_predictions, before.iou_predictions)


def test_files_hold_merged_weights_under_upstreams_keys(kind: str, tmp_path: Path) -> None:
    adapted = move(build(kind, *TARGETS[kind]))
    save_sam_safetensors(adapted, tmp_path / "student.safetensors")
    save_sam_upstream(adapted, tmp_path / "student.pt")
    assert set(load_file(tmp_path / "student.safetensors")) == set(build(kind).state_dict())
    for name in ("student.safetensors", "student.pt"):
        loaded = load_sam(tmp_path / name, image_size=IMAGE_SIZE)
        assert torch.equal(answer(loaded).low_res_logits, answer(adapted).low_res_logits)


def test_its_state_and_the_merged_one_restore_every_bit(kind: str) -> None:
    adapted, other = move(build(kind, *TARGETS[kind])), build(kind, *TARGETS[kind])
    load_merged_state(other, merged_state(adapted), lora_state(adapted))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in adapted.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        load_merged_state(other, merged_state(adapted), {})


def test_only_the_factors_train_in_an_adapted_part(kind: str) -> None:
    sam = build(kind, *TARGETS[kind])
    frozen_statistics = {n: v.clone() for n, v in sam.state_dict().items() if "running" in n}
    set_trainable(sam, [], "train")
    for name, parameter in sam.named_parameters():
        expected = "lora_" in name if name.startswith("image_encoder.") else True
        assert parameter.requires_grad is expected, name
    sam.encode(torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)).embedding.square().mean().backward()  # type: ignore[no-untyped-call]
    assert all(torch.equal(sam.state_dict()[name], value) for name, value in frozen_statistics.items())
    assert all(
        (parameter.grad is not None) is ("lora_" in name) for name, parameter in sam.image_encoder.named_parameters()
    )
    set_trainable(sam, ["image_encoder"], "frozen")
    assert not any(parameter.requires_grad for parameter in sam.image_encoder.parameters())


def test_the_gradient_is_that_of_the_low_rank_product() -> None:
    sam = build("vit_b", "image_encoder.blocks.0.attn.qkv")
    layer = sam.get_submodule("image_encoder.blocks.0.attn.qkv")
    rank = layer.get_submodule("parametrizations.weight.0")
    move(sam)
    x = torch.randn(5, TEACHER["embed_dim"])
    layer(x).square().sum().backward()
    a, b = rank.get_parameter("lora_A"), rank.get_parameter("lora_B")
    full = 2 * layer(x).detach().t() @ x  # dL/dW
    torch.testing.assert_close(b.grad, 1.5 * full @ a.detach().t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.grad, 1.5 * b.detach().t() @ full, rtol=1e-4, atol=1e-4)


def test_it_is_float32_under_autocast() -> None:
    sam = move(build("vit_b", *ATTENTION))
    name = "image_encoder.blocks.0.attn.qkv.weight"
    outside = merged_state(sam)[name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(merged_state(sam)[name], outside)


def test_an_average_follows_an_adapted_student() -> None:
    sam = build("vit_t", *ATTENTION)
    average = AverageStudent(sam, 0.5)
    average.follow(move(sam), 100)
    assert not torch.equal(answer(average.student).low_res_logits, answer(build("vit_t")).low_res_logits)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"targets": ("image_encoder.*.qqv",)},
            r"model\.lora\.targets: 'image_encoder\.\*\.qqv' names no layer of this",
        ),
        (
            {"rank": 9, "targets": ("image_encoder.*.local_conv.c",)},
            r"model\.lora\.rank: 9 is no less than the rank of",
        ),
        ({"targets": ("image_encoder.head",)}, "names no layer"),
    ],
)
def test_what_cannot_be_adapted_is_refused(settings: dict[str, object], said: str) -> None:
    lora = LoraConfig.model_validate(settings)
    config = ModelConfig(image_size=IMAGE_SIZE, encoder=EncoderConfig.model_validate(STUDENT), lora=lora)
    with pytest.raises(ConfigError, match=said):
        config.build()


def test_mobile_sam_loads_strictly_before_it_is_adapted(tmp_path: Path) -> None:
    donor = build("vit_t")
    save_sam_upstream(donor, tmp_path / "mobile_sam.pt")
    config = ModelConfig(image_size=IMAGE_SIZE, checkpoint=tmp_path / "mobile_sam.pt", lora=LoraConfig(rank=2))
    sam = config.build()
    assert {name for name in sam.state_dict() if "lora" in name}
    assert all(torch.equal(value, donor.state_dict()[name]) for name, value in merged_state(sam).items())
