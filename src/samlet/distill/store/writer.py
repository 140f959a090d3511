"""Writing a store, shard by shard: nothing counts before the journal says so, and a kill costs at most one image."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from samlet.artefacts import write_file
from samlet.distill.store.arrays import encode, facts_of, read_npy, write_npy
from samlet.distill.store.entries import (
    Entry,
    Key,
    ShardFiles,
    array_key,
    journal_line,
    read_shard,
    remedy,
    write_manifest,
)
from samlet.distill.store.identity import Identity, read_store, shard_of
from samlet.distill.store.layout import LEFTOVER, files_below, flush
from samlet.distill.store.packs import Pack, remove_pack, write_pack
from samlet.errors import DataError, SamletError

if TYPE_CHECKING:
    from torch import Tensor


class Shard:
    """One shard of one split, for its single writer.

    Args:
        root: the store.
        split: of the data set.
        number: of the shard, from 0.
        identity: the store's.

    Raises:
        SamletError: there is no store, or the shard's manifest is damaged.
    """

    def __init__(self, root: Path, split: str, number: int, identity: Identity) -> None:
        self.number, self.identity = number, identity
        self._files = ShardFiles(root, split, number)
        self._store = read_store(root).digest
        self._root = root
        with remedy(root):
            contents = read_shard(self._files, self._store)
        self.entries: dict[Key, Entry] = contents.entries
        """Committed so far."""
        self._finished = contents.finished
        self._packed, self._pack = contents.packed, contents.pack
        self._writing = False
        self._interrupted = self._files.journal.exists()

    def add(
        self, image_id: str, variant: int, variation: str, image_sha256: str, arrays: Mapping[str, np.ndarray]
    ) -> None:
        """Encode, write and commit the features of one image-variant; an earlier entry of it is replaced.

        Raises:
            DataError: the image's name leads out of the store, or values do not fit the dtype.
            SamletError: the disk is full, or not ours to write; what was committed before is untouched.
        """
        encoded: dict[str, np.ndarray] = {}
        for name, values in arrays.items():
            try:
                encoded |= encode(name, values, self.identity)
            except DataError as error:
                raise DataError(f"{image_id} (variant {variant}): {error}") from error
        facts = {name: facts_of(array) for name, array in encoded.items()}
        self.add_stored(Entry(image_id, variant, variation, image_sha256, facts), encoded)

    def add_stored(self, entry: Entry, arrays: Mapping[str, np.ndarray]) -> None:
        """Write and commit arrays that are encoded already.

        Raises:
            DataError: the image's name leads out of the store.
            SamletError: the disk is full, or not ours to write.
        """
        if shard_of(entry.image_id, self.identity) != self.number:
            raise ValueError(f"{entry.image_id} does not belong to shard {self.number}")
        places = {name: self._place(entry, name) for name in arrays}
        self._begin()
        for name, array in arrays.items():
            self._write(places[name], array)
        self._commit(entry)

    def drop(self, keys: set[Key]) -> None:
        """Forget entries, and finish the shard without them in the form that it has.

        Raises:
            SamletError: the manifest could not be written.
        """
        self._begin()
        for key in keys:
            entry = self.entries.pop(key)
            self._packed.discard(key)
            for name in entry.arrays:
                with suppress(DataError):  # a name that leads elsewhere was never written
                    self._place(entry, name).unlink(missing_ok=True)
        self.finish(pack=self._pack is not None)

    def is_finished(self, *, pack: bool) -> bool:
        """Whether the manifest holds every entry, in this form."""
        return self._finished and (self._pack is not None) == (pack and bool(self.entries))

    def finish(self, *, pack: bool) -> None:
        """Write the manifest, as one pack or as .npy files, and remove what it makes superfluous.

        Raises:
            SamletError: it could not be written, or an array of an earlier writer is damaged.
        """
        if self.is_finished(pack=pack):
            return
        pack = pack and bool(self.entries)
        self._begin()
        with remedy(self._root):
            arrays = self._arrays(set(self.entries) if pack else self._packed)
        if pack:
            self._pack = write_pack(self._files.pack, arrays, self._files.journal.stat().st_mode)
        else:
            self._pack = None
            for key, values in arrays.items():
                self._write(self._npy(key), values.numpy())
        write_manifest(self._files, self._store, self.entries, self._pack)
        self._tidy()
        self._packed = set(self.entries) if pack else set()
        self._files.journal.unlink(missing_ok=True)
        flush(self._files.journal.parent)
        self._finished, self._writing, self._interrupted = True, False, False

    def _place(self, entry: Entry, name: str) -> Path:
        return self._npy(array_key(entry.image_id, entry.variant, name, self.identity))

    def _npy(self, key: str) -> Path:
        return self._files.split / f"{key}.npy"

    def _write(self, path: Path, array: np.ndarray) -> None:
        write_file(path, lambda place: write_npy(place, array))

    def _arrays(self, keys: set[Key]) -> dict[str, Tensor]:
        """The arrays of entries by their name in a pack, mapped from where they are."""
        pack = Pack(self._files.pack) if keys & self._packed else None
        found: dict[str, Tensor] = {}
        for image in sorted(keys):
            for name, facts in self.entries[image].arrays.items():
                key = array_key(*image, name, self.identity)
                if pack is not None and image in self._packed:
                    found[key] = pack.read(key, facts)
                else:
                    found[key] = read_npy(self._npy(key), facts)
        return found

    def _begin(self) -> None:
        """Have a journal that ends with a whole line; it also tells that a writer is at work."""
        if self._writing:
            return
        try:
            self._files.journal.parent.mkdir(parents=True, exist_ok=True)
            with self._files.journal.open("ab+") as journal:
                journal.seek(0)
                journal.truncate(journal.read().rfind(b"\n") + 1)
                os.fsync(journal.fileno())
            flush(self._files.journal.parent)
        except OSError as error:
            raise self._cannot_write(error) from error
        self._writing, self._finished = True, False

    def _commit(self, entry: Entry) -> None:
        try:
            with self._files.journal.open("rb+", buffering=0) as journal:  # not ours any more if it is not there
                end = journal.seek(0, os.SEEK_END)
                try:
                    line = journal_line(entry, self._store)
                    if journal.write(line) != len(line):
                        raise OSError(28, "No space left on device")
                    os.fsync(journal.fileno())
                except OSError:
                    journal.truncate(end)
                    raise
        except OSError as error:
            raise self._cannot_write(error) from error
        key = (entry.image_id, entry.variant)
        self.entries[key] = entry
        self._packed.discard(key)

    def _cannot_write(self, error: OSError) -> SamletError:
        return SamletError(
            f"{self._files.journal}: could not be written ({error.strerror or error}); what was committed before is "
            "untouched. Make room or mend the permissions, then run the same command again"
        )

    def _tidy(self) -> None:
        """Remove the form that the manifest does not name, and what killed writers left half-written."""
        keys = [
            array_key(*image, name, self.identity) for image, entry in self.entries.items() for name in entry.arrays
        ]
        if self._pack is None:
            remove_pack(self._files.pack)
        else:
            for key in keys:
                self._npy(key).unlink(missing_ok=True)
        if self._interrupted:
            ours = {self._npy(key) for key in keys} | {self._files.manifest, self._files.pack}
            for place in files_below(self._files.split):
                match = LEFTOVER.fullmatch(place.name)
                if match and place.with_name(match[1]) in ours:
                    place.unlink(missing_ok=True)
