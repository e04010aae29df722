"""Score a file of outputs, from any system, with a task's metrics: no model, no prompts, no torch.

    python eval/score.py --task e2e_nlg --hypotheses out.txt --references testset_refs.txt [--output scores.json]
    python eval/score.py --task web_nlg_2017 --hypotheses out.txt --references ref0 ref1 ref2 --compare other.txt
    python eval/score.py --task cola --hypotheses labels.txt --data_dir /data --split test

One output a line. References: files with one reference of every example each; one file with the references of an
example on successive lines, then a blank line; or .jsonl with `references`. A closed task's outputs are its labels'
words or scores, and its references a file of the same kind. Without --references the task's own data are read.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import numpy as np

from more_ds import command, log
from more_ds.compare.bootstrap import CorpusMetric, Paired, Sums, paired_test, standard_error
from more_ds.data.rows import load_examples
from more_ds.data.text_files import read_lines, read_references
from more_ds.errors import UserError, suggest
from more_ds.metrics import METRICS, Gold, Prediction, require
from more_ds.results import GENERATION, TaskResult, write_summary
from more_ds.tasks import Task, resolve_tasks
from more_ds.tasks.render import content_hash
from more_ds.tasks.schema import label_key


@dataclass(frozen=True)
class _Gold:
    """The right answers, and for closed tasks the options of every example."""

    answers: list[Gold]
    options: list[tuple[str, ...]]
    indices: list[int]
    where: str


@dataclass(frozen=True)
class _Scores:
    """A system's metrics; `rows` and `fns` are what a paired test resamples, by metric."""

    values: dict[str, float]
    errors: dict[str, float]
    rows: dict[str, Sequence[Any]]
    fns: dict[str, CorpusMetric]


def main(argv: Sequence[str] | None = None) -> int:
    """Score, print the table, write the results: exit code 0, or 2 after a mistake in the input."""
    return command.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    if arguments.resamples < 2:
        raise UserError(f"--resamples is {arguments.resamples}; two or more are needed")
    task = _task(arguments)
    gold = _gold(arguments, task)
    files = [Path(name) for name in (arguments.hypotheses, arguments.compare) if name]
    systems = [_predictions(task, path, gold) for path in files]
    scores = [_score(task, predictions, gold.answers, arguments.resamples) for predictions in systems]
    tests = _tests(task, scores, gold.answers, arguments.resamples)
    log.say(_header(task, arguments, gold))
    log.say(_table(task, scores, tests))
    if arguments.output:
        _write(arguments, task, gold, systems[0], scores, tests)


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(prog="eval/score.py", description="Score a file of outputs.", allow_abbrev=False)
    add = parser.add_argument
    add("--task", required=True, help="the task whose metrics are wanted, e.g. e2e_nlg")
    add("--hypotheses", required=True, metavar="FILE", help="outputs, one a line")
    add("--references", nargs="+", metavar="FILE", help="references, or right answers; default: the task's data")
    add("--compare", metavar="FILE", help="outputs of another system, for a paired bootstrap test")
    add("--metrics", default="", help="instead of the task's, e.g. bleu,ter,meteor_1.5")
    add("--data_dir", help="folder with <suite>/<task>/<split>.jsonl.gz; default: the hub")
    add("--split", default="test", help="of the task's data")
    add("--tasks_file", help="a YAML file with tasks of your own")
    add("--resamples", type=int, default=1000, help="of the bootstrap")
    add("--output", metavar="FILE", help="write the results there, as JSON")
    return parser


def _task(arguments: argparse.Namespace) -> Task:
    (task,) = resolve_tasks([arguments.task], (), arguments.tasks_file)
    names = tuple(filter(None, arguments.metrics.split(",")))
    for name in names:
        fitting = [key for key, metric in METRICS.items() if task.kind in metric.kinds]
        if name not in fitting:
            raise UserError(f"--metrics: '{name}' is no metric for {task.name} ({task.kind}){suggest(name, fitting)}")
    require(names)
    if not names:
        return task
    return replace(task, metrics=names, primary=task.primary if task.primary in names else names[0])


def _gold(arguments: argparse.Namespace, task: Task) -> _Gold:
    if not arguments.references:
        examples = load_examples(task, arguments.split, data_dir=arguments.data_dir)
        where = f"{arguments.split} of {task.name}"
        return _Gold([e.gold for e in examples], [e.options for e in examples], [e.index for e in examples], where)
    paths = [Path(name) for name in arguments.references]
    where = ", ".join(arguments.references)
    if task.kind == "text":
        answers: list[Any] = [*read_references(paths, task.references or "references")]
    elif task.kind == "options" or len(paths) > 1:
        raise UserError(f"task '{task.name}' has closed answers: give one file of labels or scores, or --data_dir")
    else:
        answers = [_closed(task, task.words, text) for text in read_lines(paths[0])]
        if None in answers:
            number = answers.index(None) + 1
            raise UserError(f"{where}, line {number}: no label of '{task.name}'; allowed: {', '.join(task.words)}")
    return _Gold(answers, [task.words] * len(answers), list(range(len(answers))), where)


