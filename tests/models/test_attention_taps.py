"""Attention maps, upscaled features and hypernetwork vectors as taps: what the networks really compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from samlet.errors import SamletError
from samlet.models import Sam
from samlet.models.attention import summed_bias
from samlet.models.sam import block_index
from samlet.models.tiny_vit import Attention as TinyAttention
from samlet.models.vit import Attention as VitAttention
from tests.models.sizes import small_sam
from tests.models.test_decoding import SIZE, features, row, some_prompts

DECODER_TAPS = (
    *(f"attention.{k}.{kind}" for k in range(2) for kind in ("self", "token_to_image", "image_to_token")),
    "attention.final",
    "upscaled",
    "hypernetworks",
)


@pytest.fixture(scope="module")
def decoder() -> Sam:
    return small_sam(image_size=SIZE, decoder_depth=2)


def centres(grid: int) -> torch.Tensor:
    """Every cell's centre as a share of the side, row by row."""
    axis = (torch.arange(grid) + 0.5) / grid
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).reshape(1, -1, 2)


def attended(sam: Sam, pixels: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The projected tokens of a block's windows as its attention saw them, and what came out of the softmax."""
    seen: dict[str, torch.Tensor] = {}
    kind = VitAttention if sam.kind == "vit_b" else TinyAttention
    module = [m for m in sam.image_encoder.modules() if isinstance(m, kind)][number]
    plain = module.attend

    def spy(qkv: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen["in"], seen["out"] = qkv, plain(qkv, *rest)
        return seen["out"]

    module.attend = spy  # type: ignore[method-assign]
    sam.encode(pixels)
    del module.attend
    return seen["in"], seen["out"]


@pytest.mark.parametrize(("kind", "block", "number"), [("vit_b", 1, 1), ("vit_t", 4, 2)])
def test_rows_times_values_are_what_the_block_computes(kind: str, block: int, number: int) -> None:
    """A global ViT block, and a TinyViT block whose one window covers the map: rows x values = its output."""
    size = 64
    sam = small_sam(kind, size) if kind == "vit_b" else small_sam(kind, size, window_sizes=[7, 8, 4, 4])
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        qkv, out = attended(sam, pixels, number)
        places = centres(size // 16).expand(2, -1, -1)
        rows = sam.encode(pixels, [f"attention.{block}"], places).taps[f"attention.{block}"].flatten(3)
    heads = rows.shape[1]
    torch.testing.assert_close(rows.sum(dim=-1), torch.ones(rows.shape[:3]))
    if kind == "vit_b":
        values = qkv.view(*qkv.shape[:2], 3, heads, -1)[:, :, 2].transpose(1, 2)
    else:
        values = qkv.view(*qkv.shape[:2], heads, 3, -1)[:, :, :, 2].transpose(1, 2)
    torch.testing.assert_close((rows @ values).transpose(1, 2).flatten(2), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit_b", "vit_t"])
def test_a_windowed_row_is_that_of_the_window_without_its_padding(kind: str) -> None:
    """Windows of 3 on a map of 4: the last window is one cell wide, and its padding is no key."""
    sam = small_sam(kind, 64)
    block = 0 if kind == "vit_b" else 5
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        qkv, _ = attended(sam, pixels, 0 if kind == "vit_b" else 3)
        name = f"attention.{block}"
        rows = sam.encode(pixels, [name], torch.tensor([[[0.9, 0.1], [0.3, 0.6]]])).taps[name][0]
    seen = rows > 0
    assert seen[:, 0].sum(dim=(1, 2)).tolist() == [3] * rows.shape[0]  # cell (3, 0): row 3 alone, columns 0..2
    assert seen[:, 0, 3, :3].all()
    assert seen[:, 1, :3, :3].all()
    assert seen[:, 1].sum(dim=(1, 2)).tolist() == [9] * rows.shape[0]  # cell (1, 2): the whole first window
    module = [m for m in sam.image_encoder.modules() if isinstance(m, VitAttention | TinyAttention)][
        0 if kind == "vit_b" else 3
    ]
    if isinstance(module, VitAttention):
        q, k, _ = qkv.view(len(qkv), 9, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = summed_bias(*module.along_axes(q, (3, 3)))
    else:
        q, k, _ = qkv.view(len(qkv), 9, module.num_heads, 3, -1).permute(3, 0, 2, 1, 4).unbind(0)
        bias = module.bias()[None]
    whole = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias).softmax(dim=-1)
    torch.testing.assert_close(rows[:, 1, :3, :3].flatten(1), whole[0, :, 1 * 3 + 2], rtol=1e-4, atol=1e-5)
    last = whole[2, :, 0, :3]  # window (1, 0), its first row; the other two rows are padding
    torch.testing.assert_close(rows[:, 0, 3, :3], last / last.sum(dim=-1, keepdim=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit_b", "vit_t"])
def test_looking_changes_nothing_and_gradients_reach_queries_and_keys(kind: str) -> None:
    sam = small_sam(kind, 64)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    name = f"attention.{sam.image_encoder.attending[-1]}"
    places = torch.rand(2, 5, 2, generator=torch.Generator().manual_seed(1))
    looked = sam.encode(pixels, [name, "neck"], places)
    assert torch.equal(looked.embedding, sam.encode(pixels).embedding)
    assert looked.taps[name].shape[2:] == (5, 4, 4)
    torch.autograd.backward(looked.taps[name].square().sum())
    module = [m for m in sam.image_encoder.modules() if isinstance(m, VitAttention | TinyAttention)][-1]
    gradient = module.qkv.weight.grad
    assert gradient is not None
    parts = (
        gradient.view(3, -1) if kind == "vit_b" else gradient.view(module.num_heads, 3, -1).transpose(0, 1).flatten(1)
    )
    assert parts[0].any()
    assert parts[1].any()
    assert not parts[2].any(), "values take no part in who looks where"


def test_attention_of_convolutions_or_without_places_is_refused() -> None:
    sam = small_sam("vit_t", 64)
    with pytest.raises(SamletError, match=r"attention\.0.*attention\.2 to attention\.5"):
        sam.encode(torch.zeros(1, 3, 64, 64), ["attention.0"], torch.zeros(1, 1, 2))
    with pytest.raises(SamletError, match="places: attention is tapped"):
        sam.encode(torch.zeros(1, 3, 64, 64), ["attention.3"])


@pytest.mark.parametrize(
    ("number", "depth", "index"),
    [
        *[("0", 12, 0), ("-1", 12, 11), ("1/4", 12, 2), ("4/4", 12, 11), ("1/2", 24, 11), ("1/3", 2, 0)],
        *[("1/32", 2, 0), ("0/4", 12, None), ("5/4", 12, None), ("1/0", 12, None), ("12", 12, None)],
        *[("-13", 12, None), ("x", 12, None)],
    ],
)
def test_blocks_by_index_from_the_end_or_by_relative_depth(number: str, depth: int, index: int | None) -> None:
    assert block_index(number, depth) == index


def test_taps_by_relative_depth_are_those_of_the_block() -> None:
    sam = small_sam("vit_b", 64)
    taps = sam.encode(torch.randn(1, 3, 64, 64), ["blocks.2/3", "blocks.1"]).taps
    assert torch.equal(taps["blocks.2/3"], taps["blocks.1"])
    assert sam.tap_channels("blocks.2/3") == sam.tap_channels("attention.1") == 24


@pytest.mark.parametrize("gradients", [False, True])
def test_upscaled_features_times_vectors_are_the_logits(decoder: Sam, gradients: bool) -> None:
    prompts = some_prompts()
    with torch.set_grad_enabled(gradients):
        output = decoder.decode(features(), prompts, taps=["hypernetworks", "upscaled"])
    upscaled, vectors = output.taps["upscaled"], output.taps["hypernetworks"]
    assert upscaled.shape == (5, 32, SIZE // 4, SIZE // 4)
    assert vectors.shape == (5, 4, 32)
    logits = torch.einsum("pmc,pchw->pmhw", vectors, upscaled)
    torch.testing.assert_close(logits, output.low_res_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("images", [1, 3])
def test_decoder_attention_is_what_the_decoder_weighs_with(decoder: Sam, images: int) -> None:
    """Each map, worked out again from the module's projections with whole heads."""
    prompts = some_prompts(images=images)
    image = features(images)
    attention = decoder.mask_decoder.transformer.layers[0].self_attn
    cells, tokens = (SIZE // 16) ** 2, 5 + prompts.point_labels.shape[1]
    with torch.no_grad():
        output = decoder.decode(image, prompts, taps=DECODER_TAPS)
        embedded = decoder._embed(prompts, image.embedding)
        queries = decoder.mask_decoder._tokens(embedded)
        q, k = attention._heads(attention.q_proj(queries)), attention._heads(attention.k_proj(queries))
        of_self = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1)
        layer = decoder.mask_decoder.transformer.layers[0]
        mixed = layer.norm1(attention(queries, queries, queries, None))
        look = layer.cross_attn_token_to_image
        no_mask = decoder.prompt_encoder.no_mask_embed.weight
        pe = decoder.prompt_encoder.get_dense_pe((SIZE // 16, SIZE // 16)).flatten(2).transpose(1, 2)
        keys = image.embedding[prompts.image_index].flatten(2).transpose(1, 2) + no_mask + pe
        q, k = look._heads(look.q_proj(mixed + queries)), look._heads(look.k_proj(keys))
        looked = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1)
    torch.testing.assert_close(output.taps["attention.0.self"], of_self, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.taps["attention.0.token_to_image"], looked, rtol=1e-4, atol=1e-6)
    for name in DECODER_TAPS[:-2]:
        kind = name.split(".")[-1]
        shape = {"self": (tokens, tokens), "image_to_token": (cells, tokens)}.get(kind, (tokens, cells))
        assert output.taps[name].shape == (5, 8, *shape)
        torch.testing.assert_close(output.taps[name].sum(dim=-1), torch.ones(5, 8, shape[0]))


@pytest.mark.parametrize("gradients", [False, True])
def test_holes_are_not_looked_at(decoder: Sam, gradients: bool) -> None:
    prompts = some_prompts(3)
    absent = torch.zeros(3, 4, dtype=torch.bool)
    absent[0, 1] = True
    with torch.set_grad_enabled(gradients):
        taps = decoder.decode(features(), prompts._replace(absent=absent), taps=DECODER_TAPS).taps
    for name in ("attention.0.self", "attention.1.self", "attention.0.image_to_token", "attention.1.image_to_token"):
        assert not taps[name][0, ..., 5 + 1].any()
        assert taps[name][1].all()


def test_what_is_not_asked_for_costs_nothing_and_changes_nothing(decoder: Sam) -> None:
    prompts = some_prompts()
    with torch.no_grad():
        plain, tapped = decoder.decode(features(), prompts), decoder.decode(features(), prompts, taps=DECODER_TAPS)
    assert plain.taps == {}
    assert tuple(tapped.taps) == DECODER_TAPS
    assert torch.equal(plain.low_res_logits, tapped.low_res_logits)
    assert torch.equal(plain.iou_predictions, tapped.iou_predictions)


@pytest.mark.parametrize("gradients", [False, True])
def test_taps_have_a_row_for_each_prompt_in_its_order(decoder: Sam, gradients: bool) -> None:
    prompts = some_prompts(5)
    with torch.set_grad_enabled(gradients):
        together = decoder.decode(features(), prompts, taps=DECODER_TAPS).taps
        for i in range(5):
            alone = decoder.decode(features(), row(prompts, i), taps=DECODER_TAPS).taps
            for name in DECODER_TAPS:
                torch.testing.assert_close(together[name][i : i + 1], alone[name], rtol=1e-3, atol=1e-5)


def test_attention_taps_carry_gradients_to_their_own_projections(decoder: Sam) -> None:
    decoder.zero_grad()
    taps = decoder.decode(features(), some_prompts(), taps=["attention.final"]).taps
    torch.autograd.backward(taps["attention.final"].square().sum())
    last = decoder.mask_decoder.transformer.final_attn_token_to_image
    assert last.q_proj.weight.grad is not None
    assert last.q_proj.weight.grad.any()
    assert last.v_proj.weight.grad is None
    decoder.zero_grad()


def test_an_unknown_decoder_tap_lists_those_that_exist(decoder: Sam) -> None:
    with pytest.raises(
        SamletError, match=r"attention\.7\.self.*prompted\.0.*attention\.final, upscaled, hypernetworks"
    ):
        decoder.check_decoder_taps(["attention.7.self"])
