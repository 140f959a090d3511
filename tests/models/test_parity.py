"""The recorded answers of segment-anything and MobileSAM, for every prompt kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from samlet.frames import preprocess, to_input_coords
from samlet.models import Predictor, Sam, load_sam
from tests.models.reference import close

CASES = [(kind, image) for kind in ("vit", "tiny") for image in (0, 1)]
Recorded = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def models(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sam]:
    parity = shared / "parity"
    decoder = torch.load(parity / "decoder_shared.pt", weights_only=True)
    sams = {}
    for kind in ("vit", "tiny"):
        path = tmp_path_factory.mktemp("parity") / f"{kind}.pt"
        torch.save({**decoder, **torch.load(parity / f"{kind}_encoder.pt", weights_only=True)}, path)
        sams[kind] = load_sam(path, image_size=256 if kind == "tiny" else None)
    return sams


def recorded(shared: Path, kind: str, image: int) -> Recorded:
    with np.load(shared / "parity" / f"{kind}_img{image}.npz") as archive:
        return {name: archive[name] for name in archive.files}


def prompt_kinds(record: Recorded) -> list[str]:
    return sorted({name.split("/")[0] for name in record if "/" in name})


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}{case[1]}")
def case(request: pytest.FixtureRequest, shared: Path, models: dict[str, Sam]) -> tuple[Sam, Recorded, Predictor]:
    kind, image = request.param
    record = recorded(shared, kind, image)
    predictor = Predictor(models[kind])
    predictor.set_image(record["image"])
    return models[kind], record, predictor


def test_sizes_are_read_off_the_tensors(models: dict[str, Sam]) -> None:
    vit = {"kind": "vit_b", "image_size": 256, "embed_dim": 96, "depth": 4, "num_heads": 3, "window_size": 7}
    tiny = {"kind": "vit_t", "embed_dims": [16, 32, 64, 320], "depths": [1] * 4, "mlp_ratio": 1.0, "num_classes": 8}
    assert models["vit"].arch.items() >= {**vit, "global_attn_indexes": [1, 3], "mlp_ratio": 4.0}.items()
    assert models["tiny"].arch.items() >= tiny.items()
    assert models["tiny"].arch["num_heads"][1:] == [2, 4, 10]
    assert models["tiny"].arch["window_sizes"][1:] == [7, 14, 7]


def test_embedding(case: tuple[Sam, Recorded, Predictor]) -> None:
    _, record, predictor = case
    close(predictor.get_image_embedding()[0], torch.from_numpy(record["embedding"]), 1e-5)


def test_preprocessing(case: tuple[Sam, Recorded, Predictor]) -> None:
    sam, record, _ = case
    pixels, input_size = preprocess(record["image"], sam.image_size)
    assert input_size == record["resized"].shape[:2]
    found = [pixels.mean().item(), pixels.std().item(), pixels[0, 0, 0].item(), pixels[-1, -1, -1].item()]
    assert found[:2] + found[3:] == pytest.approx(record["input_stats"][[0, 1, 3]].tolist(), abs=1e-5)


def test_blocks(case: tuple[Sam, Recorded, Predictor]) -> None:
    sam, record, _ = case
    pixels, _ = preprocess(record["image"], sam.image_size)
    names = [name for name in sam.tap_names() if name.startswith("blocks.")]
    with torch.no_grad():
        features = sam.encode(pixels[None], taps=names)
    numbers = sorted(int(name[5:7]) for name in record if name.endswith("_shape") and name.startswith("block"))
    if sam.kind == "vit_t":  # the record counts the three merging layers, and TinyViT's depths are 1, 1, 1, 1
        numbers = numbers[::2]
    for name, number in zip(names, numbers, strict=True):
        shape = record[f"block{number:02d}_shape"].tolist()
        maps = features.taps[name]
        ours = (maps if shape[1:] == list(maps.shape[1:]) else maps.permute(0, 2, 3, 1)).reshape(-1)
        assert ours.numel() == np.prod(shape)
        probe = torch.from_numpy(record[f"block{number:02d}_probe"])
        stride = ours.numel() // probe.numel()
        close(ours[::stride][: probe.numel()], probe, 1e-5)
        stats = [ours.mean().item(), ours.std().item(), ours.abs().max().item()]
        assert stats == pytest.approx(record[f"block{number:02d}_stats"].tolist(), rel=1e-4, abs=1e-5)


def test_dense_positional_encoding(case: tuple[Sam, Recorded, Predictor]) -> None:
    sam, record, _ = case
    pe = sam.prompt_encoder.get_dense_pe((16, 16)).flatten()
    probe = torch.from_numpy(record["dense_pe_probe"])
    close(pe[::97][: probe.numel()], probe, 1e-5)  # the record took every 97th value


@pytest.mark.parametrize("multimask", [False, True], ids=["single", "multi"])
def test_every_prompt_kind(case: tuple[Sam, Recorded, Predictor], multimask: bool) -> None:
    _, record, predictor = case
    assert predictor.original_size is not None
    assert predictor.input_size is not None
    for kind in prompt_kinds(record):
        given = {
            n: torch.from_numpy(record[f"{kind}/{n}"])
            for n in ("points", "labels", "boxes", "mask")
            if f"{kind}/{n}" in record
        }
        for name in {"points", "boxes"} & set(given):
            coords = given[name].reshape(len(given[name]), -1, 2)
            given[name] = to_input_coords(coords, predictor.original_size, predictor.input_size)
        boxes = given["boxes"].flatten(1) if "boxes" in given else None
        masks, iou, low_res = predictor.predict_torch(
            given.get("points"), given.get("labels"), boxes, given.get("mask"), multimask
        )
        answer = f"{kind}/{'multi' if multimask else 'single'}"
        every_second = f"{answer}/low_res_logits_s2" in record
        logits = record[f"{answer}/low_res_logits" + ("_s2" if every_second else "")]
        close(low_res[..., ::2, ::2] if every_second else low_res, torch.from_numpy(logits), 2e-5)
        close(iou, torch.from_numpy(record[f"{answer}/iou_predictions"]), 1e-4)  # a sum that nearly cancels
        shape = record[f"{answer}/masks_shape"].tolist()
        expected = np.unpackbits(record[f"{answer}/masks_packed"], count=np.prod(shape)).reshape(shape).astype(bool)
        assert (masks.numpy() != expected).mean() <= 1e-4


def test_sparse_embeddings(case: tuple[Sam, Recorded, Predictor]) -> None:
    sam, record, predictor = case
    assert predictor.original_size is not None
    assert predictor.input_size is not None
    for kind in prompt_kinds(record):
        if f"{kind}/points" not in record or f"{kind}/boxes" in record:
            continue
        points = torch.from_numpy(record[f"{kind}/points"])
        points = to_input_coords(points, predictor.original_size, predictor.input_size)
        labels = torch.from_numpy(record[f"{kind}/labels"])
        padding = torch.full((len(points), 1), -1)
        sparse = sam.prompt_encoder.sparse_embeddings(
            torch.cat([points, torch.zeros(len(points), 1, 2)], 1), torch.cat([labels, padding], 1)
        )
        close(sparse, torch.from_numpy(record[f"{kind}/sparse"]), 2e-5)


def test_predict_in_numpy_equals_the_record(case: tuple[Sam, Recorded, Predictor]) -> None:
    _, record, predictor = case
    masks, iou, low_res = predictor.predict(
        record["mask_point/points"][0], record["mask_point/labels"][0], mask_input=record["mask_point/mask"][0]
    )
    shape = record["mask_point/multi/masks_shape"].tolist()
    expected = np.unpackbits(record["mask_point/multi/masks_packed"], count=np.prod(shape)).reshape(shape)
    assert masks.dtype == bool
    assert (masks != expected[0].astype(bool)).mean() <= 1e-4
    assert iou.shape == (3,)
    assert low_res.shape == (3, 64, 64)
    boxed, _, _ = predictor.predict(box=record["box/boxes"][0], multimask_output=False)
    shape = record["box/single/masks_shape"].tolist()
    expected = np.unpackbits(record["box/single/masks_packed"], count=np.prod(shape)).reshape(shape)
    assert (boxed != expected[0].astype(bool)).mean() <= 1e-4
