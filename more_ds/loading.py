"""Opening what is to be scored: a run directory, an adapter folder, or a plain model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import MultitaskPromptTuningConfig, PeftConfig, PeftModel, PolyConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from more_ds import log
from more_ds.checkpoint_files import ADAPTER, ADAPTER_CONFIG
from more_ds.data.encoding import Encoder
from more_ds.errors import UserError
from more_ds.model import check_model, load_base, load_tokenizer, read_model_config
from more_ds.quantised import check_quantised
from more_ds.tasks import resolve_tasks
from more_ds.text_model import TextModel
from more_ds.trained import find_trained
from more_ds.tuners.half_precision import freeze_counts

SLOTS = ("best", "last")
"""Where a run keeps its adapters, the better one first."""
EXPORT = "export.json"
"""What an export says of itself, in its folder."""
READING = ("max_source_length", "max_target_length", "plain_prompts")
"""Settings of a run that decide how a prompt reaches the model: with others, the same adapter has other scores."""
SOURCE_LENGTH = 384
"""Most tokens of a prompt for a model that comes without a run."""


@dataclass(frozen=True)
class Subject:
    """What is to be scored.

    Attributes:
        name: as the user wrote it.
        base: folder or hub id of the base model.
        adapter: folder of the adapter; None: the base model alone.
        adapter_config: its PEFT configuration.
        run: the configuration of the run that trained it; empty if there is none.
        folder: where results belong by default.
        reading: of `READING` what is known of the run or, for an exported folder, of the run that it is from.
    """

    name: str
    base: str
    adapter: Path | None = None
    adapter_config: PeftConfig | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = Path("eval_results")
    reading: Mapping[str, Any] = field(default_factory=dict)

    def lengths(self, source: int | None = None, target: int | None = None) -> tuple[int | None, int]:
        """Most tokens of a prompt and of an answer: what is asked for, else the run's, else None and 128."""
        return source or self.reading.get("max_source_length"), target or self.reading.get("max_target_length", 128)

    @property
    def task_ids(self) -> dict[str, int]:
        """The number under which the adapter knows each task, by name; empty if it does not name its tasks."""
        # PEFT's own have no place for names.
        if isinstance(self.adapter_config, (PolyConfig, MultitaskPromptTuningConfig)) and self.run:
            tasks = resolve_tasks(self.run["tasks"] or None, self.run["suite"], self.run["tasks_file"])
            return {task.name: i for i, task in enumerate(tasks)}
        return adapter_tasks(self.adapter_config)


def find_subject(name: str, base_model: str | None = None) -> Subject:
    """Find out what `name` is.

    Args:
        name: a run directory (`config.json` with `best/` or `last/`), an adapter folder, or a model (folder, hub id).
        base_model: the base model, where the recorded one has moved.

    Raises:
        UserError: a run without an adapter, a damaged file, or an adapter that does not name its base model.
    """
    subject = _find(name, base_model)
    return replace(subject, reading=_reading(subject.run, subject.adapter or Path(name)))


def _find(name: str, base_model: str | None) -> Subject:
    folder = Path(name)
    run = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    adapter = next((folder / slot for slot in SLOTS if (folder / slot / ADAPTER_CONFIG).is_file()), None)
    if (folder / ADAPTER_CONFIG).is_file():
        adapter = folder
        above = folder.resolve().parent / "config.json"
        run = _json(above) if above.is_file() else {}
    if adapter is None:
        whole = next((folder / slot for slot in SLOTS if (folder / slot / "config.json").is_file()), None)
        if whole is not None and "model" in run and "model_type" not in run:
            return _whole_model(name, whole, base_model, run)
        if "model" in run and "model_type" not in run:
            raise UserError(f"the run {folder} holds no adapter: no {ADAPTER_CONFIG} in {' or '.join(SLOTS)}; train it")
        return Subject(name, base_model or name, folder=Path("eval_results", folder.resolve().name))
    run = run if "model" in run and "model_type" not in run else {}
    config = _adapter_config(adapter)
    base = base_model or run.get("model") or config.base_model_name_or_path
    if not base:
        raise UserError(f"{adapter}/{ADAPTER_CONFIG} does not name its base model; give --base_model")
    home = adapter.resolve().parent if run else adapter
    return Subject(name, str(base), adapter, config, run, home / "eval")


