"""Train an adapter for each task alone, one after another: what one adapter for all of them has to beat.

    python launch/single.py --recipe demo --method lora --output_dir runs/single
    python launch/single.py --launcher "deepspeed --num_gpus 4" --recipe t5_base_glue --output_dir runs/single
    python launch/single.py --sequential --method lora --output_dir runs/chain     one adapter, from task to task

Every task is a run of launch/train.py, with its flags, in a folder of its own; the same command goes on where it was
stopped. `eval/test` has the scores of all, for eval/compare.py. In a chain the next run starts from the best adapter of
the last one, and the last is scored on all tasks: it says what was forgotten.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from more_ds import cli, log
from more_ds.compose.sources import OF_LORAS
from more_ds.config import RunConfig, read_recipe
from more_ds.errors import PREEMPTED, PreemptedError, TrainingError, UserError
from more_ds.methods import METHODS
from more_ds.results import PREDICTIONS, RESULTS, read_predictions, read_results, result_table, write_results
from more_ds.run_folder import versions
from more_ds.tasks import Task, resolve_tasks

ROOT = Path(__file__).resolve().parents[1]
OWN = ("--launcher", "--output_dir", "--tasks")
"""Flags that are not handed on as they are, with a value."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    log.quiet_libraries()
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    train_each(argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.config_parser(__doc__ or "", "launch/single.py --output_dir DIR [--sequential] [--KEY VALUE ...]")
    add = parser.add_argument
    add("--recipe", default="demo", help="recipe: a YAML file, or a name in launch/recipes")
    add("--launcher", default=sys.executable, help="what starts launch/train.py; default: this python")
    add("--sequential", action="store_true", help="one adapter that goes from task to task")
    add("--ds_config", help="DeepSpeed configuration; default: ZeRO-0")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    return parser


def train_each(argv: Sequence[str]) -> list[Path]:
    """Do what the command line says; returns the folders of the runs, in the order of the tasks.

    Raises:
        UserError: a mistake in it.
        PreemptedError: a run was stopped and saved.
        TrainingError: a run failed.
    """
    arguments, flags = cli.parse(_parser(), argv)
    config = cli.merged(read_recipe(arguments.recipe), flags, f"recipe '{arguments.recipe}'")
    tasks = _check(arguments, config)
    folder, handed_on = Path(config.output_dir or ""), _handed_on(argv)
    runs: list[Path] = []
    for number, task in enumerate(tasks, 1):
        run = folder / (f"{number:02d}-{task.name}" if arguments.sequential else task.name)
        done = (run / "eval" / "test" / RESULTS).is_file()
        log.say(f"\n{number} of {len(tasks)}: {task.name}{', finished before' if done else ''}")
        if not done:
            start = ["--init_adapter", str(runs[-1] / "best")] if arguments.sequential and runs else []
            own = ["--tasks", f"{task.suite}/{task.name}" if task.suite in config.suite else task.name]
            _run([*shlex.split(arguments.launcher), str(ROOT / "launch" / "train.py"), *handed_on, *own, *start,
                  "--output_dir", str(run), "--resume", "auto"])  # fmt: skip
        runs.append(run)
    if arguments.sequential:
        _score_all(runs[-1] / "best", folder, config, tasks)
    else:
        _gather(folder, tasks)
    return runs


def _check(arguments: argparse.Namespace, config: RunConfig) -> list[Task]:
    if config.output_dir is None:
        raise UserError("the runs need a place: --output_dir DIR")
    if not config.test:
        raise UserError("the scores are those on the test splits; leave --test out")
    tasks = resolve_tasks(config.tasks or None, config.suite, config.tasks_file)
    if len(tasks) < 2:
        raise UserError(f"there is one task, {tasks[0].name}; train it with launch/train.py")
    if arguments.sequential and (METHODS[config.method].routes_by_task or config.method in ("full", *OF_LORAS)):
        raise UserError(f"{config.method} does not go from task to task; take a method without tasks, e.g. lora")
    replace(config, tasks=[tasks[0].name])  # what a run of one task could not be is refused now
    return tasks


def _handed_on(argv: Sequence[str]) -> list[str]:
    """The flags without those that are this command's own."""
    found, skip = [], False
    for word in argv:
        name, equals, _ = word.partition("=")
        name = "--" + name[2:].replace("-", "_") if name.startswith("--") else name
        if skip or name == "--sequential" or name in OWN:
            skip = not skip and name in OWN and not equals
            continue
        found.append(word)
    return found


def _run(command: Sequence[str]) -> None:
    """Run a command to its end.

    Raises:
        PreemptedError: it was stopped and saved.
        TrainingError: it failed; what it said stands above.
    """
    code = subprocess.run(command, check=False).returncode
    if code == PREEMPTED:
        raise PreemptedError("a run was stopped")
    if code != 0:
        raise TrainingError(f"a run ended with exit code {code}; the runs before it are finished, and are kept")


def _gather(folder: Path, tasks: Sequence[Task]) -> None:
    """Put the scores of all runs together."""
    results = []
    for task in tasks:
        place = folder / task.name / "eval" / "test"
        records = read_predictions(place)
        for result in read_results(place)[1]:
            key = (result.task, result.split, result.mode)
            own = [r for r in records if (r["task"], r["split"], r["mode"]) == key]
            results.append(replace(result, records=own))
    write_results(folder / "eval" / "test", results, {"subject": str(folder), "versions": versions()})
    log.say("\n" + result_table(results))
    log.say(f"written to {folder / 'eval' / 'test'}: {RESULTS}, {PREDICTIONS}")


def _score_all(adapter: Path, folder: Path, config: RunConfig, tasks: Sequence[Task]) -> None:
    """Score the last adapter of a chain on every task."""
    names = ",".join(task.name for task in tasks)
    command = [
        sys.executable,
        str(ROOT / "eval" / "run.py"),
        str(adapter),
        "--output_dir",
        str(folder / "eval" / "test"),
    ]
    command += ["--tasks", names, *(["--tasks_file", config.tasks_file] if config.tasks_file else [])]
    command += ["--suite", ",".join(config.suite)] if config.suite else []
    _run([*command, *(["--limit", str(config.eval_limit)] if config.eval_limit else [])])


if __name__ == "__main__":
    sys.exit(main())
