"""Projections: what they keep, that none can collapse, and that they are the same after a file and a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from samlet.distill.layers import Layer, on_coarser_grid
from samlet.distill.projections import (
    COMPONENTS,
    LayerProjection,
    PrincipalComponents,
    Projections,
    build_projections,
    fit_projections,
    load_projections,
    save_projections,
)
from samlet.distill.teacher import TeacherTeam
from samlet.engine.step import TrainStep
from samlet.errors import CheckpointError
from samlet.models import Sam
from samlet.types import Batch
from tests.distill.scenes import NO_TASK, counts_of, make_batch, make_sam_teacher, make_student, objectives_of, team_of

BLOCK = {"student_tap": "blocks.1", "teacher_tap": "blocks.0"}
FITTED_ON = (make_batch(0, 1), make_batch(2))


def cells_of(maps: torch.Tensor) -> torch.Tensor:
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def fit_on(cells: torch.Tensor, count: int) -> tuple[PrincipalComponents, float]:
    module, wide = PrincipalComponents(cells.shape[1], count), cells.double()
    return module, module.fit(len(cells), wide.sum(dim=0), wide.t() @ wide)


def built(projection: str, student: Sam | None = None, *teachers: Sam) -> tuple[TrainStep, TeacherTeam]:
    student = student or make_student()
    objectives = objectives_of(encoder_patch={**BLOCK, "projection": projection})
    team = team_of(objectives, *(teachers or (make_sam_teacher(),)))
    projections = build_projections(objectives, student, team, FITTED_ON)
    fit_projections(projections, objectives, team, FITTED_ON)
    return TrainStep(student, NO_TASK, objectives, projections=projections), team


def only_projection(step: TrainStep) -> LayerProjection:
    (module,) = step.projections.values()
    assert isinstance(module, LayerProjection)
    return module


def loss_of(step: TrainStep, team: TeacherTeam, batch: Batch) -> torch.Tensor:
    loss: torch.Tensor = step(batch, team.teach(batch), counts_of(batch))[0]
    return loss


def test_components_are_orthonormal_and_keep_the_most_variance() -> None:
    """The variance kept is that of the best subspace, found another way: by singular values."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(400, 12, generator=generator) @ torch.randn(12, 12, generator=generator) + 5
    module, share = fit_on(cells, 4)
    torch.testing.assert_close(module.components @ module.components.t(), torch.eye(4), rtol=1e-4, atol=1e-5)
    strengths = torch.linalg.svdvals((cells - cells.mean(dim=0)).double()).square()
    assert share == pytest.approx(float(strengths[:4].sum() / strengths.sum()), rel=1e-5)
    projected = cells_of(module(cells.view(1, 20, 20, 12).permute(0, 3, 1, 2)))
    torch.testing.assert_close(projected.mean(dim=0), torch.zeros(4), rtol=0, atol=1e-4)
    variances = projected.var(dim=0, unbiased=False)
    assert float(variances.mean()) == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(variances / variances.sum(), (strengths[:4] / strengths[:4].sum()).float())


