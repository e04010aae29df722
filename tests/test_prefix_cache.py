"""What the prompts of a task begin with, run once, against prompts that run whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_methods import NAMES, made
from test_scoring import flat, forward_passes
from test_xlora import folders, ours
from tiny_models import text_model, tokenizer
from toy_suite import on_ranks

from more_ds.data.encoding import Encoder
from more_ds.scoring import prefix_cache
from more_ds.scoring.likelihood import rank_options, share_prefixes
from more_ds.scoring.prefix_cache import PrefixCache, find_prefixes
from more_ds.text_model import TextModel

__all__ = ["folders"]

TASKS = ["first", "second", "third"]
LONG, SHORT, NONE = "a long way to begin a question: ", "shorter: ", ""
TEXTS = [LONG + "is it?", LONG + "it is not", SHORT + "yes", NONE + "z", LONG + "i", SHORT + "yesterday was one"]
TASK_IDS = [2, 2, 0, 0, 2, 0]
WORDS = [["good", "bad"], ["e", "equal", "or not"], ["0.0", "0.2", "5.0"], ["a"], ["yes", "no"], ["1"]]


def encoded(model: TextModel) -> tuple[list[list[int]], list[list[list[int]]]]:
    encoder = model.encoder
    return encoder.prompts(TEXTS), [[encoder.target(word) for word in own] for own in WORDS]


def shared(model: TextModel, prompts: Sequence[Sequence[int]], *texts: str) -> PrefixCache:
    """The cache of prefixes that are named, with the task of a prompt that begins so."""
    begins = [tuple(model.encoder.prompt(text)) for text in texts]
    numbers = [next(t for t, p in zip(TASK_IDS, prompts, strict=True) if tuple(p[: len(b)]) == b) for b in begins]
    with model.evaluating():
        cache = PrefixCache.run(model, list(zip(numbers, begins, strict=True)), batch_size=1)
    assert cache is not None
    return cache


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("adapter", [None, {}, {"gate": "soft"}])
def test_scores_are_those_of_whole_prompts(kind: str, adapter: dict[str, Any] | None) -> None:
    """Rows with prefixes of two lengths and without one, in one batch; prefixes run one by one."""
    model = text_model(kind) if adapter is None else text_model(kind, TASKS, **adapter)
    model.module.double()
    prompts, options = encoded(model)
    expected = rank_options(model, prompts, TASK_IDS, options)
    found, widths = forward_passes(model, prompts, TASK_IDS, options, prefixes=shared(model, prompts, LONG, SHORT))
    torch.testing.assert_close(flat(found), flat(expected), atol=1e-9, rtol=1e-9)
    _, whole = forward_passes(model, prompts, TASK_IDS, options)
    assert widths[0] < whole[0] - 20


def test_the_longest_prefix_of_the_rows_own_task_is_taken() -> None:
    model = text_model("llama", TASKS)
    model.module.double()
    prompts, options = encoded(model)
    begins = [tuple(model.encoder.prompt(LONG)), tuple(model.encoder.prompt(LONG))[:5]]
    with model.evaluating():
        both = PrefixCache.run(model, [(0, begins[0]), (2, begins[1]), (2, begins[0]), (1, begins[0])], 8)
    assert both is not None
    past = both.before(prompts, TASK_IDS)
    assert past is not None
    assert past.lengths.tolist() == [len(begins[0]) if task == 2 else 0 for task in TASK_IDS]
    assert past.sees.sum(1).tolist() == past.lengths.tolist()
    expected = rank_options(model, prompts, TASK_IDS, options)
    found = rank_options(model, prompts, TASK_IDS, options, prefixes=both)
    torch.testing.assert_close(flat(found), flat(expected), atol=1e-9, rtol=1e-9)
    assert both.before(prompts[2:4], [0, 0]) is None


def test_a_prompt_keeps_its_last_token() -> None:
    """The answers begin where it ends."""
    model = text_model("llama")
    model.module.double()
    prompts, options = encoded(model)
    whole = tuple(prompts[0])
    with model.evaluating():
        cache = PrefixCache.run(model, [(0, whole), (0, whole[:-1])], 2)
    assert cache is not None
    past = cache.before(prompts[:1], [0])
    assert past is not None
    assert past.lengths.tolist() == [len(whole) - 1]
    found = rank_options(model, prompts[:1], [0], options[:1], prefixes=cache)
    torch.testing.assert_close(flat(found), flat(rank_options(model, prompts[:1], [0], options[:1])))


def test_answers_that_take_several_passes_find_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model("llama", TASKS)
    model.module.double()
    prompts, options = encoded(model)
    cache = shared(model, prompts, LONG)
    expected = rank_options(model, prompts, TASK_IDS, options)
    monkeypatch.setattr("more_ds.scoring.likelihood.TREE_TOKENS", 6)
    for _ in range(2):
        found = rank_options(model, prompts, TASK_IDS, options, prefixes=cache)
        torch.testing.assert_close(flat(found), flat(expected), atol=1e-9, rtol=1e-9)


PROMPTS = ("prompt_tuning", "prefix_tuning", "spot", "p_tuning", "mpt", "attempt")
"""What they put before a row is not of the row's tokens."""


