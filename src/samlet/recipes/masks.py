"""Segment everything on images: `samlet masks CHECKPOINT IMAGES --out DIR`.

    DIR/masks.json          COCO: every mask with box, area, predicted_iou, stability_score, point_coords and label
    DIR/labels/a.png        16 bits: at each pixel the `label` of the smallest mask there, 0 where there is none
    DIR/overlays/a.png      the same over the image, for people
    DIR/parts/a.jpg.json    the masks of one image as they are found; what makes a second start go on
    DIR/settings.json       weights and settings that all of it was made with

A part that was made with other weights, settings or pixels is found anew. Nothing outside DIR is written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from rich.console import Console

from samlet.artefacts import remove_leftovers, write_file, write_json
from samlet.data.images import is_image_name, read_image
from samlet.data.records import hidden
from samlet.engine.naming import Named, refuse_model
from samlet.errors import DataError, SamletError

if TYPE_CHECKING:
    from jaxtyping import UInt16

    from samlet.distill.kept_masks import KeptMasks, MaskFacts
    from samlet.engine.automatic_masks import Asked, Find
    from samlet.models.amg import AmgSettings

MASKS, LABELS, OVERLAYS, PARTS, SETTINGS = "masks.json", "labels", "overlays", "parts", "settings.json"
OURS = (MASKS, LABELS, OVERLAYS, PARTS)
MOST_LABELS = np.iinfo(np.uint16).max


class Target(NamedTuple):
    """One image, and where what is found on it goes."""

    image: Path
    name: str  # below IMAGES, as masks.json calls it
    part: Path
    label: Path
    overlay: Path


def masks(
    checkpoint: str | Path,
    images: Path,
    *,
    out: Path,
    thresholds: Mapping[str, Any] | None = None,
    plain: bool = False,
    overlays: bool = True,
    image_size: int | None = None,
    device: str = "auto",
) -> int:
    """Find the masks of every image of a file or folder; the exit code: 2 where an image could not be used.

    Args:
        checkpoint: weights, run or folder.
        images: an image, or a folder with images at any depth.
        out: the folder to write; the same command goes on where it was stopped.
        thresholds: settings of the generator that are not the tuned ones or the defaults.
        plain: every point of the grid, every mask at full size, in place of the fast search.
        overlays: draw them.
        image_size: input size of the model; by default what its file says.
        device: auto, cpu or cuda.

    Raises:
        SamletError: something it was given cannot be used, or `out` is not its own to write.
    """
    console = Console()
    refuse_model(images, [Named("", Path(checkpoint))], "masks")
    refuse_foreign_folder(images, out)
    targets, ignored = find_targets(images, out)
    settings, whose = choose_settings(checkpoint, thresholds or {}, plain=plain, image_size=image_size)
    for line in (whose, *ignored):
        _say(console, line)
    facts, find = load_generator(checkpoint, settings, image_size=image_size, device=device)
    with alone_in(out):
        write_json(out / SETTINGS, {"checkpoint": str(checkpoint), **facts._asdict()})
        found, broken, code = find_all(targets, facts, find, overlays=overlays)
        if code:
            return code
        count = write_coco(out / MASKS, found, facts)
    _say(console, f"wrote {out / MASKS}: {count} masks on {len(found)} of {len(targets)} images")
    for sentence in broken:
        Console(stderr=True).print(sentence, soft_wrap=True, highlight=False, markup=False)
    return 2 if broken else 0


def find_targets(images: Path, out: Path) -> tuple[list[Target], list[str]]:
    """Every image, sorted, and a line on what else lies there.

    Raises:
        DataError: there is no image.
    """
    if images.is_file():
        names, others = [images.name], list[str]()
    elif images.is_dir():
        names, others = _names_below(images, out)
    else:
        raise DataError(f"{images}: no such file or folder; give an image or a folder of images")
    if not names:
        raise DataError(f"{images}: there is no image in it")
    root = images.parent if images.is_file() else images
    targets = [
        Target(root / name, name, out / PARTS / f"{name}.json", out / LABELS / short, out / OVERLAYS / short)
        for name, short in zip(names, _short_names(names), strict=True)
    ]
    left_out = f"{images}: {len(others)} file(s) are not called like images and are left out, such as "
    return targets, [left_out + others[0]] if others else []


def _short_names(names: Sequence[str]) -> list[str]:
    """Names of pictures: the images' without suffix, or with it where two would be called the same."""
    stems = [name.removesuffix(Path(name).suffix) for name in names]
    shared = Counter(stem.casefold() for stem in stems)
    short = [stem if shared[stem.casefold()] == 1 else name for name, stem in zip(names, stems, strict=True)]
    unlike = len({name.casefold() for name in short}) == len(short)  # a.jpg beside a.png and a.jpg.png
    return [f"{name}.png" for name in (short if unlike else names)]


