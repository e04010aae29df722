"""What the user sees: plain lines, tables, progress bars, and quiet libraries.

Only this module prints. Everything but errors comes from rank 0. On a terminal long work shows a bar; in a log file it
writes a plain line now and then.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")

LINE_SECONDS = 15.0
"""How often long work writes a line when there is no terminal."""


def rank() -> int:
    """This process's rank under a launcher, 0 without one."""
    return int(os.environ.get("RANK", "0"))


def say(text: str = "") -> None:
    """Print a line from rank 0, above a progress bar if one is running."""
    if rank() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def fail(text: str) -> None:
    """Print an error's one line from this rank, whichever it is."""
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Align cells in columns: text to the left, numbers to the right; floats with two decimals, None as a dash."""
    body = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *body]) for i in range(len(header))]
    numeric = [all(_is_number(row[i]) for row in body) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        pairs = zip(cells, widths, numeric, strict=True)
        return "  ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in pairs).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in body)])


class Progress:
    """A progress bar on a terminal, a plain line every `LINE_SECONDS` elsewhere; nothing on other ranks than 0."""

    def __init__(self, total: int, label: str, initial: int = 0, stream: TextIO | None = None) -> None:
        self.total, self.label, self.done = total, label, initial
        self._stream = stream or sys.stderr
        self._silent = rank() != 0
        self._began = self._last = time.monotonic()
        self._initial = initial
        self._bar = None
        if not self._silent and self._stream.isatty():
            self._bar = tqdm(
                total=total, initial=initial, desc=label, file=self._stream, dynamic_ncols=True, smoothing=0.1
            )

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more units, and show `note` beside them."""
        self.done += count
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif not self._silent and time.monotonic() - self._last >= LINE_SECONDS and self.done < self.total:
            self._line(note)

    def close(self, note: str = "") -> None:
        """End the bar, or write the last line."""
        if self._bar is not None:
            self._bar.close()
        elif not self._silent:
            self._line(note)

    def _line(self, note: str) -> None:
        self._last = time.monotonic()
        elapsed = self._last - self._began
        left = elapsed / max(self.done - self._initial, 1) * (self.total - self.done)
        parts = [f"{self.label}: {self.done}/{self.total}", f"{elapsed:.0f} s"]
        if self.done < self.total:
            parts.append(f"about {left:.0f} s left")
        print(", ".join([*parts, note] if note else parts), file=self._stream, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def progress(items: Sequence[T], label: str) -> Iterator[T]:
    """Yield the items, with a progress bar."""
    with Progress(len(items), label) as bar:
        for item in items:
            yield item
            bar.advance()


def name_accelerator() -> None:
    """Tell DeepSpeed that there is no GPU, if so: left to guess, it warns about its guess."""
    import torch  # imported late: lines and tables need no torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def quiet_libraries() -> None:
    """Silence the libraries' chatter. What a user must know, this package says itself."""
    name_accelerator()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    for name in ("bitsandbytes", "DeepSpeed", "torch.distributed", "transformers", "peft", "httpx", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    warnings.filterwarnings("ignore", message="Position ids are not supported")  # of PEFT; TextModel counts them
    from transformers.utils import logging as hf_logging  # imported late: its level is read from the environment

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _is_number(text: str) -> bool:
    return text == "-" or text.replace(",", "").replace(".", "").replace("%", "").lstrip("+-").isdigit()


def numbers(row: Mapping[str, Any], prefix: str = "train") -> list[tuple[str, float]]:
    """The numbers of a nested row of the log, each with its path as name."""
    found: list[tuple[str, float]] = []
    for key, value in row.items():
        if isinstance(value, Mapping):
            found += numbers(value, f"{prefix}/{key}")
        elif isinstance(value, (int, float)):
            found.append((f"{prefix}/{key}", float(value)))
    return found
