"""What a training step does, term by term and part by part: values, gradients, times, and what it moved.

Everything is read from the step that trains: its own terms, its own optimizer. Gradients are of the weighted terms.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from samlet.distill.answers import best_iou
from samlet.distill.objectives import Objective
from samlet.distill.teacher import LiveTeacher
from samlet.distill.views import View
from samlet.engine.chunks import chunks_of, part_of
from samlet.engine.evaluation import unchanged_in_eval_mode
from samlet.types import Batch, ImageFeatures, MaskOutput

if TYPE_CHECKING:
    from pathlib import Path

    from torch.utils.hooks import RemovableHandle

    from samlet.distill.store import Identity
    from samlet.distill.teacher import Lesson, TeacherTeam
    from samlet.engine.step import TrainStep
    from samlet.models.sam import Sam
    from samlet.types import Terms

# Relative rms by which a faithful store may differ from its teacher: rounding by its dtype, and by the arithmetic.
ROUNDING = {"fp32": 1e-5, "fp16": 2e-3, "int8": 3e-2}
ARITHMETIC = {"fp32": 0.0, "fp16": 5e-3, "bf16": 3e-2}

MODULES = ("image_encoder", "prompt_encoder", "mask_decoder", "projections")


class TermReading(NamedTuple):
    """One term on one batch."""

    raw: float
    weighted: float
    gradients: dict[str, float]  # L2 norm of the weighted term's gradient, by module; one it does not reach is 0
    milliseconds: float  # of the term alone, forward and backward to what it compares


class StoreReading(NamedTuple):
    """How far a store's features are from what its teacher says of the same pixels now."""

    teacher: str
    root: str
    dtype: str
    differences: dict[str, float]  # rms(stored - live) / rms(live), by feature
    allowed: float


def compare_stores(
    identity: Identity,
    root: Path,
    live: Sequence[Mapping[str, Tensor]],
    stored: Sequence[Mapping[str, Tensor]],
    arithmetic: str,
) -> StoreReading:
    """Relative rms over all images, by feature; features of each image by name, in float32."""
    differences = {}
    for name in live[0]:
        squares = sum(float(one[name].double().square().sum()) for one in live)
        errors = zip(live, stored, strict=True)
        wrong = sum(float((one[name].double() - other[name].double()).square().sum()) for one, other in errors)
        differences[name] = (wrong / squares) ** 0.5 if squares else math.inf
    allowed = max(ROUNDING[identity.dtype], ARITHMETIC[identity.precision], ARITHMETIC[arithmetic])
    return StoreReading(identity.teacher, str(root), identity.dtype, differences, allowed)


class Stopwatch:
    """Seconds by name; a GPU is waited for at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.open: list[str] = []  # what is being timed

    def now(self) -> float:
        """The time, once all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Add the time of a block."""
        began = self.now()
        self.open.append(name)
        yield
        self.open.remove(name)
        self.add(name, self.now() - began)

    def add(self, name: str, seconds: float) -> None:
        """Add to a name's seconds."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def read_terms(step: TrainStep, batch: Batch, teach: Callable[[Batch], tuple[Lesson, ...]], counts: Any) -> Reading:
    """Every term of a batch, with its gradient into each module and its own cost; nothing is stepped."""
    watch = Stopwatch(batch.pixels.device)
    with _listening(step, watch):
        lessons = teach(batch)
        _, terms = step(batch, lessons, counts)
    trainable = [(name, parameter) for name, parameter in step.named_parameters() if parameter.requires_grad]
    readings = {
        name: TermReading(
            raw=float(terms.raw[name].detach()),
            weighted=float(value.detach()),
            gradients=_norms(value, trainable),
            milliseconds=1000 * watch.seconds.get(name, 0.0),
        )
        for name, value in terms.weighted.items()
    }
    return Reading(readings, *_judged_by_truth(step, batch, lessons), _weights(step, terms))


@dataclass(frozen=True)
class Reading:
    """What one batch showed."""

    terms: dict[str, TermReading]
    student_iou: float | None  # of the best answering mask, mean over prompts with ground truth; None: there are none
    teacher_iou: dict[str, float]
    weights: dict[str, float]


def _weights(step: TrainStep, terms: Terms) -> dict[str, float]:
    task = {f"task/{name}": weight for name, weight in step.task_weights.items()}
    distilled = {f"distill/{objective.name}": step.lambda_coef * objective.weight for objective in step.objectives}
    known = task | distilled
    return {name: known.get(name, 1.0) for name in terms.weighted}


