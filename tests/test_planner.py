"""The planner against published sizes, hand calculations, torch's own accounting, and planted mistakes."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from peft import get_peft_model
from tiny_models import base_model, tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from launch import plan
from more_ds.config import RunConfig
from more_ds.data.encoding import Encoder
from more_ds.losses import label_nll
from more_ds.methods import METHODS, adapter_config
from more_ds.planner.hardware import gpus, shapes, training_rows
from more_ds.planner.memory import QUANTIZED_BYTES, Inventory, Setting, inventory, states, unpacking_traffic
from more_ds.planner.search import cuts
from more_ds.planner.timing import Links, Speed, compute_seconds, received, step_time
from more_ds.planner.trace import Tracer, Workload, at_depth, batch, trace
from more_ds.planner.trace import build as build_meta
from more_ds.speed.counting import peak_bytes
from more_ds.tasks import resolve_tasks
from more_ds.text_model import TextModel

TASKS = list("abcdefgh")
LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 320}


def llama(depth: int, **changes: Any) -> Any:
    return AutoConfig.for_model("llama", num_hidden_layers=depth, **{**LLAMA, **changes})


def workload(config: Any, checkpointing: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> Workload:
    adapter = adapter_config("more", {"r": 4, **options}, TASKS, config)
    return Workload(config, adapter, dtype, dtype, prompt=24, answer=6, checkpointing=checkpointing)


@pytest.mark.parametrize("name", shapes())
def test_shapes_have_the_published_number_of_parameters(name: str) -> None:
    config = AutoConfig.for_model(**shapes()[name]["config"])
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        values = [sum(p.numel() for p in auto.from_config(at_depth(config, n)).parameters()) for n in (1, 2)]
    depth = config.num_layers if config.is_encoder_decoder else config.num_hidden_layers
    assert values[0] + (depth - 1) * (values[1] - values[0]) == shapes()[name]["parameters"]


def test_trained_parameters_follow_the_papers_formula() -> None:
    found = inventory(workload(llama(3), task_dim=10))
    maps = {(64, 64): 4, (64, 96): 2, (96, 64): 1}
    r, layers = 4, 3
    assert found.kinds == {
        "more_A": layers * sum(n * r * d for (d, _), n in maps.items()),
        "more_B": layers * sum(n * r * m for (_, m), n in maps.items()),
        "more_gate": layers * 7 * (10 * r + r),
        "more_task": layers * 7 * 8 * 10,
    }
    assert found.quantizable.sum() == layers * 7  # not the output's, not the embedding


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_traced_bytes_are_what_torchs_profiler_sees(kind: str, checkpointing: bool) -> None:
    base = base_model(kind)
    model: Any = get_peft_model(base, adapter_config("more", {"r": 4}, TASKS, base.config))
    if checkpointing:
        model.enable_input_require_grads()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    encoder = Encoder(
        tokenizer(kind == "t5"), is_encoder_decoder=kind == "t5", max_source_length=64, max_target_length=32
    )
    text_model, given = TextModel(model, encoder), workload(base.config, checkpointing)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def run() -> None:
        tensors = batch(given, 8, "cpu")
        for name in ("attention_mask", "prompt_mask"):
            tensors[name][:, 0] = 0
        nll, _ = label_nll(text_model.label_logits(tensors), tensors["labels"])
        (nll.sum() + text_model.auxiliary_loss()).backward()

    run()
    model.base_model.context.begin(None, None, None)
    gc.collect()  # what other tests have left would count as freed
    measured = peak_bytes(run)
    found = trace(build_meta(given), given, 8)
    assert max(found.forward_peak, found.backward_peak) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_depths_say_what_a_deep_model_needs(checkpointing: bool) -> None:
    deep = workload(llama(6), checkpointing)
    whole, tracer = trace(build_meta(deep), deep, 4), Tracer(deep)
    assert tracer.value(4, lambda t: t.flops) == whole.flops
    assert tracer.value(4, lambda t: t.kernels) == pytest.approx(whole.kernels, rel=0.01)
    assert tracer.value(4, lambda t: t.saved) == pytest.approx(whole.saved, rel=0.01)
    assert tracer.peak(4) == pytest.approx(max(whole.forward_peak, whole.backward_peak), rel=0.05)


def test_flops_are_forward_and_the_gradient_of_the_input_alone() -> None:
    given = workload(llama(2))
    found = trace(build_meta(given), given, 4)
    with torch.device("meta"):
        base: Any = AutoModelForCausalLM.from_config(given.model_config)
    maps = sum(p.numel() for n, p in base.named_parameters() if "proj" in n)
    tokens, head = 4 * 30, 4 * 7 * 64 * 320
    attention = 2 * (4 + 10) * 4 * 30 * 30 * 64
    frozen = 4 * maps * tokens + 4 * head + attention
    adapter = found.flops - frozen
    # A and B: forward, dX and dW of each; the first layer's inputs need no gradient.
    assert 0 < adapter <= 1.1 * 6 * tokens * inventory(given).kinds["more_A"] * 2
    full = Workload(**{**given.__dict__, "checkpointing": True})
    again = trace(build_meta(full), full, 4)
    assert 1.3 < again.flops / found.flops < 1.55


def test_flops_agree_with_torchs_counter_on_real_tensors() -> None:
    base = base_model("llama")
    base.train()
    given = Workload(
        base.config, adapter_config("lora", {"r": 4}, [], base.config), torch.float32, torch.float32, 24, 6
    )
    model: Any = get_peft_model(base, given.adapter)
    encoder: Any = SimpleNamespace(is_encoder_decoder=False, pad_id=0)
    tensors = batch(given, 4, "cpu")
    tensors["attention_mask"][:, 0] = 0
    with FlopCounterMode(display=False) as counter:
        nll, _ = label_nll(TextModel(model, encoder).label_logits(tensors), tensors["labels"])
        nll.sum().backward()
    attention = base.config.num_hidden_layers * (4 + 10) * 4 * 30 * 30 * base.config.hidden_size
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)}
    assert trace(build_meta(given), given, 4).flops == sum(counted.values()) + attention


def plain(trainable: list[int], frozen: list[int]) -> Inventory:
    return Inventory(np.array(trainable, float), np.array(frozen, float), np.array([True] * len(frozen)), {})


def given_bf16() -> Workload:
    return workload(llama(1), dtype=torch.bfloat16)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_frozen_weights_cost_their_own_bytes_alone(stage: int) -> None:
    """By hand, for 4 ranks: 10^9 frozen values, 10^7 trained ones, bf16."""
    parameters = plain([10_000_000], [10**9])
    zero = {"stage": stage, "reduce_bucket_size": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    parts = states(parameters, given_bf16(), Setting({"zero_optimization": zero}, 4)).device
    expected = {
        0: {"weights": 2e9 + 2e7, "gradients": 6e7, "optimizer": 12e7},
        2: {"weights": 2e9 + 2e7, "gradients": 1e7, "optimizer": 3e7},
        3: {"weights": 0.5e9 + 0.5e7, "gradients": 1e7, "optimizer": 3e7, "gathers": 2e9},
    }[stage]
    assert {name: parts[name] for name in expected} == pytest.approx(expected)
    if stage == 2:
        _, deepspeeds = estimate_zero2_model_states_mem_needs(1_010_000_000, 4, 1, cpu_offload=False)
        assert sum(parts.values()) < deepspeeds / 2


def test_small_weights_stay_whole_under_zero3() -> None:
    zero = {"stage": 3, "reduce_bucket_size": 0, "stage3_param_persistence_threshold": 100}
    parts = states(plain([50], [100, 101]), given_bf16(), Setting({"zero_optimization": zero}, 2)).device
    assert parts["weights"] == 2 * (50 + 201) / 2 + 2 * 50 + 2 * 100
    assert parts["gathers"] == 2 * 101


def test_quantised_weights() -> None:
    parameters = Inventory(np.array([0.0]), np.array([64e6, 10e6]), np.array([True, False]), {})
    for form, expected in {"none": 148e6, "8bit": 64e6 + 20e6, "4bit": 64e6 * 0.515869140625 + 20e6}.items():
        parts = states(parameters, given_bf16(), Setting({}, 1, quantization=form)).device
        assert parts["weights"] == pytest.approx(expected)
        assert parts["gathers"] == (0 if form == "none" else 128e6)
    assert unpacking_traffic(parameters, given_bf16(), "8bit") == 2 * (64e6 + 128e6)
    assert set(QUANTIZED_BYTES) == {"none", "8bit", "4bit"}


def test_offloading_moves_bytes_to_the_host() -> None:
    zero = {"stage": 3, "reduce_bucket_size": 0, "offload_param": {"device": "cpu"}}
    zero |= {"offload_optimizer": {"device": "cpu"}}
    there = states(plain([1000], [10**8]), given_bf16(), Setting({"zero_optimization": zero}, 4, 2))
    assert there.device["weights"] == there.device["optimizer"] == there.device["gradients"] == 0
    assert there.host["optimizer"] == 2 * 12 * 1000 / 4
    assert there.host["weights"] > 1e8  # two ranks of four: half of the weights


def test_zero3_gathers_twice_and_reduces_no_frozen_gradient() -> None:
    parameters = plain([1000], [10**9, 5])
    setting = Setting({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10}}, 8)
    volume = received(parameters, given_bf16(), setting, accumulation=3)
    assert volume == {"weights": 3 * 2 * 2e9, "adapter": 2 * 1000 * 4}
    assert received(parameters, given_bf16(), Setting({}, 8), 3) == {"weights": 0, "adapter": 2 * 1000 * 2}


def test_time_of_a_step_by_hand() -> None:
    speed = Speed(flops=1e12, bandwidth=1e9, kernel=1e-6, launch=5e-6)
    assert compute_seconds(1000, 1e12, 1e9, speed) == pytest.approx(2.001)
    assert compute_seconds(10**6, 1e12, 1e9, speed) == pytest.approx(5.0)  # the host is the slower one
    links = Links(per_node=8, inside=100e9, between=10e9, latency=0.0)
    assert links.seconds(100e9, 1, 5) == 0
    assert links.seconds(100e9, 8, 5) == pytest.approx(7 / 8)
    assert links.seconds(100e9, 16, 5) == pytest.approx(15 / 16 / 0.8)
    setting = Setting({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10}}, 8)
    time = step_time(1.0, 2, plain([1], [10**9]), given_bf16(), setting, links)
    assert time.gathers == pytest.approx(8e9 / 100e9 * 7 / 8)
    assert time.seconds == pytest.approx(2.0 + time.gathers / 2 + time.reduction)


def test_batches_are_cut_into_what_divides() -> None:
    sizes = [(s.micro, s.accumulation) for s in cuts(RunConfig(train_batch_size=48), 4)]
    assert sizes == [(12, 1), (6, 2), (4, 3), (3, 4), (2, 6), (1, 12)]
    given = list(cuts(RunConfig(train_batch_size=48, per_device_train_batch_size=3), 4))
    assert [(s.micro, s.accumulation) for s in given] == [(3, 4)]


def test_every_gpu_and_every_shipped_task_is_known() -> None:
    assert all(gpu.source and gpu.memory > 0 for gpu in gpus().values())
    for suite in ("glue", "commonsense", "nlg"):
        assert all(task.name in training_rows() for task in resolve_tasks(None, [suite], None))


LORAS = {"loras": ["a", "b"], "ranks": [2, 3]}
SOURCES = {"mole": LORAS, "xlora": LORAS, "attempt": {"sources": ["a", "b"], "num_virtual_tokens": 4}}


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_counted_and_traced(method: str, kind: str) -> None:
    """Their buffers against a count by hand: finished LoRAs and prompts are nobody's parameters."""
    config = llama(4) if kind == "llama" else base_model("t5").config
    refuses, options = METHODS[method].refuses, dict(SOURCES.get(method, {}))
    if kind == "t5" and "encoder_decoder" in refuses:
        pytest.skip(refuses["encoder_decoder"])
    if "loras" in options:
        block = "model.layers.{}.self_attn.q_proj" if kind == "llama" else "encoder.block.{}.layer.0.SelfAttention.q"
        options["target_modules"] = [block.format(i) for i in range(4 if kind == "llama" else config.num_layers)]
    own = Workload(config, adapter_config(method, options, TASKS, config), torch.bfloat16, torch.bfloat16,
                   prompt=24, answer=6, checkpointing="gradient_checkpointing" not in refuses)  # fmt: skip
    found, plain = inventory(own), inventory(replace(own, adapter=adapter_config("lora", {}, TASKS, config)))
    assert found.num_trainable > 0
    tracer = Tracer(own)
    assert 0 < tracer.value(1, lambda t: t.saved) < tracer.value(2, lambda t: t.saved)
    if method in SOURCES:
        a_map = 5 * (2 * config.hidden_size * 2 + 8)  # A and B of five ranks, and which LoRA a rank is of
        prompts = 2 * 4 * config.hidden_size * 4
        expected = a_map * len(options["target_modules"]) if "loras" in options else prompts
        assert found.buffers - plain.buffers == expected


