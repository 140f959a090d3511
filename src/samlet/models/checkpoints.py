"""Weights from and to disk: upstream .pt/.pth, safetensors, runs of samlet, Hugging Face folders.

Reading is strict (every key and shape), executes nothing (`weights_only`, never a fallback), and turns whatever a
damaged or foreign file does into one sentence.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251 - the name of an error; nothing is unpickled
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from samlet.artefacts import MANIFEST, read_manifest, write_file
from samlet.errors import CheckpointError, SamletError
from samlet.frames import PIXEL_MEAN, PIXEL_STD
from samlet.models import hf
from samlet.models.arch import infer_arch
from samlet.models.build import build_sam
from samlet.models.lora import merged_state
from samlet.models.vit import PATCH

if TYPE_CHECKING:
    from torch import Tensor

    from samlet.models.sam import Sam

STUDENT = "student.safetensors"  # in a run's checkpoint directory
METADATA = "samlet"  # the only key of our safetensors' metadata: several would be written in random order
PIXEL_BUFFERS = {"pixel_mean": PIXEL_MEAN, "pixel_std": PIXEL_STD}  # constants that some tools save with the weights
_ZIP, _LEGACY = b"PK\x03\x04", b"\x80"


def load_sam(path: Path | str, image_size: int | None = None, **overrides: Any) -> Sam:
    """A model in eval mode, on the CPU, in float32; its kind and sizes are read off the tensors.

    `path`: upstream's .pt or .pth, a safetensors file, a run of samlet or its `best`, a Hugging Face SamModel folder.
    `image_size`: input size, where it is not the one that the file tells (upstream's TinyViT tells none: 1024). A ViT's
    absolute positions are then resampled bicubically and the relative ones of its global blocks linearly, as upstream
    does with the latter. `overrides` replace sizes that were read.

    Raises:
        CheckpointError: the file is missing, damaged, foreign, or does not fit the model key by key.
    """
    file, is_hf = _locate(Path(path))
    state, arch = read_tensors(file)
    if is_hf:
        hf.check_config(file.parent)
        state = hf.to_upstream(state)
    try:
        _check_tensors(state)
        _drop_pixel_buffers(state)
        arch = {**(infer_arch(state) if arch is None else arch), **overrides}
        if image_size is not None:
            arch["image_size"] = image_size
        with torch.device("meta"):
            sam = build_sam(**{"kind": None, **arch})
        _resample_positions(state, sam)
        fill_model(sam, state)
    except SamletError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(f"{file}: does not fit a SAM-1 model: {_first_line(error)}") from error
    return sam.eval()


def digest_of_weights(path: Path | str) -> str:
    """sha256 over the tensors that `load_sam` finds, the same for one model in any of its files.

    Raises:
        CheckpointError: the file is missing, damaged or foreign.
    """
    file, is_hf = _locate(Path(path))
    state, _ = read_tensors(file)
    if is_hf:
        state = hf.to_upstream(state)
    return digest_of({name: tensor for name, tensor in state.items() if name not in PIXEL_BUFFERS}, {})


def copy_decoder(donor: Sam, sam: Sam) -> None:
    """Give `sam` the donor's prompt encoder and mask decoder.

    Raises:
        CheckpointError: a tensor of the donor's has another shape, or there are more or fewer.
    """
    for part in ("prompt_encoder", "mask_decoder"):
        ours, theirs = (dict(getattr(model, part).state_dict()) for model in (sam, donor))
        for name in [*ours, *theirs]:
            here, there = (tuple(state[name].shape) if name in state else "none" for state in (ours, theirs))
            if here != there:
                raise CheckpointError(f"its decoder has other sizes: {part}.{name} is {there}, the model's is {here}")
        getattr(sam, part).load_state_dict(theirs)


def save_sam_safetensors(sam: Sam, path: Path) -> None:
    """Write weights with the model's sizes and a digest in the metadata, whole or not at all.

    Raises:
        SamletError: the disk is full, or not ours to write.
    """
    state = plain_state(sam)
    note = json.dumps({"arch": sam.arch, "sha256": digest_of(state, sam.arch)}, sort_keys=True)
    content = save(state, {METADATA: note})
    write_file(path, lambda place: place.write_bytes(content))


def save_sam_upstream(sam: Sam, path: Path) -> None:
    """Write the plain state_dict under upstream's names, as mobile_sam.pt and sam_vit_*.pth are, whole or not at all.

    Raises:
        SamletError: the disk is full, or not ours to write.
    """
    content = io.BytesIO()  # into a file, torch would write the file's name too, and equal weights differ
    torch.save(plain_state(sam), content)
    write_file(path, lambda place: place.write_bytes(content.getbuffer()))


def plain_state(sam: Sam) -> dict[str, Tensor]:
    """The state_dict under upstream's keys, LoRA merged, as contiguous CPU tensors in a plain dict."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in merged_state(sam).items()}


def _locate(path: Path) -> tuple[Path, bool]:
    """The weights file that a path means, and whether it is a Hugging Face folder's."""
    if path.is_file():
        return path, False
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    for folder in (path, path / "best"):
        if (folder / STUDENT).is_file():
            if (folder / MANIFEST).is_file():
                read_manifest(folder)
            return folder / STUDENT, False
    if hf.is_hf_folder(path):
        if (path / hf.WEIGHTS).is_file():
            return path / hf.WEIGHTS, True
        raise CheckpointError(f"{path}: has {hf.CONFIG} but no {hf.WEIGHTS}; save the model as one safetensors file")
    unfinished = sorted((path / "checkpoints").glob(f"*/{STUDENT}"))
    if unfinished:
        raise CheckpointError(
            f"{path}: this run has not been validated yet, so it has no best student; let it go on, or name "
            f"{unfinished[-1].parent}"
        )
    raise CheckpointError(
        f"{path}: holds no model: neither {STUDENT} (a run of samlet) nor {hf.CONFIG} with {hf.WEIGHTS} (Hugging Face)"
    )


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors by name, and the sizes if the file tells them; decided by the content, not by the file's name."""
    try:
        with file.open("rb") as stream:
            start = stream.read(512)
        if start.startswith(_ZIP):
            return _read_torch(file), None
        if start[8:9] == b"{":
            return _read_safetensors(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    raise CheckpointError(f"{file}: {_what_is(start)}")


def _what_is(start: bytes) -> str:
    text = start.lstrip().lower()
    if not start:
        return "is empty: copy or download it again"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not weights: download it again, from the address of the file itself"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not weights: run `git lfs pull`"
    if start.startswith(_LEGACY):
        return (
            "is a bare pickle, which can run code and is never opened: save a state_dict with torch.save (1.6 or newer)"
        )
    return "is neither a torch checkpoint nor safetensors, or is damaged at its start: copy or download it again"


def _read_torch(file: Path) -> dict[str, Tensor]:
    damaged = "damaged or cut short: copy or download it again"
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise CheckpointError(f"{file}: {damaged} (checksum of {broken})")
        with file.open("rb") as stream:  # given a name, torch may choose another reader by its ending
            content = torch.load(stream, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(
            f"{file}: holds more than tensors, so opening it could run code; nothing was run. "
            "Save its state_dict alone, or as safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{file}: {damaged} ({_first_line(error)})") from error
    return _tensors(file, content)


def _tensors(file: Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        foreign = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
        if not foreign:
            return {str(name): value for name, value in content.items()}
        inner = [name for name in foreign if isinstance(content.get(name), Mapping)]
        if inner:
            raise CheckpointError(
                f"{file}: a training checkpoint of another tool with the parts {_some(map(str, content))}, not a plain "
                f"state_dict: save its part '{inner[0]}' alone, under upstream's names"
            )
        raise CheckpointError(f"{file}: not a plain state_dict: {_some(foreign)} is no tensor")
    raise CheckpointError(f"{file}: holds a {type(content).__name__}, not a state_dict of tensors by name")


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        with safe_open(file, framework="pt") as archive:
            note = json.loads((archive.metadata() or {}).get(METADATA, "null"))
            state = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
    except (SafetensorError, RuntimeError, ValueError, TypeError, LookupError) as error:
        raise CheckpointError(
            f"{file}: damaged or cut short: copy or download it again ({_first_line(error)})"
        ) from error
    if note is None:
        return state, None
    arch = note.get("arch") if isinstance(note, dict) else None
    if not isinstance(arch, dict) or note.get("sha256") != digest_of(state, arch):
        raise CheckpointError(f"{file}: damaged: its content is not what its own digest says; copy it again")
    return state, arch


def digest_of(state: Mapping[str, Tensor], arch: Mapping[str, Any]) -> str:
    """sha256 over sizes, names, types and values."""
    digest = hashlib.sha256(json.dumps(arch, sort_keys=True).encode())
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_tensors(state: Mapping[str, Tensor]) -> None:
    """Every tensor is plain memory with finite real numbers."""
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise CheckpointError(f"{name} is no plain tensor (sparse, quantized or without data); save it densely")
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise CheckpointError(f"{name} holds {tensor.dtype} values; SAM's weights are real numbers")
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise CheckpointError(f"{name} of shape {_sides(tensor)} is not stored in full; save it contiguously")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name} holds NaN or infinite values; the model that was saved had diverged")


def _sides(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def _drop_pixel_buffers(state: dict[str, Tensor]) -> None:
    """Upstream computes them; some tools save them. They are constants."""
    for name, value in PIXEL_BUFFERS.items():
        found = state.pop(name, None)
        expected = torch.tensor(value)
        if found is None:
            continue
        if found.numel() != 3 or not torch.allclose(found.flatten().float(), expected, atol=1e-3):
            raise CheckpointError(f"{name} is {found.flatten()[:3].tolist()}; SAM's preprocessing has {value}")


def _resample_positions(state: dict[str, Tensor], sam: Sam) -> None:
    """Bring a ViT's positional tables to the model's input size."""
    table = state.get("image_encoder.pos_embed")
    grid = sam.image_size // PATCH
    if table is None or sam.kind == "vit_t" or table.ndim != 4:
        return
    if table.shape[1] != table.shape[2]:
        raise CheckpointError(f"image_encoder.pos_embed of shape {_sides(table)} is not square; SAM's input is")
    if table.shape[1] == grid:
        return
    maps = F.interpolate(table.float().permute(0, 3, 1, 2), (grid, grid), mode="bicubic", align_corners=False)
    state["image_encoder.pos_embed"] = maps.permute(0, 2, 3, 1)
    for index in sam.arch["global_attn_indexes"]:
        for axis in "hw":
            name = f"image_encoder.blocks.{index}.attn.rel_pos_{axis}"
            if name not in state or state[name].ndim != 2:
                continue  # which is told with all that does not fit
            rows = state[name].float().T[None]
            state[name] = F.interpolate(rows, 2 * grid - 1, mode="linear", align_corners=False)[0].T


def fill_model(sam: Sam, state: dict[str, Tensor]) -> None:
    """Give a model on the meta device its weights; every key and shape must fit."""
    expected = sam.state_dict()
    problems = [
        ("misses", [name for name in expected if name not in state]),
        ("has unexpected", [name for name in state if name not in expected]),
        ("has other shapes for", [n for n, x in expected.items() if n in state and state[n].shape != x.shape]),
    ]
    if any(names for _, names in problems):
        kind = f"{sam.kind} of the sizes found"
        told = "; it ".join(f"{what} {_some(names)}" for what, names in problems if names)
        raise CheckpointError(f"does not fit a SAM-1 {kind}: it {told}")
    for name in list(state):
        state[name] = state[name].to(expected[name].dtype, copy=True).contiguous()
    sam.load_state_dict(state, assign=True)
    # Buffers that no file holds are still on the meta device.
    sam.pixel_mean = torch.tensor(PIXEL_MEAN).view(3, 1, 1)
    sam.pixel_std = torch.tensor(PIXEL_STD).view(3, 1, 1)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
