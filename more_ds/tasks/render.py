"""From a row of data to the text a model reads and writes. Training and evaluation share it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from more_ds.digest import digest
from more_ds.errors import UserError
from more_ds.tasks.rows import column
from more_ds.tasks.schema import Task, label_key
from more_ds.tasks.template import TemplateError, columns, fill
from more_ds.tasks.transforms import TRANSFORMS


@dataclass(frozen=True, slots=True)
class Example:
    """One row as text.

    Attributes:
        task: name of the task.
        index: row number in the source split, from 0; stable under limits and split protocols.
        prompt: what the model reads.
        target: what it learns to write (for several references: the first; see `expand`).
        options: closed answers, whole targets each, to rank by likelihood; () for free text.
        gold: index into `options`; the raw score for a graded task; the references for free text.
    """

    task: str
    index: int
    prompt: str
    target: str
    options: tuple[str, ...]
    gold: int | float | tuple[str, ...]


def render(task: Task, row: Mapping[str, Any], index: int, *, plain: bool = False) -> Example:
    """Return row `index` of `task` as text, with its `plain_prompt` if `plain`.

    Raises:
        UserError: a column is missing or of the wrong type, a label is outside the set, a text is
            empty, or the task has no plain prompt.
    """
    template = task.plain_prompt if plain else task.prompt
    if template is None:
        raise UserError(f"task '{task.name}' has no plain_prompt; add one, or use its prompt")
    try:
        if task.transform is not None:
            row = TRANSFORMS[task.transform](row)
        prompt = fill(template, row)
        if task.kind == "text":
            options: tuple[str, ...] = ()
            references = _references(task, row)
            return Example(task.name, index, prompt, references[0], options, references)
        options = _options(task, row)
        raw = column(row, task.label)
        chosen, gold = _gold(task, raw, len(options))
    except (TemplateError, ValueError) as error:
        raise UserError(f"task '{task.name}', row {index}: {error}") from error
    return Example(task.name, index, prompt, options[chosen], options, gold)


def expand(examples: Iterable[Example]) -> list[Example]:
    """Return one example per reference, for training; the others as they are."""
    return [
        replace(example, target=target)
        for example in examples
        for target in (example.gold if isinstance(example.gold, tuple) else (example.target,))
    ]


def answer_value(task: Task, choice: int) -> int | float:
    """Return the prediction that choosing option `choice` stands for: its score, or its index."""
    return task.scale.values[choice] if task.kind == "scale" and task.scale else choice


def parse(task: Task, text: str, example: Example) -> int | float | str | None:
    """Return the prediction that a generated `text` stands for.

    Closed answers must equal an option, surrounding white space aside (as in MoRE's published
    evaluation); anything else is None. Free text stands for itself.
    """
    text = text.strip()
    if task.kind == "text":
        return text
    return answer_value(task, example.options.index(text)) if text in example.options else None


def prompt_hash(task: Task, *, plain: bool = False) -> str:
    """Return the hash of what makes the texts of `task`: templates, closed answers, columns, transform."""
    keys = ("target", "words", "options", "options_column", "references", "group", "transform")
    parts = {key: getattr(task, key) for key in keys}
    return content_hash({"prompt": task.plain_prompt if plain else task.prompt, **parts})


def content_hash(value: Any) -> str:
    """Return the first 12 hexadecimal digits of the SHA-256 of a value's JSON."""
    return digest(value)[:12]


@lru_cache(maxsize=1024)
def _fixed_answers(target: str, words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(fill(target, {"answer": word}) for word in words)


def _options(task: Task, row: Mapping[str, Any]) -> tuple[str, ...]:
    if columns(task.target) == ("answer",) and task.words:
        return _fixed_answers(task.target, task.words)
    words = task.words
    if task.options_column is not None:
        words = _texts(row, task.options_column)
        if len(words) < 2:
            raise TemplateError(f"column '{task.options_column}' needs two or more options")
    elif task.options:
        words = tuple(fill(option, row) for option in task.options)
    if not all(words):
        raise TemplateError(f"an option is empty: {list(words)}")
    return tuple(fill(task.target, {**row, "answer": word}) for word in words)


def _references(task: Task, row: Mapping[str, Any]) -> tuple[str, ...]:
    if task.references is None:
        texts: tuple[str, ...] = (fill(task.target, row),)
    else:
        words = _texts(row, task.references)
        texts = tuple(fill(task.target, {**row, "answer": word}) for word in words)
        texts = texts if all(word.strip() for word in words) else ()
    if not texts or not all(texts):
        raise TemplateError("a reference text is empty or there is none")
    return texts


def _texts(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = column(row, name)
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise TemplateError(f"column '{name}' holds no text or list of texts, but {value!r}")
    return tuple(items)


def _gold(task: Task, raw: Any, count: int) -> tuple[int, int | float]:
    """Return (index of the right option, gold value) for a raw label."""
    if task.kind == "scale" and task.scale:
        allowed = f"a number from {task.scale.low} to {task.scale.high}"
        try:
            score = float(raw)
            return task.scale.nearest(score), score
        except (TypeError, ValueError):
            raise TemplateError(_outside(task, raw, allowed)) from None
    if task.labels:
        index = task.label_index.get(_key(raw), -1)
        allowed = ", ".join(" or ".join(label.keys) for label in task.labels)
    else:
        key = _key(raw)
        index = int(key) if key.isdecimal() else -1
        allowed = f"the index of an option, 0 to {count - 1}"
    if not 0 <= index < count:
        raise TemplateError(_outside(task, raw, allowed))
    return index, index


def _key(raw: Any) -> str:
    try:
        return label_key(raw)
    except ValueError:
        return ""


def _outside(task: Task, raw: Any, allowed: str) -> str:
    return f"label {raw!r} in column '{task.label}' is outside the set; allowed: {allowed}"
