"""Stale features cannot be used: every field of a store's identity, mutated alone, is refused by name (P5)."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from samlet.distill.store import decoder_file, open_store, read_identity, refuse_stale
from samlet.distill.store.identity import Identity
from samlet.errors import DataError, SamletError
from tests.distill.stores import contents, fill, identity, write_decoder

AUGMENTED: dict[str, Any] = {"augmentation": {"seed": 0, "scale": [0.8, 1.2]}, "variants": 4, "outputs": {"seed": 0}}
OTHERS: dict[str, Any] = {
    "teacher": "SAM-H", "teacher_kind": "vit_h", "teacher_sha256": "ef" * 32, "teacher_image_size": 128,
    "image_size": 128, "precision": "bf16", "taps": ("blocks.0@neck",), "dtype": "fp16", "preprocessing": "01" * 32,
    "augmentation": {"seed": 1, "scale": [0.8, 1.2]}, "variants": 8, "outputs": {"seed": 1},
}  # fmt: skip
FREE: dict[str, Any] = {"shards": 5, "samlet": "9.9.9"}

pytestmark = pytest.mark.usefixtures("unflushed")


def test_every_field_is_either_compared_or_free() -> None:
    assert {*OTHERS, *FREE} == set(Identity.model_fields)


@pytest.mark.parametrize("field", OTHERS)
def test_each_field_alone_is_refused_by_name(tmp_path: Path, field: str) -> None:
    kind = identity(**AUGMENTED)
    open_store(tmp_path, kind, write_decoder)
    other = kind.model_copy(update={field: OTHERS[field]})
    named = rf"{field}(\.seed)? is .* there, .* is wanted"
    with pytest.raises(SamletError, match=rf"{tmp_path}: .*{named}; .*`samlet extract my.yaml`"):
        refuse_stale(tmp_path, other, "samlet extract my.yaml")
    with pytest.raises(SamletError, match=rf"{tmp_path}: .*{named}; give another folder"):
        open_store(tmp_path, other, write_decoder)


@pytest.mark.parametrize("field", FREE)
def test_shards_and_version_do_not_count(tmp_path: Path, field: str) -> None:
    kind = identity(**AUGMENTED)
    open_store(tmp_path, kind, write_decoder)
    other = kind.model_copy(update={field: FREE[field]})
    assert refuse_stale(tmp_path, other, "") == open_store(tmp_path, other, write_decoder) == kind


def test_more_than_wanted_is_welcome(tmp_path: Path) -> None:
    stored = identity(**{**AUGMENTED, "taps": ("blocks.1@neck", "blocks.0")})
    open_store(tmp_path, stored, write_decoder)
    fewer: list[dict[str, Any]] = [{"taps": ()}, {"taps": ("blocks.0",)}, {"variants": 2}, {"outputs": None}]
    for less in [*fewer, {"outputs": {}}]:
        assert refuse_stale(tmp_path, stored.model_copy(update=less), "") == stored
    wider: list[dict[str, Any]] = [{"taps": ("blocks.2",)}, {"variants": 5}, {"outputs": {"seed": 0, "kind": "box"}}]
    for more in wider:
        with pytest.raises(SamletError, match=next(iter(more))):
            refuse_stale(tmp_path, stored.model_copy(update=more), "")


def test_hashes_are_shortened(tmp_path: Path) -> None:
    open_store(tmp_path, identity(), write_decoder)
    with pytest.raises(SamletError, match=r"teacher_sha256 is 'abababababab' there, 'efefefefefef' is wanted"):
        refuse_stale(tmp_path, identity(teacher_sha256="ef" * 32), "")


def test_no_store_is_not_a_stale_one(tmp_path: Path) -> None:
    with pytest.raises(SamletError, match=r"holds no teacher features yet.*`samlet extract` computes them"):
        refuse_stale(tmp_path, identity(), "samlet extract")
    with pytest.raises(SamletError, match="holds no teacher features"):
        read_identity(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(SamletError, match="cannot hold a store"):
        open_store(tmp_path / "file", identity(), write_decoder)


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    open_store(tmp_path, identity(), write_decoder)
    place = tmp_path / "manifest.json"
    whole = place.read_bytes()
    for position in range(0, len(whole), 5):
        place.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(DataError, match=r"manifest\.json: damaged"):
            read_identity(tmp_path)


def test_a_lost_decoder_is_written_again_and_never_another(tmp_path: Path) -> None:
    kind = open_store(tmp_path, identity(), write_decoder)
    whole = decoder_file(tmp_path).read_bytes()
    (tmp_path / "decoder.safetensors").write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"decoder\.safetensors: missing or damaged; run the extraction again"):
        decoder_file(tmp_path)
    with pytest.raises(DataError, match=r"is not what manifest\.json vouches for"):
        open_store(tmp_path, kind, lambda place: place.write_bytes(b"another"))
    open_store(tmp_path, kind, write_decoder)
    assert decoder_file(tmp_path).read_bytes() == whole
    assert decoder_file(tmp_path).stat().st_mode == (tmp_path / "manifest.json").stat().st_mode


def test_features_without_a_manifest_are_not_adopted(tmp_path: Path) -> None:
    fill(tmp_path, identity(), ["a"])
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest\.json: missing, though there are features"):
        open_store(tmp_path, identity(teacher="other"), write_decoder)


def test_a_decoder_that_a_killed_start_left_is_not_adopted(tmp_path: Path) -> None:
    (tmp_path / "decoder.safetensors").write_bytes(b"of another teacher")
    (tmp_path / ".manifest.json.1.2.tmp").write_bytes(b"{")
    open_store(tmp_path, identity(), write_decoder)
    assert decoder_file(tmp_path).stat().st_size > 40
    assert sorted(contents(tmp_path)) == ["decoder.safetensors", "manifest.json"]


def _open(root: Path, number: int, answers: Any) -> None:
    try:
        answers.put(open_store(root, identity(teacher=f"teacher {number % 2}"), write_decoder).teacher)
    except SamletError:
        answers.put("refused")


def test_many_processes_begin_one_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    workers = [context.Process(target=_open, args=(tmp_path / "s", number, answers)) for number in range(6)]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(found) == sorted([read_identity(tmp_path / "s").teacher] * 3 + ["refused"] * 3)
