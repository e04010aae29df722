"""Training examples as token ids, made once and kept on the disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from more_ds import log
from more_ds.cache import cache_root, make_once, sound
from more_ds.data.encoding import Encoder
from more_ds.data.stored import digest_examples
from more_ds.digest import digest
from more_ds.tasks.render import Example

_FORMAT = 3
_CHUNK = 2048
_FILES: dict[str, Any] = {"ids.int32": np.int32, "ends.int64": np.int64, "lengths.int32": np.int32}


@dataclass(frozen=True)
class Tokens:
    """The token ids of one task's examples, mapped from files, so that the ranks of a node share the memory.

    Attributes:
        ids: [tokens] all prompts and targets, one after the other.
        ends: [2 * examples] where each prompt and each target ends.
        lengths: [examples] tokens of the prompt and the target together.
        num_cut: prompts that were too long.
    """

    ids: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int32]
    num_cut: int

    def prompt(self, index: int) -> list[int]:
        """Ids of an example's prompt."""
        return self._part(2 * index)

    def target(self, index: int) -> list[int]:
        """Ids of an example's target."""
        return self._part(2 * index + 1)

    def _part(self, number: int) -> list[int]:
        start = int(self.ends[number - 1]) if number else 0
        return list(map(int, self.ids[start : self.ends[number]]))


def tokenised(name: str, examples: Sequence[Example], encoder: Encoder, cache_dir: Path | str | None = None) -> Tokens:
    """The tokens of a task's examples, from the cache if they are there.

    They are found again by what they are made of: the texts, the tokeniser and the limits. Every process may ask; one
    makes them while the others wait, so this belongs before a process group is formed.

    Raises:
        UserError: a target is too long, the cache cannot be written to, or what it holds is damaged.
    """
    key = digest([_FORMAT, encoder.signature, digest_examples(examples)])
    folder = cache_root(cache_dir) / "tokens" / key
    make_once(folder, lambda place: _write(place, name, examples, encoder))
    with sound(folder, f"the tokens of task '{name}'"):
        ids, ends, lengths = (np.memmap(folder / part, dtype, mode="r") for part, dtype in _FILES.items())
        num_cut = int(json.loads((folder / "about.json").read_text(encoding="utf-8"))["num_cut"])
        if not len(ends) == 2 * len(lengths) == 2 * len(examples) or (len(ends) and int(ends[-1]) != len(ids)):
            raise ValueError("of another length")
    encoder.num_prompts += len(examples)
    encoder.num_cut += num_cut
    return Tokens(ids, ends, lengths, num_cut)


def _write(folder: Path, name: str, examples: Sequence[Example], encoder: Encoder) -> None:
    before = (encoder.num_prompts, encoder.num_cut)
    position = 0
    with log.Progress(len(examples), f"tokenising {name}") as bar, ExitStack() as stack:
        ids, ends, lengths = (stack.enter_context((folder / part).open("wb")) for part in _FILES)
        for start in range(0, len(examples), _CHUNK):
            part = examples[start : start + _CHUNK]
            prompts = encoder.prompts([example.prompt for example in part])
            targets = encoder.targets([example.target for example in part])
            rows: list[Any] = [row for pair in zip(prompts, targets, strict=True) for row in pair]
            sizes = np.fromiter(map(len, rows), np.int64, len(rows))
            ids.write(np.array([token for row in rows for token in row], dtype=np.int32).tobytes())
            ends.write((position + np.cumsum(sizes)).tobytes())
            lengths.write(sizes.reshape(-1, 2).sum(1, dtype=np.int32).tobytes())
            position += int(sizes.sum())
            bar.advance(len(part))
    about = {"task": name, "examples": len(examples), "num_cut": encoder.num_cut - before[1]}
    (folder / "about.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
    encoder.num_prompts, encoder.num_cut = before  # counted when they are read
