"""Loading a base model and a tokeniser, attaching an adapter, and running a batch through them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, BitsAndBytesConfig

from more_ds.collate import Batch, Collator, positions
from more_ds.encoding import Encoder
from more_ds.errors import UserError
from more_ds.tuners import MoreConfig

METHODS: dict[str, type[PeftConfig]] = {"more": MoreConfig, "lora": LoraConfig}
"""Name of a method -> its PEFT configuration."""

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
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
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
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the weights of '{name}' cannot be read: {reason}; check the folder, or load it anew"
        ) from error
    model.config.use_cache = False
    return model


def attach(model: nn.Module, adapter: PeftConfig) -> PeftModel:
    """Wrap a base model with a fresh adapter.

    Raises:
        UserError: the target modules match nothing, or the method cannot adapt them.
    """
    try:
        return get_peft_model(model, adapter)
    except ValueError as error:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        reason = str(error).splitlines()[0]
        raise UserError(f"{reason} (linear maps of this model: {', '.join(linear)})") from error


def adapter_config(method: str, options: dict[str, Any], task_names: list[str], is_encoder_decoder: bool) -> PeftConfig:
    """The PEFT configuration of a method for these tasks.

    Raises:
        UserError: a value is out of range.
    """
    known = {"target_modules": "all-linear", **options}
    if method == "more":
        known |= {"num_tasks": len(task_names), "task_names": task_names}
    try:
        return METHODS[method](task_type="SEQ_2_SEQ_LM" if is_encoder_decoder else "CAUSAL_LM", **known)
    except (ValueError, TypeError) as error:
        raise UserError(f"adapter: {error}") from error


def parameters_by_kind(model: nn.Module) -> dict[str, int]:
    """Number of trainable parameters by kind (A, B, gate, task embedding, ...), whole also under ZeRO-3."""
    kinds: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((p for p in name.split(".") if p.startswith(("more_", "lora_"))), "other")
            kinds[part] = kinds.get(part, 0) + getattr(parameter, "ds_numel", parameter.numel())
    return kinds


class TextModel:
    """A model, its tokeniser's conventions and its batches, behind one way to call them.

    Attributes:
        module: what is called: the (PEFT) model, or the DeepSpeed engine around it.
        encoder: text to token ids.
        collator: token ids to tensors.
    """

    def __init__(self, module: nn.Module, encoder: Encoder) -> None:
        """Read from the model which arguments it takes."""
        self.module, self.encoder = module, encoder
        base = self.peft.get_base_model() if isinstance(self.peft, PeftModel) else self.peft
        self.config = base.config
        self.base = base
        self.is_encoder_decoder = encoder.is_encoder_decoder
        start = getattr(self.config, "decoder_start_token_id", None)
        self.collator = Collator(encoder.pad_id, start if self.is_encoder_decoder else None)
        accepted = inspect.signature(base.forward).parameters
        self.takes_positions = "position_ids" in accepted and not self.is_encoder_decoder
        self.keeps_logits = "logits_to_keep" in accepted
        self.routes_by_task = bool(getattr(getattr(self.peft, "base_model", None), "routes_by_task", False))

    @property
    def peft(self) -> nn.Module:
        """The model inside of a DeepSpeed engine, or the model itself."""
        inner = getattr(self.module, "module", None)
        return inner if isinstance(inner, nn.Module) else self.module

    @property
    def device(self) -> torch.device:
        """Where batches belong."""
        return next(self.peft.parameters()).device

    def auxiliary_loss(self) -> Tensor | None:
        """The method's own loss of the last forward pass in training, weighted; None if it has none."""
        return getattr(getattr(self.peft, "base_model", None), "auxiliary_loss", None) if self.routes_by_task else None

    def label_logits(self, batch: Batch) -> Tensor:
        """Logits that predict `batch["labels"]`, (batch, answer length, vocabulary).

        The vocabulary is projected for the answer alone where the model can do that.
        """
        length = batch["labels"].shape[1]
        if self.is_encoder_decoder:
            keys = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
            return self.module(**{key: batch[key] for key in keys}, **self.extras(batch), use_cache=False).logits
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")} | self.extras(batch)
        if self.takes_positions:
            inputs["position_ids"] = positions(batch["attention_mask"])
        kept = {"logits_to_keep": length + 1} if self.keeps_logits else {}
        logits = self.module(**inputs, **kept, use_cache=False).logits
        return logits[:, -length - 1 : -1]

    def extras(self, batch: Batch) -> dict[str, Tensor]:
        """What a method that routes by task is told beside the base model's own inputs."""
        if not self.routes_by_task:
            return {}
        return {key: batch[key] for key in ("task_ids", "prompt_mask") if key in batch}


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()