def _names_below(images: Path, out: Path) -> tuple[list[str], list[str]]:
    """Images, and other files, by their path below a folder; what this command wrote, now or before, is neither."""
    ours = [out, *(path.parent for path in images.rglob(SETTINGS) if _made_by_us(path))]
    written = [(folder / name).resolve() for folder in ours for name in (*OURS, SETTINGS)]
    names, others = list[str](), list[str]()
    for path in sorted(images.rglob("*")):
        if path.is_dir() or hidden(path, images) or _is_below(path.resolve(), written):
            continue
        (names if is_image_name(path) else others).append(path.relative_to(images).as_posix())
    return names, others


def _is_below(path: Path, places: Sequence[Path]) -> bool:
    return any(path.is_relative_to(place) for place in places)


def refuse_foreign_folder(images: Path, out: Path) -> None:
    """Refuse an `out` in which something lies that this command did not write and would replace.

    Raises:
        SamletError: names what lies there.
    """
    if out.exists() and not out.is_dir():
        raise SamletError(f"--out {out}: is a file; name a folder")
    if images.is_dir() and out.resolve() == images.resolve():
        raise SamletError(f"--out {out}: is the folder of the images; its pictures would be among them; name another")
    if _is_below(images.resolve(), [(out / name).resolve() for name in OURS]):
        raise SamletError(f"--out {out}: {images} lies where the results go; name another folder")
    if (out / SETTINGS).is_file() and _made_by_us(out / SETTINGS):
        return
    there = next((out / name for name in (*OURS, SETTINGS) if (out / name).exists()), None)
    if there is not None:
        raise SamletError(f"--out {out}: {there} was not written by `samlet masks`; name another folder")


def _made_by_us(settings: Path) -> bool:
    try:
        return "teacher_sha256" in json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def choose_settings(
    checkpoint: str | Path, thresholds: Mapping[str, Any], *, plain: bool, image_size: int | None = None
) -> tuple[AmgSettings, str]:
    """The generator's settings and a line on where they come from: what is asked, then what was tuned, then defaults.

    Raises:
        SamletError: a value that a setting cannot have; tuned settings that are damaged, of other weights or of another
            input size.
    """
    from samlet.models.amg import AmgSettings, tuned_settings

    tuned = tuned_settings(Path(checkpoint), image_size)
    base = AmgSettings() if tuned is None else tuned
    changes = {**thresholds, **({"fast": False} if plain else {})}
    settings = AmgSettings.from_dict({**base.as_dict(), **changes})
    source = "the defaults" if tuned is None else "tuned for this checkpoint"
    own = f"; {', '.join(changes)} as asked" if changes else ""
    return settings, (
        f"predicted IoU above {settings.pred_iou_thresh:g}, stability from {settings.stability_score_thresh:g}, "
        f"{settings.points_per_side} x {settings.points_per_side} points ({source}{own})"
    )


