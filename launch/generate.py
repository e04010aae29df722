"""Let a trained adapter answer.

    python launch/generate.py RUN --task sst2 --prompt "sst2 sentence: a quiet, moving film"
    python launch/generate.py RUN --input rows.jsonl --output answers.jsonl

A row of the input is a JSON object with `prompt` and `task`, or with `task` and the columns that the task's template
makes the prompt of. A row with a prompt and no task is answered as the task that its prompt looks like. RUN is a run's
folder, an adapter's, or an export's. Rows of all tasks share the batches.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from more_ds import cli, log
from more_ds.errors import UserError, suggest
from more_ds.inference import Answer, Inference, check_tasks
from more_ds.loading import choose_device, find_subject
from more_ds.model import DTYPES
from more_ds.tasks import Task, resolve_tasks
from more_ds.tasks.template import TemplateError, fill
from more_ds.tasks.transforms import TRANSFORMS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    arguments, _ = cli.parse(_parser(), argv)
    log.quiet_libraries()
    subject = find_subject(arguments.run, arguments.base_model)
    if (arguments.prompt is None) == (arguments.input is None):
        raise UserError("give either --prompt or --input")
    rows = [{"prompt": arguments.prompt}] if arguments.input is None else _read(Path(arguments.input))
    known = _tasks(subject.run, arguments.tasks_file)
    prompts = [_prompt(row, row.get("task") or arguments.task, known, i) for i, row in enumerate(rows, 1)]
    tasks = [row.get("task") or arguments.task for row in rows]
    check_tasks(tasks, subject.task_ids)
    _check_output(arguments.output)
    model = Inference.open(
        arguments.run,
        base_model=arguments.base_model,
        dtype=arguments.dtype,
        device=choose_device(arguments.device),
        max_source_length=arguments.max_source_length,
    )
    answers = model.generate(
        prompts,
        tasks,
        max_new_tokens=arguments.max_new_tokens,
        num_beams=arguments.num_beams,
        batch_size=arguments.batch_size,
        label="answering" if len(prompts) > 1 else None,
    )
    _write(arguments.output, prompts, answers)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"--input {path} cannot be read: {' '.join(str(error).split())}; give JSON lines") from error
    wrong = next((i for i, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if wrong is not None or not rows:
        raise UserError(f"--input {path}: {'no rows' if wrong is None else f'line {wrong} is no JSON object'}")
    return rows


def _tasks(run: Mapping[str, Any], tasks_file: str | None) -> dict[str, Task]:
    """The tasks whose templates may be asked for, by name; none for an adapter that comes without its run."""
    if not run and tasks_file is None:
        return {}
    tasks = resolve_tasks(run.get("tasks") or None, run.get("suite", ()), tasks_file or run.get("tasks_file"))
    return {task.name: task for task in tasks}


def _prompt(row: Mapping[str, Any], name: str | None, known: Mapping[str, Task], number: int) -> str:
    if isinstance(row.get("prompt"), str):
        return str(row["prompt"])
    if name is None or name not in known:
        tasks = f"; the run's tasks: {', '.join(known)}" if known else ""
        missing = "has neither prompt nor task" if name is None else f"is of task '{name}'{suggest(name, known)}"
        raise UserError(f"row {number} {missing}: no template makes a prompt of its columns{tasks}")
    task = known[name]
    try:
        return fill(task.prompt, TRANSFORMS[task.transform](row) if task.transform else row)
    except (TemplateError, ValueError) as error:
        raise UserError(f"row {number}, task '{name}': {error}") from error


def _check_output(output: str | None) -> None:
    if output is not None and not Path(output).resolve().parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {Path(output).resolve().parent}; make it first")


def _write(output: str | None, prompts: Sequence[str], answers: Sequence[Answer]) -> None:
    if output is None:
        for answer in answers:
            log.say(
                f"[{answer.task}{', inferred' if answer.inferred else ''}] {answer.text}"
                if answer.task
                else answer.text
            )
        return
    rows = [
        {"prompt": prompt, "task": a.task, "task_inferred": a.inferred, "text": a.text}
        for prompt, a in zip(prompts, answers, strict=True)
    ]
    Path(output).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    log.say(f"{len(rows):,} answers written to {output}")


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="launch/generate.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory, adapter folder or model")
    add("--prompt", help="one prompt, as in training")
    add("--input", help="JSON lines with many")
    add("--task", help="of the rows that do not name theirs; default: inferred")
    add("--tasks_file", help="a YAML file with the tasks' templates; default: the run's")
    add("--output", help="JSON lines; default: the answers are printed")
    add("--max_new_tokens", type=cli.positive, default=64, help="most tokens of an answer")
    add("--num_beams", type=cli.positive, default=1, help="1 is greedy")
    add("--batch_size", type=cli.positive, default=32, help="rows that run together")
    add("--max_source_length", type=cli.positive, help="most tokens of a prompt; default: the run's, else up to 384")
    add("--base_model", help="the base model, where the recorded one has moved")
    add("--dtype", choices=list(DTYPES), help="default: the run's, else bf16 on a GPU, fp32 on a CPU")
    add("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
