"""What a task is: the dataclass `Task`, and its YAML form (read by `more_ds.tasks.load_suite`).

A suite is one YAML file. Ours (`glue.yaml`, the demo's) and the user's have the same form:

    suite: mine                        # default: the file's name; default of `path` below
    citation: ...                      # description, citation, version: default for every task
    tasks:
      cola:
        description: ...
        hub: {id: nyu-mll/glue, config: cola, splits: {train: train, validation: validation}}
        path: glue/cola                # below --data_dir; default <suite>/<task>
        files: {train: train.csv}      # instead of hub: beside this file; .jsonl .csv .tsv .parquet
        prompt: "cola sentence: {sentence}"
        plain_prompt: "{sentence}"     # optional second set, chosen by the run
        target: "{answer}"             # default; {answer}: the label's word, option or reference
        label: label                   # column of the label; default `label`
        labels: {0: bad, 1: good}      # raw value -> word; or a list of words (raw: word or index);
                                       # or {range: [0.0, 5.0, 0.2]} for a graded score
        options: ["{a}", "{b}"]        # multiple choice: templates or columns, or one list column
        references: texts              # free text: column with a text or a list of texts; a dot reaches
                                       # into a mapping, or into each mapping of a list: annotations.text
        group: meaning                 # rows with the same text here are one, with all their references
        metrics: [matthews, accuracy]
        primary: matthews              # default: the first metric
        split: halve_validation        # or {carve_train: 1000}, or given (default)
        extra_tests: [test_hard]       # further test splits, reported beside `test`; or parts of `test`:
                                       # {test_seen: {seen: true}}, the rows whose column has this value
        transform: lettered_options    # a row transform, by name (transforms.py)
        max_new_tokens: 64             # generation limit; default: the longest closed answer
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

Kind = Literal["labels", "scale", "options", "text"]
Protocol = Literal["given", "halve_validation", "carve_train"]


class Label(NamedTuple):
    """One closed answer: its word, and the raw values it stands for, as `label_key` writes them."""

    word: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Scale:
    """A graded score from `low` to `high` in steps of `step`, both ends included.

    Words carry as many decimals as the step was written with ("0.2": one).
    """

    low: float
    high: float
    step: float

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The scores, in ascending order."""
        low, step = _exact(self.low), _exact(self.step)
        count = int((_exact(self.high) - low) / step)
        return tuple(float(low + i * step) for i in range(count + 1))

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The scores as text, in ascending order."""
        decimals = len(str(self.step).partition(".")[2])
        return tuple(f"{value:.{decimals}f}" for value in self.values)

    def nearest(self, value: float) -> int:
        """Return the index of the score nearest to `value`; a tie goes to the even index.

        The arithmetic is exact on four decimals, so that 32-bit and 64-bit copies of a data set
        give the same words.

        Raises:
            ValueError: `value` is outside the scale, or not a number.
        """
        if not self.low - 1e-4 <= value <= self.high + 1e-4:
            raise ValueError(f"{value} is outside {self.low}..{self.high}")
        index = round((_exact(round(value, 4)) - _exact(self.low)) / _exact(self.step))
        return min(max(index, 0), len(self.values) - 1)


@dataclass(frozen=True)
class HubSource:
    """A data set of the Hugging Face hub; `splits` maps our split names to the hub's."""

    id: str
    config: str | None = None
    revision: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: {name: name for name in ("train", "validation", "test")})


@dataclass(frozen=True)
class SplitProtocol:
    """How train, validation and test are made where the source lacks one of them.

    `given`: taken as they are. `halve_validation`: the source's validation, shuffled with a fixed
    seed, is halved into validation and test. `carve_train`: `size` rows of train become validation,
    and the source's validation becomes test (the MoRE paper's two protocols).
    """

    kind: Protocol = "given"
    size: int = 0


@dataclass(frozen=True)
class Task:
    """One task as data. The YAML keys and their defaults are in the module's docstring.

    Attributes:
        files: split name -> file, resolved against the folder of the YAML file.
        labels: closed answers in order; with `options` they only name the options' indices.
        options: templates of the options, or empty.
        options_column: column holding a list of options (their number may vary), or None.
        references: column with the reference text(s) of a free-text task, or None.
        group: column whose equal values make one example of several rows, or None.
        subsets: extra test -> the columns and values (as `label_key` writes them) of its rows in `test`.
        metrics: names in `more_ds.metrics.METRICS`; `primary` is one of them.
    """

    name: str
    suite: str
    prompt: str
    metrics: tuple[str, ...]
    primary: str
    description: str = ""
    citation: str = ""
    version: str = ""
    hub: HubSource | None = None
    path: str = ""
    files: Mapping[str, Path] = field(default_factory=dict)
    plain_prompt: str | None = None
    target: str = "{answer}"
    label: str = "label"
    labels: tuple[Label, ...] = ()
    scale: Scale | None = None
    options: tuple[str, ...] = ()
    options_column: str | None = None
    references: str | None = None
    group: str | None = None
    split: SplitProtocol = SplitProtocol()
    extra_tests: tuple[str, ...] = ()
    subsets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    transform: str | None = None
    max_new_tokens: int | None = None

    @property
    def kind(self) -> Kind:
        """`labels` (one closed set), `scale` (graded), `options` (closed per row) or `text`."""
        if self.options or self.options_column:
            return "options"
        if self.scale:
            return "scale"
        return "labels" if self.labels else "text"

    @cached_property
    def label_index(self) -> Mapping[str, int]:
        """Raw label, as `label_key` writes it -> index of its word."""
        return {key: i for i, label in enumerate(self.labels) for key in label.keys}

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The closed answers shared by all rows; empty for `options` and `text`."""
        if self.kind == "scale" and self.scale:
            return self.scale.words
        return tuple(label.word for label in self.labels) if self.kind == "labels" else ()


def label_key(value: Any) -> str:
    """Write a raw label so that copies of one data set in several formats agree.

    `1`, `1.0` and `"1"` are the same label, as are `True` and `"true"`.

    Raises:
        ValueError: the value is neither text, number nor boolean.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, str):
        text = value.strip()
        return text.lower() if text.lower() in ("true", "false") else text
    raise ValueError(f"{value!r} is neither text, number nor boolean")


def _exact(value: float) -> Fraction:
    return Fraction(str(value))
