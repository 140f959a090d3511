"""How good a SAM is on labelled images: every object, at the original resolution, by kind of prompt.

Kinds: "point", one click at the object's most interior pixel, of the three masks the one that the model trusts
most; "box", the object's exact box, the single mask; "clicks_k", the point and k correction clicks, the single
mask. Nothing is drawn at random: two evaluations agree to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from samlet.data.masks import centre_point, mask_box
from samlet.errors import DataError, SamletError
from samlet.frames import postprocess_masks, preprocess, to_input_coords
from samlet.models import make_prompts
from samlet.types import NEGATIVE, POSITIVE, ImageFeatures

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32, Float64, Int64

    from samlet.data import EvalImage
    from samlet.models import Sam

POINT, BOX, CLICKS = "point", "box", "clicks_"
MAX_PROMPTS = 32  # decoded at once
MAX_PIXELS = 2**26  # of float32 masks at once, in the input and the original frame together
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 2**62)}  # COCO's, pixels of the original frame


class Images(Protocol):
    """What is evaluated; samlet.data.ValidationSet is one."""

    def __len__(self) -> int:
        """How many images there are."""
        ...

    def item(self, index: int) -> EvalImage:
        """An image, all its objects and their prompts, in the original frame."""
        ...


class ObjectScores(NamedTuple):
    """One row per object, sorted by image and object; one column per kind of prompt."""

    kinds: tuple[str, ...]
    image: Int64[np.ndarray, "O"]
    object: Int64[np.ndarray, "O"]  # its number within the image
    area: Int64[np.ndarray, "O"]  # pixels of the original frame
    iou: Float64[np.ndarray, "O K"]  # 0 where nothing is predicted
    dice: Float64[np.ndarray, "O K"]


class Encoded(NamedTuple):
    """An image that a model has seen, ready for any number of prompts."""

    sam: Sam
    features: ImageFeatures
    input_size: tuple[int, int]
    original_size: tuple[int, int]


class Answer(NamedTuple):
    """One mask for each of P prompts."""

    masks: Bool[Tensor, "P H W"]  # original frame
    low_res_logits: Float[Tensor, "P 1 h w"]
    iou_predictions: Float[Tensor, "P"]


class Click(NamedTuple):
    """A pixel of the original frame; label 1: belongs to the object, 0: does not."""

    x: int
    y: int
    label: int


def evaluate_sam(
    sam: Sam,
    images: Images,
    prompts: Sequence[str] = (POINT, BOX),
    *,
    indices: Iterable[int] | None = None,
    on_image: Callable[[], object] | None = None,
) -> ObjectScores:
    """Scores of every object of the images at `indices` (None: all). No autocast, no gradient; `sam` is left as it was.

    The rows of disjoint `indices`, on several processes say, joined by `join_scores` are the rows of all.

    Raises:
        SamletError: a kind of prompt that does not exist.
        DataError: an image that cannot be read.
    """
    rounds = _rounds(prompts)
    parts = [_no_scores(tuple(prompts))]
    with unchanged_in_eval_mode(sam):
        for index in range(len(images)) if indices is None else indices:
            parts.append(_score_image(sam, images.item(index), index, tuple(prompts), rounds))
            if on_image is not None:
                on_image()
    return join_scores(parts)


def join_scores(parts: Sequence[ObjectScores]) -> ObjectScores:
    """Rows of several evaluations of the same kinds as one, sorted by image and object."""
    columns = [np.concatenate(column) for column in list(zip(*parts, strict=True))[1:]]
    order = np.lexsort((columns[1], columns[0]))
    return ObjectScores(parts[0].kinds, *(column[order] for column in columns))


def headline(scores: ObjectScores) -> dict[str, float]:
    """Mean over objects by name: `point_miou`, `point_mdice`, `box_miou`, ...

    Raises:
        DataError: there are no objects.
    """
    _refuse_empty(scores)
    means = {}
    for column, kind in enumerate(scores.kinds):
        means[f"{kind}_miou"] = float(scores.iou[:, column].mean())
        means[f"{kind}_mdice"] = float(scores.dice[:, column].mean())
    return means


def summarize(scores: ObjectScores, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Mean IoU and dice by kind of prompt: over objects with a 95 % interval, over images, by object size.

    The interval is a percentile bootstrap over images (Efron 1979): objects of one image are not independent.

    Raises:
        DataError: there are no objects.
    """
    _refuse_empty(scores)
    _, image = np.unique(scores.image, return_inverse=True)
    counts = _draw_images(int(image.max()) + 1, resamples, seed)
    prompts = {
        kind: {
            **_measures("miou", scores.iou[:, column], image, counts),
            **_measures("mdice", scores.dice[:, column], image, counts),
            "by_size": _by_size(scores, column),
        }
        for column, kind in enumerate(scores.kinds)
    }
    return {"images": int(image.max()) + 1, "objects": len(scores.area), "prompts": prompts}


