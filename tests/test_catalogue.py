"""Planted faults of the failure catalogue that no other test plants; `tests/machines/catalogue.py` lists all 25."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from distributed import run_ranks
from fault_runs import argv, make_place
from hypothesis import given, settings
from hypothesis import strategies as st
from machines.catalogue import CATALOGUE
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_engines import base, engine, train
from tiny_models import base_model, tokenizer
from torch import nn

from launch import train as command
from more_ds import checkpoint, loading, plan, snapshot
from more_ds.checkpoint_files import FILES, complete, name_of, rotate, write_folder
from more_ds.config import RunConfig, build, read_recipe
from more_ds.data.collate import IGNORED, Collator
from more_ds.data.mixture import Mixture
from more_ds.ds_config import batch_sizes, resolve
from more_ds.engine import Ranks, start
from more_ds.errors import TrainingError, UserError
from more_ds.ledger import MOST_SKIPPED, Ledger
from more_ds.model import check_model
from more_ds.scoring.answering import prepare

ROOT = Path(__file__).parents[1]


def defined(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_the_catalogue_names_tests_and_sources_that_are_there() -> None:
    assert len({failure.what for failure in CATALOGUE}) == 25
    for failure in CATALOGUE:
        for name in failure.tests:
            file, _, test = name.partition("::")
            there = defined(ROOT / "tests" / file)
            assert test in there if test else any(other.startswith("test_") for other in there), name
        file, sound, faulty = failure.plant
        source = (ROOT / file).read_text()
        assert source.count(sound) == 1, f"{file} has {source.count(sound)} times: {sound}"
        compile(source.replace(sound, faulty), file, "exec")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("catalogue"))


def test_fp16_is_refused_for_t5() -> None:
    config = base_model("t5").config
    check_model(config, "bf16", 8)
    with pytest.raises(UserError, match="fp16 overflows in t5"):
        check_model(config, "fp16", 8)


def save_with_an_empty_tensor(ranks: Ranks, folder: Path) -> str:
    module = engine(ranks, "zero3_partitioned fp32", folder)
    original = snapshot.bytes_of

    def empties(tensors: dict[str, Any], metadata: dict[str, str]) -> bytes:
        name = next(iter(tensors))
        return original(tensors | {name: torch.empty(0)}, metadata)

    with mock.patch.object(snapshot, "bytes_of", empties):
        try:
            checkpoint.save(folder, module, 1, {})
        except TrainingError as error:
            return str(error)
    return ""


def test_an_empty_tensor_is_found_before_a_checkpoint_counts(tmp_path: Path) -> None:
    for message in run_ranks(save_with_an_empty_tensor, 2, tmp_path):
        assert "tensors were not saved as they are" in message
    assert complete(tmp_path) == []


def modules_to_save(ranks: Ranks, folder: Path) -> tuple[bool, list[int]]:
    config = RunConfig(train_batch_size=4, learning_rate=1e-2)
    zero3 = folder / f"zero3-{ranks.rank}.json"
    zero3.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    ds_config = resolve(str(zero3), config, batch_sizes(config, ranks.world), "fp32")
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    module = start(get_peft_model(base(), lora), config, ds_config, ranks)
    path = checkpoint.save(folder, module, 1, {})
    saved = loading.safe_open(path / checkpoint.ADAPTER, framework="pt")
    heads = [saved.get_tensor(name) for name in saved.keys() if "lm_head" in name]  # noqa: SIM118
    return all(torch.equal(head, base().lm_head.weight) for head in heads), [head.numel() for head in heads]


def test_modules_to_save_are_whole_under_zero_3(tmp_path: Path) -> None:
    assert run_ranks(modules_to_save, 2, tmp_path) == [(True, [20 * 14])] * 2


def frozen(module: Any) -> dict[str, Any]:
    named = {n: p for n, p in module.module.named_parameters() if not p.requires_grad}
    with checkpoint.gathered(named.values()):
        return {name: parameter.detach().clone() for name, parameter in named.items()}


def resume_and_compare(ranks: Ranks, folder: Path) -> tuple[int, bool]:
    first = engine(ranks, "zero3_partitioned fp32", folder)
    before = frozen(first)
    train(first, ranks, range(2))
    path = checkpoint.save(folder, first, 2, {})
    resumed = engine(ranks, "zero3_partitioned fp32", folder, seed=7)
    checkpoint.load(path, resumed)
    after = frozen(resumed)
    return sum(value.numel() for value in before.values()), all(torch.equal(before[n], after[n]) for n in before)


def test_frozen_weights_are_what_they_were_after_a_resume_under_zero_3(tmp_path: Path) -> None:
    for count, same in run_ranks(resume_and_compare, 2, tmp_path):
        assert count > 1000
        assert same


def test_another_base_model_is_refused_on_resume(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "llama"
    shutil.copytree(place / "llama", model)
    arguments = argv(place, tmp_path / "run", "--model", str(model), "--max_steps", "1")
    assert run_ranks(lambda _: command.main(arguments), 1) == [0]
    changed = base_model("llama")
    changed.model.norm.weight.data += 1e-3
    changed.save_pretrained(model)
    capfd.readouterr()
    assert command.main(arguments) == 2
    assert "was trained on another base model" in capfd.readouterr().err


@settings(max_examples=15, deadline=None)
@given(scores=st.lists(st.integers(0, 5), min_size=3, max_size=7), keep=st.integers(1, 3))
def test_the_best_and_the_last_checkpoint_outlive_any_rotation(
    tmp_path_factory: pytest.TempPathFactory, scores: list[int], keep: int
) -> None:
    folder = tmp_path_factory.mktemp("rotation")
    best = 0
    for step, score in enumerate(scores):
        write_folder(folder / name_of(step), dict.fromkeys(FILES, b"{}"))
        best = step if score > scores[best] else best
        rotate(folder, keep, [folder / name_of(best)])
        left = [path.name for path in complete(folder)]
        assert name_of(step) in left
        assert name_of(best) in left
        assert len(left) <= keep + 1
        assert left == sorted(left)


def test_an_answer_that_is_too_long_is_found_before_the_model(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Drawn in a step, it would end one rank, and leave the others waiting."""
    with mock.patch.object(command, "load_base", side_effect=AssertionError("a model was loaded")):
        assert command.main(argv(place, tmp_path / "run", "--max_target_length", "8")) == 2
    assert "a target has 9 tokens, more than max_target_length=8" in capfd.readouterr().err


