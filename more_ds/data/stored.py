"""Training examples as text on the disk, so that neither memory nor the number of ranks bounds how many there are."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from more_ds import log, tasks
from more_ds.cache import cache_root, make_once, sound
from more_ds.data.rows import IntArray, Selection, rendered, require_rows, select
from more_ds.digest import digest, digest_integers, digest_sources
from more_ds.tasks.render import Example, expand
from more_ds.tasks.schema import Task

_FORMAT = 1
_CHUNK = 4096
_TEXTS, _ENDS, _ROWS, _ABOUT = "examples.jsonl", "ends.int64", "rows.int64", "about.json"


@dataclass(frozen=True, eq=False)
class StoredExamples(Sequence[Example]):
    """The training examples of one task, mapped from files, so that the ranks of a node share the memory.

    Attributes:
        task: name of the task.
        texts: the examples, a line of JSON each.
        ends: [stored] where each line ends.
        chosen: [examples] the numbers of the lines that are meant; None: all of them.
        digest: stands for the texts and their order.
        longest_target: bytes of the longest target that is stored.
    """

    task: str
    texts: mmap.mmap
    ends: IntArray
    chosen: IntArray | None
    digest: str
    longest_target: int

    def __len__(self) -> int:
        return len(self.ends if self.chosen is None else self.chosen)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...
    def __getitem__(self, at: int | slice) -> Example | list[Example]:
        if isinstance(at, slice):
            return [self[i] for i in range(len(self))[at]]
        place = range(len(self))[at]  # an IndexError ends an iteration
        line = place if self.chosen is None else int(self.chosen[place])
        start = int(self.ends[line - 1]) if line else 0
        index, prompt, target, options, gold = json.loads(self.texts[start : int(self.ends[line])])
        return Example(self.task, index, prompt, target, tuple(options), tuple(gold) if type(gold) is list else gold)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))


def stored_examples(
    task: Task, *, data_dir: str | Path | None = None, plain: bool = False, cache_dir: str | Path | None = None
) -> StoredExamples:
    """All training examples of a task, one per reference, from the cache if they are there.

    They are found again by what they are made of: the bytes of the file (or the hub's revision), the task, and the code
    that renders it. Every process may ask; one reads the rows, one at a time, while the others wait, so this belongs
    before a process group is formed.

    Args:
        task: the task.
        data_dir: see `load_examples`.
        plain: with its plain prompt.
        cache_dir: see `cache_root`.

    Raises:
        UserError: as `load_examples`; the cache cannot be written to, or what it holds is damaged.
    """
    selection = select(task, "train", data_dir)
    parts = [_FORMAT, digest_sources(Path(tasks.__file__).parent), asdict(task), plain, selection.source.identity()]
    folder = cache_root(cache_dir) / "examples" / digest(json.dumps(parts, default=str))
    make_once(folder, lambda place: _write(place, task, selection, plain))
    with sound(folder, f"the examples of task '{task.name}'"):
        return _read(folder, task, selection)


def digest_examples(examples: Sequence[Example]) -> str:
    """16 hexadecimal digits that stand for examples and their order; those of a store are known."""
    if isinstance(examples, StoredExamples):
        return examples.digest
    found = hashlib.sha256()
    for example in examples:
        found.update(_line(example))
    return found.hexdigest()[:16]


def _line(example: Example) -> bytes:
    parts = [example.index, example.prompt, example.target, example.options, example.gold]
    return json.dumps(parts).encode() + b"\n"


def _write(folder: Path, task: Task, selection: Selection, plain: bool) -> None:
    """Render every row of the source's split, also of those that another split is carved from."""
    position = count = longest = 0
    found = hashlib.sha256()
    total = selection.count()
    require_rows(task, "train", selection.where, total)
    with (
        (folder / _TEXTS).open("wb") as texts, (folder / _ENDS).open("wb") as ends, (folder / _ROWS).open("wb") as rows,
        log.Progress(total, f"reading {task.name}") as bar,
    ):  # fmt: skip
        for example in rendered(task, "train", enumerate(selection.rows()), plain=plain):
            for one in expand([example]):
                line = _line(one)
                texts.write(line)
                found.update(line)
                position += len(line)
                ends.write(np.int64(position).tobytes())
                rows.write(np.int64(one.index).tobytes())
                longest = max(longest, len(one.target.encode()))
                count += 1
            bar.advance()
    about = {
        "task": task.name, "examples": count, "rows": example.index + 1, "bytes": position, "longest_target": longest,
        "digest": found.hexdigest()[:16],
    }  # fmt: skip
    (folder / _ABOUT).write_text(json.dumps(about) + "\n", encoding="utf-8")


def _read(folder: Path, task: Task, selection: Selection) -> StoredExamples:
    about: dict[str, Any] = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    with (folder / _TEXTS).open("rb") as stream:
        texts = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    ends, rows = (_integers(folder / name) for name in (_ENDS, _ROWS))
    if not len(ends) == len(rows) == about["examples"] or not len(texts) == ends[-1] == about["bytes"]:
        raise ValueError("of another length")
    chosen, stands_for = None, about["digest"]
    if selection.part is not None:
        # A row's examples, one per reference, stand together.
        keep = selection.part(about["rows"])
        starts, counts = np.searchsorted(rows, keep), np.searchsorted(rows, keep, "right")
        counts -= starts
        chosen = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        stands_for = digest([stands_for, digest_integers(chosen)])
    return StoredExamples(task.name, texts, ends, chosen, stands_for, about["longest_target"])


def _integers(path: Path) -> npt.NDArray[np.int64]:
    return np.memmap(path, dtype=np.int64, mode="r")
