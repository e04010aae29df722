"""Measure what training and scoring cost, as ratios inside one process.

    python eval/speed.py step [--shape llama-256,t5-256] [--variants "more fused,multilora"] [--compile]
    python eval/speed.py profile [--shape llama-128-launch] [--variants "more fused"]
    python eval/speed.py growth [--shape llama-256]
    python eval/speed.py data --model FOLDER --data_dir /data [--suite glue]
    python eval/speed.py scoring --model FOLDER --data_dir /data [--suite glue] [--tasks sst2,stsb]
    python eval/speed.py inference [--shape llama-256,t5-256]
    python eval/speed.py checkpoint [--shape llama-512] [--rounds 5]

step: training steps of every method and back-end over that of PEFT's LoRA (r = 8), on random weights. profile: in which
operations the time of a variant's step differs from that of LoRA's. growth: MoRE's step over LoRA's as depth, width,
rank, tasks, rows and length grow. data: tokens that a step computes, padded to 128, to the longest row, and grouped by
length. scoring: closed answers by likelihood and by generation. inference: a batch of several tasks through MoRE's
table of ranks, over one LoRA that is not merged: reading prompts, and writing. checkpoint: how long a save of the whole
model holds up training, when it is on the disk, how long a resume takes.

Everything that is compared runs in every round, in random order; a ratio is that of two times of the same round, so
that other jobs on the machine do not decide. Set OMP_NUM_THREADS where the machine is shared.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from more_ds import cli, log
from more_ds.data.encoding import Encoder
from more_ds.data.rows import load_examples, load_split
from more_ds.data.tokens import tokenised
from more_ds.engine import Ranks
from more_ds.errors import UserError, suggest
from more_ds.loading import choose_device, choose_dtype, find_subject, load_text_model
from more_ds.model import DTYPES, load_tokenizer, read_model_config
from more_ds.run_folder import versions
from more_ds.speed import plot
from more_ds.speed.batches import count_tokens
from more_ds.speed.inference import inference_speed
from more_ds.speed.profiling import Operation, largest_differences, step_profile
from more_ds.speed.saving import FAR, sampler_seconds, save_cost
from more_ds.speed.scoring import GENERATION, LIKELIHOOD, PUBLISHED, score_speed, whole_seconds
from more_ds.speed.shapes import SHAPES, find_shape
from more_ds.speed.steps import REFERENCE, Setting, growth, step_costs, variants
from more_ds.tasks import resolve_tasks
from more_ds.tasks.render import expand

PADDED = 128
"""Length that the published code pads every prompt to."""
SHOWN = 15
"""Operations of a profile that are printed; the JSON has all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    arguments, _ = cli.parse(_parser(), argv)
    log.quiet_libraries()
    arguments.device = choose_device(arguments.device)
    document = {
        "settings": vars(arguments), "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "versions": versions(), arguments.part: PARTS[arguments.part](arguments),
    }  # fmt: skip
    if folder := _folder(arguments):
        (folder / f"{arguments.part}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        log.say(f"written to {folder}")


def _steps(arguments: argparse.Namespace) -> dict[str, Any]:
    names = _variants(arguments, variants())
    found: dict[str, Any] = {}
    for shape in arguments.shape.split(","):
        costs, missing = step_costs(
            _setting(arguments, shape), names, rounds=arguments.rounds, compiled=arguments.compile
        )
        log.say(f"\n{shape}, {_where(arguments)}: a training step over that of {REFERENCE}, {arguments.rounds} rounds")
        log.say(
            log.table(
                ["variant", "time", "tokens/s", "peak MB", "of LoRA's", "kernels", "added", "syncs", "trainable"],
                [
                    [
                        name, str(cost.ratio), cost.tokens_per_second, cost.peak_mb,
                        cost.peak_mb / costs[REFERENCE].peak_mb, cost.kernels,
                        cost.kernels - costs[REFERENCE].kernels, cost.syncs, cost.trainable,
                    ]
                    for name, cost in costs.items()
                ],
            )
        )  # fmt: skip
        for name, reason in missing.items():
            log.say(f"{name}: not with this model: {reason}")
        found[shape] = {name: cost.as_dict() for name, cost in costs.items()}
        if folder := _folder(arguments):
            ratios = {name: cost.ratio for name, cost in costs.items()}
            plot.bars(folder / f"step-{shape}.svg", f"{shape}, {_where(arguments)}", ratios)
    return found


def _profile(arguments: argparse.Namespace) -> dict[str, Any]:
    names = [REFERENCE, *_variants(arguments, ["more fused"])]
    found: dict[str, Any] = {}
    for shape in arguments.shape.split(","):
        profiles = step_profile(_setting(arguments, shape), names)
        for name in names[1:]:
            log.say(f"\n{shape}, {_where(arguments)}: {name} beside {REFERENCE}, of one step")
            both = (profiles[REFERENCE], profiles[name])
            rows: list[list[Any]] = [["all", *(sum(o.milliseconds for o in own.values()) for own in both), "", ""]]
            for operation in largest_differences(profiles, REFERENCE, name, SHOWN):
                pair = [own.get(operation, Operation()) for own in both]
                rows.append([operation, *(o.milliseconds for o in pair), *(f"{o.calls:.0f}" for o in pair)])
            log.say(log.table(["operation", f"{REFERENCE}, ms", f"{name}, ms", "calls", "calls"], rows))
        found[shape] = {name: {key: asdict(o) for key, o in own.items()} for name, own in profiles.items()}
    return found


def _growth(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for shape in arguments.shape.split(","):
        grown = growth(_setting(arguments, shape), rounds=arguments.rounds)
        log.say(f"\n{shape}, {_where(arguments)}: MoRE's step over LoRA's of the same rank, {arguments.rounds} rounds")
        rows = [
            [axis, value, 1000 * one.time.seconds, str(one.time), one.peak_mb, one.memory]
            for axis, own in grown.items()
            for value, one in own.items()
        ]
        log.say(log.table(["what grows", "to", "ms", "time of LoRA's", "peak MB", "of LoRA's"], rows))
        found[shape] = {axis: {value: asdict(one) for value, one in own.items()} for axis, own in grown.items()}
        if folder := _folder(arguments):
            plot.lines(folder / f"growth-{shape}.svg", f"{shape}, {_where(arguments)}", {
                axis: {value: one.time for value, one in own.items()} for axis, own in grown.items()
            })  # fmt: skip
    return found


def _data(arguments: argparse.Namespace) -> dict[str, Any]:
    model = _needs(arguments.model, "--model")
    config = read_model_config(model)
    encoder = Encoder(
        load_tokenizer(model), is_encoder_decoder=config.is_encoder_decoder, max_source_length=PADDED,
        max_target_length=64,
    )  # fmt: skip
    tasks = resolve_tasks(arguments.tasks.split(",") if arguments.tasks else None, [arguments.suite], None)
    tokens = [
        tokenised(task.name, expand(load_examples(task, "train", data_dir=arguments.data_dir)), encoder)
        for task in tasks
    ]
    found = {}
    for strategy in ("exp_share", "proportional"):
        counts = count_tokens(tokens, strategy=strategy, micro=8, groups=4, steps=arguments.steps, fixed=PADDED)
        found[strategy] = asdict(counts)
    log.say(f"tokens that a step of 32 examples computes, mean of {arguments.steps} steps")
    ways = (("fixed", f"all padded to {PADDED}"), ("dynamic", "to the longest of 8"), ("grouped", "grouped by length"))
    rows = [
        [strategy, words, counts[way], counts["fixed"] / counts[way], 100 * (1 - counts["real"] / counts[way])]
        for strategy, counts in found.items()
        for way, words in ways
    ]
    log.say(log.table(["sampling", "padding", "tokens", "times fewer", "padding %"], rows))
    return found


def _scoring(arguments: argparse.Namespace) -> dict[str, Any]:
    subject = find_subject(_needs(arguments.model, "--model"))
    names = [name for name in arguments.tasks.split(",") if name]
    tasks = resolve_tasks(names or None, [arguments.suite], None)
    free = [task.name for task in tasks if task.kind == "text"]
    if free:
        raise UserError(f"{', '.join(free)}: free text is always generated; name closed tasks with --tasks")
    examples = {
        task.name: load_examples(task, "validation", data_dir=arguments.data_dir, limit=arguments.rows)
        for task in tasks
    }
    sizes = {task.name: len(load_split(task, "test", data_dir=arguments.data_dir)) for task in tasks}
    text_model = load_text_model(
        subject, dtype=choose_dtype(subject, arguments.dtype, arguments.device), device=arguments.device,
        max_source_length=PADDED, max_target_length=32,
    )  # fmt: skip
    found = score_speed(text_model, tasks, examples, batch_size=arguments.batch_size, rounds=arguments.rounds)
    rows = [
        [name, str(ratios[GENERATION]), str(ratios[PUBLISHED]), 1000 * ratios[LIKELIHOOD].seconds / len(examples[name])]
        for name, ratios in found.items()
    ]
    medians = [float(np.median([r[way].median for r in found.values()])) for way in (GENERATION, PUBLISHED)]
    rows.append(["median", *(f"{value:.2f}" for value in medians), None])
    whole = whole_seconds(found, {name: size / len(examples[name]) for name, size in sizes.items()})
    rows.append(["all", *(f"{whole[way] / whole[LIKELIHOOD]:.2f}" for way in (GENERATION, PUBLISHED)),
                 1000 * whole[LIKELIHOOD] / sum(sizes.values())])  # fmt: skip
    log.say(f"time over that of likelihood, median [quartiles] of {arguments.rounds} rounds, {arguments.device}; all: "
            f"that of the test splits' {sum(sizes.values()):,} rows")  # fmt: skip
    log.say(log.table(["task", "generation", "published", "ms a row"], rows))
    return {name: {way: asdict(r) for way, r in ratios.items()} for name, ratios in found.items()}


def _checkpoint(arguments: argparse.Namespace) -> dict[str, Any]:
    ranks = Ranks()
    if torch.device(arguments.device).type != ranks.device.type:
        raise UserError(
            f"the engine is on {ranks.device}, not on {arguments.device}; hide the GPU: CUDA_VISIBLE_DEVICES="
        )
    ranks.connect()
    found: dict[str, Any] = {}
    rows = []
    for shape in arguments.shape.split(","):
        with tempfile.TemporaryDirectory(dir=_folder(arguments)) as place:
            cost = save_cost(find_shape(shape), _dtype(arguments), ranks, Path(place), rounds=arguments.rounds)
        rows.append([shape, cost.megabytes, cost.blocked, cost.written, cost.resume, cost.steps, *cost.lost])
        found[shape] = asdict(cost) | dict(zip(("lost_beside", "lost_waiting"), cost.lost, strict=True))
    log.say(
        f"\n{_where(arguments)}: seconds, medians of {arguments.rounds} rounds; lost: by that many steps and a save"
    )
    header = ["model", "MB", "a save blocks", "on the disk after", "resume", "steps", "lost", "lost if it waits"]
    log.say(log.table(header, rows))
    for way, grouped in (("in any order", False), ("grouped by length", True)):
        found[f"sampler, {way}"] = sampler_seconds(grouped=grouped)
        log.say(f"the sampler at sample {FAR:,}, {way}: {found[f'sampler, {way}']:.3f} s to its first batch")
    return found


def _inference(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for shape in arguments.shape.split(","):
        parts = inference_speed(_setting(arguments, shape), rounds=arguments.rounds)
        log.say(f"\n{shape}, {_where(arguments)}: generation over that of {REFERENCE}, {arguments.rounds} rounds")
        rows = [[name, *(str(ratios[name]) for ratios in parts.values())] for name in parts["prefill"]]
        log.say(log.table(["variant", *parts], rows))
        found[shape] = {part: {name: asdict(r) for name, r in ratios.items()} for part, ratios in parts.items()}
        if folder := _folder(arguments):
            for part, ratios in parts.items():
                plot.bars(folder / f"inference-{part}-{shape}.svg", f"{part}, {shape}, {_where(arguments)}", ratios)
    return found


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "step": _steps, "profile": _profile, "growth": _growth, "data": _data, "scoring": _scoring, "inference": _inference,
    "checkpoint": _checkpoint,
}  # fmt: skip


def _setting(arguments: argparse.Namespace, shape: str) -> Setting:
    return Setting(find_shape(shape), DTYPES[_dtype(arguments)], arguments.device, dropout=arguments.dropout)


def _variants(arguments: argparse.Namespace, default: list[str]) -> list[str]:
    """Those of `--variants`, which exist."""
    names = [name for name in arguments.variants.split(",") if name] or default
    unknown = [f"'{name}'{suggest(name, variants())}" for name in names if name not in variants()]
    if unknown:
        raise UserError(f"unknown variant {', '.join(unknown)}; there are: {', '.join(variants())}")
    return [name for name in names if name != REFERENCE]


def _dtype(arguments: argparse.Namespace) -> str:
    return arguments.dtype or ("bf16" if arguments.device.startswith("cuda") else "fp32")


def _folder(arguments: argparse.Namespace) -> Path | None:
    """The folder of `--output`, which is there from then on."""
    folder = Path(arguments.output) if arguments.output else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _where(arguments: argparse.Namespace) -> str:
    name = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "CPU"
    return f"{name}, {arguments.dtype or 'default type'}{', compiled' if arguments.compile else ''}"


def _needs(value: str | None, flag: str) -> str:
    if value is None:
        raise UserError(f"this part measures a model of yours; add {flag}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="eval/speed.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("part", choices=sorted(PARTS), help="what to measure")
    add(
        "--shape",
        default="llama-256,t5-256",
        help=f"step, profile, growth, inference: {', '.join(SHAPES)}, or llama2-7b and the like",
    )
    add("--variants", default="", help="step: which, default: all; profile: which, default: more fused")
    add("--compile", action="store_true", help="step: through torch.compile, all variants alike")
    add("--dropout", type=float, default=0.0, help="step, profile, growth: of all methods that have one")
    add("--model", help="data, scoring: run directory, adapter folder, model folder or hub id")
    add("--suite", default="glue", help="data, scoring: of closed tasks")
    add("--tasks", default="", help="which of its tasks; default: all")
    add("--data_dir", help="folder with <suite>/<task>/<split>.jsonl.gz; default: the hub")
    add("--steps", type=cli.positive, default=500, help="data: steps to look at")
    add("--rows", type=cli.positive, default=64, help="scoring: of each task")
    add("--batch_size", type=cli.positive, default=32, help="scoring: examples per batch")
    add("--rounds", type=cli.positive, default=15, help="that count")
    add("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    add("--output", help="folder for a JSON file with everything that was measured, and pictures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
