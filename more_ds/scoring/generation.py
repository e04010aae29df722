"""What a model writes after a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

from more_ds.text_model import TextModel


def generate(
    text_model: TextModel,
    prompts: Sequence[Sequence[int]],
    task_ids: Sequence[int],
    max_new_tokens: int,
    num_beams: int = 1,
) -> list[list[int]]:
    """Token ids that the model writes after each prompt: greedy, or the best of `num_beams` beams.

    The model's own generation settings (sampling, penalties, lengths) are set aside: they would make numbers of two
    models incomparable. Only its further end-of-sequence tokens are kept.

    Args:
        text_model: the model.
        prompts: token ids of each example's prompt.
        task_ids: each example's task.
        max_new_tokens: where every text stops.
        num_beams: 1 is greedy.
    """
    with text_model.evaluating(), _plain_generation(text_model, max_new_tokens, num_beams) as settings:
        batch = text_model.to_device(text_model.collator.prompts(prompts, task_ids))
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")} | text_model.extras(batch)
        model: Any = text_model.peft
        written = model.generate(**inputs, generation_config=settings, synced_gpus=text_model.in_step)
    start = 1 if text_model.is_encoder_decoder else batch["input_ids"].shape[1]
    return [row[start:] for row in written.tolist()]


@contextmanager
def _plain_generation(text_model: TextModel, max_new_tokens: int, num_beams: int) -> Iterator[GenerationConfig]:
    """Settings for `generate`, with nothing of the model's own: it would fill gaps from them."""
    base: Any = text_model.base
    before = base.generation_config
    own_end = before.eos_token_id
    further = own_end if isinstance(own_end, list) else [] if own_end is None else [own_end]
    settings = GenerationConfig(
        do_sample=False,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        pad_token_id=text_model.encoder.pad_id,
        eos_token_id=sorted({text_model.encoder.eos_id, *further}),
        decoder_start_token_id=text_model.collator.decoder_start_id,
    )
    base.generation_config = GenerationConfig()
    try:
        yield settings
    finally:
        base.generation_config = before
