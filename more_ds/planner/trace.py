"""One training step on the meta device: what it computes, moves and keeps, without weights and without a GPU.

The model runs its real forward and backward pass on tensors that have shapes and no values, so that every architecture
of Hugging Face is covered, with the adapter that will be trained; nothing is estimated from a formula. Models of equal
layers are traced at two small depths and extended along the straight line through them.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from more_ds.losses import label_nll
from more_ds.model import attach, auto_class
from more_ds.text_model import TextModel

aten = torch.ops.aten

DEPTH_KEYS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer")
DEPTHS = (2, 3)
"""The depths that are traced: from the second layer on, each one costs the same."""

READS_ROWS = {aten.embedding.default, aten.index_select.default, aten.gather.default}
"""Operations that read of their first argument only what they return."""


@dataclass(frozen=True)
class Workload:
    """What a rank computes in one micro-batch, but for the number of examples.

    Attributes:
        model_config: the base model's Hugging Face configuration.
        adapter: the method's PEFT configuration.
        dtype: of the base model.
        adapter_dtype: of the adapter; DeepSpeed casts it to the base model's, except under ZeRO-3.
        prompt: tokens of a prompt.
        answer: tokens of an answer.
        checkpointing: recompute activations, layer by layer.
        attention: as in transformers; `eager` keeps the matrix of attention weights, the others do not.
        partitioned: ZeRO-3 cuts the parameters; its linear maps keep their inputs, also where the weights are frozen.
    """

    model_config: Any
    adapter: PeftConfig
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    prompt: int
    answer: int
    checkpointing: bool = False
    attention: str = "sdpa"
    partitioned: bool = False


@dataclass(frozen=True)
class Trace:
    """One forward and backward pass of one micro-batch.

    Attributes:
        saved: bytes that the forward pass keeps for the backward pass, logits and losses included.
        forward_peak: the most bytes that are alive at once in the forward pass, weights apart.
        backward_peak: the same in the backward pass, the weights' gradients apart.
        kernels: number of operations that compute something.
        flops: of their matrix products and attention; a multiplication and an addition are two.
        traffic: bytes that the operations read and write.
    """

    saved: int
    forward_peak: int
    backward_peak: int
    kernels: int
    flops: float
    traffic: float


def build(workload: Workload, depth: int | None = None) -> Any:
    """The base model with its adapter, on the meta device; with `depth` layers, or all of them.

    Raises:
        UserError: the adapter's target modules match nothing.
    """
    config = workload.model_config if depth is None else at_depth(workload.model_config, depth)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        base = auto_class(config).from_config(config, dtype=workload.dtype, attn_implementation=workload.attention)
        base.config.use_cache = False
        model: Any = attach(base, copy.deepcopy(workload.adapter))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(workload.adapter_dtype)
        if workload.partitioned:  # as DeepSpeed marks what it keeps whole; MoRE then takes other functions
            marks = {"ds_id": 0, "ds_persist": True, "ds_status": SimpleNamespace(name="AVAILABLE")}
            for name, value in marks.items():
                setattr(parameter, name, value)
    if workload.checkpointing:
        model.enable_input_require_grads()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def at_depth(config: Any, depth: int) -> Any:
    """The configuration of the same model with `depth` layers."""
    values = config.to_dict()
    shallow = copy.deepcopy(config)
    for key in DEPTH_KEYS:
        if isinstance(values.get(key), int):
            setattr(shallow, key, depth)
    if values.get("layer_types"):
        shallow.layer_types = values["layer_types"][:depth]
    return shallow


def depth_of(config: Any) -> int | None:
    """Number of layers, if all are alike (an encoder-decoder: in both halves); else None."""
    values = config.to_dict()
    depths = {values[key] for key in DEPTH_KEYS if isinstance(values.get(key), int)}
    alike = len(depths) == 1 and len(set(values.get("layer_types") or [""])) == 1
    return depths.pop() if alike else None


class Tracer:
    """Traces micro-batches of a workload; the models are built once."""

    def __init__(self, workload: Workload) -> None:
        """Build the models that are traced."""
        self.workload, self.depth = workload, depth_of(workload.model_config)
        if self.depth is not None and self.depth > DEPTHS[1]:
            self._models = [build(workload, depth) for depth in DEPTHS]
        else:
            self._models = [build(workload)]
        self._known: dict[int, list[Trace]] = {}

    def value(self, micro: int, measure: Callable[[Trace], float]) -> float:
        """A measure of the step of a micro-batch of `micro` examples, extended to the model's depth.

        Args:
            micro: examples.
            measure: what to read from a trace; a sum over the layers and a constant.
        """
        if micro not in self._known:
            self._known[micro] = [trace(model, self.workload, micro) for model in self._models]
        values = [measure(one) for one in self._known[micro]]
        if len(values) == 1 or self.depth is None:
            return values[0]
        return values[0] + (self.depth - DEPTHS[0]) * (values[1] - values[0]) / (DEPTHS[1] - DEPTHS[0])

    def peak(self, micro: int) -> float:
        """The most activation bytes at once.

        The peak of either pass is a straight line in the depth, their maximum is not.
        """
        return max(self.value(micro, lambda t: t.forward_peak), self.value(micro, lambda t: t.backward_peak))


def trace(model: nn.Module, workload: Workload, micro: int) -> Trace:
    """Run one micro-batch of `micro` examples through a model on the meta device."""
    encoder: Any = SimpleNamespace(is_encoder_decoder=workload.model_config.is_encoder_decoder, pad_id=0)
    text_model = TextModel(model, encoder)
    keeping = _inputs_kept() if workload.partitioned else nullcontext()
    with keeping, _without_gradients(model), _fused_attention(), _Accountant(model) as account:
        tensors = batch(workload, micro)
        nll, _ = label_nll(text_model.label_logits(tensors), tensors["labels"])
        auxiliary = text_model.auxiliary_loss()
        loss = nll.sum() if auxiliary is None else nll.sum() + auxiliary
        del nll, auxiliary
        saved, forward_peak = account.live, account.peak
        account.peak = 0
        loss.backward()
    return Trace(saved, forward_peak, account.peak, account.kernels, account.flops, account.traffic)


def batch(workload: Workload, micro: int, device: str = "meta") -> dict[str, Tensor]:
    """A micro-batch of full rows, as `Collator.answers` makes them."""

    def ones(length: int) -> Tensor:
        return torch.ones(micro, length, dtype=torch.long, device=device)

    both = workload.model_config.is_encoder_decoder
    length = workload.prompt if both else workload.prompt + workload.answer
    tensors = {name: ones(length) for name in ("input_ids", "attention_mask", "prompt_mask")}
    tensors |= {"labels": ones(workload.answer), "task_ids": torch.zeros(micro, dtype=torch.long, device=device)}
    if both:
        tensors |= {name: ones(workload.answer) for name in ("decoder_input_ids", "decoder_attention_mask")}
    return tensors


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Drop each parameter's gradient as soon as it is there: what becomes of it depends on the ZeRO stage."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(drop) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _KeepInput(torch.autograd.Function):
    """Returns its first argument, and keeps the second for a backward pass that does not read it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@contextmanager