def test_data_is_read_before_the_ranks_wait_for_each_other(place: Path) -> None:
    seen = []

    def noting(load: Any) -> Any:
        def noted(*arguments: Any, **options: Any) -> Any:
            seen.append(torch.distributed.is_initialized())
            return load(*arguments, **options)

        return noted

    loaders = {name: noting(getattr(plan, name)) for name in ("load_examples", "stored_examples")}
    connect = mock.patch.object(Ranks, "connect", side_effect=KeyboardInterrupt)
    with mock.patch.multiple(plan, **loaders), connect, pytest.raises(KeyboardInterrupt):
        command.main(argv(place, place / "never"))
    assert len(seen) == 4, "training and validation rows of two tasks"
    assert not any(seen)


def test_a_tokeniser_with_more_tokens_than_the_model_is_refused(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "llama"
    shutil.copytree(place / "llama", model)
    larger = tokenizer(False)
    larger.add_tokens(["<extra>"])
    larger.save_pretrained(model)
    assert command.main(argv(place, tmp_path / "run", "--model", str(model))) == 2
    assert "the tokeniser has 100 tokens, the model 99" in capfd.readouterr().err


def test_steps_that_fp16_leaves_out_in_a_row_end_the_run() -> None:
    ledger = Ledger(["a"], SimpleNamespace())  # type: ignore[arg-type]
    skipped = 0
    for step in range(3 * MOST_SKIPPED):  # a scale that is found late, again and again
        skipped += step % MOST_SKIPPED != 0
        ledger.watch_scale(step, skipped)
    ledger.watch_scale(step + 1, skipped)
    for more in range(1, MOST_SKIPPED):
        ledger.watch_scale(step + 1 + more, skipped + more)
    with pytest.raises(TrainingError, match=f"has left out the last {MOST_SKIPPED} steps up to step 201:"):
        ledger.watch_scale(200, skipped + MOST_SKIPPED)


def test_a_gradient_reaches_every_tensor_of_the_adapter_with_checkpointing() -> None:
    """The first step moves B alone; after it, A and the gates have a gradient too."""
    model: Any = get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.arange(3, 15).reshape(2, 6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    trained: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in trained)


def test_a_run_with_checkpointing_ends_where_one_without_does(place: Path, tmp_path: Path) -> None:
    plain = argv(place, tmp_path / "plain", "--max_steps", "3", "--eval_steps", "3", "--adapter.lora_dropout", "0")
    checkpointed = [*plain, "--gradient_checkpointing", "--output_dir", str(tmp_path / "checkpointed")]
    for arguments in (plain, checkpointed):
        assert run_ranks(lambda _, given=arguments: command.main(given), 1) == [0]
    first, second = (load_file(tmp_path / way / "last" / checkpoint.ADAPTER) for way in ("plain", "checkpointed"))
    assert any("more_gate" in name for name in first)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_prompts_and_answers_are_scored_as_they_are_trained(place: Path) -> None:
    config = build(read_recipe(str(place / "recipe.yaml")), "the recipe")
    the_plan = plan.make(config, ds_config_path=None, world=1, on_gpu=False)
    rows = {task.name: own for task, own in zip(the_plan.tasks, the_plan.train, strict=True)}
    model: Any = SimpleNamespace(encoder=the_plan.encoder)
    items, _ = prepare(model, the_plan.tasks, rows, dict.fromkeys(rows, 0))
    scored = {tuple(item.prompt): item for item in items}
    mixture = Mixture(the_plan.train, the_plan.sampler, the_plan.encoder, Collator(the_plan.encoder.pad_id))
    answers = 0
    for batch in mixture.micro_batches(0, rank=0, world=1, accumulation=4):
        tensors = batch.tensors
        item = scored[tuple(tensors["input_ids"][tensors["prompt_mask"].bool()].tolist())]
        assert item.task is the_plan.tasks[batch.task]
        if item.options:
            labels = tensors["labels"][tensors["labels"] != IGNORED].tolist()
            assert labels == item.options[item.example.options.index(item.example.target)]
            answers += 1
    assert answers
