"""What brings a student's and a teacher's blocks to one shape where the model's own neck cannot.

learnt  a 1x1 convolution on the student's map, to the teacher's channels (FitNets, Romero et al. 2015,
        arXiv:1412.6550). The target is what the teacher says and no weight can move it: collapsing gains nothing.
pca     the teacher's map in its first 256 principal components, fitted at the start, kept with the run; the student's
        through a learnt convolution to as many. One number scales all components to variance 1 in the mean, so
        that their proportions, and the share of the variance that they keep, stay the teacher's.

The modules lie beside the student: in the optimizer and the run's checkpoints, never in the student's files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from samlet.artefacts import write_file
from samlet.distill.layers import Layer, on_coarser_grid, sampled_places, tapped
from samlet.distill.objectives import Objective
from samlet.distill.teacher import Lesson, TeacherTeam
from samlet.distill.views import View, channels_of
from samlet.errors import CheckpointError
from samlet.models.attention import cells_at, tokens_at
from samlet.types import Batch

if TYPE_CHECKING:
    from jaxtyping import Float

    from samlet.models.sam import Sam

COMPONENTS = 256
CELLS_PER_IMAGE = 1024  # that principal components are fitted on
VARIANCE_FLOOR = 1e-12


class PrincipalComponents(nn.Module):
    """z = W (x - mean) / scale for the rows W of an orthonormal basis; no parameters."""

    mean: Tensor
    components: Tensor
    scale: Tensor

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        # NaN until fitted: whoever forgets to fit gets no loss, rather than a target that is the same everywhere.
        self.register_buffer("mean", torch.full((channels,), torch.nan))
        self.register_buffer("components", torch.full((count, channels), torch.nan))
        self.register_buffer("scale", torch.full((), torch.nan))

    def forward(self, maps: Float[Tensor, "B C h w"]) -> Float[Tensor, "B K h w"]:
        """The components of each cell."""
        weight = self.components / self.scale
        return F.conv2d(maps.to(weight.dtype), weight[:, :, None, None], -(weight @ self.mean))

    @torch.no_grad()
    def fit(self, count: float, total: Float[Tensor, "C"], products: Float[Tensor, "C C"]) -> float:
        """From the number of cells, their sum and the sum of their outer products; the share of variance kept."""
        mean = total / count
        values, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
        kept = len(self.components)
        values, basis = values.clamp_min(0).flip(0), vectors.flip(1).t()[:kept]
        strongest = basis.gather(1, basis.abs().argmax(dim=1, keepdim=True))
        self.components.copy_(basis * torch.where(strongest < 0, -1.0, 1.0))  # an eigenvector has no sign of its own
        self.mean.copy_(mean)
        self.scale.copy_(values[:kept].mean().clamp_min(VARIANCE_FLOOR).sqrt())
        return float(values[:kept].sum() / values.sum().clamp_min(VARIANCE_FLOOR))


class LayerProjection(nn.Module):
    """Brings the maps of one layer to one shape; the convolution works on the student alone."""

    def __init__(self, key: str, student_channels: int, teacher_channels: int, principal: bool) -> None:
        super().__init__()
        outputs = min(COMPONENTS, teacher_channels) if principal else teacher_channels
        self.principal = PrincipalComponents(teacher_channels, outputs) if principal else None
        self.learnt = nn.Conv2d(student_channels, outputs, 1)
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little")
        with torch.no_grad():
            noise = torch.randn(self.learnt.weight.shape, generator=torch.Generator().manual_seed(seed))
            self.learnt.weight.copy_(noise / student_channels**0.5)
            self.learnt.bias.zero_()  # type: ignore[union-attr]

    def forward(self, student: Float[Tensor, "B C h w"], teacher: Float[Tensor, "B D h w"]) -> tuple[Tensor, Tensor]:
        """Student and teacher in the space where they are compared."""
        target = teacher.detach() if self.principal is None else self.principal(teacher.detach())
        return self.learnt(student.to(self.learnt.weight.dtype)), target


class Projections(nn.ModuleDict):
    """A `LayerProjection` for each layer of each term and each teacher that needs one."""

    def forward(self, objective: Objective, name: str, student: View, teacher: View, batch: Batch) -> tuple[View, View]:
        """The views with the projected maps among their taps; the views themselves where nothing is projected."""
        layers = [layer for layer in objective.layers if layer.has_weights]
        if not layers:
            return student, teacher
        of_student, of_teacher = dict(student.features.taps), dict(teacher.features.taps)
        for layer in layers:
            pair = on_coarser_grid(tapped(student, layer.student), tapped(teacher, layer.teacher), batch)
            found = self[key_of(objective.name, name, layer)](*pair)
            of_student[layer.name], of_teacher[layer.name] = found
        return (
            student._replace(features=student.features._replace(taps=of_student)),
            teacher._replace(features=teacher.features._replace(taps=of_teacher)),
        )


def key_of(term: str, teacher: str, layer: Layer) -> str:
    """Name of a projection; dots, which part the names of modules, are spelled out."""
    return f"{term}/{teacher}/{layer.name}".replace("%", "%25").replace(".", "%2E")


def build_projections(
    objectives: Sequence[Objective], student: Sam, team: TeacherTeam | None, batches: Iterable[Batch]
) -> Projections:
    """Every projection that these objectives need, not yet fitted; the first batch shows the teachers' shapes.

    Objectives of several stages may be given together. Without a layer to project no batch is taken.
    """
    projections = Projections()
    wanted = [(objective, layer) for objective in objectives for layer in objective.layers if layer.has_weights]
    if not wanted or team is None:
        return projections
    for lesson in team.teach(next(iter(batches))):
        for objective, layer in wanted:
            key = key_of(objective.name, lesson.name, layer)
            inputs, outputs = channels_of(student, layer.student), _of(lesson, layer).shape[1]
            if key not in projections:
                projections[key] = LayerProjection(key, inputs, outputs, layer.projection == "pca")
    return projections


@torch.no_grad()
def fit_projections(
    projections: Projections, objectives: Sequence[Objective], team: TeacherTeam | None, batches: Iterable[Batch]
) -> dict[str, float]:
    """Fit principal components to the teachers' maps of some batches; the share of variance that each keeps.

    Without components to fit no batch is taken. The same batches give the same components, in every process.
    """
    pairs = [(objective, layer) for objective in objectives for layer in objective.layers if layer.projection == "pca"]
    if not pairs or team is None:
        return {}
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}
    for batch in batches:
        places = sampled_places(batch, CELLS_PER_IMAGE)
        for lesson in team.teach(batch):
            for key, layer in {key_of(one.name, lesson.name, layer): layer for one, layer in pairs}.items():
                cells = _cells(_of(lesson, layer), places)
                count, total, products = sums.get(key, (0, torch.zeros(()), torch.zeros(())))
                sums[key] = (count + len(cells), total + cells.sum(dim=0), products + cells.t() @ cells)
    shares = {}
    for key, found in sums.items():
        module = projections[key]
        assert isinstance(module, LayerProjection)
        assert module.principal is not None
        shares[key] = module.principal.fit(*found)
    return shares


def _of(lesson: Lesson, layer: Layer) -> Float[Tensor, "B C h w"]:
    return lesson.features.embedding if layer.teacher == "neck" else lesson.features.taps[layer.teacher]


def _cells(maps: Float[Tensor, "B C h w"], places: Float[Tensor, "B N 2"]) -> Float[Tensor, "n C"]:
    size = (maps.shape[2], maps.shape[3])
    return tokens_at(maps.permute(0, 2, 3, 1), cells_at(places, size)).flatten(0, 1).double().cpu()


def save_projections(projections: Projections, path: Path) -> None:
    """Write weights and components as safetensors, whole or not at all."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in projections.state_dict().items()}
    write_file(path, lambda place: safetensors.torch.save_file(tensors, place))


def load_projections(projections: Projections, path: Path) -> None:
    """Fill projections of the same configuration from a file.

    Raises:
        CheckpointError: the file is missing or damaged, belongs to another configuration, or was never fitted.
    """
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as projections ({error})") from error
    own = {name: tuple(value.shape) for name, value in projections.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    if odd := sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name)):
        raise CheckpointError(
            f"{path}: not the projections of this configuration: {odd[0]} is {given.get(odd[0], 'missing')} in the "
            f"file and {own.get(odd[0], 'unknown')} here"
        )
    if bad := sorted(name for name, value in tensors.items() if not bool(torch.isfinite(value).all())):
        raise CheckpointError(f"{path}: {bad[0]} is not finite: it was saved before it was fitted")
    projections.load_state_dict(tensors)
