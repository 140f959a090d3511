"""Teacher features ahead of time: exact, small, and never read unless every byte is what was written."""

from samlet.distill.store.arrays import ArrayFacts, bytes_per_image, decoded
from samlet.distill.store.entries import Entry
from samlet.distill.store.identity import (
    DECODER,
    Identity,
    decoder_file,
    open_store,
    read_identity,
    refuse_stale,
    shard_of,
)
from samlet.distill.store.reader import StoreReader
from samlet.distill.store.writer import Shard

__all__ = [
    "DECODER",
    "ArrayFacts",
    "Entry",
    "Identity",
    "Shard",
    "StoreReader",
    "bytes_per_image",
    "decoded",
    "decoder_file",
    "open_store",
    "read_identity",
    "refuse_stale",
    "shard_of",
]