def test_no_other_projection_to_as_many_channels_keeps_more() -> None:
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(400, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    centred = cells - cells.mean(dim=0)
    _, share = fit_on(cells, 4)
    for _ in range(20):
        basis = torch.linalg.qr(torch.randn(12, 4, generator=generator)).Q
        assert float((centred @ basis).square().sum() / centred.square().sum()) < share


def test_all_components_keep_all_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(50, 6, generator=generator) * torch.arange(1, 7) + 3
    module, share = fit_on(cells, 6)
    assert share == pytest.approx(1)
    projected = cells_of(module(cells.view(1, 5, 10, 6).permute(0, 3, 1, 2)))
    kept = torch.pdist(projected) * module.scale
    torch.testing.assert_close(kept, torch.pdist(cells), rtol=1e-4, atol=1e-4)


def test_what_was_never_fitted_is_nan_and_no_constant() -> None:
    assert PrincipalComponents(6, 3)(torch.randn(1, 6, 2, 2)).isnan().all()


def test_a_teacher_that_says_the_same_everywhere_has_finite_components() -> None:
    module, _ = fit_on(torch.ones(30, 5), 3)
    assert torch.isfinite(module(torch.ones(1, 5, 2, 2))).all()


@pytest.mark.parametrize("projection", ["learnt", "pca"])
def test_no_weight_moves_the_target_and_a_constant_student_pays_for_it(projection: str) -> None:
    """What a projection learns is on the student's side: the target stays, with all its variance."""
    step, team = built(projection)
    module, batch = only_projection(step), make_batch(0, 1, 2)
    teacher = team.teach(batch)[0].features.taps["blocks.0"]

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        student = step.student.encode(batch.pixels, ["blocks.1"]).taps["blocks.1"]
        said, target = module(on_coarser_grid(student, teacher, batch)[0], teacher)
        return said, target

    before = both()[1].clone()
    if projection == "learnt":
        assert torch.equal(before, teacher)
    optimizer = torch.optim.Adam(step.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(step, team, batch))
        optimizer.step()
    said, target = both()
    assert torch.equal(target, before)
    assert not target.requires_grad
    spread = [float(cells_of(maps).var(dim=0).mean()) for maps in (said.detach(), target)]
    assert spread[1] > 0.05
    assert spread[0] > 0.1 * spread[1], "the student's side has collapsed"
    with torch.no_grad():
        learnt = float(loss_of(step, team, batch))
        module.learnt.weight.zero_()
        assert float(loss_of(step, team, batch)) > 1.5 * learnt


def test_the_neck_as_projection_gives_the_student_no_way_out() -> None:
    step, team = built("neck", None)  # blocks of the last stage alone have its channels
    assert len(step.projections) == 0
    with pytest.raises(Exception, match="neck takes 32 channels"):
        loss_of(step, team, make_batch(0))


def test_components_of_a_real_teacher_keep_what_its_random_neck_does_not() -> None:
    """Of 32 channels all 32 components: the whole variance, while a fixed convolution weighs it anew."""
    objectives = objectives_of(encoder_patch={**BLOCK, "projection": "pca"})
    team = team_of(objectives, make_sam_teacher())
    projections = build_projections(objectives, make_student(), team, FITTED_ON)
    shares = fit_projections(projections, objectives, team, FITTED_ON)
    assert list(shares.values()) == [pytest.approx(1, rel=1e-5)]
    assert len(shares) == 1


def test_only_what_is_asked_for_is_built_and_only_then_is_a_batch_taken() -> None:
    def refuse() -> Batch:
        raise AssertionError("a batch was taken")

    none = objectives_of(encoder_patch={}, rkd={}, encoder_matching={"projection": "neck"})
    batches = (refuse() for _ in range(1))
    team = team_of(objectives_of(encoder_patch={}), make_sam_teacher())
    assert len(build_projections(none, make_student(), team, batches)) == 0
    assert fit_projections(Projections(), none, team, batches) == {}
    learnt = objectives_of(encoder_matching={"layers": 2})
    assert fit_projections(Projections(), learnt, team, batches) == {}
    assert len(build_projections(learnt, make_student(), None, batches)) == 0


def test_one_projection_for_each_layer_and_teacher() -> None:
    objectives = objectives_of(encoder_matching={"layers": 2}, encoder_patch={**BLOCK, "projection": "learnt"})
    team = team_of(objectives, make_sam_teacher(1), make_sam_teacher(2, embed_dim=24))
    projections = build_projections(objectives, make_student(), team, FITTED_ON)
    shapes = {name: tuple(value.shape) for name, value in projections.named_parameters() if name.endswith("weight")}
    assert len(shapes) == 6
    assert sorted(shape[0] for shape in shapes.values()) == [24] * 3 + [32] * 3


def test_they_start_alike_whatever_was_drawn_before() -> None:
    weights = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        module = LayerProjection("a key", 8, 16, principal=False)
        weights.append(module.learnt.weight)
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], LayerProjection("another key", 8, 16, principal=False).learnt.weight)
    assert LayerProjection("wide", 8, 1280, principal=True).learnt.out_channels == COMPONENTS
    assert LayerProjection("narrow", 8, 100, principal=True).learnt.out_channels == 100


