"""Answers kept while a long evaluation runs, so that one that was interrupted goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from more_ds.digest import digest

PREFIX = "answers-"


class Journal:
    """Answers by the name of their example, one file per rank, a line written as soon as a batch is answered.

    The first line of a file names the settings behind its answers; files of other settings are not read, and replaced.
    A last line that a kill has cut off is left out.

    Attributes:
        known: the answers of all ranks of the interrupted evaluation.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], rank: int) -> None:
        """Read what is there; nothing is written before the first answer.

        Args:
            folder: where the files are; made if it is not there.
            settings: everything that an answer depends on beside its example, as JSON values.
            rank: whose answers are added. Ranks must have read before one of them adds: build it before they meet.
        """
        self.folder = folder
        self.key = digest(settings)
        self.known: dict[str, Any] = {}
        for path in sorted(folder.glob(f"{PREFIX}*.jsonl")):
            self.known |= self._read(path)
        self._path = folder / f"{PREFIX}{rank}.jsonl"
        self._file: TextIO | None = None

    def add(self, answers: Mapping[str, Any]) -> None:
        """Append answers, and hand them to the operating system."""
        if self._file is None:
            self._file = self._open()
        for name, answer in answers.items():
            self._file.write(json.dumps([name, answer]) + "\n")
        self._file.flush()

    def remove(self) -> None:
        """Delete the files of all ranks: the results have taken their place."""
        if self._file is not None:
            self._file.close()
        for path in self.folder.glob(f"{PREFIX}*.jsonl"):
            path.unlink()

    def _open(self) -> TextIO:
        """This rank's file, with the lines of its own that hold."""
        self.folder.mkdir(parents=True, exist_ok=True)
        own = self._read(self._path)
        file = self._path.open("w", encoding="utf-8")
        file.write(json.dumps({"settings": self.key}) + "\n")
        for name, answer in own.items():
            file.write(json.dumps([name, answer]) + "\n")
        return file

    def _read(self, path: Path) -> dict[str, Any]:
        if not path.is_file():
            return {}
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]  # only whole lines
        try:
            if not lines or json.loads(lines[0]) != {"settings": self.key}:
                return {}
            return dict(json.loads(line) for line in lines[1:])
        except (ValueError, TypeError):  # not ours, or damaged: its answers are computed again
            return {}


def name_of(kind: str, split: str, task: str, index: int, texts: Sequence[str]) -> str:
    """The name of an example's answer; another prompt or another option is another example."""
    return f"{kind}/{split}/{task}/{index}/{digest(list(texts))}"
