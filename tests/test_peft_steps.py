"""PEFT's methods that need more of our loop than others: AdaLoRA, P-tuning, MPT; and SPoT's start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from peft import AdaLoraConfig, get_peft_model
from safetensors.torch import load_file
from test_methods_peft import argv, place
from test_training import DS_CONFIGS, adapter, assert_same_run, stop_after_the_first_checkpoint
from tiny_models import base_model, tokenizer

from eval import run as eval_run
from launch import train
from more_ds.after_step import AfterStep
from more_ds.config import RunConfig
from more_ds.data.encoding import Encoder
from more_ds.ds_config import batch_sizes, resolve
from more_ds.engine import Ranks, start
from more_ds.methods import adapter_config
from more_ds.model import attach
from more_ds.text_model import TextModel
from more_ds.tuners.adalora import orthogonality

__all__ = ["place"]

STEPS = 8
EPSILON = 1e-3
"""Adam divides a gradient by its own size: a wide epsilon keeps it from blowing up the rounding of tiny ones."""
SMALL = ["--adapter.init_r", "4", "--adapter.target_r", "2", "--max_steps", "6", "--adapter.tfinal", "2"]


def model() -> Any:
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=2, tfinal=2, deltaT=2, total_step=STEPS, target_modules=["q_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(0)
    return get_peft_model(base_model("llama"), config)


def batch(step: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (4, 7), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def by_peft() -> dict[str, torch.Tensor]:
    """PEFT's documented loop."""
    own = model().train()
    optimizer = torch.optim.AdamW(
        [p for p in own.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0, eps=EPSILON
    )
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        own(**batch(step), labels=batch(step)["input_ids"]).loss.backward()
        optimizer.step()
        own.base_model.update_and_allocate(step)
    return {name: p.detach().clone() for name, p in own.named_parameters() if p.requires_grad}


def by_us(ranks: Ranks, ds_config: str) -> dict[str, torch.Tensor]:
    config = RunConfig(
        method="adalora",
        train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.0,
        max_grad_norm=0.0,
        adam_epsilon=EPSILON,
    )
    engine = start(model(), config, resolve(ds_config, config, batch_sizes(config, ranks.world), "fp32"), ranks)
    follow = AfterStep(engine)
    engine.train()
    for step in range(1, STEPS + 1):
        rows = {name: t.chunk(ranks.world)[ranks.rank] for name, t in batch(step).items()}
        ids = rows["input_ids"]
        loss = torch.nn.functional.cross_entropy(engine(**rows).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        engine.backward(loss + orthogonality(engine.module))
        engine.step()
        follow(step)
    return {name: p.detach().clone() for name, p in engine.module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("world", [1, 2])
def test_the_budget_is_that_of_pefts_loop(world: int) -> None:
    expected = by_peft()
    zeros = sum(int((p == 0).sum()) for key, p in expected.items() if "lora_E" in key)
    assert zeros == 4 * 4 - 4 * 2, "half of the triplets are dropped"
    for found in run_ranks(by_us, world, str(DS_CONFIGS / "zero2.json")):
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=2e-5, msg=key)
            if "lora_E" in key:
                assert torch.equal(found[key] == 0, value == 0)


def test_the_orthogonality_loss_is_pefts() -> None:
    own = model().train()
    inputs = batch(1)
    whole = own(**inputs, labels=inputs["input_ids"]).loss
    plain = own.get_base_model()(**inputs, labels=inputs["input_ids"]).loss
    torch.testing.assert_close(orthogonality(own), whole - plain)


def trained(place: Path, output: Path, method: str, *extra: str, world: int = 1, name: str = "zero2.json") -> Path:
    ds = name if "/" in name else str(DS_CONFIGS / name)
    arguments = argv(place, method, "--ds_config", ds, "--output_dir", str(output), "--save_steps", "1", *extra)
    assert run_ranks(lambda _: train.main(arguments), world) == [0] * world
    return output


OPTIONS = {
    "adalora": SMALL,
    "p_tuning": ["--adapter.num_virtual_tokens", "3"],
    "mpt": ["--adapter.num_virtual_tokens", "3"],
}


@pytest.mark.parametrize(
    "method", [pytest.param("adalora", marks=pytest.mark.slow), "p_tuning", pytest.param("mpt", marks=pytest.mark.slow)]
)
def test_a_resumed_run_ends_with_the_same_bytes(place: Path, tmp_path: Path, method: str) -> None:
    whole = trained(place, tmp_path / "whole", method, *OPTIONS[method])
    broken = ["--output_dir", str(tmp_path / "broken"), "--save_steps", "1", *OPTIONS[method]]
    arguments = argv(place, method, "--ds_config", str(DS_CONFIGS / "zero2.json"), *broken)
    with stop_after_the_first_checkpoint(), pytest.raises(RuntimeError):
        run_ranks(lambda _: train.main(arguments), 1)
    assert run_ranks(lambda _: train.main([*arguments, "--resume", "auto"]), 1) == [0]
    first, second = adapter(whole), adapter(tmp_path / "broken")
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    kept = (
        [
            load_file(next((run / "checkpoints").glob("*5")) / "optimizer.safetensors")
            for run in (whole, tmp_path / "broken")
        ]
        if method == "adalora"
        else [{}, {}]
    )
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())


@pytest.mark.slow
def test_two_ranks_equal_one_process(place: Path, tmp_path: Path) -> None:
    one = trained(place, tmp_path / "one", "adalora", *SMALL)
    assert_same_run(one, trained(place, tmp_path / "two", "adalora", *SMALL, world=2))
    lambdas = [value for name, value in adapter(one).items() if "lora_E" in name]
    assert sum(int((value == 0).sum()) for value in lambdas) == 2 * len(lambdas)
    assert all("lora_" in name for name in adapter(one)), "the budget stays beside the optimizer's moments"
    assert eval_run.main([str(one), "--limit", "2", "--output_dir", str(tmp_path / "eval")]) == 0


def test_zero3_is_refused(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train.main(argv(place, "adalora", *SMALL, "--ds_config", str(DS_CONFIGS / "zero3.json"))) == 2
    assert "adalora does not go with ZeRO-3" in capfd.readouterr().err


def test_spot_starts_from_the_sources_prompt(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    size = ["--adapter.num_virtual_tokens", "3"]
    source = trained(place, tmp_path / "source", "prompt_tuning", *size)
    options = ["--init_adapter", str(source), "--learning_rate", "1e-30"]
    started = trained(place, tmp_path / "spot", "spot", *size, *options)
    prompts = [load_file(run / "best" / "adapter_model.safetensors")["prompt_embeddings"] for run in (source, started)]
    assert torch.equal(*prompts)
    assert train.main(argv(place, "spot", *size)) == 2
    assert train.main(argv(place, "spot", *options, "--output_dir", str(tmp_path / "other"))) == 2
    assert train.main(argv(place, "full", *options)) == 2
    assert train.main(argv(place, "spot", "--init_adapter", str(place / "llama"))) == 2
    error = capfd.readouterr().err
    for message in ("spot needs a trained prompt", "(3, 16) there, (100, 16) here", "full has none", "holds none"):
        assert message in error


def test_mpt_multiplies_the_shared_prompt_by_each_tasks_matrix() -> None:
    """Also before T5's encoder, where PEFT would drop the decoder's inputs."""
    for kind in ("llama", "t5"):
        base = base_model(kind)
        config = adapter_config("mpt", {"num_virtual_tokens": 3}, ["a", "b"], base.config)
        encoder = Encoder(
            tokenizer(kind == "t5"), is_encoder_decoder=kind == "t5", max_source_length=64, max_target_length=32
        )
        text_model = TextModel(attach(base, config).eval(), encoder)
        own: Any = text_model.peft
        for p in own.prompt_encoder.parameters():
            torch.nn.init.normal_(p)
        prompt = own.prompt_encoder["default"]
        batch = text_model.collator.answers([[5, 6, 7], [8, 9]], [[12, 13, 1], [14, 1]], [1, 0])
        found = text_model.label_logits(batch)
        for i, task in enumerate((1, 0)):
            tuned = prompt.embedding.weight * (prompt.prefix_task_cols[task] @ prompt.prefix_task_rows[task])
            rows = {key: value[i : i + 1] for key, value in batch.items()}
            embedded = torch.cat([tuned, base.get_input_embeddings()(rows["input_ids"])[0]]).unsqueeze(0)
            mask = torch.cat([torch.ones(1, 3), rows["attention_mask"]], dim=1)
            if kind == "t5":
                expected = base(
                    inputs_embeds=embedded, attention_mask=mask, decoder_input_ids=rows["decoder_input_ids"]
                )
                logits = expected.logits
            else:
                places = (mask.cumsum(1) - 1).clamp(min=0).long()
                length = rows["labels"].shape[1]
                expected = base(inputs_embeds=embedded, attention_mask=mask, position_ids=places)
                logits = expected.logits[:, -length - 1 : -1]
            real = rows["labels"][0] != -100
            torch.testing.assert_close(found[i][real], logits[0][real], rtol=1e-4, atol=1e-4)
