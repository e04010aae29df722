"""Random models of a few thousand parameters, with a tokeniser of single characters."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from more_ds import MoreConfig
from more_ds.data.encoding import Encoder
from more_ds.text_model import TextModel

SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]
CHARACTERS = [chr(code) for code in range(32, 127)]
VOCABULARY = len(SPECIAL) + len(CHARACTERS)
SHAPE = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
ROPE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
KINDS = ("llama", "gpt2", "mistral", "t5")


def tokenizer(is_encoder_decoder: bool) -> PreTrainedTokenizerFast:
    """One token a character; BOS in front for a causal model, EOS behind for an encoder-decoder."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    template, token = ("$A </s>", ("</s>", 1)) if is_encoder_decoder else ("<s> $A", ("<s>", 2))
    raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=[token])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


def base_model(kind: str) -> Any:
    """A random model; `mistral` has a sliding window shorter than the prompts."""
    torch.manual_seed(0)
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE, **ROPE))
    elif kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**SHAPE, **ROPE, sliding_window=8))
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**SHAPE, n_embd=16, n_layer=2, n_head=4, n_positions=256))
    else:
        shape = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
        model = T5ForConditionalGeneration(T5Config(**SHAPE, **shape, decoder_start_token_id=0))
    # Larger weights than the usual ones, so that a wrong position or mask is visible in the result.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def text_model(kind: str, task_names: list[str] | None = None, **adapter: Any) -> TextModel:
    """A tiny model, with a MoRE adapter that is not the identity if tasks are named."""
    model = base_model(kind)
    is_encoder_decoder = kind == "t5"
    if task_names is not None:
        config = MoreConfig(
            r=4, num_tasks=len(task_names), task_names=task_names, init_weights=False,
            task_type="SEQ_2_SEQ_LM" if is_encoder_decoder else "CAUSAL_LM", **adapter,
        )  # fmt: skip
        model = get_peft_model(model, config).eval()
    encoder = Encoder(
        tokenizer(is_encoder_decoder), is_encoder_decoder=is_encoder_decoder, max_source_length=64, max_target_length=32
    )
    return TextModel(model, encoder)
