"""Of what a store's features are: written once when it begins, compared whenever it is used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from filelock import FileLock
from pydantic import Field, ValidationError

from samlet.artefacts import remove_leftovers, sha256_of, write_file
from samlet.data.streams import name_index
from samlet.distill.store.sealing import read_sealed, write_sealed
from samlet.errors import DataError, SamletError
from samlet.schema import StrictModel

FORMAT = 1
MANIFEST, DECODER, LOCK = "manifest.json", "decoder.safetensors", ".lock"
_FREE = frozenset({"shards", "samlet"})  # what two stores of the same features may differ in
_HASH = re.compile(r"[0-9a-f]{32,}")

Count = Annotated[int, Field(ge=1)]


class Identity(StrictModel):
    """Everything that the features of a store depend on, the images apart."""

    teacher: str
    """The teacher's name."""
    teacher_kind: str
    """Its image encoder: vit_h, vit_l, vit_b, vit_t."""
    teacher_sha256: str
    """Digest of its weights."""
    teacher_image_size: Count
    """Side of its input frame."""
    image_size: Count
    """Side of the student's input frame, from which the teacher's pixels are made."""
    precision: Literal["fp32", "bf16", "fp16"]
    """The teacher's arithmetic."""
    taps: tuple[str, ...]
    """Encoder taps besides the embedding."""
    dtype: Literal["fp32", "fp16", "int8"]
    """How features are stored."""
    preprocessing: str
    """Fingerprint of the preprocessing."""
    augmentation: dict[str, Any] | None
    """With variants: everything that the pixels depend on, the seed included. None: images as they are."""
    variants: Count
    """Variants of each image."""
    outputs: dict[str, Any] | None
    """What the decoder's stored answers depend on. None: none are stored."""
    shards: Count
    """Parts of each split; fixed when the store begins."""
    samlet: str
    """The version that began the store; never compared."""


class Store(NamedTuple):
    """What manifest.json says."""

    identity: Identity
    decoder: dict[str, Any]  # sha256 and bytes
    digest: str  # of manifest.json; every shard names it


def shard_of(image_id: str, identity: Identity) -> int:
    """The shard of an image: a function of its name, so that added images move nobody."""
    return name_index(image_id) % identity.shards


def open_store(root: Path, identity: Identity, write_decoder: Callable[[Path], object]) -> Identity:
    """Begin a store, or check that the one that is there is of this identity, but for shards and samlet.

    `write_decoder` fills decoder.safetensors where it is missing or damaged. Any number of processes may ask at once.

    Raises:
        SamletError: the store is of something else (the first differing field is named), damaged, or not ours to write.
    """
    with _locked(root):
        if not (root / MANIFEST).exists():
            _begin(root, identity, write_decoder)
        store = read_store(root)
        if found := next(differences(plain(store.identity), plain(identity), _FREE), None):
            remedy = f"give another folder, or remove {root} if nobody needs it"
            raise SamletError(f"{root}: is a store of other features: {described(*found)}; {remedy}")
        if not _is_intact(root, store):
            write_file(root / DECODER, write_decoder)
            _share(root)
        if not _is_intact(root, store):
            raise DataError(f"{root / DECODER}: is not what {MANIFEST} vouches for, and this teacher's is not either")
    return store.identity


def read_store(root: Path) -> Store:
    """What manifest.json says.

    Raises:
        SamletError: there is no store.
        DataError: it is damaged, or of a newer samlet.
    """
    place = root / MANIFEST
    if not place.exists():
        raise SamletError(f"{root}: holds no teacher features ({MANIFEST} is missing); `samlet extract` makes a store")
    try:
        content = read_sealed(place)
    except DataError as error:
        raise DataError(f"{error}; put it back from a copy, or remove {root} and extract again") from error
    if content.get("format", 0) != FORMAT:
        raise DataError(f"{place}: has format {content.get('format')}, this samlet reads {FORMAT}; upgrade samlet")
    try:
        identity = Identity.model_validate_json(json.dumps(content["identity"]))
        return Store(identity, dict(content["decoder"]), str(content["sha256"]))
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{place}: does not describe a store ({' '.join(str(error).split())[:200]})") from error


