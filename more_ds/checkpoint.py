"""Checkpoints by name: what one holds does not depend on the number of ranks or on the ZeRO stage.

The adapter and Adam's moments are small (tens of megabytes for a 7B model), so they are gathered, stored once, and cut
again for whatever engine loads them; frozen base weights are never in it. Under full fine-tuning the whole model takes
the adapter's place. `trained` says what is saved, `snapshot` writes it, `checkpoint_files` is about the folder.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from
from safetensors.torch import save as bytes_of
from torch import Tensor

from more_ds.checkpoint_files import (
    ADAPTER,
    ADAPTER_CONFIG,
    OPTIMIZER,
    STATE,
    base_identity,
    name_of,
    newest_complete,
    read_folder,
    read_state,
    rotate,
    write_file,
)
from more_ds.collective import on_rank_zero
from more_ds.engine import gathered
from more_ds.errors import UserError
from more_ds.optimizer_state import MASTER, NamedState, loss_scale, set_loss_scale
from more_ds.snapshot import Snapshot, check_finite, check_tensors
from more_ds.trained import Trained, find_trained

__all__ = [
    "Snapshot", "adapter_tensors", "base_identity", "load", "newest_complete", "read_state", "restart", "rotate",
    "save", "save_adapter", "take",
]  # fmt: skip


ASIDE = "aside"
"""Before the names of tensors that are kept with the moments and not in the adapter's file."""


def adapter_tensors(engine: Any) -> dict[str, Tensor]:
    """The adapter as PEFT saves it, from an engine in training. Collective.

    Args:
        engine: of `more_ds.engine.start`, at any ZeRO stage.

    Returns:
        Whole tensors on the CPU, by PEFT's names; parameters as float32 master values. MoRE's task-to-rank tables are
        brought up to date with the parameters that the model computes with.

    Raises:
        UserError: a trained parameter is not part of the adapter, or the optimizer's state cannot be read.
    """
    trained = find_trained(engine.module)
    # Tensors of their own: what saves a model refuses views of one buffer.
    return {name: value.clone() for name, value in _tensors(trained, NamedState(engine, trained.parameters)).items()}


def save_adapter(folder: Path, engine: Any) -> None:
    """Write the adapter alone, for `PeftModel.from_pretrained`; another one in the folder is replaced. Collective.

    Raises:
        UserError: as for `adapter_tensors`.
        TrainingError: it cannot be written, or it is not finite.
    """
    trained = find_trained(engine.module)
    whole = _tensors(trained, NamedState(engine, trained.parameters))

    def write() -> None:
        tensors = trained.written(whole)
        check_finite(tensors)
        content = bytes_of(tensors, {"format": "pt"})
        check_tensors(content, tensors)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / ADAPTER_CONFIG, trained.config)
        write_file(folder / ADAPTER, content)

    on_rank_zero(write, engine.device, f"the adapter {folder} was not written")


def take(engine: Any, step: int, state: Mapping[str, Any]) -> Snapshot:
    """Copy what a checkpoint holds, between two optimizer steps. Collective.

    Args:
        engine: of `more_ds.engine.start`.
        step: optimizer steps taken.
        state: what the run counts (sampler, best score, base model), as plain JSON; `load` returns it.

    Raises:
        UserError: as for `adapter_tensors`.
    """
    trained = find_trained(engine.module)
    numbers = NamedState(engine, trained.parameters)
    whole = _tensors(trained, numbers)
    moments = {f"{kind}.{name}": value for kind in numbers.moments for name, value in numbers.gather(kind).items()}
    moments |= {f"{ASIDE}.{name}": whole[name] for name in trained.aside}
    record = {
        "step": step,
        "run": copy.deepcopy(dict(state)),
        "optimizer": {"step": numbers.step(), "loss_scale": loss_scale(engine.optimizer)},
        "versions": {name: metadata.version(name) for name in ("torch", "deepspeed", "transformers", "peft")},
    }
    return Snapshot(step, trained.written(whole), trained.config, moments, record)


def save(
    folder: Path, engine: Any, step: int, state: Mapping[str, Any], *, keep: int = 2, protect: Iterable[Path] = ()
) -> Path:
    """Take a snapshot and wait until it is written; arguments as for `take` and `Snapshot.write`. Collective.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: as for `take`.
        TrainingError: it cannot be written, or a number in it is not finite. The checkpoints before are unharmed.
    """
    snapshot, path = take(engine, step, state), folder / name_of(step)
    on_rank_zero(
        lambda: str(snapshot.write(folder, keep=keep, protect=protect)),
        engine.device,
        f"the checkpoint {path} was not written",
    )
    return path


