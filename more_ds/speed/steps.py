"""Training steps of methods and of MoRE's back-ends, against PEFT's LoRA in the same run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from more_ds.errors import UserError
from more_ds.methods import METHODS, adapter_config, check_given, check_together
from more_ds.model import attach
from more_ds.speed.counting import kernels, peak_bytes
from more_ds.speed.rounds import Ratio, compare
from more_ds.speed.shapes import Shape, batch, build
from more_ds.text_model import TextModel
from more_ds.tuners.more.products import TORCH, triton_products

REFERENCE = "lora r=8"
MORE: dict[str, dict[str, Any]] = {
    "more reference": {"backend": "reference"},
    "more eager": {"backend": "eager"},
    "more fused": {"backend": "fused"},
    "more triton": {"backend": "triton"},
    "more without gates": {"gate": "table", "contrastive_weight": 0.0},
}
"""MoRE as it is written, its other back-ends, and a plain LoRA through the same functions."""
OTHERS = ("frozen base", "full", "lora r=16")


@dataclass(frozen=True)
class Cost:
    """What a step costs.

    Attributes:
        ratio: its time over that of `REFERENCE`.
        tokens_per_second: real tokens; nothing is padded here.
        peak_mb: most memory of a step beyond what lies there between steps.
        kernels: operations sent to the device.
        syncs: times that the host waited for a value.
        trainable: parameters.
    """

    ratio: Ratio
    tokens_per_second: float
    peak_mb: float
    kernels: int
    syncs: int
    trainable: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Setting:
    """What all variants have in common."""

    shape: Shape
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    rank: int = 8
    tasks: int = 8
    dropout: float = 0.0


def variants() -> list[str]:
    """Names of everything that can be timed."""
    prompts = [name for name, method in METHODS.items() if name not in ("more", "lora", *OTHERS)]
    return [REFERENCE, *OTHERS, *MORE, *prompts]


def step_costs(
    setting: Setting, names: Sequence[str], *, rounds: int, compiled: bool = False
) -> tuple[dict[str, Cost], dict[str, str]]:
    """Time steps of the named variants in rounds.

    Args:
        setting: model, micro-batch, rank.
        names: of `variants()`; the reference is always among them.
        rounds: see `more_ds.speed.rounds.compare`.
        compiled: run every variant through `torch.compile`.

    Returns:
        The cost by name; and why a variant is missing, by name.
    """
    names = [REFERENCE, *(name for name in names if name != REFERENCE)]
    steps: dict[str, Callable[[], object]] = {}
    trainable, missing = {}, {}
    for name in names:
        try:
            steps[name], trainable[name] = step_of(setting, name, compiled)
        except UserError as error:
            missing[name] = str(error)
    for step in steps.values():
        step()
    ratios = compare(steps, REFERENCE, rounds=rounds)
    found = {}
    for name, step in steps.items():
        gc.collect()
        counted = None if compiled else kernels(step)
        found[name] = Cost(
            ratio=ratios[name],
            tokens_per_second=setting.shape.rows * setting.shape.length / ratios[name].seconds,
            peak_mb=peak_bytes(step) / 1e6,
            kernels=counted.sent if counted else 0,
            syncs=counted.asked if counted else 0,
            trainable=trainable[name],
        )
    return found, missing


def step_of(setting: Setting, name: str, compiled: bool = False) -> tuple[Callable[[], object], int]:
    """A variant's training step, and how many parameters it trains.

    Raises:
        UserError: the variant cannot be had with this model or on this device.
    """
    model = _model(setting, name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    # An optimizer without parameters is an error; the floor has none to train.
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None
    text_model = TextModel(model, Conventions(setting.shape))  # type: ignore[arg-type]
    tensors = batch(setting.shape, setting.device, setting.tasks)
    weight = torch.tensor(1.0 / tensors["labels"].numel(), device=setting.device)

    def forward() -> torch.Tensor:
        return text_model.training_loss(tensors, weight)[0]

    run = torch.compile(forward, dynamic=False) if compiled else forward

    def step() -> None:
        run().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step, sum(p.numel() for p in parameters)


def _model(setting: Setting, name: str) -> Any:
    base = build(setting.shape, setting.dtype, setting.device).train()
    if name == "full":
        return base
    if name == "frozen base":
        base.requires_grad_(False)
        for embedding in (m for m in base.modules() if isinstance(m, nn.Embedding)):
            embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        return base
    method, options = _method(setting, name)
    check_given(method, options)
    check_together(method, gradient_checkpointing=False, encoder_decoder=base.config.is_encoder_decoder)
    tasks = [f"task {i}" for i in range(setting.tasks)]
    model = attach(base, adapter_config(method, options, tasks, base.config))
    for parameter in model.parameters():
        if parameter.requires_grad:  # PEFT keeps adapters in float32; a DeepSpeed run has them in the model's type
            parameter.data = parameter.data.to(setting.dtype)
    return model.train()


def _method(setting: Setting, name: str) -> tuple[str, dict[str, Any]]:
    ranked = {"r": setting.rank, "lora_alpha": 32, "lora_dropout": setting.dropout}
    if name in MORE:
        if name == "more triton" and triton_products(torch.device(setting.device), setting.dtype) is TORCH:
            raise UserError("this back-end needs CUDA and the package triton")
        return "more", ranked | MORE[name]
    if name.startswith("lora r="):
        return "lora", ranked | {"r": int(name.removeprefix("lora r="))}
    known = METHODS[name].options
    return name, {key: value for key, value in ranked.items() if key in known}


class Conventions:
    """As much of an `Encoder` as a step on ready tensors needs."""

    pad_id = 0

    def __init__(self, shape: Shape) -> None:
        self.is_encoder_decoder = shape.config["model_type"] == "t5"


@dataclass(frozen=True)
class Grown:
    """What MoRE's step costs at one size.

    Attributes:
        time: over that of a LoRA of the same rank.
        peak_mb: the most bytes of tensors at once, in MB (10^6).
        memory: those over LoRA's.
    """

    time: Ratio
    peak_mb: float
    memory: float


def growth(setting: Setting, *, rounds: int) -> dict[str, dict[str, Grown]]:
    """MoRE's step beside LoRA's as one thing grows: by what grows and its value."""
    config, seq2seq = setting.shape.config, setting.shape.config["model_type"] == "t5"
    width, depth = ("d_model", "num_layers") if seq2seq else ("hidden_size", "num_hidden_layers")
    inner = "d_ff" if seq2seq else "intermediate_size"

    def shaped(**values: Any) -> Setting:
        return replace(setting, shape=replace(setting.shape, config=config | values))

    axes: dict[str, dict[str, Setting]] = {
        "depth": {str(n): shaped(**{depth: n}) for n in (2, 4, 8)},
        "width": {str(n): shaped(**{width: n, inner: 4 * n}) for n in (128, 256, 512)},
        "rank": {str(n): replace(setting, rank=n) for n in (4, 8, 16, 32)},
        "tasks": {str(n): replace(setting, tasks=n) for n in (8, 64, 512)},
        "rows": {str(n): replace(setting, shape=replace(setting.shape, rows=n)) for n in (1, 4, 16)},
        "length": {str(n): replace(setting, shape=replace(setting.shape, length=n)) for n in (32, 128, 512)},
    }
    found: dict[str, dict[str, Grown]] = {}
    for axis, settings in axes.items():
        found[axis] = {}
        for value, one in settings.items():
            steps: dict[str, Callable[[], object]] = {}
            for name, own in {"lora": f"lora r={one.rank}", "more": "more fused"}.items():
                steps[name] = step_of(one, own)[0]
                steps[name]()
            time = compare(steps, "lora", rounds=rounds)["more"]
            gc.collect()
            peaks = {name: peak_bytes(step) for name, step in steps.items()}
            found[axis][value] = Grown(time, peaks["more"] / 1e6, peaks["more"] / peaks["lora"])
    return found
