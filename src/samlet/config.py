"""RunConfig: everything a training run depends on, composed of the blocks that live beside their owners."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializationInfo, ValidationError, model_serializer

from samlet.artefacts import MANIFEST
from samlet.data.configs import AugmentationConfig, DatasetConfig, EverythingConfig, PromptConfig
from samlet.distill.configs import DistillationConfig, ExtractionConfig, MaskTeacherConfig, TeacherConfig
from samlet.engine.configs import CheckpointConfig, LoggingConfig, TrainingConfig, ValidationConfig
from samlet.errors import ConfigError
from samlet.losses.configs import TaskLossConfig
from samlet.models.configs import ModelConfig
from samlet.schema import ExistingPath, Loc, Overlay, StrictModel, all_mistakes, overlaid

ONE_FOR_ALL = "is one for the whole run and cannot change between stages; set it at the top level"
CHANGEABLE = {
    "training": "epochs max_steps learning_rate min_learning_rate warmup_steps weight_decay max_grad_norm freeze "
    "unfreeze_epoch",
    "validation": "every_epochs every_steps early_stopping_patience overlays",
}
"""What a stage may say in a block of which it may not say all."""
UNCHANGEABLE = {"distillation": "use_precomputed_features precomputed_root"}


class StageConfig(Overlay):
    """A stretch of the run: the base configuration with what is written down here laid over it.

    Nothing written here reaches another stage. `training.epochs` or `max_steps` is the stage's own length; warm-up,
    cosine, unfreeze_epoch, dynamic lambda and the patience of early stopping begin anew with it.
    """

    name: str = Field(min_length=1, pattern=r"^[^/\\\s]+$")
    """How logs, curves and errors call it; no spaces or slashes."""
    prompts: PromptConfig = PromptConfig()
    """How points and boxes are drawn in this stage, where it differs."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """How images are varied in this stage, where it differs."""
    loss: TaskLossConfig = TaskLossConfig()
    """The loss against the ground truth, where it differs."""
    distillation: DistillationConfig = DistillationConfig()
    """Terms on and off, weights, lambda; a term that is written down takes part, unless it says otherwise."""
    teacher_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Shares of the teachers in this stage, by name; those not named keep theirs."""
    training: TrainingConfig = TrainingConfig()
    """Length, learning rate, weight decay, clipping and frozen parts, where they differ."""
    validation: ValidationConfig = ValidationConfig()
    """When to measure and when to give up, where it differs."""

    refused: ClassVar[dict[str, str]] = dict.fromkeys(
        (
            *("seed", "output_dir", "resume", "model", "dataset", "everything", "teachers"),
            *("mask_teacher", "extraction", "checkpoint", "logging", "stages"),
        ),
        ONE_FOR_ALL,
    )

    @model_serializer
    def written(self, info: SerializationInfo) -> dict[str, Any]:
        """Only what was written down; the rest is the base's."""
        values = {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}
        return {
            name: value.model_dump(mode=info.mode, exclude_unset=True) if isinstance(value, StrictModel) else value
            for name, value in values.items()
        }

    def blocks(self) -> Iterable[tuple[str, StrictModel]]:
        """The blocks that were written down, by name."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if name in self.model_fields_set and isinstance(value, StrictModel):
                yield name, value

    def unchangeable(self) -> Iterable[Loc]:
        """What was written down and cannot change between stages."""
        for name, block in self.blocks():
            written = block.model_fields_set
            allowed = set(CHANGEABLE[name].split()) if name in CHANGEABLE else written
            for key in sorted(written - allowed | written & set(UNCHANGEABLE.get(name, "").split())):
                yield name, key


class RunConfig(StrictModel):
    """One training run of samlet."""

    schema_: Annotated[str | None, Field(alias="$schema")] = None
    """Where editors find the JSON schema of this file (`samlet schema` writes it)."""
    seed: int = Field(0, ge=0)
    """Sample order, augmentation, prompts and initialisation are pure functions of it."""
    output_dir: Path = Path("runs/samlet")
    """Where the run writes everything; one folder a run."""
    resume: Literal["auto", "never"] | ExistingPath = "auto"
    """auto: go on with what lies in output_dir; never: refuse if something does; a path: that checkpoint."""
    model: ModelConfig = ModelConfig()
    """The student."""
    dataset: DatasetConfig
    """The images and masks."""
    everything: EverythingConfig = EverythingConfig()
    """Which points of the grid are learnt, and what, where `dataset.mode` is everything."""
    prompts: PromptConfig = PromptConfig()
    """How points and boxes are drawn from masks."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """Random flips, scales, crops and colours."""
    loss: TaskLossConfig = TaskLossConfig()
    """The loss against the ground truth."""
    distillation: DistillationConfig = DistillationConfig()
    """The loss against the teachers."""
    teachers: tuple[TeacherConfig, ...] = ()
    """The teachers; used where distillation or mask_teacher is enabled."""
    mask_teacher: MaskTeacherConfig = MaskTeacherConfig()
    """A teacher's automatic masks as objects to learn."""
    extraction: ExtractionConfig = ExtractionConfig()
    """Computing the teachers' features ahead of time."""
    training: TrainingConfig = TrainingConfig()
    """Optimisation."""
    validation: ValidationConfig = ValidationConfig()
    """Measuring on the validation set."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving for resume."""
    logging: LoggingConfig = LoggingConfig()
    """Logs."""
    stages: tuple[StageConfig, ...] = ()
    """Stretches of the run, one after the other: each is this configuration with its own changes laid over it."""

    def is_stored(self, teacher: TeacherConfig) -> bool:
        """Whether a teacher's features are read from its store."""
        by_all = self.distillation.use_precomputed_features
        return by_all if teacher.precomputed is None else teacher.precomputed

    @property
    def distills(self) -> bool:
        """Whether any stage learns from what the teachers answer."""
        return any(stage.distillation.enable for stage in self.resolved())

    @property
    def mask_source(self) -> TeacherConfig:
        """The teacher whose automatic masks are learnt; only where `mask_teacher` is enabled."""
        name = self.mask_teacher.teacher
        return next(teacher for teacher in self.teachers if name in (None, teacher.name))

    @property
    def masks_are_stored(self) -> bool:
        """Whether the automatic masks are read from that teacher's store."""
        asked = self.mask_teacher.precomputed
        return self.is_stored(self.mask_source) if asked is None else asked

    def store_of(self, teacher: TeacherConfig) -> Path:
        """The folder of a teacher's store.

        Raises:
            ConfigError: no precomputed_root is given.
        """
        root = self.distillation.precomputed_root
        if root is None:
            raise ConfigError("distillation.precomputed_root: is null; give the folder of the teachers' stores")
        if root.is_file():
            raise ConfigError(
                f"distillation.precomputed_root: {root} is a file; give the folder of the teachers' stores"
            )
        alone = len(self.teachers) == 1 and (root / MANIFEST).is_file()
        return root if alone else root / teacher.name

    def resolved(self) -> tuple[RunConfig, ...]:
        """One complete configuration for each stage; this one where there are none."""
        return tuple(self._with(stage) for stage in self.stages) or (self,)

    def _with(self, stage: StageConfig) -> RunConfig:
        blocks: dict[str, Any] = {name: overlaid(getattr(self, name), block) for name, block in stage.blocks()}
        written = stage.training.model_fields_set
        if "epochs" in written and "max_steps" not in written:
            blocks["training"] = blocks["training"].model_copy(update={"max_steps": None})
        shares = stage.teacher_weights
        teachers = [t.model_copy(update={"weight": shares[t.name]}) if t.name in shares else t for t in self.teachers]
        return self.model_copy(update={**blocks, "teachers": tuple(teachers), "stages": ()})

    def mistakes(self) -> Iterable[tuple[Loc, str]]:
        """What no single field can see."""
        yield from self._stage_mistakes()
        yield from self._cache_mistakes()
        yield from self._store_mistakes()
        yield from self._everything_mistakes()
        yield from self._mask_mistakes()
        names = [teacher.name for teacher in self.teachers]
        for index, name in enumerate(names):
            if name in names[:index]:
                yield ("teachers", index, "name"), f"'{name}' is taken by another teacher"
        if self.distillation.enable and not self.teachers:
            yield ("teachers",), "distillation.enable is true, but there is no teacher; name one with its checkpoint"
        if self.teachers and not sum(1.0 if t.weight is None else t.weight for t in self.teachers):
            yield ("teachers",), "every weight is 0; give one teacher a positive weight"
        if self.dataset.unlabelled == "use" and not (self.distillation.enable or self.mask_teacher.enable):
            yield (
                ("dataset", "unlabelled"),
                "images without masks teach nothing without a teacher; enable distillation, or set it to 'refuse'",
            )

    def _cache_mistakes(self) -> Iterable[tuple[Loc, str]]:
        """What embeddings cannot be kept for."""
        training, augmentation = self.training, self.augmentation
        if not training.cache_embeddings:
            return
        if "image_encoder" not in training.freeze or training.unfreeze_epoch is not None:
            yield (
                ("training", "cache_embeddings"),
                "keeps what the image encoder says, so it must never train: put image_encoder into training.freeze, "
                "and leave unfreeze_epoch null",
            )
        if augmentation.enable and augmentation.variants is None:
            yield (
                ("training", "cache_embeddings"),
                "each epoch's augmentation makes new images, which have no embedding yet: set augmentation.variants "
                "(4, say, for four variations of each image), or augmentation.enable to false",
            )

    def _store_mistakes(self) -> Iterable[tuple[Loc, str]]:
        """What stored features cannot be used for, and teachers without weights."""
        if not self.distillation.enable:
            return
        stored = [teacher for teacher in self.teachers if self.is_stored(teacher)]
        for index, teacher in enumerate(self.teachers):
            if teacher.checkpoint is None and teacher not in stored:
                yield ("teachers", index, "checkpoint"), "is null, and this teacher runs online; give its weights"
        if not stored:
            return
        yield from self._answer_mistakes()
        if self.distillation.precomputed_root is None:
            yield (
                ("distillation", "precomputed_root"),
                "is null; give the folder of the stores, which `samlet extract` writes and training reads",
            )
        if self.augmentation.moves_images and self.augmentation.variants is None:
            yield (
                ("augmentation", "variants"),
                "each epoch flips, scales or crops anew, and a store holds fixed images: set it to 4, say, for four "
                "stored variations of each image, or switch flips, scale and crop off (colours may stay)",
            )
        if self.distillation.attention_matching.enable and self.distillation.attention_matching.encoder:
            yield (
                ("distillation", "attention_matching", "encoder"),
                "is read at places that each step draws anew, which no store can hold: leave it empty (the decoder's "
                "attention works), or let the teacher run online",
            )

    def _mask_mistakes(self) -> Iterable[tuple[Loc, str]]:
        """Where a teacher's masks are learnt: whose, from where, and what does not go with them."""
        masks = self.mask_teacher
        if not masks.enable:
            return
        names = [teacher.name for teacher in self.teachers]
        if not names:
            yield ("teachers",), "mask_teacher.enable is true, but there is no teacher; name one with its checkpoint"
        elif masks.teacher is not None and masks.teacher not in names:
            yield ("mask_teacher", "teacher"), f"there is no such teacher; there are {', '.join(names)}"
        elif self.masks_are_stored:
            features_too = self.distillation.enable and any(self.is_stored(teacher) for teacher in self.teachers)
            if self.distillation.precomputed_root is None and not features_too:
                message = "is null; give the folder of the stores, where `samlet extract` writes the masks"
                yield ("distillation", "precomputed_root"), message
        else:
            if self.mask_source.checkpoint is None:
                where = ("teachers", self.teachers.index(self.mask_source), "checkpoint")
                yield where, "is null, and its automatic masks are found online; give its weights"
            if self.distillation.enable and any(self.is_stored(teacher) for teacher in self.teachers):
                yield (
                    ("mask_teacher", "precomputed"),
                    "what is stored of an image depends on its masks: set it to true, so that `samlet extract` finds "
                    "them first, or let the teachers run online",
                )
        if masks.method == "replace_gt" and self.dataset.labelled_repeat > 1:
            yield (
                ("dataset", "labelled_repeat"),
                "repeats images for their ground truth, which mask_teacher.method replace_gt does not read; set 1",
            )

    def _everything_mistakes(self) -> Iterable[tuple[Loc, str]]:
        """What does not go with the points of a grid."""
        if self.dataset.mode != "everything":
            return
        taught = [stage.distillation for stage in self.resolved() if stage.distillation.enable]
        if self.everything.unlabelled == "teacher" and not any(stage.asks_prompts for stage in taught):
            yield (
                ("everything", "unlabelled"),
                "leaves points beside the objects to the teachers, and "
                + ("no term that is distilled looks at points" if taught else "nothing is distilled")
                + "; enable distillation.dense_mask_logits, or set it to ignore or negative",
            )
        if self.extraction.decoder_outputs:
            yield (
                ("extraction", "decoder_outputs"),
                "holds one answer for each object, and mode everything asks about points; set it to false (the "
                "teachers' decoders then run beside the training)",
            )

    def _answer_mistakes(self) -> Iterable[tuple[Loc, str]]:
        """What stored answers of the decoder cannot be used for."""
        distillation, extraction = self.distillation, self.extraction
        if not extraction.decoder_outputs:
            return
        if not self.prompts.fixed:
            yield (
                ("prompts", "fixed"),
                "is false, and extraction.decoder_outputs holds answers to fixed prompts; set it",
            )
        if self.prompts.correction_rounds:
            yield (
                ("prompts", "correction_rounds"),
                "asks new prompts, to which a store has no answer; set it to 0, or extraction.decoder_outputs to false",
            )
        if distillation.attention_matching.enable:
            yield (
                ("distillation", "attention_matching", "enable"),
                "compares maps that depend on which prompts stand together; disable it, or extraction.decoder_outputs",
            )
        judged = distillation.team != "static" or distillation.trust != "constant" or len(self.teachers) > 1
        if not extraction.dense_mask_logits and (distillation.dense_mask_logits.enable or judged):
            yield (
                ("extraction", "dense_mask_logits"),
                "is false, and the teachers' masks are compared; set it, or leave out distillation.dense_mask_logits, "
                "team, trust and second teachers",
            )

    def _stage_mistakes(self) -> Iterable[tuple[Loc, str]]:
        """What is wrong with a stage, as far as it is not wrong without it."""
        known = set(all_mistakes(self.model_copy(update={"stages": ()}))) if self.stages else set()
        teachers = [teacher.name for teacher in self.teachers]
        for number, stage in enumerate(self.stages):
            here: Loc = ("stages", number)
            if stage.name in [earlier.name for earlier in self.stages[:number]]:
                yield (*here, "name"), f"'{stage.name}' is taken by another stage"
            fixed = list(stage.unchangeable())
            for below in fixed:
                yield (*here, *below), ONE_FOR_ALL
            for name in stage.teacher_weights.keys() - set(teachers):
                yield (*here, "teacher_weights", name), f"there is no such teacher; there are {', '.join(teachers)}"
            for below, message in all_mistakes(self._with(stage)):
                if (below, message) in known or any(below[:1] == loc[:1] for loc in fixed):
                    continue
                if below[0] in StageConfig.model_fields:
                    yield (*here, *below), message
                else:
                    yield below, f"in stage '{stage.name}': {message}"


def with_todays_keys(former: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that an earlier version wrote, with the keys it did not know at their defaults."""
    try:
        return RunConfig.model_validate_json(json.dumps(former)).model_dump(mode="json", by_alias=True)
    except ValidationError:  # it has keys or values that are no more; whoever compares will name them
        return dict(former)
