"""How a run trains, validates, logs and saves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from samlet.data.configs import RetentionConfig
from samlet.schema import Loc, StrictModel

Part = Literal["image_encoder", "prompt_encoder", "mask_decoder"]
Metric = Literal["point_miou", "box_miou", "mean_miou", "everything_ar"]


class TrainingConfig(StrictModel):
    """Optimisation: how long, how fast, how precisely, and which parts."""

    epochs: int = Field(10, ge=1)
    """Passes over the training images."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps after which to stop, in place of `epochs`."""
    batch_size: int = Field(4, ge=1)
    """Images per micro-batch, over all processes together."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches per optimizer step; batch_size 8 with accumulation 1 equals 2 with 4."""
    prompts_per_chunk: int | None = Field(64, ge=1)
    """Most prompts that are decoded and compared at a time. Where a micro-batch has more, memory holds one such chunk,
    and each is computed once more in the backward pass; null: all at once."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate of AdamW, after the warm-up."""
    min_learning_rate: float = Field(1e-6, ge=0)
    """Learning rate at the end of the cosine."""
    warmup_steps: int = Field(100, ge=0)
    """Optimizer steps over which the learning rate rises linearly from 0; a tenth of the run (of its stage) at most."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay; norms, biases, embeddings and position tables are exempt."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clip the gradient's global L2 norm here; null: no clipping."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the networks; losses are always computed in fp32. fp16 needs a CUDA GPU."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Average the student's weights over steps with this decay (0.999); validate and save the average. null: do not."""
    freeze: tuple[Part, ...] = ()
    """Parts of the student that do not train, BatchNorm statistics included."""
    unfreeze_epoch: int | None = Field(None, ge=1)
    """Epoch (from 0) at which the frozen parts start to train; null: never."""
    cache_embeddings: bool = False
    """Run the frozen image encoder once for each image and variant, and train on what it said, kept in output_dir."""
    non_finite: Literal["abort", "skip"] = "abort"
    """What a NaN or infinite loss or gradient does: stop the run, or leave that step out."""
    max_skipped_steps: int = Field(10, ge=0)
    """With `non_finite: skip`, more left-out steps than this stop the run."""
    num_workers: int = Field(2, ge=0)
    """Processes that load images; the result does not depend on it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    channels_last: bool = True
    """Lay images out channels-last, which the student's convolutions prefer."""
    compile: bool = False
    """Compile the image encoders of student and teachers with torch.compile; meant for a GPU."""

    def mistakes(self) -> Iterable[tuple[Loc, str]]:
        """What no single field can see."""
        if self.min_learning_rate > self.learning_rate:
            yield ("min_learning_rate",), f"is above learning_rate ({self.learning_rate:g})"
        if self.unfreeze_epoch is not None and not self.freeze:
            yield ("unfreeze_epoch",), "has nothing to unfreeze: training.freeze is empty"
        if len(set(self.freeze)) == 3 and self.unfreeze_epoch is None:
            yield ("freeze",), "freezes the whole student for ever; leave a part out, or set unfreeze_epoch"


class EverythingValidationConfig(StrictModel):
    """Automatic masks, measured at every validation: plain search, whatever their score, without duplicates."""

    points_per_side: int = Field(16, ge=1)
    """Clicks along each side of the grid over an image."""
    max_images: int | None = Field(8, ge=1)
    """The first n images only; null: all."""


class ValidationConfig(StrictModel):
    """When to measure, what decides, and when to give up."""

    every_epochs: int = Field(1, ge=1)
    """Validate at the end of every n-th epoch, and at the end of the run."""
    every_steps: int | None = Field(None, ge=1)
    """Validate every n optimizer steps in place of epochs."""
    metric: Metric = "mean_miou"
    """What the best checkpoint is best at; mean_miou is the mean of point and box mIoU, everything_ar the average
    recall of automatic masks, which validation.everything measures."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after this many validations without a new best; null: never."""
    max_images: int | None = Field(None, ge=1)
    """Validate on the first n images only; null: all."""
    overlays: int = Field(4, ge=0)
    """Validation images drawn at every validation: image, prompt, ground truth, teacher, student."""
    everything: EverythingValidationConfig | None = None
    """Measure automatic masks as well (points_per_side, max_images): everything_ar (AR@1000), everything_ap and
    everything_ece, the calibration error of their scores; {} is 16 x 16 points on 8 images; null: not."""
    retention: RetentionConfig | None = None
    """Forgetting guard: a second data set (root, val, format, max_images, broken) measured before the first step and at
    every validation; null: none."""
    max_retention_drop: float | None = Field(None, ge=0, le=1)
    """A checkpoint whose `metric` on the retention set (mean_miou where that is everything_ar) fell by more than this
    (0.02: two points) since before the first step is not kept as the best; null: it is only watched."""

    def mistakes(self) -> Iterable[tuple[Loc, str]]:
        """A guard with nothing to guard, a best that nobody measures."""
        if self.max_retention_drop is not None and self.retention is None:
            yield ("max_retention_drop",), "has nothing to compare with; name a data set in validation.retention"
        if self.metric == "everything_ar" and self.everything is None:
            yield ("metric",), "everything_ar is not measured; add `everything: {}` to validation"


class CheckpointConfig(StrictModel):
    """What is written so that a run can go on."""

    every_steps: int | None = Field(None, ge=1)
    """Checkpoint every n optimizer steps, besides every validation."""
    keep_last: int = Field(2, ge=1)
    """Checkpoints kept; the best student is kept apart."""


class LoggingConfig(StrictModel):
    """What is written while training."""

    every_steps: int = Field(1, ge=1)
    """Log the terms of every n-th optimizer step to metrics.jsonl and TensorBoard."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    curves: bool = True
    """Draw curves.png whenever the run ends or is stopped."""
