"""Base models in few bits: what those that come so, by GPTQ or AWQ, need, and what they and bitsandbytes' do."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from bitsandbytes.nn import Linear4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from more_ds.errors import UserError

PACKAGES = {"gptq": ("gptqmodel", "optimum"), "awq": ("gptqmodel",)}
"""What transformers 5 and PEFT 0.21 load them with."""


def quantiser(config: Any) -> str | None:
    """What the weights of a Hugging Face configuration were quantised with: `gptq`, `awq`, ...; None: they were not."""
    section = getattr(config, "quantization_config", None)
    if section is None:
        return None
    method = section.get("quant_method") if isinstance(section, Mapping) else section.quant_method
    return str(getattr(method, "value", method))


@contextmanager
def with_weights(model: nn.Module) -> Iterator[None]:
    """Let packed maps under adapters have a `weight`, None, which PEFT's `unload` asks what it puts back for."""
    bases: set[Any] = {m.get_base_layer() for m in model.modules() if isinstance(m, BaseTunerLayer)}
    packed = [base for base in bases if not hasattr(base, "weight")]
    for base in packed:
        base.weight = None
    try:
        yield
    finally:
        for base in packed:
            del base.weight


def keep_layout(model: nn.Module) -> None:
    """Keep 4-bit maps in the one layout that gradients pass through.

    On a CPU with bfloat16 in hardware, bitsandbytes packs them anew at the first pass in evaluation mode, for a kernel
    that rounds what it reads to bfloat16 and knows no gradient; training that goes on does not get past them, silently.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def check_quantised(config: Any, quantization: str, *, dtype: str, zero3: bool = False, on_gpu: bool = False) -> None:
    """Refuse what a base model that comes quantised cannot do.

    Args:
        config: its Hugging Face configuration.
        quantization: what is asked for besides: `none`, `4bit` or `8bit`.
        dtype: `fp32`, `bf16` or `fp16`.
        zero3: whether the weights are to be sharded.
        on_gpu: whether the model computes on a GPU.

    Raises:
        UserError: a package is missing, it is to be quantised twice, or it is to be sharded.
    """
    method = quantiser(config)
    if method is None:
        return
    if quantization != "none":
        raise UserError(
            f"the model is quantised already, by {method}, and --quantization is {quantization}; leave it out"
        )
    if method not in PACKAGES:
        return
    missing = [name for name in PACKAGES[method] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"the model is quantised by {method}, which needs {' and '.join(missing)}: pip install "
            f"{' '.join(missing)}; or give the model it was made from, with --quantization 4bit"
        )
    if zero3:
        raise UserError(
            f"the model is quantised by {method}: its packed integers are no parameters, so ZeRO-3 cannot shard them; "
            "use ds_configs/zero2.json"
        )
    if method == "awq" and on_gpu and dtype != "fp16":
        raise UserError(f"the model is quantised by awq, whose GPU kernels compute in fp16, not {dtype}; --dtype fp16")
