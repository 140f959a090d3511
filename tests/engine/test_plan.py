from __future__ import annotations

import pytest

from samlet.engine.configs import TrainingConfig, ValidationConfig
from samlet.engine.plan import Pace


@pytest.mark.parametrize(
    ("images", "batch_size", "accumulation", "settings", "steps"),
    [
        (10, 4, 1, {"epochs": 2}, 6),  # the last micro-batch of an epoch is filled up
        (10, 4, 2, {"epochs": 3}, 5),  # a step may reach over the end of an epoch
        (10, 4, 1, {"epochs": 2, "max_steps": 4}, 4),
    ],
)
def test_steps(images: int, batch_size: int, accumulation: int, settings: dict[str, int], steps: int) -> None:
    training = TrainingConfig(batch_size=batch_size, accumulation=accumulation, **settings)  # type: ignore[arg-type]
    assert Pace.of(images, training).steps(training) == steps


def test_parts_thaw_once_and_stay_so() -> None:
    training = TrainingConfig(freeze=("image_encoder",), unfreeze_epoch=2)
    pace = Pace(per_epoch=3, per_step=1)
    assert [step for step in range(12) if pace.thaws_at(step, training)] == [6]
    assert [bool(pace.frozen_at(step, training)) for step in (0, 5, 6, 11)] == [True, True, False, False]


def test_validation_falls_on_epochs_or_steps_and_on_the_end() -> None:
    training, pace = TrainingConfig(epochs=4), Pace(per_epoch=3, per_step=2)  # six steps

    def due(**settings: int) -> list[int]:
        config = ValidationConfig(**settings)  # type: ignore[arg-type]
        return [step for step in range(1, 7) if pace.validates_after(step, training, config)]

    assert due() == [2, 3, 5, 6]  # epochs end at micro-batches 3, 6, 9 and 12
    assert due(every_epochs=2) == [3, 6]
    assert due(every_steps=4) == [4, 6]
