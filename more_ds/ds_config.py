"""The DeepSpeed configuration file: `auto` is filled from the run, and a contradiction is refused.

The recipe and its flags are the one truth for batch sizes, clipping, number format and optimizer; the JSON is the truth
for ZeRO and offloading.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from more_ds.config import MONITORS, RunConfig
from more_ds.errors import UserError, suggest

KNOWN_KEYS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16",
    "fp16", "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print",
    "wall_clock_breakdown", "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "data_types",
    "check_overflow", "torch_autocast", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler", "aio",
    "optimizer", "scheduler", "tensorboard", "wandb", "csv_monitor", "comet", "activation_checkpointing", "compile",
    "disable_allgather", "checkpoint", "timers",
}  # fmt: skip


@dataclass(frozen=True)
class BatchSizes:
    """How a global batch is cut: `total` = `micro` x `accumulation` x `world`, in examples."""

    total: int
    micro: int
    accumulation: int
    world: int


def batch_sizes(config: RunConfig, world: int) -> BatchSizes:
    """Cut `train_batch_size` over ranks and accumulation steps; what is not given follows from the rest.

    Raises:
        UserError: it does not divide.
    """
    total, micro, accumulation = (
        config.train_batch_size, config.per_device_train_batch_size, config.gradient_accumulation_steps
    )  # fmt: skip
    if micro is None:
        accumulation = accumulation or 1
        micro, rest = divmod(total, world * accumulation)
    elif accumulation is None:
        accumulation, rest = divmod(total, world * micro)
    else:
        rest = total - world * micro * accumulation
    if rest or not micro or not accumulation:
        raise UserError(
            f"train_batch_size={total} does not divide into {world} ranks x "
            f"per_device_train_batch_size={config.per_device_train_batch_size or 'auto'} x "
            f"gradient_accumulation_steps={config.gradient_accumulation_steps or 'auto'}; change one of them"
        )
    return BatchSizes(total, micro, accumulation, world)


HPZ = "zero_hpz_partition_size"


def resolve(
    path: str | None, config: RunConfig, sizes: BatchSizes, dtype: str, *, per_node: int | None = None
) -> dict[str, Any]:
    """The configuration that DeepSpeed gets, without a single `auto`.

    Args:
        path: the JSON file; None: ZeRO-0.
        config: the run.
        sizes: from `batch_sizes`.
        dtype: `fp32`, `bf16` or `fp16`.
        per_node: ranks of a node; None: all are on one.

    Raises:
        UserError: the file is missing or not JSON, has unknown keys, or contradicts the run; all contradictions are
            named with both values.
    """
    given = _read(path) if path is not None else {}
    ours: dict[str, Any] = {
        "train_batch_size": sizes.total,
        "train_micro_batch_size_per_gpu": sizes.micro,
        "gradient_accumulation_steps": sizes.accumulation,
        "gradient_clipping": config.max_grad_norm,
        "bf16.enabled": dtype == "bf16",
        "fp16.enabled": dtype == "fp16",
        "optimizer.type": "AdamW",
        "optimizer.params.lr": config.learning_rate,
        "optimizer.params.betas": [config.adam_beta1, config.adam_beta2],
        "optimizer.params.eps": config.adam_epsilon,
        "optimizer.params.weight_decay": config.weight_decay,
        "scheduler.params.warmup_num_steps": config.warmup_steps,
    }
    if config.optim != "adamw_torch":
        ours["zero_allow_untested_optimizer"] = True  # tested here; DeepSpeed knows some by name, and asks for the rest
    wrong = [
        f"{key} is {value} in {path} and {ours[key]} in the run"
        for key, value in _leaves(given)
        if key in ours and value != "auto" and value != ours[key]
    ]
    if wrong:
        raise UserError(f'{"; ".join(wrong)}; write "auto" in the JSON, or change the recipe')
    result = copy.deepcopy(given)
    # The loop owns the optimizer and the schedule; DeepSpeed gets a torch optimizer, which needs no C++ build.
    for section in ("optimizer", "scheduler"):
        result.pop(section, None)
    for key, value in ours.items():
        section, _, name = key.partition(".")
        if section in ("optimizer", "scheduler"):
            continue
        if name:
            result.setdefault(section, {})[name] = value
        else:
            result[section] = value
    result.setdefault("zero_optimization", {}).setdefault("stage", 0)
    result.setdefault("steps_per_print", 1_000_000_000)
    if dtype != "fp32" and zero_stage(result) > 0:
        # Gradients of several micro-batches are summed in float32, or small ones vanish in the sum. (Without ZeRO,
        # DeepSpeed always does so, and refuses to be told.)
        result.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    if HPZ in result["zero_optimization"]:
        result["zero_optimization"][HPZ] = _copies(result["zero_optimization"][HPZ], sizes.world, per_node)
    left = [key for key, value in _leaves(result) if value == "auto"]
    if left:
        raise UserError(f'{path}: "auto" is not known for {", ".join(left)}; write a value')
    return result


def _copies(size: Any, world: int, per_node: int | None) -> int:
    """Ranks that share a second copy of the weights (hpZ).

    `auto` is those of a node. A copy over all ranks would be the partition itself: 1, which DeepSpeed takes for none.
    """
    chosen = (per_node or world) if size == "auto" else size
    if not isinstance(chosen, int) or chosen < 1 or world % chosen:
        raise UserError(f"{HPZ}={chosen} does not divide {world} ranks; give nodes alike, or take it out")
    return 1 if chosen == world else chosen


def with_monitors(ds_config: dict[str, Any], report_to: list[str], folder: Path) -> dict[str, Any]:
    """Turn on DeepSpeed's monitors, which write below `folder`."""
    sections = {"tensorboard": "tensorboard", "wandb": "wandb", "csv": "csv_monitor"}
    result = dict(ds_config)
    for name in MONITORS:
        if name in report_to:
            place = {"project": "more_ds"} if name == "wandb" else {"output_path": str(folder), "job_name": name}
            result[sections[name]] = {"enabled": True, **place, **ds_config.get(sections[name], {})}
    return result


def zero_stage(ds_config: dict[str, Any]) -> int:
    """The ZeRO stage of a resolved configuration."""
    return int(ds_config["zero_optimization"]["stage"])


def _read(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        known = sorted(str(p) for p in Path(path).parent.glob("*.json"))
        raise UserError(f"--ds_config {path} does not exist{suggest(path, known)}")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--ds_config {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"--ds_config {path} holds {type(content).__name__}, not an object")
    unknown = [f"{key}{suggest(key, KNOWN_KEYS)}" for key in content if key not in KNOWN_KEYS]
    if unknown:
        raise UserError(f"--ds_config {path}: unknown key {'; '.join(unknown)}")
    return content


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