def _predictions(task: Task, path: Path, gold: _Gold) -> list[Prediction]:
    """The outputs in a file; a warning counts the empty and the unreadable."""
    lines = read_lines(path)
    if len(lines) != len(gold.answers):
        raise UserError(f"{path} has {len(lines)} lines for {len(gold.answers)} examples ({gold.where}); one each")
    empty = lines.count("")
    if empty:
        log.say(f"warning: {empty} of {len(lines)} lines in {path} are empty; they count as wrong or empty answers")
    if task.kind == "text":
        return [*lines]
    found: list[Prediction] = [_closed(task, options, text) for text, options in zip(lines, gold.options, strict=True)]
    unread = found.count(None) - empty
    if unread:
        example = lines[next(i for i, value in enumerate(found) if value is None and lines[i])]
        log.say(f"warning: {unread} of {len(lines)} lines in {path} are no answer, e.g. {example[:60]!r}: wrong")
    return found


def _closed(task: Task, options: Sequence[str], text: str) -> int | float | None:
    """The answer that a line stands for: a score, or the index of an option or label (its word or its raw value)."""
    if task.kind == "scale":
        try:
            value = float(text)
        except ValueError:
            return None
        return value if math.isfinite(value) else None
    return options.index(text) if text in options else task.label_index.get(label_key(text))


def _score(task: Task, predictions: Sequence[Prediction], answers: Sequence[Gold], resamples: int) -> _Scores:
    scores = _Scores({}, {}, {}, {})
    for name in task.metrics:
        metric, rows, fn = METRICS[name], predictions, METRICS[name].resampled
        if metric.sums is not None:  # what each example adds is computed once, for the value and every resample
            rows = list(metric.sums.statistics(predictions, answers))
            fn = Sums(lambda rows, _: np.stack(rows), metric.sums.value)
        scores.values[name] = fn(rows, answers)
        scores.errors[name] = standard_error(fn, rows, answers, resamples)
        scores.rows[name], scores.fns[name] = rows, fn
    return scores


def _tests(task: Task, scores: Sequence[_Scores], answers: Sequence[Gold], resamples: int) -> dict[str, Paired]:
    if len(scores) < 2:
        return {}
    first, second = scores
    test = partial(paired_test, golds=answers, resamples=resamples)
    return {name: test(first.fns[name], first.rows[name], second.rows[name]) for name in task.metrics}


def _header(task: Task, arguments: argparse.Namespace, gold: _Gold) -> str:
    counts = f"{len(gold.answers):,} examples"
    if task.kind == "text":
        counts += f", {sum(len(refs) for refs in gold.answers if isinstance(refs, tuple)):,} references"
    against = f" against {arguments.compare}" if arguments.compare else ""
    return f"{task.name}: {arguments.hypotheses}{against}; {counts} ({gold.where})"


def _table(task: Task, scores: Sequence[_Scores], tests: dict[str, Paired]) -> str:
    header = ["metric", "value", "+/-"]
    if tests:
        header += ["other", "+/-", "difference", "p"]
    rows = []
    for name in task.metrics:
        row: list[Any] = [name]
        for score in scores:
            row += [score.values[name], score.errors[name]]
        if tests:
            row += [tests[name].difference, f"{tests[name].p:.3f}"]
        rows.append(row)
    return log.table(header, rows)


def _write(
    arguments: argparse.Namespace, task: Task, gold: _Gold, predictions: Sequence[Prediction],
    scores: Sequence[_Scores], tests: dict[str, Paired],
) -> None:  # fmt: skip
    result = TaskResult(
        task=task.name,
        suite=task.suite,
        split=arguments.split,
        mode=GENERATION,
        metrics=scores[0].values,
        standard_errors=scores[0].errors,
        signatures={name: METRICS[name].signature for name in task.metrics},
        primary=task.primary,
        n=len(predictions),
        unparsable=predictions.count(None),
        cut=0,
        majority=None,
        prompt="",
        data=content_hash(list(zip(gold.indices, gold.answers, strict=True))),
        records=[],
    )
    about: dict[str, Any] = {
        "subject": arguments.hypotheses,
        "references": gold.where,
        "empty": sum(prediction == "" for prediction in predictions),
        "resamples": arguments.resamples,
        "versions": {name: metadata.version(name) for name in ("sacrebleu", "scikit-learn", "scipy", "numpy")},
    }
    if tests:
        about["compared_with"] = arguments.compare
        about["comparison"] = {
            name: {"other": scores[1].values[name], **test._asdict()} for name, test in tests.items()
        }
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_summary(path, [result], about)
    log.say(f"written to {path}")


if __name__ == "__main__":
    sys.exit(main())
