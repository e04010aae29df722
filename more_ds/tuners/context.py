"""What the adapted layers of one model need to know of the batch that is running."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from more_ds.numerics import at_least_float32

SOURCE = "source"
TARGET = "target"


class TaskContext:
    """The tasks and prompt masks of the current batch, shared by all adapted layers of one model.

    A plain object, one per model: not a module (nothing of it is saved), not a module global (two models may live in
    one process), and not a scoped hook: it keeps its values until the next batch begins, because activation
    checkpointing runs the layers again in the backward pass, long after the forward call has returned.
    """

    def __init__(self) -> None:
        self.task_ids: Tensor | None = None
        self.default_task: int | None = None
        self.merged_task: int | None = None
        self._masks: dict[str, Tensor | None] = {}
        self._pool_weights: dict[tuple[str, str, int, torch.dtype], Tensor] = {}
        self._records: dict[str, dict[str, tuple[Tensor, ...]]] = {}
        self._last_pool: tuple[Tensor, str, str, Tensor] | None = None
        self._last_drop: tuple[Tensor, float, Tensor] | None = None
        self._held: dict[tuple[str, str], Tensor] = {}
        self._projections: dict[tuple[int, int, int, torch.device], Tensor] = {}
        self.is_recording = False
        self.tables: dict[tuple[Any, ...], Tensor] = {}
        self.step: Any = None
        self.banks: dict[str, Any] = {}
        self.losses: dict[str, Tensor] = {}
        self.shared: dict[str, Any] = {}
        self.decoding = False

    def __getstate__(self) -> dict[str, Any]:
        """Copies start between batches: the tensors of a batch belong to the graph of the original."""
        fresh = TaskContext()
        fresh.default_task, fresh.merged_task = self.default_task, self.merged_task
        return fresh.__dict__

    def begin(
        self, task_ids: Tensor | None, source: Tensor | None, target: Tensor | None, decoding: bool = False
    ) -> None:
        """Start a batch.

        Args:
            task_ids: (batch,) task of every example, or None to use the default task.
            source: (batch, length) 1 where a token of the prompt stands, or None if every position counts. With several
                examples in every row of the batch, (examples, length).
            target: (batch, length) the same for the decoder of an encoder-decoder model.
            decoding: many forward passes follow, which generate; values that were held stay what they are.
        """
        self.task_ids = task_ids
        self._masks = {SOURCE: source, TARGET: target}
        self._pool_weights.clear()
        self._records.clear()
        self._last_pool = self._last_drop = None
        self._held.clear()
        self.losses.clear()
        self.shared.clear()
        self.step = None
        self.is_recording = True
        self.decoding = decoding

    def rows(self, num_tasks: int, device: torch.device) -> Tensor:
        """The task of every example, (batch,) or (1,) where one default task serves the whole batch.

        Raises:
            ValueError: several tasks are known, and the batch does not say which it holds.
        """
        if self.task_ids is not None:
            return self.task_ids.to(device)
        if self.default_task is not None or num_tasks == 1:
            return torch.full((1,), self.default_task or 0, dtype=torch.long, device=device)
        raise ValueError(
            f"the adapter knows {num_tasks} tasks and the batch does not say which one it holds; pass task_ids "
            "(one per example), or call set_task(task) once"
        )

    def pool(self, x: Tensor, role: str, how: str) -> Tensor:
        """Pool (batch, length, width) over the prompt's real tokens to (batch, width).

        `how` is `mean`, `first` or `last`; `role` says which of the two masks belongs to `x`. Without a mask of
        that length every position counts. Beams repeat their example's mask; a mask of several examples for a row of x
        pools each of them, (examples, width). Maps that read the same tensor one after the other (queries, keys and
        values) share the result.
        """
        last = self._last_pool
        if last is None or not same_tensor(last[0], x) or last[1:3] != (role, how):
            last = self._last_pool = (x, role, how, self._pool(x, role, how))
        return last[3]

    def _pool(self, x: Tensor, role: str, how: str) -> Tensor:
        if x.dim() != 3:
            return x  # each row stands for itself
        return torch.bmm(self.pool_weights(x, role, how), x).flatten(0, 1)

    def pool_weights(self, x: Tensor, role: str, how: str) -> Tensor:
        """(batch, examples in a row, length) weights of the pooling of x, (batch, length, width), in its type."""
        mask = self._masks.get(role)
        key = (role, how, x.shape[1], x.dtype)
        if key not in self._pool_weights:
            if mask is None or mask.shape[1] != x.shape[1]:
                mask = torch.ones(1, x.shape[1], device=x.device)
            weights = _pool_weights(at_least_float32(mask.to(x.dtype)), how)
            self._pool_weights[key] = weights.to(dtype=x.dtype, device=x.device)
        weights = self._pool_weights[key]
        if len(weights) > len(x):
            return weights.view(len(x), -1, x.shape[1])
        return repeat_rows(weights, len(x)).unsqueeze(1)

    def by_example(self, tokens: Tensor, role: str) -> Tensor:
        """(tokens, width) of a module that reads a flattened batch -> (batch, length, width)."""
        mask = self._masks.get(role)
        if mask is not None and len(tokens) % mask.shape[1] == 0:
            return tokens.view(-1, mask.shape[1], tokens.shape[1])
        rows = 1 if self.task_ids is None or len(tokens) % len(self.task_ids) else len(self.task_ids)
        return tokens.view(rows, -1, tokens.shape[1])

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Dropout with probability p; maps that read the same tensor one after the other share one mask."""
        if p == 0:
            return x
        last = self._last_drop
        if last is None or not same_tensor(last[0], x) or last[1] != p:
            last = self._last_drop = (x, p, torch.nn.functional.dropout(x, p))
        return last[2]

    def real_tokens(self, role: str, shape: Sequence[int], device: torch.device) -> Tensor:
        """1 where a token counts, in a shape that values of (batch, length, ...) `shape` can be multiplied with."""
        mask = self._masks.get(role)
        if mask is None or len(shape) != 2 or tuple(mask.shape) != tuple(shape):
            mask = torch.ones(tuple(shape), device=device)
        return mask.to(device).unsqueeze(-1)

    def hold(self, layer: str, adapter: str, value: Tensor) -> None:
        """Keep a layer's value for the later steps, if this batch is being decoded."""
        if self.decoding:
            self._held[(layer, adapter)] = value

    def held(self, layer: str, adapter: str) -> Tensor | None:
        """The value kept by `hold` in this batch, or None."""
        return self._held.get((layer, adapter))

    def record(self, layer: str, adapter: str, *values: Tensor) -> None:
        """Note what a layer's auxiliary loss is made of; the recomputation of a checkpointed layer is not noted."""
        if self.is_recording:
            self._records.setdefault(adapter, {})[layer] = values

    def collect(self) -> dict[str, list[tuple[Tensor, ...]]]:
        """End the forward pass: what the layers have noted, by adapter."""
        self.is_recording = False
        records = {name: list(layers.values()) for name, layers in self._records.items()}
        self._records.clear()
        return records

    def project(self, z: Tensor, width: int, seed: int) -> Tensor:
        """Map (batch, d) to (batch, width) by a fixed Gaussian matrix that depends on (d, width, seed) alone."""
        if z.shape[-1] == width:
            return z
        key = (z.shape[-1], width, seed, z.device)
        if key not in self._projections:
            with torch.inference_mode(False):  # it outlives this pass, and may meet one that trains
                generator = torch.Generator().manual_seed(seed)
                matrix = torch.randn(z.shape[-1], width, generator=generator) / width**0.5
                self._projections[key] = matrix.to(z.device)
        return z @ self._projections[key].to(z.dtype)


def same_tensor(a: Tensor | None, b: Tensor) -> bool:
    """Whether two tensors are one: ZeRO-3 gives every module an alias of its own of what it reads."""
    if a is b or a is None or a.is_meta or b.is_meta or a.dtype != b.dtype or torch.compiler.is_compiling():
        return a is b
    return a.is_set_to(b)


def repeat_rows(rows: Tensor, count: int) -> Tensor:
    """Rows of examples for `count` rows of a layer: beams and flattened tokens repeat their example's row."""
    if rows.shape[0] in (1, count):
        return rows.expand(count, *rows.shape[1:])
    return rows.repeat_interleave(count // rows.shape[0], dim=0)


def _pool_weights(real: Tensor, how: str) -> Tensor:
    """(batch, length) weights which sum to one over the real tokens of a row (to zero in an empty row)."""
    if how == "mean":
        return real / real.sum(1, keepdim=True).clamp(min=1)
    position = real.cumsum(1)
    wanted = torch.ones_like(position[:, :1]) if how == "first" else position[:, -1:]
    return real * (position == wanted)
