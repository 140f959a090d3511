"""Data sets, prompts, augmentation and sample order; names are imported when they are asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from samlet.data.batches import collate as collate
    from samlet.data.configs import AugmentationConfig as AugmentationConfig
    from samlet.data.configs import DatasetConfig as DatasetConfig
    from samlet.data.configs import PromptConfig as PromptConfig
    from samlet.data.dataset import EvalImage as EvalImage
    from samlet.data.dataset import SegmentationDataset as SegmentationDataset
    from samlet.data.dataset import ValidationSet as ValidationSet
    from samlet.data.images import read_image as read_image
    from samlet.data.records import Problem as Problem
    from samlet.data.records import Record as Record
    from samlet.data.sampler import SampleKey as SampleKey
    from samlet.data.sampler import StepSampler as StepSampler
    from samlet.data.sampler import epoch_order as epoch_order
    from samlet.data.synthetic import write_dataset as write_dataset

_HOME = {
    "AugmentationConfig": "samlet.data.configs",
    "DatasetConfig": "samlet.data.configs",
    "EvalImage": "samlet.data.dataset",
    "Problem": "samlet.data.records",
    "PromptConfig": "samlet.data.configs",
    "Record": "samlet.data.records",
    "SampleKey": "samlet.data.sampler",
    "SegmentationDataset": "samlet.data.dataset",
    "StepSampler": "samlet.data.sampler",
    "ValidationSet": "samlet.data.dataset",
    "collate": "samlet.data.batches",
    "epoch_order": "samlet.data.sampler",
    "read_image": "samlet.data.images",
    "write_dataset": "samlet.data.synthetic",
}

__all__ = [
    "AugmentationConfig",
    "DatasetConfig",
    "EvalImage",
    "Problem",
    "PromptConfig",
    "Record",
    "SampleKey",
    "SegmentationDataset",
    "StepSampler",
    "ValidationSet",
    "collate",
    "epoch_order",
    "read_image",
    "write_dataset",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