def run(capsys: Any, *words: str) -> tuple[int, str, str]:
    code = plan.main(words)
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_command(capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    code, out, _ = run(capsys, "llama2_7b_glue", "--gpus", "4", "--gpu", "a100-80gb", "--json", str(path))
    assert code == 0
    assert "6,738,415,616 parameters" in out
    assert out.rstrip().splitlines()[-1].startswith("deepspeed --num_gpus 4 launch/train.py --ds_config ds_configs/")
    content = json.loads(path.read_text())
    assert content["parameters"]["frozen"] == 6_738_415_616
    chosen = content["recommended"]
    assert chosen["sizes"]["micro"] * chosen["sizes"]["accumulation"] * 4 == 32
    weights = chosen["memory"]["device"]["weights"]
    table, rotary = 8 * 224 * 8, 2 * 64 * 4  # the rank of each task and map, and the positions' frequencies
    assert weights == 2 * (6_738_415_616 + content["parameters"]["trainable"]) + table + rotary
    rows = sum(training_rows()[task.name] for task in resolve_tasks(None, ["glue"], None))
    assert content["job"]["steps"] == -(-5 * rows // 32)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["llama2_7b_gleu"], "did you mean 'llama2_7b_glue'"),
        (["llama2_7b_glue", "--gpu", "a100-80"], "did you mean 'a100-80gb'"),
        (["llama2_7b_glue", "--ds_config", "ds_configs/zero4.json"], "does not exist"),
        (["llama2_7b_glue", "--gpus", "3", "--nodes", "2"], "spread evenly"),
        (["llama2_7b_glue", "--gpus", "3"], "does not divide"),
        (["llama2_7b_glue", "--model", "./nowhere"], "shapes known offline"),
        (["llama2_7b_glue", "--method", "mole"], "mole needs the LoRAs that it mixes"),
        (["llama2_7b_glue", "--method", "poly", "--gradient_checkpointing"], "poly does not go with"),
        (["llama2_7b_glue", "--method", "adalora", "--ds_config", "ds_configs/zero3.json"], "does not go with ZeRO-3"),
        (["llama2_7b_glue", "--adapter.target_modules", "[nothing]"], "linear maps of this model"),
    ],
)
def test_mistakes_are_one_line(capsys: Any, words: list[str], part: str) -> None:
    code, _, err = run(capsys, *words)
    assert code == 2
    assert part in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.slow
