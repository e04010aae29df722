"""What ranks send each other in a step: as much as the planner says, and of frozen weights their values alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import deepspeed.comm.comm
import numpy as np
import pytest
import torch
from deepspeed.utils import z3_leaf_module
from distributed import run_ranks
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from more_ds import MoreConfig
from more_ds.config import RunConfig
from more_ds.ds_config import batch_sizes, resolve
from more_ds.engine import Ranks, start, step
from more_ds.planner.memory import Setting, inventory
from more_ds.planner.timing import received
from more_ds.planner.trace import Workload

SHAPE = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, pad_token_id=0,
    max_position_embeddings=16,
)  # fmt: skip
ADAPTER = {"r": 4, "num_tasks": 3, "task_dim": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
CALLS = (
    "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "all_reduce", "all_reduce_coalesced", "all_to_all",
    "all_to_all_single", "broadcast", "reduce", "reduce_scatter", "reduce_scatter_tensor",
)  # fmt: skip
STAGE_3 = {
    "stage": 3, "stage3_param_persistence_threshold": 500, "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}  # fmt: skip  # nothing is kept for the backward pass


def engine_of(base: Any, ranks: Ranks, zero: dict[str, Any], folder: Path, accumulation: int = 1) -> Any:
    """A model with a MoRE adapter in an engine, on nodes of two ranks."""
    path = folder / f"ds-{ranks.rank}.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    config = RunConfig(train_batch_size=ranks.world * accumulation, gradient_accumulation_steps=accumulation)
    ds_config = resolve(str(path), config, batch_sizes(config, ranks.world), "fp32", per_node=2)
    return start(get_peft_model(base, MoreConfig(**ADAPTER)), config, ds_config, ranks)


def values_by_call(ranks: Ranks, zero: dict[str, Any], folder: Path, accumulation: int) -> Counter[tuple[str, int]]:
    """Values of the whole tensors in the collectives of the third step, by call and size of the group."""
    torch.manual_seed(0)
    engine = engine_of(LlamaForCausalLM(SHAPE), ranks, zero, folder, accumulation)
    seen: Counter[tuple[str, int]] = Counter()
    backend: Any = deepspeed.comm.comm.cdb
    for name in CALLS:
        if hasattr(backend, name):
            setattr(backend, name, _counted(name, getattr(backend, name), seen))
    engine.train()
    for number in range(3):
        seen.clear()
        for _ in range(accumulation):
            ids = torch.randint(3, 64, (1, 9), generator=torch.Generator().manual_seed(number))
            engine.backward(engine(input_ids=ids, labels=ids, task_ids=torch.tensor([number % 3])).loss)
            step(engine)
    return seen


def _counted(name: str, call: Any, seen: Counter[tuple[str, int]]) -> Any:
    def counted(*arguments: Any, **options: Any) -> Any:
        given = [*arguments, *options.values()]
        tensors = [t for one in given for t in (one if isinstance(one, list) else [one]) if isinstance(t, torch.Tensor)]
        seen[name, torch.distributed.get_world_size(options.get("group"))] += max(t.numel() for t in tensors)
        return call(*arguments, **options)

    return counted


def planned(zero: dict[str, Any], world: int, accumulation: int) -> tuple[dict[str, float], int]:
    """Values that the planner counts, and how many are trained."""
    workload = Workload(SHAPE, MoreConfig(**ADAPTER), torch.float32, torch.float32, 8, 1)
    parameters = inventory(workload)
    volumes = received(parameters, workload, Setting({"zero_optimization": zero}, world), accumulation)
    return {name: volume / 4 for name, volume in volumes.items()}, parameters.num_trainable


@pytest.mark.parametrize(("stage", "accumulation"), [(0, 2), (2, 1), (2, 2)])
def test_whole_weights_are_not_sent(stage: int, accumulation: int, tmp_path: Path) -> None:
    """Stages 0 to 2: the adapter's gradients alone, and in stage 2 its new values."""
    zero = {"stage": stage}
    seen = run_ranks(values_by_call, 2, zero, tmp_path, accumulation)[0]
    volumes, trained = planned(zero, 2, accumulation)
    assert volumes["weights"] == 0
    assert trained < 2000, "so few that frozen weights would be seen"
    # An all-reduce of stage 0 carries what a reduction and a gathering do together.
    sent = seen.total() + (seen["all_reduce", 2] if stage == 0 else 0)
    assert volumes["adapter"] <= sent <= volumes["adapter"] + 4  # the gradient's norm


@pytest.mark.parametrize("accumulation", [1, 2])
def test_frozen_weights_are_gathered_twice_and_never_reduced(accumulation: int, tmp_path: Path) -> None:
    seen = run_ranks(values_by_call, 2, STAGE_3, tmp_path, accumulation)[0]
    volumes, trained = planned(STAGE_3, 2, accumulation)
    reduced = sum(count for (name, _), count in seen.items() if "gather" not in name)
    assert trained * accumulation <= reduced <= trained * accumulation + 4
    gathered = sum(count for (name, _), count in seen.items() if "gather" in name) - trained
    # The embedding has no backward pass, and what forward ends with backward begins with.
    once = 2 * 64 * 32 + 96 * 32
    assert volumes["weights"] - accumulation * once <= gathered <= volumes["weights"]


def leaves(ranks: Ranks, folder: Path) -> list[str]:
    """The classes of the modules whose parameters ZeRO-3 gathers at once, of a model with routed experts."""
    sizes = {"num_hidden_layers": 2, "num_local_experts": 4, "num_key_value_heads": 2, "num_attention_heads": 2}
    base = MixtralForCausalLM(MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=24, **sizes))
    engine = engine_of(base, ranks, STAGE_3, folder)
    return [type(module).__name__ for module in engine.module.modules() if z3_leaf_module(module)]


def test_routed_blocks_are_gathered_as_one(tmp_path: Path) -> None:
    """Else ranks whose tokens take other experts would gather other parameters."""
    assert run_ranks(leaves, 2, tmp_path) == [["MixtralSparseMoeBlock"] * 2] * 2


def test_a_copy_inside_the_node_keeps_frozen_weights_off_the_network(tmp_path: Path) -> None:
    """Two nodes of two ranks: after the first step the adapter alone passes between them."""
    zero = STAGE_3 | {"zero_hpz_partition_size": "auto"}
    plain = run_ranks(values_by_call, 4, STAGE_3, tmp_path, 1)[0]
    copied = run_ranks(values_by_call, 4, zero, tmp_path, 1)[0]
    _, trained = planned(STAGE_3, 4, 1)
    frozen = sum(np.prod(p.shape) for p in LlamaForCausalLM(SHAPE).parameters())
    assert plain["all_gather_into_tensor", 4] > 1.5 * frozen
    assert copied["all_gather_into_tensor", 2] > 1.5 * frozen
    assert copied["all_gather_into_tensor", 4] < 1.2 * trained + 200
