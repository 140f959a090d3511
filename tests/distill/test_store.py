"""The store: round trips, three dtypes, two forms, names that lead elsewhere, and what a reader refuses."""

from __future__ import annotations

import json
import pickle  # noqa: TID251 - what loader workers are sent
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from samlet.distill.store import Shard, StoreReader, bytes_per_image, decoded, open_store, shard_of
from samlet.distill.store.arrays import encode
from samlet.errors import DataError, SamletError
from tests.distill.stores import FEATURES, add, contents, fill, identity, maps_of, write_decoder

IMAGES = ["a", "b", "deep/c", "shards/d", "ü ö"]

pytestmark = pytest.mark.usefixtures("unflushed")


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0.0), ("fp16", 2e-3), ("int8", 1e-2)])
def test_what_is_written_is_read(tmp_path: Path, dtype: str, tolerance: float, pack: bool) -> None:
    kind = identity(dtype=dtype, augmentation={"flip": 0.5}, variants=2)
    fill(tmp_path / "s", kind, IMAGES, pack=pack)
    reader = pickle.loads(pickle.dumps(StoreReader(tmp_path / "s", "train")))
    assert sorted(reader.entries) == sorted((name, variant) for name in IMAGES for variant in (0, 1))
    for image_id, variant in reader.entries:
        raw = reader.read(image_id, variant, FEATURES)
        assert raw["embedding"].dtype == {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.uint8}[dtype]
        for name, wanted in maps_of(image_id, variant).items():
            found = decoded(raw)[name]
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=0, atol=tolerance)
    assert set(reader.read("a", 0, ["embedding"])) <= {"embedding", "embedding_affine"}
    assert reader.entries["a", 1].variation == "variation 1"


def test_plain_numpy_reads_the_files(tmp_path: Path) -> None:
    fill(tmp_path, identity(dtype="fp16"), ["deep/c"])
    values = np.load(tmp_path / "train" / "deep" / "c_embedding.npy", allow_pickle=False)
    assert values.dtype == np.float16
    np.testing.assert_array_equal(values, maps_of("deep/c")["embedding"].astype(np.float16))
    fill(tmp_path / "v", identity(augmentation={}, variants=3), ["c"])
    assert np.load(tmp_path / "v" / "train" / "variant-002" / "c_blocks.1@neck.npy", allow_pickle=False).shape == (
        3,
        2,
        2,
    )


def test_int8_by_hand() -> None:
    values = np.array([[[0.0, 255.0], [100.4, 100.6]], [[-1.0, -1.0], [-1.0, -1.0]]], dtype=np.float32)
    arrays = encode("embedding", values, identity(dtype="int8"))
    assert arrays["embedding"].tolist() == [[[0, 255], [100, 101]], [[0, 0], [0, 0]]]
    assert arrays["embedding_affine"].tolist() == [[0.0, 1.0], [-1.0, 0.0]]
    raw = {name: torch.from_numpy(array) for name, array in arrays.items()}
    assert decoded(raw)["embedding"].tolist() == [[[0, 255], [100, 101]], [[-1, -1], [-1, -1]]]


def test_int8_is_off_by_half_a_step_at_most_with_and_without_a_batch() -> None:
    values = np.random.default_rng(0).normal(size=(5, 8, 8)).astype(np.float32) * 10
    raw = {name: torch.from_numpy(array) for name, array in encode("embedding", values, identity(dtype="int8")).items()}
    step = (values.max((1, 2)) - values.min((1, 2))) / 255
    found = decoded(raw)["embedding"]
    assert (np.abs(found.numpy() - values).max((1, 2)) <= step * 0.501).all()
    batch = decoded({name: torch.stack([value, value]) for name, value in raw.items()})
    assert torch.equal(batch["embedding"], torch.stack([found, found]))


