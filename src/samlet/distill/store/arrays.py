"""How features become arrays on disk and tensors again: three dtypes, headers of .npy files, facts that are checked."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from samlet.distill.store.identity import Identity
from samlet.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

EMBEDDING, AFFINE = "embedding", "_affine"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "uint8": torch.uint8}
_PLAIN = {"fp32": "float32", "fp16": "float16", "int8": "float16"}  # of what is no map


class ArrayFacts(NamedTuple):
    """What an array must be found to be: numpy's dtype, shape, and sha256 of its bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


def is_map(name: str, dimensions: int, identity: Identity) -> bool:
    """Whether a feature has rows and columns: the embedding, taps, and maps for each prompt; tokens have none."""
    return dimensions == 4 or (dimensions == 3 and (name == EMBEDDING or name in identity.taps))


def encode(name: str, values: Float[np.ndarray, "..."], identity: Identity) -> dict[str, np.ndarray]:
    """The arrays that a feature is stored as, in the store's dtype.

    int8 holds for maps, channel by channel: x = low + scale q with q in 0..255, so that no value is off by more than
    half a scale; `<name>_affine` (..., C, 2) holds (low, scale). What is no map is small and stays fp16.

    Raises:
        DataError: values that are not finite, or that the dtype does not reach.
    """
    values = np.asarray(values, dtype=np.float32)
    if not np.isfinite(values).all():
        raise DataError(f"{name}: the teacher's answer holds values that are not finite; compute it in fp32")
    if identity.dtype == "int8" and is_map(name, values.ndim, identity):
        return _quantised(name, values)
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values, dtype=_PLAIN[identity.dtype])
    if not np.isfinite(stored).all():
        raise DataError(f"{name}: {np.abs(values).max():.3g} is more than fp16 holds; store it as fp32")
    return {name: stored}


def _quantised(name: str, values: Float[np.ndarray, "*C h w"]) -> dict[str, np.ndarray]:
    low = values.min(axis=(-2, -1), keepdims=True)
    high = values.max(axis=(-2, -1), keepdims=True)
    scale = ((high.astype(np.float64) - low) / 255).astype(np.float32)
    steps = np.divide(values - low, scale, out=np.zeros_like(values), where=scale > 0)
    q = np.rint(steps).clip(0, 255).astype(np.uint8)
    return {name: np.ascontiguousarray(q), name + AFFINE: np.concatenate([low, scale], axis=-1)[..., 0, :]}


def decoded(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Features in float32 from arrays as stored, wherever they are, with or without a batch dimension in front."""
    return {name: _floats(values, raw.get(name + AFFINE)) for name, values in raw.items() if not name.endswith(AFFINE)}


def _floats(values: Tensor, affine: Tensor | None) -> Tensor:
    if affine is None:
        return values.float()
    low, scale = affine[..., None, None, :].unbind(-1)
    return torch.addcmul(low, scale, values.float())


def facts_of(array: np.ndarray) -> ArrayFacts:
    """What will be checked when the array is read."""
    return ArrayFacts(array.dtype.name, array.shape, hashlib.sha256(array.data).hexdigest())


@lru_cache(maxsize=64)
def npy_header(dtype: str, shape: Sequence[int]) -> bytes:
    """The one header that an array's .npy file has."""
    place = io.BytesIO()
    descr = np.dtype(dtype).newbyteorder("<").str
    np.lib.format.write_array_header_1_0(place, {"descr": descr, "fortran_order": False, "shape": tuple(shape)})
    return place.getvalue()


def write_npy(path: Path, array: np.ndarray) -> None:
    """Write what numpy.save would, with our header."""
    with path.open("wb") as file:
        file.write(npy_header(array.dtype.name, array.shape))
        file.write(np.ascontiguousarray(array).data)


def read_npy(path: Path, facts: ArrayFacts) -> Tensor:
    """The array of a .npy file, mapped: its pages are read when they are looked at, and never copied.

    Raises:
        DataError: it is missing, cannot be read, or any byte is not what it must be.
    """
    header = npy_header(facts.dtype, facts.shape)
    size = len(header) + data_bytes(facts.dtype, facts.shape)
    try:
        if (found := path.stat().st_size) != size:
            raise DataError(f"{path}: damaged: it has {found} bytes, not {size}")
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing") from error
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]})") from error
    if mapped[: len(header)].numpy().tobytes() != header:
        raise DataError(f"{path}: damaged: its header is not that of {facts.dtype} {facts.shape}")
    return checked(mapped[len(header) :].view(DTYPES[facts.dtype]).view(facts.shape), facts, str(path))


def checked(values: Tensor, facts: ArrayFacts, place: str) -> Tensor:
    """`values`, if they are what `facts` say.

    Raises:
        DataError: they are not.
    """
    if values.dtype != DTYPES[facts.dtype] or tuple(values.shape) != facts.shape:
        raise DataError(f"{place}: damaged: it holds {values.dtype} {tuple(values.shape)}, not {facts.dtype}")
    if hashlib.sha256(values.numpy().data).hexdigest() != facts.sha256:
        raise DataError(f"{place}: damaged: its content is not what was written")
    return values


def data_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of an array without its header."""
    return prod(shape) * np.dtype(dtype).itemsize


def bytes_per_image(identity: Identity, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes that one variant of one image takes as .npy files, by the shapes of its features."""
    arrays = [part for name, shape in shapes.items() for part in _parts(name, shape, identity)]
    return sum(len(npy_header(*part)) + data_bytes(*part) for part in arrays)


def _parts(name: str, shape: tuple[int, ...], identity: Identity) -> list[tuple[str, tuple[int, ...]]]:
    if identity.dtype == "int8" and is_map(name, len(shape), identity):
        return [("uint8", shape), ("float32", (*shape[:-2], 2))]
    return [(_PLAIN[identity.dtype], shape)]
