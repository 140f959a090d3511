"""What follows from validations: tables of the plateau rule and of early stopping, with and without stages."""

from __future__ import annotations

import pytest

from samlet.distill.configs import DistillationConfig, DynamicLambdaConfig
from samlet.engine.checkpoint import TrainerState
from samlet.engine.judgement import begin_next_stage, judge, lambda_at


def distillation(**settings: float) -> DistillationConfig:
    rule = DynamicLambdaConfig.model_validate({"enable_plateau_scheduler": True, **settings})
    return DistillationConfig(lambda_coef=1.0, dynamic_lambda=rule)


def lambdas(values: list[float], config: DistillationConfig, state: TrainerState | None = None) -> list[float]:
    """The coefficient after each validation."""
    state = TrainerState() if state is None else state
    after = []
    for value in values:
        state.step += 1
        judge(state, value, patience=None, distillation=config)
        after.append(lambda_at(state, config))
    return after


TABLE = [
    # improving by more than the threshold: it stays, however long
    ({"patience": 2}, [0.1, 0.2, 0.3, 0.4], [1, 1, 1, 1]),
    # two validations without improvement lower it, two more lower it again
    ({"patience": 2}, [0.3, 0.3, 0.2, 0.3, 0.1], [1, 1, 0.5, 0.5, 0.25]),
    # an improvement resets the count and raises nothing
    ({"patience": 2}, [0.3, 0.3, 0.3, 0.3, 0.4, 0.4, 0.4], [1, 1, 0.5, 0.5, 0.5, 0.5, 0.25]),
    # a gain within the threshold is none; many small ones add up to one against the best
    ({"patience": 1, "threshold": 0.1}, [0.3, 0.35, 0.39, 0.41], [1, 0.5, 0.25, 0.25]),
    ({"patience": 1, "threshold": 0.0}, [0.3, 0.3, 0.3000001], [1, 0.5, 0.5]),
    # the floor holds, and is met exactly
    ({"patience": 1, "min": 0.4}, [0.3, 0.3, 0.3, 0.3], [1, 0.5, 0.4, 0.4]),
    ({"patience": 1, "factor": 0.1}, [0.3, 0.2], [1, 0.1]),
    ({"enable_plateau_scheduler": False, "patience": 1}, [0.3, 0.2, 0.1], [1, 1, 1]),
]


@pytest.mark.parametrize(("settings", "values", "expected"), TABLE)
def test_the_plateau_rule(settings: dict[str, float], values: list[float], expected: list[float]) -> None:
    assert lambdas(values, distillation(**settings)) == pytest.approx(expected)


def test_a_floor_above_the_present_value_raises_nothing() -> None:
    config = distillation(patience=1, min=0.4).model_copy(update={"lambda_coef": 0.2})
    assert lambdas([0.3, 0.3, 0.3], config) == [0.2, 0.2, 0.2]


def test_a_stage_does_not_overwrite_what_the_rule_has_done_and_the_next_begins_with_its_own() -> None:
    state, config = TrainerState(), distillation(patience=1)
    assert lambdas([0.5, 0.4, 0.3], config, state) == [1, 0.5, 0.25]
    second = distillation(patience=2).model_copy(update={"lambda_coef": 0.8})
    begin_next_stage(state, 2)
    # 0.1 is far below the best of the first stage, and is this one's first value
    assert lambdas([0.1, 0.1, 0.1, 0.1], second, state) == [0.8, 0.8, 0.4, 0.4]


def test_the_warm_up_is_linear_from_0_and_begins_anew_in_each_stage() -> None:
    config = DistillationConfig(lambda_coef=2.0, lambda_warmup_steps=4)
    state = TrainerState()
    for began in (0, 7):
        state.stage_began = began
        seen = []
        for step in range(began, began + 6):
            state.step = step
            seen.append(lambda_at(state, config))
        assert seen == [0, 0.5, 1.0, 1.5, 2.0, 2.0]


def test_the_warm_up_rises_to_what_the_rule_has_left() -> None:
    state = TrainerState(step=1, lambda_coef=0.5)
    assert lambda_at(state, DistillationConfig(lambda_coef=1.0, lambda_warmup_steps=2)) == 0.25


def test_patience_counts_from_the_best_of_its_stage() -> None:
    state, config = TrainerState(), DistillationConfig()

    def ends(value: float) -> bool:
        state.step += 1
        return judge(state, value, patience=2, distillation=config).ends_stage

    assert [ends(value) for value in (0.5, 0.6, 0.6, 0.5)] == [False, False, False, True]
    begin_next_stage(state, 2)
    assert (state.stage, state.stage_began, state.finished) == (1, 4, False)
    assert [ends(value) for value in (0.1, 0.2, 0.3, 0.3, 0.3)] == [False, False, False, False, True]
    assert (state.best, state.best_step) == (0.6, 2)
    begin_next_stage(state, 2)
    assert state.finished


def test_what_may_not_be_the_best_is_no_reason_for_patience() -> None:
    state = TrainerState()
    judge(state, 0.3, patience=2, distillation=DistillationConfig())
    for value, ends in ((0.9, False), (0.9, True)):
        found = judge(state, value, patience=2, distillation=DistillationConfig(), eligible=False)
        assert (found.is_best, found.ends_stage) == (False, ends)
    assert state.best == 0.3
