"""What a checkpoint costs: how long training stands still for it, when it is on the disk, how long a resume takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from more_ds import checkpoint
from more_ds.background import Background
from more_ds.checkpoint_files import ADAPTER, OPTIMIZER
from more_ds.config import RunConfig
from more_ds.data.sampler import BalancedSampler
from more_ds.ds_config import batch_sizes, resolve
from more_ds.engine import Ranks, start
from more_ds.model import DTYPES
from more_ds.speed.rounds import Ratio, compare
from more_ds.speed.shapes import Shape, batch, build
from more_ds.speed.steps import Conventions
from more_ds.text_model import TextModel

BLOCKED, WRITTEN = "blocked", "written"
GLUE = (392_702, 363_846, 104_743, 67_349, 8_551, 5_749, 3_668, 2_490)
"""Rows of GLUE's training sets."""
FAR = 100_000_000
"""Samples after which the sampler is resumed."""


@dataclass(frozen=True)
class SaveCost:
    """What a checkpoint of a whole model costs a run of one rank.

    Attributes:
        megabytes: of the checkpoint: weights and two moments in float32.
        blocked: seconds for which training stands still: the copy in memory. Median, as all here.
        written: seconds from then until it is on the disk, training going on.
        resume: seconds to put it back into the engine.
        steps: how many training steps each variant below takes.
        beside: time of the steps and a save beside them over that of the steps alone.
        waiting: time of the steps and a save that waits for the disk over that of the steps alone.
    """

    megabytes: float
    blocked: float
    written: float
    resume: float
    steps: int
    beside: Ratio
    waiting: Ratio

    @property
    def lost(self) -> tuple[float, float]:
        """Seconds of training that a save beside the steps costs, and one that waits for the disk."""
        alone = self.beside.seconds / self.beside.median
        return (self.beside.median - 1) * alone, (self.waiting.median - 1) * alone


def save_cost(shape: Shape, dtype: str, ranks: Ranks, folder: Path, *, rounds: int) -> SaveCost:
    """Measure saves of a model that is trained whole.

    Args:
        shape: model and micro-batch.
        dtype: `fp32` or `bf16`.
        ranks: connected, one of them.
        folder: for checkpoints, on the disk that is to be measured.
        rounds: see `compare`.
    """
    engine, step = _engine(shape, dtype, ranks)
    saving, seconds = Background(ranks.device), {BLOCKED: list[float](), WRITTEN: list[float]()}
    step()
    began = time.perf_counter()
    path = checkpoint.save(folder, engine, 1, {})
    write_seconds, began = time.perf_counter() - began, time.perf_counter()
    step()
    steps = math.ceil(2 * write_seconds / (time.perf_counter() - began))

    def train() -> None:
        for _ in range(steps):
            step()

    def save_beside() -> None:
        began = time.perf_counter()
        snapshot = checkpoint.take(engine, 1, {})
        seconds[BLOCKED].append(time.perf_counter() - began)
        saving.start(lambda: _timed(lambda: snapshot.write(folder)), f"{path} was not written")
        train()
        seconds[WRITTEN].append(saving.wait())

    def save_and_wait() -> None:
        checkpoint.save(folder, engine, 1, {})
        train()

    variants: dict[str, Callable[[], object]] = {
        "alone": train, "beside": save_beside, "waiting": save_and_wait,
        "resume": lambda: checkpoint.load(path, engine),
    }  # fmt: skip
    found = compare(variants, "alone", rounds=rounds)
    size = sum((path / name).stat().st_size for name in (ADAPTER, OPTIMIZER)) / 1e6
    blocked, written = (float(np.median(seconds[name][1:])) for name in (BLOCKED, WRITTEN))
    return SaveCost(size, blocked, written, found["resume"].seconds, steps, found["beside"], found["waiting"])


def sampler_seconds(*, grouped: bool) -> float:
    """Seconds from nothing to the first micro-batch of a sampler that goes on after `FAR` samples of GLUE.

    Args:
        grouped: by length.
    """
    lengths = [np.random.RandomState(task).randint(5, 128, size) for task, size in enumerate(GLUE)]
    plan = {"group_size": 8, "groups_per_step": 4, "lengths": lengths if grouped else None}
    state = BalancedSampler(GLUE, **plan).state_dict() | {"next_step": FAR // 32}  # type: ignore[arg-type]
    began = time.perf_counter()
    sampler = BalancedSampler(GLUE, **plan)  # type: ignore[arg-type]
    sampler.load_state_dict(state)
    sampler.micro_batches(sampler.next_step, rank=0, world_size=4, accumulation=1)
    return time.perf_counter() - began


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _engine(shape: Shape, dtype: str, ranks: Ranks) -> tuple[Any, Callable[[], None]]:
    """A model in a DeepSpeed engine, and a training step of it."""
    config = RunConfig(train_batch_size=shape.rows)
    ds_config = resolve(None, config, batch_sizes(config, ranks.world), dtype)
    engine = start(build(shape, DTYPES[dtype], str(ranks.device)).train(), config, ds_config, ranks)
    text_model = TextModel(engine, Conventions(shape))  # type: ignore[arg-type]
    tensors = batch(shape, str(ranks.device), 1)
    weight = torch.tensor(1.0 / tensors["labels"].numel(), device=ranks.device)

    def step() -> None:
        engine.backward(text_model.training_loss(tensors, weight)[0])
        engine.step()

    return engine, step
