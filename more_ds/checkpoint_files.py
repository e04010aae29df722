"""The files of a checkpoint: written whole or not at all, and read only if every byte is what was written.

    step-00000100/
      adapter_model.safetensors   PEFT's layout and names, float32 master values
      adapter_config.json         PEFT's
      optimizer.safetensors       `exp_avg.<name>` and `exp_avg_sq.<name>`, float32, whole tensors; of an optimizer in
                                  8 bits also `exp_avg_scale.<name>` and `exp_avg_sq_scale.<name>`
      state.json                  what the run counts, and versions
      manifest.json               size and sha256 of the others

Everything is written to a folder beside, flushed to the disk, read back, and put in place by a rename, so that a kill
or a full disk leaves the last checkpoint as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from more_ds import log
from more_ds.errors import UserError

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
OPTIMIZER, STATE, MANIFEST = "optimizer.safetensors", "state.json", "manifest.json"
FILES = (ADAPTER, ADAPTER_CONFIG, OPTIMIZER, STATE)
FORMAT = 1
UNFINISHED = ".unfinished-"
OLD = "-old"
"""After the name of a checkpoint that another of the same step is about to replace."""
SAMPLES, SAMPLE_BYTES = 16, 65_536


def name_of(step: int) -> str:
    """The folder name of a checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that its name never stands for less than all of it, after a power cut either.

    Raises:
        OSError: it cannot be written, or is not what was written when it is read back; a file of that name is unharmed.
    """
    unfinished = path.with_name(UNFINISHED + path.name)
    try:
        with unfinished.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if unfinished.read_bytes() != content:
            raise OSError(f"{path} is not what was written when it is read back; check the disk")
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def is_taken(path: Path) -> bool:
    """Whether there is something at `path` but an empty folder, or one with what a write that was killed left in it."""
    if not path.is_dir():
        return path.exists()
    return any(not item.name.startswith(UNFINISHED) for item in path.iterdir())


def write_folder(
    folder: Path, contents: Mapping[str, bytes], check: Callable[[Mapping[str, bytes]], None] = lambda _: None
) -> None:
    """Write a checkpoint's folder; one of the same name is replaced.

    Args:
        folder: where; its parent is made.
        contents: of all `FILES`.
        check: sees what was read back from the disk, and raises if it is not good; then nothing is put in place.

    Raises:
        OSError: the disk is full or failing; what was there before is there still.
        UserError: what was read back is not what was written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(folder.parent)
    unfinished = folder.with_name(UNFINISHED + folder.name)
    try:
        unfinished.mkdir()
        for name in FILES:
            write_file(unfinished / name, contents[name])
        entries = {name: {"bytes": len(contents[name]), "sha256": _sha256(contents[name])} for name in FILES}
        write_file(unfinished / MANIFEST, to_json({"format": FORMAT, "files": entries}))
        check(read_folder(unfinished))
        _put_in_place(unfinished, folder)
    finally:
        _remove_unfinished(folder.parent)


def read_folder(folder: Path, names: Iterable[str] = FILES) -> dict[str, bytes]:
    """Files of a checkpoint, each compared with the manifest before anything interprets it.

    Raises:
        UserError: it is no checkpoint, or a file is missing or differs; names the file.
    """
    entries = _manifest(folder)
    contents = {}
    for name in names:
        path = folder / name
        try:
            contents[name] = path.read_bytes()
        except OSError as error:
            raise _damaged(path, "cannot be read", error) from error
        size, expected = len(contents[name]), entries[name]
        if size != expected["bytes"]:
            raise _damaged(path, f"has {size} bytes instead of {expected['bytes']}")
        if _sha256(contents[name]) != expected["sha256"]:
            raise _damaged(path, "differs from its sha256 in the manifest")
    return contents


def read_state(folder: Path) -> dict[str, Any]:
    """What the run had written into a checkpoint (`state` of `checkpoint.save`), before any model is loaded.

    Raises:
        UserError: it is no checkpoint, or its state is damaged.
    """
    return json.loads(read_folder(folder, [STATE])[STATE])["run"]


