"""What a run's micro-batches cost and yielded, by task, until the next row of the log."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from more_ds.data.mixture import MicroBatch
from more_ds.engine import Ranks
from more_ds.errors import NonFiniteError, TrainingError

MOST_SKIPPED = 50
"""Steps in a row that fp16 may leave out while it looks for its loss scale."""


class Ledger:
    """Collects losses on the device and reads them once per logged interval, so that a step waits for nothing."""

    def __init__(self, task_names: Sequence[str], ranks: Ranks) -> None:
        """Start an empty interval."""
        self.task_names, self.ranks = task_names, ranks
        self._skipped = self._skipped_in_a_row = 0
        self._clear()

    def add(self, step: int, batch: MicroBatch, nll: Tensor, auxiliary: Tensor | None) -> None:
        """Note a micro-batch.

        Args:
            step: optimizer step it belongs to.
            batch: the micro-batch.
            nll: scalar, sum over its label tokens, in nats.
            auxiliary: scalar, the method's own loss, or None.
        """
        auxiliary = torch.zeros_like(nll) if auxiliary is None else auxiliary
        self._losses.append(torch.stack([nll.detach(), auxiliary.detach().to(nll)]))
        self._notes.append((step, batch))

    def add_norm(self, step: int, norm: Tensor) -> None:
        """Note the norm of an optimizer step's gradient, before clipping."""
        self._norms.append((step, norm.detach()))

    def watch_scale(self, step: int, skipped: int) -> None:
        """Note how many steps fp16 has left out since the start of the process.

        Raises:
            TrainingError: the last `MOST_SKIPPED` were all left out: no loss scale is small enough.
        """
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped > self._skipped else 0
        self._skipped = skipped
        if self._skipped_in_a_row >= MOST_SKIPPED:
            raise TrainingError(
                f"fp16 has left out the last {MOST_SKIPPED} steps up to step {step + 1}: their gradients overflow at "
                "any loss scale; the last checkpoint is as it was; use --dtype bf16 or fp32"
            )

    def close(self) -> dict[str, Any]:
        """End the interval on all ranks together: mean losses, over tokens and by task, and the throughput.

        Raises:
            NonFiniteError: a loss or a gradient is not finite; names the step, the task and the rank.
        """
        losses = torch.stack(self._losses).double().cpu() if self._losses else torch.zeros(0, 2, dtype=torch.float64)
        self._refuse_non_finite(losses)
        columns = torch.zeros(len(self.task_names), 6, dtype=torch.float64)
        for (_, batch), (nll, auxiliary) in zip(self._notes, losses.tolist(), strict=True):
            size = len(batch.tensors["labels"])
            own = [nll, batch.label_tokens, auxiliary * size, size, batch.tokens, batch.computed]
            columns[batch.task] += torch.tensor(own)
        columns = self.ranks.sum(columns).cpu()
        seconds = time.monotonic() - self._began
        row = self._row(columns, seconds)
        self._clear()
        return row

    def _row(self, columns: Tensor, seconds: float) -> dict[str, Any]:
        nll, labels, auxiliary, examples, tokens, computed = columns.sum(0).tolist()
        loss_lm, loss_auxiliary = nll / max(labels, 1), auxiliary / max(examples, 1)
        by_task = {
            name: {
                "loss": part[0] / part[1],
                "loss_auxiliary": part[2] / part[3],
                "examples": int(part[3]),
                "tokens": int(part[4]),
                "label_tokens": int(part[1]),
            }
            for name, part in zip(self.task_names, columns.tolist(), strict=True)
            if part[1]
        }
        return {
            "loss": loss_lm + loss_auxiliary,
            "loss_lm": loss_lm,
            "loss_auxiliary": loss_auxiliary,
            "tasks": by_task,
            "tokens_per_second": round(tokens / seconds, 1),
            "padding": round(1 - tokens / max(computed, 1), 4),
            "examples_per_second": round(examples / seconds, 2),
        }

    def _refuse_non_finite(self, losses: Tensor) -> None:
        """Name the first step of any rank; in it, a loss before the gradient that it spoils."""
        found: list[tuple[int, str, int, list[str]]] = []
        for i in (~torch.isfinite(losses).all(1)).nonzero().flatten().tolist()[:1]:
            step, batch = self._notes[i]
            found.append((step, "", self.ranks.rank, [self.task_names[batch.task]]))
        for step in [step for step, norm in self._norms if not math.isfinite(norm)][:1]:
            tasks = [self.task_names[batch.task] for at, batch in self._notes if at == step]
            found.append((step, "gradient", self.ranks.rank, tasks))
        everything = [item for part in self.ranks.everyone(found) for item in part]
        if not everything:
            return
        step, kind, rank, tasks = min(everything)
        where = f"task '{tasks[0]}', rank {rank}"
        if kind:  # it is a sum over all ranks
            names = {name for item in everything if item[:2] == (step, kind) for name in item[3]}
            where = f"of tasks {', '.join(sorted(names))}"
        raise NonFiniteError(
            f"the {kind or 'loss'} is not finite at step {step + 1}, {where}; the last checkpoint is as it was; lower "
            "learning_rate, use --dtype fp32 or bf16, or leave such steps out with --skip_nonfinite",
            step,
        )

    def _clear(self) -> None:
        self._losses: list[Tensor] = []
        self._notes: list[tuple[int, MicroBatch]] = []
        self._norms: list[tuple[int, Tensor]] = []
        self._began = time.monotonic()
