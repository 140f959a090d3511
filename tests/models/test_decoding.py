"""`Sam.decode` against the plain way: every prompt by itself, the image repeated, nothing shared."""

from __future__ import annotations

import itertools

import pytest
import torch

from samlet.errors import SamletError
from samlet.models import Sam, make_prompts, mask_decoder
from samlet.types import ImageFeatures, MaskOutput, Prompts
from tests.models.reference import close, decode_one
from tests.models.sizes import small_sam

SIZE = 96
MODES = {None: slice(0, 4), True: slice(1, 4), False: slice(0, 1)}


@pytest.fixture(autouse=True)
def chunks_of_two_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_decoder, "CHUNK_TOKENS", 2 * (SIZE // 16) ** 2)


@pytest.fixture(scope="module")
def sam() -> Sam:
    return small_sam(image_size=SIZE, decoder_depth=3)


def features(images: int = 3, seed: int = 0) -> ImageFeatures:
    generator = torch.Generator().manual_seed(seed)
    return ImageFeatures(torch.randn(images, 256, SIZE // 16, SIZE // 16, generator=generator), {})


def some_prompts(count: int = 5, images: int = 3, seed: int = 1, masks: bool = False) -> Prompts:
    """Two points and a box each, images in mixed order."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, images, (count,), generator=generator)
    points = torch.rand(count, 2, 2, generator=generator) * SIZE
    labels = torch.randint(-1, 2, (count, 2), generator=generator)
    boxes = torch.rand(count, 4, generator=generator) * SIZE
    mask = torch.randn(count, 1, SIZE // 4, SIZE // 4, generator=generator) if masks else None
    return make_prompts(index, points, labels, boxes, mask)


def row(prompts: Prompts, i: int) -> Prompts:
    return Prompts(*(None if x is None else x[i : i + 1] for x in prompts))  # type: ignore[arg-type]


def plain(sam: Sam, embedding: torch.Tensor, prompts: Prompts) -> list[torch.Tensor]:
    """Masks, IoU, tokens and streams of all prompts, one after the other."""
    answers = []
    for i in range(len(prompts.image_index)):
        p = row(prompts, i)
        image = embedding[p.image_index]
        masks, iou, tokens, streams = decode_one(
            dict(sam.state_dict(keep_vars=True)),
            image,
            p.point_coords,
            p.point_labels,
            mask=p.mask_input,
            image_size=SIZE,
        )
        answers.append([masks, iou, tokens, *streams])
    return [torch.cat(parts) for parts in zip(*answers, strict=True)]


def everything(output: MaskOutput) -> list[torch.Tensor]:
    return [output.low_res_logits, output.iou_predictions, output.mask_tokens, *output.taps.values()]


TAPS = tuple(f"prompted.{k}" for k in range(4))


@pytest.mark.parametrize(("masks", "gradients"), list(itertools.product([False, True], [False, True])))
@pytest.mark.parametrize("images", [1, 3])
def test_decode_is_the_plain_way(sam: Sam, images: int, masks: bool, gradients: bool) -> None:
    image, prompts = features(images), some_prompts(images=images, masks=masks)
    with torch.set_grad_enabled(gradients):
        output = sam.decode(image, prompts, taps=TAPS)
    with torch.no_grad():
        expected = plain(sam, image.embedding, prompts)
    for ours, theirs in zip(everything(output), expected, strict=True):
        close(ours, theirs, 5e-6)


@pytest.mark.parametrize("mode", MODES)
def test_masks_asked_for_are_those_of_the_four(sam: Sam, mode: bool | None) -> None:
    image, prompts = features(), some_prompts()
    with torch.no_grad():
        all_four, some = sam.decode(image, prompts), sam.decode(image, prompts, mode)
    torch.testing.assert_close(some.low_res_logits, all_four.low_res_logits[:, MODES[mode]], rtol=1e-5, atol=1e-5)
    assert torch.equal(some.iou_predictions, all_four.iou_predictions[:, MODES[mode]])
    assert torch.equal(some.mask_tokens, all_four.mask_tokens)


@pytest.mark.parametrize("masks", [False, True])
def test_gradients_are_those_of_the_plain_way(masks: bool) -> None:
    sam = small_sam(image_size=SIZE, decoder_depth=2).double()
    prompts = some_prompts(5, images=2, masks=masks)
    prompts = prompts._replace(mask_input=None if prompts.mask_input is None else prompts.mask_input.double())
    prompts = prompts._replace(point_coords=prompts.point_coords.double())
    parts = [*sam.prompt_encoder.named_parameters(), *sam.mask_decoder.named_parameters()]

    def gradients(way: str) -> dict[str, torch.Tensor]:
        sam.zero_grad()
        embedding = features(2).embedding.double().requires_grad_()
        if way == "ours":
            answer = everything(sam.decode(ImageFeatures(embedding, {}), prompts, taps=TAPS[:3]))
        else:
            answer = plain(sam, embedding, prompts)
        torch.autograd.backward(torch.stack([((i + 1) * x).square().mean() for i, x in enumerate(answer)]).sum())
        assert embedding.grad is not None
        return {"embedding": embedding.grad} | {n: p.grad.clone() for n, p in parts if p.grad is not None}

    ours, theirs = gradients("ours"), gradients("plain")
    assert set(theirs) <= set(ours)
    assert len(ours) > 100
    for name, grad in theirs.items():
        if grad.abs().max() > 1e-12:  # positions are computed in float32, here as in training
            close(ours[name], grad, 1e-5)


def test_images_in_one_batch_are_decoded_as_alone(sam: Sam) -> None:
    image, prompts = features(), some_prompts(12)
    with torch.no_grad():
        together = sam.decode(image, prompts)
        for i in range(3):
            mine = prompts.image_index == i
            alone = sam.decode(
                ImageFeatures(image.embedding[i : i + 1], {}),
                make_prompts(
                    torch.zeros(int(mine.sum()), dtype=torch.long),
                    prompts.point_coords[mine, :2],
                    prompts.point_labels[mine, :2],
                    prompts.point_coords[mine, 2:].flatten(1),
                ),
            )
            close(together.low_res_logits[mine], alone.low_res_logits, 2e-6)


def test_order_of_prompts_is_kept(sam: Sam) -> None:
    image, prompts = features(), some_prompts(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = Prompts(*(None if x is None else x[order] for x in prompts))  # type: ignore[arg-type]
    with torch.no_grad():
        close(sam.decode(image, shuffled).low_res_logits, sam.decode(image, prompts).low_res_logits[order], 2e-6)


@pytest.mark.parametrize("gradients", [False, True])
def test_an_absent_token_is_no_token(sam: Sam, gradients: bool) -> None:
    """Prompts with holes of any content answer as prompts of their own length, wherever the holes are."""
    image, prompts = features(), some_prompts(6)
    generator = torch.Generator().manual_seed(3)
    absent = torch.rand(6, 4, generator=generator) < 0.4
    absent[0], absent[1] = False, torch.tensor([True, True, True, False])
    with torch.set_grad_enabled(gradients):
        together = sam.decode(image, prompts._replace(absent=absent), taps=["prompted.2"])
        for i in range(6):
            kept = ~absent[i]
            alone = sam.decode(
                image,
                Prompts(
                    prompts.image_index[i : i + 1],
                    prompts.point_coords[i : i + 1, kept],
                    prompts.point_labels[i : i + 1, kept],
                ),
                taps=["prompted.2"],
            )
            for ours, theirs in zip(everything(together), everything(alone), strict=True):
                close(ours[i : i + 1], theirs, 2e-6)
    wild = prompts._replace(point_coords=torch.where(absent[..., None], 1e4, prompts.point_coords), absent=absent)
    with torch.no_grad():
        assert torch.equal(
            sam.decode(image, wild).low_res_logits, sam.decode(image, prompts._replace(absent=absent)).low_res_logits
        )


def test_prompt_embedding_and_mask_tokens_are_two_things(sam: Sam) -> None:
    """The image stream that the prompt enters, and the tokens that leave: other shapes, other sources."""
    image, prompts = features(), some_prompts(5)
    output = sam.decode(image, prompts, taps=["prompted.0", "prompted.1"])
    entering = output.taps["prompted.0"]
    assert entering.shape == (5, 256, SIZE // 16, SIZE // 16)
    assert output.mask_tokens.shape == (5, 4, 256)
    no_mask = sam.prompt_encoder.no_mask_embed.weight.view(1, 256, 1, 1)
    assert torch.equal(entering, image.embedding[prompts.image_index] + no_mask)
    torch.autograd.backward(entering.sum())
    assert sam.mask_decoder.mask_tokens.weight.grad is None
    assert not torch.equal(output.taps["prompted.1"], entering)


def test_no_tokens_and_no_prompts(sam: Sam) -> None:
    with torch.no_grad():
        nothing = sam.decode(features(), make_prompts(torch.tensor([2, 0])))
        expected = plain(sam, features().embedding, make_prompts(torch.tensor([2, 0])))
        close(nothing.low_res_logits, expected[0], 5e-6)
        empty = sam.decode(
            features(), make_prompts(torch.zeros(0, dtype=torch.long), torch.zeros(0, 1, 2), torch.zeros(0, 1))
        )
    assert empty.low_res_logits.shape == (0, 4, SIZE // 4, SIZE // 4)
    assert empty.mask_tokens.shape == (0, 4, 256)


def test_labels_mean_what_upstream_means(sam: Sam) -> None:
    """Four kinds of points differ by a learnt embedding; padding has no position."""
    coords = torch.tensor([[[10.0, 20.0], [30.0, 40.0]]])
    encoder = sam.prompt_encoder
    rows = {label: encoder.sparse_embeddings(coords, torch.full((1, 2), label))[0] for label in (-1, 0, 1, 2, 3)}
    assert torch.equal(rows[-1][0], rows[-1][1])
    assert torch.equal(rows[-1][0], encoder.not_a_point_embed.weight[0])
    for a, b in itertools.combinations((0, 1, 2, 3), 2):
        learnt = [encoder.point_embeddings[label].weight[0] for label in (a, b)]
        torch.testing.assert_close(rows[a] - rows[b], (learnt[0] - learnt[1]).expand(2, 256))


def test_autocast_moves_no_point(sam: Sam) -> None:
    """A position rounded to bfloat16 is another position: encodings stay exact under autocast."""
    coords = torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(0)) * SIZE
    labels = torch.ones(4, 3, dtype=torch.long)
    expected = sam.prompt_encoder.sparse_embeddings(coords, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sam.prompt_encoder.sparse_embeddings(coords, labels), expected)
        assert torch.equal(sam.prompt_encoder.get_dense_pe((6, 6)), sam.prompt_encoder.get_dense_pe((6, 6)).float())
        output = sam.decode(features(), some_prompts(2))
    assert torch.isfinite(output.low_res_logits).all()


def test_iou_is_a_raw_regression(sam: Sam) -> None:
    """SAM-1's head has no sigmoid: its values leave 0..1."""
    iou = sam.decode(features(), some_prompts()).iou_predictions
    assert iou.max() > 1 or iou.min() < 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"image_index": torch.tensor([0, 3])}, r"image_index must lie in 0\.\.2"),
        ({"image_index": torch.tensor([0, -1])}, r"0\.\.2"),
        ({"point_labels": torch.full((2, 4), 4)}, "box corners"),
        ({"point_labels": torch.full((2, 3), 1)}, "do not fit"),
        ({"mask_input": torch.zeros(2, 1, 6, 6)}, r"\(2, 1, 24, 24\)"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(sam: Sam, change: dict[str, torch.Tensor], told: str) -> None:
    with pytest.raises(SamletError, match=told):
        sam.decode(features(), some_prompts(2)._replace(**change))


@pytest.mark.parametrize("name", ["prompted", "prompted.4", "prompted.-1", "mask_tokens", "blocks.0"])
def test_an_unknown_tap_lists_those_that_exist(sam: Sam, name: str) -> None:
    with pytest.raises(SamletError, match=r"prompted\.0, prompted\.1, prompted\.2, prompted\.3"):
        sam.decode(features(), some_prompts(2), taps=[name])


def test_make_prompts_orders_tokens_as_upstream() -> None:
    index = torch.zeros(2, dtype=torch.long)
    points, labels = torch.rand(2, 1, 2), torch.ones(2, 1, dtype=torch.long)
    boxes = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).expand(2, 4)
    assert make_prompts(index, points, labels).point_labels.tolist() == [[1, -1]] * 2
    assert make_prompts(index, boxes=boxes).point_labels.tolist() == [[2, 3]] * 2
    both = make_prompts(index, points, labels, boxes)
    assert both.point_labels.tolist() == [[1, 2, 3]] * 2
    assert both.point_coords[0, 1:].tolist() == [[1, 2], [3, 4]]
    assert make_prompts(index).point_labels.shape == (2, 0)
    with pytest.raises(SamletError, match="both or neither"):
        make_prompts(index, points)
    with pytest.raises(SamletError, match="boxes: 1 rows for 2 prompts"):
        make_prompts(index, boxes=torch.zeros(1, 4))


def test_the_decoder_compiles_and_exports(sam: Sam) -> None:
    """One graph, no break: nothing in it depends on values."""
    image, prompts = features(2), some_prompts(3, images=2)
    explained = torch._dynamo.explain(sam.decode)(image, prompts, True)
    assert explained.graph_break_count == 0
