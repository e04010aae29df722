"""What an adapter does for one task, as a pair of low-rank matrices per adapted map.

Everything is read from the adapter's file: neither the base model nor a GPU is needed, and a checkpoint of any ZeRO
stage is the same file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from more_ds.errors import UserError
from more_ds.loading import Subject, read_weights
from more_ds.numerics import at_least_float32
from more_ds.tuners import MoreConfig
from more_ds.tuners.base import UPDATE
from more_ds.tuners.more.experts import expert_table
from more_ds.tuners.stacked_weights import WEIGHTS, is_named
from more_ds.tuners.update import SHARED, Update, UpdateConfig

PREFIX = "base_model.model."

OWN = ("more_", "lora_", f"{UPDATE}.")
"""What the names of an adapter's own tensors have in them."""

Factors = dict[str, tuple[Tensor, Tensor]]
"""Name of an adapted map -> A, (rank, in), and B, (out, rank), in float32: the task's update of its weight is B A.

Those of stacked experts, whose maps have the names of their weights, are (experts, rank, in) and (experts, out, rank).
"""


@dataclass(frozen=True)
class Adapter:
    """A saved adapter.

    Attributes:
        config: its PEFT configuration.
        tensors: by name, as saved.
        task_names: of its tasks, in the order of their numbers; `["default"]` for a method without tasks.
    """

    config: PeftConfig
    tensors: Mapping[str, Tensor]
    task_names: tuple[str, ...]

    def factors(self, task: int) -> Factors:
        """The update of a task.

        Raises:
            UserError: the method's update of a task is no low-rank product.
        """
        further = sorted(key for key in self.tensors if not any(f".{part}" in key for part in OWN))
        if further:
            raise UserError(
                f"the adapter also holds weights of the model's own modules, e.g. {further[0]}, which no LoRA does; "
                "use the adapter as it is"
            )
        if isinstance(self.config, MoreConfig):
            return _more(self.config, self.tensors, task)
        if isinstance(self.config, UpdateConfig) and self.config.update_class.factors is not Update.factors:
            return _updates(self.config, self.tensors, task)
        if type(self.config) is LoraConfig:
            return _lora(self.config, self.tensors)
        name = getattr(self.config.peft_type, "value", self.config.peft_type)
        raise UserError(
            f"{name} is no low-rank update of the weights, so it cannot be written as a LoRA; use the adapter"
        )


def read_adapter(subject: Subject) -> Adapter:
    """Read the adapter of a run or of a folder.

    Raises:
        UserError: a plain model, no weights, damaged weights, values that are not finite, or task names that cannot be
            those of folders.
    """
    if subject.adapter is None or subject.adapter_config is None:
        found = "a model without an adapter" if Path(subject.name).is_dir() else "no folder"
        raise UserError(f"{subject.name} is {found}; there is nothing to export")
    config = subject.adapter_config
    num_tasks = getattr(config, "num_tasks", 1)
    names = tuple(getattr(config, "task_names", None) or ())
    for name in names:
        if not isinstance(name, str) or name.strip(".") == "" or set(name) & set("/\\\0"):
            raise UserError(f"{subject.name} calls a task {name!r}, which no folder can be called; mend its task_names")
    if not names:
        names = ("default",) if num_tasks == 1 else tuple(f"task{i}" for i in range(num_tasks))
    return Adapter(config, read_weights(subject.adapter), names)


def _more(config: MoreConfig, tensors: Mapping[str, Tensor], task: int) -> Factors:
    """B diag(v) A of MoRE without the components whose v is zero: the rank that the task uses, and no more."""
    if config.gate_input == "pooled":
        raise UserError(
            "gate_input=pooled chooses the ranks by example, so no LoRA equals this adapter; use the adapter as it is"
        )
    table = expert_table(config.r, config.first_tasks or config.num_tasks, config.scale, config.experts, config.seed)
    table = (table * (config.lora_alpha / config.r)).float()
    found: Factors = {}
    for name in _maps(tensors, ".more_A.weight"):
        part = {key: tensors[f"{PREFIX}{name}.more_{key}.weight"] for key in ("A", "B")}
        if config.gate == "soft":
            gate = [at_least_float32(tensors[f"{PREFIX}{name}.more_gate.{key}"]) for key in ("weight", "bias")]
            weights = torch.softmax(gate[0] @ _embedding(config, tensors, name, task) + gate[1], dim=-1) @ table
        else:
            weights = table[tensors[f"{PREFIX}{name}.more_ranks"][task] - 1]
        used = weights.nonzero().squeeze(1)
        a, b = at_least_float32(part["A"]), at_least_float32(part["B"])
        found[name] = a.index_select(-2, used), b.index_select(-1, used) * weights[used]
    return found


