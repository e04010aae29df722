"""Checkpoints of real engines, one and two ranks: every ZeRO stage, float32 and bfloat16, saved in one and loaded in
another (50 s)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig
from distributed import run_ranks
from peft import PeftModel
from safetensors.torch import load_file
from tiny_engines import SETUPS, base, batch, choose_rank_three, deepspeeds_own, engine, no_pickle, numbers, train
from torch import Tensor

from more_ds import checkpoint
from more_ds.checkpoint_files import ADAPTER, ADAPTER_CONFIG, FILES, MANIFEST, OPTIMIZER, STATE
from more_ds.engine import Ranks
from more_ds.errors import TrainingError, UserError
from more_ds.optimizer_state import MASTER, loss_scale, set_loss_scale
from more_ds.trained import find_trained


def train_take_train_write_resume(ranks: Ranks, setup: str, folder: Path) -> dict[str, Any]:
    unbroken = engine(ranks, setup, folder)
    train(unbroken, ranks, range(3))
    counted = {"sampler": {"next": 12}, "best": None}
    with no_pickle():
        snapshot = checkpoint.take(unbroken, 3, counted)
    oracle = {name: t.cpu().clone() for name, t in deepspeeds_own(unbroken, setup).items()}
    at_save = numbers(unbroken)
    train(unbroken, ranks, range(3, 6))  # nothing of it may be in the snapshot
    counted["sampler"]["next"] = 24
    if ranks.rank == 0:
        snapshot.write(folder)
    ranks.barrier()
    path = folder / "step-00000003"
    written = {f"{MASTER}.{name}": t for name, t in load_file(path / ADAPTER).items()} | load_file(path / OPTIMIZER)
    unlike = [name for name, t in oracle.items() if not torch.equal(t, written[name])]

    resumed = engine(ranks, setup, folder, seed=7)
    different = numbers(resumed) != at_save
    with no_pickle():
        state = checkpoint.load(path, resumed)
    loaded = numbers(resumed)
    train(resumed, ranks, range(3, 6))
    at_end = numbers(unbroken)
    checkpoint.load(path, unbroken)  # the same engine taken back: what it holds whole must not outlive the load
    train(unbroken, ranks, range(3, 6))
    return {
        "oracle": len(oracle), "unlike": unlike, "different": different, "state": state, "at_save": at_save,
        "loaded": loaded, "unbroken": at_end, "resumed": numbers(resumed), "taken_back": numbers(unbroken),
        "counted": resumed.global_steps,
    }  # fmt: skip


@pytest.mark.parametrize("setup", SETUPS)
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(setup: str, tmp_path: Path) -> None:
    for result in run_ranks(train_take_train_write_resume, 2, setup, tmp_path):
        assert result["different"]
        assert result["loaded"] == result["at_save"]
        # DeepSpeed's optimizer for bfloat16 without ZeRO begins with a step of its own, of gradient zero.
        assert int(result["at_save"]["step"]) == (4 if setup == "zero0 bf16" else 3)
        assert result["resumed"] == result["taken_back"] == result["unbroken"] != result["loaded"]
        assert result["unlike"] == []
        assert result["oracle"] == 0 if setup.startswith("zero0") else result["oracle"] >= 26
        assert result["state"] == {"sampler": {"next": 12}, "best": None}
        assert result["counted"] == 6
    assert sorted(path.name for path in (tmp_path / "step-00000003").iterdir()) == sorted([*FILES, MANIFEST])


def train_and_save(ranks: Ranks, setup: str, folder: Path, logits_of: dict[str, Tensor] | None = None) -> Any:
    module = engine(ranks, setup, folder)
    train(module, ranks, range(3))
    choose_rank_three(module)
    checkpoint.save(folder, module, 3, {})
    checkpoint.save_adapter(folder / "best", module)
    hashes = numbers(module)
    module.eval()
    with torch.no_grad():
        return hashes, None if logits_of is None else module(**logits_of).logits.float().numpy()


def load_and_look(ranks: Ranks, path: Path, setup: str, folder: Path) -> tuple[dict[str, str], list[str]]:
    module = engine(ranks, setup, folder, seed=7)
    checkpoint.load(path, module)
    hashes, saved = numbers(module), load_file(path / ADAPTER)
    computes_with = find_trained(module.module)
    stale = []
    with checkpoint.gathered(p for p in computes_with.parameters.values() if p.numel() == 0):
        for name, live in (computes_with.parameters | computes_with.buffers).items():
            if not torch.equal(live.detach(), saved[name].to(live.dtype)):
                stale.append(name)
    train(module, ranks, range(3, 4))
    return hashes, stale


@pytest.mark.parametrize(
    ("saver", "loaders"),
    [
        (("zero2 bf16", 2), [("zero3 bf16", 1), ("zero1 bf16", 1), ("zero0 bf16", 2)]),
        (("zero3_partitioned fp32", 2), [("zero0 fp32", 1), ("zero2_offload fp32", 2), ("zero3_offload bf16", 2)]),
        (("zero0 fp32", 1), [("zero3_partitioned fp32", 2), ("zero2 fp32", 2)]),
    ],
)
def test_a_checkpoint_fits_another_world_and_stage(saver: Any, loaders: Any, tmp_path: Path) -> None:
    (setup, world), path = saver, tmp_path / "step-00000003"
    saved, _ = run_ranks(train_and_save, world, setup, tmp_path)[0]
    for other, ranks in loaders:
        for loaded, stale in run_ranks(load_and_look, ranks, path, other, tmp_path):
            assert loaded == saved, other
            assert stale == [], other


@pytest.mark.parametrize(
    ("setup", "world", "backend"),
    [("zero2 fp32", 1, "fused"), ("zero3_partitioned fp32", 2, "reference"), ("zero3 bf16", 2, "eager")],
)
def test_peft_loads_the_adapter_and_computes_the_same(setup: str, world: int, backend: str, tmp_path: Path) -> None:
    """To the bit, with the back-end that the run had: what ZeRO-3 leaves to each."""
    inputs = batch(50, 0, 3) | {"task_ids": torch.arange(3)}
    live = torch.from_numpy(run_ranks(train_and_save, world, setup, tmp_path, inputs)[0][1])
    for folder in (tmp_path / "step-00000003", tmp_path / "best"):
        model = PeftModel.from_pretrained(base(setup.split()[1]), str(folder), autocast_adapter_dtype=False).eval()
        model.peft_config["default"].backend = backend
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits.float(), live)
            with model.disable_adapter():
                assert not torch.equal(model(**inputs).logits.float(), live)
        saved = load_file(folder / ADAPTER)
        assert [t.tolist() for name, t in saved.items() if name.endswith("more_ranks")] == [[3, 3, 3]] * 2
        assert all(t.numel() > 0 for t in saved.values())
        assert {t.dtype for t in saved.values()} == {torch.float32, torch.int64}
        assert not [name for name in saved if "embed" in name or "base_layer" in name]
        assert json.loads((folder / ADAPTER_CONFIG).read_text())["num_tasks"] == 3


def refusals(ranks: Ranks, path: Path, folder: Path) -> list[str]:
    messages = []

    def attempt(expected: type[Exception], action: Any) -> None:
        with pytest.raises(expected) as caught:
            action()
        messages.append(str(caught.value))

    other = engine(ranks, "zero2 fp32", folder, r=2)
    attempt(UserError, lambda: checkpoint.load(path, other))
    wider = engine(ranks, "zero2 fp32", folder, target_modules=["q_proj", "v_proj", "down_proj"])
    attempt(UserError, lambda: checkpoint.load(path, wider))
    frozen = engine(ranks, "zero3 fp32", folder, gate="frozen")
    attempt(UserError, lambda: checkpoint.load(path, frozen))
    module = engine(ranks, "zero3 fp32", folder)
    attempt(UserError, lambda: checkpoint.load(folder / "nowhere", module))
    attempt(TrainingError, lambda: checkpoint.save(folder, module, 4, {"best": float("nan")}))
    full = OSError(28, "No space left on device")
    with mock.patch("os.replace", side_effect=full):
        attempt(TrainingError, lambda: checkpoint.save(folder, module, 5, {}))
        attempt(TrainingError, lambda: checkpoint.save_adapter(folder / "best", module))
    owner = module.optimizer.fp32_partitioned_groups_flat[0]
    owner.data[0] = float("nan")
    attempt(TrainingError, lambda: checkpoint.save(folder, module, 6, {}))
    with mock.patch("more_ds.optimizer_state._locate", return_value=None):
        attempt(UserError, lambda: checkpoint.adapter_tensors(module))
    module._config.zero_config.offload_optimizer = {"device": "nvme", "ratio": 0.5}
    attempt(UserError, lambda: checkpoint.adapter_tensors(module))
    module.module.base_model.model.lm_head.weight.requires_grad_(True)
    attempt(UserError, lambda: checkpoint.adapter_tensors(module))
    return messages


def test_what_cannot_be_saved_or_loaded_is_refused_on_every_rank(tmp_path: Path) -> None:
    run_ranks(train_and_save, 1, "zero0 fp32", tmp_path)
    path = tmp_path / "step-00000003"
    first, second = run_ranks(refusals, 2, path, tmp_path)
    assert first == second
    expected = [r"is \(3, 14\) and \(2, 14\) in the model", "lacks 6 tensors, e.g. .*v_proj"]
    expected += ["optimizer.* has in addition 8 tensors", "no checkpoint at .*nowhere", "not JSON compliant"]
    expected += ["No space left", "No space left", "not finite", "the ranks hold 0 of its 42 elements"]
    expected += [r"offload_optimizer.device is nvme and offload_optimizer.ratio is 0.5", "not part of the adapter"]
    for message, pattern in zip(first, expected, strict=True):
        assert re.search(pattern, message), message
    assert checkpoint.newest_complete(tmp_path) == path
    assert json.loads((path / STATE).read_text())["step"] == 3


def test_the_counters_of_a_dynamic_loss_scale_are_carried_over() -> None:
    """DeepSpeed has two kinds of them; neither trains on a CPU."""
    scale = {"init_scale": 2.0**16, "scale_window": 2, "min_scale": 1.0, "delayed_shift": 2}
    moved, fresh = (DynamicLossScaler(**scale, consecutive_hysteresis=False) for _ in range(2))
    with mock.patch("deepspeed.comm.get_rank", return_value=0):  # it logs
        for overflow in (False, True, True, False):
            moved.update_scale(overflow)
    counters = loss_scale(SimpleNamespace(loss_scaler=moved))
    assert counters == {"cur_scale": 2.0**15, "cur_iter": 4, "last_overflow_iter": 2, "cur_hysteresis": 1}
    set_loss_scale(SimpleNamespace(loss_scaler=fresh), json.loads(json.dumps(counters)))
    assert vars(fresh) == vars(moved)

    plain = LossScaleConfig(torch.float16, True, 1.0, None)
    set_loss_scale(SimpleNamespace(loss_scale_config=plain), counters)
    assert (plain.cur_scale, plain.cur_iter, plain.last_overflow_iter) == (2.0**15, 4, 2)
    set_loss_scale(SimpleNamespace(), counters)
    assert loss_scale(SimpleNamespace(loss_scale_config=LossScaleConfig(torch.bfloat16, False, 1.0, None))) == {}


def keep_one(ranks: Ranks, folder: Path) -> list[str]:
    module = engine(ranks, "zero2 fp32", folder)
    first = checkpoint.save(folder, module, 0, {})
    checkpoint.load(first, module)
    for step in (1, 2, 3):
        train(module, ranks, range(step - 1, step))
        checkpoint.save(folder, module, step, {}, keep=1, protect=[first])
    return sorted(path.name for path in folder.glob("step-*"))


def test_rotation_follows_a_save(tmp_path: Path) -> None:
    assert run_ranks(keep_one, 2, tmp_path)[0] == ["step-00000000", "step-00000003"]
