"""What AdaLoRA needs of a training loop: its orthogonality loss, and its budget after every step.

    y     = W0 x + (alpha / r) * P (lambda * (Q x))
    loss  = orth_reg_weight * mean over all P and Q of ||P' P - I||_F, ||Q Q' - I||_F
    s     = |w * dL/dw|,   I <- b1 I + (1 - b1) s,   U <- b2 U + (1 - b2) |s - I|              for every weight w
    score of a triplet (P's column, lambda, Q's row) = I U of lambda + the means of I U over the column and the row

Only the triplets with the highest scores keep their lambda; their number falls from `init_r` to `target_r` a map, as a
cubic function of the step, between `tinit` and `tfinal` steps before the end, and stays from then on.

Source: "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning" (ICLR 2023), equations 8 to 12, in
PEFT's form, whose layers, scores and schedule these are. Deviations from PEFT's `update_and_allocate`: gradients are
added up in hooks, before ZeRO cuts or frees them, so that every stage sees the same ones; the state is saved, so that
a run can be resumed; triplets without lambda stay in the file, as zeros, and it loads as it was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn

from more_ds.optimizer_state import MASTER, NamedState


def orthogonality(model: PeftModel) -> Tensor:
    """The weighted orthogonality loss, a scalar; all P and Q must be whole on this rank (not ZeRO-3)."""
    losses, tuner = [], model.base_model
    for name, p in tuner.named_parameters():
        if p.requires_grad and ("lora_A" in name or "lora_B" in name):
            gram = p @ p.T if "lora_A" in name else p.T @ p
            losses.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=p.dtype, device=p.device)))
    return model.active_peft_config.orth_reg_weight * torch.stack(losses).mean()  # type: ignore[attr-defined]


class _Whole:
    """Whole tensors in the place of a model, for PEFT's `RankAllocator`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """As a module's."""
        yield from self.tensors.items()


class Budget(nn.Module):
    """Smoothed scores of all weights, and which triplets are kept: what AdaLoRA knows between two steps.

    It stands in the model as a module that is never run, so that checkpoints have it.

    Attributes:
        importance: I of all weights, in one row.
        uncertainty: U, likewise.
        kept: (maps, init_r) 1 where a triplet keeps its lambda.
    """

    is_training_state = True
    importance: Tensor
    uncertainty: Tensor
    kept: Tensor

    def __init__(self, model: PeftModel) -> None:
        """Watch the gradients of a model that is in an engine of ZeRO stage 0 to 2."""
        super().__init__()
        tuner: Any = model.base_model
        self.allocator, self.config = tuner.rankallocator, model.active_peft_config
        self.own = {name: p for name, p in tuner.model.named_parameters() if "lora_" in name and p.requires_grad}
        self.lambdas = {name: p for name, p in self.own.items() if "lora_E" in name}
        total = sum(p.numel() for p in self.own.values())
        self.register_buffer("importance", torch.zeros(total))
        self.register_buffer("uncertainty", torch.zeros(total))
        self.register_buffer("kept", torch.ones(len(self.lambdas), self.config.init_r))
        self.gradients: dict[str, Tensor] = {}
        for name, p in self.own.items():
            p.register_hook(partial(self._collect, name))

    def _collect(self, name: str, gradient: Tensor) -> None:
        fresh = gradient.detach().to(torch.float32, copy=True)
        known = self.gradients.get(name)
        self.gradients[name] = fresh if known is None else known.add_(fresh)

    @torch.no_grad()
    def follow(self, engine: Any, step: int) -> None:
        """Follow the optimizer step `step`, counted from 1, of the engine. Collective."""
        last = self.config.total_step - self.config.tfinal
        if step > last:
            self.gradients.clear()
            numbers = NamedState(engine, self.lambdas)
            return self._mask(numbers, numbers.gather(MASTER))
        values = NamedState(engine, self.own).gather(MASTER)
        if self.gradients:  # none, if the step was left out
            self._score(values, engine.device)
        budget, chooses = self.allocator.budget_schedule(step)
        if chooses or step == last:
            self._choose(values, budget)
            self._mask(NamedState(engine, self.lambdas), values)

    def _score(self, values: Mapping[str, Tensor], device: torch.device) -> None:
        """Smooth the sensitivities of a step: of the gradient of the mean over all ranks and micro-batches."""
        gradient = torch.cat([self.gradients[name].flatten().to(device) for name in self.own])
        self.gradients.clear()
        dist.all_reduce(gradient)
        sensitivity = torch.cat([values[name].flatten() for name in self.own]).mul_(gradient.cpu())
        sensitivity = sensitivity.div_(dist.get_world_size()).abs_()
        self.importance.lerp_(sensitivity, 1 - self.config.beta1)
        self.uncertainty.lerp_((sensitivity - self.importance).abs(), 1 - self.config.beta2)

    def _choose(self, values: Mapping[str, Tensor], budget: int) -> None:
        """Keep the `budget` triplets with the highest scores."""
        sizes = [p.numel() for p in self.own.values()]
        for name, scores in (("exp_avg_ipt", self.importance), ("exp_avg_unc", self.uncertainty)):
            parts = zip(self.own, scores.split(sizes), strict=True)
            setattr(self.allocator, name, {key: part.view(values[key].shape) for key, part in parts})
        scratch = {name: value.clone() for name, value in values.items()}
        chosen = self.allocator.mask_to_budget(_Whole(scratch), budget)
        self.kept.copy_(torch.tensor([chosen[name] for name in self.lambdas]))

    def _mask(self, numbers: NamedState, values: Mapping[str, Tensor]) -> None:
        kept = zip(self.lambdas, self.kept, strict=True)
        numbers.set(MASTER, {name: values[name] * row.unsqueeze(1) for name, row in kept})
