"""The optimizer's numbers by parameter name, whatever ZeRO has made of them.

DeepSpeed keeps float32 master values and Adam's moments in tensors of its own: one a parameter on every rank (ZeRO-0),
a slice of all parameters laid end to end (ZeRO-1 and 2), or a slice of every parameter (ZeRO-3). Which slice lies where
is all that differs; `NamedState` looks it up once, and then gathers and sets whole tensors by name. DeepSpeed's own
`safe_get_full_*` and `safe_set_full_*` do it one parameter at a time, turn -0.0 into 0.0, know nothing of an engine
without ZeRO, and in ZeRO-3 cannot set a parameter that does not divide by the number of ranks (deepspeed 0.19.8).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from more_ds.errors import TrainingError, UserError
from more_ds.optimizers import moments_of

MASTER = "master"
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's dynamic loss scalers count."""


@dataclass(frozen=True)
class Slice:
    """The elements of one parameter that this rank contributes and updates.

    Attributes:
        owner: the tensor that holds their master values, perhaps among others'; the optimizer's state is under it.
        offset: where they begin in `owner`, flattened.
        start: where they begin in the parameter, flattened.
        size: how many they are.
        replicated: every rank holds the same, so that one of them must speak for all.
    """

    owner: Tensor
    offset: int
    start: int
    size: int
    replicated: bool

    @property
    def part(self) -> slice:
        """Where they are in `owner`, flattened."""
        return slice(self.offset, self.offset + self.size)


class NamedState:
    """Master values and Adam's moments of some parameters of an engine, whole and by name.

    All methods but `shapes`, `step` and `set_step` are collective: every rank calls them, in the same order.

    Attributes:
        moments: the kinds of numbers that the optimizer keeps, in the order in which they are to be set.
    """

    def __init__(self, engine: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        """Find where the numbers of `parameters` lie.

        Args:
            engine: a DeepSpeed engine with an optimizer of `more_ds.optimizers`.
            parameters: by name, the same on every rank; those that are not trained have a value and no moments.

        Raises:
            UserError: the engine keeps optimizer state where it cannot be read.
        """
        _refuse_unreadable(engine)
        self._engine, self._parameters = engine, dict(parameters)
        self._moments = moments_of(engine.basic_optimizer)
        self.moments = self._moments.kinds
        copies = _float32_copies(engine.optimizer)
        self._slices = {name: _locate(engine, p, copies.get(id(p), p)) for name, p in self._parameters.items()}
        self._check_coverage()

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Whole shapes, by name: of all parameters for `master`, of the trained ones for moments."""
        return {
            name: tuple(getattr(p, "ds_shape", p.shape))
            for name, p in self._parameters.items()
            if kind == MASTER or p.requires_grad
        }

    @torch.no_grad()
    def gather(self, kind: str) -> dict[str, Tensor]:
        """Whole float32 tensors on the CPU of every rank, exact to the bit.

        Args:
            kind: `master`, or one of `moments` (zero before the first step).
        """
        buffer = torch.zeros(self._size(kind), dtype=torch.float32, device=self._engine.device)
        values_of = cache(partial(self._values, kind=kind))
        for name, whole in self._split(buffer, kind):
            place = self._slices[name]
            if place is None or (place.replicated and dist.get_rank() != 0):
                continue
            values = values_of(place.owner)
            if values is not None:
                whole.view(-1)[place.start : place.start + place.size].copy_(values[place.part])
        # One rank has an element's bits and the others zero: their sum as integers is exact, also for -0.0 and NaN.
        dist.all_reduce(buffer.view(torch.int32))
        return dict(self._split(buffer.cpu(), kind))

    @torch.no_grad()
    def set(self, kind: str, values: Mapping[str, Tensor] | None) -> None:
        """Give the parameters new numbers; with `master`, also the values that the model computes with.

        Args:
            kind: as for `gather`; moments need `set_step` before, and are set in the order of `moments`.
            values: whole tensors by name, read on rank 0 alone.
        """
        buffer = torch.empty(self._size(kind), dtype=torch.float32, device=self._engine.device)
        if dist.get_rank() == 0 and values is not None:
            for name, whole in self._split(buffer, kind):
                whole.copy_(values[name])
        dist.broadcast(buffer, src=0)
        partitioned = kind == MASTER and hasattr(self._engine.optimizer, "checkpoint_event_prologue")
        if partitioned and self._engine.zero_optimization_stage() == 3:
            self._engine.optimizer.checkpoint_event_prologue()  # what is whole on each rank would outlive the change
        changed: dict[Tensor, Tensor] = {}
        for name, whole in self._split(buffer, kind):
            place = self._slices[name]
            if place is not None:
                if place.owner not in changed:
                    changed[place.owner] = self._values(place.owner, kind)
                part = whole.reshape(-1)[place.start : place.start + place.size]
                changed[place.owner][place.part].copy_(part)
            if kind == MASTER:
                _publish(self._parameters[name], whole, place)
        if kind != MASTER:
            for owner, values_of_owner in changed.items():
                self._moments.write(owner, kind, values_of_owner)
        if partitioned and self._engine.zero_optimization_stage() == 3:
            self._engine.optimizer.checkpoint_event_epilogue()

    def step(self) -> int:
        """Number of steps that Adam counts.

        Raises:
            TrainingError: parameters disagree, because some had no gradient in some steps.
        """
        steps = {self._moments.step(owner) for owner in self._owners()}
        if len(steps) != 1:
            raise TrainingError(f"parameters have taken {sorted(steps)} optimizer steps; every one needs a gradient")
        return steps.pop()

    def set_step(self, step: int) -> None:
        """Set the number of steps that Adam counts, and make room for the moments where there is none yet."""
        for owner in self._owners():
            self._moments.begin(owner, step)

    def _size(self, kind: str) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes(kind).values())

    def _split(self, buffer: Tensor, kind: str) -> list[tuple[str, Tensor]]:
        """The parameters' whole tensors as views of one buffer."""
        shapes = self.shapes(kind)
        parts = buffer.split([torch.Size(shape).numel() for shape in shapes.values()])
        return [(name, part.view(shape)) for (name, shape), part in zip(shapes.items(), parts, strict=True)]

    def _values(self, owner: Tensor, kind: str) -> Any:
        return owner.detach().view(-1) if kind == MASTER else self._moments.read(owner, kind)

    def _owners(self) -> list[Tensor]:
        """All tensors that the optimizer steps; ZeRO-3 hands them to it only while it does."""
        if self._engine.zero_optimization_stage() == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._engine.basic_optimizer.param_groups for p in group["params"]]

    def _check_coverage(self) -> None:
        """Refuse a layout in which the ranks' slices do not make up whole parameters: holes would be read as zeros."""
        mine = [0 if s is None or (s.replicated and dist.get_rank() != 0) else s.size for s in self._slices.values()]
        found = torch.tensor(mine, device=self._engine.device)
        dist.all_reduce(found)
        for count, (name, shape) in zip(found.tolist(), self.shapes(MASTER).items(), strict=True):
            if count != torch.Size(shape).numel():
                raise UserError(
                    f"{name}: the ranks hold {count} of its {torch.Size(shape).numel()} elements; this way of sharding "
                    "cannot be saved; use plain ZeRO 0 to 3 in the ds_config"
                )


