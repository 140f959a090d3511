"""Which parts of the student train, and the optimizer that holds all of them from the start."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from samlet.models.lora import adapted_layers, is_factor

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from samlet.models.sam import Sam

PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")
NEVER_USED = ("image_encoder.norm_head.", "image_encoder.head.")  # TinyViT's classifier, kept for its keys
WITHOUT_DECAY = (
    *("attention_biases", "pos_embed", "rel_pos"),  # position tables of the image encoders
    *("point_embeddings", "not_a_point_embed", "no_mask_embed"),  # what the prompt encoder looks up
    *("iou_token", "mask_tokens"),  # what the mask decoder asks with
)
"""Tables of learned vectors; a module that maps one thing to another decays, whatever its name says of tokens."""


def set_trainable(student: nn.Module, frozen: Iterable[str], batch_norm: str) -> None:
    """Train mode for the whole, then gradients off and BatchNorm in eval for what is frozen.

    A frozen part whose BatchNorm went on in train mode would drift with every batch. `batch_norm` "train" lets
    the statistics of the trained parts follow the data; otherwise all stay as they are, which small batches want.
    Of a part with LoRA only the factors train.
    """
    student.train()
    for part in PARTS:
        module, trains = student.get_submodule(part), part not in frozen
        adapted = bool(adapted_layers(module))
        for name, parameter in module.named_parameters():
            used = is_factor(name) if adapted else not f"{part}.{name}".startswith(NEVER_USED)
            parameter.requires_grad_(trains and used)
        if not trains or adapted or batch_norm != "train":
            for layer in _batch_norms(module):
                layer.eval()


def _batch_norms(module: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d))


@torch.no_grad()
def calibrate_batch_norm(student: Sam, batches: Iterable[Float[Tensor, "B 3 S S"]]) -> None:
    """Set every BatchNorm's statistics to their means over some batches, as fresh weights produce them.

    Trained from scratch in batches of a few unlike images, BatchNorm learns with statistics of a batch and is used
    with those of a mixture; measured once and then kept, they are the same in training and in use.
    """
    layers = list(_batch_norms(student))
    modes = [(layer, layer.training, layer.momentum) for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.training, layer.momentum = True, None
    for pixels in batches:
        student.encode(pixels)
    for layer, training, momentum in modes:
        layer.training, layer.momentum = training, momentum


def named_parameters(student: nn.Module, projections: nn.Module | None = None) -> Mapping[str, nn.Parameter]:
    """Everything that an optimizer holds, by the name under which its moments are saved."""
    beside = () if projections is None else projections.named_parameters(prefix="projections")
    return {**dict(student.named_parameters()), **dict(beside)}


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], *, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW over every parameter, frozen or not: one that thaws later is already in (it has no gradient until then)."""
    decayed, exempt = list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in parameters.items():
        plain = parameter.ndim >= 2 and not any(word in name for word in WITHOUT_DECAY)
        (decayed if plain else exempt).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def set_weight_decay(optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    """Let the weights that decay do so at another rate."""
    optimizer.param_groups[0]["weight_decay"] = weight_decay
