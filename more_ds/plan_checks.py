"""What a plan refuses before anything is read that takes long. Each raises a `UserError`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from more_ds.compose.sources import OF_LORAS, identity
from more_ds.config import RunConfig
from more_ds.data.encoding import Encoder
from more_ds.data.stored import StoredExamples
from more_ds.errors import UserError, suggest
from more_ds.loading import find_subject
from more_ds.methods import check_together
from more_ds.optimizers import is_paged
from more_ds.quantised import quantiser
from more_ds.tasks import Task
from more_ds.tasks.render import Example

QUANTISED_GATHERS = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


def check_paged(optim: str, ds_config: Mapping[str, Any], on_gpu: bool) -> None:
    """Refuse an optimizer that pages between the GPU and the host where its moments are the host's from the start."""
    offload = ds_config["zero_optimization"].get("offload_optimizer") or {}
    offloads = offload.get("device", "none") != "none"
    if is_paged(optim) and (offloads or not on_gpu):
        why = "the ds_config keeps its state in host memory" if offloads else "there is none"
        other = "adamw_bnb_8bit" if optim == "paged_adamw_8bit" else "adamw_torch"
        raise UserError(f"{optim} makes room on a GPU, and {why}; use --optim {other}")


def check_monitors(report_to: Sequence[str]) -> None:
    """Refuse W&B where it is not installed; what the other monitors need comes with this package."""
    if "wandb" in report_to and importlib.util.find_spec("wandb") is None:
        raise UserError("report_to names wandb, and there is no such package; pip install wandb, or leave it out")


def check_start(config: RunConfig) -> None:
    """Refuse to start from what is no adapter, or one of another base model."""
    if config.init_adapter is None:
        return
    subject = find_subject(config.init_adapter)
    if subject.adapter is None or config.method in ("full", *OF_LORAS):
        name = config.init_adapter
        there = f"{name} holds none" if Path(name).is_dir() else f"there is no folder {name}"
        what = there if subject.adapter is None else f"{config.method} has none"
        raise UserError(f"init_adapter names an adapter to start from, and {what}; leave it out")
    if identity(subject.base) != identity(config.model):
        raise UserError(f"init_adapter {config.init_adapter} was trained on {subject.base}, and not on {config.model}")


def check_weights(config: RunConfig, tasks: Sequence[Task]) -> None:
    """Refuse weights of tasks that are not there, and tasks without a weight."""
    names = [task.name for task in tasks]
    unknown = [f"'{name}'{suggest(name, names)}" for name in config.sampling_weights if name not in names]
    missing = [name for name in names if name not in config.sampling_weights] if config.sampling_weights else []
    if unknown or missing:
        raise UserError(
            f"sampling_weights needs one weight per task; unknown: {', '.join(unknown) or 'none'}; "
            f"missing: {', '.join(missing) or 'none'}"
        )


def check_vocabulary(encoder: Encoder, model_config: Any) -> None:
    """Refuse a tokeniser that makes ids which the model has no embedding for."""
    tokens, room = len(encoder.tokenizer), getattr(model_config, "vocab_size", None)
    if room is not None and tokens > room:
        raise UserError(
            f"the tokeniser has {tokens} tokens, the model {room}; it was extended without the model, or is another "
            "model's: save the one that belongs to it beside it"
        )


def check_targets(encoder: Encoder, train: Sequence[Sequence[Example]]) -> None:
    """Refuse answers that are too long now, not in the step that draws them: only one rank would know why it stops.

    No tokeniser makes more tokens than there are bytes; a space may come in front, and the end is marked.
    """
    longest = encoder.max_target_length - 2
    suspect = [own for own in train if not isinstance(own, StoredExamples) or own.longest_target > longest]
    for text in sorted({e.target for examples in suspect for e in examples if len(e.target.encode()) > longest}):
        encoder.target(text)


def check_sharding(ds_config: Mapping[str, Any], on_gpu: bool) -> None:
    """Refuse, on a CPU, weights that ZeRO-3 gathers in 8 bits (qwZ): DeepSpeed's quantiser is a CUDA kernel."""
    wanted = [name for name in QUANTISED_GATHERS if ds_config["zero_optimization"].get(name)]
    if wanted and not on_gpu:
        raise UserError(f"{' and '.join(wanted)} in the ds_config needs a GPU; take it out")


def check_fits(config: RunConfig, model_config: Any, dtype: str, *, zero3: bool = False) -> None:
    """Refuse a method with a model or a setting of the run that it cannot go with."""
    check_together(
        config.method,
        gradient_checkpointing=config.gradient_checkpointing,
        encoder_decoder=model_config.is_encoder_decoder,
        quantization=config.quantization != "none" or quantiser(model_config) is not None,
        fp16=dtype == "fp16",
        zero3=zero3,
        padding_free=config.padding_free,
    )


def check_row(config: RunConfig, model_config: Any) -> None:
    """Refuse to lay a micro-batch in one row where that cannot be, or is contradicted."""
    if not config.padding_free:
        return
    if model_config.is_encoder_decoder:
        raise UserError("padding_free needs a causal model, and this is an encoder-decoder; use --group_by_length true")
    if config.pad_to_multiple_of is not None:
        raise UserError("padding_free pads nothing, and pad_to_multiple_of does; leave one of them out")
    if config.adapter.get("gate_input") == "pooled":
        raise UserError("padding_free needs a gate on the task, and gate_input is pooled; leave one of them out")


def check_taught(method: str) -> None:
    """Refuse teachers for a method that has none."""
    if method != "mpt":
        raise UserError(f"distill_from names the teachers of mpt, and the method is {method}; leave it out")
