"""MPT's first stage: the prompt of every task is taught by one that was trained on the task alone.

    loss = L_LM + 0.9 * ( KL(teacher's answer || student's answer) + ||h_teacher - h_student||^2 / width )

Both terms are means over the answers' tokens of a micro-batch; h is what the output layer reads.

Source: "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning" (ICLR 2023), equations 4 to 6. Teachers
are runs of `prompt_tuning`, one for each task, as `launch/single.py --method prompt_tuning` leaves them. Deviations:
the hidden states that are compared are those of the last layer, and their squares are averaged over the width; the
paper's draw of how many tasks a batch holds is left to the sampler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from more_ds.errors import UserError
from more_ds.losses import IGNORED
from more_ds.numerics import at_least_float32
from more_ds.prompts import read_prompts

if TYPE_CHECKING:
    from more_ds.text_model import TextModel

WEIGHT = 0.9


def read_teachers(folder: str, task_names: Sequence[str], length: int) -> Tensor:
    """The prompts of the tasks, (tasks, length, width).

    Args:
        folder: with a run for each task, under the task's name.
        task_names: in the order of their numbers.
        length: of the student's prompt.

    Raises:
        UserError: a task has no run there, or one without a prompt of this length.
    """
    for name in task_names:
        if not Path(folder, name).is_dir():
            raise UserError(f"distill_from {folder} has no run '{name}'; train one: launch/single.py")
    return read_prompts([str(Path(folder, name)) for name in task_names], length)[0]


class Distillation:
    """Teachers of a model with a prompt for each task."""

    def __init__(self, text_model: TextModel, prompts: Tensor) -> None:
        """Listen to what the output layer reads.

        Args:
            text_model: the student: a model with PEFT's multitask prompt.
            prompts: of the teachers, (tasks, length, width).
        """
        self.text_model = text_model
        self.prompts = prompts.to(text_model.device)
        self._hidden: Tensor | None = None
        base: Any = text_model.base
        base.get_output_embeddings().register_forward_pre_hook(self._note)

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The weighted loss of a micro-batch, a scalar, right after the student's pass.

        Args:
            logits: the student's, (batch, answer length, vocabulary).
            batch: the micro-batch, with labels and task ids.
        """
        student = self._last(batch)
        with torch.no_grad(), self.text_model.evaluating(), self._teaching():
            taught = self.text_model.label_logits(batch)
            teacher = self._last(batch)
        real = batch["labels"] != IGNORED
        own, wanted = (F.log_softmax(at_least_float32(values[real]), dim=-1) for values in (logits, taught))
        divergence = F.kl_div(own, wanted, reduction="batchmean", log_target=True)
        return WEIGHT * (divergence + F.mse_loss(at_least_float32(student[real]), at_least_float32(teacher[real])))

    def _note(self, head: Any, args: tuple[Tensor, ...]) -> None:
        self._hidden = args[0]

    def _last(self, batch: dict[str, Tensor]) -> Tensor:
        """What the output layer has read at the places that predict the labels, (batch, answer length, width)."""
        assert self._hidden is not None, "no pass was run"
        if self.text_model.is_encoder_decoder:
            return self._hidden
        length = batch["labels"].shape[1]
        return self._hidden[:, -length - 1 : -1]

    @contextmanager
    def _teaching(self) -> Iterator[None]:
        """Let the model run with the teachers' prompts."""
        peft: Any = self.text_model.peft
        peft.get_prompt = lambda batch_size, task_ids, **_: self.prompts.index_select(0, task_ids)
        try:
            yield
        finally:
            del peft.get_prompt
