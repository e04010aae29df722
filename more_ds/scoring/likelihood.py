"""The log-likelihood of every closed answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor

from more_ds.data.collate import Batch, positions
from more_ds.losses import label_nll
from more_ds.numerics import at_least_float32
from more_ds.scoring import answer_tree
from more_ds.scoring.answer_tree import Tree
from more_ds.scoring.last_block import for_the_last
from more_ds.scoring.prefix_cache import Past, PrefixCache, find_prefixes
from more_ds.text_model import TextModel

ROWS_PER_PROMPT = 4
"""At most this many times the batch's rows run at once where answers run with their prompts, to bound the memory."""
TREE_TOKENS = 512
"""At most this many tokens of answers stand beside a prompt; more of them take further passes."""
RELATIVE_DECODERS = ("t5", "mt5")
"""Encoder-decoders whose decoder knows tokens' distances alone, and can be told them."""
MASKED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Layers, as transformers names them, that mix tokens by nothing but a masked attention."""

Options = Sequence[Sequence[Sequence[int]]]


def rank_options(
    text_model: TextModel,
    prompts: Sequence[Sequence[int]],
    task_ids: Sequence[int],
    options: Options,
    *,
    normalise: bool = False,
    prefixes: PrefixCache | None = None,
) -> list[list[float]]:
    """The log-likelihood of every option of every example, exact.

    The options of an example stand as a tree beside its prompt (`more_ds.scoring.answer_tree`): one forward pass
    computes the prompt once and every shared token once. Where a model cannot be told who sees whom (a gate on the
    pooled input, prompt tuning, recurrent layers, a sliding window shorter than the text, decoders with absolute
    positions), every option runs with its prompt. Every rank of a ZeRO-3 group takes the same number of forward passes;
    each must call.

    Args:
        text_model: the model.
        prompts: token ids of each example's prompt.
        task_ids: each example's task.
        options: token ids of each example's options, EOS included; one or more per example.
        normalise: divide by the number of the option's tokens.
        prefixes: what many prompts begin with, from `share_prefixes`.

    Returns:
        For each example, for each option, the sum (or mean) of its tokens' log-probabilities, in nats.

    Raises:
        ValueError: an example has no options, or an option no tokens.
    """
    if not all(row and all(row) for row in options):
        raise ValueError("every example needs options, and every option needs tokens")
    with text_model.evaluating():
        if takes_trees(text_model):
            with _masked_attention(text_model):
                scores = _rank_in_trees(text_model, prompts, task_ids, options, prefixes)
        else:
            scores = _rank_with_prompts(text_model, prompts, task_ids, options)
    if normalise:
        return [
            [score / len(o) for score, o in zip(row, own, strict=True)]
            for row, own in zip(scores, options, strict=True)
        ]
    return scores


def share_prefixes(
    text_model: TextModel, groups: Sequence[tuple[int, Sequence[Sequence[int]]]], batch_size: int
) -> PrefixCache | None:
    """Run once what the prompts of each task begin with; None where that saves nothing, or the model cannot be told.

    Every rank must call with the same groups: their prompts are those of all batches, so that no score depends on how
    they are cut.

    Args:
        text_model: the model.
        groups: see `find_prefixes`.
        batch_size: prefixes that run together.
    """
    if text_model.is_encoder_decoder or not text_model.takes_cache or not takes_trees(text_model):
        return None
    prefixes = find_prefixes(groups)
    with text_model.evaluating():
        return PrefixCache.run(text_model, prefixes, batch_size) if prefixes else None


def takes_trees(text_model: TextModel) -> bool:
    """Whether all options of an example can be scored in one pass, beside their prompt.

    A pooled gate chooses its experts from a prompt that must stand alone; prompt tuning adds rows that the mask would
    not know; layers that are no attention mix whatever stands in the row.
    """
    config: Any = text_model.config
    if getattr(text_model.base, "_is_stateful", False) or getattr(config, "alibi", False):
        return False
    if isinstance(text_model.peft, PeftModel):
        adapter = text_model.peft.active_peft_config
        if adapter.is_prompt_learning or getattr(adapter, "gate_input", "task") != "task":
            return False
    if text_model.is_encoder_decoder:
        return config.model_type in RELATIVE_DECODERS
    if not text_model.takes_positions:
        return False
    room = text_model.encoder.max_source_length + text_model.encoder.max_target_length
    windows = [getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size")]
    layers = getattr(config, "layer_types", None) or ()
    return all(w is None or w >= room for w in windows) and set(layers) <= MASKED_LAYERS


def _agree(text_model: TextModel, passes: int) -> int:
    """The largest number of passes that a rank wants, where all must take the same."""
    if not text_model.in_step:
        return passes
    most = torch.tensor(passes, device=text_model.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def _rank_in_trees(
    text_model: TextModel,
    prompts: Sequence[Sequence[int]],
    task_ids: Sequence[int],
    options: Options,
    prefixes: PrefixCache | None,
) -> list[list[float]]:
    past = None if prefixes is None else prefixes.before(prompts, task_ids)
    if past is not None:
        prompts = [prompt[count:] for prompt, count in zip(prompts, past.lengths.tolist(), strict=True)]
    batch = text_model.to_device(text_model.collator.prompts(prompts, task_ids))
    start = text_model.collator.decoder_start_id
    answers = [[tuple(option) for option in own] for own in options]
    groups = [answer_tree.split(own, TREE_TOKENS) for own in answers]
    scores = [[0.0] * len(own) for own in options]
    for turn in range(_agree(text_model, max(map(len, groups)))):
        # An example whose answers are done takes its first group again: a row that others wait for, not read.
        chosen = [own[turn] if turn < len(own) else own[0] for own in groups]
        trees = [
            answer_tree.tree(tuple(own[i] for i in group), start) for own, group in zip(answers, chosen, strict=True)
        ]
        logits = _tree_logits(text_model, batch, trees, past)
        for row, (group, own) in enumerate(zip(chosen, answers, strict=True)):
            if turn < len(groups[row]):
                found = _read(logits[row], trees[row], [own[i] for i in group], shift=int(start is None))
                for i, score in zip(group, found, strict=True):
                    scores[row][i] = score
    return scores


def _tree_logits(text_model: TextModel, batch: Batch, trees: Sequence[Tree], past: Past | None) -> Tensor:
    """Logits after every token of the trees, (batch, nodes, vocabulary); a causal model's prompt end comes first."""
    tokens, depths, sees = (part.to(text_model.device) for part in answer_tree.rows(trees, text_model.encoder.pad_id))
    base: Any = text_model.base
    dtype = base.get_input_embeddings().weight.dtype
    mask, extras = batch["attention_mask"], {"task_ids": batch["task_ids"]}
    if text_model.is_encoder_decoder:
        with _distances_by_depth(base, depths):
            return text_model.module(
                input_ids=batch["input_ids"], attention_mask=mask, decoder_input_ids=tokens,
                decoder_attention_mask=answer_tree.additive(sees, dtype), use_cache=False,
                **text_model.extras(extras | {"prompt_mask": mask}),
            ).logits  # fmt: skip
    length = mask.shape[1]
    own, sees = positions(mask), answer_tree.beside_prompts(mask, sees)
    if past is not None:
        own = own + past.lengths[:, None]
        sees = torch.cat([past.sees[:, None].expand(-1, sees.shape[1], -1), sees], dim=2)
    inputs: dict[str, Any] = {
        "input_ids": torch.cat([batch["input_ids"], tokens], dim=1),
        "attention_mask": answer_tree.additive(sees, dtype),
        "past_key_values": None if past is None else past.cache,
        "position_ids": torch.cat([own, own[:, -1:] + 1 + depths], dim=1),
    }
    inputs |= {"logits_to_keep": tokens.shape[1] + 1} if text_model.keeps_logits else {}
    extras["prompt_mask"] = torch.nn.functional.pad(mask, (0, tokens.shape[1]))
    with for_the_last(text_model, tokens.shape[1] + 1):
        logits = text_model.module(**inputs, **text_model.extras(extras), use_cache=False).logits
    return logits if text_model.keeps_logits else logits[:, length - 1 :]


