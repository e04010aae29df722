"""One export: what is asked for, checked before anything is written, and put in place whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from huggingface_hub import snapshot_download
from transformers.pytorch_utils import Conv1D

from more_ds import log
from more_ds.errors import UserError, suggest
from more_ds.export.adapter import write_adapter
from more_ds.export.card import run_scores, write_card
from more_ds.export.check import lora_difference, merged_difference, reference_logits, refuse_different
from more_ds.export.factors import Adapter, Factors, read_adapter
from more_ds.export.lora import check_served, write_lora
from more_ds.export.merged import write_merged
from more_ds.loading import EXPORT, Subject, load_text_model
from more_ds.model import DTYPES, load_base, read_model_config, without_weights
from more_ds.quantised import with_weights
from more_ds.text_model import TextModel

Form = Literal["lora", "padded", "merged", "adapter"]
_EIGHT_BITS = " (but 8 bits round the activations too)"


@dataclass(frozen=True)
class Request:
    """What to export.

    Attributes:
        subject: the run or adapter.
        form: `lora`: a LoRA per task with the rank that the task uses in each map; `padded`: the same with one rank,
            for servers; `merged`: a whole model per task; `adapter`: all tasks in one adapter without gates.
        tasks: names; empty: all.
        output: the folder; it does not exist, or is empty.
        rank: of `padded`; None: the highest rank in use.
        dtype: of the tensors; None: float32 for LoRAs, the base's own for merged models.
        check: compare the logits with the trained adapter's.
        quantized: for an adapter that was trained on a quantised base and is to be merged: `refuse`, `dequantize` (the
            weights as the run saw them) or `original` (those it was quantised from).
    """

    subject: Subject
    form: Form
    tasks: tuple[str, ...]
    output: Path
    rank: int | None = None
    dtype: str | None = None
    check: bool = True
    quantized: str = "refuse"


def export(request: Request) -> list[dict[str, Any]]:
    """Export, and say what came out: a row per task, with its folder, ranks, parameters and difference.

    Raises:
        UserError: what cannot be exported in this form, or a folder that holds something.
        TrainingError: the export computes something else than the adapter; nothing is put in place.
    """
    adapter = read_adapter(request.subject)
    tasks = _chosen(adapter, request.tasks)
    if request.form == "adapter" and request.tasks:
        raise UserError("--form adapter holds all tasks; leave --tasks out, or export --form lora")
    if request.output.exists() and (not request.output.is_dir() or any(request.output.iterdir())):
        raise UserError(f"{request.output} exists and holds something; name another --output_dir")
    factors = {name: adapter.factors(task) for name, task in tasks.items()}
    _check_quantized(request)
    _check_served_form(request, factors)
    building = request.output.with_name(f".{request.output.name}.building")
    shutil.rmtree(building, ignore_errors=True)  # left by an export that was killed
    is_first = not building.parent.exists()
    building.mkdir(parents=True)
    try:
        ranks = _write(request, adapter, factors, building)
        differences = _differences(request, tasks, building) if request.check else {}
        rows = [_row(request, name, ranks[name], factors[name], differences.get(name)) for name in tasks]
        document = {
            "form": request.form, "subject": request.subject.name, "reading": dict(request.subject.reading),
            "tasks": rows,
        }  # fmt: skip
        (building / EXPORT).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        if request.output.exists():
            request.output.rmdir()
        os.replace(building, request.output)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        if is_first and not request.output.exists():
            building.parent.rmdir()
    return rows


def task_folder(request: Request, root: Path, task: str) -> Path:
    """Where a task's export is, below `root`."""
    return root if request.form == "adapter" else root / task


def _chosen(adapter: Adapter, names: tuple[str, ...]) -> dict[str, int]:
    known = {name: i for i, name in enumerate(adapter.task_names)}
    for name in names:
        if name not in known:
            raise UserError(f"the adapter knows no task '{name}'{suggest(name, known)}")
    return {name: known[name] for name in (names or known)}


def _check_quantized(request: Request) -> None:
    how = request.subject.run.get("quantization", "none")
    if request.form == "merged" and how != "none" and request.quantized == "refuse":
        raise UserError(
            f"the adapter was trained on a {how} base; --quantized dequantize merges it into the weights as they were "
            f"in training{_EIGHT_BITS if how == '8bit' else ' (the same scores)'}, --quantized original into the "
            "weights they were made from"
        )


def _check_served_form(request: Request, factors: Mapping[str, Factors]) -> None:
    stacked = [name for own in factors.values() for name, (a, _) in own.items() if a.dim() == 3]
    if request.form == "padded" and stacked:
        raise UserError(
            f"--form padded is for servers, which read a pair of matrices for each map; {stacked[0]} has a pair for "
            "each expert: use --form lora, which PEFT reads, or --form merged"
        )