def loss_scale(optimizer: Any) -> dict[str, float]:
    """The counters of float16's dynamic loss scale in a DeepSpeed optimizer; empty without one."""
    scaler = _scaler(optimizer)
    return {} if scaler is None else {key: getattr(scaler, key) for key in LOSS_SCALE if hasattr(scaler, key)}


def set_loss_scale(optimizer: Any, counters: Mapping[str, float]) -> None:
    """Go on from these counters, as far as the optimizer has them."""
    scaler = _scaler(optimizer)
    for key in LOSS_SCALE:
        if key in counters and hasattr(scaler, key):
            setattr(scaler, key, counters[key])


def _scaler(optimizer: Any) -> Any:
    scaler = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
    dynamic = getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False)
    return scaler if dynamic else None


def _locate(engine: Any, parameter: nn.Parameter, master: Tensor) -> Slice | None:
    """This rank's slice of a parameter; None if it has none. `master` holds the values where ZeRO does not."""
    optimizer = engine.optimizer
    if hasattr(parameter, "ds_id"):
        part = parameter.partition_numel()  # type: ignore[attr-defined]
        start = part * dist.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
        size = min(part, parameter.ds_numel - start)  # type: ignore[attr-defined]  # the last slices are padded
        owner, offset = parameter.ds_tensor, 0  # type: ignore[attr-defined]
        if parameter.requires_grad:
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            owner = optimizer.fp32_partitioned_groups_flat[group]
        return Slice(owner, offset, start, size, replicated=False) if size > 0 else None
    if parameter.requires_grad and hasattr(parameter, "_hp_mapping"):
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        owner = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"][0]
        there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Slice(owner, there.start, here.start, here.numel, replicated=False)
    return Slice(master, 0, 0, parameter.numel(), replicated=True)


def _float32_copies(optimizer: Any) -> dict[int, Tensor]:
    """The master values of DeepSpeed's optimizer for bfloat16 and float16 without ZeRO, by the parameters' ids."""
    groups = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=False)
    return {id(low): high for lows, highs in groups for low, high in zip(lows, highs, strict=True)}


def _publish(parameter: nn.Parameter, whole: Tensor, place: Slice | None) -> None:
    """Give the model the value: the rank's part of it under ZeRO-3, else all of it, in the parameter's own type."""
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(whole)
    elif place is not None:
        part = parameter.ds_tensor.view(-1)[: place.size]  # type: ignore[attr-defined]
        part.copy_(whole.reshape(-1)[place.start : place.start + place.size])


def _refuse_unreadable(engine: Any) -> None:
    zero = engine._config.zero_config
    wrong = [
        f"{name}.device is nvme"
        for name in ("offload_optimizer", "offload_param")
        if getattr(getattr(zero, name, None), "device", None) == "nvme"
    ]
    if getattr(zero.offload_optimizer, "ratio", 1.0) != 1.0:
        wrong.append(f"offload_optimizer.ratio is {zero.offload_optimizer.ratio}")
    wrong += [
        f"{name} is {getattr(zero, name)}"
        for name, plain in (("mics_shard_size", -1), ("zenflow", None))
        if getattr(zero, name, plain) not in (plain, 0)
    ]
    if wrong:
        raise UserError(f"checkpoints cannot be written with {' and '.join(wrong)}; take it out of the ds_config")