def _norms(value: Tensor, trainable: Sequence[tuple[str, nn.Parameter]]) -> dict[str, float]:
    squares = dict.fromkeys(MODULES, 0.0)
    if value.requires_grad:
        parameters = [parameter for _, parameter in trainable]
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        for (name, _), gradient in zip(trainable, found, strict=True):
            if gradient is not None:
                squares[module_of(name)] += float(gradient.double().square().sum())
    return {name: square**0.5 for name, square in squares.items()}


def module_of(name: str) -> str:
    """The module that a parameter of the training step belongs to."""
    return name.removeprefix("student.").partition(".")[0]


def _judged_by_truth(step: TrainStep, batch: Batch, lessons: Sequence[Lesson]) -> tuple[float | None, dict[str, float]]:
    if not bool(batch.labelled.any()):
        return None, {}
    student, own = step.student, list[Tensor]()
    theirs: dict[str, list[Tensor]] = {lesson.name: [] for lesson in lessons}
    with unchanged_in_eval_mode(student):
        features = student.encode(batch.pixels)
        for rows in chunks_of(batch, step.prompts_per_chunk):
            part = part_of(batch, rows)
            own.append(best_iou(student.decode(features, part.prompts, multimask_output=None), part))
            for lesson in lessons:
                theirs[lesson.name].append(best_iou(lesson.answer(part.prompts), part))
    return _mean(torch.cat(own), batch), {name: _mean(torch.cat(found), batch) for name, found in theirs.items()}


def _mean(found: Tensor, batch: Batch) -> float:
    return float(found[batch.labelled].mean())


@contextmanager
def _listening(step: TrainStep, watch: Stopwatch) -> Iterator[None]:
    """Let each term be timed on copies of what it compares, while it is computed as ever."""
    before = step.of_images, step.of_prompts, step.task_loss
    step.of_images = tuple(_timed(objective, watch) for objective in step.of_images)
    step.of_prompts = tuple(_timed(objective, watch) for objective in step.of_prompts)
    step.task_loss = _timed_task(before[2], watch)
    try:
        yield
    finally:
        step.of_images, step.of_prompts, step.task_loss = before


def _timed(objective: Objective, watch: Stopwatch) -> Objective:
    def compare(student: View, teacher: View, batch: Batch) -> Tensor:
        copies, leaves = _leaves(student)
        with watch.running(f"distill/{objective.name}"), torch.enable_grad(), _kept_as_ever():
            torch.autograd.grad(objective.compare(copies, teacher, batch).sum(), leaves, allow_unused=True)
        return objective.compare(student, teacher, batch)

    return objective._replace(compare=compare)


def _timed_task(loss: Callable[..., dict[str, Tensor]], watch: Stopwatch) -> Any:
    def timed(logits: Tensor, iou: Tensor, *rest: Tensor, **settings: Any) -> dict[str, Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (logits, iou)]
        with torch.enable_grad(), _kept_as_ever():
            began = watch.now()
            terms = loss(*leaves, *rest, **settings)
            shared = (watch.now() - began) / len(terms)  # the three are computed together
            for name, value in terms.items():
                with watch.running(f"task/{name}"):
                    torch.autograd.grad(value.sum(), leaves, allow_unused=True, retain_graph=True)
                watch.add(f"task/{name}", shared)
        return loss(logits, iou, *rest, **settings)

    return timed


