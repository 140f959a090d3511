"""Model blocks of a configuration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from samlet.errors import SamletError
from samlet.models import ModelConfig, save_sam_upstream
from tests.models.sizes import TINY, VIT, small_sam

ENCODER = {name: value for name, value in TINY.items() if not name.startswith("decoder")}


def config(**values: Any) -> ModelConfig:
    return ModelConfig.model_validate_json(json.dumps(values))


def test_build_with_fresh_weights() -> None:
    sam = config(image_size=64, encoder=ENCODER).build()
    assert sam.arch.items() >= {"kind": "vit_t", "image_size": 64, **ENCODER}.items()
    sam.train()
    assert not any(m.training for m in sam.modules() if isinstance(m, nn.BatchNorm2d))
    free = config(image_size=64, encoder=ENCODER, batch_norm="train").build().train()
    assert all(m.training for m in free.modules() if isinstance(m, nn.BatchNorm2d))


def test_build_from_a_checkpoint(tmp_path: Path) -> None:
    sam = small_sam()
    save_sam_upstream(sam, tmp_path / "tiny.pt")
    built = config(checkpoint=str(tmp_path / "tiny.pt"), image_size=64).build()
    assert all(torch.equal(t, built.state_dict()[n]) for n, t in sam.state_dict().items())
    with pytest.raises(SamletError, match=r"tiny\.pt: holds a vit_t, the configuration says kind: vit_h"):
        config(kind="vit_h", checkpoint=str(tmp_path / "tiny.pt"), image_size=64).build()
    with pytest.raises(SamletError, match=r"tiny\.pt: "):
        config(checkpoint=str(tmp_path / "tiny.pt"), image_size=64, encoder={"depths": [2, 2, 2, 2]}).build()


@pytest.mark.parametrize(
    "values", [{"image_size": 100}, {"image_size": 16}, {"kind": "vit_x"}, {"encoder": {"wdith": 3}}, {"ckpt": "x"}]
)
def test_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config(**values)


def test_sizes_of_another_kind_are_mistakes() -> None:
    vit = {name: value for name, value in VIT.items() if not name.startswith("decoder")}
    assert [path for path, _ in config(kind="vit_b", encoder=ENCODER).mistakes()] == [
        ("encoder", "embed_dims"),
        ("encoder", "depths"),
        ("encoder", "window_sizes"),
        ("encoder", "num_classes"),
        ("encoder", "num_heads"),
    ]
    assert ("encoder", "embed_dim") in [path for path, _ in config(kind="vit_t", encoder=vit).mistakes()]
    assert not list(config(kind="vit_b", encoder=vit).mistakes())
    assert not list(config(encoder=ENCODER).mistakes())


def test_configs_import_no_torch() -> None:
    code = "import sys, samlet.models, samlet.models.configs; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_resolves() -> None:
    import samlet.models

    for name in samlet.models.__all__:
        assert getattr(samlet.models, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        samlet.models.nothing  # noqa: B018
