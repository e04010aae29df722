"""Everything about a run that can be known, and refused, before a weight is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, PromptTuningConfig
from torch import Tensor

from more_ds import demo
from more_ds.compose.sources import with_sources
from more_ds.config import RunConfig
from more_ds.data.encoding import Encoder
from more_ds.data.rows import load_examples
from more_ds.data.sampler import BalancedSampler
from more_ds.data.stored import stored_examples
from more_ds.data.tokens import Tokens, tokenised
from more_ds.distillation import read_teachers
from more_ds.ds_config import BatchSizes, batch_sizes, resolve, zero_stage
from more_ds.errors import UserError
from more_ds.loading import start_from
from more_ds.methods import METHODS, adapter_config, check_given
from more_ds.model import (
    attach,
    check_model,
    load_tokenizer,
    parameters_by_kind,
    read_model_config,
    without_weights,
)
from more_ds.plan_checks import (
    check_fits,
    check_monitors,
    check_paged,
    check_row,
    check_sharding,
    check_start,
    check_targets,
    check_taught,
    check_vocabulary,
    check_weights,
)
from more_ds.prompts import most_alike
from more_ds.quantised import check_quantised
from more_ds.tasks import Task, resolve_tasks
from more_ds.tasks.render import Example, expand
from more_ds.tuners.linear import untouched_experts
from more_ds.tuners.stacked_weights import in_words


@dataclass(frozen=True)
class Plan:
    """A run that has been checked.

    Attributes:
        config: the run's configuration, with the demo's name replaced by its folders.
        dtype: `fp32`, `bf16` or `fp16`.
        sizes: how a global batch is cut.
        ds_config: what DeepSpeed gets.
        tasks: the tasks; a task's index is its id.
        train: training examples by task; one per reference.
        tokens: their token ids, where examples are grouped by length.
        validation: validation examples by task name.
        test: test examples by split (`test`, and the further test splits of some tasks) and task name; empty if the
            run does not test.
        model_config: the base model's Hugging Face configuration.
        encoder: text to token ids.
        adapter: the method's PEFT configuration.
        trainable: number of trainable parameters by kind.
        frozen: number of frozen parameters.
        maps: number of adapted maps by their last name.
        untouched: what of the model's stacked experts is neither adapted nor trained, in words; empty: nothing.
        sampler: the sampling plan.
        total_steps: optimizer steps.
        eval_steps: optimizer steps between evaluations.
        fill: puts into the fresh adapter what it is made of (MoLE, ATTEMPT); None for other methods.
        teachers: prompts, (tasks, length, width), that MPT is taught by; None: it has no teachers.
    """

    config: RunConfig
    dtype: str
    sizes: BatchSizes
    ds_config: dict[str, Any]
    tasks: list[Task]
    train: list[Sequence[Example]]
    tokens: list[Tokens] | None
    validation: dict[str, list[Example]]
    test: dict[str, dict[str, list[Example]]]
    model_config: Any
    encoder: Encoder
    adapter: PeftConfig
    trainable: dict[str, int]
    frozen: int
    maps: dict[str, int]
    untouched: str
    sampler: BalancedSampler
    total_steps: int
    eval_steps: int
    fill: Callable[[Any], None] | None
    teachers: Tensor | None

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks in the order of their ids."""
        return [task.name for task in self.tasks]

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return zero_stage(self.ds_config)

    @property
    def epochs(self) -> float:
        """Passes over the mixture."""
        return self.total_steps / self.sampler.steps_per_epoch


