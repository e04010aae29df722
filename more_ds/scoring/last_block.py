"""The last block's feed-forward network, for the rows of a batch that are read.

After the last attention no token looks at another one any more, so what the network of that block makes of a prompt is
never used: only its end and the answers are. It is one part in `layers` of a pass, and two thirds of such a part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from more_ds.text_model import TextModel


@contextmanager
def for_the_last(text_model: TextModel, count: int) -> Iterator[None]:
    """Compute it for the last `count` tokens of every row, and let it add nothing to the others.

    Whole rows are computed where blocks have no network that is named as in most models, and where an adapter in it
    weighs a token by others (`TextModel.takes_cache`).
    """
    network = _network(text_model)
    if network is None or not text_model.takes_cache:
        yield
        return
    hidden: list[int] = []

    def take(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args:
            return None  # it is called by keyword: whole rows
        hidden.append(args[0].shape[1])
        return args[0][:, -count:].contiguous(), *args[1:]

    def give(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not args:
            return None
        first, *others = [output] if isinstance(output, Tensor) else output
        padded = nn.functional.pad(first, (0, 0, hidden.pop() - first.shape[1], 0))
        return (padded, *others) if others else padded

    hooks = [network.register_forward_pre_hook(take), network.register_forward_hook(give)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _network(text_model: TextModel) -> nn.Module | None:
    """The feed-forward network of the last block of a causal model."""
    stacks = [m for m in text_model.base.modules() if isinstance(m, nn.ModuleList)]
    blocks = [stack for stack in stacks if len(stack) == getattr(text_model.config, "num_hidden_layers", None)]
    network = getattr(blocks[0][-1], "mlp", None) if len(blocks) == 1 else None
    return network if isinstance(network, nn.Module) else None
