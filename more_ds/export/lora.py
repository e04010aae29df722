"""A task of an adapter as a plain LoRA folder, which PEFT reads without this package."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from more_ds.checkpoint_files import ADAPTER, ADAPTER_CONFIG
from more_ds.errors import UserError
from more_ds.export.factors import PREFIX, Factors, folded
from more_ds.tuners.stacked_weights import WEIGHTS


def write_lora(
    folder: Path,
    factors: Factors,
    trained: PeftConfig,
    *,
    base: str,
    dtype: torch.dtype,
    rank: int | None = None,
    transposed: bool = False,
) -> None:
    """Write a LoRA: `adapter_model.safetensors` and `adapter_config.json`.

    The scaling is inside of B and `lora_alpha` equals the rank everywhere, so that PEFT multiplies by 1, and servers
    that know one rank and one alpha per adapter (vLLM, SGLang) by 1 as well.

    Args:
        folder: where; it exists.
        factors: the task's update.
        trained: the configuration of the adapter that the update is from.
        base: name or folder of the base model, for the configuration.
        dtype: of the tensors.
        rank: None: every map keeps the rank that the task uses, as `rank_pattern`; a number: all maps are padded to
            it with zeros, for servers that need one rank. Stacked experts are always padded, to the highest rank of
            any: PEFT would say of patterns for them that they are ignored, although they are not.
        transposed: the base keeps its weights as (in, out), as GPT-2 does.

    Raises:
        UserError: a map uses a higher rank than `rank`.
    """
    ranks = {name: a.shape[-2] for name, (a, _) in factors.items()}
    stacked = {name: r for name, r in ranks.items() if factors[name][0].dim() == 3}
    highest = max(ranks, key=ranks.__getitem__)
    if rank is not None and ranks[highest] > rank:
        raise UserError(
            f"--rank {rank} is less than the rank {ranks[highest]} that {highest} uses; give {ranks[highest]}"
        )
    common = rank or max(stacked.values(), default=0) or Counter(ranks.values()).most_common(1)[0][0]
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in factors.items():
        place = name
        if rank is not None or name in stacked:
            a = torch.nn.functional.pad(a, (0, 0, 0, common - a.shape[-2]))
            b = torch.nn.functional.pad(b, (0, common - b.shape[-1]))
        if name in stacked:
            a, b = folded(a, b)
            place = _place(name, stacked)
        tensors[f"{PREFIX}{place}.lora_A.weight"] = a.to(dtype).contiguous()
        tensors[f"{PREFIX}{place}.lora_B.weight"] = b.to(dtype).contiguous()
    linear = {name: r for name, r in ranks.items() if name not in stacked}
    pattern = {} if rank is not None else {re.escape(name): r for name, r in linear.items() if r != common}
    config = LoraConfig(
        r=common, lora_alpha=common, rank_pattern=pattern, alpha_pattern=dict(pattern), lora_dropout=0.0, bias="none",
        target_modules=sorted(linear) if stacked else _targets(trained, ranks),
        target_parameters=sorted(stacked) or None, base_model_name_or_path=base, task_type=trained.task_type,
        inference_mode=True, fan_in_fan_out=transposed,
    )  # fmt: skip
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    content = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _place(name: str, stacked: Mapping[str, int]) -> str:
    """Where PEFT keeps the pair of a stacked weight: it wraps a module once for each, in their order."""
    module, _, weight = name.rpartition(".")
    later = WEIGHTS[WEIGHTS.index(weight) + 1 :]
    return module + ".base_layer" * sum(f"{module}.{other}" in stacked for other in later)


def _targets(trained: PeftConfig, ranks: dict[str, int]) -> list[str]:
    """The short names that the adapter was trained with, where they mean the same maps; else the maps' whole names."""
    names = getattr(trained, "target_modules", None)
    if isinstance(names, str) or not names:
        return sorted(ranks)
    narrowed = any(getattr(trained, key, None) is not None for key in ("exclude_modules", "layers_to_transform"))
    return sorted(ranks) if narrowed else sorted(names)


def check_served(folder: Path) -> list[str]:
    """What servers of LoRA folders (vLLM, SGLang) would refuse in a folder, one line each; empty: nothing.

    Their rules: one rank and one alpha for all maps, A before B of the same map under PEFT's names, no bias, no
    DoRA, no further modules, and finite values.
    """
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    wrong = [f"{key} is set" for key in ("rank_pattern", "alpha_pattern", "modules_to_save") if config.get(key)]
    wrong += [f"{key} is on" for key in ("use_dora",) if config.get(key)]
    wrong += [f"bias is {config['bias']!r}"] if config.get("bias", "none") != "none" else []
    with safe_open(folder / ADAPTER, framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    for key, shape in shapes.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if found is None:
            wrong.append(f"{key} is no name of a LoRA tensor")
            continue
        other = key.replace(f"lora_{found[2]}", "lora_" + {"A": "B", "B": "A"}[found[2]])
        if other not in shapes:
            wrong.append(f"{key} has no {other}")
        if shape[0 if found[2] == "A" else 1] != config["r"]:
            wrong.append(f"{key} has shape {shape}, not rank {config['r']}")
    if not math.isclose(config["lora_alpha"], config["r"]):
        wrong.append(f"lora_alpha {config['lora_alpha']} is not the rank, so the update is scaled")
    return wrong
