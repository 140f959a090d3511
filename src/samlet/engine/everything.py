"""One checkpoint in everything mode on labelled images: automatic masks, the calibration of their scores, and time."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from samlet.engine.automatic_evaluation import Overlaps, overlaps, summarize_masks
from samlet.engine.calibration import Guesses, ask, join_guesses, summarize_calibration
from samlet.engine.evaluation import unchanged_in_eval_mode
from samlet.errors import DataError
from samlet.models.amg import AmgSettings, AutomaticMaskGenerator, tuned_settings

if TYPE_CHECKING:
    from samlet.data import EvalImage
    from samlet.engine.automatic_evaluation import Rle
    from samlet.engine.evaluation import Images
    from samlet.engine.kept_measurements import Arrays, KeptMeasurements
    from samlet.models import Sam


class Measured(NamedTuple):
    """What came out of one checkpoint."""

    scores: dict[str, Any]  # as summarize_masks has them
    calibration: dict[str, Any]  # as summarize_calibration has it
    seconds: float  # an image, for the automatic masks alone
    shown: dict[int, list[Rle]]  # masks of the images that are to be drawn


class Chosen(NamedTuple):
    """The settings that a checkpoint is run with."""

    settings: AmgSettings
    is_tuned: bool  # whether its own were beside it


def choose_settings(checkpoint: Path, image_size: int | None = None, **given: Any) -> Chosen:
    """What `samlet tune-amg` left beside a checkpoint, else the defaults; `given` values that are not None win.

    Raises:
        SamletError: what lies there is damaged, of other weights or another input size, or a given value is out of
            range.
    """
    tuned = tuned_settings(checkpoint, image_size)
    wanted = {name: value for name, value in given.items() if value is not None}
    return Chosen(dataclasses.replace(tuned or AmgSettings(), **wanted), tuned is not None)


def measure_everything(
    sam: Sam,
    images: Images,
    settings: AmgSettings,
    *,
    indices: Iterable[int],
    kept: KeptMeasurements,
    shown: Collection[int] = (),
    on_image: Callable[[], object] | None = None,
) -> Measured:
    """Automatic masks of the images at `indices` against their objects. No autocast, no gradient.

    Raises:
        DataError: there is no object, or an image that cannot be read.
        SamletError: what was found cannot be kept.
    """
    generator = AutomaticMaskGenerator.of(sam, settings)
    scored, guesses, drawn = [], [], {}
    seconds = 0.0
    with unchanged_in_eval_mode(sam):
        for index in indices:
            item = images.item(index)
            found = kept.of(item, lambda item=item: measure_image(generator, sam, item))  # type: ignore[misc]
            seconds += float(found["seconds"])
            common, said = parts_of(found)
            scored.append(common)
            guesses.append(said)
            if index in shown:
                drawn[index] = json.loads(found["rles"].tobytes())
            if on_image is not None:
                on_image()
    if not scored:
        raise DataError("evaluation: there is no image to measure")
    calibration = summarize_calibration(join_guesses(guesses))
    return Measured(summarize_masks(scored), calibration, seconds / len(scored), drawn)


def parts_of(found: Arrays) -> tuple[Overlaps, Guesses]:
    """What `measure_image` found, less the masks themselves."""
    common = Overlaps(*(found[name] for name in Overlaps._fields))
    return common, Guesses(*(found[name] for name in Guesses._fields))


def measure_image(generator: AutomaticMaskGenerator, sam: Sam, item: EvalImage) -> Arrays:
    """The fields of `Overlaps` and `Guesses` of an image, seconds, and the masks as the bytes of a JSON list of RLE."""
    began = time.perf_counter()
    masks = generator.find(item.image)
    seconds = time.perf_counter() - began
    return {
        **overlaps(masks.rles, masks.predicted_iou, item.masks, item.crowds)._asdict(),
        **ask(sam, item)._asdict(),
        "seconds": np.array(seconds),
        "rles": np.frombuffer(json.dumps(list(masks.rles)).encode(), np.uint8),
    }
