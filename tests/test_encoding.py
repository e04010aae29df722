"""Tokens and batches: BOS once, EOS last, the prompt is cut and never the answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from more_ds.data.collate import Collator, positions
from more_ds.data.encoding import Encoder
from more_ds.errors import UserError
from more_ds.losses import IGNORED, label_nll


def encoder(folder: Path, source: int = 128, target: int = 16) -> Encoder:
    return Encoder(
        AutoTokenizer.from_pretrained(folder),
        is_encoder_decoder=folder.name.startswith("t5"),
        max_source_length=source,
        max_target_length=target,
    )


@pytest.mark.parametrize("name", ["llama-6m", "stories260K", "t5-8m"])
def test_special_tokens_stand_where_they_should(models_dir: Path, name: str) -> None:
    e = encoder(models_dir / name)
    prompt, target = e.prompt("cola sentence: It is raining."), e.target("not_equivalent")
    bos = e.tokenizer.bos_token_id
    if name.startswith("t5"):
        assert prompt[-1] == e.eos_id
    else:
        assert prompt[0] == bos
        assert bos not in prompt[1:]
        assert e.eos_id not in prompt
    assert target[-1] == e.eos_id
    assert target.count(e.eos_id) == 1
    assert e.decode(target) == "not_equivalent"


def test_golden_tokens(models_dir: Path) -> None:
    e = encoder(models_dir / "llama-6m")
    tokens = e.tokenizer.convert_ids_to_tokens([*e.prompt("cola sentence: a b"), *e.target("acceptable")])
    assert tokens == ["<s>", "▁col", "a", "▁sentence", ":", "▁a", "▁b", "▁accept", "able", "</s>"]


def test_a_prompt_that_begins_with_bos_gets_no_second_one(models_dir: Path) -> None:
    e = encoder(models_dir / "llama-6m")
    assert e.prompt("<s>cola").count(e.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", ["llama-6m", "t5-8m"])
def test_a_long_prompt_is_cut_at_its_end_and_counted(models_dir: Path, name: str) -> None:
    e = encoder(models_dir / name, source=12)
    whole = encoder(models_dir / name).prompt("rain " * 40)
    cut = e.prompt("rain " * 40)
    assert len(cut) == 12
    if name == "t5-8m":
        assert cut == [*whole[:11], e.eos_id]
    else:
        assert cut == whole[:12]
    e.prompt("rain")
    assert (e.num_prompts, e.num_cut) == (2, 1)


def test_a_long_answer_is_an_error(models_dir: Path) -> None:
    with pytest.raises(UserError, match="raise max_target_length"):
        encoder(models_dir / "llama-6m", target=4).target("one two three four five six")


def test_a_tokeniser_without_eos_is_refused(models_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models_dir / "llama-6m")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        Encoder(tokenizer, is_encoder_decoder=False, max_source_length=8, max_target_length=8)


def test_a_causal_batch_is_padded_on_the_left_and_its_answers_end_together() -> None:
    batch = Collator(pad_id=0).answers([[1, 5, 6], [1, 7]], [[8, 2], [8, 9, 9, 2]], [3, 0])
    assert batch["input_ids"].tolist() == [[0, 1, 5, 6, 8, 2], [1, 7, 8, 9, 9, 2]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    assert batch["prompt_mask"].tolist() == [[0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 8, 2], [8, 9, 9, 2]]
    assert batch["task_ids"].tolist() == [3, 0]
    assert positions(batch["attention_mask"]).tolist() == [[0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]


def test_an_encoder_decoder_batch_is_padded_on_the_right_and_shifted() -> None:
    batch = Collator(pad_id=0, decoder_start_id=0).answers([[5, 6, 1], [7, 1]], [[8, 1], [8, 9, 1]], [0, 1])
    assert batch["input_ids"].tolist() == [[5, 6, 1], [7, 1, 0]]
    assert batch["prompt_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[8, 1, IGNORED], [8, 9, 1]]
    assert batch["decoder_input_ids"].tolist() == [[0, 8, 1], [0, 8, 9]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_label_nll_counts_real_labels_alone() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.25, 0.75]], [[0.1, 0.9], [0.2, 0.8]]], dtype=torch.float64))
    nll, count = label_nll(logits, torch.tensor([[0, 1], [IGNORED, 0]]))
    expected = torch.tensor([-(torch.tensor(0.5).log() + torch.tensor(0.75).log()), -torch.tensor(0.2).log()])
    torch.testing.assert_close(nll.float(), expected)
    assert count.tolist() == [2, 1]
