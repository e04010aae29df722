"""ATTEMPT against its equations, in the loop, on ranks, and when it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from method_oracles import softmax
from test_methods_peft import argv, place
from test_training import DS_CONFIGS, adapter, assert_same_run, zero_stage_file
from tiny_models import base_model, tokenizer

from eval import run as eval_run
from launch import train
from more_ds.data.encoding import Encoder
from more_ds.methods import adapter_config
from more_ds.model import attach
from more_ds.prompts import likeness
from more_ds.scoring.generation import generate
from more_ds.scoring.likelihood import rank_options
from more_ds.text_model import TextModel
from more_ds.tuners.update import SHARED

__all__ = ["place"]

SIZE = ["--adapter.num_virtual_tokens", "3"]


def text_model(kind: str) -> TextModel:
    base = base_model(kind)
    options = {"num_virtual_tokens": 3, "sources": ["x", "y"], "attention_dim": 5, "temperature": 2.0}
    torch.manual_seed(1)
    model: Any = attach(base, adapter_config("attempt", options, ["a", "b"], base.config))
    model.base_model.put(torch.randn(2, 3, 16))
    for p in model.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape)
    encoder = Encoder(
        tokenizer(kind == "t5"), is_encoder_decoder=kind == "t5", max_source_length=64, max_target_length=32
    )
    return TextModel(model.eval(), encoder)


def oracle(p: dict[str, torch.Tensor], text: torch.Tensor, task: int) -> torch.Tensor:
    """The prompt of one example, from the embeddings of its real tokens."""
    pooled = torch.stack([text[:, i].max() for i in range(16)])
    hidden = p["down.weight"] @ pooled
    q = p["up.weight"] @ (hidden / (1 + torch.exp(-hidden)))
    q = (q - q.mean()) / torch.sqrt(q.var(unbiased=False) + 1e-5) * p["norm.weight"] + p["norm.bias"]
    prompts = [*p["sources"], p["target"][task]]
    a = softmax(torch.stack([prompt.max(0).values @ q / 2.0 for prompt in prompts]))
    return sum(w * prompt for w, prompt in zip(a, prompts, strict=True)) + prompts[-1]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_outputs_and_gradients_are_those_of_the_equations(kind: str) -> None:
    model = text_model(kind)
    model.module.double()
    base: Any = model.base
    own = getattr(base, SHARED).update["default"]
    leaves = {name: p.detach().clone().requires_grad_() for name, p in own.named_parameters()}
    numbers = {**leaves, "sources": own.sources}
    batch = model.collator.answers([[5, 6, 7], [8, 9]], [[12, 13, 1], [14, 1]], [1, 0])
    bare = base_model(kind).double()
    found, expected = model.label_logits(batch), []
    real = batch["labels"] != -100
    for i, task in enumerate((1, 0)):
        rows = {key: value[i : i + 1] for key, value in batch.items()}
        text = bare.get_input_embeddings()(rows["input_ids"])[0]
        prompt = oracle(numbers, text[rows["prompt_mask"][0].bool()], task)
        mask = torch.cat([torch.ones(1, 3), rows["attention_mask"]], dim=1)
        embedded = torch.cat([prompt, text]).unsqueeze(0)
        if kind == "t5":
            decoder = rows["decoder_input_ids"]
            logits = bare(inputs_embeds=embedded, attention_mask=mask, decoder_input_ids=decoder).logits
        else:
            places, length = (mask.cumsum(1) - 1).clamp(min=0).long(), rows["labels"].shape[1]
            logits = bare(inputs_embeds=embedded, attention_mask=mask, position_ids=places).logits[:, -length - 1 : -1]
        expected.append(logits[0])
    wanted = torch.stack(expected)
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-9, atol=1e-9)
    found[real].square().sum().backward()
    wanted[real].square().sum().backward()
    for name, p in own.named_parameters():
        torch.testing.assert_close(p.grad, leaves[name].grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_scores_and_texts_know_neither_neighbours_nor_answers(kind: str) -> None:
    model = text_model(kind)
    rows, options = [[5, 6, 7], [5, 6, 7, 8, 9, 10, 11]], [[[12, 1], [13, 14, 1]], [[13, 14, 15, 1], [16, 1]]]
    together = rank_options(model, rows, [0, 1], options)
    for i, found in enumerate(together):
        assert rank_options(model, [rows[i]], [i], [options[i]])[0] == pytest.approx(found, abs=1e-4)
    written = generate(model, rows, [0, 1], 4)
    assert written == [generate(model, [row], [i], 4)[0] for i, row in enumerate(rows)]
    assert generate(model, rows, [0, 1], 4, num_beams=2) == [
        generate(model, [row], [i], 4, num_beams=2)[0] for i, row in enumerate(rows)
    ]
    first = [[token] for token in range(3, 30)]
    for i, text in enumerate(written):
        if text and text[0] in range(3, 30):
            scores = rank_options(model, [rows[i]], [i], [first])[0]
            assert first[max(range(len(scores)), key=scores.__getitem__)][0] == text[0]


@pytest.fixture(scope="module")
def sources(place: Path) -> list[str]:
    found = []
    for name in ("parity", "copy"):
        output = ["--tasks", name, "--output_dir", str(place / "prompts" / name), "--max_steps", "1"]
        assert run_ranks(lambda _, o=output: train.main(argv(place, "prompt_tuning", *SIZE, *o)), 1) == [0]
        found.append(str(place / "prompts" / name))
    return found


def trained(place: Path, sources: list[str], output: Path, world: int, ds: str) -> Path:
    options = [*SIZE, "--adapter.sources", ",".join(sources), "--ds_config", ds, "--output_dir", str(output)]
    assert run_ranks(lambda _: train.main(argv(place, "attempt", *options)), world) == [0] * world
    return output


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_two_ranks_equal_one_process(place: Path, sources: list[str], tmp_path: Path, stage: int) -> None:
    options = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    one = trained(place, sources, tmp_path / "one", 1, str(DS_CONFIGS / "zero2.json"))
    two = trained(place, sources, tmp_path / "two", 2, str(zero_stage_file(tmp_path, stage, **options)))
    assert_same_run(one, two)
    kept = adapter(one)["base_model.model.shared_update.update.sources"]
    prompts = [adapter(Path(name), "best")["prompt_embeddings"] for name in sources]
    assert torch.equal(kept, torch.stack(prompts))
    assert eval_run.main([str(one), "--limit", "2", "--output_dir", str(tmp_path / "eval")]) == 0


def test_what_is_no_source_is_refused(place: Path, sources: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--adapter.sources", str(place / "llama")], ["--adapter.sources", sources[0]]):
        assert train.main(argv(place, "attempt", *options)) == 2
    error = capfd.readouterr().err
    for message in ("attempt needs the trained prompts", "holds no prompt", "holds a prompt of 3 vectors"):
        assert message in error


def test_a_run_starts_from_the_prompt_most_like_another(
    place: Path, sources: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    like = str(tmp_path / "like")
    assert run_ranks(lambda _: train.main(argv(place, "prompt_tuning", *SIZE, "--tasks", "copy", "--output_dir", like,
                                               "--max_steps", "2")), 1) == [0]  # fmt: skip
    prompts = [adapter(Path(name), "best")["prompt_embeddings"] for name in (like, *sources)]
    cosines = [
        sum(float(torch.cosine_similarity(a, b, dim=0)) for a in prompts[0] for b in other) / 9 for other in prompts[1:]
    ]
    nearest = sources[cosines.index(max(cosines))]
    torch.testing.assert_close(likeness(prompts[0], torch.stack(prompts[1:])), torch.tensor(cosines))
    capfd.readouterr()
    for given, name in ((["--init_adapter", ",".join(sources), "--init_like", like], "chosen"),
                        (["--init_adapter", nearest], "named")):  # fmt: skip
        options = [*SIZE, *given, "--max_steps", "1", "--output_dir", str(tmp_path / name)]
        assert run_ranks(lambda _, o=options: train.main(argv(place, "spot", *o)), 1) == [0]
    assert f"likeness to {like}: {nearest} {max(cosines):.3f}, " in capfd.readouterr().out
    assert_same_run(tmp_path / "chosen", tmp_path / "named")


def test_several_prompts_need_one_to_choose_by(
    place: Path, sources: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    several, like = ["--init_adapter", ",".join(sources)], ["--init_like", sources[0]]
    for method, options, message in (
        ("spot", several, "init_adapter names 2, init_like is None"),
        ("prompt_tuning", like, f"init_adapter names none, init_like is {sources[0]}"),
        ("lora", [*several, *like], "the method is lora; leave it out"),
        ("spot", ["--init_adapter", f"{sources[0]},{place / 'llama'}", *like], "holds no prompt"),
    ):
        size = [] if method == "lora" else SIZE
        assert train.main(argv(place, method, *size, *options)) == 2
        assert message in capfd.readouterr().err


def test_parameters_are_those_of_the_formula() -> None:
    own = text_model("llama").peft
    trains = sum(p.numel() for p in own.parameters() if p.requires_grad)
    assert trains == 2 * 3 * 16 + 2 * 5 * 16 + 2 * 16
