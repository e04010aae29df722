"""The LoRAs that are put together: runs of this package, tasks of a MoRE, exports, and any folder that PEFT reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from more_ds.checkpoint_files import base_identity
from more_ds.config import RunConfig
from more_ds.errors import UserError, suggest
from more_ds.export.factors import Factors, read_adapter
from more_ds.loading import find_subject
from more_ds.prompts import read_prompts
from more_ds.tuners.attempt import AttemptConfig

OF_LORAS = ("mole", "xlora")
"""Methods that train how finished LoRAs are weighed."""


@dataclass(frozen=True)
class Source:
    """A LoRA.

    Attributes:
        name: as the user wrote it.
        base: name or folder of the model that it was trained on.
        task_type: PEFT's, of the adapter that it is from.
        factors: A and B by the names of its maps; alpha / r is in B.
    """

    name: str
    base: str
    task_type: Any
    factors: Factors

    @property
    def config(self) -> LoraConfig:
        """Of a LoRA that names every map in full: what is composed may have maps of several."""
        return LoraConfig(task_type=self.task_type)

    @property
    def rank(self) -> int:
        """The highest rank of its maps."""
        return max(len(a) for a, _ in self.factors.values())


def read_source(name: str) -> Source:
    """Read a LoRA: a run, an adapter folder, or `FOLDER:TASK` for a task of an adapter that knows several.

    Raises:
        UserError: there is none, it is damaged, its update is no LoRA, or it knows several tasks and none is named.
    """
    folder, _, task = name.rpartition(":") if ":" in name and not Path(name).exists() else (name, "", "")
    subject = find_subject(folder)
    if subject.adapter is None:
        raise UserError(f"{name} holds no adapter; name a run, or a folder with an adapter_config.json")
    adapter = read_adapter(subject)
    names = list(adapter.task_names)
    if task and task not in names:
        raise UserError(f"{folder} knows no task '{task}'{suggest(task, names)}")
    if not task and len(names) > 1:
        raise UserError(f"{folder} knows {len(names)} tasks; name one of them: {folder}:{names[0]}")
    factors = adapter.factors(names.index(task) if task else 0)
    return Source(name, subject.base, adapter.config.task_type, factors)


def read_sources(names: Sequence[str], model: str | None) -> list[Source]:
    """Read the LoRAs that go together.

    Args:
        names: see `read_source`.
        model: name or folder of the model that they are for; None: what the first one was trained on.

    Raises:
        UserError: there are fewer than two, or they are not of one base model.
    """
    if len(names) < 2:
        raise UserError(f"{len(names)} LoRAs are named; at least two can be put together: --loras A B ...")
    sources = [read_source(name) for name in names]
    wanted = model or sources[0].base
    for source in sources:
        if identity(source.base) != identity(wanted):
            raise UserError(
                f"the LoRA {source.name} was trained on {source.base}, and not on {wanted}; LoRAs go together on one "
                "base model; if it has moved, correct base_model_name_or_path in its adapter_config.json"
            )
    return sources


def identity(model: str) -> str:
    """What tells a base model from another: its weights where they are at hand, else its name."""
    try:
        return str(base_identity(model)["sha256"])
    except UserError:
        return model


def aligned(sources: Sequence[Source]) -> list[Factors]:
    """The LoRAs with the same maps and one rank: zeros stand where one has no map, or a lower rank."""
    rank = max(source.rank for source in sources)
    sizes = {name: (a.shape[1], b.shape[0]) for s in sources for name, (a, b) in sorted(s.factors.items())}
    found = []
    for source in sources:
        own: Factors = {}
        for name, (width, out) in sizes.items():
            a, b = source.factors.get(name, (torch.zeros(0, width), torch.zeros(out, 0)))
            pad = rank - len(a)
            own[name] = torch.nn.functional.pad(a, (0, 0, 0, pad)), torch.nn.functional.pad(b, (0, pad))
        found.append(own)
    return found


def with_sources(config: RunConfig) -> tuple[dict[str, Any], Callable[[Any], None] | None]:
    """The options of a run's method and what fills its fresh adapter: finished LoRAs, ATTEMPT's prompts, or None.

    The options of MoLE and X-LoRA get the shapes of their LoRAs.

    Raises:
        UserError: what is named is not there, damaged, or of another base model.
    """
    options = dict(config.adapter)
    if config.method in OF_LORAS and options.get("loras"):
        names = _names(options["loras"])
        sources = read_sources(names, config.model)
        maps = sorted({name for source in sources for name in source.factors})
        ranks = [source.rank for source in sources]
        return {**options, "loras": names, "ranks": ranks, "target_modules": maps}, partial(_fill_loras, sources)
    if config.method == "attempt" and options.get("sources"):
        names = _names(options["sources"])
        prompts, bases = read_prompts(names, options.get("num_virtual_tokens", AttemptConfig.num_virtual_tokens))
        for name, base in zip(names, bases, strict=True):
            if identity(base) != identity(config.model):
                raise UserError(f"the prompt {name} was trained on {base}, and not on {config.model}")
        return {**options, "sources": names}, lambda model: model.base_model.put(prompts)
    return options, None


def _names(given: Any) -> list[str]:
    return given.split(",") if isinstance(given, str) else list(given)


def _fill_loras(sources: Sequence[Source], model: Any) -> None:
    """Put the LoRAs in their places in a fresh adapter.

    Raises:
        UserError: one does not fit the model.
    """
    for i, source in enumerate(sources):
        try:
            model.base_model.put(i, source.factors)
        except ValueError as error:
            raise UserError(f"{source.name}: {error}; was it trained on this model?") from error


def weighted_sum(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """sum_i w_i A_i and sum_i w_i B_i of aligned LoRAs, map by map."""

    def total(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([w * part for w, part in zip(weights, parts, strict=True)]).sum(0)

    names: Mapping[str, Any] = factors[0]
    return {name: (total([f[name][0] for f in factors]), total([f[name][1] for f in factors])) for name in names}
