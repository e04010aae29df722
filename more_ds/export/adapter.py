"""All tasks of a MoRE adapter in one adapter for inference: the table of ranks, and no gates or embeddings."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from safetensors.torch import save_file

from more_ds.checkpoint_files import ADAPTER, ADAPTER_CONFIG
from more_ds.errors import UserError
from more_ds.export.factors import Adapter
from more_ds.tuners import MoreConfig

DROPPED = (".more_gate.", ".more_task.")


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write the adapter with `gate: table`: as many parameters as a LoRA of its rank, and the same answers.

    Raises:
        UserError: another method, or a gate that weighs all ranks or looks at the input, which no table of ranks holds.
    """
    config = adapter.config
    if not isinstance(config, MoreConfig):
        raise UserError("only MoRE has gates to leave out; this adapter is its own form for inference")
    if config.gate == "soft" or config.gate_input == "pooled":
        raise UserError(
            f"gate={config.gate}, gate_input={config.gate_input}: no table of ranks says what this gate chooses; use "
            "the adapter as it is"
        )
    config = copy.copy(config)
    config.gate, config.contrastive_weight, config.inference_mode = "table", 0.0, True
    tensors = {key: value for key, value in adapter.tensors.items() if not any(part in key for part in DROPPED)}
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    content = {key: getattr(value, "value", value) for key, value in config.to_dict().items()}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