def choose_device(name: str) -> torch.device:
    """The device called "auto" (CUDA where there is one), "cpu" or "cuda".

    Raises:
        SamletError: another name, or CUDA where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise SamletError(f"device: '{name}' is not one of auto, cpu and cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise SamletError("device: 'cuda' was asked for, and there is no CUDA GPU here; set it to auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def encode_image(sam: Sam, image: np.ndarray) -> Encoded:
    """Run the image encoder on an RGB image of any size."""
    pixels, input_size = preprocess(image, sam.image_size)
    features = sam.encode(pixels[None].to(_device(sam)))
    return Encoded(sam, features, input_size, (image.shape[0], image.shape[1]))


def answer(
    encoded: Encoded,
    *,
    clicks: Sequence[Sequence[Click]] = (),
    boxes: Float32[np.ndarray, "P 4"] | None = None,
    mask_input: Float[Tensor, "P 1 h w"] | None = None,
    multimask: bool = False,
) -> Answer:
    """One mask for each row of equally many clicks, or each box; of three the one with the highest predicted IoU."""
    sam, device = encoded.sam, _device(encoded.sam)

    def place(coords: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(coords.astype(np.float32)).to(device)
        return to_input_coords(tensor, encoded.original_size, encoded.input_size)

    table = np.array(clicks, np.int64) if len(clicks) else None  # P, N, (x, y, label)
    count = len(clicks) if boxes is None else len(boxes)
    prompts = make_prompts(
        torch.zeros(count, dtype=torch.int64, device=device),
        points=None if table is None else place(table[..., :2]),
        labels=None if table is None else torch.from_numpy(table[..., 2]).to(device),
        boxes=None if boxes is None else place(boxes.reshape(-1, 2, 2)).reshape(-1, 4),
        mask_input=mask_input,
    )
    output = sam.decode(encoded.features, prompts, multimask_output=multimask)
    rows = torch.arange(count, device=device)
    best = output.iou_predictions.argmax(dim=1)
    logits = output.low_res_logits[rows, best][:, None]
    full = postprocess_masks(logits, encoded.input_size, encoded.original_size, sam.image_size)
    return Answer(full[:, 0] > 0, logits, output.iou_predictions[rows, best])


def correction_click(predicted: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"]) -> Click | None:
    """The most interior pixel of the largest connected error; None where there is none.

    Positive where the object was missed, negative where the mask overshoots; missed wins a tie.
    """
    missed, extra = _largest_region(truth & ~predicted), _largest_region(predicted & ~truth)
    is_missed = np.count_nonzero(missed) >= np.count_nonzero(extra)
    region = missed if is_missed else extra
    if not region.any():
        return None
    return Click(*centre_point(region), POSITIVE if is_missed else NEGATIVE)


def _rounds(prompts: Sequence[str]) -> tuple[int, ...]:
    rounds = []
    for kind in prompts:
        number = kind.removeprefix(CLICKS)
        if kind.startswith(CLICKS) and number.isdecimal() and int(number) > 0:
            rounds.append(int(number))
        elif kind not in (POINT, BOX):
            raise SamletError(
                f"prompts: '{kind}' is no kind of prompt; there are point, box and clicks_1, clicks_2, ..."
            )
    return tuple(rounds)


def _no_scores(kinds: tuple[str, ...]) -> ObjectScores:
    none = np.zeros(0, np.int64)
    return ObjectScores(kinds, none, none, none, np.zeros((0, len(kinds))), np.zeros((0, len(kinds))))


def _refuse_empty(scores: ObjectScores) -> None:
    if not len(scores.area):
        raise DataError("evaluation: there is no object to score; `samlet check-data` says what was found")


@contextmanager
def unchanged_in_eval_mode(sam: nn.Module) -> Iterator[None]:
    """Evaluation mode without autocast and gradient; each module's own mode comes back, frozen BatchNorms included."""
    modes = [(module, module.training) for module in sam.modules()]
    sam.eval()
    try:
        with torch.no_grad(), torch.autocast(_device(sam).type, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _device(sam: nn.Module) -> torch.device:
    return next(sam.parameters()).device


def _score_image(
    sam: Sam, item: EvalImage, index: int, kinds: tuple[str, ...], rounds: tuple[int, ...]
) -> ObjectScores:
    count = len(item.masks)
    if not count:
        return _no_scores(kinds)
    encoded = encode_image(sam, item.image)
    pixels = sam.image_size**2 + item.image.shape[0] * item.image.shape[1]
    chunk = min(max(MAX_PIXELS // pixels, 1), MAX_PROMPTS)
    overlaps = [
        _score_objects(encoded, item, slice(start, start + chunk), kinds, rounds) for start in range(0, count, chunk)
    ]
    table = np.concatenate(overlaps)
    area = item.masks.sum(axis=(1, 2), dtype=np.int64)
    return ObjectScores(kinds, np.full(count, index, np.int64), np.arange(count), area, table[..., 0], table[..., 1])


def _score_objects(
    encoded: Encoded, item: EvalImage, where: slice, kinds: tuple[str, ...], rounds: tuple[int, ...]
) -> Float64[np.ndarray, "P K 2"]:
    """(IoU, dice) of some objects of an image by kind of prompt."""
    truth = torch.from_numpy(item.masks[where]).to(_device(encoded.sam))
    found: dict[str, np.ndarray] = {}
    if BOX in kinds:
        found[BOX] = _overlap(answer(encoded, boxes=item.boxes[where]).masks, truth)
    if POINT in kinds or rounds:
        clicks = [[Click(int(x), int(y), POSITIVE)] for x, y in item.points[where]]
        first = answer(encoded, clicks=clicks, multimask=True)
        found[POINT] = _overlap(first.masks, truth)
        if rounds:
            found |= _correct(encoded, clicks, first, truth, rounds)
    return np.stack([found[kind] for kind in kinds], axis=1)


def _correct(
    encoded: Encoded,
    clicks: list[list[Click]],
    first: Answer,
    truth: Bool[Tensor, "P H W"],
    rounds: tuple[int, ...],
) -> dict[str, np.ndarray]:
    """Click into the largest error again and again, feeding the last logits back; a perfect mask is left alone."""
    masks, low_res = first.masks.clone(), first.low_res_logits.clone()
    wanted = truth.cpu().numpy()
    found = {}
    for done in range(1, max(rounds) + 1):
        errors = list(map(correction_click, masks.cpu().numpy(), wanted))
        going = [row for row, click in enumerate(errors) if click is not None]
        clicks = [[*row, click] if click else row for row, click in zip(clicks, errors, strict=True)]
        if going:
            reply = answer(encoded, clicks=[clicks[row] for row in going], mask_input=low_res[going])
            masks[going], low_res[going] = reply.masks, reply.low_res_logits
        if done in rounds:
            found[f"{CLICKS}{done}"] = _overlap(masks, truth)
    return found


def _overlap(predicted: Bool[Tensor, "P H W"], truth: Bool[Tensor, "P H W"]) -> Float64[np.ndarray, "P 2"]:
    """IoU and dice, from whole numbers of pixels."""
    both = (predicted & truth).flatten(1).sum(dim=1).cpu().numpy().astype(np.float64)
    areas = (predicted.flatten(1).sum(dim=1) + truth.flatten(1).sum(dim=1)).cpu().numpy().astype(np.float64)
    return np.stack([both / np.maximum(areas - both, 1), 2 * both / np.maximum(areas, 1)], axis=1)


def _largest_region(region: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """The largest part of a mask that hangs together over edges; of equals the one met first from the top."""
    from scipy.ndimage import label

    if not region.any():
        return region
    x0, y0, x1, y1 = mask_box(region)
    numbers, _ = label(region[y0:y1, x0:x1])
    largest = np.zeros_like(region)
    largest[y0:y1, x0:x1] = numbers == 1 + int(np.bincount(numbers.ravel())[1:].argmax())
    return largest


def _draw_images(count: int, resamples: int, seed: int) -> Int64[np.ndarray, "R I"]:
    """How often each image is in each resample."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)


def _measures(
    name: str, values: Float64[np.ndarray, "O"], image: Int64[np.ndarray, "O"], counts: Int64[np.ndarray, "R I"]
) -> dict[str, Any]:
    sums, objects = np.bincount(image, values), np.bincount(image)
    measures: dict[str, Any] = {name: float(values.mean()), f"{name}_over_images": float((sums / objects).mean())}
    if len(counts):
        drawn = (counts * sums).sum(axis=1) / (counts * objects).sum(axis=1)
        measures[f"{name}_interval"] = [float(edge) for edge in np.percentile(drawn, [2.5, 97.5])]
    return measures


def _by_size(scores: ObjectScores, column: int) -> dict[str, dict[str, Any]]:
    rows = {}
    for size, (low, high) in SIZES.items():
        inside = (scores.area >= low) & (scores.area < high)
        count = int(inside.sum())
        rows[size] = {
            "objects": count,
            "miou": float(scores.iou[inside, column].mean()) if count else None,
            "mdice": float(scores.dice[inside, column].mean()) if count else None,
        }
    return rows
