"""Which teachers teach what, and how strongly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from samlet.losses.configs import (
    AttentionMatchingConfig,
    DecoderMaskTokenConfig,
    DecoderMatchingConfig,
    DenseMaskLogitsConfig,
    EncoderMatchingConfig,
    EncoderPatchConfig,
    PromptEmbedConfig,
    RkdConfig,
)
from samlet.schema import ExistingPath, Loc, StrictModel

if TYPE_CHECKING:
    from samlet.models.amg import AmgSettings

TermConfig = (
    EncoderPatchConfig
    | PromptEmbedConfig
    | DecoderMaskTokenConfig
    | DenseMaskLogitsConfig
    | EncoderMatchingConfig
    | DecoderMatchingConfig
    | AttentionMatchingConfig
    | RkdConfig
)
TERMS = (
    *("encoder_patch", "prompt_embed", "decoder_mask_token", "dense_mask_logits"),
    *("encoder_matching", "decoder_matching", "attention_matching", "rkd"),
)


OF_IMAGES = ("encoder_patch", "encoder_matching", "rkd")
"""Terms that compare what is made of an image before there is a prompt."""

TeamRule = Literal["static", "per_sample"]
TrustRule = Literal["constant", "hard_mask", "confidence"]


class TeacherConfig(StrictModel):
    """One frozen Segment-Anything model that supervises the student."""

    name: str = Field(min_length=1)
    """How logs and errors call it."""
    weight: float | None = Field(None, ge=0)
    """Share of this teacher; shares are normalised to sum 1, and without one all teachers count alike."""
    checkpoint: ExistingPath | None = None
    """Weights: an upstream .pth/.pt, a .safetensors, a samlet run, or a Hugging Face SamModel folder. null: only where
    the features were computed before, whose store holds the teacher's decoder; the teacher is then not compared."""
    precomputed: bool | None = None
    """Read this teacher's features from its store; null: as distillation.use_precomputed_features says."""
    image_size: Annotated[int, Field(ge=32, multiple_of=16)] | None = None
    """Side of the square that this teacher sees; null: as the student. Its maps are resized to the student's grid."""
    precision: Literal["fp32", "bf16"] | None = None
    """Of its image encoder's weights and arithmetic; null: as the run. bf16 halves their memory."""
    offload: bool = False
    """Keep its image encoder in main memory and bring it to the device for each batch: slower, less device memory."""


class ExtractionConfig(StrictModel):
    """How `samlet extract` computes and stores what the teachers see in the images."""

    splits: tuple[Literal["train", "val"], ...] = Field(("train",), min_length=1)
    """Which images; training reads those of train."""
    dtype: Literal["fp32", "fp16", "int8"] = "fp16"
    """Numbers of the store: 4, 2 or 1 bytes each; int8 is affine by channel."""
    pack: bool = False
    """Many images in one file, for file systems that hate millions of files."""
    decoder_outputs: bool = False
    """Store the teacher's answers to the run's fixed prompts as well, so that no decoder runs either."""
    dense_mask_logits: bool = True
    """Among them its mask logits, 0.5 MB for each object at 1024 in fp16."""
    batch_size: int = Field(8, ge=1)
    """Images that a GPU encodes at once; a CPU takes one at a time, so that the result never depends on it."""
    workers: int = Field(4, ge=1)
    """Threads that read images and write features beside the network."""
    images_per_shard: int = Field(64, ge=1)
    """About so many images, or variants of images, form the piece of work that one process claims."""


class MaskTeacherConfig(StrictModel):
    """A teacher's automatic masks as objects to learn: pseudo-labels, found before the first step."""

    enable: bool = False
    """Train on the automatic masks of a teacher; its features are another matter (distillation.enable)."""
    method: Literal["replace_gt", "dual_supervision", "gt_override"] = "gt_override"
    """replace_gt: the teacher's masks are the only objects and no mask of the ground truth is opened. gt_override: the
    ground truth, and those masks of the teacher that cover none of its objects. dual_supervision: both, all of them; a
    point under which both lie learns both. Images without masks are labelled by the teacher alone."""
    iou_threshold: Annotated[float, Field(gt=0, le=1)] = 0.5
    """gt_override: a teacher's mask whose IoU with an object of the ground truth reaches this gives way to it."""
    teacher: str | None = None
    """Which of `teachers`, by name; null: the first."""
    precomputed: bool | None = None
    """Read the masks from the teacher's store, where `samlet extract` put them; false: find them when the run starts,
    and keep them in output_dir; null: as that teacher's features."""
    points_per_side: int = Field(32, ge=1)
    """The teacher is asked at a grid of so many points on each side."""
    pred_iou_thresh: Annotated[float, Field(ge=0, le=1)] | None = None
    """Masks that the teacher itself rates below this IoU are dropped; null: below what `samlet tune-amg` found for this
    teacher, else SAM's 0.88."""
    stability_score_thresh: Annotated[float, Field(ge=0, le=1)] | None = None
    """Masks that change more than this when their threshold moves are dropped; null: likewise, else SAM's 0.95."""
    box_nms_thresh: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Of two masks whose boxes overlap by more than this IoU the better one stays."""
    crop_n_layers: int = Field(0, ge=0, le=4)
    """Look again at 4^i crops for each layer i up to this: smaller objects, more time."""
    min_mask_region_area: int = Field(0, ge=0)
    """Holes and islands of fewer pixels of the original image are filled and removed."""
    points_per_batch: int = Field(64, ge=1)
    """Points that are asked at once: device memory; the masks do not depend on it."""
    fast: bool = True
    """The fast search (fewer points where the teacher is sure); false: the plain one, point by point."""

    @property
    def leaves_thresholds_open(self) -> bool:
        """Whether one of them is whatever was tuned."""
        return self.pred_iou_thresh is None or self.stability_score_thresh is None

    def generator(self, tuned: AmgSettings | None = None) -> AmgSettings:
        """The settings of the mask generator; thresholds that are left open are `tuned` ones, else SAM's."""
        from samlet.models.amg import AmgSettings

        ours = {"enable", "method", "iou_threshold", "teacher", "precomputed"}
        given = {name: getattr(self, name) for name in type(self).model_fields if name not in ours}
        otherwise = (tuned or AmgSettings()).as_dict()
        return AmgSettings(**{name: otherwise[name] if value is None else value for name, value in given.items()})


