"""ATTEMPT: before every example a prompt, mixed by attention of finished prompts and one of the example's task.

    q   = LN(W_up silu(W_down max over the prompt's tokens of X))                                   (d,)
    k_j = max over the vectors of P_j                                     sources P_1 .. P_S, and the task's own P_t
    a   = softmax(k_j q / temperature)                                    over all S + 1, in float32
    P   = sum_j a_j P_j + a_t P_t + P_t                                   l vectors, before the (encoder's) input

Source: "ATTEMPT: Parameter-Efficient Multi-task Tuning via Attentional Mixtures of Soft Prompts" (EMNLP 2022),
equations 2 to 4, and its code: 100 vectors, W_down to 100, temperature 2087, the task's prompt counted twice, as above;
the sources (six there, from MNLI to SQuAD) are frozen, and the attention is shared by all tasks. Deviations: padding
has no part in the maximum; in a causal model the answer has none either; a task's prompt starts as the mean of the
sources, and not as vectors of the vocabulary; all parameters have the run's one learning rate.

The l places are made room for with padding tokens, whose embeddings are replaced, so that positions and masks are those
of the longer text. Sources are runs of `prompt_tuning` (`--adapter.sources`), and are kept in the adapter's file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from more_ds.losses import IGNORED
from more_ds.numerics import at_least_float32
from more_ds.tuners.context import SOURCE, repeat_rows
from more_ds.tuners.update import SHARED, SharedLayer, TasksConfig, Update, UpdateConfig
from more_ds.tuners.update_model import UpdateModel, register


class Prompts(nn.Module):
    """The prompts and the attention.

    Attributes:
        sources: (S, l, d), frozen.
        target: (T, l, d).
    """

    sources: Tensor

    def __init__(self, config: AttemptConfig, width: int) -> None:
        """Make them with values; sources are put in later."""
        super().__init__()
        self.config = config
        shape = (config.num_virtual_tokens, width)
        self.register_buffer("sources", torch.zeros(len(config.sources), *shape))
        self.target = nn.Parameter(torch.randn(config.num_tasks, *shape))
        self.down = nn.Linear(width, config.attention_dim, bias=False)
        self.up = nn.Linear(config.attention_dim, width, bias=False)
        self.norm = nn.LayerNorm(width)

    @torch.no_grad()
    def put(self, sources: Tensor) -> None:
        """Put the sources in, (S, l, d), and start the tasks' prompts at their mean."""
        self.sources.copy_(sources)
        self.target.copy_(sources.mean(0).expand_as(self.target))

    def forward(self, x: Tensor, real: Tensor, tasks: Tensor) -> Tensor:
        """The prompts of a batch, (batch, l, d).

        Args:
            x: (batch, length, d) embeddings of the text.
            real: (batch, length) 1 where a token of the prompt stands.
            tasks: (batch,)
        """
        x = x.to(self.target.dtype)
        pooled = x.masked_fill(real.unsqueeze(-1) == 0, -torch.inf).amax(1)
        query = self.norm(self.up(F.silu(self.down(pooled))))
        target = self.target.index_select(0, tasks)
        sources = self.sources.to(target.dtype)  # a buffer, which DeepSpeed leaves in float32
        keys = torch.cat([sources.amax(1).expand(len(x), -1, -1), target.amax(1, keepdim=True)], dim=1)
        scores = torch.einsum("bsd,bd->bs", at_least_float32(keys), at_least_float32(query)) / self.config.temperature
        weights = torch.softmax(scores, dim=-1).to(target.dtype)
        mixed = torch.einsum("bs,sld->bld", weights[:, :-1], sources)
        return mixed + (weights[:, -1:, None] + 1) * target


