"""The registry of methods, and PEFT's own methods in the loop."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from distributed import run_ranks
from test_training import DS_CONFIGS, TASKS, assert_same_run, losses, zero_stage_file
from tiny_models import base_model, tokenizer

from launch import train
from more_ds.data.encoding import Encoder
from more_ds.methods import METHODS, adapter_config
from more_ds.model import attach
from more_ds.scoring.generation import generate
from more_ds.scoring.likelihood import rank_options
from more_ds.text_model import TextModel

PROMPTS = ["prompt_tuning", "prefix_tuning"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    for kind in ("llama", "t5"):
        base_model(kind).save_pretrained(folder / kind)
        tokenizer(kind == "t5").save_pretrained(folder / kind)
    for name in ("parity", "copy", "grade"):
        rows = [{"text": "ab" * (i % 3 + 1), "label": i % 2} for i in range(9)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks.yaml").write_text(TASKS)
    settings = {
        "tasks_file": str(folder / "tasks.yaml"), "train_batch_size": 8, "per_device_train_batch_size": 2,
        "max_steps": 3, "warmup_steps": 1, "learning_rate": 0.01, "adam_epsilon": 1e-3, "logging_steps": 1,
        "eval_limit": 2, "eval_on_start": False, "test": False, "max_source_length": 32, "max_target_length": 16,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    return folder


def argv(place: Path, method: str, *extra: str, model: str = "llama") -> list[str]:
    recipe, base = str(place / "recipe.yaml"), str(place / model)
    return ["--recipe", recipe, "--model", base, "--method", method, *extra]


def prompt_model(method: str, kind: str = "llama") -> TextModel:
    base = base_model(kind)
    config = adapter_config(method, {"num_virtual_tokens": 5}, ["a"], base.config)
    encoder = Encoder(
        tokenizer(kind == "t5"), is_encoder_decoder=kind == "t5", max_source_length=64, max_target_length=32
    )
    model = attach(base, config).eval()
    torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight)
    return TextModel(model, encoder)


def test_the_list_names_every_method(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(argv(place, "list")) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:4] for line in printed if line and line.split()[0] in METHODS}
    assert rows.keys() == METHODS.keys()
    layers, width, ffn, heads = 2, 16, 24, {"q_proj": 16, "k_proj": 8, "v_proj": 8, "o_proj": 16}
    config = base_model("llama").config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (layers, width, ffn)
    maps = [
        (width, config.num_key_value_heads * config.head_dim) if k in "k_proj v_proj" else (width, width) for k in heads
    ]
    maps += [(width, ffn), (width, ffn), (ffn, width)]
    lora = layers * sum(8 * (d + m) for d, m in maps)
    assert rows["lora"] == [f"{lora:,}", "no", "yes"]
    assert rows["dora"][0] == f"{lora + layers * sum(m for _, m in maps):,}"
    assert rows["more"][1:] == ["yes", "by"]
    assert rows["prompt_tuning"][0] == f"{100 * width:,}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["moer"], "unknown method 'moer'; did you mean 'more'?"),
        (["lora", "--adapter.rr", "3"], "adapter.rr: unknown option; did you mean 'r'?"),
        (["dora", "--adapter.use_dora", "false"], "adapter.use_dora cannot be set: it is True in dora"),
        (["more", "--adapter.num_tasks", "3"], "adapter.num_tasks: unknown option"),
        (["poly", "--gradient_checkpointing", "true"], "poly does not go with gradient_checkpointing"),
        (
            ["prefix_tuning", "--gradient_checkpointing", "true"],
            "prefix_tuning does not go with gradient_checkpointing",
        ),
        (["prompt_tuning", "--adapter.num_virtual_tokens", "250"], "do not fit the model's 256 positions"),
    ],
)
def test_a_mistake_is_refused_before_a_model_loads(
    place: Path, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with mock.patch.object(train, "load_base", side_effect=AssertionError("a model was loaded")):
        assert train.main(argv(place, *arguments)) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_prefix_tuning_refuses_an_encoder_decoder(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train.main(argv(place, "prefix_tuning", model="t5")) == 2
    assert "use prompt_tuning" in capfd.readouterr().err


@pytest.mark.parametrize("method", PROMPTS)
def test_trained_prompts_do_not_feel_the_padding(method: str) -> None:
    """Trained rows stand before the padding of a causal batch; distances must not depend on the longest row."""
    model = prompt_model(method)
    prompts, options = [[5, 6, 7], [5, 6, 7, 8, 9, 10, 11]], [[[12, 2], [13, 14, 2]]] * 2
    together = rank_options(model, prompts, [0, 0], options)
    for prompt, own, found in zip(prompts, options, together, strict=True):
        assert rank_options(model, [prompt], [0], [own])[0] == pytest.approx(found, abs=1e-4)
    written = generate(model, prompts, [0, 0], 4)
    assert written == [generate(model, [prompt], [0], 4)[0] for prompt in prompts]


def test_the_written_text_is_what_the_scores_prefer() -> None:
    """Cached decoding steps count positions as one pass does."""
    model = prompt_model("prompt_tuning")
    prompt = [5, 6, 7, 8]
    written = generate(model, [prompt], [0], 3)[0]
    for length in range(1, len(written) + 1):
        options = [[*written[: length - 1], token] for token in range(3, 30)]
        scores = rank_options(model, [prompt], [0], [options])[0]
        best = options[max(range(len(scores)), key=scores.__getitem__)]
        if written[length - 1] in range(3, 30):
            assert best[-1] == written[length - 1]


FAST = [("prompt_tuning", 2), ("sora", 3), ("moelora", 2)]
ELSEWHERE = ("more", "full", "mole", "xlora", "attempt", "spot", "adalora")
SLOW = [(m, stage) for m in METHODS for stage in (2, 3) if (m, stage) not in FAST and m not in ELSEWHERE]


@pytest.mark.parametrize(("method", "stage"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_two_ranks_equal_one_process(place: Path, tmp_path: Path, method: str, stage: int) -> None:
    options = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    shards = str(zero_stage_file(tmp_path, stage, **options))
    for world, config in ((1, str(DS_CONFIGS / "zero2.json")), (2, shards)):
        arguments = argv(place, method, "--ds_config", config, "--output_dir", str(tmp_path / str(world)))
        assert run_ranks(lambda _, a=arguments: train.main(a), world) == [0] * world
    assert len(losses(tmp_path / "1")) == 3
    assert_same_run(tmp_path / "1", tmp_path / "2")
    steps = losses(tmp_path / "2")
    assert max(len(row["tasks"]) for row in steps) > 1, "no step had ranks on different tasks"
