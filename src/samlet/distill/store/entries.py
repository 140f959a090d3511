"""What a store says it holds: a journal while a shard is written, a manifest once it is finished.

<split>/shards/00003.jsonl          one committed image-variant a line; there while a writer is at work
<split>/shards/00003.json           the finished shard
<split>/packs/00003.safetensors     its arrays, where the manifest says so; else <split>/<image>_<feature>.npy
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from samlet.distill.store.arrays import DTYPES, ArrayFacts
from samlet.distill.store.identity import Identity
from samlet.distill.store.sealing import read_sealed, sealed, unsealed, write_sealed
from samlet.errors import DataError

Key = tuple[str, int]  # image_id, variant

_SHARD_FILE = re.compile(r"(\d{5,})\.jsonl?")


class Entry(NamedTuple):
    """One variant of one image: what it was made of, and what its arrays must be found to be."""

    image_id: str
    variant: int
    variation: str
    """Digest of the geometry and colour that its pixels were made with."""
    image_sha256: str
    """Of the image file's bytes."""
    arrays: dict[str, ArrayFacts]


class ShardFiles:
    """Where one shard of a split keeps its books and its pack."""

    def __init__(self, root: Path, split: str, number: int) -> None:
        self.split = root / inside(split)
        self.manifest = self.split / "shards" / f"{number:05d}.json"
        self.journal = self.split / "shards" / f"{number:05d}.jsonl"
        self.pack = self.split / "packs" / f"{number:05d}.safetensors"


class Contents(NamedTuple):
    """What the books of a shard say."""

    entries: dict[Key, Entry]
    """All that is committed; the journal's word counts more than an older manifest's."""
    packed: set[Key]
    """Those whose arrays are in the pack."""
    pack: dict[str, Any] | None
    """sha256 and size of the pack, where the manifest names one."""
    finished: bool
    """There is a manifest and no journal."""
    damaged: list[str]
    """What is wrong with lines of the journal; their images count as not computed."""


def inside(name: str) -> str:
    """`name`, if it is a plain relative path: what it names lies below the folder that it is looked up in.

    Raises:
        DataError: it is not.
    """
    path = PurePosixPath(name)
    if not name or "\0" in name or path.is_absolute() or ".." in path.parts or path.as_posix() != name:
        raise DataError(f"{name!r}: leads out of the store, or is not a plain name; rename the image")
    return name


def array_key(image_id: str, variant: int, name: str, identity: Identity) -> str:
    """What an array is called in a pack; with .npy, where it lies below the split's folder.

    Raises:
        DataError: the name leads out of the folder.
    """
    folder = f"variant-{variant:03d}/" if identity.augmentation is not None else ""
    return folder + inside(f"{image_id}_{name}")


@contextmanager
def remedy(root: Path) -> Iterator[None]:
    """Say what to do about damage of a store.

    Raises:
        DataError: one was raised inside.
    """
    try:
        yield
    except DataError as error:
        raise DataError(
            f"{error}; `samlet store verify {root}` lists all damage, and --repair drops what is damaged, so that "
            "extracting again computes it"
        ) from error


def splits_of(root: Path) -> list[str]:
    """The splits that a store has."""
    folders = (place for place in root.rglob("shards") if place.is_dir())
    return sorted(place.parent.relative_to(root).as_posix() for place in folders if _shard_numbers(place))


def shard_numbers(root: Path, split: str) -> list[int]:
    """The shards of a split that were begun."""
    return _shard_numbers(ShardFiles(root, split, 0).manifest.parent)


def _shard_numbers(folder: Path) -> list[int]:
    names = folder.iterdir() if folder.is_dir() else ()
    return sorted({int(match[1]) for place in names if (match := _SHARD_FILE.fullmatch(place.name))})


def read_shard(files: ShardFiles, store: str) -> Contents:
    """The books of a shard; a torn or damaged line of the journal does not count.

    Args:
        files: its places.
        store: digest of the store's manifest.json.

    Raises:
        DataError: the manifest is damaged, or of another store.
    """
    entries, pack = _read_manifest(files, store) if files.manifest.exists() else ({}, None)
    packed = set(entries) if pack is not None else set[Key]()
    damaged = list[str]()
    journal = read_journal(files.journal, store, damaged)
    for key, entry in (journal or {}).items():
        if entries.get(key) != entry:  # else the manifest was written after this line, and the pack holds it
            packed.discard(key)
        entries[key] = entry
    return Contents(entries, packed, pack, files.manifest.exists() and journal is None, damaged)


def write_manifest(files: ShardFiles, store: str, entries: Mapping[Key, Entry], pack: dict[str, Any] | None) -> None:
    """Finish a shard: from now on it holds exactly this.

    Raises:
        SamletError: it could not be written.
    """
    listing = [_to_json(entries[key]) for key in sorted(entries)]
    write_sealed(files.manifest, {"store": store, "pack": pack, "entries": listing})


def journal_line(entry: Entry, store: str) -> bytes:
    """One line of a journal."""
    return (sealed({"store": store, **_to_json(entry)}) + "\n").encode()


def read_journal(path: Path, store: str, damaged: list[str]) -> dict[Key, Entry] | None:
    """The entries of a journal, later lines over earlier ones; None where there is none.

    What is wrong with other lines is added to `damaged`.

    Raises:
        DataError: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    entries: dict[Key, Entry] = {}
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):  # what follows the last one was never committed
        try:
            value = unsealed(line.decode())
            if value["store"] != store:
                raise ValueError("it is of another store")
            entry = _from_json(value)
            entries[entry.image_id, entry.variant] = entry
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            damaged.append(f"{path}:{number}: damaged: {error}")
    return entries


def _read_manifest(files: ShardFiles, store: str) -> tuple[dict[Key, Entry], dict[str, Any] | None]:
    content = read_sealed(files.manifest)
    try:
        if content["store"] != store:
            raise ValueError("it belongs to another store")
        listing = [_from_json(value) for value in content["entries"]]
        return {(entry.image_id, entry.variant): entry for entry in listing}, content["pack"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{files.manifest}: does not describe a shard of this store ({error})") from error


def _to_json(entry: Entry) -> dict[str, Any]:
    arrays = {name: {**facts._asdict(), "shape": list(facts.shape)} for name, facts in entry.arrays.items()}
    return {**entry._asdict(), "arrays": arrays}


def _from_json(value: Mapping[str, Any]) -> Entry:
    arrays = {name: _facts(facts) for name, facts in value["arrays"].items()}
    texts = [value[name] for name in ("image_id", "variation", "image_sha256")]
    if not all(isinstance(text, str) for text in texts) or not isinstance(value["variant"], int):
        raise ValueError("an entry's fields are of the wrong type")
    return Entry(value["image_id"], value["variant"], value["variation"], value["image_sha256"], arrays)


def _facts(value: Mapping[str, Any]) -> ArrayFacts:
    facts = ArrayFacts(value["dtype"], tuple(value["shape"]), value["sha256"])
    if facts.dtype not in DTYPES or not all(isinstance(size, int) and size >= 0 for size in facts.shape):
        raise ValueError(f"arrays of {facts.dtype} {facts.shape} are not stored")
    return facts
