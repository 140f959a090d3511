"""Which parts of the student train, and the optimizer that holds all of them from the start."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")
NEVER_USED = ("image_encoder.norm_head.", "image_encoder.head.")  # TinyViT's classifier, kept for its keys
WITHOUT_DECAY = ("attention_biases", "pos_embed", "rel_pos", "embed", "token")


def set_trainable(student: nn.Module, frozen: Iterable[str], batch_norm: str) -> None:
    """Train mode for the whole, then gradients off and BatchNorm in eval for what is frozen.

    A frozen part whose BatchNorm went on in train mode would drift with every batch. `batch_norm` "frozen" keeps
    all statistics as they are, which small batches want; "train" lets those of the trained parts follow the data.
    """
    student.train()
    for part in PARTS:
        module, trains = student.get_submodule(part), part not in frozen
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(trains and not f"{part}.{name}".startswith(NEVER_USED))
        if not trains or batch_norm == "frozen":
            for layer in _batch_norms(module):
                layer.eval()


def _batch_norms(module: nn.Module) -> Iterator[nn.Module]:
    return (layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm))


def build_optimizer(
    module: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW over every parameter, frozen or not: one that thaws later is already in (it has no gradient until then)."""
    decayed, exempt = list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in module.named_parameters():
        plain = parameter.ndim >= 2 and not any(word in name for word in WITHOUT_DECAY)
        (decayed if plain else exempt).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
