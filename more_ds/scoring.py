"""What a model answers: the log-likelihood of every closed answer, and generated text."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from more_ds.collate import Batch, positions
from more_ds.losses import IGNORED, label_nll
from more_ds.model import TextModel

ROWS_PER_PROMPT = 4
"""At most this many times the batch's rows run at once, however many answers there are: the batch bounds the memory."""


@dataclass(frozen=True)
class _Prefix:
    """The prompts' computation: everything that their answers share.

    Attributes:
        batch: the prompts' tensors.
        logits: (batch, vocabulary) of the first token after the prompt.
        cache: keys and values of the prompts (of the encoder and the decoder's start).
        encoder_state: (batch, length, width); None for a causal model.
    """

    batch: Batch
    logits: Tensor
    cache: Any
    encoder_state: Tensor | None


def rank_options(
    text_model: TextModel,
    prompts: Sequence[Sequence[int]],
    task_ids: Sequence[int],
    options: Sequence[Sequence[Sequence[int]]],
    *,
    normalise: bool = False,
) -> list[list[float]]:
    """The log-likelihood of every option of every example, exact.

    A prompt is computed once: its keys and values (and the encoder's output) are repeated for its options, which then
    cost their own tokens alone. Options of all examples are one flat list of rows, so that their number may vary.
    Where answers cannot continue a cache (a gate on the pooled input, prompt tuning, recurrent models), every option
    runs with its prompt. Every rank of a ZeRO-3 group takes the same number of forward passes; each must call.

    Args:
        text_model: the model.
        prompts: token ids of each example's prompt.
        task_ids: each example's task.
        options: token ids of each example's options, EOS included; one or more per example.
        normalise: divide by the number of the option's tokens.

    Returns:
        For each example, for each option, the sum (or mean) of its tokens' log-probabilities, in nats.

    Raises:
        ValueError: an example has no options, or an option no tokens.
    """
    if not all(row and all(row) for row in options):
        raise ValueError("every example needs options, and every option needs tokens")
    with _evaluating(text_model):
        rows = [i for i, own in enumerate(options) for _ in own]
        flat = [option for own in options for option in own]
        # Options of like length run together, so that short ones are not padded to the longest.
        order = sorted(range(len(flat)), key=lambda j: -len(flat[j]))
        size = ROWS_PER_PROMPT * len(prompts)
        chunks = [order[at : at + size] for at in range(0, len(order), size)]
        prefix = _prefill(text_model, prompts, task_ids) if _shares_prompts(text_model) else None
        scores: dict[int, float] = {}
        passes = _agree(text_model, len(chunks))
        for i in range(passes):
            chunk = chunks[i] if i < len(chunks) else chunks[0]
            chosen, answers = [rows[j] for j in chunk], [flat[j] for j in chunk]
            if prefix is None:
                texts, tasks = [prompts[j] for j in chosen], [task_ids[j] for j in chosen]
                nll, count = _whole_nll(text_model, texts, answers, tasks)
            else:
                nll, count = _cached_nll(text_model, prefix, chosen, answers, last=i == passes - 1)
            if i < len(chunks):
                scores.update(zip(chunk, (-nll / count if normalise else -nll).tolist(), strict=True))
    numbers = iter(range(len(flat)))
    return [[scores[next(numbers)] for _ in own] for own in options]


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
    with _evaluating(text_model), _plain_generation(text_model, max_new_tokens, num_beams) as settings:
        batch = _to(text_model, text_model.collator.prompts(prompts, task_ids))
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")} | text_model.extras(batch)
        model: Any = text_model.peft
        written = model.generate(**inputs, generation_config=settings, synced_gpus=_in_step(text_model))
    start = 1 if text_model.is_encoder_decoder else batch["input_ids"].shape[1]
    return [row[start:] for row in written.tolist()]


def is_partitioned(text_model: TextModel) -> bool:
    """Whether the parameters are spread over the ranks (ZeRO-3), so that no rank can run a pass alone."""
    return any(hasattr(parameter, "ds_numel") for parameter in text_model.peft.parameters())


