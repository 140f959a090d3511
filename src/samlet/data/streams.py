"""Random numbers without state: a generator is named by what it is for and by where in training it stands."""

from __future__ import annotations

import hashlib
from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What a generator draws; each use has its own, so that one more draw in one never shifts another."""

    ORDER = 0
    GEOMETRY = 1
    COLOUR = 2
    OBJECTS = 3
    PROMPT = 4
    SCENE = 5
    CORRECTION = 6
    PLACES = 7
    GRID = 8


def generator(stream: Stream, seed: int, epoch: int = 0, index: int = 0, item: int = 0) -> np.random.Generator:
    """The generator of (stream, seed, epoch, index, item): the same for the same five, on every machine."""
    return np.random.default_rng(np.random.SeedSequence([int(stream), seed, epoch, index, item]))


def name_index(name: str) -> int:
    """A 64-bit number of an image's name: the `index` of a draw that must not depend on the image's neighbours."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def hash_order(names: list[str], seed: int) -> list[int]:
    """Positions of `names` in an order that depends on the seed and on each name alone, not on its neighbours."""
    keys = [hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in names]
    return sorted(range(len(names)), key=keys.__getitem__)
