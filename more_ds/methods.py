"""The methods that `--method` chooses among: what each is, what it needs, and its PEFT configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
)

from more_ds.errors import UserError, suggest
from more_ds.tuners import (
    AttemptConfig,
    BitFitConfig,
    DyLoraConfig,
    FullConfig,
    HoulsbyConfig,
    HydraLoraConfig,
    HyperFormerConfig,
    MixLoraConfig,
    MoeLoraConfig,
    MoleConfig,
    MoreConfig,
    MtlLoraConfig,
    MultiLoraConfig,
    SMoRAConfig,
    SoRAConfig,
    XLoraConfig,
)


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        config: class of its PEFT configuration.
        about: what it is, in one line.
        merges: into one weight (`yes`), into one weight for each task (`by task`), or `no`.
        tasks: the options that take the number and the names of the tasks; None where it has no such option.
        steps: the option that takes the number of optimizer steps; None: there is none.
        shares: options whose default is a share of that number, at least 1.
        fixed: options that make the method what it is, and that cannot be changed.
        defaults: options whose default is not the configuration's own.
        derived: options that are read from those that are given.
        needs: keys or options that must be given -> what they say, in words.
        refuses: what it cannot go with -> why, in words.
    """

    config: type[PeftConfig]
    about: str
    merges: Literal["yes", "by task", "no"] = "yes"
    tasks: tuple[str | None, str | None] = (None, None)
    steps: str | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=lambda: ALL_LINEAR)
    derived: tuple[str, ...] = ()
    needs: Mapping[str, str] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)

    @property
    def routes_by_task(self) -> bool:
        """Whether batches must say which task their examples are of."""
        return self.tasks[0] is not None

    @property
    def options(self) -> set[str]:
        """Names of the options that can be set."""
        return {f.name for f in fields(self.config) if f.init} - {*self.fixed, *self.tasks, *self.derived, self.steps}


ALL_LINEAR: dict[str, Any] = {"target_modules": "all-linear"}
BY_NAME = ("num_tasks", "task_names")
# One prompt, before the encoder, as in the papers; PEFT gives the decoder of an encoder-decoder another one.
ENCODER_PROMPT = {"num_transformer_submodules": 1}

ALONE = {"padding_free": "what it puts before a row is for one example, and a row then holds all of a micro-batch"}

SOME_STEPS = 1_000_000
"""In the place of a number of steps that is not known."""

METHODS: dict[str, Method] = {
    "more": Method(MoreConfig, "mixture of low-rank experts: a rank for each task", "by task", BY_NAME),
    "moelora": Method(MoeLoraConfig, "LoRA cut into experts, weighed by a gate on the task", "by task", BY_NAME),
    "mtl_lora": Method(MtlLoraConfig, "a matrix for each task between a shared A and mixed B's", "by task", BY_NAME),
    "multilora": Method(MultiLoraConfig, "LoRAs side by side, with a scale for every output"),
    "hydralora": Method(HydraLoraConfig, "one A, several B's, mixed for every token", "no"),
    "mixlora": Method(MixLoraConfig, "FFNs as experts with LoRAs, the best two for every token", "no", defaults={}),
    "smora": Method(SMoRAConfig, "every rank an expert; a token uses the best few", "no"),
    "dylora": Method(DyLoraConfig, "LoRA that works when cut to any rank"),
    "sora": Method(SoRAConfig, "LoRA whose superfluous ranks are driven to zero"),
    "bitfit": Method(BitFitConfig, "biases alone, added where there are none", defaults={}),
    "houlsby": Method(HoulsbyConfig, "bottlenecks after attention and FFN", "no", defaults={}),
    "hyperformer": Method(
        HyperFormerConfig, "networks that write every task's bottlenecks", "no", BY_NAME, defaults={}
    ),
    "mole": Method(
        MoleConfig,
        "finished LoRAs, weighed by gates in every block",
        "no",
        derived=("ranks", "target_modules"),
        needs={"loras": "the LoRAs that it mixes"},
        defaults={},
        refuses={"padding_free": "its gates weigh a row by its text, and a row then holds several examples"},
    ),
    "xlora": Method(
        XLoraConfig,
        "finished LoRAs, weighed by a classifier for every token",
        "no",
        derived=("ranks", "target_modules"),
        needs={"loras": "the LoRAs that it mixes"},
        defaults={},
        refuses={
            "encoder_decoder": "it weighs the tokens of one sequence; use --method mole",
            "padding_free": "its classifier is known to be right with one example in a row only",
        },
    ),
    "full": Method(
        FullConfig,
        "full fine-tuning: all of the model, and no adapter",
        "no",
        defaults={},
        refuses={"quantization": "rounded weights cannot be trained; use --quantization none, or an adapter"},
    ),
    "lora": Method(LoraConfig, "low-rank updates, shared by all tasks"),
    "rslora": Method(LoraConfig, "LoRA scaled by alpha / sqrt(r)", fixed={"use_rslora": True}),
    "dora": Method(LoraConfig, "LoRA on the weights' directions, and their lengths", fixed={"use_dora": True}),
    "adalora": Method(
        AdaLoraConfig,
        "LoRA as singular values, of which the least important are dropped",
        steps="total_step",
        shares={"tinit": 0.1, "tfinal": 0.5, "deltaT": 0.001},
        fixed={"use_dora": False, "rank_pattern": None},
        refuses={
            "fp16": "its scores need gradients of one scale; use --dtype bf16 or fp32",
            "zero3": "its orthogonality loss needs whole matrices; use ds_configs/zero2.json",
        },
    ),
    "vera": Method(VeraConfig, "vectors that scale one frozen random pair of matrices"),
    "ia3": Method(IA3Config, "vectors that scale keys, values and the FFN's inner activations", defaults={}),
    "poly": Method(
        PolyConfig,
        "Polytropon: a few LoRAs, mixed by learned weights for each task",
        "no",
        ("n_tasks", None),
        refuses={
            "gradient_checkpointing": "it forgets the tasks before the recomputation",
            "padding_free": "it draws its skills for every row, and a row then holds several examples",
        },
    ),
    "prompt_tuning": Method(
        PromptTuningConfig,
        "trained vectors before the prompt",
        "no",
        fixed=ENCODER_PROMPT,
        defaults={"num_virtual_tokens": 100},
        refuses=ALONE,
    ),
    "spot": Method(
        PromptTuningConfig,
        "prompt tuning that starts from a prompt trained on another task",
        "no",
        fixed={**ENCODER_PROMPT, "prompt_tuning_init": "RANDOM"},
        defaults={"num_virtual_tokens": 100},
        needs={"init_adapter": "a trained prompt to start from"},
        refuses=ALONE,
    ),
    "p_tuning": Method(
        PromptEncoderConfig,
        "vectors before the prompt, written by a small network",
        "no",
        fixed=ENCODER_PROMPT,
        defaults={"num_virtual_tokens": 20},
        refuses=ALONE,
    ),
    "mpt": Method(
        MultitaskPromptTuningConfig,
        "one prompt, multiplied by a matrix of low rank for each task",
        "no",
        ("num_tasks", None),
        fixed=ENCODER_PROMPT,
        defaults={"num_virtual_tokens": 100},
        refuses=ALONE,
    ),
    "attempt": Method(
        AttemptConfig,
        "prompts mixed for every example of finished ones and one of its task",
        "no",
        BY_NAME,
        defaults={},
        needs={"sources": "the trained prompts that it mixes"},
        refuses=ALONE,
    ),
    "prefix_tuning": Method(
        PrefixTuningConfig,
        "trained keys and values before those of every layer",
        "no",
        fixed={"prefix_projection": False},
        defaults={"num_virtual_tokens": 20},
        refuses={
            "gradient_checkpointing": "its keys and values come as a cache, which checkpointing turns off",
            "encoder_decoder": "PEFT puts its prefix before the decoder alone; use prompt_tuning",
            **ALONE,
        },
    ),
}
"""Name of a method -> the method."""