def _updates(config: UpdateConfig, tensors: Mapping[str, Tensor], task: int) -> Factors:
    """The factors that a method's `Update` gives, made again from its tensors."""
    shared, module = None, config.shared_module({})
    with torch.no_grad():
        if module is not None:
            module.load_state_dict(_under(tensors, f"{PREFIX}{SHARED}.{UPDATE}."))
            shared = module.eval()()
        found: Factors = {}
        for name in _maps(tensors, f".{UPDATE}.A"):
            part = _under(tensors, f"{PREFIX}{name}.{UPDATE}.")
            update = config.update_class(config, part["A"].shape[-1], part["B"].shape[0])
            update.load_state_dict(part)
            a, b = update.factors(task, shared)
            found[name] = a.contiguous(), b.contiguous()
    return found


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _embedding(config: MoreConfig, tensors: Mapping[str, Tensor], name: str, task: int) -> Tensor:
    first = config.first_tasks or config.num_tasks
    part, row = ("weight", task) if task < first else (f"added_{task - first}", 0)
    return at_least_float32(tensors[f"{PREFIX}{name}.more_task.{part}"])[row]


def _lora(config: LoraConfig, tensors: Mapping[str, Tensor]) -> Factors:
    """PEFT's LoRA, its scaling put into B."""
    if config.use_dora:
        raise UserError("DoRA also scales the weights' rows, which no plain LoRA does; use the adapter as it is")
    found: Factors = {}
    names = _maps(tensors, ".lora_A.weight")
    for place in names:
        a, b = (at_least_float32(tensors[f"{PREFIX}{place}.lora_{key}.weight"]) for key in ("A", "B"))
        name, alphas, ranks = _lora_map(config, place, names), config.alpha_pattern or {}, config.rank_pattern or {}
        alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
        if name != place:
            a, b = unfolded(a, b, ranks.get(get_pattern_key(list(ranks), name), config.r))
        rank = a.shape[-2]
        found[name] = a, b * (alpha / (rank**0.5 if config.use_rslora else rank))
    return found


def _lora_map(config: LoraConfig, place: str, places: Sequence[str]) -> str:
    """The map of a pair that PEFT has saved under the name `place`: a module, or a stacked weight of one.

    PEFT wraps a module once for each of its weights, in their order, the last one outside.
    """
    module = place.replace(".base_layer", "")
    weights = [key for key in WEIGHTS if is_named(f"{module}.{key}", config.target_parameters or ())]
    around = sum(one.replace(".base_layer", "") == module for one in places)
    if not weights and around == 1 and place == module:
        return place
    if len(weights) != around:
        raise UserError(f"the adapter has other stacked weights of {module} than are known; use the adapter as it is")
    return f"{module}.{weights[-1 - place.count('.base_layer')]}"


def folded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The A and B of stacked experts as PEFT keeps them, (experts * rank, in) and (out, rank * experts)."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def unfolded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The inverse of `folded`."""
    return a.unflatten(0, (-1, rank)), b.unflatten(1, (rank, -1)).permute(2, 0, 1)


def _maps(tensors: Mapping[str, Tensor], suffix: str) -> list[str]:
    names = [key.removeprefix(PREFIX).removesuffix(suffix) for key in tensors if key.endswith(suffix)]
    if not names:
        raise UserError(f"the adapter holds no tensor that ends in {suffix}; it was saved by another method or version")
    return sorted(names)
