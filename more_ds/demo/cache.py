"""Make the demo's data and backbone once, and find them again."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, get_args

from filelock import FileLock

from more_ds.demo.backbone import build_backbone
from more_ds.demo.generate import write_tasks
from more_ds.demo.tokenizer import Kind
from more_ds.errors import UserError, suggest

_SOURCES = Path(__file__).parent


class DemoPaths(NamedTuple):
    """Where the demo lies: `data_dir` is for --data_dir, `model_dir` is a Hugging Face folder."""

    data_dir: Path
    model_dir: Path


def prepare(kind: Kind = "llama", cache_dir: Path | str | None = None, steps: int | None = None) -> DemoPaths:
    """Return the demo's data and backbone, and make them first where they are not there.

    Several processes may call this at once: one builds, the others wait for it. What is built
    comes into its place by a rename, so a killed build leaves nothing that looks complete; the
    lock is the operating system's, so it ends with its process.

    Args:
        kind: "llama" (causal) or "t5" (encoder-decoder).
        cache_dir: where to keep it; default `$MORE_DS_CACHE`, else `~/.cache/more_ds`.
        steps: pretraining steps, for a quick and bad backbone; default: those that it needs.

    Raises:
        UserError: an unknown kind, less than one step, or a cache that cannot be written to.
    """
    if kind not in get_args(Kind):
        raise UserError(f"unknown kind of demo backbone '{kind}'{suggest(kind, get_args(Kind))}")
    if steps is not None and steps < 1:
        raise UserError(f"steps is {steps}; the demo's backbone needs at least one")
    root = _cache_root(cache_dir) / f"demo-{fingerprint()}"
    paths = DemoPaths(root / "data", root / (kind if steps is None else f"{kind}-{steps}-steps"))
    if paths.data_dir.is_dir() and paths.model_dir.is_dir():
        return paths
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / "lock"):
            _make(paths.data_dir, write_tasks)
            _make(paths.model_dir, lambda folder: build_backbone(kind, folder, steps))
    except OSError as error:
        raise UserError(
            f"the demo cannot be kept in {root}: {error}; set MORE_DS_CACHE to a folder with space"
        ) from error
    return paths


def fingerprint() -> str:
    """Return 12 hex digits of the demo's own sources: another generator, another cache."""
    digest = hashlib.sha256()
    for source in sorted(_SOURCES.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _cache_root(cache_dir: Path | str | None) -> Path:
    chosen = cache_dir or os.environ.get("MORE_DS_CACHE") or Path.home() / ".cache" / "more_ds"
    return Path(chosen).expanduser().resolve()


def _make(target: Path, build: Callable[[Path], None]) -> None:
    """Build `target` in a folder beside it, and rename. To be called under the lock."""
    if target.is_dir():
        return
    folder = target.with_name(f"{target.name}.building")
    shutil.rmtree(folder, ignore_errors=True)  # left by a build that was killed
    folder.mkdir()
    build(folder)
    os.replace(folder, target)