def test_what_does_not_fit_names_what_does(capsys: Any) -> None:
    words = ["--gpu", "rtx-4090", "--ds_config", "ds_configs/zero2.json"]
    code, _, err = run(capsys, "llama2_13b_glue", *words)
    assert code == 2
    assert "does not fit 1 x rtx-4090" in err
    assert "it fits with --quantization 4bit" in err


@pytest.mark.slow
def test_a_slurm_script_runs_the_plan(capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "job.sbatch"
    code, _, _ = run(capsys, "t5_base_glue", "--gpus", "2", "--gpu", "rtx-4090", "--slurm", str(path))
    assert code == 0
    assert "--recipe t5_base_glue" in path.read_text()
    assert "--per_device_train_batch_size 16" in path.read_text()


@pytest.fixture
def scaled(tmp_path: Path) -> Any:
    """Plans a small recipe, whose weights are gathered, for several numbers of GPUs."""
    (tmp_path / "llama").mkdir()
    llama(2, hidden_size=1024, intermediate_size=2048).save_pretrained(tmp_path / "llama")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tmp_path}/llama\nsuite: [glue]\ntrain_batch_size: 16\nmax_steps: 10\n")
    return lambda *flags: plan.main([str(recipe), "--gpu", "a100-80gb", "--gpus", "8,16,64", *flags])