def _inputs_kept() -> Iterator[None]:
    """Linear maps that keep their inputs for the backward pass, as DeepSpeed's do (`memory_efficient_linear`)."""
    original = nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output: Tensor = _KeepInput.apply(original(x, weight, bias), x)
        return output

    nn.functional.linear = linear  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.linear = original  # type: ignore[assignment]


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention that keeps its inputs, its output and a number per row, as the kernels of GPUs and CPUs do.

    Without a device to choose a kernel for, torch would decompose it into a matrix of scores. (A torch function mode
    would do it too, but is suspended while autograd recomputes a checkpointed layer.)
    """
    original = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = _fused
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original


def _fused(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask, float("-inf"))
    if attn_mask is not None:
        attn_mask = attn_mask.detach()  # T5 asks for its gradient under checkpointing, and has no use for it
    kernel = aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


class _Accountant(TorchDispatchMode):
    """Counts the bytes of meta storages that are alive, those of the model apart, and the cost of every kernel."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.kernels, self.flops, self.traffic = 0, 0.0, 0.0
        held = [*model.parameters(), *model.buffers()]
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            # Asked whether a mask shows everything; in training it seldom does.
            return False
        results = func(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(results) if isinstance(t, Tensor) and t.is_meta]
        alias = func._schema.returns[0].alias_info if func._schema.returns else None
        if outputs and (alias is None or alias.is_write):
            flops, traffic = _cost(func, args, kwargs or {}, results, outputs)
            self.kernels, self.flops, self.traffic = self.kernels + 1, self.flops + flops, self.traffic + traffic
        for output in outputs:
            self._watch(output.untyped_storage())
        return results

    def _watch(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def _cost(func: Any, args: Any, kwargs: Any, results: Any, outputs: list[Tensor]) -> tuple[float, float]:
    """(FLOPs of matrix products, bytes read and written)."""
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    written = sum(t.numel() * t.element_size() for t in outputs)
    read = written if func in READS_ROWS else sum(t.numel() * t.element_size() for t in inputs)
    if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
        return 4.0 * args[0].numel() * args[1].shape[2], read + written
    if func is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return 10.0 * args[1].numel() * args[2].shape[2], read + written
    if func is aten._grouped_mm.default:  # of stacked experts, which torch's counter does not know
        return 2.0 * args[0].numel() * args[1].shape[-1], read + written
    # A product that adds in place (`addmm_`) costs what the one that does not (`addmm`) costs.
    name = func._overloadpacket.__name__
    count = flop_registry.get(getattr(aten, name[:-1]) if name.endswith("mm_") else func._overloadpacket)
    return float(count(*args, **kwargs, out_val=results)) if count else 0.0, read + written
