"""Compute a teacher's features ahead of time, by the flags of the distillation guide; `samlet extract` is the same.

    python scripts/extract_teacher_features.py --teacher_name SAM_vitH --teacher_cfg configs/sam_vith.yaml
        --teacher_ckpt weights/sam_vit_h_4b8939.pth --dataset_base_dir datasets
        --output_base_dir precomputed/SAM_vitH --splits train val --fp16

The configuration says which features (terms and their taps), input size and augmentation; the flags say the rest.
`--mode everything --grid_points N` stores the teacher's automatic masks as well, found from N x N points on each image,
for a run that learns them (mask_teacher).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from samlet.cli import main as run


def main() -> None:
    """Lay the flags over the configuration and extract."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher_name", required=True, help="how logs and errors call the teacher")
    parser.add_argument("--teacher_cfg", type=Path, required=True, help="a configuration of samlet")
    parser.add_argument("--teacher_ckpt", type=Path, required=True, help="the teacher's weights")
    parser.add_argument("--dataset_base_dir", type=Path, required=True, help="folder of the images and masks")
    parser.add_argument("--output_base_dir", type=Path, required=True, help="folder of the store")
    parser.add_argument("--splits", nargs="+", choices=["train", "val"], default=["train"])
    parser.add_argument("--fp16", action="store_true", help="store half precision; on a GPU compute in it as well")
    parser.add_argument(
        "--mode",
        choices=["point", "box", "mixed", "everything"],
        help="of the run that will read the store; everything: find and store the teacher's automatic masks, too",
    )
    parser.add_argument(
        "--grid_points", type=int, help="with --mode everything: points on each side of the grid (32); no other effect"
    )
    parser.add_argument("--processes", type=int, default=1, help="at work at once")
    given = parser.parse_args()
    teacher = {"name": given.teacher_name, "checkpoint": str(given.teacher_ckpt)}
    overrides = [
        f"teachers={json.dumps([teacher])}",
        f"dataset.root={json.dumps(str(given.dataset_base_dir))}",
        f"distillation.precomputed_root={json.dumps(str(given.output_base_dir))}",
        f"extraction.splits={json.dumps(given.splits)}",
        f"extraction.dtype={'fp16' if given.fp16 else 'fp32'}",
    ]
    if given.mode is not None:
        overrides.append(f"dataset.mode={given.mode}")
    if given.mode == "everything":
        overrides += ["mask_teacher.enable=true", "mask_teacher.teacher=null", "mask_teacher.precomputed=null"]
        overrides += [] if given.grid_points is None else [f"mask_teacher.points_per_side={given.grid_points}"]
    if given.fp16:
        import torch  # noqa: PLC0415

        overrides += ["training.precision=fp16"] if torch.cuda.is_available() else []  # a CPU has no arithmetic for it
    place = ["--store", str(given.output_base_dir), "--processes", str(given.processes)]
    sys.argv = ["samlet", "extract", str(given.teacher_cfg), *overrides, *place]
    run()


if __name__ == "__main__":
    main()
