"""Reading a store: what its books say, and arrays that were looked at byte by byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samlet.distill.store.arrays import AFFINE, read_npy
from samlet.distill.store.entries import Entry, Key, ShardFiles, array_key, read_shard, remedy, shard_numbers
from samlet.distill.store.identity import read_store, shard_of
from samlet.distill.store.packs import Pack
from samlet.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


class StoreReader:
    """The features of one split, as .npy files and packs alike; travels to loader workers.

    Args:
        root: the store.
        split: of the data set; one that was never extracted has no entries.

    Raises:
        SamletError: there is no store.
        DataError: its books are damaged.
    """

    def __init__(self, root: Path, split: str) -> None:
        self.root, self.split = root, split
        store = read_store(root)
        self.identity = store.identity
        entries: dict[Key, Entry] = {}
        self._packed = set[Key]()
        self._packs: dict[int, Pack] = {}
        for number in shard_numbers(root, split):
            with remedy(root):
                contents = read_shard(ShardFiles(root, split, number), store.digest)
            entries |= contents.entries
            self._packed |= contents.packed
        self.entries: Mapping[Key, Entry] = entries

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packs": {}}

    def read(self, image_id: str, variant: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Features of one image-variant as stored, with their `<name>_affine` where there is one; checked.

        Tensors are views of the mapped file: nothing is copied before they are used.

        Raises:
            DataError: there is no such entry or feature, or a file is missing or damaged.
        """
        entry = self.entries.get((image_id, variant))
        if entry is None:
            raise DataError(f"{self.root}: has no features of {image_id} (variant {variant}) in {self.split}; extract")
        if missing := [name for name in names if name not in entry.arrays]:
            has = ", ".join(name for name in entry.arrays if not name.endswith(AFFINE))
            raise DataError(f"{self.root}: has no {missing[0]} of {image_id}, only {has}; extract with it")
        wanted = [part for name in names for part in (name, name + AFFINE) if part in entry.arrays]
        with remedy(self.root):
            return {name: self._array(entry, name) for name in wanted}

    def _array(self, entry: Entry, name: str) -> Tensor:
        key = array_key(entry.image_id, entry.variant, name, self.identity)
        if (entry.image_id, entry.variant) in self._packed:
            return self._pack(shard_of(entry.image_id, self.identity)).read(key, entry.arrays[name])
        return read_npy(self.root / self.split / f"{key}.npy", entry.arrays[name])

    def _pack(self, number: int) -> Pack:
        if number not in self._packs:
            self._packs[number] = Pack(ShardFiles(self.root, self.split, number).pack)
        return self._packs[number]
