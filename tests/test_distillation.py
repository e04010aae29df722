"""MPT's teachers: the loss by hand, and a run that is taught."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from test_methods_peft import argv, place
from test_training import DS_CONFIGS, adapter, assert_same_run, losses
from tiny_models import base_model, tokenizer

from launch import train
from more_ds.data.encoding import Encoder
from more_ds.distillation import Distillation
from more_ds.methods import adapter_config
from more_ds.model import attach
from more_ds.text_model import TextModel

__all__ = ["place"]


def student(kind: str) -> TextModel:
    base = base_model(kind)
    config = adapter_config("mpt", {"num_virtual_tokens": 3}, ["a", "b"], base.config)
    encoder = Encoder(
        tokenizer(kind == "t5"), is_encoder_decoder=kind == "t5", max_source_length=64, max_target_length=32
    )
    torch.manual_seed(1)
    model: Any = attach(base, config)
    for p in model.prompt_encoder.parameters():
        torch.nn.init.normal_(p)
    return TextModel(model.double(), encoder)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_loss_is_that_of_the_equations(kind: str) -> None:
    """The teacher by the oracle: the bare model behind the teacher's prompt, example by example."""
    text_model = student(kind)
    prompts = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2)).double()
    distillation = Distillation(text_model, prompts)
    batch = text_model.collator.answers([[5, 6, 7], [8, 9]], [[12, 13, 1], [14, 1]], [1, 0])
    text_model.module.eval()  # T5 has dropout
    logits = text_model.label_logits(batch)
    found = distillation.loss(logits, batch)
    base: Any = text_model.base
    own: Any = text_model.peft
    shared = own.prompt_encoder["default"]
    divergence, squares, tokens = 0.0, 0.0, 0
    for i, task in enumerate((1, 0)):
        tuned = shared.embedding.weight * (shared.prefix_task_cols[task] @ shared.prefix_task_rows[task])
        rows = {key: value[i : i + 1] for key, value in batch.items()}
        real = rows["labels"][0] != -100
        sides = []
        for prompt in (tuned, prompts[task]):
            embedded = torch.cat([prompt, base.get_input_embeddings()(rows["input_ids"])[0]]).unsqueeze(0)
            mask = torch.cat([torch.ones(1, 3), rows["attention_mask"]], dim=1)
            if kind == "t5":
                inputs = {"decoder_input_ids": rows["decoder_input_ids"]}
            else:
                inputs = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0).long()}
            seen: list[torch.Tensor] = []
            handle = base.get_output_embeddings().register_forward_pre_hook(lambda _, a, seen=seen: seen.append(a[0]))
            out = base(inputs_embeds=embedded, attention_mask=mask, **inputs).logits
            handle.remove()
            length = rows["labels"].shape[1]
            cut = slice(None) if kind == "t5" else slice(-length - 1, -1)
            sides.append((torch.softmax(out[0, cut], -1)[real], seen[0][0, cut][real]))
        (p, h), (q, g) = sides
        divergence += (q * (q.log() - p.log())).sum()
        squares += ((h - g) ** 2).sum() / 16
        tokens += int(real.sum())
    torch.testing.assert_close(found, 0.9 * (divergence + squares) / tokens, rtol=1e-4, atol=1e-6)
    found.backward()
    assert all(p.grad is not None for p in own.prompt_encoder.parameters())


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    text_model = student("llama")
    shared: Any = text_model.peft.prompt_encoder["default"]  # type: ignore[union-attr,index]
    prompts = torch.stack(
        [
            shared.embedding.weight * (c @ r)
            for c, r in zip(shared.prefix_task_cols, shared.prefix_task_rows, strict=True)
        ]
    )
    distillation = Distillation(text_model, prompts.detach())
    batch = text_model.collator.answers([[5, 6, 7]], [[12, 13, 1]], [1])
    assert distillation.loss(text_model.label_logits(batch), batch).item() == pytest.approx(0, abs=1e-9)


SIZE = ["--adapter.num_virtual_tokens", "3"]


@pytest.fixture(scope="module")
def teachers(place: Path) -> Path:
    for name in ("parity", "copy", "grade"):
        output = ["--tasks", name, "--output_dir", str(place / "teachers" / name), "--max_steps", "1"]
        assert run_ranks(lambda _, o=output: train.main(argv(place, "prompt_tuning", *SIZE, *o)), 1) == [0]
    return place / "teachers"


def run(place: Path, output: Path, world: int, *extra: str) -> Path:
    arguments = [*SIZE, "--ds_config", str(DS_CONFIGS / "zero2.json"), "--output_dir", str(output), *extra]
    assert run_ranks(lambda _: train.main(argv(place, "mpt", *arguments)), world) == [0] * world
    return output


def test_a_run_is_taught(place: Path, teachers: Path, tmp_path: Path) -> None:
    taught = run(place, tmp_path / "taught", 2, "--distill_from", str(teachers))
    assert all(row["loss_auxiliary"] > 0 for row in losses(taught))
    assert adapter(taught)["prefix_task_rows"].shape == (3, 1, 16)


@pytest.mark.slow
def test_two_ranks_are_taught_as_one_process(place: Path, teachers: Path, tmp_path: Path) -> None:
    one, two = (run(place, tmp_path / str(n), n, "--distill_from", str(teachers)) for n in (1, 2))
    assert_same_run(one, two)
    alone = run(place, tmp_path / "alone", 1)
    assert not torch.equal(adapter(alone)["prompt_embeddings"], adapter(one)["prompt_embeddings"])


def test_what_cannot_teach_is_refused(place: Path, teachers: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for method, options in (
        ("mpt", ["--distill_from", str(place)]),
        ("mpt", ["--distill_from", str(teachers)]),
        ("lora", ["--distill_from", str(teachers)]),
    ):
        assert train.main(argv(place, method, *options)) == 2
    error = capfd.readouterr().err
    assert "has no run 'parity'" in error
    assert "holds a prompt of 3 vectors; a run of prompt_tuning with 100 vectors is needed" in error
    assert "the method is lora" in error
