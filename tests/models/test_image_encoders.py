"""The image encoders against the plain way, at sizes where windows fit and where they pad; taps; TinyViT's traps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from samlet.errors import SamletError
from samlet.models import build_sam, freeze_batch_norm
from tests.models import reference
from tests.models.reference import below, close
from tests.models.sizes import SIZES, small_sam


def images(count: int, size: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("kind", "size"),
    [("vit_t", 64), ("vit_t", 192), ("vit_t", 256), ("vit_t", 320), ("vit_b", 48), ("vit_b", 112), ("vit_b", 256)],
)
def test_encoder_is_the_plain_one_at_any_size(kind: str, size: int) -> None:
    sam = small_sam(kind, size)
    plain = reference.tiny_vit if kind == "vit_t" else reference.vit
    pixels = images(2 if size < 200 else 1, size)
    taps = [name for name in sam.tap_names() if name.startswith("blocks.")]
    with torch.no_grad():
        features = sam.encode(pixels, taps)
        embedding, blocks = plain(below(sam.state_dict(), "image_encoder."), sam.arch, pixels)
    close(features.embedding, embedding, 2e-5)
    for name, block in zip(taps, blocks, strict=True):
        close(features.taps[name], block, 2e-5)


@pytest.mark.parametrize("size", [512, 1024])
def test_tiny_vit_at_the_large_sizes(size: int) -> None:
    sizes: dict[str, Any] = {
        "depths": [1, 1, 1, 1],
        "embed_dims": [4, 4, 4, 6],
        "window_sizes": [7, 7, 14, 7],
        "num_heads": [1, 1, 2, 3],
    }
    sam = small_sam("vit_t", size, **sizes)
    pixels = images(1, size)
    with torch.no_grad():
        embedding = sam.encode(pixels).embedding
        expected, _ = reference.tiny_vit(below(sam.state_dict(), "image_encoder."), sam.arch, pixels)
    assert embedding.shape[2:] == (size // 16, size // 16)
    close(embedding, expected, 2e-5)


def test_windows_larger_than_the_map() -> None:
    for kind, window in (("vit_b", {"window_size": 14}), ("vit_t", {"window_sizes": [7, 20, 14, 7]})):
        sam = small_sam(kind, 64, **window)
        plain = reference.tiny_vit if kind == "vit_t" else reference.vit
        with torch.no_grad():
            ours = sam.encode(images(1, 64)).embedding
            expected, _ = plain(below(sam.state_dict(), "image_encoder."), sam.arch, images(1, 64))
        close(ours, expected, 2e-5)


@pytest.mark.parametrize("kind", ["vit_t", "vit_b"])
def test_gradients_are_those_of_the_plain_way(kind: str) -> None:
    sam = small_sam(kind, 80).double()
    pixels = images(2, 80).double()
    weights = torch.randn(2, 256, 5, 5, generator=torch.Generator().manual_seed(1)).double()
    torch.autograd.backward((sam.encode(pixels).embedding * weights).sum())
    leaves = {n: t.detach().clone() for n, t in sam.state_dict().items()}
    for name, parameter in sam.named_parameters():
        leaves[name].requires_grad_(parameter.requires_grad)
    plain = reference.tiny_vit if kind == "vit_t" else reference.vit
    torch.autograd.backward((plain(below(leaves, "image_encoder."), sam.arch, pixels)[0] * weights).sum())
    compared = 0
    for name, parameter in sam.image_encoder.named_parameters():
        grad = leaves[f"image_encoder.{name}"].grad
        if grad is not None:
            assert parameter.grad is not None, name
            close(parameter.grad, grad, 1e-9)
            compared += 1
    assert compared == sum(p.requires_grad for p in sam.image_encoder.parameters())


def test_taps_have_the_channels_they_say_and_carry_gradients() -> None:
    for kind in ("vit_t", "vit_b"):
        sam = small_sam(kind)
        names = (*sam.tap_names(), "blocks.-1", "blocks.-2")
        for name in names:
            sam.zero_grad()
            features = sam.encode(images(2, 64), [name])
            assert list(features.taps) == [name]
            assert features.taps[name].shape[:2] == (2, sam.tap_channels(name))
            torch.autograd.backward(features.taps[name].square().mean())
            trained = [n for n, p in sam.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
            assert trained, name
            assert all(n.startswith("image_encoder.") for n in trained)
        features = sam.encode(images(1, 64), names)
        assert torch.equal(features.taps["neck"], features.embedding)
        assert torch.equal(features.taps["blocks.-1"], features.taps[names[len(sam.image_encoder.block_channels) - 1]])


@pytest.mark.parametrize(
    "name", ["blocks.5000", "blocks.-7", "blocks", "blocks.x", "head", "", "blocks.1.0", "blocks.\u00b2"]
)
def test_an_unknown_tap_lists_those_that_exist(name: str) -> None:
    sam = small_sam()
    with pytest.raises(SamletError, match=r"blocks\.0 to blocks\.5"):
        sam.encode(images(1, 64), [name])
    with pytest.raises(SamletError, match="neck_conv"):
        sam.tap_channels(name)


@pytest.mark.parametrize(("kind", "last"), [("vit_t", 11), ("vit_b", 11), ("vit_l", 23), ("vit_h", 31)])
def test_every_published_kind_lists_its_blocks(kind: str, last: int) -> None:
    with torch.device("meta"):
        sam = build_sam(kind)
    assert sam.tap_names() == (*(f"blocks.{i}" for i in range(last + 1)), "neck_conv", "neck")
    assert sam.tap_channels("blocks.-2") == {"vit_t": 320, "vit_b": 768, "vit_l": 1024, "vit_h": 1280}[kind]


def test_project_to_neck_is_the_first_neck_convolution_without_gradient_into_it() -> None:
    sam = small_sam("vit_b")
    features = sam.encode(images(1, 64), ["blocks.-1", "neck_conv"])
    projected = sam.project_to_neck(features.taps["blocks.-1"])
    assert torch.equal(projected, features.taps["neck_conv"])
    torch.autograd.backward(projected.sum())
    assert sam.image_encoder.neck[0].weight.grad is None
    assert any(p.grad is not None for p in sam.image_encoder.parameters())
    tiny = small_sam("vit_t")
    with pytest.raises(SamletError, match="takes 24 channels, the tap has 8"):
        tiny.project_to_neck(tiny.encode(images(1, 64), ["blocks.0"]).taps["blocks.0"])


@pytest.mark.parametrize("shape", [(1, 3, 64, 48), (1, 3, 128, 128), (3, 64, 64), (1, 1, 64, 64)])
def test_pixels_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SamletError, match=r"\(B, 3, 64, 64\)"):
        small_sam().encode(torch.zeros(shape))


def test_attention_biases_are_never_stale() -> None:
    """Upstream keeps a table in eval mode, which survives loading and training: ours has none."""
    sam, other = small_sam(seed=1), small_sam(seed=2)
    pixels = images(1, 64)
    with torch.no_grad():
        before, expected = sam.encode(pixels).embedding, other.encode(pixels).embedding
        sam.train()
        sam.eval()
        sam.encode(pixels)
        sam.load_state_dict(other.state_dict())
        assert torch.equal(sam.encode(pixels).embedding, expected)
        for name, parameter in sam.named_parameters():
            if name.endswith("attention_biases"):
                parameter.mul_(3.0)
        assert not torch.equal(sam.encode(pixels).embedding, expected)
    assert not torch.equal(before, expected)


def test_attention_biases_train_in_eval_mode() -> None:
    sam = small_sam()
    torch.autograd.backward(sam.encode(images(1, 64)).embedding.square().mean())
    grads = [p.grad for name, p in sam.named_parameters() if name.endswith("attention_biases")]
    assert len(grads) == 4
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_frozen_batch_norm_stays_through_train_and_thaws() -> None:
    sam = small_sam()
    running = {n: b.clone() for n, b in sam.named_buffers() if "running" in n}
    expected = sam.encode(images(2, 64)).embedding
    freeze_batch_norm(sam)
    sam.train()
    assert torch.equal(sam.encode(images(2, 64)).embedding, expected)
    assert all(torch.equal(b, running[n]) for n, b in sam.named_buffers() if n in running)
    freeze_batch_norm(sam, frozen=False)
    assert any(isinstance(m, nn.BatchNorm2d) and m.training for m in sam.modules())
    sam.encode(images(2, 64))
    assert not any(torch.equal(b, running[n]) for n, b in sam.named_buffers() if n in running)


def test_maps_stay_channels_last() -> None:
    """Whatever the layout of the pixels, no block copies its map into another layout."""
    for kind in ("vit_t", "vit_b"):
        sam = small_sam(kind)
        with torch.no_grad():
            features = sam.encode(images(2, 64), sam.tap_names())
        for name, maps in features.taps.items():
            assert maps.is_contiguous(memory_format=torch.channels_last), name


def test_nothing_survives_a_forward() -> None:
    sam = small_sam()
    state = {name: set(vars(module)) for name, module in sam.named_modules()}
    sam.encode(images(1, 64), sam.tap_names())
    for name, module in sam.named_modules():
        assert set(vars(module)) == state[name]
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks


@pytest.mark.parametrize(
    ("kind", "sizes", "told"),
    [
        ("vit_x", {}, "vit_t, vit_b, vit_l, vit_h"),
        ("vit_t", {"embed_dim": 3}, "vit_t has no embed_dim; it has embed_dims"),
        ("vit_b", {"depths": [1]}, "vit_b has no depths"),
        ("vit_t", {"depths": [1, 1]}, "four stages"),
        ("vit_t", {"num_heads": [1, 3, 5, 7]}, "cannot be shared by 3 heads"),
        ("vit_b", {"embed_dim": 100}, "100 cannot be shared by 12 heads"),
        ("vit_t", {"image_size": 100}, "multiple of 16"),
        ("vit_t", {"image_size": 16}, "32 or more"),
        ("vit_t", {"decoder_depth": 0}, "decoder_depth"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(kind: str, sizes: dict[str, Any], told: str) -> None:
    with torch.device("meta"), pytest.raises(SamletError, match=told):
        build_sam(kind, **sizes)


def test_arch_rebuilds_the_model() -> None:
    for kind in SIZES:
        sam = small_sam(kind)
        again = build_sam(**sam.arch)
        again.load_state_dict(sam.state_dict())
        assert again.arch == sam.arch
