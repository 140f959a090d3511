"""What the configuration knows of its terms agrees with what is built of them."""

from __future__ import annotations

from json import dumps

import pytest

from samlet.distill.configs import TERMS, DistillationConfig
from samlet.distill.objectives import build_objectives


@pytest.mark.parametrize("term", TERMS)
def test_which_terms_look_at_prompts(term: str) -> None:
    alone = {name: {"enable": name == term} for name in TERMS}
    config = DistillationConfig.model_validate_json(dumps({"enable": True, **alone}))
    (objective,) = build_objectives(config)
    assert config.asks_prompts is (objective.per == "prompt")


def test_attention_of_the_encoder_alone_looks_at_images() -> None:
    settings = {"enable": True, "decoder": [], "encoder": 1}
    alone = {**{name: {"enable": False} for name in TERMS}, "attention_matching": settings}
    config = DistillationConfig.model_validate_json(dumps({"enable": True, **alone}))
    assert [objective.per for objective in build_objectives(config)] == ["image"]
    assert not config.asks_prompts
