"""MoRE on experts whose weights are stacked in one module: a pair for every expert, a rank for every task.

Each stacked weight of a block is one map. Expert e of E has A_e (r x in) and B_e (out x r) of its own; the gate and the
task embeddings are the map's, so that a task has one rank in it, for all experts:

    y_e = W_e x + (alpha / r) * B_e ((A_e dropout(x)) * v)

The paper adapts no mixture of experts. Our choice of what the contrastive loss pools: for the first weight the input of
the block; for the second, whose input every expert makes for itself, the sum of those inputs over a token's experts, by
the router's weights. A gate on the pooled input is not offered: a token has as many inputs as it has experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from more_ds.numerics import at_least_float32
from more_ds.tuners.base import NOT_FINITE, PARTITIONED
from more_ds.tuners.context import TaskContext, repeat_rows
from more_ds.tuners.more.config import MoreConfig
from more_ds.tuners.more.gated import GatedMap
from more_ds.tuners.more.grouped import Routing, Stack, grouped_linear
from more_ds.tuners.stacked_weights import StackedExperts


class MoreExperts(nn.Module):
    """The experts of a block with their adapted maps: children of the names of the weights.

    No tuner layer itself; its maps are.
    """

    def __init__(self, experts: StackedExperts, context: TaskContext, role: str) -> None:
        """Wrap the experts.

        Args:
            experts: as they are in the model.
            context: the model's task context.
            role: which sequence they read; see `GatedMap`.

        Raises:
            ValueError: their forward is not the one that this class knows, or is cut over processes.
        """
        super().__init__()
        kind = type(experts.module).__name__
        if not experts.follows_contract:
            raise ValueError(f"{experts.name} is a {kind}, whose experts MoRE cannot adapt; use lora, or other maps")
        if getattr(experts.module, "_is_expert_parallel", False):
            raise ValueError(f"the experts of {experts.name} are spread over processes; MoRE needs them in one")
        self.base_layer: Any = experts.module
        self._experts, self._context, self._role = (experts,), context, role

    def get_base_layer(self) -> nn.Module:
        """The wrapped module."""
        layer: nn.Module = self.base_layer
        return layer

    def adapt(self, weight: str, adapter_name: str, config: MoreConfig) -> StackedMap:
        """Add an adapter to the stacked weight of this name.

        Raises:
            ValueError: the adapter gates on the pooled input.
        """
        if config.gate_input == "pooled":
            raise ValueError(
                "gate_input='pooled' does not go with stacked experts, where a token has several inputs; use "
                "gate_input='task', or target_modules: attention"
            )
        if weight not in self._modules:
            layer = StackedMap(self._experts[0], weight, self._context, self._role)
            layer._active_adapter = adapter_name
            self.add_module(weight, layer)
        found = self._modules[weight]
        assert isinstance(found, StackedMap)
        found.update_layer(adapter_name, config)
        return found

    @property
    def maps(self) -> list[StackedMap]:
        """The adapted weights."""
        return [child for child in self.children() if isinstance(child, StackedMap)]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """(tokens, hidden), (tokens, k) experts and (tokens, k) weights to (tokens, hidden)."""
        for layer in self.maps:
            if layer.disable_adapters and layer.merged:
                layer.unmerge()
        if not any(layer.works() for layer in self.maps):
            result: Tensor = self.base_layer(*args, **kwargs)
        else:
            # Under ZeRO-3 the weights are there in a call of the module that holds them, and nowhere else.
            with _instead(self.base_layer, self._compute):
                result = self.base_layer(*args, **kwargs)
        return result

    def _compute(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        base = self.base_layer
        routing = Routing(top_k_index, base.num_experts)
        first = "gate_up_proj" if base.has_gate else "up_proj"
        x = self._product(first, hidden_states[routing.tokens], routing, lambda: hidden_states)
        x = base._apply_gate(x) if base.has_gate else base.act_fn(x)
        y = self._product("down_proj", x, routing, lambda: routing.combined(x, top_k_weights))
        if base.has_post_expert_norm:
            y = base.post_expert_norm(y)
        return routing.combined(y, top_k_weights).to(hidden_states.dtype)

    def _product(self, weight: str, x: Tensor, routing: Routing, prompt: Callable[[], Tensor]) -> Tensor:
        """(pairs, in) to (pairs, out) by a stacked weight of the base and the update of its map, if it has one."""
        base, layer = self.base_layer, self._modules.get(weight)
        y = grouped_linear(x, getattr(base, weight), routing, base.is_transposed)
        if base.has_bias:
            y = y + getattr(base, f"{weight}_bias")[routing.experts]
        update = layer(x, routing, prompt) if layer is not None else None
        return y if update is None else y + update.to(y.dtype)


class StackedMap(GatedMap):
    """One stacked weight with a MoRE pair per adapter; it computes the update alone."""

    def __init__(self, experts: StackedExperts, weight: str, context: TaskContext, role: str) -> None:
        """Adapt the stacked weight of this name; the others are those of `MoreExperts`."""
        self.num_experts, *sizes = experts.shapes[weight]
        self.is_transposed = bool(experts.module.is_transposed)
        in_features, out_features = sizes if self.is_transposed else reversed(sizes)
        super().__init__(context, role, f"{experts.name}.{weight}", in_features, out_features)
        self.parameter_name = weight
        self._home = (experts.module,)  # in a tuple: the module is a child of `MoreExperts`

    def get_base_layer(self) -> nn.Module:
        """The module that holds the weight."""
        return self._home[0]

    def factor(self, in_features: int, out_features: int) -> nn.Module:
        """A fresh A or B of every expert."""
        return Stack(self.num_experts, in_features, out_features)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        weight = self._weight()
        return weight.device, weight.dtype

    def _weight(self) -> nn.Parameter:
        weight: nn.Parameter = getattr(self._home[0], self.parameter_name)
        return weight

    def works(self) -> bool:
        """Whether there is anything to add to what the base computes."""
        return not (self.disable_adapters or self.merged) and any(name in self.more_A for name in self.active_adapters)

    def reads(self, *inputs: Any) -> Tensor:
        """What is pooled of the prompt, (batch, length, in); see the head of this file."""
        tokens: Tensor = inputs[2]()
        return self.context.by_example(tokens, self.role)

    def forward(self, x: Tensor, routing: Routing, prompt: Callable[[], Tensor]) -> Tensor | None:
        """The sum of the active adapters' updates, (pairs, out); None if there is none.

        Args:
            x: (pairs, in).
            routing: of the batch.
            prompt: gives what the contrastive loss pools, (tokens, in).
        """
        if not self.works():
            return None
        updates = [self._update(name, x, routing, prompt) for name in self.active_adapters if name in self.more_A]
        return updates[0] if len(updates) == 1 else torch.stack(updates).sum(0)

    def _update(self, name: str, x: Tensor, routing: Routing, prompt: Callable[[], Tensor]) -> Tensor:
        dtype = self.more_A[name].weight.dtype
        dropped = F.dropout(x, self.configs[name].lora_dropout) if self.training else x
        dropped = self._cast_input_dtype(dropped, dtype)
        weights = self._multipliers(
            name, dropped, lambda: self._cast_input_dtype(self.reads(x, routing, prompt), dtype)
        )
        weights = repeat_rows(weights, routing.num_tokens).index_select(0, routing.tokens)
        hidden = self.more_A[name](dropped, routing)
        update: Tensor = self.more_B[name](hidden * weights.to(hidden.dtype), routing)
        return update

    def factors(self, adapter: str, task: int | None) -> tuple[Tensor, Tensor]:
        """A, (experts, r, in), and B diag(v), (experts, out, r), of one task in float32.

        Raises:
            ValueError: the adapter does not know the task.
        """
        a, b = (at_least_float32(part[adapter].weight) for part in (self.more_A, self.more_B))
        return a, b * self._weights_of_task(adapter, task)

    def get_delta_weight(self, adapter: str, task: int | None) -> Tensor:
        """B diag(v) A of one task and every expert, as the weight lies, in float32.

        Raises:
            ValueError: the adapter does not know the task.
        """
        a, b = self.factors(adapter, task)
        return (b @ a).mT if self.is_transposed else b @ a

    def _add(self, name: str, safe: bool) -> Any:
        """Add a task's update to the stacked weight, expert by expert, and return the weight as it was."""
        weight = self._weight()
        if weight.numel() == 0:
            raise ValueError(PARTITIONED)
        a, b = self.factors(name, self.context.merged_task)
        merged = torch.empty_like(weight)
        for e in range(self.num_experts):
            delta = b[e] @ a[e]
            total = at_least_float32(weight[e]) + (delta.T if self.is_transposed else delta)
            if safe and not torch.isfinite(total).all():
                raise ValueError(NOT_FINITE)
            merged[e] = total
        setattr(self._home[0], self.parameter_name, nn.Parameter(merged, requires_grad=weight.requires_grad))
        return weight

    def _restore(self, memory: Any) -> None:
        setattr(self._home[0], self.parameter_name, memory)


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Let calls of `module` compute `forward` inside of its hooks.

    For the length of a call: nothing is left behind in a module that is unloaded, copied or saved.
    """
    own = vars(module)
    slot = "_old_forward" if "_old_forward" in own else "forward"  # accelerate's hooks keep the module's own there
    before = own.get(slot)
    own[slot] = forward
    try:
        yield
    finally:
        if before is None:
            del own[slot]
        else:
            own[slot] = before
