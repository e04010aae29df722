"""Loading a base model and a tokeniser, and attaching an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, BitsAndBytesConfig

from more_ds.errors import UserError
from more_ds.quantised import keep_layout
from more_ds.tuners.base import UPDATE
from more_ds.tuners.full import FullConfig
from more_ds.tuners.half_precision import freeze_counts
from more_ds.tuners.linear import SETS as SETS_OF_MAPS
from more_ds.tuners.linear import is_linear, name_targets

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Name of a number format -> torch's."""


def read_model_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The Hugging Face configuration of a model, without its weights.

    Raises:
        UserError: no such folder or hub model, or one that neither continues nor rewrites text.
    """
    if _looks_like_path(name) and not Path(name, "config.json").is_file():
        raise UserError(f"no model at {name}: no config.json there; give a Hugging Face model folder or a hub id")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the model '{name}' cannot be read: {reason}; check the name, or give a folder") from error
    return config


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokeniser of a model.

    Raises:
        UserError: it is not there or not readable.
    """
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the tokeniser of '{name}' cannot be read: {reason}; save one beside the model") from error


def check_model(config: Any, dtype: str, length: int) -> None:
    """Refuse what a model cannot do, before its weights are read.

    Args:
        config: the model's Hugging Face configuration.
        dtype: `fp32`, `bf16` or `fp16`.
        length: most tokens of a sequence.

    Raises:
        UserError: fp16 with a T5 model (it overflows), or sequences longer than the model has positions.
    """
    if dtype == "fp16" and "t5" in config.model_type:
        raise UserError(f"fp16 overflows in {config.model_type} models; use --dtype bf16 or fp32")
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if limit is not None and "t5" not in config.model_type and length > limit:
        raise UserError(
            f"sequences of {length} tokens do not fit the model's {limit} positions; lower max_source_length or "
            "max_target_length"
        )


def auto_class(config: Any) -> Any:
    """transformers' class for a model of this configuration."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def without_weights(config: Any, trust_remote_code: bool = False) -> Any:
    """The model of a configuration on the meta device: its modules and shapes, and no memory."""
    with init_empty_weights():
        model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()  # inside, every assignment makes a parameter of its own
    return model


def load_base(
    name: str,
    config: Any,
    *,
    dtype: str,
    revision: str | None = None,
    quantization: str = "none",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The base model with its pretrained weights, frozen by the tuner later.

    Args:
        name: folder or hub id.
        config: from `read_model_config`.
        dtype: `fp32`, `bf16` or `fp16`.
        revision: of the hub model.
        quantization: `none`, `4bit` (NF4) or `8bit`, by bitsandbytes.
        attn_implementation: as in transformers; None lets it choose.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: the weights are missing or damaged.
    """
    auto = auto_class(config)
    torch_dtype = DTYPES[dtype]
    quantized = {
        "none": None,
        "4bit": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch_dtype,
            bnb_4bit_quant_storage=torch_dtype,
        ),
        "8bit": BitsAndBytesConfig(load_in_8bit=True),
    }[quantization]
    options: dict[str, Any] = {"quantization_config": quantized} if quantized is not None else {}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        model = auto.from_pretrained(
            name, revision=revision, dtype=torch_dtype, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, UnpicklingError) as error:  # the last: a .bin file that holds more than tensors
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the weights of '{name}' cannot be read: {reason}; check the folder, or load it anew"
        ) from error
    model.config.use_cache = False
    keep_layout(model)
    return model


def attach(model: nn.Module, adapter: PeftConfig) -> nn.Module:
    """Wrap a base model with a fresh adapter, or make all of it trainable where there is none.

    Raises:
        UserError: the target modules match nothing, or the method cannot adapt them.
    """
    if isinstance(adapter, FullConfig):
        return model.requires_grad_(True)
    try:
        by_word = str(getattr(adapter, "target_modules", None)) in SETS_OF_MAPS
        name_targets(adapter, model)
        named = set(adapter.target_modules) if by_word else set()  # type: ignore[attr-defined]
        adapted: Any = get_peft_model(model, adapter)
        freeze_counts(adapted)
        left = sorted(named - set(adapted.base_model.targeted_module_names)) if by_word else []
        if left:
            raise ValueError(
                f"PEFT takes {len(left)} maps, e.g. {left[0]}, for parts of this model's stacked experts and leaves "
                "them out; use --method more, or target_modules: attention"
            )
        return adapted
    except (ValueError, TypeError) as error:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if is_linear(m)})
        reason = str(error).splitlines()[0]
        raise UserError(f"{reason} (linear maps of this model: {', '.join(linear)})") from error


def parameters_by_kind(model: nn.Module) -> dict[str, int]:
    """Number of trainable parameters by kind (A, B, gate, task embedding, ...), whole also under ZeRO-3."""
    kinds: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = _kind(name.split("."))
            kinds[part] = kinds.get(part, 0) + getattr(parameter, "ds_numel", parameter.numel())
    return kinds


def _kind(path: Sequence[str]) -> str:
    """What a parameter is to its method: the name under `update.<adapter>` in our tuners, or PEFT's prefixed one."""
    if UPDATE in path[:-2]:
        return path[path.index(UPDATE) + 2]
    prefixes = (*PEFT_TYPE_TO_PREFIX_MAPPING.values(), "prompt_encoder")
    return next((part for part in path if part.startswith(prefixes)), "other")


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()
