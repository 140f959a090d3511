from __future__ import annotations

import torch

from samlet.engine.ema import AverageStudent
from samlet.models import Sam, build_sam
from tests.tiny import IMAGE_SIZE, STUDENT

WEIGHT, STATISTIC, COUNTER = (
    "image_encoder.neck.0.weight",
    "image_encoder.patch_embed.seq.0.bn.running_mean",
    "image_encoder.patch_embed.seq.0.bn.num_batches_tracked",
)


def student_of(value: float) -> Sam:
    torch.manual_seed(0)
    student = build_sam("vit_t", IMAGE_SIZE, **STUDENT)
    with torch.no_grad():
        for name, tensor in student.state_dict().items():
            tensor.fill_(3 if name == COUNTER else value)
    return student


def test_the_average_follows_the_formula() -> None:
    student, expected = student_of(1.0), 1.0
    average = AverageStudent(student, 0.25)
    for step, value in enumerate([2.0, -1.0, 4.0, 0.5]):
        decay = min(0.25, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        average.follow(student_of(value), step)
        for name in (WEIGHT, STATISTIC):
            torch.testing.assert_close(average.tensors()[name], torch.full_like(average.tensors()[name], expected))
        assert average.tensors()[COUNTER] == 3


def test_a_young_average_forgets_where_it_began_and_an_old_one_is_slow() -> None:
    average = AverageStudent(student_of(0.0), 0.999)
    average.follow(student_of(1.0), 0)
    assert float(average.tensors()[WEIGHT].mean()) > 0.85
    average.begin(student_of(0.0))
    average.follow(student_of(1.0), 10**6)
    torch.testing.assert_close(average.tensors()[WEIGHT].mean(), torch.tensor(0.001))


def test_the_average_is_a_student_of_its_own() -> None:
    student = student_of(1.0)
    average = AverageStudent(student, 0.9)
    assert not any(parameter.requires_grad for parameter in average.student.parameters())
    assert all(parameter.requires_grad for parameter in student.mask_decoder.parameters())
    average.follow(student_of(5.0), 0)
    assert float(student.state_dict()[WEIGHT].max()) == 1.0


def test_weights_that_do_not_move_keep_every_bit() -> None:
    torch.manual_seed(0)
    student = build_sam("vit_t", IMAGE_SIZE, **STUDENT)
    average = AverageStudent(student, 0.9)
    for step in range(5):
        average.follow(student, step)
    assert all(torch.equal(value, average.tensors()[name]) for name, value in student.state_dict().items())