def _kept_as_ever() -> torch.autograd.graph.saved_tensors_hooks:
    """For a backward pass of its own inside a chunk that is computed again, which this is no part of."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _leaves(view: View) -> tuple[View, list[Tensor]]:
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        copy = tensor.detach()
        if copy.is_floating_point():
            leaves.append(copy.requires_grad_())
        return copy

    features, output = view
    return View(
        ImageFeatures(leaf(features.embedding), {name: leaf(tap) for name, tap in features.taps.items()}),
        MaskOutput(
            leaf(output.low_res_logits),
            leaf(output.iou_predictions),
            leaf(output.mask_tokens),
            {name: leaf(tap) for name, tap in output.taps.items()},
        ),
    ), leaves


@dataclass
class StepTimes:
    """Seconds of the parts of one optimizer step over all its micro-batches."""

    data: float = 0.0
    teacher: float = 0.0
    student: float = 0.0  # forward, with the losses
    backward: float = 0.0  # with clipping, and with what chunks of prompts compute once more for it
    optimizer: float = 0.0
    parts: tuple[str, ...] = field(default=("data", "teacher", "student", "backward", "optimizer"), repr=False)

    def seconds(self) -> dict[str, float]:
        """By part, in the order in which they run."""
        return {part: getattr(self, part) for part in self.parts}

    @property
    def computing(self) -> float:
        """All but the data, which workers may prepare meanwhile."""
        return self.teacher + self.student + self.backward


@contextmanager
def timing(step: TrainStep, team: TeacherTeam | None, optimizer: torch.optim.Optimizer) -> Iterator[StepTimes]:
    """Time the parts of the one optimizer step that is taken inside.

    From its first forward pass to the optimizer, what is neither forward nor the teachers' encoding is backward.
    """
    watch = Stopwatch(next(step.parameters()).device)
    times, marks = StepTimes(), dict[str, float]()

    def mark(name: str) -> Callable[..., None]:
        def note(*_: Any, **__: Any) -> None:
            marks[name] = watch.now()

        return note

    def first() -> None:
        if "first" not in marks:
            marks["first"], marks["encoded"] = watch.now(), watch.seconds.get("encode", 0.0)

    with ExitStack() as stack:
        hooks: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(mark("optimizer")),
            optimizer.register_step_post_hook(mark("end")),
        ]
        for hook in hooks:
            stack.callback(hook.remove)
        stack.enter_context(_timed_forward(step, watch, before=first))
        for teacher in team.teachers if team is not None else ():
            stack.enter_context(_timed_teacher(teacher, watch))
        yield times
    encoded, answered, forward = (watch.seconds.get(name, 0.0) for name in ("encode", "decode", "forward"))
    times.teacher = encoded + answered
    times.student = max(forward - answered, 0.0)
    if "end" in marks:  # a step that was left out has none
        times.backward = marks["optimizer"] - marks["first"] - forward - (encoded - marks["encoded"])
        times.optimizer = marks["end"] - marks["optimizer"]


@contextmanager
def _timed_forward(step: TrainStep, watch: Stopwatch, before: Callable[[], None]) -> Iterator[None]:
    own = vars(step).get("forward")  # accelerate puts one there for mixed precision
    forward = step.forward

    def call(*given: Any, **named: Any) -> Any:
        before()
        with watch.running("forward"):
            return forward(*given, **named)

    step.forward = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del step.forward
        else:
            step.forward = own  # type: ignore[method-assign]


@contextmanager
def _timed_teacher(teacher: Any, watch: Stopwatch) -> Iterator[None]:
    def timed(verb: str) -> Callable[..., Any]:
        method = getattr(teacher, verb)

        def call(*given: Any) -> Any:
            if verb == "decode" and "forward" not in watch.open:  # once more, for the backward pass
                return method(*given)
            with watch.running(verb):
                return method(*given)

        return call

    verbs = ("encode", "decode")
    for verb, call in [(verb, timed(verb)) for verb in verbs]:
        setattr(teacher, verb, call)
    try:
        yield
    finally:
        for verb in verbs:
            delattr(teacher, verb)


class Still:
    """What no step may move: frozen parts, fixed buffers, BatchNorm statistics that are kept, teachers.

    Judged by what the configuration says, not by how the modules were set up, which may be the fault.
    """

    def __init__(self, step: TrainStep, team: TeacherTeam | None, frozen: Sequence[str], batch_norm: str) -> None:
        self.step, self.teachers = step, [t for t in (team.teachers if team else ()) if isinstance(t, LiveTeacher)]
        layers = [name for name, module in step.named_modules() if isinstance(module, nn.BatchNorm2d)]
        follow = [f"{name}." for name in layers if batch_norm == "train" and module_of(name) not in frozen]
        self.parameters = {
            name: parameter.detach().clone()
            for name, parameter in step.named_parameters()
            if module_of(name) in frozen or not parameter.requires_grad
        }
        self.buffers = {
            name: buffer.detach().clone()
            for name, buffer in step.named_buffers()
            if not any(name.startswith(layer) for layer in follow)
        }
        self.prints = {teacher.name: _fingerprint(teacher.sam) for teacher in self.teachers}

    @property
    def count(self) -> int:
        """Tensors of the training step that are watched."""
        return len(self.parameters) + len(self.buffers)

    def moved(self) -> list[str]:
        """Names of what has moved all the same."""
        now: Mapping[str, Tensor] = dict(self.step.named_parameters()) | dict(self.step.named_buffers())
        names = [name for name, was in (self.parameters | self.buffers).items() if not torch.equal(was, now[name])]
        names += [f"teacher {one.name}" for one in self.teachers if _fingerprint(one.sam) != self.prints[one.name]]
        return [name.removeprefix("student.") for name in names]


@torch.no_grad()
def _fingerprint(sam: Sam) -> tuple[float, ...]:
    """Sums that a changed weight changes, without a second copy of a large model."""
    return tuple(
        float(tensor.double().sum()) + float(tensor.double().abs().sum()) for tensor in sam.state_dict().values()
    )