def load(path: Path, engine: Any) -> dict[str, Any]:
    """Put a checkpoint into an engine: any number of ranks, any ZeRO stage, any number format. Collective.

    Master values and moments are those of the run that saved them, to the bit, so that a run on the same ranks and the
    same stage goes on as if it had not stopped. Rank 0 alone reads the files.

    Args:
        path: folder of the checkpoint.
        engine: of `more_ds.engine.start`, around a model with the same adapter.

    Returns:
        The `state` that was given to `save`.

    Raises:
        UserError: the checkpoint is damaged, or of another adapter; names the file or the tensor.
    """
    trained = find_trained(engine.module)
    numbers = NamedState(engine, trained.parameters)
    values: dict[str, dict[str, Tensor]] = {}

    def read() -> dict[str, Any]:
        contents = read_folder(path)
        shapes = {kind: numbers.shapes(kind) for kind in (MASTER, *numbers.moments)}
        live = shapes[MASTER] | {name: tuple(buffer.shape) for name, buffer in trained.buffers.items()}
        written = trained.written({name: torch.empty(shape, device="meta") for name, shape in live.items()})
        expected = {name: tuple(tensor.shape) for name, tensor in written.items()}
        values[MASTER] = _parse(contents[ADAPTER], expected, path / ADAPTER)
        expected = {f"{kind}.{name}": shape for kind in numbers.moments for name, shape in shapes[kind].items()}
        expected |= {f"{ASIDE}.{name}": live[name] for name in trained.aside}
        beside = _parse(contents[OPTIMIZER], expected, path / OPTIMIZER)
        values[MASTER] |= {name: beside[f"{ASIDE}.{name}"] for name in trained.aside}
        for kind in numbers.moments:
            values[kind] = {name: beside[f"{kind}.{name}"] for name in shapes[kind]}
        return json.loads(contents[STATE])

    record = on_rank_zero(read, engine.device, f"the checkpoint {path} cannot be read")
    numbers.set_step(record["optimizer"]["step"])
    set_loss_scale(engine.optimizer, record["optimizer"]["loss_scale"])
    for kind in (MASTER, *numbers.moments):
        numbers.set(kind, values.get(kind))
    _set_buffers(trained, values.get(MASTER), engine.device)
    engine.global_steps = record["step"]
    engine.global_samples = record["step"] * engine.train_batch_size()
    engine.micro_steps = record["step"] * engine.gradient_accumulation_steps()
    return record["run"]


def restart(engine: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give the adapter these tensors, and the optimizer no memory, as if training were to begin. Collective.

    Args:
        engine: of `more_ds.engine.start`.
        tensors: as `adapter_tensors` returns them; read on rank 0 alone.
    """
    trained = find_trained(engine.module)
    numbers = NamedState(engine, trained.parameters)
    numbers.set_step(0)
    numbers.set(MASTER, tensors)
    for kind in numbers.moments:
        numbers.set(kind, {name: torch.zeros(shape) for name, shape in numbers.shapes(kind).items()})
    _set_buffers(trained, tensors, engine.device)


def _tensors(trained: Trained, numbers: NamedState) -> dict[str, Tensor]:
    with gathered(p for p in trained.parameters.values() if p.numel() == 0):
        trained.model.state_dict()  # layers bring their tables up to date before they are saved
        buffers = {name: buffer.detach().cpu().clone() for name, buffer in trained.buffers.items()}
    return numbers.gather(MASTER) | buffers


def _set_buffers(trained: Trained, saved: Mapping[str, Tensor] | None, device: torch.device) -> None:
    state = {}
    for name, buffer in trained.buffers.items():
        value = saved[name].to(device, buffer.dtype) if saved else torch.empty_like(buffer, device=device)
        dist.broadcast(value, src=0)
        state[trained.full_names[name]] = value
    trained.model.load_state_dict(state, strict=False)


def _parse(content: bytes, expected: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, Tensor]:
    """The tensors of a file, if they are those that the engine has.

    Raises:
        UserError: some are missing, left over or of another shape.
    """
    try:
        found = tensors_from(content)  # nosec B614  # safetensors' load, not torch's
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file: {error}; resume from another checkpoint") from error
    for what, names in (("lacks", set(expected) - set(found)), ("has in addition", set(found) - set(expected))):
        if names:
            raise UserError(f"{path} {what} {len(names)} tensors, e.g. {min(names)}; it is of another adapter or model")
    for name, shape in expected.items():
        there = tuple(found[name].shape)
        if there != shape:
            raise UserError(f"{path}: {name} is {there} and {shape} in the model; it is of another adapter or model")
    return found