def load_generator(
    checkpoint: str | Path, settings: AmgSettings, *, image_size: int | None, device: str
) -> tuple[MaskFacts, Find]:
    """What finds masks, and what they depend on.

    Raises:
        SamletError: the checkpoint or the device cannot be used.
    """
    from samlet.distill.kept_masks import MaskFacts
    from samlet.engine.evaluation import choose_device
    from samlet.models import load_sam
    from samlet.models.amg import AutomaticMaskGenerator
    from samlet.stores import facts_of

    target = choose_device(device)
    sam = load_sam(checkpoint, image_size=image_size)
    facts = MaskFacts.of(*facts_of(sam), sam.image_size, settings)
    return facts, AutomaticMaskGenerator.of(sam.to(target), settings).find


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Keep every other start out of a folder; tidy up what a killed one left.

    Raises:
        SamletError: another one is in; or the folder cannot be made or written.
    """
    from samlet.engine.automatic_masks import tidy

    lock = FileLock(out / ".lock", timeout=0)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise SamletError(f"--out {out}: another samlet masks is writing here; wait for it or stop it") from error
    except OSError as error:
        reason = error.strerror or error
        raise SamletError(f"--out {out}: cannot be written ({reason}); name another folder") from error
    try:
        remove_leftovers(out)
        for name in (PARTS, LABELS, OVERLAYS):
            tidy(out / name)
        yield
    finally:
        lock.release()


def find_all(
    targets: Sequence[Target], facts: MaskFacts, find: Find, *, overlays: bool
) -> tuple[list[Target], list[str], int]:
    """Find what is missing, image by image; those that have masks now, a sentence on each other one, the exit code.

    The exit code is 0, or 143 or 130 after a signal, when all that was found is kept.

    Raises:
        SamletError: the disk is full, or not ours to write.
    """
    from samlet.engine.automatic_masks import ImageToMask, look_at_all
    from samlet.engine.shard_loop import ImageCount
    from samlet.engine.signals import listen_for_stop

    done, broken = list[Target](), list[str]()
    asked_of = look_at_all([ImageToMask(target.image, target.part) for target in targets], facts)
    with listen_for_stop() as stop, ImageCount(len(targets), "masks") as count:
        for target, asked in zip(targets, asked_of, strict=True):
            if stop.signal is not None:
                return done, broken, stop.exit_code
            try:
                if isinstance(asked, DataError):
                    raise asked
                find_and_draw(target, asked, facts, find, overlays=overlays)
                done.append(target)
            except DataError as error:
                broken.append(str(error))
            count.advance(1)
    return done, broken, 0


def find_and_draw(target: Target, asked: Asked, facts: MaskFacts, find: Find, *, overlays: bool) -> None:
    """Have an image's masks, and its pictures of just these.

    Raises:
        DataError: the image cannot be read.
        SamletError: the disk is full, or not ours to write.
    """
    from samlet.engine.automatic_masks import compute
    from samlet.engine.overlays import save_numbered

    pixels, kept = None, asked.kept
    if kept is None:
        for former in (target.label, target.overlay):
            former.unlink(missing_ok=True)
        pixels, kept = compute(asked, facts, find)
    if target.label.exists() and (target.overlay.exists() or not overlays):
        return
    labels = label_map(kept)
    picture = Image.fromarray(labels)
    write_file(target.label, lambda place: picture.save(place, format="PNG"))
    if overlays:
        save_numbered(target.overlay, read_image(target.image) if pixels is None else pixels, labels)


def label_map(kept: KeptMasks) -> UInt16[np.ndarray, "H W"]:
    """At each pixel the number (from 1) of the smallest mask that covers it: larger ones lie below smaller ones.

    Raises:
        DataError: more masks than 16 bits can number.
    """
    if len(kept) > MOST_LABELS:
        raise DataError(f"{kept.place}: {len(kept)} masks are more than a label image can number; ask for fewer")
    labels, masks = np.zeros(kept.size, np.uint16), kept.segmentations()
    for number in np.argsort(-np.array(kept.areas, np.int64), kind="stable"):
        labels[masks.read(int(number))] = number + 1
    return labels


def write_coco(path: Path, targets: Sequence[Target], facts: MaskFacts) -> int:
    """Put the parts together as one COCO file; how many masks it has.

    Raises:
        DataError: a part was damaged meanwhile.
        SamletError: the disk is full, or not ours to write.
    """
    from samlet import __version__

    count = 0

    def fill(place: Path) -> None:
        nonlocal count
        with place.open("w", encoding="utf-8") as file:
            info = {"description": "automatic masks", "samlet": __version__, **facts._asdict()}
            categories = [{"id": 1, "name": "object"}]
            file.write(f'{{"info": {json.dumps(info)},\n"categories": {json.dumps(categories)},\n"annotations": [')
            images, count = _write_annotations(file, targets)
            file.write(f'\n],\n"images": {json.dumps(images)}}}\n')

    write_file(path, fill)
    return count


def _write_annotations(file: TextIO, targets: Sequence[Target]) -> tuple[list[dict[str, Any]], int]:
    """A line a mask, image by image, so that no more than one image's are in memory."""
    from samlet.distill.kept_masks import read_masks

    images, count = list[dict[str, Any]](), 0
    for image_id, target in enumerate(targets, start=1):
        kept = read_masks(target.part)
        height, width = kept.size
        images.append({"id": image_id, "file_name": target.name, "height": height, "width": width})
        for annotation in annotations_of(kept):
            count += 1
            own = {"id": count, "image_id": image_id, **annotation}
            file.write(f"{',' if count > 1 else ''}\n{json.dumps(own)}")
    return images, count


def annotations_of(kept: KeptMasks) -> Iterator[dict[str, Any]]:
    """The masks of an image as COCO writes them, in the order in which they were found, the best first."""
    from pycocotools import mask as coco_mask

    boxes = coco_mask.toBbox(list(kept.rles)) if len(kept) else np.zeros((0, 4))
    for number, box in enumerate(boxes):
        yield {
            "category_id": 1,
            "iscrowd": 0,
            "segmentation": dict(kept.rles[number]),
            "area": kept.areas[number],
            "bbox": [float(value) for value in box],  # XYWH, pixels from edge to edge
            "predicted_iou": kept.predicted_iou[number],
            "stability_score": kept.stability_score[number],
            "point_coords": [list(kept.points[number])],
            "label": number + 1,
        }


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
