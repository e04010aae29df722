"""What is trained of a model, by the names under which it is saved."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftModel, PromptEncoderConfig, get_peft_model_state_dict
from torch import Tensor, nn

from more_ds.checkpoint_files import to_json
from more_ds.errors import UserError
from more_ds.tuners.full import FullConfig


@dataclass(frozen=True)
class Trained:
    """The tensors of a checkpoint as they live in the model.

    Attributes:
        model: the (PEFT) model.
        parameters: by the names in the file.
        buffers: likewise.
        full_names: the names in the model.
        aside: names of what is needed to go on and not to use the adapter; it is kept with the optimizer's moments.
        written: whole tensors by name -> those of the adapter's file, as PEFT reads it.
        config: what stands beside them: `adapter_config.json`.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    full_names: dict[str, str]
    aside: frozenset[str]
    written: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    config: bytes


def find_trained(model: nn.Module) -> Trained:
    """Find the active adapter's tensors in a model, or all of a model without an adapter.

    Raises:
        UserError: a trained parameter is not among them, so that no checkpoint would have it.
    """
    whole = model.state_dict(keep_vars=True)
    full_names = {id(tensor): name for name, tensor in whole.items()}
    # A tied weight has several names: the first one is kept, the model knows the others.
    saved = _saved(model, whole) if isinstance(model, PeftModel) else _unique(whole)
    further = _further(model, whole)
    aside = {id(tensor) for tensor in further.values()}
    saved = {name: tensor for name, tensor in saved.items() if id(tensor) not in aside}
    held = {id(tensor) for tensor in (saved | further).values()}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if lost:
        raise UserError(
            f"{len(lost)} trained parameters are not part of the adapter and would be lost, e.g. {lost[0]}; freeze "
            "them, or name their module in the adapter's modules_to_save"
        )
    everything = saved | further
    return Trained(
        model,
        {name: tensor for name, tensor in everything.items() if isinstance(tensor, nn.Parameter)},
        {name: tensor for name, tensor in everything.items() if not isinstance(tensor, nn.Parameter)},
        {name: full_names[id(tensor)] for name, tensor in everything.items()},
        frozenset(further),
        _writer(model, frozenset(further)),
        _config(model),
    )


def _saved(model: PeftModel, whole: dict[str, Any]) -> dict[str, Any]:
    """The tensors that PEFT saves, by its names."""
    config = model.active_peft_config
    if isinstance(config, PromptEncoderConfig):
        return {}  # the file has what the encoder computes
    if config.is_prompt_learning:
        # PEFT would compute a copy of it.
        encoder: Any = model.prompt_encoder[model.active_adapter]
        prefix = f"prompt_encoder.{model.active_adapter}."
        own = {key.removeprefix(prefix): value for key, value in whole.items() if key.startswith(prefix)}
        own["prompt_embeddings"] = own.pop("embedding.weight", encoder.embedding.weight)
        return own
    return get_peft_model_state_dict(
        model, state_dict=whole, adapter_name=model.active_adapter, save_embedding_layers=False
    )


def _unique(whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    seen: dict[int, str] = {}
    for name, tensor in whole.items():
        seen.setdefault(id(tensor), name)
    return {name: whole[name] for name in seen.values()}


def _further(model: nn.Module, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What training alone needs: P-tuning's encoder, and the state of methods between the steps."""
    prefixes = [f"{name}." for name, module in model.named_modules() if getattr(module, "is_training_state", False)]
    if isinstance(model, PeftModel) and isinstance(model.active_peft_config, PromptEncoderConfig):
        prefixes.append(f"prompt_encoder.{model.active_adapter}.")
    return {key: tensor for key, tensor in whole.items() if key.startswith(tuple(prefixes))}


def _writer(model: nn.Module, aside: frozenset[str]) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    if isinstance(model, PeftModel) and isinstance(model.active_peft_config, PromptEncoderConfig):
        return lambda values: _encoded(model, values)
    return lambda values: {name: value for name, value in values.items() if name not in aside}


def _encoded(model: PeftModel, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The prompt that P-tuning's encoder writes, from whole tensors on one device."""
    name, config = model.active_adapter, model.active_peft_config
    prefix = f"prompt_encoder.{name}."
    own = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
    weight = own["embedding.weight"]
    encoder = type(model.prompt_encoder[name])(config).to(weight.device)
    encoder.load_state_dict(own, assign=True)
    indices = model.prompt_tokens[name][: len(weight)].to(weight.device)
    return {"prompt_embeddings": encoder.eval()(indices.unsqueeze(0))[0].detach()}


def _config(model: nn.Module) -> bytes:
    """`adapter_config.json` as PEFT writes it, with sets in a fixed order."""
    config = copy.copy(model.peft_config[model.active_adapter]) if isinstance(model, PeftModel) else FullConfig()
    config.inference_mode = True
    content = config.to_dict()
    return to_json({key: sorted(value) if isinstance(value, set) else value for key, value in content.items()})
