"""Likelihoods and generation against one example at a time, without padding and without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import KINDS, text_model
from transformers import AutoConfig, AutoTokenizer

from more_ds.data.encoding import Encoder
from more_ds.model import load_base
from more_ds.scoring.generation import generate
from more_ds.scoring.likelihood import rank_options, takes_trees
from more_ds.text_model import TextModel

TASKS = ["first", "second", "third"]
PROMPTS = ["is this one good? ", "no", "a much longer prompt than the others are", "yes or no: is it"]
OPTIONS = [["good", "bad"], ["equivalent", "not_equivalent", "e"], ["0.0", "0.2", "5.0", "3.4", "1"], ["a"]]
TASK_IDS = [2, 0, 1, 0]


def encode(model: TextModel) -> tuple[list[list[int]], list[list[list[int]]]]:
    encoder = model.encoder
    return [encoder.prompt(p) for p in PROMPTS], [[encoder.target(o) for o in own] for own in OPTIONS]


@torch.no_grad()
def next_token_logits(model: TextModel, prompt: list[int], answer: list[int], task: int) -> torch.Tensor:
    """The plain model call for one row: logits of every answer token and of the one after it."""
    extra: dict[str, Any] = {"task_ids": torch.tensor([task])} if model.routes_by_task else {}
    if model.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        out = model.peft(
            input_ids=torch.tensor([prompt]),
            decoder_input_ids=torch.tensor([[start, *answer]]),
            use_cache=False,
            **extra,
        )
        return out.logits[0].double()
    mask = torch.tensor([[1] * len(prompt) + [0] * len(answer)])
    extra |= {"prompt_mask": mask} if model.routes_by_task else {}
    out = model.peft(input_ids=torch.tensor([prompt + answer]), use_cache=False, **extra)
    return out.logits[0, len(prompt) - 1 :].double()


def one_by_one(model: TextModel, prompts: Any, task_ids: Any, options: Any) -> list[list[float]]:
    scores = []
    for prompt, task, own in zip(prompts, task_ids, options, strict=True):
        log_p = [torch.log_softmax(next_token_logits(model, prompt, option, task), -1) for option in own]
        scores.append([float(sum(p[i, t] for i, t in enumerate(o))) for p, o in zip(log_p, own, strict=True)])
    return scores


def flat(scores: list[list[float]]) -> torch.Tensor:
    return torch.tensor([value for own in scores for value in own])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", [None, {}, {"gate_input": "pooled"}, {"gate": "soft"}])
def test_options_equal_one_by_one(kind: str, adapter: dict[str, Any] | None) -> None:
    model = text_model(kind) if adapter is None else text_model(kind, TASKS, **adapter)
    prompts, options = encode(model)
    expected = flat(one_by_one(model, prompts, TASK_IDS, options))
    torch.testing.assert_close(flat(rank_options(model, prompts, TASK_IDS, options)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_size_order_and_number_of_options_change_nothing(kind: str) -> None:
    model = text_model(kind, TASKS)
    prompts, options = encode(model)
    whole = rank_options(model, prompts, TASK_IDS, options)
    order = [3, 1, 0, 2]
    shuffled = rank_options(
        model, [prompts[i] for i in order], [TASK_IDS[i] for i in order], [options[i] for i in order]
    )
    torch.testing.assert_close(flat([shuffled[order.index(i)] for i in range(4)]), flat(whole), atol=1e-5, rtol=1e-5)
    single = [rank_options(model, [prompts[i]], [TASK_IDS[i]], [options[i]])[0] for i in range(4)]
    torch.testing.assert_close(flat(single), flat(whole), atol=1e-5, rtol=1e-5)
    many = rank_options(model, prompts[2:3], TASK_IDS[2:3], [options[2] * 4])[0]
    torch.testing.assert_close(torch.tensor(many), torch.tensor(whole[2] * 4), atol=1e-5, rtol=1e-5)


def forward_passes(model: TextModel, *arguments: Any, **options: Any) -> tuple[list[list[float]], list[int]]:
    """Scores, and the number of tokens in the rows of every forward pass that they took."""
    widths: list[int] = []
    key = "decoder_input_ids" if model.is_encoder_decoder else "input_ids"
    handle = model.module.register_forward_pre_hook(
        lambda _m, _a, kw: widths.append(kw[key].shape[1]), with_kwargs=True
    )
    try:
        return rank_options(model, *arguments, **options), widths
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_all_options_of_a_batch_take_one_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model(kind, TASKS)
    prompts, options = encode(model)
    whole, widths = forward_passes(model, prompts, TASK_IDS, options)
    assert len(widths) == 1
    monkeypatch.setattr("more_ds.scoring.likelihood.TREE_TOKENS", 14)
    parts, widths = forward_passes(model, prompts, TASK_IDS, options)
    assert len(widths) == 3  # "equivalent", "not_equivalent", "e" have 11 to 16 tokens
    torch.testing.assert_close(flat(parts), flat(whole), atol=1e-5, rtol=1e-5)


def test_a_graded_score_costs_its_distinct_tokens() -> None:
    model = text_model("llama")
    words = [f"{i / 5:.1f}" for i in range(26)]
    options = [[model.encoder.target(word) for word in words]]
    prompts = [model.encoder.prompt("similar?")]
    scores, widths = forward_passes(model, prompts, [0], options)
    space, digits, points, decimals = 1, 6, 6, 26
    assert widths == [len(prompts[0]) + space + digits + points + decimals]
    torch.testing.assert_close(flat(scores), flat(one_by_one(model, prompts, [0], options)), atol=1e-5, rtol=1e-5)


def test_models_that_no_mask_can_tell_who_sees_whom_run_every_option_with_its_prompt() -> None:
    assert [takes_trees(text_model(kind, TASKS)) for kind in KINDS] == [True, True, False, True]
    assert not takes_trees(text_model("llama", TASKS, gate_input="pooled"))
    model = text_model("llama")
    for name, value in (
        ("alibi", True),
        ("layer_types", ["full_attention", "linear_attention"]),
        ("sliding_window", 95),
    ):
        before = getattr(model.config, name, None)
        setattr(model.config, name, value)
        assert not takes_trees(model), name
        setattr(model.config, name, before)
    model.config.sliding_window = 96  # prompts of 64 tokens and answers of 32 see all of it
    assert takes_trees(model)


def test_an_attention_that_takes_no_mask_is_exchanged_for_the_while(monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model("llama")
    prompts, options = encode(model)
    expected = rank_options(model, prompts, TASK_IDS, options)
    seen: list[str] = []

    def exchange(name: str) -> None:
        seen.append(name)
        model.config._attn_implementation = name

    monkeypatch.setattr(model.base, "set_attn_implementation", exchange)
    model.config._attn_implementation = "flash_attention_2"  # not to be had on a CPU: running it would fail
    assert rank_options(model, prompts, TASK_IDS, options) == expected
    assert seen == ["sdpa", "flash_attention_2"]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_task_decides(kind: str) -> None:
    model = text_model(kind, TASKS)
    ranks = model.peft.base_model.ranks()
    assert any(len(set(chosen.tolist())) > 1 for chosen in ranks.values())
    prompts, options = encode(model)
    right = flat(rank_options(model, prompts, [0, 0, 0, 0], options))
    wrong = flat(rank_options(model, prompts, [1, 1, 1, 1], options))
    assert (right - wrong).abs().min() > 1e-3


def test_normalised_by_tokens() -> None:
    model = text_model("llama")
    prompts, options = encode(model)
    lengths = torch.tensor([len(option) for own in options for option in own])
    total = flat(rank_options(model, prompts, TASK_IDS, options))
    mean = flat(rank_options(model, prompts, TASK_IDS, options, normalise=True))
    torch.testing.assert_close(mean * lengths, total, atol=1e-5, rtol=1e-5)


def test_an_option_of_one_token() -> None:
    model = text_model("llama")
    prompts, _ = encode(model)
    options = [[[1], [9]]] * len(prompts)
    expected = flat(one_by_one(model, prompts, TASK_IDS, options))
    torch.testing.assert_close(flat(rank_options(model, prompts, TASK_IDS, options)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [[[[5, 1]], []], [[[5, 1]], [[]]]])
def test_nothing_to_rank_is_refused(options: list[list[list[int]]]) -> None:
    with pytest.raises(ValueError, match="every"):
        rank_options(text_model("llama"), [[5], [6]], [0, 0], options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", [None, {}, {"gate_input": "pooled"}])
def test_greedy_text_equals_a_loop_without_cache(kind: str, adapter: dict[str, Any] | None) -> None:
    model = text_model(kind) if adapter is None else text_model(kind, TASKS, **adapter)
    prompts, _ = encode(model)
    written = generate(model, prompts, TASK_IDS, max_new_tokens=5)
    for prompt, task, row in zip(prompts, TASK_IDS, written, strict=True):
        expected: list[int] = []
        while len(expected) < 5 and 1 not in expected:
            expected.append(int(next_token_logits(model, prompt, expected, task)[-1].argmax()))
        assert row[: len(expected)] == expected
        assert set(row[len(expected) :]) <= {0}


def test_beams_find_a_likelier_text_than_greedy() -> None:
    model = text_model("llama", TASKS)
    prompts, _ = encode(model)
    greedy = generate(model, prompts, TASK_IDS, 4)
    beams = generate(model, prompts, TASK_IDS, 4, num_beams=8)
    assert greedy != beams
    scores = [
        sum(
            one_by_one(model, prompts, TASK_IDS, [[[t for t in row if t != 0]] for row in texts])[i][0]
            for i in range(len(prompts))
        )
        for texts in (greedy, beams)
    ]
    assert scores[1] > scores[0]


def test_the_models_own_generation_settings_are_set_aside_and_come_back() -> None:
    model = text_model("llama")
    prompts, _ = encode(model)
    plain = generate(model, prompts, TASK_IDS, 6)
    own = model.base.generation_config
    own.update(do_sample=True, temperature=3.0, repetition_penalty=5.0, min_new_tokens=6, max_length=3)
    assert generate(model, prompts, TASK_IDS, 6) == plain
    assert model.base.generation_config is own
    own.eos_token_id = [1, plain[0][0]]
    assert generate(model, prompts[:1], TASK_IDS[:1], 6)[0] == plain[0][:1]


def test_dropout_is_off_and_the_training_mode_comes_back() -> None:
    model = text_model("llama", TASKS, lora_dropout=0.9)
    prompts, options = encode(model)
    expected = flat(rank_options(model, prompts, TASK_IDS, options))
    model.module.train()
    scores = rank_options(model, prompts, TASK_IDS, options)
    generate(model, prompts, TASK_IDS, 2)
    assert model.module.training
    torch.testing.assert_close(flat(scores), expected)


@pytest.mark.parametrize("name", ["llama-6m", "t5-8m"])
def test_real_checkpoints(models_dir: Path, name: str) -> None:
    folder = str(models_dir / name)
    config = AutoConfig.from_pretrained(folder)
    seq2seq = bool(config.is_encoder_decoder)
    encoder = Encoder(
        AutoTokenizer.from_pretrained(folder), is_encoder_decoder=seq2seq, max_source_length=64, max_target_length=16
    )
    model = TextModel(load_base(folder, config, dtype="fp32").eval(), encoder)
    prompts, options = encode(model)
    expected = flat(one_by_one(model, prompts, TASK_IDS, options))
    scores = flat(rank_options(model, prompts, TASK_IDS, options))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
