"""DeepSpeed engines around a one-layer model, in every way of sharding, and what is in them."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from peft import get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from more_ds import MoreConfig
from more_ds.config import RunConfig
from more_ds.ds_config import batch_sizes, resolve
from more_ds.engine import Ranks, set_learning_rate, start
from more_ds.optimizer_state import MASTER, NamedState
from more_ds.optimizers import MOMENTS
from more_ds.trained import find_trained
from more_ds.tuners.more import MoreLinear

SHIPPED = Path(__file__).parents[1] / "ds_configs"
SETUPS = {
    "zero0 fp32": {"stage": 0},
    "zero0 bf16": {"stage": 0},
    "zero1 fp32": {"stage": 1},
    "zero1 bf16": {"stage": 1},  # DeepSpeed's BF16_Optimizer
    "zero2 fp32": "zero2.json",
    "zero2 bf16": "zero2.json",
    "zero2_offload fp32": "zero2_offload.json",
    "zero3 fp32": "zero3.json",
    "zero3 bf16": "zero3.json",
    "zero3_partitioned fp32": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero3_offload bf16": "zero3_offload.json",
    "zero3_hpz fp32": {"stage": 3, "stage3_param_persistence_threshold": 0, "zero_hpz_partition_size": 2},
}


def engine(ranks: Ranks, setup: str, folder: Path, seed: int = 0, optim: Any = "adamw_torch", **adapter: Any) -> Any:
    """A one-layer LLaMA with two adapted maps, whose sizes do not divide by two, in a DeepSpeed engine."""
    zero, dtype = SETUPS[setup], setup.split()[1]
    path = SHIPPED / zero if isinstance(zero, str) else folder / f"ds-{ranks.rank}.json"
    if not isinstance(zero, str):
        path.write_text(json.dumps({"zero_optimization": zero}))
    config = RunConfig(train_batch_size=4, learning_rate=1e-2, optim=optim)
    ds_config = resolve(str(path), config, batch_sizes(config, ranks.world), dtype)
    if setup == "zero0 bf16":
        ds_config.pop("data_types", None)  # DeepSpeed without ZeRO sums gradients in the model's type only
    model = get_peft_model(base(dtype), adapter_config(seed, **adapter))
    return start(model, config, ds_config, ranks)


def base(dtype: str = "fp32") -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {"hidden_size": 14, "intermediate_size": 9, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, pad_token_id=0, max_position_embeddings=16, **sizes))
    return model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])


def adapter_config(seed: int = 0, **switches: Any) -> MoreConfig:
    torch.manual_seed(seed)
    given = {"r": 3, "num_tasks": 3, "task_dim": 5, "lora_dropout": 0.2, "target_modules": ["q_proj", "down_proj"]}
    return MoreConfig(lora_alpha=8, task_type="CAUSAL_LM", **{**given, **switches})


def batch(step: int, slot: int, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + slot)
    ids, tasks = torch.randint(3, 20, (size, 6), generator=generator), torch.full((size,), (step + slot) % 3)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "task_ids": tasks}


def train(module: Any, ranks: Ranks, steps: range) -> None:
    module.train()
    for step in steps:
        set_learning_rate(module, 1e-2 / (1 + step))
        torch.manual_seed(1000 * step + ranks.rank)  # of dropout
        inputs = batch(step, ranks.rank, 4 // ranks.world)
        module.backward(module(**inputs, labels=inputs["input_ids"]).loss)
        module.step()


def numbers(module: Any) -> dict[str, str]:
    """A hash of the bytes of every master value and moment, and what else an optimizer counts."""
    state = NamedState(module, find_trained(module.module).parameters)
    found = {f"{kind} {name}": t for kind in (MASTER, *state.moments) for name, t in state.gather(kind).items()}
    return {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in found.items()} | {
        "step": str(state.step())
    }


@contextmanager
def no_pickle() -> Iterator[None]:
    """Make every way to unpickle an error."""
    forbidden = mock.Mock(side_effect=AssertionError("something was unpickled"))
    everywhere = mock.patch.multiple(pickle, loads=forbidden, load=forbidden, Unpickler=forbidden)
    with everywhere, mock.patch.object(torch, "load", forbidden):
        yield


def deepspeeds_own(module: Any, setup: str) -> dict[str, Tensor]:
    """Master values and moments by DeepSpeed's public functions: an oracle for engines with ZeRO.

    In stages 1 and 2 they know the moments of the optimizer's first group alone (deepspeed 0.19.8).
    """
    found: dict[str, Tensor] = {}
    for name, p in module.module.named_parameters():
        if not p.requires_grad or setup.startswith("zero0"):
            continue
        saved, shape = name.replace(".default", ""), getattr(p, "ds_shape", p.shape)
        found[f"{MASTER}.{saved}"] = safe_get_full_fp32_param(p).reshape(shape)
        if setup.startswith("zero3") or setup == "zero1 bf16" or not name.endswith("bias"):
            found |= {f"{kind}.{saved}": safe_get_full_optimizer_state(p, kind).reshape(shape) for kind in MOMENTS}
    return found


def choose_rank_three(module: Any) -> None:
    """Turn the gates after the last forward pass, as an optimizer step may: the tables are behind."""
    state = NamedState(module, find_trained(module.module).parameters)
    values = state.gather(MASTER)
    for name in values:
        if name.endswith("more_gate.bias"):
            values[name] += torch.tensor([0.0, 0.0, 50.0])
    state.set(MASTER, values)
    for layer in module.module.modules():
        if isinstance(layer, MoreLinear):
            layer.stale = dict.fromkeys(layer.stale, True)  # as a forward pass in training leaves it
