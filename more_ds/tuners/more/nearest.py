"""How near a prompt is to the task embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from more_ds.tuners.more.gated import GatedMap
from more_ds.tuners.more.model import MoreModel


@contextmanager
def similarities(model: MoreModel, adapter_name: str = "default") -> Iterator[dict[str, Tensor]]:
    """Note, in the forward passes inside, how near the pooled prompt is to every task in every map.

    Maps that take no part in the contrastive loss are left out, and those that read the answer: the decoder of an
    encoder-decoder, but for its keys and values of the prompt.

    Yields:
        By name of the map, (batch, tasks) cosines of the last forward pass.

    Raises:
        ValueError: a task is merged into the weights.
    """
    if model.context.merged_task is not None:
        raise ValueError("a task is merged into the weights; call unmerge_adapter() first")
    layers = [m for m in model.model.modules() if isinstance(m, GatedMap) and m.compares(adapter_name)]
    seen: dict[str, Tensor] = {}

    def note(layer: Any, inputs: tuple[Any, ...]) -> None:
        seen[layer.key] = layer.similarity(adapter_name, layer.reads(*inputs))

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
