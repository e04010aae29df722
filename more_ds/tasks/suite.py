"""Suites: reading tasks from YAML files, and finding the suites that come with the package."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from more_ds.errors import UserError, suggest
from more_ds.metrics import METRICS
from more_ds.tasks.reader import Reader, describe, duplicate_keys
from more_ds.tasks.schema import HubSource, Label, Scale, SplitProtocol, Task, label_key
from more_ds.tasks.template import TemplateError, columns
from more_ds.tasks.transforms import TRANSFORMS

_NAME = re.compile(r"[A-Za-z0-9._-]+")
_SHARED = ("description", "citation", "version")
_SUITE_KEYS = ("suite", *_SHARED, "tasks")
_TASK_KEYS = (
    *_SHARED,
    *("hub", "path", "files", "split", "extra_tests", "transform"),
    *("prompt", "plain_prompt", "target", "max_new_tokens"),
    *("label", "labels", "options", "references", "group", "metrics", "primary"),
)
SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")


def load_suite(path: str | Path) -> list[Task]:
    """Read the tasks of a YAML file (its form: `more_ds.tasks.schema`), in its order.

    Raises:
        UserError: the file cannot be read, or holds mistakes: all of them, in one line.
    """
    path = Path(path)
    document, errors = _document(path)
    suite = Reader("", document, errors)
    suite.refuse_unknown(_SUITE_KEYS)
    name = suite.text("suite", path.stem)
    if not _valid_name(name):
        suite.fail("suite", _bad_name(name))
    shared = {key: suite.text(key) for key in _SHARED}
    entries = suite.child("tasks")
    if not entries.entry:
        suite.fail("tasks", "no task given")
    tasks = []
    for key in entries.entry:
        if not (isinstance(key, str) and _valid_name(key)):
            entries.fail(str(key), _bad_name(key))
            continue
        tasks.append(_task(entries.child(key), key, name, shared, path.parent))
    if errors:
        raise UserError(f"{path}: " + "; ".join(dict.fromkeys(errors)))
    return tasks


def is_file_name(name: str) -> bool:
    """Whether `name` ends like a data file that can be read, gzip-compressed or not."""
    return name.removesuffix(".gz").endswith(SUFFIXES)


def _valid_name(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and name.strip(".") != ""


def _bad_name(name: Any) -> str:
    return f"{name!r} is no name; use letters, digits, '.', '_' and '-'"


def _document(path: Path) -> tuple[Mapping[Any, Any], list[str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the tasks file {path}: {_one_line(error)}") from error
    try:
        errors = duplicate_keys(yaml.compose(text, Loader=yaml.SafeLoader))
        document = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not plain YAML: {_one_line(error)}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: a mapping with 'tasks' expected, found {describe(document)}")
    return document, errors


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _task(entry: Reader, name: str, suite: str, shared: Mapping[str, str], folder: Path) -> Task:
    entry.refuse_unknown(_TASK_KEYS)
    mistakes = len(entry.errors)
    labels, scale = _labels(entry)
    options, options_column = _options(entry)
    extra_tests, subsets = _extra_tests(entry)
    kind_known = len(entry.errors) == mistakes
    task = Task(
        name=name,
        suite=suite,
        **{key: entry.text(key, shared[key]) for key in _SHARED},
        hub=_hub(entry),
        path=entry.text("path", f"{suite}/{name}"),
        files=_files(entry, folder),
        prompt=entry.text("prompt"),
        plain_prompt=entry.optional_text("plain_prompt"),
        target=entry.text("target", "{answer}"),
        label=entry.text("label", "label"),
        labels=labels,
        scale=scale,
        options=options,
        options_column=options_column,
        references=entry.optional_text("references"),
        group=entry.optional_text("group"),
        metrics=entry.texts("metrics"),
        primary=entry.text("primary", next(iter(entry.texts("metrics")), "")),
        split=_split(entry),
        extra_tests=extra_tests,
        subsets=subsets,
        transform=entry.optional_text("transform"),
        max_new_tokens=entry.positive("max_new_tokens"),
    )
    _check(entry, task)
    if kind_known:
        _check_answers(entry, task)
        _check_metrics(entry, task)
    return task


def _hub(entry: Reader) -> HubSource | None:
    if "hub" not in entry.entry:
        return None
    hub = entry.child("hub")
    hub.refuse_unknown(("id", "config", "revision", "splits"))
    if not hub.text("id"):
        hub.fail("id", "missing")
    config, revision = hub.optional_text("config"), hub.optional_text("revision")
    if "splits" not in hub.entry:
        return HubSource(hub.text("id"), config, revision)
    splits = hub.child("splits")
    names = {str(name): splits.text(name) for name in splits.entry}
    return HubSource(hub.text("id"), config, revision, names)


def _files(entry: Reader, folder: Path) -> dict[str, Path]:
    files = entry.child("files")
    names = {str(split): files.text(split) for split in files.entry}
    for split, name in names.items():
        if not is_file_name(name):
            known = ", ".join(SUFFIXES)
            files.fail(split, f"'{name}' is no file that can be read ({known}, also with .gz)")
    return {split: folder / name for split, name in names.items()}


def _labels(entry: Reader) -> tuple[tuple[Label, ...], Scale | None]:
    value = entry.entry.get("labels", {})
    if isinstance(value, list):
        return _listed_labels(entry, value), None
    if not isinstance(value, dict):
        entry.fail("labels", f"a mapping, a list or a range expected, found {describe(value)}")
        return (), None
    if list(value) == ["range"]:
        return (), _scale(entry, value["range"])
    labels = entry.child("labels")
    mistakes = len(entry.errors)
    words = [labels.text(key) for key in value]
    keys = [label_key(key) if isinstance(key, (str, int, float)) else "" for key in value]
    for kind, items in (("raw value", keys), ("word", words)):
        if len(entry.errors) == mistakes and ("" in items or len(set(items)) < len(items)):
            entry.fail("labels", f"an empty or repeated {kind} in {items}")
    return tuple(Label(word, (key,)) for word, key in zip(words, keys, strict=True)), None


def _listed_labels(entry: Reader, words: list[Any]) -> tuple[Label, ...]:
    texts = entry.texts("labels")
    if len(set(texts)) < len(texts) or "" in texts:
        entry.fail("labels", f"an empty or repeated word in {words}")
    if any(label_key(word).lstrip("+-").isdigit() for word in texts):
        entry.fail("labels", f"{words} could be words or indices; write a mapping value: word")
    return tuple(Label(word, (str(i), label_key(word))) for i, word in enumerate(texts))


def _scale(entry: Reader, bounds: Any) -> Scale | None:
    numbers = isinstance(bounds, list) and [type(item) in (int, float) for item in bounds]
    if numbers != [True, True, True] or not (bounds[0] < bounds[1] and bounds[2] > 0):
        entry.fail("labels.range", f"[low, high, step] expected, found {describe(bounds)}")
        return None
    scale = Scale(*bounds)
    if (bounds[1] - bounds[0]) / bounds[2] > 1000 or abs(scale.values[-1] - bounds[1]) > 1e-9:
        entry.fail("labels.range", f"{bounds} is no whole number of steps, at most 1000")
        return None
    return scale


def _options(entry: Reader) -> tuple[tuple[str, ...], str | None]:
    value = entry.entry.get("options", [])
    if isinstance(value, str):
        return (), value
    options = entry.texts("options")
    if value and len(options) < 2:
        entry.fail("options", "two or more expected")
    return tuple(item if "{" in item else f"{{{item}}}" for item in options), None


def _extra_tests(entry: Reader) -> tuple[tuple[str, ...], dict[str, dict[str, str]]]:
    value = entry.entry.get("extra_tests", [])
    if not isinstance(value, dict):
        return entry.texts("extra_tests"), {}
    tests = entry.child("extra_tests")
    subsets: dict[str, dict[str, str]] = {}
    for name in value:
        subset = tests.child(name).entry
        if not subset or any(not isinstance(raw, (str, int, float)) for raw in subset.values()):
            tests.fail(str(name), f"columns and their values expected, found {describe(value[name])}")
            continue
        subsets[str(name)] = {str(column): label_key(raw) for column, raw in subset.items()}
    return tuple(map(str, value)), subsets


def _split(entry: Reader) -> SplitProtocol:
    value = entry.entry.get("split", "given")
    if value == "given":
        return SplitProtocol()
    if value == "halve_validation":
        return SplitProtocol("halve_validation")
    if isinstance(value, dict) and list(value) == ["carve_train"]:
        return SplitProtocol("carve_train", entry.child("split").positive("carve_train") or 0)
    expected = "given, halve_validation or {carve_train: N} expected"
    entry.fail("split", f"{expected}, found {describe(value)}")
    return SplitProtocol()


def _check(entry: Reader, task: Task) -> None:
    """Note what single keys cannot show: templates, exclusions, names and paths."""
    if not task.prompt and not entry.entry.get("prompt"):
        entry.fail("prompt", "missing")
    prompts = [("prompt", task.prompt), ("plain_prompt", task.plain_prompt or "")]
    for key, text in [*prompts, ("target", task.target), *(("options", o) for o in task.options)]:
        try:
            if not columns(text) and text:
                entry.fail(key, f"{text!r} names no {{column}}; every row would read the same")
        except TemplateError as error:
            entry.fail(key, str(error))
    if task.hub and task.files:
        entry.fail("files", "given beside hub; give one of the two")
    path = PurePosixPath(task.path)
    if path.is_absolute() or ".." in path.parts:
        entry.fail("path", f"'{task.path}' leaves the data folder; give a path below it")
    for name in (*task.files, *(task.hub.splits if task.hub else ()), *task.extra_tests):
        if not _valid_name(name):
            entry.fail("split names", _bad_name(name))
    if task.transform is not None and task.transform not in TRANSFORMS:
        entry.fail("transform", f"unknown: '{task.transform}'{suggest(task.transform, TRANSFORMS)}")


def _check_answers(entry: Reader, task: Task) -> None:
    if task.references is not None and task.kind != "text":
        entry.fail("references", f"given beside {task.kind}; closed answers have no references")
    if task.group is not None and task.references is None:
        entry.fail("group", "given without references; it collects them")
    if task.kind == "text" and "label" in entry.entry:
        entry.fail("label", "given for free text; closed answers need `labels` or `options`")
    if task.scale and (task.options or task.options_column):
        entry.fail("labels", "a range cannot name options")
    if task.kind == "labels" and len(task.labels) < 2:
        entry.fail("labels", "two or more expected")
    try:
        needed = columns(task.target)
    except TemplateError:
        return
    if task.kind == "text" and task.references is None:
        if needed in ((), ("answer",)):
            message = "free text needs `references`, or columns here; closed answers need `labels`"
            entry.fail("target", f"{message} or `options`")
    elif "answer" not in needed:
        entry.fail("target", f"'{task.target}' lacks {{answer}}")


def _check_metrics(entry: Reader, task: Task) -> None:
    if not task.metrics:
        entry.fail("metrics", f"none given; known: {', '.join(METRICS)}")
    for name in task.metrics:
        if name not in METRICS:
            entry.fail("metrics", f"unknown metric '{name}'{suggest(name, METRICS)}")
        elif task.kind not in METRICS[name].kinds:
            fitting = [key for key, metric in METRICS.items() if task.kind in metric.kinds]
            entry.fail("metrics", f"'{name}' does not fit {task.kind}; fit: {', '.join(fitting)}")
        elif name == "f1" and len(task.labels) != 2:
            entry.fail("metrics", f"'f1' needs two labels, the second positive; found {task.words}")
    if task.primary and task.primary not in task.metrics:
        entry.fail("primary", f"'{task.primary}' is not in metrics{suggest('', task.metrics)}")
