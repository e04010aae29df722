"""The DeepSpeed engine: processes, sharding, optimizer. With `checkpoint`, the only module that imports deepspeed."""

from __future__ import annotations

import datetime
import math
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from more_ds import log, optimizers
from more_ds.config import RunConfig
from more_ds.ds_config import zero_stage
from more_ds.errors import TrainingError
from more_ds.tuners.half_precision import follow_vectors

log.name_accelerator()
import deepspeed  # noqa: E402

NARROW = 512
"""Width of the hidden states below which a model on a CPU gets one thread per rank."""

TIMEOUT_SECONDS = 1800
"""How long a rank waits for the others before it gives up; `MORE_DS_TIMEOUT` overrides it."""


class Ranks:
    """The processes of a run, and what they tell each other."""

    def __init__(self) -> None:
        """Join the process group that a launcher describes in the environment, or form one of a single process."""
        self.on_gpu = torch.cuda.is_available()
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.per_node = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or self.world)
        if self.on_gpu:
            torch.cuda.set_device(self.local_rank)
        elif "OMP_NUM_THREADS" not in os.environ:
            # Ranks that each start a thread per core fight for the cores: 420 instead of 58 ms a step on two.
            torch.set_num_threads(max(1, cores() // self.per_node))
        self.device = torch.device("cuda", self.local_rank) if self.on_gpu else torch.device("cpu")

    def spare_threads(self, width: int) -> None:
        """Compute with one thread where the model is so narrow that threads would mostly wait for each other.

        On two cores a second thread makes a model of width 128 a fifth faster on an idle machine, and tens of times
        slower as soon as another process wants a core. `OMP_NUM_THREADS` decides where it is set.
        """
        if not self.on_gpu and width < NARROW and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)

    def connect(self) -> None:
        """Form the process group, and wait for all ranks to be there.

        Nothing slow that one rank does alone may come after, or the others time out.
        """
        defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("MASTER_PORT", str(free_port()))
        # Asked which of its C++ ops could be built, DeepSpeed runs the compiler. Training uses none of them.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
        timeout = datetime.timedelta(seconds=float(os.environ.get("MORE_DS_TIMEOUT", TIMEOUT_SECONDS)))
        # DeepSpeed makes groups of its own later, and names no time-out for them.
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
        deepspeed.init_distributed(
            "nccl" if self.on_gpu else "gloo",
            timeout=timeout,
            verbose=False,
            auto_mpi_discovery=False,
        )
        # A group may form without waiting: rank 0 would begin the folder that another still asks about.
        self.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, on every rank."""
        total = values.to(self.device, copy=True)
        torch.distributed.all_reduce(total)
        return total

    def barrier(self) -> None:
        """Wait for all ranks, by a sum: NCCL's own barrier has to be told the device, or guesses it and warns."""
        self.sum(torch.zeros(()))

    def everyone(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, in the order of ranks."""
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


@contextmanager
def in_touch() -> Iterator[None]:
    """Work that ranks do together; one that is gone, or out of reach, is one line on those that are left.

    Raises:
        TrainingError: a collective failed or was not answered in time.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).splitlines()[0][:200]
        raise TrainingError(
            f"rank {os.environ['RANK']} lost touch with the other ranks ({reason}); the last checkpoint is as it was; "
            "go on with --resume auto"
        ) from error


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shard_while_loading(ds_config: dict[str, Any]) -> Any:
    """Make `from_pretrained` shard the weights as it reads them, under ZeRO-3; keep the returned object alive."""
    return HfDeepSpeedConfig(ds_config) if zero_stage(ds_config) == 3 else None


def start(model: nn.Module, config: RunConfig, ds_config: dict[str, Any], ranks: Ranks) -> Any:
    """The DeepSpeed engine around a model whose adapter is attached.

    The optimizer moves the trainable parameters, biases without decay; empty groups are left out, because ZeRO drops
    them and then counts wrong.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if not name.endswith("bias")], "weight_decay": config.weight_decay},
        {"params": [p for name, p in trainable if name.endswith("bias")], "weight_decay": 0.0},
    ]
    optimizer = optimizers.make(
        config.optim,
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=ranks.on_gpu and "offload_optimizer" not in ds_config["zero_optimization"],
    )
    if not ranks.on_gpu:
        model.to(ranks.device)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)[0]
    follow_vectors(engine.module)
    return engine


def take_monitor(engine: Any) -> Any:
    """DeepSpeed's monitors, which the engine itself no longer writes to.

    It counts samples where a run counts steps, and W&B drops what comes with a lower number than what came before.
    """
    monitor, engine.monitor = engine.monitor, SimpleNamespace(enabled=False)
    return monitor


def learning_rate(config: RunConfig, step: int, total: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0: a pure function, so that a resume needs no state.

    Warm-up is linear from `1 / warmup_steps` of the peak; the decay reaches zero after the last step.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    if config.lr_scheduler_type == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
    return config.learning_rate * (1 - share)


def set_learning_rate(engine: Any, value: float) -> None:
    """Set the rate of all groups for the coming step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def step(engine: Any) -> Tensor | None:
    """End a micro-batch; at the end of the global batch clip, move the parameters, and return the gradient's norm.

    The norm is that before clipping, over all ranks; None in the middle of a global batch.
    """
    last = engine.is_gradient_accumulation_boundary()
    norm = None
    if last and engine.zero_optimization_stage() == 0:
        # Without ZeRO, DeepSpeed clips and keeps the norm to itself.
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    known = engine.get_global_grad_norm()
    return None if not last else norm if known is None else torch.as_tensor(known)


def gathered(parameters: Iterable[nn.Parameter]) -> Any:
    """Context in which parameters that ZeRO-3 has partitioned are whole on every rank; all ranks must enter it."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    return deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned))
