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
from samlet.models import ModelConfig, build_sam, save_sam_upstream
from samlet.models.build import ENCODERS
from samlet.models.configs import DEPTHS
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
    "values",
    [
        *[{"image_size": 100}, {"image_size": 16}, {"kind": "vit_x"}, {"encoder": {"wdith": 3}}, {"ckpt": "x"}],
        *[{"encoder": {"embed_dims": [8, 16]}}, {"encoder": {"depths": [1, 0, 1, 1]}}],
        *[{"encoder": {"window_sizes": []}}, {"encoder": {"global_attn_indexes": [-1]}}],
    ],
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


@pytest.mark.parametrize(
    ("values", "field", "said"),
    [
        ({"kind": "vit_b", "encoder": {"num_heads": 0}}, "num_heads", "1 or more"),
        ({"kind": "vit_b", "encoder": {"embed_dim": 24, "num_heads": 5}}, "num_heads", "24 channels cannot be shared"),
        ({"encoder": {"num_heads": [1, 2]}}, "num_heads", "a list of four"),
        ({"encoder": {"num_heads": [1, 2, 0, 2]}}, "num_heads", "1 or more"),
        ({"encoder": {"embed_dims": [7, 8, 8, 8], "num_heads": [2, 2, 2, 3]}}, "num_heads", "8 channels"),
        ({"kind": "vit_b", "encoder": {"depth": 2, "global_attn_indexes": [7]}}, "global_attn_indexes", "2 blocks"),
        ({"kind": "vit_l", "encoder": {"global_attn_indexes": [24]}}, "global_attn_indexes", "24 blocks"),
    ],
)
def test_sizes_that_do_not_fit_are_mistakes(values: dict[str, Any], field: str, said: str) -> None:
    [(place, message)] = config(**values).mistakes()
    assert place == ("encoder", field)
    assert said in message


def test_depths_are_those_of_the_models() -> None:
    assert {kind: sizes["depth"] for kind, sizes in ENCODERS.items() if kind != "vit_t"} == DEPTHS


def test_fewer_blocks_keep_the_global_ones_among_them() -> None:
    assert build_sam("vit_b", 64, embed_dim=24, num_heads=3, depth=3).arch["global_attn_indexes"] == [2]


def test_a_decoder_of_other_sizes_is_named_by_its_first_tensor(tmp_path: Path) -> None:
    donors = {"mlp": small_sam(decoder_mlp_dim=32), "depth": small_sam(decoder_depth=3, decoder_mlp_dim=2048)}
    for name, donor in donors.items():
        save_sam_upstream(donor, tmp_path / f"{name}.pt")
    told = {
        "mlp": r"mask_decoder\.transformer\.layers\.0\.mlp\.lin1\.weight is \(32, 256\), the model's is \(2048, 256\)",
        "depth": r"mask_decoder\.transformer\.layers\.2\.\S+ is \(.*\), the model's is none",
    }
    for name, message in told.items():
        with pytest.raises(SamletError, match=rf"^\S+{name}\.pt: its decoder has other sizes: {message}$"):
            config(decoder_checkpoint=str(tmp_path / f"{name}.pt"), image_size=64, encoder=ENCODER).build()


def test_configs_import_no_torch() -> None:
    code = "import sys, samlet.models, samlet.models.configs; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_resolves() -> None:
    import samlet.models

    for name in samlet.models.__all__:
        assert getattr(samlet.models, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        samlet.models.nothing  # noqa: B018
