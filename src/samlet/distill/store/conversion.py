"""What a store takes on disk, and the same store in another form."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from samlet.artefacts import write_file
from samlet.distill.kept_masks import FOLDER, read_masks
from samlet.distill.store.arrays import AFFINE, decoded
from samlet.distill.store.checking import mask_files
from samlet.distill.store.entries import Contents, ShardFiles, array_key, read_shard, remedy, shard_numbers, splits_of
from samlet.distill.store.identity import Identity, decoder_file, open_store, read_store
from samlet.distill.store.reader import StoreReader
from samlet.distill.store.writer import Shard
from samlet.errors import DataError, SamletError

_COARSER = ("fp32", "fp16", "int8")


def convert(
    path: Path, out: Path, dtype: str | None, pack: bool | None, advance: Callable[[int], object] = lambda _: None
) -> Identity:
    """Write a store anew in a coarser dtype, as packs or as .npy files; what `out` holds already is kept.

    Raises:
        SamletError: the dtype is finer than the store's, `out` is another store or this one, or there is no room.
        DataError: the store is damaged or unfinished.
    """
    source = read_store(path)
    old = source.identity.dtype
    new = dtype or old
    if new not in _COARSER[_COARSER.index(old) :]:
        raise SamletError(f"{path}: is stored as {old} and cannot become {new}; extract again with dtype {new}")
    if out.resolve().is_relative_to(path.resolve()) or path.resolve().is_relative_to(out.resolve()):
        raise SamletError(f"{out}: is the store itself, or one lies in the other; give another folder")
    decoder = decoder_file(path)
    wanted = source.identity.model_copy(update={"dtype": new})
    identity = open_store(out, wanted, lambda place: place.write_bytes(decoder.read_bytes()))
    if identity.shards != wanted.shards:
        raise SamletError(f"{out}: has {identity.shards} shards, {path} has {wanted.shards}; give another folder")
    for split in splits_of(path):
        reader = StoreReader(path, split)
        for number in range(identity.shards):
            contents = read_shard(ShardFiles(path, split, number), source.digest)
            if not contents.finished:
                raise DataError(f"{path}: shard {number} of {split} is unfinished; extract again, then convert")
            _convert_shard(reader, contents, Shard(out, split, number, identity), pack, advance)
    for place in mask_files(path):
        read_masks(place)
        write_file(out / place.relative_to(path), partial(shutil.copyfile, place))
    return identity


def _convert_shard(
    reader: StoreReader, contents: Contents, target: Shard, pack: bool | None, advance: Callable[[int], object]
) -> None:
    same = reader.identity.dtype == target.identity.dtype
    for key in sorted(contents.entries):
        entry, there = contents.entries[key], target.entries.get(key)
        if there is None or there[2:4] != entry[2:4] or (same and there != entry):
            raw = reader.read(*key, [name for name in entry.arrays if not name.endswith(AFFINE)])
            if same:
                target.add_stored(entry, {name: values.numpy() for name, values in raw.items()})
            else:
                target.add(*entry[:4], {name: values.numpy() for name, values in decoded(raw).items()})
        advance(1)
    target.finish(pack=contents.pack is not None if pack is None else pack)


def usage(root: Path) -> dict[str, Counter[str]]:
    """Bytes of every split by feature, with packs and manifests apart; of "" what belongs to the whole store.

    Raises:
        SamletError: there is no store, or its books are damaged.
    """
    store = read_store(root)
    found = {"": Counter({place.name: _size(place) for place in root.iterdir() if place.is_file()})}
    found[""][FOLDER] = sum(map(_size, mask_files(root)))
    for split in splits_of(root):
        sizes = found[split] = Counter[str]()
        for number in shard_numbers(root, split):
            files = ShardFiles(root, split, number)
            with remedy(root):
                contents = read_shard(files, store.digest)
            sizes["manifests"] += _size(files.manifest) + _size(files.journal)
            sizes["packs"] += _size(files.pack)
            for (image_id, variant), entry in contents.entries.items():
                for name in entry.arrays if (image_id, variant) not in contents.packed else ():
                    key = array_key(image_id, variant, name, store.identity)
                    sizes[name.removesuffix(AFFINE)] += _size(files.split / f"{key}.npy")
    return found


def _size(place: Path) -> int:
    return place.stat().st_size if place.exists() else 0
