"""The training step: means that no split changes, gradients that reach what they should (PITFALLS 1, 7, 10, 31, 33)."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch

from samlet.data.batches import collate
from samlet.data.configs import AugmentationConfig, DatasetConfig, PromptConfig
from samlet.data.dataset import SegmentationDataset
from samlet.data.sampler import SampleKey
from samlet.distill.answers import is_ambiguous
from samlet.distill.configs import DistillationConfig
from samlet.distill.objectives import build_objectives
from samlet.distill.teacher import LiveTeacher, TeacherTeam
from samlet.engine.audit import audit_gradients
from samlet.engine.step import Counts, TrainStep, count_images
from samlet.errors import SamletError
from samlet.losses.configs import TaskLossConfig
from samlet.models import Sam, build_sam
from samlet.types import Batch, Terms
from tests.tiny import IMAGE_SIZE, STUDENT, TEACHER, write_scenes

TERMS = ("encoder_patch", "prompt_embed", "decoder_mask_token", "dense_mask_logits")
NO_TASK = TaskLossConfig(focal=0.0, dice=0.0, iou=0.0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SegmentationDataset:
    config = DatasetConfig(
        root=write_scenes(tmp_path_factory.mktemp("scenes")),
        objects_per_image=3,
        labelled_fraction=0.5,
        unlabelled="use",
    )
    return config.build_train(
        image_size=IMAGE_SIZE, seed=0, prompts=PromptConfig(), augmentation=AugmentationConfig(enable=False)
    )


@pytest.fixture(scope="module")
def batches(dataset: SegmentationDataset) -> list[Batch]:
    """Six images one by one, labelled and unlabelled ones among them."""
    return [collate([dataset[SampleKey(0, index)]]) for index in range(6)]


@pytest.fixture(scope="module")
def batch(dataset: SegmentationDataset) -> Batch:
    return collate([dataset[SampleKey(0, index)] for index in range(6)])


def make_student(seed: int = 0) -> Sam:
    torch.manual_seed(seed)
    return build_sam("vit_t", IMAGE_SIZE, **STUDENT).eval()


def make_team(config: DistillationConfig, *seeds: int, weights: tuple[float, ...] = (1.0,)) -> TeacherTeam:
    objectives = build_objectives(config)
    decoder_taps = sorted({tap for objective in objectives for tap in objective.decoder_taps})
    teachers = []
    for seed in seeds:
        torch.manual_seed(seed)
        sam = build_sam("vit_b", IMAGE_SIZE, **TEACHER)
        teachers.append(LiveTeacher(f"teacher {seed}", sam, (), decoder_taps))
    return TeacherTeam(teachers, weights)


def only(name: str, **settings: Any) -> DistillationConfig:
    blocks: dict[str, Any] = {term: {"enable": term == name} for term in TERMS}
    if name:
        blocks[name] |= settings
    return DistillationConfig.model_validate({"enable": True, **blocks})


def every_term() -> DistillationConfig:
    return DistillationConfig.model_validate({"enable": True, **{term: {"enable": True} for term in TERMS}})


def counts_of(batch: Batch) -> Counts:
    return Counts(*map(float, count_images([batch])))


@pytest.mark.parametrize("name", TERMS)
def test_each_term_alone_reaches_the_student_and_nothing_else(batch: Batch, name: str) -> None:
    config = only(name)
    team = make_team(config, 1)
    step = TrainStep(make_student(), NO_TASK, build_objectives(config))
    loss, _ = step(batch, team.teach(batch), counts_of(batch))
    loss.backward()
    encoder = step.student.get_parameter("image_encoder.neck.0.weight").grad
    assert encoder is not None
    assert float(encoder.abs().sum()) > 0
    decoder = sum(float(p.grad.abs().sum()) for p in step.student.mask_decoder.parameters() if p.grad is not None)
    assert (decoder > 0) is (name in ("decoder_mask_token", "dense_mask_logits"))
    teacher = team.teachers[0]
    assert isinstance(teacher, LiveTeacher)
    assert all(parameter.grad is None for parameter in teacher.sam.parameters())


@pytest.mark.parametrize("name", TERMS)
def test_each_term_alone_brings_the_student_nearer(batch: Batch, name: str) -> None:
    config = only(name)
    lessons = make_team(config, 1).teach(batch)
    step = TrainStep(make_student(), NO_TASK, build_objectives(config))
    optimizer = torch.optim.Adam(step.parameters(), lr=3e-3)
    values = []
    for _ in range(12):
        loss, _ = step(batch, lessons, counts_of(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.9 * values[0]


def test_a_batch_is_the_mean_of_its_images(batch: Batch, batches: list[Batch]) -> None:
    config = every_term()
    team = make_team(config, 1)
    step = TrainStep(make_student(), TaskLossConfig(), build_objectives(config))
    counts = counts_of(batch)
    assert counts == Counts(6, 3, 3)
    with torch.no_grad():
        _, together = step(batch, team.teach(batch), counts)
        parts = [step(part, team.teach(part), counts)[1] for part in batches]
    for name, value in together.raw.items():
        torch.testing.assert_close(value, torch.stack([part.raw[name] for part in parts]).sum(), rtol=1e-4, atol=1e-6)


def test_gradients_of_a_split_step_add_up(batch: Batch, batches: list[Batch]) -> None:
    config = every_term()
    team = make_team(config, 1)
    counts = counts_of(batch)
    whole, split = (TrainStep(make_student(), TaskLossConfig(), build_objectives(config)) for _ in range(2))
    whole(batch, team.teach(batch), counts)[0].backward()
    for part in batches:
        split(part, team.teach(part), counts)[0].backward()
    for (name, one), (_, other) in zip(whole.named_parameters(), split.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=2e-3, atol=2e-5)


def test_two_teachers_are_their_weighted_sum(batch: Batch) -> None:
    config = every_term()
    step = TrainStep(make_student(), NO_TASK, build_objectives(config))
    with torch.no_grad():
        both = step(batch, make_team(config, 1, 2, weights=(0.7, 0.3)).teach(batch), counts_of(batch))[1]
        first, second = (step(batch, make_team(config, seed).teach(batch), counts_of(batch))[1] for seed in (1, 2))
    for name, value in both.raw.items():
        torch.testing.assert_close(value, 0.7 * first.raw[name] + 0.3 * second.raw[name], rtol=1e-5, atol=1e-7)


def test_a_student_that_is_its_teacher_pays_nothing(batch: Batch) -> None:
    config = every_term()
    student = make_student()
    twin = build_sam(**student.arch)
    twin.load_state_dict(student.state_dict())
    taps = sorted({tap for objective in build_objectives(config) for tap in objective.decoder_taps})
    team = TeacherTeam([LiveTeacher("twin", twin, (), taps)], [1.0])
    step = TrainStep(student, NO_TASK, build_objectives(config))
    _, terms = step(batch, team.teach(batch), counts_of(batch))
    for name in TERMS:
        assert abs(float(terms.raw[f"distill/{name}"].detach())) < 1e-5


def test_lambda_and_weights_scale_the_weighted_terms(batch: Batch) -> None:
    config = only("dense_mask_logits", weight=3.0)
    step = TrainStep(make_student(), TaskLossConfig(), build_objectives(config), lambda_coef=0.5)
    with torch.no_grad():
        loss, terms = step(batch, make_team(config, 1).teach(batch), counts_of(batch))
    torch.testing.assert_close(
        terms.weighted["distill/dense_mask_logits"], 1.5 * terms.raw["distill/dense_mask_logits"]
    )
    torch.testing.assert_close(terms.weighted["task/focal"], 20 * terms.raw["task/focal"])
    torch.testing.assert_close(loss, torch.stack(list(terms.weighted.values())).sum())


def test_unlabelled_images_teach_through_the_teacher_alone(batches: list[Batch]) -> None:
    blind = next(part for part in batches if not part.labelled.any())
    config = only("dense_mask_logits")
    step = TrainStep(make_student(), TaskLossConfig(), build_objectives(config))
    _, terms = step(blind, make_team(config, 1).teach(blind), Counts(1, 0, 0))
    assert all(float(terms.raw[f"task/{name}"].detach()) == 0 for name in ("focal", "dice", "iou"))
    assert float(terms.raw["distill/dense_mask_logits"].detach()) > 0


def test_the_encoder_runs_once_for_all_objects_of_a_step(batch: Batch) -> None:
    step = TrainStep(make_student(), TaskLossConfig())
    with patch.object(step.student, "encode", wraps=step.student.encode) as encode, torch.no_grad():
        step(batch, (), counts_of(batch))
    assert encode.call_count == 1
    assert batch.prompts.image_index.numel() > 6


def test_nothing_survives_a_forward(batch: Batch) -> None:
    step = TrainStep(make_student(), TaskLossConfig())
    step(batch, (), counts_of(batch))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in step.modules())
    assert not any(isinstance(value, torch.Tensor) for module in step.modules() for value in vars(module).values())


def test_single_clicks_alone_are_ambiguous(batch: Batch) -> None:
    ambiguous = is_ambiguous(batch)
    for place, labels in enumerate(batch.prompts.point_labels.tolist()):
        assert bool(ambiguous[place]) is (sum(label >= 0 for label in labels) == 1)
    assert ambiguous.any()
    assert not ambiguous.all()


def test_the_audit_refuses_a_term_that_teaches_nothing(batch: Batch) -> None:
    config = only("encoder_patch")
    step = TrainStep(make_student(), TaskLossConfig(), build_objectives(config))
    step.student.image_encoder.requires_grad_(False)
    _, terms = step(batch, make_team(config, 1).teach(batch), counts_of(batch))
    with pytest.raises(SamletError, match="distill/encoder_patch: has a weight, but its gradient reaches no"):
        audit_gradients(terms, step)


def test_the_audit_refuses_a_detached_term() -> None:
    module = torch.nn.Linear(2, 1)
    value = module(torch.ones(2)).sum()
    audit_gradients(Terms({"a": value}, {"a": value}, {}), module)
    with pytest.raises(SamletError, match="b: has a weight"):
        audit_gradients(Terms({"b": value}, {"b": value.detach()}, {}), module)


def test_a_block_tap_is_compared_through_the_neck(batch: Batch) -> None:
    config = only("encoder_patch", teacher_tap="blocks.-2", student_tap="blocks.-1")
    objective = build_objectives(config)[0]
    assert (objective.teacher_taps, objective.student_taps) == (("blocks.-2@neck",), ("blocks.-1@neck",))
    torch.manual_seed(1)
    teacher = LiveTeacher("T", build_sam("vit_b", IMAGE_SIZE, **TEACHER), objective.teacher_taps)
    lesson = TeacherTeam([teacher], [1.0]).teach(batch)[0]
    assert lesson.features.taps["blocks.-2@neck"].shape[1] == 256
    step = TrainStep(make_student(), NO_TASK, [objective])
    loss, _ = step(batch, (lesson,), counts_of(batch))
    loss.backward()
    projection = step.student.get_parameter("image_encoder.neck.0.weight").grad
    assert projection is None or not projection.any()
    blocks = [p.grad for name, p in step.student.named_parameters() if "image_encoder.layers" in name]
    assert any(gradient is not None and gradient.any() for gradient in blocks)


def test_a_tap_that_the_teacher_lacks_lists_those_it_has() -> None:
    with pytest.raises(SamletError, match=r"blocks.30.*blocks.0 to blocks.1"):
        LiveTeacher("T", build_sam("vit_b", IMAGE_SIZE, **TEACHER), ("blocks.30",))
