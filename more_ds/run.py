"""A run under way: its parts, and what is done with them between the optimizer steps."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from more_ds import checkpoint, log, memory_use, report
from more_ds.after_step import AfterStep
from more_ds.background import Background
from more_ds.checkpoint_files import base_identity, is_complete, name_of, newest_sound
from more_ds.collective import on_rank_zero
from more_ds.compare.bootstrap import RESAMPLES
from more_ds.data.mixture import Mixture
from more_ds.engine import Ranks, gathered, take_monitor
from more_ds.errors import NonFiniteError
from more_ds.evaluate import evaluate, training_golds
from more_ds.export.whole import write_model
from more_ds.gates import gate_entropy, gate_row
from more_ds.gradients import task_gradients
from more_ds.plan import Plan
from more_ds.progress import Progress
from more_ds.results import TaskResult, mean_score, write_results
from more_ds.run_folder import RunFolder, copy_adapter, publish, versions
from more_ds.stopping import Stop
from more_ds.tasks import Task
from more_ds.tasks.render import Example
from more_ds.text_model import TextModel
from more_ds.tuners.full import FullConfig


class Run:
    """A run under way; every method is called by all ranks together."""

    def __init__(self, plan: Plan, ranks: Ranks, folder: RunFolder, text_model: TextModel, stop: Stop) -> None:
        """Join the parts of a run; `text_model.module` is the DeepSpeed engine."""
        self.plan, self.ranks, self.folder, self.text_model, self.stop = plan, ranks, folder, text_model, stop
        self.engine: Any = text_model.module
        self.monitor = take_monitor(self.engine)
        self.after_step = AfterStep(self.engine)
        multiple = plan.config.pad_to_multiple_of or (8 if ranks.on_gpu else 1)
        collator = replace(text_model.collator, multiple=multiple, flat=plan.config.padding_free)
        self.mixture = Mixture(plan.train, plan.sampler, plan.encoder, collator, plan.tokens)
        self.progress = Progress()
        self.saved_step = 0
        self.saving = Background(ranks.device)
        self.base = base_identity(plan.config.model, plan.config.revision)
        self.task_ids = {name: i for i, name in enumerate(plan.task_names)}
        self.train_golds = {task.name: training_golds(rows) for task, rows in zip(plan.tasks, plan.train, strict=True)}

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row to `metrics.jsonl`, and send its numbers to the monitors."""
        step = self.progress.step
        if self.ranks.rank == 0:
            self.folder.log({"step": step, "epoch": round(step / self.plan.sampler.steps_per_epoch, 4), **row})
        if self.monitor.enabled:
            self.monitor.write_events([(name, value, step) for name, value in log.numbers(row)])

    def begin(self) -> None:
        """Note what the untrained gates choose; rows of a run that ended before its first checkpoint go."""
        if self.ranks.rank == 0:
            self.folder.forget_after(-1)
        self.progress.first_ranks = {name: chosen.tolist() for name, chosen in self.chosen_ranks().items()}
        self._look_inside()
        self.engine.train()

    def evaluation_is_due(self) -> bool:
        """Whether the validation splits are to be scored at this step and have not been."""
        step, state = self.progress.step, self.progress
        if state.evaluated_step == step:
            return False
        if step == 0:
            return self.plan.config.eval_on_start
        return step == self.plan.total_steps or step % self.plan.eval_steps == 0

    def is_trained(self) -> bool:
        """Whether the last step is taken, or the validation score has stopped rising."""
        patience = self.plan.config.early_stopping_patience
        if patience is not None and self.progress.worse_in_a_row >= patience:
            log.say(f"no better mean score in {patience} evaluations: stopped at step {self.progress.step}")
            return True
        return self.progress.step >= self.plan.total_steps

    def validate(self) -> None:
        """Score the validation splits, and note whether the adapter is the best so far.

        Raises:
            PreemptedError: a rank is to stop; nothing has been noted.
        """
        results = self._score(self.plan.tasks, self.plan.validation, "validation")
        state, mean = self.progress, mean_score(results)
        scores = {result.task: result.score for result in results}
        state.scores["majority"] = {r.task: r.majority[r.primary] for r in results if r.majority is not None}
        self.log({"mean_score": mean, "evaluation": {result.task: result.metrics for result in results}})
        state.evaluated_step = state.step
        untuned = state.step == 0
        if untuned:
            state.scores["untuned"] = scores
        elif state.best_score is None or mean > state.best_score:
            state.best_score, state.best_step, state.worse_in_a_row = mean, state.step, 0
            state.scores["best"] = scores
        else:
            state.worse_in_a_row += 1
        if not untuned:
            self._look_inside()
        log.say(f"step {state.step}: mean validation score {mean:.2f}{' (untuned)' if untuned else ''}")
        self.engine.train()

    def save(self) -> None:
        """Take a checkpoint; it is written beside the training, then `last`, and `best` if it is the best so far.

        Raises:
            TrainingError: the one before was not written.
        """
        self.wait_for_save()
        state = self.progress
        self.plan.sampler.next_step = state.step
        counted = {"progress": asdict(state), "sampler": self.plan.sampler.state_dict(), "base": self.base}
        snapshot = checkpoint.take(self.engine, state.step, counted)
        path = self._checkpoint(state.step)
        self.saving.start(partial(self._write, snapshot, state.best_step), f"the checkpoint {path} was not written")
        self.saved_step = state.step
        self.stop.no_step()

    def wait_for_save(self) -> None:
        """Wait until the last checkpoint that was taken is on the disk.

        Raises:
            TrainingError: it was not written; those before are unharmed.
        """
        seconds = self.saving.wait()
        if seconds is not None:
            self.stop.saved(seconds)

    def _write(self, snapshot: checkpoint.Snapshot, best_step: int) -> float:
        """Write a checkpoint and what is published of it, on rank 0; returns the seconds that it took."""
        began, best = time.monotonic(), self._checkpoint(best_step)
        path = snapshot.write(self.folder.checkpoints, keep=self.plan.config.save_total_limit, protect=[best])
        self._publish(path, path if path == best else None)
        return time.monotonic() - began

    def _publish(self, last: Path, best: Path | None) -> None:
        publish(last, self.folder.last, self._write_trained)
        if best is not None:
            publish(best, self.folder.best, self._write_trained)

    def _write_trained(self, checkpoint_folder: Path, folder: Path) -> None:
        """What is published of a checkpoint: the adapter, or the model of a run that trains all of it."""
        if isinstance(self.plan.adapter, FullConfig):
            tokenizer = self.plan.encoder.tokenizer
            write_model(checkpoint_folder, folder, self.text_model.base, self.plan.dtype, tokenizer)
        else:
            copy_adapter(checkpoint_folder, folder)

    def pause(self) -> None:
        """Save what has been trained since the last checkpoint, before the process ends."""
        if self.progress.step > self.saved_step:
            self.save()
        self.wait_for_save()
        self.stop.signals.is_over = True

    def leave_out(self, error: NonFiniteError) -> None:
        """Go back to the last checkpoint, to train on without the step that failed.

        Raises:
            NonFiniteError: as many steps as `skip_nonfinite` allows have been left out.
        """
        skipped = sorted({*self.progress.skipped, error.step})
        if len(skipped) > self.plan.config.skip_nonfinite:
            raise error
        log.say(f"left out: {error}")
        self.resume(self._checkpoint(self.saved_step))
        self.progress.skipped = skipped

    def resume_newest(self) -> None:
        """Go on from the newest checkpoint that is sound.

        Raises:
            UserError: there is none, or it is of another adapter or sampling plan.
        """
        folder = self.folder.checkpoints
        name = on_rank_zero(lambda: newest_sound(folder).name, self.ranks.device, f"{folder} cannot be read")
        self.resume(folder / name)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint; `last` and `best` are brought to where it is, should a kill have come between.

        Raises:
            UserError: it is damaged, or of another adapter or sampling plan.
        """
        self.wait_for_save()
        state = checkpoint.load(path, self.engine)
        self.progress = Progress(**state["progress"])
        self.saved_step = self.progress.step
        self.plan.sampler.load_state_dict(state["sampler"])
        best = self._checkpoint(self.progress.best_step)

        def bring_back() -> None:
            self.folder.forget_after(self.progress.step, self.progress.evaluated_step == self.progress.step)
            self._publish(path, best if is_complete(best) else None)

        on_rank_zero(bring_back, self.ranks.device, f"{self.folder.path} cannot be written")
        log.say(f"resumed from {path}, step {self.progress.step}")

    def finish(self) -> None:
        """Score the best adapter on the test splits, and show what came out."""
        self.wait_for_save()
        state, folder = self.progress, self.folder
        if state.best_step not in (0, state.step):
            checkpoint.load(self._checkpoint(state.best_step), self.engine)
        columns: dict[str, dict[str, float]] = {
            title: dict(state.scores[title]) for title in ("majority", "untuned", "best") if title in state.scores
        }
        metrics = {task.name: task.primary for task in self.plan.tasks}
        results: list[TaskResult] = []
        began = time.monotonic()
        for split, examples in self.plan.test.items():
            tasks = [task for task in self.plan.tasks if task.name in examples]
            part = self._score(tasks, examples, split, RESAMPLES)
            for result in part:
                name = result.task if split == "test" else f"{result.task}/{split}"
                columns.setdefault("test", {})[name] = result.score
                metrics[name] = result.primary
            results += part
        chosen = self.chosen_ranks()
        if self.ranks.rank == 0:
            if results:
                about = {"subject": str(folder.path), "step": state.best_step, "base_model": self.plan.config.model}
                about |= {"seconds": round(time.monotonic() - began, 1), "versions": versions()}
                write_results(folder.path / "eval" / "test", results, about)
            if chosen:
                table = {name: dict(zip(self.plan.task_names, c.tolist(), strict=True)) for name, c in chosen.items()}
                (folder.path / "ranks.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        log.say("\n" + report.scores(list(metrics), metrics, columns))
        if chosen:
            before = {name: torch.tensor(first) for name, first in state.first_ranks.items()}
            log.say("\n" + report.rank_table(chosen, self.plan.task_names, before))
        if self.plan.encoder.num_cut:
            log.say("\n" + report.cut_prompts(self.plan.encoder))
        log.say(f"\nmemory at the peak: {memory_use.at_peak(self.ranks, self.engine.module)}")
        what = "model" if isinstance(self.plan.adapter, FullConfig) else "adapter"
        log.say(
            f"\nbest {what} (step {state.best_step}): {folder.best}\nscore it again: python eval/run.py {folder.path}"
        )

    def chosen_ranks(self) -> dict[str, Tensor]:
        """The ranks that the gates choose now, (tasks,) by adapted map; empty for a method without them."""
        tuner = getattr(self.text_model.peft, "base_model", None)
        if not hasattr(type(tuner), "ranks"):
            return {}
        with self._gathered():
            return {name: chosen.cpu() for name, chosen in tuner.ranks().items()}  # type: ignore[union-attr]

    def _look_inside(self) -> None:
        """Log what the gates choose, and how the tasks' gradients lie to each other where that is asked for."""
        names, row = self.plan.task_names, {}
        if chosen := self.chosen_ranks():
            with self._gathered():
                row["gates"] = gate_row(chosen, gate_entropy(self.text_model.peft), names)
        if self.plan.config.gradient_cosine:
            row["gradients"] = task_gradients(
                self.text_model, self.plan.train, names, micro=self.plan.sizes.micro, ranks=self.ranks,
                seed=self.plan.config.seed,
            )  # fmt: skip
        if row:
            self.log(row)

    def _gathered(self) -> Any:
        return gathered(p for p in self.text_model.peft.parameters() if p.requires_grad)

    def _score(
        self, tasks: Sequence[Task], examples: Mapping[str, Sequence[Example]], split: str, resamples: int = 0
    ) -> list[TaskResult]:
        return evaluate(
            self.text_model,
            tasks,
            examples,
            task_ids=self.task_ids,
            batch_size=self.plan.config.per_device_eval_batch_size,
            mode=self.plan.config.eval_mode,
            split=split,
            train_golds=self.train_golds,
            resamples=resamples,
            plain_prompts=self.plan.config.plain_prompts,
            label=f"scoring {split}",
            between=self.stop.check,
        )

    def _checkpoint(self, step: int) -> Path:
        return self.folder.checkpoints / name_of(step)
