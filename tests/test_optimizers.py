"""Optimizers of bitsandbytes: what they compute, and checkpoints of what they keep, one and two ranks (15 s)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise
from distributed import run_ranks
from safetensors.torch import load_file
from tiny_engines import engine, numbers, train
from torch import Tensor

from launch import train as command
from more_ds import checkpoint
from more_ds.checkpoint_files import OPTIMIZER
from more_ds.config import RunConfig
from more_ds.engine import Ranks
from more_ds.errors import UserError
from more_ds.optimizer_state import MASTER, NamedState
from more_ds.optimizers import BITSANDBYTES, BLOCK, MOMENTS, SCALES, make, moments_of
from more_ds.plan_checks import check_paged
from more_ds.planner.memory import Inventory, Setting, checkpoint_bytes, states
from more_ds.planner.search import shipped
from more_ds.trained import find_trained

RANK = 300
"""At which some maps have enough values for codes of 8 bits and others have not, without ZeRO."""
GAP = 0.02
"""Most of a block's scale that lies between two codes of bitsandbytes' signed map, and a margin."""


def trained(name: str, steps: int, size: int = 5000) -> tuple[Any, Tensor]:
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(size, generator=generator))
    optimizer = make(name, [{"params": [p], "weight_decay": 0.1}], fused=False, lr=0.01, betas=(0.9, 0.99), eps=1e-3)
    for _ in range(steps):
        p.grad = torch.randn(size, generator=generator)
        optimizer.step()
    return optimizer, p


@pytest.mark.parametrize("name", BITSANDBYTES)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_the_first_step_is_torchs(name: str) -> None:
    """Before any moment is rounded: weight decay, bias correction and epsilon."""
    torch.testing.assert_close(trained(name, 1)[1], trained("adamw_torch", 1)[1], rtol=1e-5, atol=1e-6)


def test_later_steps_are_torchs_up_to_the_rounding() -> None:
    exact, rounded = (trained(name, 5)[1].detach() for name in ("adamw_torch", "adamw_bnb_8bit"))
    moved = (exact - trained("adamw_torch", 0)[1].detach()).norm()
    assert 0 < (rounded - exact).norm() < 0.05 * moved


def test_moments_and_codes_come_back_to_the_bit() -> None:
    source, p = trained("adamw_bnb_8bit", 3)
    state = source.state[p]
    assert state["state1"].dtype == torch.uint8
    other, q = trained("adamw_bnb_8bit", 0)
    here, there = moments_of(source), moments_of(other)
    assert here.kinds == (*SCALES, *MOMENTS)
    assert here.read(p, "exp_avg") is not None
    assert there.read(q, "exp_avg") is None
    for number, kind in enumerate(MOMENTS, 1):
        parts = (state[f"state{number}"], state[f"absmax{number}"], state[f"qmap{number}"])
        theirs = dequantize_blockwise(parts[0], absmax=parts[1], code=parts[2], blocksize=BLOCK)
        assert torch.equal(here.read(p, kind), theirs)  # type: ignore[arg-type]
    there.begin(q, 3)
    for kind in here.kinds:
        there.write(q, kind, here.read(p, kind))  # type: ignore[arg-type]
    for key, value in state.items():
        assert torch.equal(torch.as_tensor(other.state[q][key]), torch.as_tensor(value)), key


def test_blocks_of_zeros_are_read_as_zeros() -> None:
    optimizer, p = trained("adamw_bnb_8bit", 1)
    for number, kind in enumerate(MOMENTS, 1):
        optimizer.state[p][f"absmax{number}"].zero_()
        read = moments_of(optimizer).read(p, kind)
        assert read is not None
        assert torch.equal(read.view(torch.int32), torch.zeros(len(p), dtype=torch.int32))


def train_save_train_resume(ranks: Ranks, setup: str, optim: str, folder: Path) -> dict[str, Any]:
    unbroken = engine(ranks, setup, folder, optim=optim, r=RANK)
    train(unbroken, ranks, range(3))
    path = checkpoint.save(folder, unbroken, 3, {})
    at_save = numbers(unbroken)
    train(unbroken, ranks, range(3, 6))
    resumed = engine(ranks, setup, folder, seed=7, optim=optim, r=RANK)
    checkpoint.load(path, resumed)
    loaded = numbers(resumed)
    train(resumed, ranks, range(3, 6))
    state = unbroken.basic_optimizer.state.values()
    kept = {s["state1"].dtype for s in state}
    return {"at_save": at_save, "loaded": loaded, "unbroken": numbers(unbroken), "resumed": numbers(resumed),
            "kept": kept}  # fmt: skip


@pytest.mark.parametrize(
    ("setup", "optim"),
    [
        ("zero0 fp32", "adamw_bnb_8bit"),
        ("zero0 bf16", "adamw_bnb_8bit"),
        ("zero1 bf16", "adamw_bnb_8bit"),
        ("zero2 fp32", "adamw_bnb_8bit"),
        ("zero2_offload fp32", "adamw_bnb_8bit"),
        ("zero3_partitioned fp32", "adamw_bnb_8bit"),
        ("zero3_offload bf16", "adamw_bnb_8bit"),
        ("zero2 fp32", "paged_adamw_32bit"),
    ],
)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(setup: str, optim: str, tmp_path: Path) -> None:
    for result in run_ranks(train_save_train_resume, 2, setup, optim, tmp_path):
        assert result["loaded"] == result["at_save"]
        assert result["resumed"] == result["unbroken"] != result["loaded"]
        assert (torch.uint8 in result["kept"]) == (optim == "adamw_bnb_8bit")


def save(ranks: Ranks, setup: str, folder: Path) -> None:
    module = engine(ranks, setup, folder, optim="adamw_bnb_8bit", r=RANK)
    train(module, ranks, range(3))
    checkpoint.save(folder, module, 3, {})


def load(ranks: Ranks, setup: str, path: Path, folder: Path) -> dict[str, Any]:
    module = engine(ranks, setup, folder, seed=7, optim="adamw_bnb_8bit", r=RANK)
    checkpoint.load(path, module)
    state = NamedState(module, find_trained(module.module).parameters)
    return {f"{kind}.{name}": t.numpy() for kind in (MASTER, *MOMENTS) for name, t in state.gather(kind).items()}


@pytest.mark.parametrize(("setup", "world"), [("zero3 fp32", 1), ("zero0 fp32", 2)])
def test_other_blocks_round_again_within_their_scale(setup: str, world: int, tmp_path: Path) -> None:
    run_ranks(save, 2, "zero2 fp32", tmp_path)
    path = tmp_path / "step-00000003"
    saved = load_file(path / OPTIMIZER)
    for found in run_ranks(load, world, setup, path, tmp_path):
        for kind, scale in zip(MOMENTS, SCALES, strict=True):
            largest = max(float(value.max()) for name, value in saved.items() if name.startswith(scale))
            for name, value in saved.items():
                if name.startswith(f"{kind}."):
                    assert (torch.from_numpy(found[name]) - value).abs().max() <= GAP * largest, name


def test_what_cannot_work_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["--output_dir", str(tmp_path / "run"), "--dry_run", "--optim"]
    for given, words in (
        ("paged_adamw_8bit", "makes room on a GPU, and there is none; use --optim adamw_bnb_8bit"),
        ("paged_adamw_32bit", "use --optim adamw_torch"),
        ("adamw_8bit", "use one of adamw_torch, adamw_bnb_8bit"),
    ):
        assert command.main([*argv, given]) == 2
        assert words in capsys.readouterr().err
    offloads = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(UserError, match="keeps its state in host memory; use --optim adamw_bnb_8bit"):
        check_paged("paged_adamw_8bit", offloads, on_gpu=True)
    check_paged("adamw_bnb_8bit", offloads, on_gpu=False)
    check_paged("paged_adamw_8bit", {"zero_optimization": {"stage": 3}}, on_gpu=True)
    assert [Path(path).name for path in shipped(RunConfig(optim="paged_adamw_8bit"))] == ["zero2.json", "zero3.json"]


def test_the_planners_bytes_are_those_that_the_optimizer_holds() -> None:
    """By hand for two ranks; and for one tensor as it lies in memory."""
    optimizer, p = trained("adamw_bnb_8bit", 1, 5120)
    state = optimizer.state[p]
    held = sum(state[name].nbytes for name in ("state1", "state2", "absmax1", "absmax2"))
    parameters = Inventory(np.array([5120.0, 1000.0]), np.array([0.0]), np.array([False]), {})
    model: Any = SimpleNamespace(adapter_dtype=torch.float32, dtype=torch.float32)
    whole = states(parameters, model, Setting({}, 1, optim="adamw_bnb_8bit")).device["optimizer"]
    assert whole == held + 8 * 1000
    zero = {"zero_optimization": {"stage": 2}}
    parts = states(parameters, model, Setting(zero, 2, optim="paged_adamw_8bit")).device["optimizer"]
    assert parts == 6120 * (4 + 2 + 8 / 256) / 2
    assert checkpoint_bytes(parameters, "adamw_bnb_8bit") == 6120 * 20
    assert checkpoint_bytes(parameters, "paged_adamw_32bit") == 6120 * 12
