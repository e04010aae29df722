"""What a run is: a typed configuration, read from a recipe and overridden by flags."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from more_ds.digest import digest
from more_ds.errors import UserError, suggest
from more_ds.methods import METHODS, check_method

RECIPES = Path(__file__).resolve().parents[1] / "launch" / "recipes"


def _option(default: Any, text: str) -> Any:
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run. Names follow `transformers.TrainingArguments`; defaults are the MoRE paper's."""

    # The model
    model: str = _option("demo", "folder or hub id; `demo` or `demo-t5`: the embedded backbone")
    revision: str | None = _option(None, "revision of the hub model")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = _option("auto", "`auto`: bf16 on a GPU, fp32 on a CPU")
    quantization: Literal["none", "4bit", "8bit"] = _option("none", "of the frozen base, by bitsandbytes")
    attn_implementation: str | None = _option(None, "as in transformers: sdpa, eager, flash_attention_2")
    gradient_checkpointing: bool = _option(False, "recompute activations in the backward pass (non-reentrant)")
    # The method
    method: str = _option("more", "how to fine-tune: " + ", ".join(METHODS) + "; `list` describes them")
    adapter: dict[str, Any] = _option({}, "options of the method, e.g. --adapter.r 8 --adapter.gate soft")
    init_adapter: str | None = _option(None, "run or adapter folder of the same method, whose values it starts from")
    init_like: str | None = _option(None, "of several init_adapter, a,b,c: take the prompt most like this run's (SPoT)")
    distill_from: str | None = _option(None, "folder with a prompt_tuning run for each task: they teach mpt")
    # The tasks
    suite: list[str] = _option([], "suites that come with the package, e.g. glue")
    tasks: list[str] = _option([], "which of their tasks; empty: all")
    tasks_file: str | None = _option(None, "a YAML file with tasks of your own")
    data_dir: str | None = _option(None, "folder with <suite>/<task>/{train,validation,test}.jsonl.gz; else the hub")
    plain_prompts: bool = _option(False, "use the tasks' second, plain prompts")
    train_limit: int | None = _option(None, "at most this many training rows per task")
    eval_limit: int | None = _option(None, "at most this many validation and test rows per task")
    max_source_length: int = _option(128, "most tokens of a prompt; a longer one is cut at its end")
    max_target_length: int = _option(64, "most tokens of an answer; a longer one is an error")
    group_by_length: bool = _option(False, "batch examples of similar length; tokenises all first, once, on the disk")
    pad_to_multiple_of: int | None = _option(None, "pad batches to a multiple of it; default: 8 on a GPU, 1 on a CPU")
    padding_free: bool = _option(False, "lay a micro-batch in one row instead of padding it; causal models")
    # The sampler
    sampling: Literal["exp_share", "proportional", "uniform", "temperature", "weights"] = _option(
        "exp_share", "how often a task is drawn; `exp_share` is the paper's"
    )
    sampling_temperature: float = _option(1.0, "size^(1/temperature), with sampling=temperature")
    sampling_weights: dict[str, float] = _option({}, "weight by task name, with sampling=weights")
    sampling_scope: Literal["micro_batch", "step"] = _option(
        "micro_batch", "what holds one task: a micro-batch, or the whole optimizer step"
    )
    # The optimizer
    train_batch_size: int = _option(32, "examples per optimizer step, over all ranks")
    per_device_train_batch_size: int | None = _option(None, "examples per micro-batch; default: no accumulation")
    gradient_accumulation_steps: int | None = _option(None, "micro-batches per step and rank")
    num_train_epochs: float = _option(5.0, "passes over the mixture; one is as many samples as all tasks have rows")
    max_steps: int | None = _option(None, "optimizer steps, instead of epochs")
    optim: Literal["adamw_torch", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = _option(
        "adamw_torch", "AdamW of torch or of bitsandbytes, with moments in 8 bits, or in memory shared with the host"
    )
    learning_rate: float = _option(3e-4, "peak")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = _option("linear", "after the warm-up")
    warmup_steps: int = _option(500, "optimizer steps from 0 to the peak")
    weight_decay: float = _option(0.01, "of AdamW; biases have none")
    adam_beta1: float = _option(0.9, "of AdamW")
    adam_beta2: float = _option(0.999, "of AdamW")
    adam_epsilon: float = _option(1e-8, "of AdamW")
    max_grad_norm: float = _option(1.0, "clip the gradient's norm; 0: do not")
    seed: int = _option(42, "of initialisation, sampling and dropout")
    # Evaluation, saving, logging
    eval_on_start: bool = _option(True, "score the untuned model first")
    eval_steps: int | None = _option(None, "optimizer steps between evaluations; default: one epoch")
    eval_mode: Literal["likelihood", "generation"] = _option("likelihood", "of closed answers, while training")
    per_device_eval_batch_size: int = _option(32, "examples per batch when scoring")
    test: bool = _option(True, "score the best adapter on the test splits at the end")
    early_stopping_patience: int | None = _option(None, "stop after this many evaluations without a better mean")
    save_steps: int | None = _option(None, "optimizer steps between checkpoints; default: at each evaluation")
    save_total_limit: int = _option(2, "checkpoints kept; the best and the last adapter are kept besides")
    logging_steps: int = _option(10, "optimizer steps between rows of metrics.jsonl")
    max_hours: float | None = _option(None, "save and stop before the run has taken so long; go on with --resume auto")
    skip_nonfinite: int = _option(0, "steps with a loss that is not finite to leave out, from the last checkpoint on")
    gradient_cosine: bool = _option(False, "measure at evaluations how the tasks' gradients lie to each other")
    report_to: list[str] = _option([], "tensorboard, wandb, csv: DeepSpeed's monitors")
    output_dir: str | None = _option(None, "run folder; default: runs/<recipe>-<time>")

    def __post_init__(self) -> None:
        """Refuse values that no run can have, all at once."""
        wrong = [
            f"{name} is {getattr(self, name)}; it must be {what}"
            for name, what, ok in (
                *((n, "at least 1", lambda v: v is None or v >= 1) for n in _AT_LEAST_ONE),
                *((n, "0 or more", lambda v: v >= 0) for n in _NOT_NEGATIVE),
                *(
                    (n, "above 0", lambda v: v is None or v > 0)
                    for n in ("learning_rate", "num_train_epochs", "sampling_temperature", "max_hours")
                ),
            )
            if not ok(getattr(self, name))
        ]
        unknown = set(self.report_to) - set(MONITORS)
        wrong += [f"report_to names '{name}'{suggest(name, MONITORS)}" for name in sorted(unknown)]
        wrong += check_method(self.method, self.adapter)
        if wrong:
            raise UserError("; ".join(wrong))

    def digest(self) -> str:
        """A hash of everything that decides the run's result."""
        return digest(asdict(self))


_AT_LEAST_ONE = (
    "train_limit", "eval_limit", "max_source_length", "max_target_length", "train_batch_size", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "eval_steps", "per_device_eval_batch_size",
    "early_stopping_patience", "save_steps", "save_total_limit", "logging_steps", "pad_to_multiple_of",
)  # fmt: skip
_NOT_NEGATIVE = ("warmup_steps", "weight_decay", "max_grad_norm", "skip_nonfinite")
MONITORS = ("tensorboard", "wandb", "csv")


def read_recipe(name: str) -> dict[str, Any]:
    """The keys of a recipe: a YAML file, or the name of one in `launch/recipes` (`demo/ia3`: in a folder of it).

    Raises:
        UserError: no such file, or it does not hold keys and values.
    """
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = [path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml")]
        raise UserError(f"no recipe '{name}'{suggest(name, known)}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, not keys and values")
    return content


def build(values: Mapping[str, Any], origin: str) -> RunConfig:
    """A configuration from untyped values; `origin` names where they came from.

    Raises:
        UserError: unknown keys or values of the wrong type, all at once.
    """
    hints = typing.get_type_hints(RunConfig)
    wrong, typed = [], {}
    for key, value in values.items():
        if key not in hints:
            wrong.append(f"unknown key '{key}'{suggest(key, hints)}")
            continue
        try:
            typed[key] = convert(value, hints[key])
        except (TypeError, ValueError) as error:
            wrong.append(f"{key}: {error}")
    if wrong:
        raise UserError(f"{origin}: {'; '.join(wrong)}")
    return RunConfig(**typed)


def convert(value: Any, hint: Any) -> Any:
    """Check `value` against a type, and convert what YAML and a command line write differently.

    YAML reads `3e-4` as text, and a flag's list is written `a,b`.

    Raises:
        ValueError: it does not fit.
    """
    origin = get_origin(hint)
    if origin is types.UnionType:
        if value is None or value == "none":
            return None
        return convert(value, next(arg for arg in get_args(hint) if arg is not type(None)))
    if origin is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{value!r}; use one of {', '.join(get_args(hint))}")
        return value
    if origin is list:
        items = [part for part in value.split(",") if part] if isinstance(value, str) else value
        if not isinstance(items, list):
            raise ValueError(f"{value!r} is not a list")
        return [convert(item, get_args(hint)[0]) for item in items]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{value!r} is not a mapping")
        return {str(key): convert(item, get_args(hint)[1]) for key, item in value.items()}
    return _scalar(value, hint)


def _scalar(value: Any, hint: Any) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, str) and value.lstrip("-").isdigit():
        return int(value)
    if hint is bool and value in ("true", "false"):
        return value == "true"
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{value!r} is not {'true or false' if hint is bool else hint.__name__}")
