"""What follows from a validation: a new best, the end of a stage, a lower lambda; and where a stage ends.

The only state of training that is no function of configuration and step; it lies in `TrainerState`, which is saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from samlet.engine.checkpoint import TrainerState

if TYPE_CHECKING:
    from samlet.distill.configs import DistillationConfig, DynamicLambdaConfig


class Judgement(NamedTuple):
    """What a validation has changed."""

    is_best: bool  # of the whole run
    ends_stage: bool
    lowered_lambda: float | None  # the new coefficient; None: it stays


def judge(
    state: TrainerState, value: float, *, patience: int | None, distillation: DistillationConfig, eligible: bool = True
) -> Judgement:
    """Enter a measured value into the state.

    The best student is the best of the whole run, while patience counts from the best of the stage: a stage that
    begins lower than the last one ended has its chance too. A value that is not `eligible` is no best of either.
    """
    is_best = eligible and (state.best is None or value > state.best)
    if is_best:
        state.best, state.best_step = value, state.step
    state.validations_without_best += 1
    if eligible and (state.stage_best is None or value > state.stage_best):
        state.stage_best, state.validations_without_best = value, 0
    lowered = lower_lambda(state, value, distillation.lambda_coef, distillation.dynamic_lambda)
    return Judgement(is_best, patience is not None and state.validations_without_best >= patience, lowered)


def lower_lambda(state: TrainerState, value: float, start: float, settings: DynamicLambdaConfig) -> float | None:
    """The plateau rule: after `patience` validations without improvement, lambda <- max(lambda * factor, min).

    An improvement is a value above the best so far by more than `threshold`; it resets the count and never raises
    lambda. Returns the new coefficient, None where it stays.
    """
    if not settings.enable_plateau_scheduler:
        return None
    if state.lambda_best is None or value > state.lambda_best + settings.threshold:
        state.lambda_best, state.lambda_waited = value, 0
        return None
    state.lambda_waited += 1
    if state.lambda_waited < settings.patience:
        return None
    state.lambda_waited = 0
    present = start if state.lambda_coef is None else state.lambda_coef
    lowered = max(present * settings.factor, settings.min)
    if lowered >= present:
        return None
    state.lambda_coef = lowered
    return lowered


def lambda_at(state: TrainerState, distillation: DistillationConfig) -> float:
    """The coefficient of the distillation loss in the step that follows.

    lambda(t) = lambda_coef min(t / warmup, 1), where lambda_coef is what the plateau rule has left of the stage's own
    and t counts the stage's optimizer steps from 0.
    """
    present = distillation.lambda_coef if state.lambda_coef is None else state.lambda_coef
    warmup = distillation.lambda_warmup_steps
    done = state.step - state.stage_began
    return present * done / warmup if done < warmup else present


def begin_next_stage(state: TrainerState, stages: int) -> None:
    """Go on to the next stage with nothing that this one has counted, or end the run."""
    if state.stage + 1 >= stages:
        state.finished = True
        return
    state.stage, state.stage_began = state.stage + 1, state.step
    state.stage_best, state.validations_without_best = None, 0
    state.lambda_coef, state.lambda_best, state.lambda_waited = None, None, 0
