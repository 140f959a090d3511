"""Writing and reading weights: what goes in comes out, under upstream's names, and what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from samlet.artefacts import write_directory
from samlet.errors import CheckpointError
from samlet.models import Sam, infer_arch, load_sam, save_sam_safetensors, save_sam_upstream
from samlet.models.checkpoints import METADATA, digest_of
from samlet.models.vit import ImageEncoderViT
from tests.models.sizes import SIZES, small_sam


def same(one: Sam, other: Sam) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", SIZES)
def test_upstream_file_round_trip(kind: str, tmp_path: Path) -> None:
    sam = small_sam(kind, 96)
    path = tmp_path / "weights.pt"
    save_sam_upstream(sam, path)
    plain = torch.load(path, weights_only=True)
    assert type(plain) is dict
    assert {n: tuple(t.shape) for n, t in plain.items()} == {n: tuple(t.shape) for n, t in sam.state_dict().items()}
    again = load_sam(path, image_size=96)
    assert same(again, sam)
    assert not again.training
    pixels = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(again.encode(pixels).embedding, sam.encode(pixels).embedding)
    assert {n for n, p in again.named_parameters() if not p.requires_grad} == {
        n for n, p in sam.named_parameters() if not p.requires_grad
    }
    assert torch.equal(again.pixel_mean, sam.pixel_mean)
    assert torch.equal(again.pixel_std, sam.pixel_std)


@pytest.mark.parametrize("kind", SIZES)
def test_safetensors_round_trip_tells_the_sizes(kind: str, tmp_path: Path) -> None:
    sam = small_sam(kind, 96)
    save_sam_safetensors(sam, tmp_path / "weights.safetensors")
    again = load_sam(tmp_path / "weights.safetensors")
    assert same(again, sam)
    assert again.arch == sam.arch


def test_loading_does_not_depend_on_the_name_or_share_memory_with_the_file(tmp_path: Path) -> None:
    sam = small_sam()
    save_sam_safetensors(sam, tmp_path / "weights.bin")
    again = load_sam(str(tmp_path / "weights.bin"))
    before = (tmp_path / "weights.bin").read_bytes()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert (tmp_path / "weights.bin").read_bytes() == before


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    for save in (save_sam_upstream, *[save_sam_safetensors] * 5):
        save(small_sam(), tmp_path / "one")
        save(small_sam(), tmp_path / "two")
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("vit_t", {"mlp_ratio": 1.3, "depths": [1, 3, 1, 2], "num_classes": 0}),
        (
            "vit_t",
            {"embed_dims": [64, 128, 160, 320], "depths": [1, 1, 1, 1], "num_heads": [2, 4, 5, 10], "mlp_ratio": 0.1},
        ),
        ("vit_b", {"global_attn_indexes": [0, 2], "window_size": 5, "mlp_ratio": 1.7}),
        ("vit_b", {"global_attn_indexes": [0, 1, 2], "window_size": 14}),
        ("vit_b", {"global_attn_indexes": [], "window_size": 9, "num_heads": 1}),
        ("vit_b", {"window_size": 14, "decoder_depth": 1, "decoder_mlp_dim": 33}),
    ],
)
def test_sizes_are_inferred(kind: str, sizes: dict[str, Any]) -> None:
    sam = small_sam(kind, 64, **sizes)
    found = infer_arch(sam.state_dict())
    if kind == "vit_t":  # its tensors do not tell the input size, nor the first stage's heads and window
        found["image_size"] = 64
        for name in ("num_heads", "window_sizes"):
            found[name][0] = sam.arch[name][0]
        found["mlp_ratio"] = pytest.approx(sam.arch["mlp_ratio"], rel=0.2)
    else:
        found["mlp_ratio"] = pytest.approx(sam.arch["mlp_ratio"], rel=0.05)
    assert sam.arch == found


@pytest.mark.parametrize(("kind", "size"), [("vit_b", 768), ("vit_l", 1024), ("vit_h", 1280)])
def test_published_sizes_keep_their_kind(kind: str, size: int) -> None:
    sam = small_sam(
        kind="vit_b", image_size=32, embed_dim=size, depth=1, num_heads=16, mlp_ratio=0.01, global_attn_indexes=[]
    )
    assert infer_arch(sam.state_dict())["kind"] == kind


def test_half_precision_files_are_read_in_float32(tmp_path: Path) -> None:
    sam = small_sam()
    halves = {n: t.half() if t.is_floating_point() else t for n, t in sam.state_dict().items()}
    torch.save(halves, tmp_path / "half.pt")
    again = load_sam(tmp_path / "half.pt", image_size=64)
    assert all(p.dtype == torch.float32 for p in again.parameters())


def test_pixel_buffers_in_a_file_are_accepted_if_they_are_sams(tmp_path: Path) -> None:
    sam = small_sam()
    buffers = {"pixel_mean": sam.pixel_mean, "pixel_std": sam.pixel_std}
    torch.save({**sam.state_dict(), **buffers}, tmp_path / "with.pt")
    assert same(load_sam(tmp_path / "with.pt", image_size=64), sam)
    torch.save({**sam.state_dict(), **buffers, "pixel_std": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="pixel_std"):
        load_sam(tmp_path / "other.pt", image_size=64)


def test_a_vit_at_another_input_size_has_its_positions_resampled(tmp_path: Path) -> None:
    sam = small_sam("vit_b", 64)
    save_sam_upstream(sam, tmp_path / "vit.pt")
    larger = load_sam(tmp_path / "vit.pt", image_size=128)
    assert larger.arch == {**sam.arch, "image_size": 128}
    ours, theirs = larger.state_dict(), sam.state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed == {"image_encoder.pos_embed", *(f"image_encoder.blocks.1.attn.rel_pos_{axis}" for axis in "hw")}
    assert ours["image_encoder.pos_embed"].shape == (1, 8, 8, 24)
    encoder = sam.image_encoder
    assert isinstance(encoder, ImageEncoderViT)
    # A linear ramp stays one; so relative position 0 stays in the middle.
    with torch.no_grad():
        encoder.blocks[1].attn.rel_pos_h.copy_(torch.linspace(-1, 1, 7)[:, None].expand(7, 8))
    save_sam_upstream(sam, tmp_path / "ramp.pt")
    ramp = load_sam(tmp_path / "ramp.pt", image_size=128).state_dict()["image_encoder.blocks.1.attn.rel_pos_h"]
    torch.testing.assert_close(ramp, -ramp.flip(0))
    assert (ramp.diff(dim=0) >= 0).all()
    with torch.no_grad():
        assert larger.encode(torch.randn(1, 3, 128, 128)).embedding.shape == (1, 256, 8, 8)


def test_tiny_vit_takes_any_input_size(tmp_path: Path) -> None:
    save_sam_upstream(small_sam(image_size=64), tmp_path / "tiny.pt")
    assert load_sam(tmp_path / "tiny.pt").image_size == 1024
    assert load_sam(tmp_path / "tiny.pt", image_size=80).image_size == 80
    with pytest.raises(CheckpointError, match=r"tiny\.pt: image_size 100: must be a multiple of 16"):
        load_sam(tmp_path / "tiny.pt", image_size=100)


def test_a_run_directory_and_its_best(tmp_path: Path) -> None:
    sam = small_sam()
    write_directory(tmp_path / "run" / "best", lambda place: save_sam_safetensors(sam, place / "student.safetensors"))
    assert same(load_sam(tmp_path / "run"), sam)
    assert same(load_sam(tmp_path / "run" / "best"), sam)
    file = tmp_path / "run" / "best" / "student.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"student\.safetensors: damaged"):
        load_sam(tmp_path / "run")


def changed(sam: Sam, **replaced: Tensor | None) -> dict[str, Tensor]:
    state: dict[str, Any] = {**sam.state_dict(), **replaced}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    ("name", "tensor", "told"),
    [
        (
            "image_encoder.layers.2.blocks.1.mlp.fc2.bias",
            None,
            r"misses image_encoder\.layers\.2\.blocks\.1\.mlp\.fc2\.bias",
        ),
        ("mask_decoder.iou_token.weight", None, r"misses mask_decoder\.iou_token\.weight"),
        ("mask_decoder.hf_token.weight", torch.zeros(1, 256), r"unexpected mask_decoder\.hf_token\.weight"),
        ("mask_decoder.iou_token.weight", torch.zeros(1, 128), r"other shapes for mask_decoder\.iou_token\.weight"),
        ("image_encoder.layers.1.blocks.0.attn.attention_biases", None, r"attn\.attention_biases"),
        ("image_encoder.layers.1.blocks.0.attn.attention_biases", torch.zeros(2, 26), r"attn\.attention_biases"),
        ("image_encoder.layers.1.blocks.0.attn.attention_biases", torch.zeros(()), "impossible shape"),
        ("mask_decoder.transformer.layers.0.mlp.lin1.weight", None, r"misses key mask_decoder\.transformer\.layers\.0"),
    ],
)
@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_keys_that_do_not_fit_are_named(form: str, name: str, tensor: Tensor | None, told: str, tmp_path: Path) -> None:
    state = changed(small_sam(), **{name: tensor})
    path = tmp_path / f"model.{form}"
    if form == "pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    with pytest.raises(CheckpointError, match=told) as caught:
        load_sam(path, image_size=64)
    assert str(path) in str(caught.value)


def test_the_digest_covers_tensors_and_sizes(tmp_path: Path) -> None:
    sam = small_sam()
    path = tmp_path / "model.safetensors"
    save_sam_safetensors(sam, path)
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert b"samlet" in content[: 8 + header]
    for place in (8 + header + 3, len(content) // 2, len(content) - 1, content.index(b'\\"image_size\\": 64') + 17):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(bytes(damaged))
        with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
            load_sam(path)


def test_metadata_that_is_no_architecture_is_refused(tmp_path: Path) -> None:
    state = {n: t.contiguous() for n, t in small_sam().state_dict().items()}
    notes = ["{", "3", "[]", "{}", '{"arch": []}']
    arches: list[dict[str, Any]] = [{}, {"kind": 3}, {"kind": ["vit_t"]}, {"image_size": 64}]
    arches += [{"kind": "vit_t", "image_size": "64"}, {"kind": "vit_t", "image_size": 64, "depths": 3}]
    notes += [json.dumps({"arch": arch, "sha256": digest_of(state, arch)}) for arch in arches]
    for note in notes:
        save_file(state, tmp_path / "odd.safetensors", {METADATA: note})
        with pytest.raises(CheckpointError, match=r"odd\.safetensors"):
            load_sam(tmp_path / "odd.safetensors")
    assert json.loads(json.dumps(small_sam().arch)) == small_sam().arch
    assert load_file(tmp_path / "odd.safetensors").keys() == state.keys()


def test_an_unfinished_run_names_the_checkpoint_that_there_is(tmp_path: Path) -> None:
    for step in ("step-00000001", "step-00000002"):
        (tmp_path / "run/checkpoints" / step).mkdir(parents=True)
        save_sam_safetensors(small_sam("vit_t", 96), tmp_path / "run/checkpoints" / step / "student.safetensors")
    with pytest.raises(CheckpointError, match=r"has not been validated yet.*step-00000002$"):
        load_sam(tmp_path / "run")
    load_sam(tmp_path / "run/checkpoints/step-00000002")
