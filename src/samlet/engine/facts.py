"""run.json: what somebody needs to know to trust a run or to repeat it; and config.yaml's word against a change."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from samlet import __version__
from samlet.artefacts import sha256_of
from samlet.errors import ConfigError

if TYPE_CHECKING:
    from samlet.engine.run_dir import RunDir

WITHOUT_EFFECT = (
    *("$schema", "output_dir", "resume", "training.num_workers", "training.device", "logging", "checkpoint"),
    *("mask_teacher.points_per_batch", "mask_teacher.pred_iou_thresh", "mask_teacher.stability_score_thresh"),
)
"""Keys that may differ between two starts of one run: the weights do not depend on them, or run.json says more: which
thresholds automatic masks were found with, wherever these came from."""


def facts_of_start(plain: Mapping[str, Any], world: int, images: Sequence[tuple[str, Path]]) -> dict[str, Any]:
    """Versions, place, seeds, digests, and what decides whether equal starts end in equal bits."""
    return {
        "outcome": "not finished",  # until somebody knows better; a killed run has the last word here
        "samlet": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "processes": world,
        "threads": torch.get_num_threads(),
        "determinism": determinism(),
        "git": _git_state(),
        "seed": plain["seed"],
        "config_sha256": digest(_with_effect(plain)),
        "data_sha256": digest([(image_id, path.stat().st_size) for image_id, path in images]),
    }


def determinism() -> dict[str, Any]:
    """The switches of torch that choose between faster arithmetic and the same bits again."""
    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def facts_of_end(weights: Path, **facts: Any) -> dict[str, Any]:
    """The outcome, and the digest of the final weights: equal for two runs of one configuration on one machine."""
    return {"outcome": "finished", **facts, "final_weights_sha256": sha256_of(weights)}


def refuse_other_config(plain: Mapping[str, Any], former: Mapping[str, Any] | None, folder: RunDir) -> None:
    """A run goes on with the configuration it was started with, `former`.

    Raises:
        ConfigError: another one; every key that differs is named with both values.
    """
    if former is None or plain["resume"] == "never":
        return
    now, then = _flat(_with_effect(plain)), _flat(_with_effect(former))
    changed = [
        f"{key} was {then.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*now, *then})
        if now.get(key) != then.get(key)
    ]
    if changed:
        raise ConfigError(
            f"{folder.config}: this folder holds a run with another configuration: {'; '.join(changed)}. "
            "Choose another output_dir; to start from this run's weights set model.checkpoint to its folder"
        )


def digest(value: Any) -> str:
    """sha256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _with_effect(plain: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads(json.dumps(plain))
    for key in WITHOUT_EFFECT:
        *blocks, last = key.split(".")
        block = kept
        for name in blocks:
            block = block.get(name, {})
        block.pop(last, None)
    parts: list[dict[str, Any]] = [kept, *kept.get("stages", ())]
    if not any(block.get("distillation", {}).get("enable") for block in parts):
        kept["distillation"] = {"enable": False}
        kept["teachers"] = kept["teachers"] if kept.get("mask_teacher", {}).get("enable") else []
    if not kept.get("mask_teacher", {}).get("enable"):
        kept["mask_teacher"] = {"enable": False}
    return kept


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {key: leaf for name, member in value.items() for key, leaf in _flat(member, f"{prefix}.{name}").items()}
    if isinstance(value, list) and any(isinstance(member, dict) for member in value):
        return _flat({str(index): member for index, member in enumerate(value)}, prefix)
    return {prefix.removeprefix("."): value}


def _git_state() -> dict[str, Any] | None:
    """Commit of the working directory and whether it was changed; None outside of a repository."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        status = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "changed": bool(status.stdout.strip())}
