"""Predicted against measured: memory and step time of a real model on this machine.

    python eval/plan_check.py --model /models/llama-6m --model /models/t5-8m
    deepspeed --num_gpus 2 eval/plan_check.py --model /models/llama-6m --ds_config ds_configs/zero3.json

Memory is counted in bytes of tensors: on a GPU by the caching allocator, on a CPU by torch's profiler, which
sees every allocation; both independent of how the planner counts. For the time, three constants of the machine
(seconds per FLOP, per byte and per operation) are fitted on some shapes, and the others are predicted.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import numpy as np
import torch
from scipy.optimize import nnls

from more_ds import cli, log
from more_ds.config import RunConfig
from more_ds.ds_config import batch_sizes, resolve, zero_stage
from more_ds.engine import Ranks, shard_while_loading, start, step
from more_ds.losses import label_nll
from more_ds.methods import adapter_config
from more_ds.model import DTYPES, attach, load_base, read_model_config
from more_ds.planner.memory import Setting, inventory, states, with_activations
from more_ds.planner.trace import Tracer, Workload, batch
from more_ds.speed.counting import peak_bytes
from more_ds.text_model import TextModel

SHAPES = ((1, 64), (2, 96), (4, 128), (8, 64), (8, 192), (2, 256), (16, 96), (4, 32))
"""(examples, prompt tokens) of the micro-batches."""

ANSWER = 8
"""Tokens of an answer."""

SMALL = 100_000
BUFFERS = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
"""What of a DeepSpeed configuration is made small, in values."""

ROUNDS = 5
"""How often each shape is timed; the shapes take turns, and the fastest time counts."""


@dataclass(frozen=True)
class Subject:
    """A model in an engine, and what the planner knows of it."""

    name: str
    workload: Workload
    setting: Setting
    text_model: TextModel
    ranks: Ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    log.quiet_libraries()
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="model folder; may be given several times")
    parser.add_argument("--ds_config", help="DeepSpeed configuration; default: ZeRO-0")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--no_time", action="store_true", help="memory alone")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; not needed")
    return cli.run(lambda: check(parser.parse_args(argv)))


def check(arguments: argparse.Namespace) -> None:
    """Measure, predict, and show both."""
    ranks = Ranks()
    ranks.connect()
    memory: list[dict[str, Any]] = []
    times: list[dict[str, Any]] = []
    for folder in arguments.model:
        before = tensor_bytes()
        subject = prepare(folder, arguments.ds_config, arguments.dtype, ranks)
        if not arguments.no_time:
            times += time_rows(subject)
        memory += [memory_row(subject, *shape, before) for shape in SHAPES[2:4]]
        subject = recompute(subject)
        memory += [memory_row(subject, *shape, before) for shape in SHAPES[2:4]]
        del subject
    say(memory, ["model", "stage", "ranks", "checkpointing", "micro", "prompt", "peak"])
    fitted = fit(times) if times else []
    if fitted:
        say(fitted, ["model", "micro", "prompt", "seconds"])
    if arguments.json and ranks.rank == 0:
        Path(arguments.json).write_text(json.dumps({"memory": memory, "time": fitted}, indent=1) + "\n")


def prepare(folder: str, ds_path: str | None, dtype: str, ranks: Ranks) -> Subject:
    """Load a model with a MoRE adapter into an engine."""
    config = RunConfig(train_batch_size=ranks.world)
    ds_config = resolve(ds_path, config, batch_sizes(config, ranks.world), dtype, per_node=ranks.per_node)
    # Buffers of the size that a large model wants would hide the error in everything else of a small one.
    ds_config["zero_optimization"] |= {name: SMALL for name in BUFFERS if name in ds_config["zero_optimization"]}
    sharding = shard_while_loading(ds_config)
    model_config = read_model_config(folder)
    adapter = adapter_config("more", {"r": 8}, list("abcdefgh"), model_config)
    base: Any = load_base(folder, model_config, dtype=dtype)
    model: Any = attach(base, adapter)
    engine = start(model, config, ds_config, ranks)
    del sharding
    engine.train()
    trains = next(p for p in model.parameters() if p.requires_grad)
    is_cut = zero_stage(ds_config) == 3
    workload = Workload(model_config, adapter, DTYPES[dtype], trains.dtype, 0, ANSWER, partitioned=is_cut)
    encoder: Any = SimpleNamespace(is_encoder_decoder=model_config.is_encoder_decoder, pad_id=0)
    setting = Setting(ds_config, ranks.world, ranks.world, on_gpu=ranks.on_gpu)
    return Subject(Path(folder).name, workload, setting, TextModel(engine, encoder), ranks)


def recompute(subject: Subject) -> Subject:
    """The same engine, with activation checkpointing from now on."""
    peft: Any = subject.text_model.peft
    peft.enable_input_require_grads()
    base: Any = subject.text_model.base
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return replace(subject, workload=replace(subject.workload, checkpointing=True))


def at_prompt(workload: Workload, prompt: int) -> Workload:
    """The same workload with prompts of another length."""
    return replace(workload, prompt=prompt)


def take_step(subject: Subject, micro: int, prompt: int) -> None:
    """One optimizer step on one micro-batch."""
    tensors = batch(at_prompt(subject.workload, prompt), micro, str(subject.ranks.device))
    # A mask that shows everything is left out by some models; with padding, as in training, it is not.
    for name in ("attention_mask", "prompt_mask"):
        tensors[name][:, 0] = 0
    engine: Any = subject.text_model.module
    nll, _ = label_nll(subject.text_model.label_logits(tensors), tensors["labels"])
    auxiliary = subject.text_model.auxiliary_loss()
    engine.backward(nll.sum() if auxiliary is None else nll.sum() + auxiliary)
    step(engine)


def memory_row(subject: Subject, micro: int, prompt: int, before: int) -> dict[str, Any]:
    """Predicted and measured bytes at the peak of a step; `before` are bytes that were there without the model."""
    workload = at_prompt(subject.workload, prompt)
    held = states(inventory(workload), workload, subject.setting)
    tracer = Tracer(workload)
    whole = with_activations(held, tracer.value(micro, lambda t: t.saved), tracer.peak(micro), on_gpu=False)
    for _ in range(2):
        take_step(subject, micro, prompt)
    return {
        "model": subject.name, "stage": zero_stage(dict(subject.setting.ds_config)), "ranks": subject.setting.world,
        "checkpointing": "yes" if workload.checkpointing else "no", "micro": micro, "prompt": prompt,
        "peak": (whole.total, step_peak(subject, micro, prompt) - before), "parts": whole.device,
    }  # fmt: skip


def tensor_bytes() -> int:
    """Bytes of all tensors that are alive, those that only autograd knows apart."""
    gc.collect()
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def step_peak(subject: Subject, micro: int, prompt: int) -> float:
    """The most bytes of tensors during a step."""
    tuner: Any = getattr(subject.text_model.peft, "base_model", None)
    # What is kept of the last step until the next one begins: a profiler that starts now would not see it go.
    tuner.context.begin(None, None, None)
    return tensor_bytes() + peak_bytes(lambda: take_step(subject, micro, prompt))


def time_rows(subject: Subject) -> list[dict[str, Any]]:
    """Measured seconds of the shapes, and what the planner says they compute."""
    seconds = {shape: float("inf") for shape in SHAPES}
    for _ in range(ROUNDS):
        for micro, prompt in SHAPES:
            began = time.perf_counter()
            take_step(subject, micro, prompt)
            if subject.ranks.on_gpu:
                torch.cuda.synchronize()
            seconds[micro, prompt] = min(seconds[micro, prompt], time.perf_counter() - began)
    rows = []
    for micro, prompt in SHAPES:
        tracer = Tracer(at_prompt(subject.workload, prompt))
        cost = [tracer.value(micro, attrgetter(name)) for name in ("kernels", "flops", "traffic")]
        measured = seconds[micro, prompt]
        rows.append({"model": subject.name, "micro": micro, "prompt": prompt, "cost": cost, "s": measured})
    return rows


def fit(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fit the machine's constants on every other row, by relative error, and predict the rest."""
    costs = np.array([row["cost"] for row in rows])
    seconds = np.array([row["s"] for row in rows])
    scale = costs.max(axis=0)
    used = np.arange(len(rows)) % 2 == 0
    constants, _ = nnls((costs / scale)[used] / seconds[used, None], np.ones(int(used.sum())))
    each = constants / scale * 1e12
    log.say(f"fitted: {each[0] / 1e6:.2f} us an operation, {each[1]:.2f} ps a FLOP, {each[2]:.1f} ps a byte")
    predicted = (costs / scale) @ constants
    return [{**row, "seconds": (float(predicted[i]), row["s"])} for i, row in enumerate(rows) if not used[i]]


def say(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """A table; pairs become predicted, measured and the error in percent."""
    header: list[str] = []
    body: list[list[Any]] = []
    for row in rows:
        header, cells = [], []
        for name in names:
            if isinstance(row[name], tuple):
                predicted, measured = row[name]
                unit, size = ("MB", 1e6) if name != "seconds" else ("ms", 1e-3)
                header += [f"{name}: predicted {unit}", "measured", "error %"]
                cells += [predicted / size, measured / size, 100 * (predicted / measured - 1)]
            else:
                header.append(name)
                cells.append(row[name])
        body.append(cells)
    log.say(log.table(header, body) + "\n")


if __name__ == "__main__":
    sys.exit(main())