class DynamicLambdaConfig(StrictModel):
    """Lower lambda_coef when validation stops to improve: the student has learnt what the teacher has to say."""

    enable_plateau_scheduler: bool = False
    """Whether lambda_coef is lowered at all."""
    factor: float = Field(0.5, gt=0, lt=1)
    """lambda_coef is multiplied by it."""
    patience: int = Field(3, ge=1)
    """Validations without improvement after which it is; the count then begins anew."""
    min: float = Field(0.0, ge=0)
    """lambda_coef is never lowered below this."""
    threshold: float = Field(0.001, ge=0)
    """What `validation.metric` must gain over its best so far to count as improvement."""


class DistillationConfig(StrictModel):
    """Loss = task loss + lambda_coef * sum of weight * term, averaged over the teachers."""

    enable: bool = False
    """Learn from the teachers; false: from the ground truth alone."""
    lambda_coef: float = Field(1.0, ge=0)
    """Scales the whole distillation loss against the task loss."""
    lambda_warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which lambda_coef rises linearly from 0."""
    dynamic_lambda: DynamicLambdaConfig = DynamicLambdaConfig()
    """Lower lambda_coef when validation stops to improve; it is never raised again."""
    team: TeamRule = "static"
    """static: every teacher counts by its weight. per_sample: for each object only the teacher whose mask has the best
    IoU with the ground truth counts; without ground truth the most confident one."""
    trust: TrustRule = "constant"
    """Teacher against ground truth, object by object. constant: both in full. hard_mask: the teacher counts most where
    it is right and the student wrong (TinySAM). confidence: the teacher by its own IoU estimate c, the ground truth's
    masks by 1 - c (PicoSAM2). Without ground truth the teacher always counts in full."""
    use_precomputed_features: bool = False
    """Read the teachers' features from stores that `samlet extract` wrote, in place of running their encoders."""
    precomputed_root: Path | None = None
    """Where those stores lie: a folder for each teacher, called by its name; with one teacher also its store itself."""
    encoder_patch: EncoderPatchConfig = EncoderPatchConfig()
    """Patch tokens of the image encoder."""
    prompt_embed: PromptEmbedConfig = PromptEmbedConfig(enable=False)
    """The image stream inside the mask decoder, before (layer: 0) or after it has met the prompt."""
    decoder_mask_token: DecoderMaskTokenConfig = DecoderMaskTokenConfig(enable=False)
    """The decoder's four mask tokens."""
    dense_mask_logits: DenseMaskLogitsConfig = DenseMaskLogitsConfig()
    """Mask logits, pixel by pixel."""
    encoder_matching: EncoderMatchingConfig = EncoderMatchingConfig(enable=False)
    """Several layers of the image encoder at once."""
    decoder_matching: DecoderMatchingConfig = DecoderMatchingConfig(enable=False)
    """What the mask decoder multiplies into logits: upscaled features and the masks' vectors."""
    attention_matching: AttentionMatchingConfig = AttentionMatchingConfig(enable=False)
    """Attention maps of the mask decoder and of the image encoder."""
    rkd: RkdConfig = RkdConfig(enable=False)
    """How the patches of an image lie to each other: distances and angles."""

    def terms(self) -> Iterator[tuple[str, TermConfig]]:
        """The objectives that take part, by name."""
        for name in TERMS:
            term: TermConfig = getattr(self, name)
            if self.enable and term.enable:
                yield name, term

    @property
    def asks_prompts(self) -> bool:
        """Whether a term compares answers to prompts; the others look at images alone."""
        names = {name for name, _ in self.terms()} - {*OF_IMAGES}
        return bool(names - ({"attention_matching"} if not self.attention_matching.decoder else set()))

    def mistakes(self) -> Iterable[tuple[Loc, str]]:
        """What no single field can see."""
        if self.dynamic_lambda.enable_plateau_scheduler and self.dynamic_lambda.min > self.lambda_coef:
            yield ("dynamic_lambda", "min"), f"is above lambda_coef ({self.lambda_coef:g}), which only ever falls"
        if self.enable and not list(self.terms()):
            yield ("enable",), "is true, but every term is disabled; enable one, or set it to false"


def normalized_weights(teachers: Sequence[TeacherConfig]) -> list[float]:
    """Shares of the teachers, summing to 1; where none is given all count alike.

    A teacher without a weight beside others with one gets the mean of those given.
    """
    given = [teacher.weight for teacher in teachers if teacher.weight is not None]
    default = sum(given) / len(given) if given else 1.0
    shares = [default if teacher.weight is None else teacher.weight for teacher in teachers]
    return [share / sum(shares) for share in shares]
