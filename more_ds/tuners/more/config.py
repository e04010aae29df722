"""Configuration of MoRE: the paper's settings, and the switches where its published code differs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peft import PeftConfig

from more_ds.tuners.base import peft_type
from more_ds.tuners.linear import TARGETS

CHOICES = {
    "gate": ("ste", "ste_all", "soft", "frozen", "table"),
    "init_rank": ("random", "full"),
    "scale": ("rank", "component", "none"),
    "experts": ("prefix", "subset"),
    "gate_input": ("task", "pooled"),
    "pooling": ("mean", "first", "last"),
    "contrastive_maps": ("all", "encoder"),
    "backend": ("auto", "reference", "eager", "fused", "triton"),
}

HARD = ("ste", "ste_all")
"""Gates that choose one expert and are trained."""


@dataclass
class MoreConfig(PeftConfig):
    """Configuration of a MoRE adapter.

    Raises:
        ValueError: a value is out of range, or a switch has no such setting.
    """

    names_weights: ClassVar[bool] = True
    """Whether `target_modules` may name stacked weights."""

    r: int = field(default=8, metadata={"help": "Maximal rank, and the number of experts."})
    lora_alpha: float = field(default=32, metadata={"help": "The update is multiplied by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of A, in training."})
    num_tasks: int = field(default=1, metadata={"help": "Number of tasks T."})
    task_names: list[str] | None = field(default=None, metadata={"help": "Names of the tasks, in task_ids' order."})
    first_tasks: int | None = field(
        default=None,
        metadata={
            "help": "Number of tasks before any was added by `add_task`; None: all. It stays the T of c = r_t / T, so "
            "that adding a task leaves the others as they are; a task after it has an embedding of its own."
        },
    )
    task_dim: int | None = field(
        default=None, metadata={"help": "Width of the task embeddings; None: the input width of each map."}
    )
    gate: Literal["ste", "ste_all", "soft", "frozen", "table"] = field(
        default="ste",
        metadata={
            "help": "`ste`: hard choice, straight-through gradient to the p of the chosen expert (paper). "
            "`ste_all`: the same choice, and the gradient of `soft` for the p of every expert. "
            "`soft`: all experts, weighted by p. "
            "`frozen`: the ranks stay what the random gate says at the start, as in the published code. "
            "`table`: no gate and no embeddings, the saved ranks alone; for inference."
        },
    )
    init_rank: Literal["random", "full"] = field(
        default="random",
        metadata={
            "help": "Rank that tasks begin with. `random`: what W_g and E say, b_g being zero (paper). `full`: r; b_g "
            "is 1 there, which outweighs the random rest, and the gate gives up ranks where that helps."
        },
    )
    scale: Literal["rank", "component", "none"] = field(
        default="rank",
        metadata={
            "help": "`rank`: c = r_t / T (paper); with r = 16, 8 tasks have twice the update that lora_alpha says, and "
            "64 tasks a quarter of it. `component`: component j is multiplied by (j / r)^2, as in the published code. "
            "`none`: c = 1."
        },
    )
    experts: Literal["prefix", "subset"] = field(
        default="prefix",
        metadata={
            "help": "`prefix`: expert k is the components 1..k (paper). `subset`: k components drawn at random once, "
            "the same for all maps, so that the experts are not nested."
        },
    )
    gate_input: Literal["task", "pooled"] = field(
        default="task",
        metadata={"help": "`task`: the task embedding (paper). `pooled`: the example's pooled input; not mergeable."},
    )
    pooling: Literal["mean", "first", "last"] = field(
        default="mean",
        metadata={
            "help": "How the prompt's tokens are pooled. `first` is BOS in a causal model, the same for every example."
        },
    )
    contrastive_weight: float = field(default=0.1, metadata={"help": "lambda of the contrastive loss; 0: none."})
    temperature: float = field(default=0.05, metadata={"help": "tau of the contrastive loss."})
    contrastive_maps: Literal["all", "encoder"] = field(
        default="all",
        metadata={"help": "`all` maps (paper), or those of the `encoder` alone, as in the published code."},
    )
    target_modules: list[str] | str | None = field(
        default="all-linear",
        metadata={"help": TARGETS},
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Stacked weights of experts, by name, e.g. `mlp.experts.gate_up_proj`. None: those that "
            "`target_modules` matches too, which `ffn` and `attention+ffn` do; `all-linear` means modules alone."
        },
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names or a regular expression."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Only these layers."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layers' list."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})
    init_weights: bool = field(
        default=True, metadata={"help": "True: B starts at zero, the adapted model equals the base."}
    )
    backend: Literal["auto", "reference", "eager", "fused", "triton"] = field(
        default="auto",
        metadata={
            "help": "How it is computed; the mathematics and the parameters are the same, and it is not saved. "
            "`reference`: map by map, to the letter. `eager`: the gates of all maps in one step. `fused`: that, and "
            "maps of one input in one function with a hand-written gradient. `triton`: that, with a kernel on CUDA "
            "that adds the update to the base's output on the chip. `auto`: `fused`, or `eager` if compiled. "
            "Where parameters are spread over ranks, and for gates other than the paper's, `reference` serves."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of the random subsets and the random projection."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("more")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"MoreConfig.{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}")
        for name in ("r", "num_tasks"):
            if getattr(self, name) < 1:
                raise ValueError(f"MoreConfig.{name} is {getattr(self, name)}; it must be at least 1")
        if self.first_tasks is not None and not 1 <= self.first_tasks <= self.num_tasks:
            raise ValueError(
                f"MoreConfig.first_tasks is {self.first_tasks}; it must be from 1 to num_tasks={self.num_tasks}"
            )
        if self.gate == "table" and (self.gate_input != "task" or self.contrastive_weight > 0):
            raise ValueError(
                "MoreConfig.gate='table' has no embeddings: it needs gate_input='task' and contrastive_weight=0"
            )
        if self.temperature <= 0:
            raise ValueError(f"MoreConfig.temperature is {self.temperature}; it must be positive")
        if self.task_names is not None and len(self.task_names) != self.num_tasks:
            raise ValueError(f"MoreConfig.task_names has {len(self.task_names)} names for num_tasks={self.num_tasks}")
        if isinstance(self.target_parameters, str):
            raise ValueError("MoreConfig.target_parameters is text; give a list of names")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("MoreConfig.layers_pattern is given without layers_to_transform; give both or neither")

    @property
    def table_sizes(self) -> list[int]:
        """Rows of each parameter of the task table: the first tasks together, then one for each added task."""
        first = self.first_tasks or self.num_tasks
        return [first] + [1] * (self.num_tasks - first)

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with sets in order, so that the same settings are the same bytes, and without the back-end."""
        kept = {name: v for name, v in super().to_dict().items() if name != "backend"}
        return {name: sorted(v) if isinstance(v, set) else v for name, v in kept.items()}