def read_identity(root: Path) -> Identity:
    """Of what a store's features are.

    Raises:
        SamletError: no store is there, or it is damaged.
    """
    return read_store(root).identity


def decoder_file(root: Path) -> Path:
    """The teacher's prompt encoder and mask decoder, after a look at every byte.

    Raises:
        SamletError: no store is there.
        DataError: the file is missing or damaged.
    """
    if not _is_intact(root, read_store(root)):
        raise DataError(f"{root / DECODER}: missing or damaged; run the extraction again, which writes it anew")
    return root / DECODER


def refuse_stale(root: Path, wanted: Identity, command: str) -> Identity:
    """The store's identity, if training that needs `wanted` may use it.

    Stored taps, variants and keys of `outputs` may be more than wanted; shards and samlet do not count.

    Raises:
        SamletError: it may not; the first differing field is named, and `command` as what computes the features.
    """
    if not (root / MANIFEST).exists():
        raise SamletError(f"{root}: holds no teacher features yet ({MANIFEST} is missing); `{command}` computes them")
    stored = read_identity(root)
    old, new = plain(stored), plain(wanted)
    if set(wanted.taps) <= set(stored.taps):
        new["taps"] = old["taps"]
    if wanted.variants <= stored.variants:
        new["variants"] = old["variants"]
    if wanted.outputs is None:
        new["outputs"] = old["outputs"]
    elif stored.outputs is not None:
        new["outputs"] = {**old["outputs"], **new["outputs"]}
    if found := next(differences(old, new, _FREE), None):
        raise SamletError(
            f"{root}: its features are stale: {described(*found)}; "
            f"move or remove the store, or name another, then `{command}` computes them"
        )
    return stored


def plain(identity: Identity) -> dict[str, Any]:
    """An identity as JSON sees it."""
    return identity.model_dump(mode="json")


def _begin(root: Path, identity: Identity, write_decoder: Callable[[Path], object]) -> None:
    if any(place.is_dir() for place in root.rglob("shards")):
        raise DataError(
            f"{root / MANIFEST}: missing, though there are features; put it back from a copy, or remove {root}"
        )
    remove_leftovers(root)
    for place in root.glob(".tmp*"):  # safetensors' own, of a killed start
        place.unlink(missing_ok=True)
    write_file(root / DECODER, write_decoder)
    facts = {"sha256": sha256_of(root / DECODER), "bytes": (root / DECODER).stat().st_size}
    write_sealed(root / MANIFEST, {"format": FORMAT, "identity": plain(identity), "decoder": facts}, indent=2)
    _share(root)


def _share(root: Path) -> None:
    """Let the same people read the decoder: safetensors lets nobody else, whatever the user's umask says."""
    (root / DECODER).chmod((root / MANIFEST).stat().st_mode)


def _is_intact(root: Path, store: Store) -> bool:
    place = root / DECODER
    try:
        return {"sha256": sha256_of(place), "bytes": place.stat().st_size} == store.decoder
    except OSError:
        return False


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / LOCK)
        lock.acquire()
    except OSError as error:
        reason = error.strerror or error
        raise SamletError(f"{root}: cannot hold a store ({reason}); choose another folder") from error
    try:
        yield
    finally:
        lock.release()


def differences(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], skipped: frozenset[str] = frozenset(), above: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Field, stored and wanted value, in the order of the fields; within blocks the key that differs."""
    for key in [*stored, *(key for key in wanted if key not in stored)]:
        old, new = stored.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, frozenset(), f"{above}{key}.")
        elif key not in skipped and (old != new or (key in stored) != (key in wanted)):
            yield f"{above}{key}", old, new


def described(field: str, stored: Any, wanted: Any) -> str:
    """A difference as people read it, digests cut short."""
    return f"{field} is {_short(stored)} there, {_short(wanted)} is wanted"


def _short(value: Any) -> str:
    return _HASH.sub(lambda match: match[0][:12], repr(value))
