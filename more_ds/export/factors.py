"""What an adapter does for one task, as a pair of low-rank matrices per adapted map.

Everything is read from the adapter's file: neither the base model nor a GPU is needed, and a checkpoint of any ZeRO
stage is the same file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
from more_ds.tuners.update import SHARED, Update, UpdateConfig

PREFIX = "base_model.model."

OWN = ("more_", "lora_", f"{UPDATE}.")
"""What the names of an adapter's own tensors have in them."""

Factors = dict[str, tuple[Tensor, Tensor]]
"""Name of an adapted map -> A, (rank, in), and B, (out, rank), in float32: the task's update of its weight is B A."""


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
        raise UserError(f"{subject.name} is a model without an adapter; there is nothing to export")
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
        found[name] = a[used].contiguous(), (b[:, used] * weights[used]).contiguous()
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
    for name in _maps(tensors, ".lora_A.weight"):
        a, b = (at_least_float32(tensors[f"{PREFIX}{name}.lora_{key}.weight"]) for key in ("A", "B"))
        patterns = config.alpha_pattern or {}
        alpha = patterns.get(get_pattern_key(list(patterns), name), config.lora_alpha)
        found[name] = a, b * (alpha / (len(a) ** 0.5 if config.use_rslora else len(a)))
    return found


def _maps(tensors: Mapping[str, Tensor], suffix: str) -> list[str]:
    names = [key.removeprefix(PREFIX).removesuffix(suffix) for key in tensors if key.endswith(suffix)]
    if not names:
        raise UserError(f"the adapter holds no tensor that ends in {suffix}; it was saved by another method or version")
    return sorted(names)
