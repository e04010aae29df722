"""Which DeepSpeed configuration, micro-batch and accumulation fit, and which of them is fastest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from more_ds.compose.sources import with_sources
from more_ds.config import RunConfig
from more_ds.ds_config import BatchSizes, batch_sizes, resolve, zero_stage
from more_ds.errors import UserError
from more_ds.methods import METHODS, adapter_config, check_given, check_together
from more_ds.model import DTYPES, check_model
from more_ds.optimizers import is_paged
from more_ds.plan import with_demo
from more_ds.plan_checks import check_fits, check_paged
from more_ds.planner.hardware import Gpu, model_config
from more_ds.planner.memory import Inventory, Memory, Setting, inventory, states, unpacking_traffic, with_activations
from more_ds.planner.timing import StepTime, compute_seconds, step_time
from more_ds.planner.trace import Tracer, Workload
from more_ds.tasks import resolve_tasks
from more_ds.tuners.full import FullConfig

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a job."""

    gpu: Gpu
    gpus: int
    nodes: int = 1

    def __str__(self) -> str:
        return f"{self.gpus} x {self.gpu.name}" + (f" on {self.nodes} nodes" if self.nodes > 1 else "")

    @property
    def per_node(self) -> int:
        """GPUs of a node."""
        return self.gpus // self.nodes


@dataclass(frozen=True)
class Candidate:
    """One way to run a recipe.

    Attributes:
        ds_path: DeepSpeed's JSON file.
        stage: its ZeRO stage.
        sizes: how the global batch is cut.
        memory: bytes of a rank.
        time: of one optimizer step.
        flops: of one optimizer step, all ranks together.
        fits: whether the memory is there.
    """

    ds_path: str
    stage: int
    sizes: BatchSizes
    memory: Memory
    time: StepTime
    flops: float
    fits: bool


class Subject:
    """A recipe's model with its adapter; what is counted and traced of it is kept."""

    def __init__(self, config: RunConfig, prompt: int | None = None, answer: int | None = None) -> None:
        """Read the shapes.

        Args:
            config: the recipe.
            prompt: tokens of a prompt; None: the most that the recipe allows.
            answer: tokens of an answer; None: likewise.

        Raises:
            UserError: the model is not known, or cannot do what the recipe wants.
        """
        self.dtype = "bf16" if config.dtype == "auto" else config.dtype
        self.tasks = resolve_tasks(config.tasks or None, config.suite, config.tasks_file)
        check_given(config.method, {"init_adapter": config.init_adapter, **config.adapter})
        self.config = config = with_demo(config)
        shape = model_config(config.model, config.revision)
        check_model(shape, self.dtype, config.max_source_length + config.max_target_length)
        options, _ = with_sources(config)
        adapter = adapter_config(config.method, options, [task.name for task in self.tasks], shape)
        check_fits(config, shape, self.dtype)
        torch_dtype = DTYPES[self.dtype]
        self.workload = Workload(
            shape, adapter, torch_dtype, torch_dtype, prompt or config.max_source_length,
            answer or config.max_target_length, config.gradient_checkpointing, config.attn_implementation or "sdpa",
        )  # fmt: skip
        self.parameters: Inventory = inventory(self.workload)
        self._tracers: dict[bool, Tracer] = {}

    def candidate(self, cluster: Cluster, ds_path: str, sizes: BatchSizes) -> Candidate:
        """Memory and time of one way to run it."""
        ds_config = resolve(ds_path, self.config, sizes, self.dtype, per_node=cluster.per_node)
        check_paged(self.config.optim, ds_config, on_gpu=True)
        check_together(self.config.method, zero3=zero_stage(ds_config) == 3)
        setting = Setting(ds_config, cluster.gpus, cluster.per_node, self.config.quantization, optim=self.config.optim)
        workload, tracer = self._traced(setting.stage)
        held = states(self.parameters, workload, setting)
        saved, peak = tracer.value(sizes.micro, lambda t: t.saved), tracer.peak(sizes.micro)
        memory = with_activations(held, saved, peak, on_gpu=True)
        kernels, flops, traffic = (
            tracer.value(sizes.micro, measure)
            for measure in (lambda t: t.kernels, lambda t: t.flops, lambda t: t.traffic)
        )
        traffic += unpacking_traffic(self.parameters, workload, self.config.quantization)
        seconds = compute_seconds(kernels, flops, traffic, cluster.gpu.speed)
        time = step_time(
            seconds, sizes.accumulation, self.parameters, workload, setting, cluster.gpu.links(cluster.per_node)
        )
        return Candidate(
            ds_path, zero_stage(ds_config), sizes, memory, time, flops * sizes.accumulation * cluster.gpus,
            memory.total <= cluster.gpu.memory * 1e9,
        )  # fmt: skip

    def _traced(self, stage: int) -> tuple[Workload, Tracer]:
        """The workload and its tracer: DeepSpeed casts PEFT's float32 adapter, except under ZeRO-3."""
        is_adapter = not isinstance(self.workload.adapter, FullConfig)
        dtype = torch.float32 if stage == 3 and is_adapter else self.workload.dtype
        workload = replace(self.workload, adapter_dtype=dtype, partitioned=stage == 3)
        if workload.partitioned not in self._tracers:
            self._tracers[workload.partitioned] = Tracer(workload)
        return workload, self._tracers[workload.partitioned]