def _in_step(text_model: TextModel) -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1 and is_partitioned(text_model)


def _agree(text_model: TextModel, passes: int) -> int:
    """The largest number of passes that a rank wants, where all must take the same."""
    if not _in_step(text_model):
        return passes
    most = torch.tensor(passes, device=text_model.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def _shares_prompts(text_model: TextModel) -> bool:
    """Whether answers can continue their prompt's cache."""
    if getattr(text_model.base, "_is_stateful", False):
        return False
    if not isinstance(text_model.peft, PeftModel):
        return True
    adapter = text_model.peft.active_peft_config
    # A pooled gate chooses its experts from the prompt, which is out of sight when the answer runs alone.
    return not adapter.is_prompt_learning and getattr(adapter, "gate_input", "task") == "task"


def _prefill(text_model: TextModel, prompts: Sequence[Sequence[int]], task_ids: Sequence[int]) -> _Prefix:
    batch = _to(text_model, text_model.collator.prompts(prompts, task_ids))
    inputs: dict[str, Any] = {key: batch[key] for key in ("input_ids", "attention_mask")} | text_model.extras(batch)
    start = text_model.collator.decoder_start_id
    if start is not None:
        inputs["decoder_input_ids"] = torch.full_like(batch["input_ids"][:, :1], start)
    else:
        inputs |= {"position_ids": positions(batch["attention_mask"])} if text_model.takes_positions else {}
        inputs |= {"logits_to_keep": 1} if text_model.keeps_logits else {}
    outputs = text_model.module(**inputs, use_cache=True)
    state = outputs.encoder_last_hidden_state if text_model.is_encoder_decoder else None
    return _Prefix(batch, outputs.logits[:, -1], outputs.past_key_values, state)


def _cached_nll(
    text_model: TextModel, prefix: _Prefix, rows: Sequence[int], answers: Sequence[Sequence[int]], *, last: bool
) -> tuple[Tensor, Tensor]:
    """Nats and tokens of answers, (answers,) each; `rows` are their prompts. `last`: the cache may be used up."""
    device = prefix.logits.device
    chosen = torch.tensor(rows, device=device)
    width = max(2, *(len(answer) for answer in answers))
    labels = torch.full((len(answers), width), IGNORED, device=device)
    for row, answer in zip(labels, answers, strict=True):
        row[: len(answer)] = torch.tensor(answer, device=device)
    # Answers are padded on the right, where a causal mask hides the padding from every real token.
    tokens = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, text_model.encoder.pad_id)
    mask = prefix.batch["attention_mask"][chosen]
    cache = prefix.cache if last else copy.deepcopy(prefix.cache)
    cache.batch_select_indices(chosen)
    inputs: dict[str, Any] = text_model.extras({"task_ids": prefix.batch["task_ids"][chosen]})
    if prefix.encoder_state is not None:
        inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=prefix.encoder_state[chosen])
        inputs |= {"attention_mask": mask, "decoder_input_ids": tokens}
    else:
        whole = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        inputs |= {"input_ids": tokens, "attention_mask": whole}
        inputs |= {"position_ids": positions(whole)[:, -tokens.shape[1] :]} if text_model.takes_positions else {}
    logits = text_model.module(**inputs, past_key_values=cache, use_cache=True).logits
    return label_nll(torch.cat([prefix.logits[chosen].unsqueeze(1), logits], dim=1), labels)


def _whole_nll(
    text_model: TextModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    task_ids: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Nats and tokens of answers that run with their prompts, (answers,) each."""
    batch = _to(text_model, text_model.collator.answers(prompts, answers, task_ids))
    return label_nll(text_model.label_logits(batch), batch["labels"])


def _to(text_model: TextModel, batch: Batch) -> Batch:
    return {key: value.to(text_model.device) for key, value in batch.items()}


@contextmanager
def _evaluating(text_model: TextModel) -> Iterator[None]:
    """Without gradients and dropout; the training mode comes back afterwards."""
    training = text_model.module.training
    text_model.module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        text_model.module.train(training)


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
