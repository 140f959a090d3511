from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError

from samlet.losses import (
    AttentionMatchingConfig,
    DecoderMaskTokenConfig,
    DecoderMatchingConfig,
    DenseMaskLogitsConfig,
    EncoderMatchingConfig,
    EncoderPatchConfig,
    PromptEmbedConfig,
    RkdConfig,
    TaskLossConfig,
    dense_mask_logits_loss,
    task_loss,
)
from samlet.losses.configs import evenly_spaced
from samlet.schema import StrictModel

CONFIGS: dict[str, type[StrictModel]] = {
    "encoder_patch": EncoderPatchConfig,
    "prompt_embed": PromptEmbedConfig,
    "decoder_mask_token": DecoderMaskTokenConfig,
    "dense_mask_logits": DenseMaskLogitsConfig,
    "encoder_matching": EncoderMatchingConfig,
    "decoder_matching": DecoderMatchingConfig,
    "attention_matching": AttentionMatchingConfig,
    "rkd": RkdConfig,
    "task": TaskLossConfig,
}
DISTILLATION = sorted(set(CONFIGS) - {"task"})
SNIPPETS = ["decoder_mask_token", "dense_mask_logits", "encoder_patch", "prompt_embed"]

# the configuration snippet that users have, key by key
SNIPPET = """{
  "encoder_patch":      { "enable": true,  "w_l2": 1.0, "w_cos": 1.0 },
  "prompt_embed":       { "enable": true,  "w_mse": 0.7, "w_cos": 0.3 },
  "decoder_mask_token": { "enable": true,  "w_kl": 1.0, "temperature": 0.5 },
  "dense_mask_logits":  { "enable": true,  "w_kl": 0.6, "w_focal": 0.4, "gamma": 2.0 }
}"""


@pytest.mark.parametrize("name", SNIPPETS)
def test_the_known_snippet_validates_as_it_is_and_says_the_defaults(name: str) -> None:
    block = CONFIGS[name].model_validate_json(json.dumps(json.loads(SNIPPET)[name]))
    assert block == CONFIGS[name].model_validate({"enable": True})
    assert CONFIGS[name]() == block, "a block that is written down takes part"
    assert CONFIGS[name].model_validate({"enable": False}) != block


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_field_explains_itself(name: str) -> None:
    for field, facts in CONFIGS[name].model_fields.items():
        assert facts.description, f"{name}.{field} has no docstring"


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("encoder_patch", "weight", -1.0),
        ("encoder_patch", "w_l2", -0.1),
        ("encoder_patch", "w_l3", 1.0),
        ("prompt_embed", "w_cos", float("nan")),
        ("prompt_embed", "layer", -1),
        ("prompt_embed", "enable", 1),
        ("decoder_mask_token", "temperature", 0.0),
        ("dense_mask_logits", "temperature", -1.0),
        ("dense_mask_logits", "gamma", 0.5),
        ("encoder_patch", "projection", "mean"),
        ("encoder_matching", "layers", 0),
        ("encoder_matching", "layers", []),
        ("encoder_matching", "projection", "tile"),
        ("encoder_matching", "temperature", 0.0),
        ("decoder_matching", "features", []),
        ("decoder_matching", "features", ["logits"]),
        ("attention_matching", "decoder", ["0.cross"]),
        ("attention_matching", "encoder", -1),
        ("rkd", "patches", 2),
        ("rkd", "patches", 1000),
        ("rkd", "w_angle", -1.0),
        ("task", "iou_kind", "l2"),
        ("task", "focal_alpha", 1.5),
        ("task", "dice", float("inf")),
    ],
)
def test_nonsense_is_refused(name: str, field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        CONFIGS[name].model_validate({field: value})


def test_every_distillation_setting_has_an_effect() -> None:
    """Pitfall 35: a documented key that nobody reads is a lie."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"decoder_mask_token": (4, 4, 6), "rkd": (4, 5, 6)}
    by_the_distiller = {"enable", "weight", "layer", "teacher_tap", "student_tap", "projection"} | {
        *{"layers", "features", "patches"},
        *{"decoder", "encoder", "resample"},
    }
    for name in DISTILLATION:
        student, teacher = (2 * torch.randn(shapes.get(name, (4, 6, 3, 3)), generator=generator) for _ in range(2))
        pair = ([student], [teacher]) if name == "encoder_matching" else (student, teacher)
        if name == "attention_matching":
            continue  # it has no settings but what is compared
        plain = CONFIGS[name]().build()(*pair)  # type: ignore[attr-defined]
        for field in set(CONFIGS[name].model_fields) - by_the_distiller:
            changed = CONFIGS[name].model_validate({field: 3.0}).build()(*pair)  # type: ignore[attr-defined]
            assert not torch.allclose(changed, plain), f"{name}.{field} changes nothing"


def test_layers_by_number_are_evenly_spaced_depths() -> None:
    assert evenly_spaced(2) == (("blocks.1/2", "blocks.1/2"), ("blocks.2/2", "blocks.2/2"))
    assert evenly_spaced(0, "attention") == ()
    assert evenly_spaced((("blocks.-1", "blocks.30"),)) == (("blocks.-1", "blocks.30"),)
    config = EncoderMatchingConfig.model_validate_json('{"layers": [["blocks.-1", "blocks.30"], ["neck", "neck"]]}')
    assert config.layers == (("blocks.-1", "blocks.30"), ("neck", "neck"))


def test_attention_matching_of_nothing_is_a_mistake() -> None:
    assert [loc for loc, _ in AttentionMatchingConfig(decoder=()).mistakes()] == [("decoder",)]
    assert list(AttentionMatchingConfig(decoder=(), encoder=2).mistakes()) == []
    assert list(AttentionMatchingConfig(decoder=(), enable=False).mistakes()) == []


def test_the_built_losses_are_the_functions_with_their_settings() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 4, 5, 5, generator=generator) for _ in range(2))
    config = DenseMaskLogitsConfig(w_kl=0.1, w_focal=2.0, w_dice=0.5, gamma=3.0, temperature=1.5)
    expected = dense_mask_logits_loss(student, teacher, w_kl=0.1, w_focal=2.0, w_dice=0.5, gamma=3.0, temperature=1.5)
    assert config.build()(student, teacher) == expected
    masks, ambiguous = teacher[:, 0].sigmoid(), torch.tensor([True, False, True])
    arguments = (student, student[..., 0, 0], masks, None, ambiguous)
    task = TaskLossConfig(focal=0.0, dice=2.0, iou_kind="mse", focal_alpha=0.6, focal_gamma=1.0)
    terms = task_loss(*arguments, w_focal=0.0, w_dice=2.0, iou_kind="mse", alpha=0.6, gamma=1.0)
    torch.testing.assert_close(task.build()(*arguments), terms, rtol=0, atol=0)
    assert not torch.equal(TaskLossConfig().build()(*arguments)["focal"], terms["focal"])


def test_configs_cost_no_torch() -> None:
    code = "import sys, samlet.losses as L; L.TaskLossConfig(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    import samlet.losses

    with pytest.raises(AttributeError, match="no_such_loss"):
        samlet.losses.no_such_loss  # noqa: B018
