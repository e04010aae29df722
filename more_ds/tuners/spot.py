"""SPoT: prompt tuning that starts from the prompt of another task.

Source: "SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer" (ACL 2022): 100 vectors, the source task
chosen by hand (MNLI in the comparison of MoRE's paper). What is saved is an ordinary prompt of PEFT's. Deviation: the
paper's search for the source task by the similarity of prompts is not there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig
from safetensors import SafetensorError, safe_open

from more_ds.checkpoint_files import ADAPTER
from more_ds.errors import UserError

PROMPT = "prompt_embeddings"
"""PEFT's name of a prompt in an adapter's file."""


@dataclass
class SpotConfig(PromptTuningConfig):
    """Configuration of SPoT: prompt tuning's, and where the prompt comes from."""

    source: str | None = field(
        default=None, metadata={"help": "Run or adapter folder of prompt_tuning, spot or p_tuning whose prompt it is."}
    )

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, without the source: what is saved is prompt tuning's."""
        return {name: value for name, value in super().to_dict().items() if name != "source"}


def start_from_source(model: PeftModel, config: SpotConfig) -> None:
    """Give a fresh prompt the values of the source's.

    Raises:
        UserError: the source holds no prompt, or one of another shape.
    """
    encoder: Any = model.prompt_encoder[model.active_adapter]
    weight = encoder.embedding.weight
    if config.source is None:
        return
    prompt = read_prompt(config.source)
    if prompt.shape != weight.shape:
        raise UserError(
            f"the prompt in {config.source} is {tuple(prompt.shape)}, and {tuple(weight.shape)} here; set "
            f"adapter.num_virtual_tokens to {len(prompt)}, and use the model that it was trained on"
        )
    if not weight.is_meta:
        with torch.no_grad():
            weight.copy_(prompt)


def read_prompt(source: str) -> torch.Tensor:
    """The prompt, (vectors, width), of a run or an adapter folder.

    Raises:
        UserError: there is none.
    """
    found = [path for path in (Path(source), Path(source, "best"), Path(source, "last")) if (path / ADAPTER).is_file()]
    try:
        with safe_open(found[0] / ADAPTER, framework="pt") as file:
            return file.get_tensor(PROMPT)
    except (IndexError, SafetensorError) as error:
        raise UserError(f"{source} holds no trained prompt; train one with --method prompt_tuning") from error