@pytest.mark.parametrize("projection", ["learnt", "pca"])
def test_the_same_batches_give_the_same_projections(projection: str) -> None:
    first, second = (built(projection)[0].projections.state_dict() for _ in range(2))
    assert list(first) == list(second)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_they_lie_beside_the_student_and_never_in_its_files() -> None:
    step, _ = built("pca")
    assert not any("projection" in name for name in step.student.state_dict())
    assert any(name.startswith("projections.") for name, _ in step.named_parameters())
    assert {name.rpartition(".")[2] for name, _ in step.projections.named_buffers()} == {"mean", "components", "scale"}


@pytest.mark.parametrize("projection", ["learnt", "pca"])
def test_a_file_brings_them_back_to_the_bit(projection: str, tmp_path: Path) -> None:
    step, team = built(projection)
    torch.autograd.backward(loss_of(step, team, make_batch(0)))
    torch.optim.SGD(step.projections.parameters(), lr=0.1).step()
    save_projections(step.projections, tmp_path / "projections.safetensors")
    other, _ = built(projection, None, make_sam_teacher(5))
    load_projections(other.projections, tmp_path / "projections.safetensors")
    assert torch.equal(loss_of(other, team, make_batch(0)), loss_of(step, team, make_batch(0)))


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "projections.safetensors"
    step, _ = built("pca")
    with pytest.raises(CheckpointError, match="cannot be read as projections"):
        load_projections(step.projections, path)
    save_projections(step.projections, path)
    with pytest.raises(CheckpointError, match=r"not the projections of this configuration: .* is .*unknown here"):
        load_projections(Projections(), path)
    with pytest.raises(CheckpointError, match="not the projections of this configuration"):
        load_projections(built("learnt")[0].projections, path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="cannot be read as projections"):
        load_projections(step.projections, path)
    objectives = objectives_of(encoder_patch={**BLOCK, "projection": "pca"})
    unfitted = build_projections(objectives, make_student(), team_of(objectives, make_sam_teacher()), FITTED_ON)
    save_projections(unfitted, path)
    with pytest.raises(CheckpointError, match="saved before it was fitted"):
        load_projections(step.projections, path)
    assert all(value.isfinite().all() for value in step.projections.state_dict().values())
    assert safetensors.torch.load_file(path)


def test_the_finer_grid_is_pooled_and_padding_does_not_count() -> None:
    batch = make_batch(1)  # 64 x 40 of 64 x 64 are image
    fine, coarse = torch.randn(1, 3, 16, 16), torch.zeros(1, 5, 4, 4)
    pooled, same = on_coarser_grid(fine, coarse, batch)
    assert same is coarse
    torch.testing.assert_close(pooled[0, :, 0, 0], fine[0, :, :4, :4].mean(dim=(1, 2)))
    torch.testing.assert_close(pooled[0, :, 0, 2], fine[0, :, :4, 8:10].mean(dim=(1, 2)))  # half of the cell is image
    changed = fine.clone()
    changed[..., 10:] = 1e3
    assert torch.equal(on_coarser_grid(changed, coarse, batch)[0], pooled)
    other, still = on_coarser_grid(coarse, fine, batch)
    assert other is coarse
    assert torch.equal(still, pooled)


def test_names_of_layers_tell_them_apart() -> None:
    names = {Layer(one, other, "learnt").name for one in ("blocks.1", "blocks.11") for other in ("blocks.1", "neck")}
    assert len(names) == 4