def test_scaling_keeps_the_work_of_a_gpu(scaled: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaled("--json", str(tmp_path / "scaled.json")) == 0
    found = {Path(path).stem: own for path, own in json.loads((tmp_path / "scaled.json").read_text()).items()}
    assert sorted(found) == ["zero2", "zero2_offload", "zero3", "zero3_hpz", "zero3_offload"]
    for own in found.values():
        assert [one["sizes"]["world"] for one in own] == [8, 16, 64]
        assert [one["sizes"]["total"] for one in own] == [16, 32, 128]
        assert len({one["time"]["compute"] for one in own}) == 1
    plain, copied = found["zero3"], found["zero3_hpz"]
    assert plain[0]["time"] == copied[0]["time"], "one node needs no copy"
    assert copied[2]["time"]["gathers"] == copied[0]["time"]["gathers"] < plain[1]["time"]["gathers"]
    in_eight, in_many = (plain[i]["memory"]["device"]["weights"] for i in (0, 2))
    eighth = (in_eight - in_many) / (1 / 8 - 1 / 64) / 8
    assert copied[2]["memory"]["device"]["weights"] == in_many
    assert copied[2]["memory"]["device"]["copy inside the node"] == pytest.approx(eighth, rel=0.1)
    text = capsys.readouterr().out
    assert text.count("communication takes more than 50% of a step") == 5
    assert "of the first %" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gpus", "8,4"), "have to ascend"),
        (("--gpus", "8,13"), "--gpus 13 do not spread evenly"),
        (("--gpus", "8,x"), "'x' is not a positive number"),
        (("--brief",), "--brief: of a plan for one number of GPUs"),
        (("--nodes", "2"), "--nodes: of a plan for one number of GPUs"),
    ],
)
def test_scaling_refuses_what_it_cannot_plan(
    scaled: Any, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scaled(*flags) == 2
    assert message in capsys.readouterr().err


def test_weights_sent_in_8_bits_are_a_quarter_of_float32() -> None:
    own = workload(llama(2))
    plain, quantised = (
        received(inventory(own), own, Setting({"zero_optimization": {"stage": 3, **more}}, 2), 1)
        for more in ({}, {"zero_quantized_weights": True})
    )
    assert quantised["weights"] * 4 == pytest.approx(plain["weights"])
    assert quantised["adapter"] == plain["adapter"]
