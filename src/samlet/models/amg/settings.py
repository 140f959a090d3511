"""Thresholds of the automatic generator, and those that were tuned for a checkpoint and lie beside it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from samlet.artefacts import write_json
from samlet.errors import SamletError

TUNED = "amg.json"
BEST = "best"  # of a run, in its folder
_RUN_WEIGHTS = ("student.safetensors", "mobile_sam.pt")  # the run's best student, in the run and in its `best`


@dataclasses.dataclass(frozen=True)
class AmgSettings:
    """SamAutomaticMaskGenerator's settings, with its defaults, and `fast`."""

    points_per_side: int = 32
    """Points along each side of the grid over the image."""
    points_per_batch: int = 64
    """Points decoded together, at most."""
    pred_iou_thresh: float = 0.88
    """Masks stay whose estimated IoU lies above it; 0 or less: all."""
    stability_score_thresh: float = 0.95
    """Masks stay whose stability reaches it; 0 or less: all."""
    stability_score_offset: float = 1.0
    """How far the cut-off of the logits is moved up and down to see whether the mask changes."""
    box_nms_thresh: float = 0.7
    """Of masks whose boxes overlap by more, IoU, the best estimated stays."""
    crop_n_layers: int = 0
    """Layers of crops searched besides the image: layer i has 4^i."""
    crop_nms_thresh: float = 0.7
    """The same between crops, where the smaller crop wins."""
    crop_overlap_ratio: float = 512 / 1500
    """Overlap of the first layer's crops as a share of the image's short side; each further layer halves it."""
    crop_n_points_downscale_factor: int = 1
    """Layer i has points_per_side divided by the i-th power of it."""
    min_mask_region_area: int = 0
    """Holes and islands of fewer pixels are removed; 0: none."""
    fast: bool = True
    """Coarse grid first, duplicates removed at low resolution; False: every point, every mask at full size."""

    def __post_init__(self) -> None:
        """Refuse values of another kind or out of range.

        Raises:
            SamletError: names the field.
        """
        for name, value in self.as_dict().items():
            _check(name, value)

    @property
    def min_iou(self) -> float | None:
        """The estimate that a mask must exceed; None: any will do."""
        return self.pred_iou_thresh if self.pred_iou_thresh > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, as JSON takes them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AmgSettings:
        """Settings from some fields by name; the others have their defaults.

        Raises:
            SamletError: a field that does not exist, or a value it cannot have.
        """
        unknown = [str(name) for name in values if name not in _KINDS]
        if unknown:
            raise SamletError(f"{', '.join(unknown)}: no such setting of the automatic generator; it has {_NAMES}")
        return cls(**values)


_KINDS: dict[str, type] = {field.name: type(field.default) for field in dataclasses.fields(AmgSettings)}
_NAMES = ", ".join(_KINDS)
_WORDS = {int: "a whole number", float: "a number", bool: "true or false"}
_RANGES = {
    "points_per_side": (1, math.inf),
    "points_per_batch": (1, math.inf),
    "stability_score_offset": (0, math.inf),
    "box_nms_thresh": (0, 1),
    "crop_n_layers": (0, math.inf),
    "crop_nms_thresh": (0, 1),
    "crop_overlap_ratio": (0, 1),
    "crop_n_points_downscale_factor": (1, math.inf),
    "min_mask_region_area": (0, math.inf),
}


def _check(name: str, value: Any) -> None:
    kind = _KINDS[name]
    if kind is bool and isinstance(value, bool):
        return
    numbers = (int, float) if kind is float else (int,)
    if kind is bool or isinstance(value, bool) or not isinstance(value, numbers) or not math.isfinite(value):
        raise SamletError(f"{name}: must be {_WORDS[kind]}, not {value!r}")
    low, high = _RANGES.get(name, (-math.inf, math.inf))
    if not low <= value <= high:
        most = f" and at most {high:g}" if high < math.inf else ""
        raise SamletError(f"{name}: must be at least {low:g}{most}, not {value!r}")


def amg_path(checkpoint: Path) -> Path:
    """Where the settings tuned for a checkpoint lie: in its folder, or beside the file under its name."""
    return checkpoint / TUNED if checkpoint.is_dir() else checkpoint.with_suffix(f".{TUNED}")


def save_tuned(checkpoint: Path, settings: AmgSettings, **facts: Any) -> Path:
    """Write settings beside the checkpoint that they were tuned for, with its weights' digest and other `facts`.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        SamletError: the disk is full, or not ours to write.
    """
    path = amg_path(checkpoint)
    write_json(path, {**facts, "settings": settings.as_dict(), "weights_sha256": _digest(checkpoint)})
    return path


def tuned_settings(checkpoint: Path, image_size: int | None = None) -> AmgSettings | None:
    """The settings that were tuned for a checkpoint; None: it was not tuned.

    A run's settings are those of its best student too, under each of its names: run/mobile_sam.pt, run/best, ...

    Raises:
        CheckpointError: the checkpoint cannot be read.
        SamletError: the file is damaged, or belongs to other weights or another input size than `image_size`.
    """
    path = next((place for place in _places(checkpoint) if place.is_file()), None)
    if path is None:
        return None
    again = f"run `samlet tune-amg {checkpoint} DATA` again, or remove the file"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tuned, digest = content["settings"], content["weights_sha256"]
        settings = AmgSettings.from_dict(dict(tuned))
    except OSError as error:
        raise SamletError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise SamletError(f"{path}: damaged, not the settings of an automatic generator ({error}): {again}") from error
    except SamletError as error:
        raise SamletError(f"{path}: {error}: {again}") from error
    size = content.get("image_size")
    if image_size is not None and size not in (None, image_size):
        raise SamletError(
            f"{path}: was tuned at an image size of {size}, and {image_size} is asked for: run `samlet tune-amg "
            f"{checkpoint} DATA --image-size {image_size}`, or remove the file"
        )
    if digest != _digest(checkpoint):
        raise SamletError(f"{path}: was tuned for other weights than {checkpoint} holds now: {again}")
    return settings


def _places(checkpoint: Path) -> list[Path]:
    """Where settings may lie, the nearest first."""
    places = [amg_path(checkpoint)]
    folder = checkpoint
    if not checkpoint.is_dir() and checkpoint.name in _RUN_WEIGHTS:
        folder = checkpoint.parent
        places.append(folder / TUNED)
    if folder.is_dir() and folder.resolve().name == BEST:
        places.append(folder.resolve().parent / TUNED)
    elif folder.is_dir():
        places.append(folder / BEST / TUNED)
    return places


def _digest(checkpoint: Path) -> str:
    from samlet.models.checkpoints import digest_of_weights

    return digest_of_weights(checkpoint)