SUBJECTS = {
    "encoder_decoder": "an encoder-decoder model", "quantization": "a quantised base", "zero3": "ZeRO-3",
    "padding_free": "--padding_free",
}  # fmt: skip
"""Keys of `Method.refuses` in words, where they are not those of the configuration."""


def adapter_config(
    method: str, options: dict[str, Any], task_names: Sequence[str], model_config: Any, steps: int | None = None
) -> PeftConfig:
    """The PEFT configuration of a method for these tasks and this model.

    Args:
        method: its name.
        options: that are set.
        task_names: in the order of their numbers.
        model_config: the base model's Hugging Face configuration.
        steps: number of optimizer steps; None: not known, where shapes alone are wanted.

    Raises:
        UserError: a value is out of range.
    """
    chosen = METHODS[method]
    known = {**chosen.defaults, **options, **chosen.fixed}
    if chosen.steps is not None:
        total = steps or SOME_STEPS
        shares = {name: max(1, int(share * total)) for name, share in chosen.shares.items()}
        known = {**shares, **known, chosen.steps: total}
    for name, value in zip(chosen.tasks, (len(task_names), list(task_names)), strict=True):
        if name is not None:
            known[name] = value
    task_type = "SEQ_2_SEQ_LM" if model_config.is_encoder_decoder else "CAUSAL_LM"
    try:
        return chosen.config(task_type=task_type, **known)
    except (ValueError, TypeError) as error:
        raise UserError(f"adapter: {' '.join(str(error).split())}") from error


def check_method(method: str, options: Mapping[str, Any]) -> list[str]:
    """What is wrong with the name of a method and the names of its options."""
    if method not in METHODS:
        return [f"unknown method '{method}'{suggest(method, METHODS)}; `--method list` describes them"]
    chosen, wrong = METHODS[method], []
    for key in options:
        if key in chosen.fixed:
            wrong.append(f"adapter.{key} cannot be set: it is {chosen.fixed[key]} in {method}")
        elif key not in chosen.options:
            wrong.append(f"adapter.{key}: unknown option{suggest(key, chosen.options)}")
    return wrong


def check_given(method: str, given: Mapping[str, Any]) -> None:
    """Refuse a method without a key, or an option, that it needs; `given` are those of the run, by name.

    Raises:
        UserError: naming it.
    """
    for name, what in METHODS[method].needs.items():
        if not given.get(name):
            flag = f"adapter.{name}" if name in METHODS[method].options else name
            raise UserError(f"{method} needs {what}: --{flag} ...")


def check_together(method: str, **conditions: bool) -> None:
    """Refuse a method with a model or a setting that it cannot go with.

    Args:
        method: its name.
        conditions: keys of `Method.refuses`, and whether they hold.

    Raises:
        UserError: naming the reason.
    """
    for name, why in METHODS[method].refuses.items():
        if conditions.get(name):
            raise UserError(f"{method} does not go with {SUBJECTS.get(name, name)}: {why}")
