"""Make the demo's data and backbone once, and find them again."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, get_args

from more_ds.cache import cache_root, make_once
from more_ds.demo.backbone import build_backbone
from more_ds.demo.generate import write_tasks
from more_ds.digest import digest_sources
from more_ds.errors import UserError, suggest
from more_ds.pretrain.tokenizer import Kind

_SOURCES = Path(__file__).parent


class DemoPaths(NamedTuple):
    """Where the demo lies: `data_dir` is for --data_dir, `model_dir` is a Hugging Face folder."""

    data_dir: Path
    model_dir: Path


def prepare(kind: Kind = "llama", cache_dir: Path | str | None = None, steps: int | None = None) -> DemoPaths:
    """Return the demo's data and backbone, and make them first where they are not there.

    Several processes may call this at once: one builds, the others wait for it.

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
    data_dir = prepare_data(cache_dir)
    model_dir = data_dir.parent / (kind if steps is None else f"{kind}-{steps}-steps")
    make_once(model_dir, lambda folder: build_backbone(kind, folder, steps))
    return DemoPaths(data_dir, model_dir)


def prepare_data(cache_dir: Path | str | None = None) -> Path:
    """Return the folder with the demo's tasks, and write them first where they are not there (a second or two).

    Args:
        cache_dir: as of `prepare`.

    Raises:
        UserError: a cache that cannot be written to.
    """
    data_dir = cache_root(cache_dir) / f"demo-{fingerprint()}" / "data"
    make_once(data_dir, write_tasks)
    return data_dir


def fingerprint() -> str:
    """Return 12 hex digits of the demo's own sources: another generator, another cache."""
    return digest_sources(_SOURCES)
