"""Using a trained adapter: texts in, texts out, with a task per row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel

from more_ds.errors import UserError, suggest
from more_ds.loading import adapter_tasks, choose_dtype, find_subject, load_adapter, load_text_model
from more_ds.log import Progress
from more_ds.scoring.generation import generate
from more_ds.scoring.task_inference import infer_tasks
from more_ds.text_model import TextModel

FIRST = "default"
"""PEFT's name of the adapter that a model is loaded with."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        text: up to the end of the answer.
        task: the task it was written as; None where the model does not route by task.
        inferred: whether the task was found from the prompt.
    """

    text: str
    task: str | None
    inferred: bool = False


class Inference:
    """A model with adapters of which one is in use; the rows of a batch may be of different tasks.

    With an adapter of `launch/export.py --form adapter` no gate runs: a row of weights per example is all that differs
    from one LoRA.

    Attributes:
        text_model: the model.
        tasks: numbers of the tasks of every adapter, by their names, by the adapter's name.
    """

    def __init__(self, text_model: TextModel, tasks: Mapping[str, int]) -> None:
        """Wrap a loaded model; `open` loads one."""
        self.text_model = text_model
        self.tasks: dict[str, dict[str, int]] = {FIRST: dict(tasks)}
        self.adapter = FIRST

    @classmethod
    def open(
        cls,
        name: str,
        *,
        base_model: str | None = None,
        dtype: str | None = None,
        device: str = "cpu",
        max_source_length: int | None = None,
    ) -> Inference:
        """Load a run, an adapter folder (any that PEFT reads) or a plain model.

        Args:
            name: folder or hub id.
            base_model: the base model, where the recorded one has moved.
            dtype: `fp32`, `bf16` or `fp16`; None: the run's, else bf16 on a GPU and fp32 on a CPU.
            device: as torch names it.
            max_source_length: most tokens of a prompt; None: the run's, else up to 384.

        Raises:
            UserError: what `more_ds.loading` refuses.
        """
        subject = find_subject(name, base_model)
        source_length, target_length = subject.lengths(max_source_length)
        text_model = load_text_model(
            subject,
            dtype=choose_dtype(subject, dtype, device),
            device=device,
            max_source_length=source_length,
            max_target_length=target_length,
        )
        return cls(text_model, subject.task_ids)

    def add(self, name: str, folder: str | Path) -> None:
        """Load a further adapter for the same base model, under a name of its own, and leave the one in use.

        Raises:
            UserError: the name is taken, the model has no adapter yet, or the adapter is damaged or of another base.
        """
        if name in self.tasks:
            raise UserError(f"an adapter is called '{name}' already; give another name")
        peft = self.text_model.peft
        if not isinstance(peft, PeftModel):
            raise UserError("the model was opened without an adapter; open it with one, then add others")
        load_adapter(peft, Path(folder), name)
        self.tasks[name] = adapter_tasks(peft.peft_config[name])
        peft.set_adapter(self.adapter)

    def use(self, name: str) -> None:
        """Answer with another adapter from now on; nothing is loaded.

        Raises:
            UserError: there is no such adapter.
        """
        if name not in self.tasks:
            raise UserError(f"no adapter '{name}'{suggest(name, self.tasks)}")
        peft = self.text_model.peft
        if isinstance(peft, PeftModel):
            peft.set_adapter(name)
        self.adapter = name

    def generate(
        self,
        prompts: Sequence[str],
        tasks: Sequence[str | None] | str | None = None,
        *,
        max_new_tokens: int = 64,
        num_beams: int = 1,
        batch_size: int = 32,
        label: str | None = None,
    ) -> list[Answer]:
        """Write an answer to each prompt, in their order.

        Args:
            prompts: as in training.
            tasks: of each prompt, or of all; None: found from the prompt (`more_ds.scoring.task_inference`).
            max_new_tokens: where a text stops at the latest.
            num_beams: 1 is greedy.
            batch_size: prompts that run together; sorted by length, so that few are padded far.
            label: of a progress bar; None: no bar.

        Raises:
            UserError: an unknown task, or one that has to be found by an adapter without task embeddings.
            ValueError: not one task per prompt.
        """
        wanted = [tasks] * len(prompts) if isinstance(tasks, str) or tasks is None else list(tasks)
        if len(wanted) != len(prompts):
            raise ValueError(f"{len(wanted)} tasks for {len(prompts)} prompts")
        ids = [self.text_model.encoder.prompt(text) for text in prompts]
        numbers = self._numbers(wanted, ids, batch_size)
        texts: dict[int, str] = {}
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        bar = Progress(len(ids), label) if label is not None else None
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            rows = generate(
                self.text_model, [ids[i] for i in batch], [numbers[i] for i in batch], max_new_tokens, num_beams
            )
            texts |= {i: self.text_model.encoder.decode(row) for i, row in zip(batch, rows, strict=True)}
            if bar is not None:
                bar.advance(len(batch))
        if bar is not None:
            bar.close()
        names = {number: name for name, number in self.tasks[self.adapter].items()}
        return [Answer(texts[i], names.get(numbers[i]), self._infers(wanted[i])) for i in range(len(ids))]

    def _infers(self, task: str | None) -> bool:
        return task is None and len(self.tasks[self.adapter]) > 1

    def _numbers(self, wanted: Sequence[str | None], ids: Sequence[list[int]], batch_size: int) -> list[int]:
        """The number of every row's task."""
        known = self.tasks[self.adapter]
        check_tasks(wanted, known)
        numbers = [0 if task is None else known[task] for task in wanted]
        left = sorted((i for i, task in enumerate(wanted) if self._infers(task)), key=lambda i: -len(ids[i]))
        for at in range(0, len(left), batch_size):
            batch = left[at : at + batch_size]
            found, _ = infer_tasks(self.text_model, [ids[i] for i in batch])
            for i, number in zip(batch, found, strict=True):
                numbers[i] = number
        return numbers


def check_tasks(wanted: Sequence[str | None], known: Mapping[str, int]) -> None:
    """Refuse tasks that an adapter does not know; None stands for one that is to be found.

    Raises:
        UserError: naming those that it knows.
    """
    for task in dict.fromkeys(wanted):
        if task is not None and task not in known:
            if not known:
                raise UserError(f"task '{task}': this model does not route by task; leave the task out")
            raise UserError(f"the adapter does not know '{task}'{suggest(task, known)}")