def cuts(config: RunConfig, world: int) -> Iterator[BatchSizes]:
    """The ways to cut the global batch, largest micro-batch first; the recipe's own where it says how.

    Raises:
        UserError: it does not divide.
    """
    if config.per_device_train_batch_size or config.gradient_accumulation_steps:
        yield batch_sizes(config, world)
        return
    per_rank = batch_sizes(config, world).micro
    for micro in range(per_rank, 0, -1):
        if per_rank % micro == 0:
            yield BatchSizes(config.train_batch_size, micro, per_rank // micro, world)


def candidates(subject: Subject, cluster: Cluster, ds_paths: Sequence[str]) -> list[Candidate]:
    """For each DeepSpeed configuration the largest micro-batch that fits, or the smallest one, which does not.

    Raises:
        UserError: the global batch does not divide, or a configuration contradicts the recipe.
    """
    found = []
    for path in ds_paths:
        candidate = _smallest(subject, cluster, path)
        if candidate.fits:
            larger = list(cuts(subject.config, cluster.gpus))[:-1]
            tries = (subject.candidate(cluster, path, sizes) for sizes in larger)
            candidate = next((one for one in tries if one.fits), candidate)
        found.append(candidate)
    return found


def _smallest(subject: Subject, cluster: Cluster, ds_path: str) -> Candidate:
    """The way to run it with the smallest micro-batch."""
    return subject.candidate(cluster, ds_path, list(cuts(subject.config, cluster.gpus))[-1])


def best(found: Sequence[Candidate]) -> Candidate | None:
    """The fastest candidate that fits; None if none does."""
    fitting = [candidate for candidate in found if candidate.fits]
    return min(fitting, key=lambda candidate: candidate.time.seconds, default=None)


def shipped(config: RunConfig, nodes: int = 1) -> list[str]:
    """The DeepSpeed configurations that come with the package and go with a run's optimizer, method and nodes."""
    without = ["offload"] * is_paged(config.optim) + ["zero3"] * ("zero3" in METHODS[config.method].refuses)
    without += ["hpz"] * (nodes == 1)  # the copy would be the partition itself
    paths = sorted(DS_CONFIGS.glob("*.json"))
    return [str(path) for path in paths if not any(word in path.stem for word in without)]


def nearest(subject: Subject, cluster: Cluster, ds_paths: Sequence[str]) -> str:
    """The smallest change with which the recipe fits: checkpointing, 4 bits, or more GPUs.

    Returns:
        The flags that make it.
    """
    tries: list[tuple[str, RunConfig, Cluster]] = []
    config, flags, refuses = subject.config, "", METHODS[subject.config.method].refuses
    if not config.gradient_checkpointing and "gradient_checkpointing" not in refuses:
        config, flags = replace(config, gradient_checkpointing=True), " --gradient_checkpointing"
        tries.append((flags.strip(), config, cluster))
    if config.quantization == "none" and "quantization" not in refuses:
        tries.append((f"--quantization 4bit{flags}", replace(config, quantization="4bit"), cluster))
    gpus = cluster.gpus
    while (gpus := gpus * 2) <= min(64, config.train_batch_size):
        nodes = max(cluster.nodes, gpus // max(cluster.gpu.per_node, cluster.per_node))
        text = f"--gpus {gpus}" + (f" --nodes {nodes}" if nodes > 1 else "") + flags
        tries.append((text, config, Cluster(cluster.gpu, gpus, nodes)))
    workload = subject.workload
    for text, changed, larger in tries:
        other = Subject(changed, workload.prompt, workload.answer)
        if any(_smallest(other, larger, path).fits for path in ds_paths):
            return text
    return "a GPU with more memory"


def require_divisible(gpus: int, nodes: int) -> None:
    """Refuse GPUs that do not spread evenly over the nodes.

    Raises:
        UserError: they do not.
    """
    if gpus % nodes:
        raise UserError(f"--gpus {gpus} do not spread evenly over --nodes {nodes}; --gpus counts those of all nodes")


def tokens_per_step(subject: Subject, sizes: BatchSizes) -> int:
    """Tokens of the rows of an optimizer step, all full."""
    workload = subject.workload
    return sizes.total * (workload.prompt + workload.answer)
