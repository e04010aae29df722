"""What is made once on a machine and found again by every process: the demo, tokenised data."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from more_ds.errors import UserError


def cache_root(cache_dir: Path | str | None = None) -> Path:
    """The folder of the cache: `cache_dir`, else `$MORE_DS_CACHE`, else `~/.cache/more_ds`."""
    chosen = cache_dir or os.environ.get("MORE_DS_CACHE") or Path.home() / ".cache" / "more_ds"
    return Path(chosen).expanduser().resolve()


def make_once(target: Path, build: Callable[[Path], None]) -> None:
    """Build the folder `target`, if it is not there, in a folder beside it, and rename.

    Several processes may call this at once: one builds, the others wait for it. A killed build leaves nothing that
    looks complete; the lock is the operating system's, so it ends with its process.

    Raises:
        UserError: the place cannot be written to.
    """
    if target.is_dir():
        return
    folder = target.with_name(f"{target.name}.building")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / "lock"):
            if target.is_dir():  # built by the process that held the lock
                return
            shutil.rmtree(folder, ignore_errors=True)  # left by a build that was killed
            folder.mkdir()
            build(folder)
            os.replace(folder, target)
    except OSError as error:
        raise UserError(
            f"{target.name} cannot be kept in {target.parent}: {error}; set MORE_DS_CACHE to a folder with space"
        ) from error


@contextmanager
def sound(folder: Path, what: str) -> Iterator[None]:
    """Read `what` from a folder of the cache inside; raise ValueError there where it cannot be right.

    Raises:
        UserError: something is missing, or is not what was written.
    """
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{what} in {folder} are damaged; delete that folder, they are made again") from error
