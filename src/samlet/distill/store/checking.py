"""Every byte of a store looked at, and what is damaged dropped so that extracting again computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from samlet.artefacts import sha256_of
from samlet.distill.kept_masks import FOLDER, mask_file, read_masks
from samlet.distill.store.arrays import EMBEDDING, read_npy
from samlet.distill.store.entries import (
    Contents,
    Entry,
    Key,
    ShardFiles,
    array_key,
    read_shard,
    shard_numbers,
    splits_of,
)
from samlet.distill.store.identity import DECODER, LOCK, MANIFEST, Identity, decoder_file, read_store, shard_of
from samlet.distill.store.layout import files_below
from samlet.distill.store.packs import Pack
from samlet.distill.store.writer import Shard
from samlet.errors import DataError

Advance = Callable[[int], object]

_BESIDE = (LOCK, ".leases")  # what extractors keep in a store besides features
_OURS = (".npy", ".tmp", ".safetensors")


class ShardReport(NamedTuple):
    """What is wrong with one shard."""

    split: str
    number: int
    damage: list[str]
    """Sentences, each beginning with a path or name."""
    lost: set[Key]
    """Entries that cannot be used."""
    unfinished: bool
    """It has a journal, or no manifest."""
    unreadable: bool
    """Its manifest cannot be used at all."""


class Report(NamedTuple):
    """What is wrong with a store."""

    images: int
    """Image-variants that were looked at."""
    decoder: list[str]
    """What is wrong with the decoder."""
    shards: list[ShardReport]
    """Those with something wrong."""
    strays: list[Path]
    """Files that nothing vouches for: half-written, forgotten, or nobody's."""
    masks: dict[Path, str]
    """Files of automatic masks that are damaged, and a sentence on each."""
    missing_masks: list[Path]
    """Those of images whose features are stored, in splits that have masks."""
    sound_masks: int
    """Files of automatic masks that are whole."""

    @property
    def sound(self) -> bool:
        """Nothing is wrong and nothing is missing."""
        return not (self.decoder or self.shards or self.strays or self.masks or self.missing_masks)


def count_entries(root: Path) -> int:
    """Image-variants that the readable books of a store name."""
    store, total = read_store(root), 0
    for split in splits_of(root):
        for number in shard_numbers(root, split):
            total += len(_contents(ShardFiles(root, split, number), store.digest)[0].entries)
    return total


def check(root: Path, advance: Advance = lambda _: None) -> Report:
    """Look at every byte of a store; `advance` is called with the number of image-variants done.

    Raises:
        SamletError: there is none, or its manifest.json is damaged.
    """
    store, keys = read_store(root), set[tuple[str, Key]]()
    decoder, shards = list[str](), list[ShardReport]()
    try:
        decoder_file(root)
    except DataError as error:
        decoder.append(str(error))
    vouched = {root / MANIFEST, root / DECODER}
    for split in splits_of(root):
        for number in sorted({*range(store.identity.shards), *shard_numbers(root, split)}):
            files = ShardFiles(root, split, number)
            contents, unreadable = _contents(files, store.digest)
            report = ShardReport(split, number, unreadable, set(), not contents.finished, bool(unreadable))
            if not unreadable:
                report = _check_shard(report, files, contents, store.identity, advance)
            keys.update((split, key) for key in contents.entries)
            vouched.update(_vouched(files, contents, store.identity))
            if report.damage or report.unfinished:
                shards.append(report)
    sound, masks = _look_at_masks(root)
    missing = _missing_masks(root, {(split, image_id) for split, (image_id, _) in keys})
    vouched.update(sound, masks)
    strays = [place for place in files_below(root) if place not in vouched and not _is_beside(place, root)]
    return Report(len(keys), decoder, shards, sorted(strays), masks, missing, len(sound))


def repair(root: Path, report: Report) -> tuple[int, list[Path]]:
    """Drop what a report found damaged and files that nothing vouches for; entries lost, and strays left alone.

    Shards that are merely unfinished are left to the extraction. Nobody else may be writing.

    Raises:
        SamletError: the store cannot be written.
    """
    identity, lost = read_store(root).identity, 0
    for found in report.shards:
        if found.unreadable:
            ShardFiles(root, found.split, found.number).manifest.unlink()
        elif found.damage:
            Shard(root, found.split, found.number, identity).drop(found.lost)
            lost += len(found.lost)
    for place in report.masks:
        place.unlink(missing_ok=True)
    for place in report.strays:
        if place.suffix in _OURS or place.name.startswith(".tmp"):
            place.unlink(missing_ok=True)
    return lost, [place for place in report.strays if place.exists()]


