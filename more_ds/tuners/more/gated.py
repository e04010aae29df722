"""What every adapted map of MoRE has in common: its gate, its task embeddings, and the table of its ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from more_ds.losses import cosine
from more_ds.numerics import at_least_float32
from more_ds.tuners.base import MergesByTask, check_task
from more_ds.tuners.context import SOURCE, TARGET, TaskContext
from more_ds.tuners.more.config import HARD, MoreConfig
from more_ds.tuners.more.experts import Gate, TaskTable, expert_table, task_probabilities


class GatedMap(nn.Module, MergesByTask):
    """One adapted map with a MoRE pair per adapter. All parameters belong to submodules that a forward calls."""

    adapter_layer_names = ("more_A", "more_B", "more_gate", "more_task")
    other_param_names = ("more_ranks", "configs", "stale", "alone")

    def __init__(self, context: TaskContext, role: str, key: str, in_features: int, out_features: int) -> None:
        """Make a map without adapters.

        Args:
            context: the model's task context.
            role: which sequence the map reads: `source` (prompt) or `target` (an encoder-decoder's decoder).
            key: name of the map in the model.
            in_features: width of its input.
            out_features: width of its output.
        """
        super().__init__()
        self.context, self.role, self.key = context, role, key
        self.in_features, self.out_features = in_features, out_features
        self.configs: dict[str, MoreConfig] = {}
        self.stale: dict[str, bool] = {}
        self.alone: dict[str, int | None] = {}
        # By adapter name; `Any`, because torch types whatever these containers hold as a bare module.
        self.more_A: Any = nn.ModuleDict()
        self.more_B: Any = nn.ModuleDict()
        self.more_gate: Any = nn.ModuleDict()
        self.more_task: Any = nn.ModuleDict()
        self.more_ranks: Any = BufferDict({}, persistent=True)
        self.merged_adapters: list[str] = []
        self._memory: list[Any] = []
        self._disable_adapters = False
        self.frozen_peft_weight_names = {}
        self.register_state_dict_pre_hook(GatedMap._refresh_before_saving)

    def factor(self, in_features: int, out_features: int) -> nn.Module:
        """A fresh A or B: a module whose `weight` maps `in_features` to `out_features`."""
        raise NotImplementedError

    def reads(self, *inputs: Any) -> Tensor:
        """What the contrastive loss pools of the inputs of `forward`, (batch, length, in)."""
        raise NotImplementedError

    def update_layer(self, adapter_name: str, config: MoreConfig) -> None:
        """Add an adapter."""
        width = config.task_dim or self.in_features
        self.configs[adapter_name] = config
        self.more_A[adapter_name] = self.factor(self.in_features, config.r)
        self.more_B[adapter_name] = self.factor(config.r, self.out_features)
        if config.gate != "table":
            self.more_gate[adapter_name] = Gate(width, config.r)
            self.more_task[adapter_name] = TaskTable(config.table_sizes, width)
        self.more_ranks[adapter_name] = torch.ones(config.num_tasks, dtype=torch.long)
        self.stale[adapter_name] = config.gate != "table"
        self.alone[adapter_name] = None
        self.reset_parameters(adapter_name)
        frozen = ["more_gate"] if config.gate == "frozen" else []
        if (config.gate == "frozen" or config.gate_input == "pooled") and not self._contrasts(config):
            frozen.append("more_task")
        if frozen:
            self.frozen_peft_weight_names[adapter_name] = tuple(frozen)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_parameters(self, name: str) -> None:
        """Initialise: A, E and W_g Kaiming-uniform (a = sqrt 5), b_g zero, B zero (or as A, `init_weights=False`).

        With `init_rank='full'` b_g is 1 at rank r.
        """
        config = self.configs[name]
        if self.more_A[name].weight.is_meta:
            return
        weights = [self.more_A[name].weight]
        if name in self.more_gate:
            weights += [*self.more_task[name].parts(), self.more_gate[name].weight]
            nn.init.zeros_(self.more_gate[name].bias)
            if config.init_rank == "full":
                nn.init.ones_(self.more_gate[name].bias[-1:])
        if config.init_weights:
            nn.init.zeros_(self.more_B[name].weight)
        else:
            weights.append(self.more_B[name].weight)
        for weight in weights:
            for matrix in weight if weight.dim() == 3 else [weight]:
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def _multipliers(self, name: str, like: Tensor, prompt: Callable[[], Tensor]) -> Tensor:
        """v times alpha / r for every example, (batch or 1, r) float32; notes what the contrastive loss is made of.

        Args:
            name: of the adapter.
            like: a tensor on the device and in the type of the computation.
            prompt: gives what is pooled, (batch, length, in).
        """
        config = self.configs[name]
        asks_gate = config.gate == "soft" or self.training or self.stale[name]
        embeddings = self.more_task[name]() if asks_gate and config.gate != "table" else None
        if config.gate_input == "pooled":
            weights = self._weights_of_examples(name, prompt())
        else:
            rows = self.context.rows(config.num_tasks, like.device)
            weights = self._weights_of_tasks(name, embeddings, like).index_select(0, rows)
        if embeddings is not None and self.training and self._contrasts(config):
            self.context.record(self.key, name, self._pooled(name, prompt(), config.pooling), embeddings)
        return weights

    def parts(self, name: str) -> list[nn.Module]:
        """The modules that hold an adapter's parameters in this map."""
        found: list[nn.Module] = [getattr(self, c)[name] for c in self.adapter_layer_names if name in getattr(self, c)]
        return found

    def _weights_of_tasks(self, name: str, embeddings: Tensor | None, like: Tensor) -> Tensor:
        """v times alpha / r for every task, (tasks, r) float32; notes the ranks while training.

        Without embeddings, the (tasks, h) that the gate is asked about, the table of ranks decides.
        """
        config = self.configs[name]
        if embeddings is None:
            return self._table(name, like).index_select(0, self.more_ranks[name] - 1)
        if config.gate == "soft" or (config.gate in HARD and (self.training or self.stale[name])):
            p = self._gate(name, embeddings)
            self._note_ranks(name, p)
            # The optimizer moves the gate after a training forward, so the table is behind until it is read again.
            self.stale[name] = self.training
            if config.gate == "soft":
                table = self._table(name, p)
                return torch.cat([part @ table for part in p.split(config.table_sizes)])
            if self.training:
                return self._straight_through(name, p)
        elif config.gate == "frozen" and self.stale[name]:
            self._note_ranks(name, self._gate(name, embeddings))
        return self._table(name, like).index_select(0, self.more_ranks[name] - 1)

    def _gate(self, name: str, embeddings: Tensor) -> Tensor:
        """p of every task, (tasks, r) float32."""
        return task_probabilities(self.more_gate[name], embeddings, self.configs[name].table_sizes)

    @torch.no_grad()
    def _note_ranks(self, name: str, p: Tensor) -> None:
        """Bring the task-to-rank table up to p, (tasks, r); while one task trains alone, the others' ranks stay."""
        row = self.alone[name]
        rows = slice(None) if row is None else slice(row, row + 1)
        self.more_ranks[name][rows] = p[rows].argmax(-1) + 1
        self.stale[name] = False

    def _weights_of_examples(self, name: str, x: Tensor) -> Tensor:
        """The same, gated by each example's own prompt: (batch, r). Decoding steps keep what the prompt chose.

        A decoder beside an encoder pools its first position alone: the later ones are the answer.
        """
        held = self.context.held(self.key, name)
        if held is not None:
            return held
        config = self.configs[name]
        pooled = self._pooled(name, x, "first" if self.role == TARGET else config.pooling)
        p = torch.softmax(self.more_gate[name](pooled), dim=-1)
        if config.gate == "soft":
            weights = p @ self._table(name, p)
        elif config.gate in HARD:
            weights = self._straight_through(name, p)
        else:
            weights = self._table(name, p).index_select(0, p.argmax(-1))
        self.context.hold(self.key, name, weights)
        return weights

    def _pooled(self, name: str, x: Tensor, how: str) -> Tensor:
        """`x` pooled over the prompt, in the width of the task embeddings: (batch, h) float32."""
        config = self.configs[name]
        pooled = at_least_float32(self.context.pool(x, self.role, how))
        return self.context.project(pooled, config.task_dim or self.in_features, config.seed)

    def similarity(self, name: str, x: Tensor) -> Tensor:
        """Cosine of the pooled input of the map, (batch, length, in), with every task embedding: (batch, tasks)."""
        x = self._cast_input_dtype(x, self.more_A[name].weight.dtype)
        return cosine(self._pooled(name, x, self.configs[name].pooling), self.more_task[name]())

    def compares(self, name: str) -> bool:
        """Whether the contrastive loss has taught the embeddings of this map to be near their tasks' prompts."""
        return name in self.more_A and self.role == SOURCE and self._contrasts(self.configs[name])

    def _straight_through(self, name: str, p: Tensor) -> Tensor:
        """c * 1[component of expert r_t], (rows, r): the forward is hard, the gradient goes to p[r_t], or to all p."""
        chosen = p.argmax(-1, keepdim=True)
        if self.configs[name].gate == "ste_all":
            table = self._table(name, p)
            return table.index_select(0, chosen.squeeze(1)) + (p - p.detach()) @ table
        onehot = torch.zeros_like(p).scatter_(1, chosen, 1.0)
        selected = (p + (onehot - p).detach()).gather(1, chosen)
        return selected * self._table(name, p).index_select(0, chosen.squeeze(1))

    def _table(self, name: str, like: Tensor) -> Tensor:
        """The expert table times alpha / r, (r, r), where `like` is, in its type or float32 if that is wider."""
        config = self.configs[name]
        sizes = (config.r, config.table_sizes[0], config.scale, config.experts, config.seed)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        key = (*sizes, config.lora_alpha, like.device, dtype)
        tables = self.context.tables
        if key not in tables:
            with torch.inference_mode(False):  # it outlives this pass, and may meet one that trains
                tables[key] = (expert_table(*sizes) * (config.lora_alpha / config.r)).to(like.device, dtype)
        return tables[key]

    def _contrasts(self, config: MoreConfig) -> bool:
        compared = config.contrastive_maps == "all" or "encoder" in self.key.split(".")
        return config.contrastive_weight > 0 and compared

    @torch.no_grad()
    def _refresh(self, name: str) -> None:
        """Bring the task-to-rank table up to the gate's present parameters, if they are whole on this rank."""
        gate, task = self.more_gate[name], self.more_task[name]
        if not any(p.numel() == 0 or p.is_meta for p in (*gate.parameters(), *task.parameters())):
            # Not called as modules: outside of a forward pass, ZeRO-3's hooks would lose their place.
            self._note_ranks(name, task_probabilities(gate.forward, task.forward(), self.configs[name].table_sizes))

    def ranks(self, name: str) -> Tensor:
        """The task-to-rank table of an adapter, (tasks,) from 1 to r."""
        if self.stale[name]:
            self._refresh(name)
        return self.more_ranks[name]

    @torch.no_grad()
    def add_task(self, name: str, source: int) -> None:
        """Add a task whose embedding and rank are those of task `source`; the configuration is not changed."""
        ranks = self.ranks(name)
        row = self.more_task[name]()[source : source + 1]
        self.more_task[name].append(row)
        self.more_ranks[name] = torch.cat([ranks, ranks[source : source + 1]])

    def train_alone(self, name: str, task: int | None) -> None:
        """Train the embedding of one added task and nothing else of the adapter; None: train everything.

        The ranks of the others are what they were when this is called, whatever type the gate is computed in later.
        """
        self.ranks(name)
        self.alone[name] = task
        self.set_adapter(self.active_adapters)
        if task is not None:
            for container in self.adapter_layer_names:
                getattr(self, container)[name].requires_grad_(False)
            self.more_task[name].parts()[task - self.configs[name].table_sizes[0] + 1].requires_grad_(True)

    @staticmethod
    def _refresh_before_saving(layer: GatedMap, prefix: str, keep_vars: bool) -> None:
        for name in layer.more_ranks:
            layer.ranks(name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in self.stale:
            # A loaded table is what the run trained with, even where a gate rounded to another type says otherwise.
            self.stale[name] = self.stale[name] and f"{prefix}more_ranks.{name}" not in state_dict

    def _weights_of_task(self, adapter: str, task: int | None) -> Tensor:
        """v times alpha / r of one task, (r,) float32.

        Raises:
            ValueError: the adapter does not know the task, or gates on the input, so that no single matrix
                describes a task.
        """
        config = self.configs[adapter]
        if config.gate_input == "pooled":
            raise ValueError("gate_input='pooled' chooses the rank by example; such an adapter cannot be merged")
        task = check_task(task, config.num_tasks)
        table = self._table(adapter, self.more_A[adapter].weight)
        if config.gate == "soft":
            return self._gate(adapter, self.more_task[adapter]())[task] @ table
        return table[self.ranks(adapter)[task] - 1]

    def __repr__(self) -> str:
        return "more." + super().__repr__()