@pytest.mark.parametrize("method", NAMES)
def test_every_method_scores_as_in_rows_of_prompt_and_answer(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever depends on more than the keys and values of the tokens before must not be given a cache."""
    encoder = Encoder(tokenizer(False), is_encoder_decoder=False, max_source_length=40, max_target_length=8)
    model = TextModel(made(method).double(), encoder)
    prompts = [[1, 5, 6, 7, 8, 9, 10 + i, 10 + i // 2] for i in range(15) for _ in range(3)]
    tasks, options = [0, 1, 2] * 15, [[[11, 2], [12, 13, 2]]] * 45
    groups = [(task, prompts[task::3]) for task in range(3)]
    cache = share_prefixes(model, groups, batch_size=2)
    assert (cache is None) == (method in PROMPTS)
    if cache is not None:
        assert [tokens for _, tokens in cache.prefixes] == [(1, 5, 6, 7, 8, 9)] * 3
    found = [rank_options(model, prompts, tasks, options, prefixes=one) for one in (None, cache)]
    monkeypatch.setattr("more_ds.scoring.likelihood.takes_trees", lambda _: False)
    expected = flat(rank_options(model, prompts, tasks, options))
    for scores in found:
        torch.testing.assert_close(flat(scores), expected, atol=1e-7, rtol=1e-7)


def test_what_knows_a_token_by_more_than_its_keys_gets_no_cache(folders: list[str]) -> None:
    encoder = text_model("llama").encoder
    prompts = [encoder.prompt(f"{LONG}{i}") for i in range(9)]
    for model in (ours(folders), made("attempt")):
        assert share_prefixes(TextModel(model, encoder), [(0, prompts)], 4) is None
    assert share_prefixes(text_model("t5"), [(0, prompts)], 4) is None
    assert share_prefixes(text_model("llama", TASKS, gate_input="pooled"), [(0, prompts)], 4) is None
    assert share_prefixes(text_model("llama", TASKS), [(0, prompts)], 4) is not None


def test_a_model_with_another_kind_of_cache_runs_whole_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model("llama")
    prompts = [(0, [model.encoder.prompt(f"{LONG}{i}") for i in range(9)])]
    monkeypatch.setattr(model.config, "num_hidden_layers", 3)  # a layer that takes another's keys has none of its own
    assert share_prefixes(model, prompts, 4) is None
    monkeypatch.undo()
    assert share_prefixes(model, prompts, 4) is not None


def test_what_saves_most_is_kept_within_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[1, *range(10, 10 + n), 99, i] for n in (20, 6) for i in range(12)]
    many, few = prompts[:12], prompts[12:]
    assert find_prefixes([(0, many), (1, few), (1, few[:4])]) == [(0, tuple(many[0][:22])), (1, tuple(few[0][:8]))]
    assert find_prefixes([(0, [many[0]] * 5)]) == [(0, tuple(many[0][:-1]))]
    assert find_prefixes([(0, many[:1]), (1, [[5], [5, 6]] * 99), (2, [[3, 4], [4, 3]] * 99)]) == []
    monkeypatch.setattr(prefix_cache, "ROOM", 43)
    assert find_prefixes([(0, many), (1, few)]) == [(0, tuple(many[0][:22]))]
    monkeypatch.setattr(prefix_cache, "ROOM", 44)
    assert len(find_prefixes([(0, many), (1, few)])) == 2


def test_partitioned_ranks_run_as_many_passes_with_prefixes() -> None:
    model = text_model("llama", TASKS)
    next(model.peft.parameters()).ds_numel = 1  # the mark that ZeRO-3 leaves on a parameter
    prompts = [model.encoder.prompt(f"{LONG}{i}") for i in range(8)]
    options = [[[5, 1], [6, 1]]] * 8

    def job(rank: int) -> Any:
        dist.init_process_group("gloo")
        passes: list[int] = []
        model.module.register_forward_hook(lambda *_: passes.append(1))
        cache = share_prefixes(model, [(0, prompts), (1, prompts)], 1)
        own = prompts[rank * 4 : rank * 4 + 4]
        return rank_options(model, own, [rank] * 4, options[:4], prefixes=cache), len(passes)

    (first, passes), (second, others) = on_ranks(2, job)
    assert passes == others == 3
    alone = rank_options(model, prompts, [0] * 4 + [1] * 4, options)
    torch.testing.assert_close(flat([*first, *second]), flat(alone), atol=1e-5, rtol=1e-5)