def make(
    config: RunConfig,
    *,
    ds_config_path: str | None,
    world: int,
    on_gpu: bool,
    per_node: int | None = None,
    group_size: int | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Check a run against its files, its model and its DeepSpeed configuration.

    Args:
        config: the run.
        ds_config_path: DeepSpeed's JSON file, or None for ZeRO-0.
        world: number of ranks.
        on_gpu: whether they compute on GPUs.
        per_node: ranks of a node; None: all are on one.
        group_size: examples that hold one task, of the run that is resumed; None: a micro-batch.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: whatever is wrong with it.
    """
    sizes = batch_sizes(config, world)
    dtype = config.dtype if config.dtype != "auto" else "bf16" if on_gpu else "fp32"
    if dtype == "fp16" and not on_gpu:
        raise UserError("fp16 needs a GPU; use --dtype bf16 or fp32")
    ds_config = resolve(ds_config_path, config, sizes, dtype, per_node=per_node)
    check_sharding(ds_config, on_gpu)
    check_paged(config.optim, ds_config, on_gpu)
    if config.gradient_cosine and zero_stage(ds_config) == 3:
        raise UserError(
            "--gradient_cosine needs whole parameters on each rank, not ZeRO-3; use a ds_config with ZeRO-2"
        )
    tasks = resolve_tasks(config.tasks or None, config.suite, config.tasks_file)
    check_weights(config, tasks)
    check_given(config.method, {"init_adapter": config.init_adapter, **config.adapter})
    config = with_demo(config)
    model_config = read_model_config(config.model, revision=config.revision, trust_remote_code=trust_remote_code)
    zero3 = zero_stage(ds_config) == 3
    check_quantised(model_config, config.quantization, dtype=dtype, zero3=zero3, on_gpu=on_gpu)
    names = [task.name for task in tasks]
    config = with_start(config)
    check_start(config)
    check_monitors(config.report_to)
    options, fill = with_sources(config)
    adapter = adapter_config(config.method, options, names, model_config)
    check_fits(config, model_config, dtype, zero3=zero3)
    check_row(config, model_config)
    teachers = None
    if config.distill_from is not None:
        check_taught(config.method)
        teachers = read_teachers(config.distill_from, names, adapter.num_virtual_tokens)  # type: ignore[attr-defined]
    virtual = getattr(adapter, "num_virtual_tokens", 0)
    check_model(model_config, dtype, virtual + config.max_source_length + config.max_target_length)
    encoder = Encoder(
        load_tokenizer(config.model, revision=config.revision, trust_remote_code=trust_remote_code),
        is_encoder_decoder=model_config.is_encoder_decoder,
        max_source_length=config.max_source_length,
        max_target_length=config.max_target_length,
    )
    check_vocabulary(encoder, model_config)
    counted = count(model_config, adapter, trust_remote_code, config.init_adapter)
    train = [_training_examples(config, task) for task in tasks]
    validation = {task.name: _load(config, task, "validation", config.eval_limit) for task in tasks}
    tokens = None
    if config.group_by_length:  # which finds answers that are too long by itself
        tokens = [tokenised(task.name, examples, encoder) for task, examples in zip(tasks, train, strict=True)]
    else:
        check_targets(encoder, train)
    sampler = _sampler(config, tasks, train, sizes, group_size or sizes.micro, tokens)
    total = config.max_steps or math.ceil(config.num_train_epochs * sampler.steps_per_epoch)
    return Plan(
        config=config,
        dtype=dtype,
        sizes=sizes,
        ds_config=ds_config,
        tasks=tasks,
        train=train,
        tokens=tokens,
        validation=validation,
        test=_test_examples(config, tasks) if config.test else {},
        model_config=model_config,
        encoder=encoder,
        adapter=adapter_config(config.method, options, names, model_config, total),
        trainable=counted.trainable,
        frozen=counted.frozen,
        maps=counted.maps,
        untouched=counted.untouched,
        sampler=sampler,
        total_steps=total,
        eval_steps=min(config.eval_steps or sampler.steps_per_epoch, total),
        fill=fill,
        teachers=teachers,
    )


def _sampler(
    config: RunConfig,
    tasks: Sequence[Task],
    train: Sequence[Sequence[Example]],
    sizes: BatchSizes,
    group_size: int,
    tokens: Sequence[Tokens] | None,
) -> BalancedSampler:
    return BalancedSampler(
        [len(examples) for examples in train],
        strategy=config.sampling,
        scope=config.sampling_scope,
        group_size=group_size,
        groups_per_step=sizes.total // group_size,
        seed=config.seed,
        temperature=config.sampling_temperature,
        weights=[config.sampling_weights[task.name] for task in tasks] if config.sampling_weights else None,
        names=[task.name for task in tasks],
        lengths=None if tokens is None else [own.lengths for own in tokens],
    )


def with_demo(config: RunConfig) -> RunConfig:
    """Put the demo's folders in the place of its names; they are made on first use."""
    if config.model in demo.MODELS:
        config = replace(config, model=str(demo.prepare(demo.MODELS[config.model]).model_dir))
    if config.data_dir is None and "demo" in config.suite:
        config = replace(config, data_dir=str(demo.prepare_data()))
    return config


def with_start(config: RunConfig) -> RunConfig:
    """Put the one prompt that a run starts from in the place of several.

    Raises:
        UserError: several without a prompt to compare them with, or the other way round; one holds no such prompt.
    """
    names = (config.init_adapter or "").split(",")
    if (len(names) > 1) != (config.init_like is not None):
        found = f"init_adapter names {len(names) if config.init_adapter else 'none'}"
        raise UserError(
            f"init_like chooses among several init_adapter, a,b,c: {found}, init_like is {config.init_like}"
        )
    if config.init_like is None:
        return config
    if METHODS[config.method].config is not PromptTuningConfig:
        raise UserError(f"init_like compares prompts of prompt_tuning, and the method is {config.method}; leave it out")
    length = config.adapter.get("num_virtual_tokens", METHODS[config.method].defaults["num_virtual_tokens"])
    return replace(config, init_adapter=most_alike(config.init_like, names, length), init_like=None)


def _load(config: RunConfig, task: Task, split: str, limit: int | None) -> list[Example]:
    return load_examples(
        task, split, data_dir=config.data_dir, limit=limit, seed=config.seed, plain=config.plain_prompts
    )


def _training_examples(config: RunConfig, task: Task) -> Sequence[Example]:
    """A few as a list, all of them from the disk: as many as there are need not fit in memory."""
    if config.train_limit is not None:
        return expand(_load(config, task, "train", config.train_limit))
    return stored_examples(task, data_dir=config.data_dir, plain=config.plain_prompts)


def _test_examples(config: RunConfig, tasks: Sequence[Task]) -> dict[str, dict[str, list[Example]]]:
    splits = dict.fromkeys(split for task in tasks for split in ("test", *task.extra_tests))
    return {
        split: {
            task.name: _load(config, task, split, config.eval_limit)
            for task in tasks
            if split == "test" or split in task.extra_tests
        }
        for split in splits
    }


@dataclass(frozen=True)
class Counts:
    """What a method trains in a model; see `Plan`."""

    trainable: dict[str, int]
    frozen: int
    maps: dict[str, int]
    untouched: str


def count(model_config: Any, adapter: PeftConfig, trust_remote_code: bool, init_adapter: str | None = None) -> Counts:
    """Count what a method trains in a model, from shapes alone."""
    base = without_weights(model_config, trust_remote_code)
    with init_empty_weights(), torch.random.fork_rng():
        model: Any = attach(base, adapter)
    if init_adapter is not None:
        start_from(model, init_adapter)  # in shape alone
    trainable = parameters_by_kind(model)
    # Methods that train a prompt wrap no modules, and have no tuner.
    tuner = getattr(model, "base_model", model)
    targeted = [*getattr(tuner, "targeted_module_names", []), *getattr(tuner, "targeted_parameter_names", [])]
    untouched = untouched_experts(model)
    return Counts(
        trainable,
        sum(p.numel() for p in model.parameters()) - sum(trainable.values()),
        Counter(name.rsplit(".", 1)[-1] for name in targeted),
        in_words(untouched) if untouched else "",
    )