def _reading(run: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    known = run
    for place in () if run else (folder, folder.resolve().parent):
        if (place / EXPORT).is_file():
            known = _json(place / EXPORT).get("reading", {})
            break
    return {name: known[name] for name in READING if name in known}


def _whole_model(name: str, folder: Path, base_model: str | None, run: Mapping[str, Any]) -> Subject:
    """The model of a run that fine-tuned all of it."""
    if base_model is not None:
        raise UserError(f"the run {name} trained the whole model, which needs no base model; leave --base_model out")
    return Subject(name, str(folder), run=run, folder=folder.parent / "eval")


def choose_device(asked: str | None = None) -> str:
    """Where a model goes: to the device that is asked for, else to a GPU if there is one.

    Raises:
        UserError: there is no such device.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked is None:
        return "cuda" if there else "cpu"
    if asked not in ("cpu", *["cuda"] * (there > 0), *(f"cuda:{i}" for i in range(there))):
        found = f"{there} GPU{'s' * (there != 1)}" if there else "no GPU"
        raise UserError(f"--device {asked}: torch sees {found}; use --device {'cuda' if there else 'cpu'}")
    return asked


def choose_dtype(subject: Subject, dtype: str | None, device: str) -> str:
    """The dtype that is asked for, else the run's; where both leave it open, bf16 on a GPU and fp32 on a CPU."""
    for name in (dtype, subject.run.get("dtype")):
        if name not in (None, "auto"):
            return str(name)
    return "bf16" if device.startswith("cuda") else "fp32"


def load_text_model(
    subject: Subject,
    *,
    dtype: str,
    device: str,
    max_source_length: int | None,
    max_target_length: int,
    trainable: bool = False,
) -> TextModel:
    """The model with its adapter, in evaluation mode.

    Args:
        subject: what to load.
        dtype: `fp32`, `bf16` or `fp16`.
        device: as torch names it.
        max_source_length: most tokens of a prompt; None: 384, or as many as the model has positions for.
        max_target_length: most tokens of an answer.
        trainable: whether what was trained, the adapter or the whole model, is to be trained further.

    Raises:
        UserError: what `more_ds.model` and `load_adapter` refuse.
    """
    recorded = subject.run if subject.base == subject.run.get("model") else {}
    revision = recorded.get("revision")
    config = read_model_config(subject.base, revision=revision)
    further = 0 if config.is_encoder_decoder else max_target_length
    if max_source_length is None:
        room = getattr(config, "max_position_embeddings", None) or SOURCE_LENGTH + further
        max_source_length = max(1, min(SOURCE_LENGTH, room - further))
    check_model(config, dtype, max_source_length + further)
    check_quantised(config, recorded.get("quantization", "none"), dtype=dtype, on_gpu=device.startswith("cuda"))
    tokenizer = load_tokenizer(subject.base, revision=revision)
    encoder = Encoder(
        tokenizer,
        is_encoder_decoder=config.is_encoder_decoder,
        max_source_length=max_source_length,
        max_target_length=max_target_length,
    )
    quantization = recorded.get("quantization", "none")
    attention = recorded.get("attn_implementation")
    model = load_base(
        subject.base,
        config,
        dtype=dtype,
        revision=revision,
        quantization=quantization,
        attn_implementation=attention,
    )
    if subject.adapter is not None:
        model = load_adapter(model, subject.adapter, trainable=trainable)
    elif trainable:
        model.requires_grad_(True)
    if quantization == "none":
        model.to(device)
    model.eval()
    return TextModel(model, encoder)


def adapter_tasks(config: PeftConfig | None) -> dict[str, int]:
    """The number under which an adapter knows each task, by name; empty if it does not name its tasks."""
    names = getattr(config, "task_names", None) or []
    return {name: i for i, name in enumerate(names)}


def load_adapter(model: nn.Module, folder: Path, name: str = "default", *, trainable: bool = False) -> PeftModel:
    """Attach a saved adapter to its base model, and make sure that every tensor of it arrived.

    PEFT only warns where tensors are missing or left over, and then scores what is in fact the base model.

    Args:
        model: the base model, or one that has other adapters already.
        folder: of the adapter.
        name: PEFT's name for it.
        trainable: whether it is to be trained further; of the first adapter of a model.

    Raises:
        UserError: no weights, damaged weights, weights of another shape, missing or left-over tensors, or values
            that are not finite.
    """
    saved = read_weights(folder)
    is_prompt = _adapter_config(folder).is_prompt_learning
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing keys, which are an error below
            if isinstance(model, PeftModel):
                device = str(next(model.parameters()).device)
                model.load_adapter(str(folder), adapter_name=name, torch_device=device)
                adapted = model
            else:
                adapted = PeftModel.from_pretrained(
                    model, str(folder), adapter_name=name, torch_device="cpu", is_trainable=trainable and not is_prompt
                )
                freeze_counts(adapted)
                if trainable and is_prompt:  # PEFT refuses to load it so; what it reads of it is this
                    adapted.prompt_encoder.requires_grad_(True)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the adapter {folder} does not fit the base model: {reason}; check --base_model") from error
    _check_complete(adapted, saved, folder, name)
    up = [value for key, value in saved.items() if "_B." in key]
    if up and not any(bool(value.any()) for value in up):
        log.say(
            f"note: every B of the adapter {folder} is zero, so it changes nothing: what is scored is the base model"
        )
    return adapted


def start_from(model: PeftModel, name: str) -> None:
    """Give a fresh adapter the values of a trained one of the same shape.

    On the meta device there is nothing to give: the shapes alone are compared.

    Args:
        model: with the fresh adapter.
        name: a run or an adapter folder.

    Raises:
        UserError: its tensors are not those of the fresh adapter.
    """
    saved = read_weights(find_subject(name).adapter or Path(name))
    trained = find_trained(model)
    own = {**trained.parameters, **trained.buffers}
    live = {name: value for name, value in own.items() if name not in trained.aside}
    there, here = ({key: tuple(value.shape) for key, value in tensors.items()} for tensors in (saved, live))
    wrong = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    if wrong:
        key = wrong[0]
        raise UserError(
            f"init_adapter {name}: {len(wrong)} tensors differ, e.g. {key}: {there.get(key, 'missing')} there, "
            f"{here.get(key, 'missing')} here; start from an adapter of the same method and options"
        )
    if not any(value.is_meta for value in live.values()):
        set_peft_model_state_dict(model, saved)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved adapter, by their names in the file.

    Raises:
        UserError: no weights, damaged weights, or values that are not finite.
    """
    path = folder / ADAPTER
    if not path.is_file():
        raise UserError(f"no {ADAPTER} in {folder}; only safetensors are read; save the adapter again")
    try:
        with safe_open(path, framework="pt") as file:
            saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}; copy or save the adapter again") from error
    broken = [key for key, value in saved.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        raise UserError(f"{path}: {len(broken)} tensors are not finite, e.g. {broken[0]}; take another checkpoint")
    return saved


def _check_complete(model: PeftModel, saved: Mapping[str, torch.Tensor], folder: Path, name: str) -> None:
    whole = model.state_dict()
    expected = get_peft_model_state_dict(model, state_dict=whole, adapter_name=name, save_embedding_layers=False)
    missing = sorted(set(expected) - set(saved))
    # An embedding that was resized is saved under its own name beside the adapter.
    unexpected = sorted(key for key in saved if key not in expected and key not in whole)
    for what, keys in (("lacks", missing), ("holds", unexpected)):
        if keys:
            tail = "of this adapter" if what == "lacks" else "that the adapter does not have"
            raise UserError(
                f"the adapter {folder} {what} {len(keys)} tensors {tail}, e.g. {keys[0]}; it was saved incompletely "
                "or from another base model; save it again, or check --base_model"
            )


def _adapter_config(folder: Path) -> PeftConfig:
    _json(folder / ADAPTER_CONFIG)
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}/{ADAPTER_CONFIG} cannot be read: {reason}; save the adapter again") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON: {' '.join(str(error).split())}; restore it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; restore it")
    return content