@dataclass
class AttemptConfig(TasksConfig, UpdateConfig):
    """Configuration of ATTEMPT."""

    method = "attempt"
    update_class = Update
    gate_input: ClassVar[str] = "prompt"

    sources: list[str] = field(default_factory=list, metadata={"help": "Runs or folders of prompt_tuning, frozen."})
    num_virtual_tokens: int = field(default=100, metadata={"help": "Number l of vectors, as the sources have."})
    attention_dim: int = field(default=100, metadata={"help": "Width between W_down and W_up."})
    temperature: float = field(default=2087.0, metadata={"help": "Of the attention."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("num_virtual_tokens", "attention_dim")
        self.above_zero("temperature")


class AttemptModel(UpdateModel):
    """A model with a prompt before every example."""

    prefix = "attempt_"
    routes_by_task = True

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter: no module is wrapped; a hook puts prompts before what the embedding returns."""
        config, whole = self.peft_config[adapter_name], self.model
        if not hasattr(whole, SHARED):
            whole.requires_grad_(False)
            setattr(whole, SHARED, SharedLayer())
            getattr(whole, SHARED)._active_adapter = adapter_name
            self.__dict__["_hook"] = self._embedding().register_forward_hook(self._prepend)
        layer: Any = getattr(whole, SHARED)
        layer.update[adapter_name] = Prompts(config, self._embedding().embedding_dim)
        device = next(whole.parameters()).device
        if device.type != "meta":
            layer.to(device)
        layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)

    def put(self, sources: Tensor, adapter_name: str = "default") -> None:
        """Put the sources in, (S, l, d).

        Raises:
            ValueError: they have another shape.
        """
        own: Any = getattr(self.model, SHARED).update[adapter_name]
        if sources.shape != own.sources.shape:
            raise ValueError(f"the sources are {tuple(sources.shape)}, and the adapter's {tuple(own.sources.shape)}")
        own.put(sources)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As `RoutedModel.forward`; the logits of a causal model are l places longer, at the front."""
        return super().forward(**self._with_room(args, kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`; a causal model's text begins as the input does, without the l places."""
        written = super().generate(**self._with_room(args, kwargs))
        room = 0 if self._is_encoder_decoder() or self._own() is None else self._length()
        if isinstance(written, Tensor):
            return written[:, room:]
        written.sequences = written.sequences[:, room:]
        return written

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, task: int | None = None
    ) -> None:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError("attempt writes a prompt for every example, so it cannot be merged; use the adapter as it is")

    def _own(self) -> Any:
        """The active prompts; None if they are switched off."""
        layer: Any = getattr(self.model, SHARED)
        active = [name for name in self.active_adapters if name in layer.update]
        return None if layer.disable_adapters or not active else layer.update[active[0]]

    def _length(self) -> int:
        return int(self._own().config.num_virtual_tokens)

    def _embedding(self) -> Any:
        model: Any = self.model
        return (model.get_encoder() if self._is_encoder_decoder() else model).get_input_embeddings()

    def _with_room(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The inputs with room for the prompt in front."""
        inputs = {**kwargs, "input_ids": args[0]} if args else dict(kwargs)
        if self._own() is None:
            return inputs
        ids: Tensor = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        fill = {"input_ids": (ids, self._filler()), "attention_mask": (mask, 1)}
        if inputs.get("prompt_mask") is not None:
            fill["prompt_mask"] = inputs["prompt_mask"], 0
        if inputs.get("labels") is not None and not self._is_encoder_decoder():
            fill["labels"] = inputs["labels"], IGNORED
        room = (self._length(), 0)
        inputs.update({name: F.pad(value, room, value=filler) for name, (value, filler) in fill.items()})
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = (inputs["attention_mask"].long().cumsum(1) - 1).clamp(min=0)
        return inputs

    def _filler(self) -> int:
        return getattr(self.model.config, "pad_token_id", None) or 0  # type: ignore[union-attr,return-value]

    def _begin(
        self, task_ids: Tensor | None, prompt_mask: Tensor | None, inputs: dict[str, Any], decoding: bool = False
    ) -> None:
        super()._begin(task_ids, prompt_mask, inputs, decoding)
        if self._own() is not None:
            ids = inputs["input_ids"]
            real = self.context.real_tokens(SOURCE, ids.shape, ids.device)[:, self._length() :, 0]
            self.__dict__["_waiting"] = real

    def _share(self, module: Any) -> Any:
        """Nothing: the prompts are written when the text is read."""
        return None

    def _prepend(self, embedding: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Put the prompts in the places that are kept for them: once in a batch, before the first layer."""
        real = self.__dict__.pop("_waiting", None)
        own = self._own() if real is not None else None
        if own is None:
            return None
        room = self._length()
        tasks = repeat_rows(self.context.rows(own.config.num_tasks, output.device), len(output))
        prompts = own(output[:, room:], repeat_rows(real, len(output)), tasks)
        return torch.cat([prompts.to(output.dtype), output[:, room:]], dim=1)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.pop("_hook").remove()
        return super()._unload_and_optionally_merge(*args, **kwargs)


register("attempt", AttemptConfig, AttemptModel)
