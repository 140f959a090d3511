"""Each of the later objectives in a real training step: what it moves, what it needs, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from samlet.distill.layers import PLACES, first_of_each, sampled_places
from samlet.distill.objectives import Objective
from samlet.distill.projections import Projections, build_projections, fit_projections
from samlet.distill.teacher import LiveTeacher, TeacherTeam
from samlet.engine.audit import audit_gradients
from samlet.engine.step import TrainStep
from samlet.errors import ConfigError, SamletError
from samlet.frames import valid_cells
from samlet.models import Sam, build_sam
from samlet.types import Batch, Terms
from tests.distill.scenes import (
    NO_TASK,
    counts_of,
    make_batch,
    make_sam_teacher,
    make_student,
    objectives_of,
    team_of,
)
from tests.tiny import IMAGE_SIZE

BLOCKS = [["blocks.-1", "blocks.-1"], ["blocks.1", "blocks.0"]]
WINDOWS = [["attention.-1", "attention.-1"], ["attention.1", "attention.0"]]
TERMS: dict[str, tuple[str, dict[str, Any]]] = {
    "encoder layers, learnt": ("encoder_matching", {"layers": 2}),
    "encoder layers, pca": ("encoder_matching", {"layers": BLOCKS, "projection": "pca"}),
    "encoder layers, neck": ("encoder_matching", {"layers": [["blocks.-1", "blocks.0"]], "projection": "neck"}),
    "one block, learnt": (
        "encoder_patch",
        {"student_tap": "blocks.1", "teacher_tap": "blocks.-1", "projection": "learnt"},
    ),
    "one block, pca": ("encoder_patch", {"student_tap": "blocks.1", "teacher_tap": "blocks.0", "projection": "pca"}),
    "decoder": ("decoder_matching", {}),
    "upscaled": ("decoder_matching", {"features": ["upscaled"]}),
    "attention of the decoder": ("attention_matching", {}),
    "every map of the decoder": (
        "attention_matching",
        {"decoder": ["0.self", "1.self", "0.image_to_token", "1.image_to_token", "final"]},
    ),
    "attention of the encoder": ("attention_matching", {"decoder": [], "encoder": WINDOWS, "resample": True}),
    "attention of both": ("attention_matching", {"encoder": WINDOWS[:1], "resample": True}),
    "relations": ("rkd", {"patches": 32}),
    "relations of blocks": ("rkd", {"patches": 32, "student_tap": "blocks.1", "teacher_tap": "blocks.0"}),
}
IN_DECODER = ("decoder", "upscaled", "attention of the decoder", "every map of the decoder", "attention of both")
every_term = pytest.mark.parametrize("case", TERMS)


def ready(case: str, *teachers: Sam, student: Sam | None = None) -> tuple[TrainStep, TeacherTeam]:
    """A step with one term, projections built and fitted, and the teachers for it."""
    name, settings = TERMS[case]
    objectives, student = objectives_of(**{name: settings}), student or make_student()
    team = team_of(objectives, *(teachers or (make_sam_teacher(),)))
    return TrainStep(student, NO_TASK, objectives, projections=fitted(objectives, student, team)), team


def fitted(objectives: tuple[Objective, ...], student: Sam, team: TeacherTeam) -> Projections:
    projections = build_projections(objectives, student, team, [make_batch(0, 1)])
    fit_projections(projections, objectives, team, [make_batch(0, 1), make_batch(2)])
    return projections


def run(step: TrainStep, team: TeacherTeam, batch: Batch) -> tuple[torch.Tensor, Terms]:
    loss, terms = step(batch, team.teach(batch), counts_of(batch))
    return loss, terms


def touched(module: torch.nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


@every_term
def test_a_term_alone_moves_what_it_should_and_nothing_else(case: str) -> None:
    step, team = ready(case)
    batch = make_batch(0, 1, 2)
    loss, terms = run(step, team, batch)
    assert float(loss.detach()) > 0
    assert list(terms.raw)[3:] == [f"distill/{TERMS[case][0]}"]
    audit_gradients(terms, step)
    torch.autograd.backward(loss)
    moved = touched(step.student)
    assert any(name.startswith("image_encoder.layers.0") for name in moved)
    in_decoder = {name for name in moved if not name.startswith("image_encoder.")}
    assert bool(in_decoder) is (case in IN_DECODER)
    if case == "decoder":
        assert {f"mask_decoder.output_hypernetworks_mlps.{i}.layers.2.weight" for i in range(4)} <= in_decoder
        assert "mask_decoder.output_upscaling.3.weight" in in_decoder
        assert not any("iou_prediction_head" in name for name in in_decoder)
    if case.startswith("attention of the decoder"):
        assert "mask_decoder.transformer.final_attn_token_to_image.k_proj.weight" in in_decoder
        assert not any("output_" in name for name in in_decoder)
    for teacher in team.teachers:
        assert isinstance(teacher, LiveTeacher)
        assert all(parameter.grad is None for parameter in teacher.sam.parameters())


@every_term
def test_a_term_alone_brings_the_student_nearer(case: str) -> None:
    """Its own distance, on places that it was not trained on."""
    step, team = ready(case)
    optimizer = torch.optim.Adam(step.parameters(), lr=3e-3)
    with torch.no_grad():
        before = [float(run(step, team, make_batch(0, 1, 2, draw=draw))[0]) for draw in range(1000, 1003)]
    for draw in range(60 if case == "encoder layers, neck" else 25):
        loss, _ = run(step, team, make_batch(0, 1, 2, draw=draw))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    with torch.no_grad():
        after = [float(run(step, team, make_batch(0, 1, 2, draw=draw))[0]) for draw in range(1000, 1003)]
    assert sum(after) < 0.93 * sum(before)


@every_term
def test_a_batch_is_the_mean_of_its_images_in_any_order(case: str) -> None:
    """Pitfalls 7, 9 and 10, and no draw that depends on the company."""
    step, team = ready(case)
    with torch.no_grad():
        together = run(step, team, make_batch(0, 1, 2, draw=5))[0]
        turned = run(step, team, make_batch(2, 0, 1, draw=5))[0]
        alone = [run(step, team, make_batch(image, draw=5))[0] for image in range(3)]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(turned, together, rtol=1e-4, atol=1e-6)
    assert len({round(float(value), 6) for value in alone}) == 3


@every_term
def test_more_of_the_same_prompts_cost_the_same(case: str) -> None:
    step, team = ready(case)
    batch = make_batch(0, 1)
    twice = {
        name: value.repeat_interleave(2, 0) for name, value in batch.prompts._asdict().items() if value is not None
    }
    more = batch._replace(
        prompts=batch.prompts._replace(**twice),
        masks=batch.masks.repeat_interleave(2, 0),
        labelled=batch.labelled.repeat_interleave(2),
    )
    with torch.no_grad():
        torch.testing.assert_close(run(step, team, more)[0], run(step, team, batch)[0], rtol=1e-4, atol=1e-6)


@every_term
def test_two_teachers_are_their_weighted_sum(case: str) -> None:
    first, second = make_sam_teacher(1), make_sam_teacher(2)
    step, team = ready(case, first, second)
    batch = make_batch(0, 1, 2)
    lessons = team.teach(batch)
    with torch.no_grad():
        both = step(batch, tuple(lesson._replace(weight=w) for lesson, w in zip(lessons, (0.7, 0.3), strict=True)),
                    counts_of(batch))[0]  # fmt: skip
        alone = [step(batch, (lesson._replace(weight=1.0),), counts_of(batch))[0] for lesson in lessons]
    torch.testing.assert_close(both, 0.7 * alone[0] + 0.3 * alone[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("case", [case for case in TERMS if "learnt" not in case and "pca" not in case])
def test_a_student_that_is_its_teacher_pays_nothing(case: str) -> None:
    student = make_student()
    twin = build_sam(**student.arch)
    twin.load_state_dict(student.state_dict())
    name, settings = TERMS[case]
    paired = {"layers": [["blocks.-1"] * 2], "encoder": [["attention.-1"] * 2, ["attention.1"] * 2]}
    settings = {key: paired.get(key, value) for key, value in settings.items()}
    if "student_tap" in settings:
        settings["teacher_tap"] = settings["student_tap"]
    objectives = objectives_of(**{name: settings})
    team = team_of(objectives, twin)
    step = TrainStep(student, NO_TASK, objectives)
    loss, terms = run(step, team, make_batch(0, 1, 2))
    assert abs(float(loss.detach())) < 1e-6
    audit_gradients(terms, step)  # a gradient of 0 is a gradient


def test_draws_are_a_function_of_the_step_and_the_image_alone() -> None:
    one, two = sampled_places(make_batch(0, 1, 2, draw=3), 50), sampled_places(make_batch(2, 0, draw=3), 50)
    assert torch.equal(one[[2, 0]], two)
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one, sampled_places(make_batch(0, 1, 2, draw=4), 50))


def test_no_place_lies_in_the_padding() -> None:
    batch = make_batch(0, 1, 2)
    places = sampled_places(batch, 2000)
    extent = places.amax(dim=1) * IMAGE_SIZE
    assert (extent < batch.input_sizes).all()
    assert (extent > batch.input_sizes - 1).all()
    for grid in (4, 8, 16):
        cells = (places * grid).long()
        covered = valid_cells(batch.input_sizes, grid, IMAGE_SIZE)
        assert (covered[torch.arange(3)[:, None], cells[..., 0], cells[..., 1]] > 0).all()


@pytest.mark.parametrize("case", ["relations", "attention of the encoder"])
def test_every_step_looks_elsewhere(case: str) -> None:
    step, team = ready(case)
    with torch.no_grad():
        values = [float(run(step, team, make_batch(0, draw=draw))[0]) for draw in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_a_patch_drawn_twice_counts_once() -> None:
    cells = torch.tensor([[[0, 1], [2, 2], [0, 1], [1, 0], [2, 2]]])
    assert first_of_each(cells).tolist() == [[1, 1, 0, 1, 0]]


def test_layers_that_cannot_correspond_are_refused_with_the_remedy() -> None:
    def attempt(**terms: dict[str, Any]) -> None:
        objectives = objectives_of(**terms)
        run(TrainStep(make_student(), NO_TASK, objectives), team_of(objectives, make_sam_teacher()), make_batch(0))

    with pytest.raises(ConfigError, match=r"encoder_matching: the student's blocks.1/2 is 16 x 8 x 8, the teacher's "
                       r"blocks.1/2 32 x 4 x 4; set encoder_matching.projection to learnt"):  # fmt: skip
        attempt(encoder_matching={"layers": 2, "projection": "none"})
    with pytest.raises(SamletError, match="neck takes 32 channels, the tap has 16"):
        attempt(encoder_matching={"layers": 2, "projection": "neck"})
    with pytest.raises(ConfigError, match=r"attention_matching: the student's attention.1 is 1 x 64 x 8 x 8, the "
                       r"teacher's attention.0 2 x 64 x 4 x 4; set attention_matching.resample to true"):  # fmt: skip
        attempt(attention_matching={"decoder": [], "encoder": WINDOWS[1:]})
    with pytest.raises(SamletError, match=r"attention.1/4.*attention.1 to attention.3"):
        attempt(attention_matching={"encoder": 4, "resample": True})
    with pytest.raises(SamletError, match=r"attention\.7\.self.*the mask decoder has"):
        attempt(attention_matching={"decoder": ["7.self"]})


def test_windows_of_one_size_need_no_resampling() -> None:
    student, other = make_student(), make_student(3)
    objectives = objectives_of(attention_matching={"decoder": [], "encoder": [["attention.-1"] * 2]})
    loss, _ = run(TrainStep(student, NO_TASK, objectives), team_of(objectives, other), make_batch(0, 1))
    assert float(loss.detach()) > 0


@pytest.mark.parametrize("case", [case for case in TERMS if "decoder" not in case and case != "attention of both"])
def test_a_teacher_of_another_input_size_teaches_too(case: str) -> None:
    step, team = ready(case, make_sam_teacher(image_size=128))
    loss, _ = run(step, team, make_batch(0, 1))
    torch.autograd.backward(loss)
    assert any(name.startswith("image_encoder.layers.0") for name in touched(step.student))


def test_decoder_features_of_another_input_size_are_brought_to_the_students_grid() -> None:
    step, team = ready("decoder", make_sam_teacher(image_size=128))
    assert torch.isfinite(run(step, team, make_batch(0, 1))[0])
    step, team = ready("attention of the decoder", make_sam_teacher(image_size=128))
    with pytest.raises(ConfigError, match=r"8 x 7 x 16, the teacher's attention.0.token_to_image 8 x 7 x 64; take"):
        run(step, team, make_batch(0, 1))


def test_what_no_term_asks_for_is_not_computed() -> None:
    objectives = objectives_of(dense_mask_logits={}, encoder_patch={})
    step, team = TrainStep(make_student(), NO_TASK, objectives), team_of(objectives, make_sam_teacher())
    lesson = team.teach(make_batch(0))[0]
    assert lesson.features.taps == {}
    assert lesson.answer(make_batch(0).prompts).taps == {}
    assert (step.student_taps, step.decoder_taps) == ((), ())
    rows = team_of(objectives_of(attention_matching={"encoder": 1}), make_sam_teacher()).teach(make_batch(0))[0]
    assert rows.features.taps["attention.1/1"].shape == (1, 2, PLACES, 4, 4)


def test_the_audit_sees_through_a_projection_that_learns_by_itself() -> None:
    step, team = ready("encoder layers, learnt")
    step.student.image_encoder.requires_grad_(False)
    _, terms = run(step, team, make_batch(0, 1))
    with pytest.raises(SamletError, match=r"distill/encoder_matching: has a weight.*reaches no trainable"):
        audit_gradients(terms, step)


@every_term
def test_half_precision_is_compared_in_full(case: str) -> None:
    step, team = ready(case)
    batch = make_batch(0, 1)
    exact = float(run(step, team, batch)[0].detach())
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = run(step, team, batch)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(exact, rel=0.1, abs=0.01)
    torch.autograd.backward(loss)
    assert touched(step.student)