def _read(logits: Tensor, own: Tree, answers: Sequence[Sequence[int]], shift: int) -> list[float]:
    """Log-likelihoods of one example's answers from its row, (nodes, vocabulary), whose nodes begin at `shift`."""
    log_p = torch.log_softmax(at_least_float32(logits), dim=-1)
    nodes = torch.tensor([node + shift for nodes in own.reads for node in nodes], device=logits.device)
    tokens = torch.tensor([token for answer in answers for token in answer], device=logits.device)
    found = log_p[nodes, tokens].double().split([len(answer) for answer in answers])
    return torch.stack([part.sum() for part in found]).tolist()


def _rank_with_prompts(
    text_model: TextModel, prompts: Sequence[Sequence[int]], task_ids: Sequence[int], options: Options
) -> list[list[float]]:
    """Every option in a row with its prompt; options of like length run together, so that few are padded far."""
    rows = [i for i, own in enumerate(options) for _ in own]
    flat = [option for own in options for option in own]
    order = sorted(range(len(flat)), key=lambda j: -len(flat[j]))
    size = ROWS_PER_PROMPT * len(prompts)
    chunks = [order[at : at + size] for at in range(0, len(order), size)]
    scores: dict[int, float] = {}
    for turn in range(_agree(text_model, len(chunks))):
        chunk = chunks[turn] if turn < len(chunks) else chunks[0]
        texts, tasks = [prompts[rows[j]] for j in chunk], [task_ids[rows[j]] for j in chunk]
        nll, _ = _whole_nll(text_model, texts, [flat[j] for j in chunk], tasks)
        scores.update(zip(chunk, (-nll).tolist(), strict=True))
    numbers = iter(range(len(flat)))
    return [[scores[next(numbers)] for _ in own] for own in options]


def _whole_nll(
    text_model: TextModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    task_ids: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Nats and tokens of answers that run with their prompts, (answers,) each."""
    batch = text_model.to_device(text_model.collator.answers(prompts, answers, task_ids))
    return label_nll(text_model.label_logits(batch), batch["labels"])


@contextmanager
def _masked_attention(text_model: TextModel) -> Iterator[None]:
    """With an attention that takes any mask: flash attention knows padding and causal order alone."""
    base: Any = text_model.base
    chosen = base.config._attn_implementation
    if chosen in ("eager", "sdpa"):
        yield
        return
    base.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        base.set_attn_implementation(chosen)


@contextmanager
def _distances_by_depth(base: Any, depths: Tensor) -> Iterator[None]:
    """Let a T5 decoder measure distances by the tokens' (batch, nodes) depths in the tree, not by their places."""

    def compute_bias(attention: Any, *_: Any, **__: Any) -> Tensor:
        buckets = attention._relative_position_bucket(
            depths[:, None, :] - depths[:, :, None],
            bidirectional=False,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        return attention.relative_attention_bias(buckets).permute(0, 3, 1, 2)

    modules = [m for m in base.get_decoder().modules() if getattr(m, "has_relative_attention_bias", False)]
    for module in modules:
        module.compute_bias = partial(compute_bias, module)
    try:
        yield
    finally:
        for module in modules:
            del module.compute_bias
