"""Score a run directory, an adapter folder or a plain model on tasks.

Alone: `python eval/run.py RUN [--suite glue] [--tasks cola,rte] [--split test] [--mode both] [--limit 100]`, or with
the same numbers on several processes: `deepspeed eval/run.py RUN`, `torchrun --nproc_per_node 4 eval/run.py RUN`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import torch
import torch.distributed as dist

from more_ds import cli, demo, log
from more_ds.checkpoint_files import ADAPTER, base_identity
from more_ds.compare.bootstrap import RESAMPLES
from more_ds.data.rows import load_examples
from more_ds.digest import digest_files
from more_ds.errors import UserError, suggest
from more_ds.evaluate import MAJORITY_ROWS, check_known, evaluate
from more_ds.loading import Subject, choose_device, choose_dtype, find_subject, load_text_model
from more_ds.metrics import Gold
from more_ds.model import DTYPES
from more_ds.results import GENERATION, LIKELIHOOD, PREDICTIONS, RESULTS, TaskResult, result_table, write_results
from more_ds.run_folder import versions
from more_ds.scoring.journal import Journal
from more_ds.scoring.task_inference import check_infers
from more_ds.tasks import Task, resolve_tasks
from more_ds.tasks.render import Example
from more_ds.text_model import TextModel

MODES = {LIKELIHOOD: (LIKELIHOOD,), GENERATION: (GENERATION,), "both": (LIKELIHOOD, GENERATION)}


@dataclass(frozen=True)
class _Plan:
    """What will be scored, and how; decided before a model is loaded."""

    subject: Subject
    tasks: list[Task]
    examples: dict[str, dict[str, list[Example]]]
    train_golds: dict[str, list[Gold]]
    task_ids: dict[str, int]
    modes: tuple[str, ...]
    dtype: str
    device: str
    lengths: tuple[int | None, int]
    plain_prompts: bool
    output: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Score, print the table, write the results: exit code 0, or 2 after a mistake in the input."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    began = time.monotonic()
    arguments, _ = cli.parse(_parser(), argv)
    log.quiet_libraries()
    joined = _join(arguments)
    try:
        plan = _plan(arguments)
        log.say(_header(arguments, plan))
        text_model = load_text_model(
            plan.subject, dtype=plan.dtype, device=plan.device,
            max_source_length=plan.lengths[0], max_target_length=plan.lengths[1],
        )  # fmt: skip
        journal = _journal(arguments, plan)
        if joined:
            dist.barrier()  # no rank may add answers while another reads them
        results = _evaluate(arguments, plan, text_model, journal)
        if log.rank() == 0:
            write_results(plan.output, results, _about(arguments, plan, time.monotonic() - began))
            journal.remove()
        log.say(result_table(results))
        log.say(f"written to {plan.output}: {RESULTS}, {PREDICTIONS}")
    finally:
        if joined:
            dist.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="eval/run.py", description="Score a model on tasks.", allow_abbrev=False)
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory, adapter folder, model folder or hub id; `demo`, `demo-t5`")
    add("--suite", action="append", default=[], help="suites, e.g. glue or glue,demo; default: the run's tasks")
    add("--tasks", default="", help="which of their tasks, e.g. cola,rte")
    add("--tasks_file", help="a YAML file with tasks of your own")
    add("--data_dir", help="folder with <suite>/<task>/<split>.jsonl.gz; default: the run's, else the hub")
    add("--split", default="test", help="test (with the further test sets), validation or another split")
    add("--limit", type=cli.positive, help="at most this many rows of each task")
    add("--mode", choices=list(MODES), default=LIKELIHOOD, help="how closed answers are given")
    add("--length_normalised", action="store_true", help="likelihood per token of the answer")
    add("--num_beams", type=cli.positive, default=1, help="of generation; 1 is greedy")
    add("--batch_size", type=cli.positive, default=32, help="examples per batch and process")
    add("--plain_prompts", action="store_true", help="the tasks' second, plain prompts; default: as in the run")
    add("--max_source_length", type=cli.positive, help="most tokens of a prompt; default: the run's, else up to 384")
    add("--max_target_length", type=cli.positive, help="most tokens of an answer; default: the run's, else 128")
    add("--as_task", help="the task that the adapter is to take every example for")
    add(
        "--infer_task",
        action="store_true",
        help="route by the task that the prompt looks like, and say how often that is right",
    )
    add("--base_model", help="base model of an adapter, where the recorded one has moved")
    add("--dtype", choices=list(DTYPES), help="default: the run's, else bf16 on a GPU, fp32 on a CPU")
    add("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    add("--output_dir", help="default: <RUN>/eval/<what>-<split>")
    add("--local_rank", help=argparse.SUPPRESS)  # given by the deepspeed launcher, which sets LOCAL_RANK as well
    return parser


def _join(arguments: argparse.Namespace) -> bool:
    """Choose the device, and form the process group where a launcher started several processes."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    own = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    arguments.device = choose_device(arguments.device or own)
    on_gpu = arguments.device.startswith("cuda")
    if world == 1 or dist.is_initialized():
        return False
    if on_gpu:
        torch.cuda.set_device(arguments.device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", world))))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    return True


def _plan(arguments: argparse.Namespace) -> _Plan:
    name = arguments.run
    model = _demo_model(name)
    subject = find_subject(model, arguments.base_model)
    subject = replace(subject, name=name, base=_demo_model(subject.base))
    if model != name:
        subject = replace(subject, folder=Path("eval_results", name))
    run = subject.run
    tasks = _tasks(arguments, run)
    if arguments.infer_task:
        check_infers(subject.adapter_config)
        if arguments.as_task is not None:
            raise UserError("--infer_task and --as_task both say how examples are routed; give one of the two")
    task_ids = subject.task_ids if arguments.infer_task else _routes(subject, tasks, arguments.as_task)
    golds = {task.name: _train_golds(arguments, subject, task) for task in tasks}
    plain = arguments.plain_prompts or bool(subject.reading.get("plain_prompts"))
    names = [*arguments.suite, arguments.tasks, Path(arguments.tasks_file or "").stem]
    what = "-".join(",".join(filter(None, names)).split(",")) or "tasks"
    return _Plan(
        subject=subject,
        tasks=tasks,
        examples=_examples(arguments, subject, tasks, plain),
        train_golds={name: found for name, found in golds.items() if found},
        task_ids=task_ids,
        modes=MODES[arguments.mode],
        dtype=choose_dtype(subject, arguments.dtype, arguments.device),
        device=arguments.device,
        lengths=subject.lengths(arguments.max_source_length, arguments.max_target_length),
        plain_prompts=plain,
        output=Path(arguments.output_dir or subject.folder / f"{what}-{arguments.split}"),
    )


def _tasks(arguments: argparse.Namespace, run: Mapping[str, Any]) -> list[Task]:
    """The tasks that the flags name, else those of the run."""
    suites = [name for part in arguments.suite for name in part.split(",") if name]
    names = [name for name in arguments.tasks.split(",") if name]
    if suites or arguments.tasks_file:
        return resolve_tasks(names or None, suites, arguments.tasks_file)
    chosen = names or run.get("tasks") or None
    if not run and chosen is None:
        raise UserError(f"{arguments.run} records no tasks; say what to score: --suite, --tasks or --tasks_file")
    return resolve_tasks(chosen, run.get("suite", ()), run.get("tasks_file"))


def _routes(subject: Subject, tasks: Sequence[Task], as_task: str | None) -> dict[str, int]:
    """The adapter's number of every task."""
    known, names = subject.task_ids, [task.name for task in tasks]
    if as_task is not None:
        if as_task not in known:
            raise UserError(f"--as_task: the adapter knows no task '{as_task}'{suggest(as_task, known)}")
        return dict.fromkeys(names, known[as_task])
    config = subject.adapter_config
    if getattr(config, "num_tasks", getattr(config, "n_tasks", 1)) == 1 and not known:
        return dict.fromkeys(names, 0)
    check_known(names, known)
    return {name: known[name] for name in names}


def _examples(
    arguments: argparse.Namespace, subject: Subject, tasks: Sequence[Task], plain: bool
) -> dict[str, dict[str, list[Example]]]:
    """The examples by split and task: the split that was asked for and, beside `test`, the further test sets."""
    examples: dict[str, dict[str, list[Example]]] = {}
    for task in tasks:
        for split in (arguments.split, *(task.extra_tests if arguments.split == "test" else ())):
            data_dir = _data_dir(arguments, subject.run, task)
            found = load_examples(task, split, data_dir=data_dir, limit=arguments.limit, plain=plain)
            examples.setdefault(split, {})[task.name] = found
    return examples


def _train_golds(arguments: argparse.Namespace, subject: Subject, task: Task) -> list[Gold]:
    try:
        rows = load_examples(task, "train", data_dir=_data_dir(arguments, subject.run, task), limit=MAJORITY_ROWS)
    except UserError:
        log.say(f"task '{task.name}': no training rows, so no majority baseline")
        return []
    return [row.gold for row in rows]


def _data_dir(arguments: argparse.Namespace, run: Mapping[str, Any], task: Task) -> str | Path | None:
    if arguments.data_dir or (run.get("data_dir") and task.suite in run.get("suite", ())):
        return arguments.data_dir or run["data_dir"]
    return demo.prepare_data() if task.suite == "demo" else run.get("data_dir")


def _demo_model(name: str) -> str:
    """The folder of the embedded backbone for its name; any other name as it is."""
    return str(demo.prepare(demo.MODELS[name]).model_dir) if name in demo.MODELS else name


def _journal(arguments: argparse.Namespace, plan: _Plan) -> Journal:
    """The answers of an interrupted evaluation of the same model by the same settings."""
    subject = plan.subject
    adapter = subject.adapter / ADAPTER if subject.adapter is not None else None
    settings = {
        "base": base_identity(subject.base, subject.run.get("revision"))["sha256"],
        "adapter": digest_files([adapter]) if adapter and adapter.is_file() else None,
        "tasks": plan.task_ids,
        "settings": [plan.dtype, plan.lengths, arguments.num_beams, arguments.length_normalised],
        "infer_task": arguments.infer_task,
    }
    journal = Journal(plan.output, settings, log.rank())
    if journal.known:
        log.say(f"{len(journal.known):,} answers of an interrupted evaluation are taken over from {plan.output}")
    return journal


def _evaluate(arguments: argparse.Namespace, plan: _Plan, text_model: TextModel, journal: Journal) -> list[TaskResult]:
    results: list[TaskResult] = []
    for mode in plan.modes:
        for split, examples in plan.examples.items():
            # Free text is always generated: once is enough.
            tasks = [t for t in plan.tasks if t.name in examples and (mode == plan.modes[0] or t.kind != "text")]
            if tasks:
                results += evaluate(
                    text_model, tasks, examples, task_ids=plan.task_ids, batch_size=arguments.batch_size, mode=mode,
                    split=split, num_beams=arguments.num_beams, normalise=arguments.length_normalised,
                    train_golds=plan.train_golds, resamples=RESAMPLES, plain_prompts=plan.plain_prompts,
                    label=f"{split}, {mode}", journal=journal, infer_task=arguments.infer_task,
                )  # fmt: skip
    return results


def _header(arguments: argparse.Namespace, plan: _Plan) -> str:
    subject, world = plan.subject, int(os.environ.get("WORLD_SIZE", "1"))
    what = f"adapter {subject.adapter} on {subject.base}" if subject.adapter else f"model {subject.base}"
    count = sum(len(rows) for split in plan.examples.values() for rows in split.values())
    processes = f"{world} process{'es' if world > 1 else ''} on {plan.device.partition(':')[0]}"
    return (
        f"{what}: {len(plan.tasks)} tasks, {', '.join(plan.examples)}, {count:,} examples, "
        f"by {' and '.join(plan.modes)}, {plan.dtype}, {processes}"
    )


def _about(arguments: argparse.Namespace, plan: _Plan, seconds: float) -> dict[str, Any]:
    """What `results.json` says of the scoring itself."""
    subject = plan.subject
    settings = {key: value for key, value in vars(arguments).items() if key not in ("run", "local_rank")}
    return {
        "subject": subject.name,
        "base_model": subject.base,
        "adapter": None if subject.adapter is None else str(subject.adapter),
        "settings": settings | {"dtype": plan.dtype, "max_lengths": plan.lengths},
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "seconds": round(seconds, 1),
        "versions": versions(),
    }


if __name__ == "__main__":
    sys.exit(main())
