"""Short hashes that stand for values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_CHUNK = 1 << 20


def digest(value: Any) -> str:
    """16 hexadecimal digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def digest_integers(values: npt.NDArray[Any]) -> str:
    """The same for (n,) integers of any type, which may lie in a file and not fit in memory."""
    found = hashlib.sha256(str(len(values)).encode())
    for start in range(0, len(values), _CHUNK):
        found.update(np.ascontiguousarray(values[start : start + _CHUNK], dtype="<i8").data)
    return found.hexdigest()[:16]


def digest_files(paths: Iterable[Path]) -> str:
    """64 hexadecimal digits: the SHA-256 of files' contents, one after another.

    Raises:
        OSError: one cannot be read.
    """
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while part := stream.read(_CHUNK):
                found.update(part)
    return found.hexdigest()


def digest_sources(folder: Path) -> str:
    """12 hexadecimal digits that stand for the Python files in a folder: what other code made is another thing."""
    found = hashlib.sha256()
    for source in sorted(folder.glob("*.py")):
        found.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return found.hexdigest()[:12]
