"""What PEFT's own adapters need beside a base model in half precision.

DeepSpeed casts parameters and leaves buffers as they are; PEFT makes new parameters where it casts old ones.
"""

from __future__ import annotations

from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.vera.layer import VeraLayer
from torch import nn


def freeze_counts(model: nn.Module) -> None:
    """Freeze AdaLoRA's numbers of ranks, which PEFT's cast to the base model's type makes trainable."""
    for layer in model.modules():
        if isinstance(layer, AdaLoraLayer):
            layer.ranknum.requires_grad_(False)


def follow_vectors(model: nn.Module) -> None:
    """Give VeRA's frozen matrices, which are buffers, the type of the vectors that scale them."""
    for layer in model.modules():
        if isinstance(layer, VeraLayer):
            for name, vector in layer.vera_lambda_d.items():
                for matrices in (layer.vera_A, layer.vera_B):  # all layers share them
                    if matrices is not None:
                        matrices._buffers[name] = matrices[name].to(vector.dtype)