def is_complete(folder: Path) -> bool:
    """Whether all files of a checkpoint are there in full size, and its state is what was written.

    The bytes of the large files are compared by `newest_sound`, and whenever they are loaded.
    """
    try:
        entries = _manifest(folder)
        read_folder(folder, [STATE])
        return all((folder / name).stat().st_size == entries[name]["bytes"] for name in FILES)
    except (UserError, OSError):
        return False


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first; unfinished and damaged ones are left out."""
    if not folder.is_dir():
        return []
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        known = re.fullmatch(rf"step-(\d{{8,}})({OLD})?", path.name)
        if known and is_complete(path):
            found.setdefault(int(known[1]), path)
    return [found[step] for step in sorted(found)]


def newest_complete(folder: Path) -> Path | None:
    """The checkpoint to resume from, if there is one."""
    return next(reversed(complete(folder)), None)


def newest_sound(folder: Path) -> Path:
    """The newest checkpoint of which every byte is what was written; says which are passed over.

    Raises:
        UserError: there is none.
    """
    for path in reversed(complete(folder)):
        try:
            read_folder(path)
            return path
        except UserError as error:
            log.say(f"warning: {error}")
    raise UserError(f"no checkpoint in {folder} is sound; restore one, or train again into another folder")


def rotate(folder: Path, keep: int, protect: Iterable[Path] = ()) -> None:
    """Remove the oldest complete checkpoints; the newest `keep` stay, at least one, and those in `protect`."""
    protected = {path.name for path in protect}
    for path in complete(folder)[: -max(1, keep)]:
        if path.name in protected:
            continue
        try:
            _discard(path)
        except OSError as error:
            log.say(f"warning: the old checkpoint {path} cannot be removed: {error}")
    _remove_unfinished(folder)


def base_identity(name_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """What a base model is, so that an adapter or a run can be told that it is on another one.

    The hash covers `config.json`, and of every weight file its name, its size and its bytes: all of them up to 1 MiB,
    16 samples of 64 KiB beyond (a fine-tuned model differs nearly everywhere from its origin).

    Args:
        name_or_path: folder, or hub id of a model that has been downloaded.
        revision: of the hub model.

    Returns:
        `name_or_path`, `revision` and `sha256`. The hash alone says whether two models are the same.

    Raises:
        UserError: no weights there.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        config = try_to_load_from_cache(name_or_path, "config.json", revision=revision)
        folder = Path(config).parent if isinstance(config, str) else folder
    patterns = ("*.safetensors", "pytorch_model*.bin", "*.index.json")
    weights = sorted({path for pattern in patterns for path in folder.glob(pattern)}) if folder.is_dir() else []
    if not weights or not (folder / "config.json").is_file():
        raise UserError(f"no weights of '{name_or_path}' on this machine; give a folder, or download the model first")
    digest = hashlib.sha256()
    for path in (folder / "config.json", *weights):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as stream:
            for i in range(SAMPLES):
                stream.seek(i * SAMPLE_BYTES if size <= SAMPLES * SAMPLE_BYTES else i * (size - SAMPLE_BYTES) // 15)
                digest.update(stream.read(SAMPLE_BYTES))
    return {"name_or_path": name_or_path, "revision": revision, "sha256": digest.hexdigest()}


def to_json(content: Any) -> bytes:
    """JSON that is the same for the same content; a number that is not finite is refused."""
    return (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"no checkpoint at {folder}; give the folder of one, or --resume auto")
    try:
        content = json.loads(path.read_bytes())
        version, entries = content["format"], content["files"]
        sound = set(entries) == set(FILES) and all(
            isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str) for entry in entries.values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, "cannot be read", error) from error
    if version != FORMAT:
        raise UserError(f"{folder} has format {version}; this version reads format {FORMAT}; use the one that wrote it")
    if not sound:
        raise _damaged(path, "does not list the files of a checkpoint")
    return entries


def _damaged(path: Path, what: str, error: Exception | None = None) -> UserError:
    reason = "" if error is None else f" ({type(error).__name__}: {error})"
    return UserError(
        f"{path} {what}{reason}; the checkpoint is damaged: remove its folder and resume from an older one"
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sync(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put_in_place(unfinished: Path, folder: Path) -> None:
    """Rename a folder to one that may be there already; a rename cannot replace a folder that is not empty."""
    old = folder.with_name(folder.name + OLD)
    if folder.exists():
        _discard(old)
        os.replace(folder, old)
    try:
        os.replace(unfinished, folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    _sync(folder.parent)
    _discard(old)


def _discard(folder: Path) -> None:
    """Remove a checkpoint, if it is there; under a name that is none's first, so that a kill leaves no half of one."""
    if folder.exists():
        gone = folder.with_name(UNFINISHED + folder.name)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob(f"{UNFINISHED}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