def _write(request: Request, adapter: Adapter, factors: Mapping[str, Factors], root: Path) -> dict[str, dict[str, int]]:
    """Write every task's folder; returns the rank of every map by task."""
    subject = request.subject
    ranks = {name: {key: a.shape[-2] for key, (a, _) in own.items()} for name, own in factors.items()}
    for name in factors:
        task_folder(request, root, name).mkdir(exist_ok=True)
    if request.form == "adapter":
        write_adapter(root, adapter)
    elif request.form == "merged":
        _write_merged(request, factors, root)
    else:
        rank = (request.rank or max(max(own.values()) for own in ranks.values())) if request.form == "padded" else None
        dtype, transposed = DTYPES[request.dtype or "fp32"], _keeps_transposed(subject)
        for name, own in factors.items():
            folder = root / name
            write_lora(folder, own, adapter.config, base=subject.base, dtype=dtype, rank=rank, transposed=transposed)
            wrong = check_served(folder) if rank is not None else []
            if wrong:
                raise UserError(f"servers would refuse the LoRA of '{name}': {'; '.join(wrong)}")
    for name in factors if request.form != "adapter" else [""]:
        _write_card(request, adapter, root / name, {name: ranks[name]} if name else ranks)
    return ranks


def _keeps_transposed(subject: Subject) -> bool:
    """Whether the base model has maps of GPT-2's kind; False where its configuration is not at hand."""
    try:
        config = read_model_config(subject.base, revision=subject.run.get("revision"))
    except UserError:
        return False
    return any(isinstance(module, Conv1D) for module in without_weights(config).modules())


def _write_merged(request: Request, factors: Mapping[str, Factors], root: Path) -> None:
    subject = request.subject
    config = read_model_config(subject.base, revision=subject.run.get("revision"))
    base = Path(subject.base)
    if not base.is_dir():
        base = Path(snapshot_download(subject.base, revision=subject.run.get("revision")))
    quantized = None
    if request.quantized == "dequantize":
        dtype = subject.run.get("dtype", "auto")
        quantized = load_base(
            str(base), config, dtype="fp32" if dtype == "auto" else dtype, quantization=subject.run["quantization"]
        )
    for name, own in factors.items():
        dtype = DTYPES[request.dtype] if request.dtype else None
        write_merged(root / name, own, base, config, dtype, quantized=quantized, label=f"merging {name}")


def _write_card(request: Request, adapter: Adapter, folder: Path, ranks: Mapping[str, Mapping[str, int]]) -> None:
    subject = request.subject
    run = subject.run
    home = subject.adapter.resolve().parent if subject.adapter is not None and run else None
    seq2seq = str(adapter.config.task_type).endswith("SEQ_2_SEQ_LM")
    write_card(
        folder,
        form="lora" if request.form == "padded" else request.form,
        base=subject.base,
        auto=f"AutoModelFor{'Seq2SeqLM' if seq2seq else 'CausalLM'}",
        method=str(run.get("method", getattr(adapter.config.peft_type, "value", adapter.config.peft_type))),
        ranks=ranks,
        scores=run_scores(home),
        data=[f"suite {name}" for name in run.get("suite", [])] or ["not recorded"],
    )


def _differences(request: Request, tasks: Mapping[str, int], root: Path) -> dict[str, float]:
    """How far the logits of every task's export are from those of the trained adapter, in float32."""
    log.say("comparing the export with the adapter ...")
    subject, is_exact = _reference(request)
    text_model = _load(subject)
    expected = reference_logits(text_model, tasks)
    found: dict[str, float] = {}
    if request.form == "adapter":
        exported = reference_logits(_load(replace(subject, adapter=root)), tasks)
        found = {name: float((exported[name] - expected[name]).abs().max()) for name in tasks}
    else:
        peft: Any = text_model.peft
        with with_weights(peft):
            base = peft.unload()
        for name in tasks:
            folder = root / name
            found[name] = (
                merged_difference(folder, text_model.config, expected[name])
                if request.form == "merged"
                else lora_difference(base, folder, expected[name])
            )
    # A merged model in a type of its own, and a LoRA in a narrow one, are rounded: how far is told, and no mistake.
    if is_exact and (request.dtype == "fp32" or (request.dtype is None and request.form != "merged")):
        refuse_different(found)
    return found


def _reference(request: Request) -> tuple[Subject, bool]:
    """What an export is compared with, and whether it must compute the same.

    A base in 8 bits rounds its inputs too: the least change of one may flip a rounding, and moves the logits by more
    than a mistake would. So adapters are compared on the base as it was before, and weights that are merged into such
    a base differ as they must.
    """
    subject, form = request.subject, request.form
    how = subject.run.get("quantization", "none")
    keeps = request.quantized == "dequantize" if form == "merged" else how == "4bit"
    if how == "none" or keeps:
        return subject, how != "8bit"
    return replace(subject, run={**subject.run, "quantization": "none"}), True


def _load(subject: Subject) -> TextModel:
    return load_text_model(subject, dtype="fp32", device="cpu", max_source_length=None, max_target_length=32)


def _row(
    request: Request, name: str, ranks: Mapping[str, int], factors: Factors, difference: float | None
) -> dict[str, Any]:
    return {
        "task": name,
        "folder": str(task_folder(request, request.output, name)),
        "rank_least": min(ranks.values()),
        "rank_mean": round(fmean(ranks.values()), 3),
        "rank_highest": max(ranks.values()),
        "parameters": sum(a.numel() + b.numel() for a, b in factors.values()),
        "difference": difference,
    }
