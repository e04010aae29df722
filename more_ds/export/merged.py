"""A task's update added to the base model's weights: an ordinary model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from more_ds import log
from more_ds.errors import UserError
from more_ds.export.factors import Factors
from more_ds.export.layout import Share, stacked_shares
from more_ds.model import without_weights

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


def write_merged(
    folder: Path,
    factors: Factors,
    base: Path,
    model_config: Any,
    dtype: torch.dtype | None,
    *,
    quantized: nn.Module | None = None,
    label: str = "merging",
) -> None:
    """Write the merged model: the base's files, shard by shard, with the update added in float32.

    At most one shard of the base is in memory at a time.

    Args:
        folder: where; it exists.
        factors: the task's update.
        base: folder of the base model, in safetensors.
        model_config: its Hugging Face configuration.
        dtype: of the weights; None: each keeps its own.
        quantized: the base model as a run with a quantised base saw it: its dequantised weights take the place of the
            files'.
        label: of the progress bar.

    Raises:
        UserError: the base is quantised or not in safetensors, an adapted weight is not in its files, or is shared
            with another.
    """
    shards = _shards(base)
    shares = _shares_of_files(base, shards, factors, model_config)
    seen = _dequantizers(quantized, _keys(base, shards)) if quantized is not None else {}
    left = dict(shares)
    for shard in log.progress(shards, label):
        with safe_open(base / shard, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        dtypes = {k: (dtype if v.is_floating_point() else None) or v.dtype for k, v in tensors.items()}
        for key in seen.keys() & tensors.keys():
            tensors[key] = seen[key]()
        for key in shares.keys() & tensors.keys():
            share = left.pop(key)
            tensors[key] = share.added(tensors[key], *factors[share.name])
        # Once, at the end: what was added up in float32 is not to go through a narrower type into a wider one.
        tensors = {k: v.to(dtypes[k]) for k, v in tensors.items()}
        save_file(tensors, folder / shard, metadata=metadata or {"format": "pt"})
    if left:
        raise UserError(f"the files in {base} no longer hold {sorted(left)[0]}; something writes to them")
    _copy_rest(base, folder, shards, dtype)


def _shards(base: Path) -> list[str]:
    if (base / INDEX).is_file():
        return sorted(set(json.loads((base / INDEX).read_text())["weight_map"].values()))
    if (base / WEIGHTS).is_file():
        return [WEIGHTS]
    raise UserError(f"no {WEIGHTS} in {base}; save the base model as safetensors first (save_pretrained does)")


def _shares_of_files(base: Path, shards: list[str], factors: Factors, model_config: Any) -> dict[str, Share]:
    """Names in the files of the adapted weights -> what they hold of which map."""
    if getattr(model_config, "quantization_config", None) is not None:
        raise UserError(
            f"the weights in {base} are quantised, and no update can be added to them; export --form lora, or give the "
            "model that they were made from, --base_model"
        )
    model = without_weights(model_config)
    keys = _keys(base, shards)
    tied = _tied(model)
    stacked = {name for name, (a, _) in factors.items() if a.dim() == 3}
    found = stacked_shares(model, stacked, keys, base) if stacked else {}
    for name in factors.keys() - stacked:
        if name in tied:
            raise UserError(f"the weight of {name} is also that of {tied[name]}: merged, both would change; untie them")
        match = _match(f"{name}.weight", f"{model.base_model_prefix}.", keys)
        if match is None:
            raise UserError(f"the files in {base} hold no '{name}.weight'; is this the base model of the adapter?")
        found[match] = Share(name, isinstance(model.get_submodule(name), Conv1D))
    return found


def _keys(base: Path, shards: list[str]) -> set[str]:
    keys: set[str] = set()
    for shard in shards:
        with safe_open(base / shard, framework="pt") as file:
            keys |= set(file.keys())
    return keys


def _match(key: str, prefix: str, keys: set[str]) -> str | None:
    """The name in the files: those of a bare model lack the prefix of one with a head, and the other way round."""
    return next((k for k in (key, key.removeprefix(prefix), prefix + key) if k in keys), None)


def _dequantizers(model: Any, keys: set[str]) -> dict[str, Callable[[], Tensor]]:
    """Names in the files of the weights that the loaded model quantised -> what gives them back."""
    found: dict[str, Callable[[], Tensor]] = {}
    for name, module in model.named_modules():
        backend: Any = resolve_quantization_backend(module) if isinstance(module, nn.Linear) else None
        match = _match(f"{name}.weight", f"{model.base_model_prefix}.", keys) if backend is not None else None
        if match is not None:
            found[match] = partial(backend.get_base_weight, module)
    return found


def _tied(model: nn.Module) -> Mapping[str, str]:
    """Modules that share their weight -> another that has it."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            owners.setdefault(id(weight), []).append(name)
    return {name: names[i - 1] for names in owners.values() if len(names) > 1 for i, name in enumerate(names)}


def _copy_rest(base: Path, folder: Path, shards: list[str], dtype: torch.dtype | None) -> None:
    """Tokeniser, generation settings, index and configuration; no other weights, and nothing that runs."""
    for path in sorted(base.iterdir()):
        is_weights = path.suffix in (".bin", ".safetensors", ".pt", ".pth", ".h5", ".msgpack", ".gguf")
        if path.is_file() and path.name not in shards and not is_weights and path.suffix != ".py":
            shutil.copyfile(path, folder / path.name)
    if dtype is not None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if (folder / INDEX).is_file():
            _resize_index(folder)


def _resize_index(folder: Path) -> None:
    """Let the index tell the new size."""
    index = json.loads((folder / INDEX).read_text())
    total = 0
    for shard in sorted(set(index["weight_map"].values())):
        with safe_open(folder / shard, framework="pt") as file:
            total += sum(t.numel() * t.element_size() for t in (file.get_tensor(k) for k in file.keys()))  # noqa: SIM118
    index.setdefault("metadata", {})["total_size"] = total
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