def test_answers_of_the_decoder_keep_their_prompts_and_tokens_stay_fp16(tmp_path: Path) -> None:
    answers = {"embedding": np.zeros((3, 2, 2)), "blocks.1@neck": np.ones((3, 2, 2))}
    answers |= {
        "dense_mask_logits": np.random.default_rng(1).normal(size=(2, 3, 4, 4)),
        "mask_tokens": np.ones((2, 4, 8)),
    }
    kind = open_store(tmp_path, identity(dtype="int8", outputs={"prompts": "box"}, shards=1), write_decoder)
    shard = Shard(tmp_path, "train", 0, kind)
    shard.add("a", 0, "", "", answers)
    shard.add(
        "empty", 0, "", "", {name: value[:0] if value.shape[0] == 2 else value for name, value in answers.items()}
    )
    for pack in (False, True):
        shard.finish(pack=pack)
        reader = StoreReader(tmp_path, "train")
        raw = reader.read("a", 0, ["dense_mask_logits", "mask_tokens"])
        assert raw["dense_mask_logits_affine"].shape == (2, 3, 2)
        assert raw["mask_tokens"].dtype == torch.float16
        torch.testing.assert_close(
            decoded(raw)["dense_mask_logits"].numpy(), answers["dense_mask_logits"].astype("f"), atol=0.02, rtol=0
        )
        assert decoded(reader.read("empty", 0, ["dense_mask_logits"]))["dense_mask_logits"].shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("dtype", "value", "said"), [("fp32", np.nan, "not finite"), ("fp16", 1e5, "store it as fp32")]
)
def test_values_that_cannot_be_stored(tmp_path: Path, dtype: str, value: float, said: str) -> None:
    kind = open_store(tmp_path, identity(dtype=dtype, shards=1), write_decoder)
    with pytest.raises(DataError, match=rf"^a \(variant 0\): embedding: .*{said}"):
        Shard(tmp_path, "train", 0, kind).add("a", 0, "", "", {"embedding": np.full((1, 2, 2), value)})
    assert not (tmp_path / "train" / "a_embedding.npy").exists()


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a//b", "a\0b", "./a"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    kind = open_store(tmp_path / "s", identity(shards=1), write_decoder)
    with pytest.raises(DataError, match="leads out of the store"):
        add(Shard(tmp_path / "s", "train", 0, kind), name)
    with pytest.raises(DataError, match="leads out of the store"):
        Shard(tmp_path / "s", name, 0, kind)
    assert {place.name for place in tmp_path.iterdir()} == {"s"}


def test_bytes_are_known_beforehand(tmp_path: Path) -> None:
    for dtype in ("fp32", "fp16", "int8"):
        kind = identity(dtype=dtype)
        fill(tmp_path / dtype, kind, ["a"])
        written = sum(place.stat().st_size for place in (tmp_path / dtype / "train").glob("*.npy"))
        assert bytes_per_image(kind, dict.fromkeys(FEATURES, (3, 2, 2))) == written


def test_shards_do_not_depend_on_other_images() -> None:
    kind = identity(shards=7)
    assert [shard_of(name, kind) for name in IMAGES] == [1, 4, 1, 6, 6]


def test_forms_may_be_mixed_and_changed(tmp_path: Path) -> None:
    kind = identity()
    fill(tmp_path / "plain", kind, IMAGES)
    fill(tmp_path / "s", kind, IMAGES[:3], pack=True)
    packed = contents(tmp_path / "s")
    assert not any(name.endswith(".npy") for name in packed)
    fill(tmp_path / "s", kind, IMAGES[:3], pack=True)
    assert contents(tmp_path / "s") == packed
    for number in range(2):  # new images as files beside the packs of the old
        shard = Shard(tmp_path / "s", "train", number, kind)
        assert shard.is_finished(pack=True)
        for name in IMAGES[3:]:
            if shard_of(name, kind) == number:
                add(shard, name)
    reader = StoreReader(tmp_path / "s", "train")
    for name in IMAGES:
        assert torch.equal(
            reader.read(name, 0, ["embedding"])["embedding"], torch.from_numpy(maps_of(name)["embedding"])
        )
    fill(tmp_path / "s", kind, IMAGES)
    assert contents(tmp_path / "s") == contents(tmp_path / "plain")