def mask_files(root: Path) -> list[Path]:
    """Where automatic masks lie in a store, sorted."""
    return sorted((root / FOLDER).rglob("*.json"))


def _look_at_masks(root: Path) -> tuple[list[Path], dict[Path, str]]:
    """Files of automatic masks that are whole, and those that are not, with a sentence on each."""
    sound, damaged = list[Path](), dict[Path, str]()
    for place in mask_files(root):
        try:
            read_masks(place)
            sound.append(place)
        except DataError as error:
            damaged[place] = str(error)
    return sound, damaged


def _missing_masks(root: Path, images: set[tuple[str, str]]) -> list[Path]:
    """The masks that images with features should have, in splits where any has."""
    wanted = list[Path]()
    for split, image_id in sorted(images):
        folder = root / FOLDER / split
        if folder.is_dir():
            with suppress(DataError):  # a name that leads elsewhere is damage of the shard
                wanted.append(mask_file(folder, image_id))
    return [place for place in wanted if not place.exists()]


def _contents(files: ShardFiles, store: str) -> tuple[Contents, list[str]]:
    """The books of a shard, or why they cannot be read."""
    try:
        return read_shard(files, store), []
    except DataError as error:
        return Contents({}, set(), None, False, []), [str(error)]


def _check_shard(
    report: ShardReport, files: ShardFiles, contents: Contents, identity: Identity, advance: Advance
) -> ShardReport:
    pack = _pack_damage(files.pack, contents.pack)
    damage, lost = [*contents.damaged, *pack], set[Key]()
    for key, entry in contents.entries.items():
        found = list(_misplaced(entry, report.number, identity))
        if pack or key not in contents.packed:
            found += _array_damage(entry, files, identity, packed=key in contents.packed)
        if found:
            lost.add(key)
            damage += found
        advance(1)
    return report._replace(damage=list(dict.fromkeys(damage)), lost=lost)


def _pack_damage(path: Path, facts: dict[str, Any] | None) -> list[str]:
    if facts is None:
        return []
    try:
        found = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    except FileNotFoundError:
        return [f"{path}: missing"]
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror or error})"]
    return [] if found == facts else [f"{path}: damaged: its content is not what the shard's manifest vouches for"]


def _misplaced(entry: Entry, number: int, identity: Identity) -> Iterator[str]:
    """What is wrong with an entry as such."""
    place = f"{entry.image_id} (variant {entry.variant})"
    if shard_of(entry.image_id, identity) != number:
        yield f"{place}: is an entry of shard {number} but belongs to another"
    if not 0 <= entry.variant < identity.variants:
        yield f"{place}: the store has {identity.variants} variant(s)"
    for name in (EMBEDDING, *identity.taps):
        if name not in entry.arrays:
            yield f"{place}: has no {name}"


def _array_damage(entry: Entry, files: ShardFiles, identity: Identity, *, packed: bool) -> Iterator[str]:
    for name, facts in entry.arrays.items():
        try:
            key = array_key(entry.image_id, entry.variant, name, identity)
            if packed:
                Pack(files.pack).read(key, facts)
            else:
                read_npy(files.split / f"{key}.npy", facts)
        except DataError as error:
            yield str(error)


def _vouched(files: ShardFiles, contents: Contents, identity: Identity) -> Iterator[Path]:
    """The files that a shard answers for."""
    yield from (files.manifest, files.journal)
    if contents.pack is not None:
        yield files.pack
    for key, entry in contents.entries.items():
        for name in entry.arrays:
            if key not in contents.packed:
                with suppress(DataError):  # a name that leads elsewhere vouches for nothing
                    yield files.split / f"{array_key(*key, name, identity)}.npy"


def _is_beside(place: Path, root: Path) -> bool:
    parts = place.relative_to(root).parts
    return (parts[1] if parts[0] == FOLDER and len(parts) > 1 else parts[0]) in _BESIDE
