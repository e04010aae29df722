"""Which modules of a model are linear maps, also where a quantiser has put modules of its own in their place."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from more_ds.tuners.stacked_weights import StackedExperts, in_words, stacked_experts

ALL = "all-linear"
SETS = ("attention", "ffn", "attention+ffn")
"""Words for the maps of a model's blocks; LoRA's paper has the first, MoRE's the last."""
ATTENTION = re.compile("attn|attention", re.IGNORECASE)
TARGETS = "Names, a regular expression, `all-linear`, `attention`, `ffn` or `attention+ffn`."
"""What `target_modules` may be."""
SIZES = (("in_features", "out_features"), ("infeatures", "outfeatures"))
"""Names under which quantised linear maps tell their widths: GPTQ's and AWQ's, and older ones'."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module maps its last dimension linearly: an update of its output needs nothing else of it."""
    return isinstance(module, (nn.Linear, Conv1D)) or any(all(hasattr(module, n) for n in names) for names in SIZES)


def name_targets(config: Any, model: Any) -> None:
    """Write names in the place of a word for several maps in a PEFT configuration.

    `attention`, `ffn` and `attention+ffn` are the linear maps of a model's numbered blocks: those of modules that are
    called attention, the others, and all of them. Stacked experts are `ffn`, for the methods that can adapt them: they
    become `target_parameters`. `all-linear` is PEFT's own, which means `nn.Linear`, whose subclasses those of
    bitsandbytes are, and GPT-2's `Conv1D`: in a GPTQ or AWQ model that is nothing, or the output's map alone, and names
    are written there; for other models nothing is changed.

    Raises:
        ValueError: the model has no such maps, or the method cannot adapt them.
    """
    targets = getattr(config, "target_modules", None)
    word = targets if isinstance(targets, str) and targets in (ALL, *SETS) else None
    if word == ALL:
        _name_all(config, model)
    elif word is not None:
        _name_set(config, model, word)
    if getattr(config, "names_weights", False) and config.target_parameters is None:
        config.target_parameters = [] if word or targets is None else _weights_among(config, model)


def untouched_experts(model: Any) -> list[StackedExperts]:
    """The stacked weights that are neither adapted nor trained; `model` has its adapter, if it is to have one."""
    targeted = set(getattr(getattr(model, "base_model", model), "targeted_parameter_names", []))
    found = []
    for own in stacked_experts(model.get_base_model() if hasattr(model, "get_base_model") else model):
        is_frozen = not any(p.requires_grad for p in own.module.parameters())
        shapes = {key: shape for key, shape in own.shapes.items() if f"{own.name}.{key}" not in targeted}
        if is_frozen and shapes:
            found.append(replace(own, shapes=shapes))
    return found


def _name_all(config: Any, model: Any) -> None:
    maps = dict(_maps(model))
    if all(isinstance(module, (nn.Linear, Conv1D, BaseTunerLayer)) for module in maps.values()):
        return
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    config.target_modules = {name for name, module in maps.items() if module is not head}


def _name_set(config: Any, model: Any, word: str) -> None:
    blocks = {name for name, _ in _maps(model) if any(part.isdigit() for part in name.split("."))}
    attention = {name for name in blocks if ATTENTION.search(name.rpartition(".")[0])}
    experts = [own for own in stacked_experts(model) if word != "attention" and not ATTENTION.search(own.name)]
    own_weights = getattr(config, "target_parameters", None)
    if own_weights is None and _adapts(config, experts):
        own_weights = config.target_parameters = [key for own in experts for key in own.keys if _is_open(config, key)]
    config.target_modules = {"attention": attention, "ffn": blocks - attention, "attention+ffn": blocks}[word]
    if config.target_modules or own_weights:
        return
    if experts:
        raise ValueError(
            f"target_modules is {word}, and that of this model is {in_words(experts)}, which "
            f"{getattr(config.peft_type, 'value', config.peft_type)} cannot adapt; use more or lora, or "
            "target_modules: attention"
        )
    raise ValueError(f"target_modules is {word}, and the model has no such maps; give names, or {ALL}")


def _adapts(config: Any, experts: Sequence[StackedExperts]) -> bool:
    """Whether a method can adapt these experts: MoRE those of which it knows the forward, PEFT's LoRA all.

    Raises:
        ValueError: LoRA could, but for an option.
    """
    if getattr(config, "names_weights", False):
        return bool(experts) and all(own.follows_contract for own in experts)
    if not experts or type(config) is not LoraConfig or config.use_dora:
        return False
    plain = {"lora_dropout": 0, "lora_bias": False, "init_lora_weights": True}
    for name, value in plain.items():
        given = getattr(config, name)
        if given and given != value and given != "gaussian":
            raise ValueError(
                f"LoRA on stacked experts, which this model has, does not know {name} {given}; set it to {value}, or "
                "target_modules to attention"
            )
    return True


def _weights_among(config: Any, model: Any) -> list[str]:
    """The stacked weights that the names or the expression in `target_modules` match, as they match modules."""
    found = [key for own in stacked_experts(model) for key in own.keys if check_target_module_exists(config, key)]
    modules = (name for name, module in model.named_modules() if not hasattr(module, "parameter_name"))
    if found and not any(check_target_module_exists(config, name) for name in modules):
        config.target_modules = set()  # or PEFT warns that they have matched nothing
    return found


def _is_open(config: Any, key: str) -> bool:
    """Whether a stacked weight is not excluded, by its name or its layer."""
    narrowed = copy.copy(config)
    narrowed.target_modules = {".".join(key.split(".")[-2:])}
    return bool(check_target_module_exists(narrowed, key))


def _maps(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear maps by name, adapted ones as one; adapted parameters are none."""
    adapted = "\n"
    for name, module in model.named_modules():
        if not name.startswith(adapted) and (isinstance(module, BaseTunerLayer) or is_linear(module)):
            adapted = f"{name}."
            if not hasattr(module, "parameter_name"):
                yield name, module