@pytest.mark.parametrize("pack", [False, True])
def test_an_edited_image_replaces_its_entry(tmp_path: Path, pack: bool) -> None:
    kind = identity(shards=1)
    fill(tmp_path, kind, ["a", "b"], pack=pack)
    shard = Shard(tmp_path, "train", 0, kind)
    shard.add("a", 0, "", "edited", maps_of("other"))
    for _ in range(2):
        reader = StoreReader(tmp_path, "train")
        assert reader.entries["a", 0].image_sha256 == "edited"
        found = reader.read("a", 0, ["embedding"])["embedding"]
        assert torch.equal(found, torch.from_numpy(maps_of("other")["embedding"]))
        shard.finish(pack=pack)
    assert sorted(reader.entries) == [("a", 0), ("b", 0)]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    fill(tmp_path, identity(), ["a"])
    reader = StoreReader(tmp_path, "train")
    with pytest.raises(DataError, match=r"no features of z \(variant 0\) in train"):
        reader.read("z", 0, ["embedding"])
    with pytest.raises(DataError, match=r"no blocks\.0 of a, only blocks\.1@neck, embedding"):
        reader.read("a", 0, ["blocks.0"])
    assert StoreReader(tmp_path, "val").entries == {}


@pytest.mark.parametrize("pack", [False, True])
def test_damage_is_never_read(tmp_path: Path, pack: bool) -> None:
    fill(tmp_path, identity(shards=1), ["a"], pack=pack)
    place = next((tmp_path / "train").rglob("*.safetensors" if pack else "a_embedding.npy"))
    whole = place.read_bytes()

    def read() -> Any:
        return StoreReader(tmp_path, "train").read("a", 0, FEATURES)

    read()
    for damaged in (
        whole[:-1],
        whole + b"\0",
        b"",
        whole[:-1] + bytes([whole[-1] ^ 1]),
        bytes([whole[0] ^ 1]) + whole[1:],
    ):
        place.write_bytes(damaged)
        with pytest.raises(
            DataError, match=rf"{place.name}.*samlet store verify {tmp_path}.*--repair.*extracting again"
        ):
            read()
    place.unlink()
    with pytest.raises(DataError, match=rf"{place.name}: missing.*samlet store verify"):
        read()


def test_an_entry_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    """Even in a manifest that was sealed anew."""
    from samlet.distill.store.sealing import read_sealed, write_sealed

    fill(tmp_path / "s", identity(shards=1), ["a"])
    np.save(tmp_path / "secret_embedding.npy", maps_of("a")["embedding"])
    manifest = tmp_path / "s" / "train" / "shards" / "00000.json"
    value = read_sealed(manifest)
    value["entries"][0]["image_id"] = "../../secret"
    write_sealed(manifest, value)
    reader = StoreReader(tmp_path / "s", "train")
    with pytest.raises(DataError, match="leads out of the store"):
        reader.read("../../secret", 0, ["embedding"])


def test_shards_of_another_store_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "one", identity(), ["a"])
    fill(tmp_path / "two", identity(teacher="other"), ["a"])
    for place in (tmp_path / "one" / "train" / "shards").iterdir():
        place.rename(tmp_path / "two" / "train" / "shards" / place.name)
    with pytest.raises(DataError, match=r"0000\d\.json: does not describe a shard of this store"):
        StoreReader(tmp_path / "two", "train")


def test_books_are_one_json_a_file(tmp_path: Path) -> None:
    fill(tmp_path, identity(shards=1), ["b", "a"])
    manifest = json.loads((tmp_path / "train" / "shards" / "00000.json").read_text())
    assert [entry["image_id"] for entry in manifest["entries"]] == ["a", "b"]
    assert manifest["entries"][0]["arrays"]["embedding"]["shape"] == [3, 2, 2]
    with pytest.raises(SamletError, match="holds no teacher features"):
        StoreReader(tmp_path / "nowhere", "train")
