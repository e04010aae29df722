"""Fresh models of the LLaMA and the T5 type, by a few sizes."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)


@dataclass(frozen=True)
class Sizes:
    """Of a small model.

    Attributes:
        width: of the hidden states.
        inner: of the feed-forward layers.
        layers: of the decoder, and as many of T5's encoder.
        heads: of the attention.
        positions: that a causal model can read.
    """

    width: int
    inner: int
    layers: int
    heads: int
    positions: int = 512


def llama(tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> PreTrainedModel:
    """A causal model with random weights, embeddings tied."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.positions,
        tie_word_embeddings=True,
        initializer_range=sizes.width**-0.5,  # at the usual 0.02 so narrow a model hardly learns
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def t5(tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> PreTrainedModel:
    """An encoder-decoder model (T5 1.0: ReLU, embeddings tied) with random weights, without dropout."""
    config = T5Config(  # type: ignore[call-arg]
        vocab_size=len(tokenizer),
        d_model=sizes.width,
        d_kv=sizes.width // sizes.heads,
        d_ff=sizes.inner,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)
