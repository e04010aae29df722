"""Measure what scoring costs, as ratios inside one process.

    python eval/speed.py --model FOLDER --data_dir /data [--suite glue] [--tasks sst2,stsb] [--rows 64] [--rounds 5]

Every way to score is run in every round, in random order; a ratio is that of two times of the same round, so that other
jobs on the machine do not decide. Set OMP_NUM_THREADS where the machine is shared.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from more_ds import cli, log
from more_ds.data.rows import load_examples
from more_ds.errors import UserError
from more_ds.loading import choose_dtype, find_subject, load_text_model
from more_ds.model import DTYPES
from more_ds.run_folder import versions
from more_ds.speed.scoring import GENERATION, PUBLISHED, score_speed
from more_ds.tasks import resolve_tasks


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return cli.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    arguments, _ = cli.parse(_parser(), argv)
    log.quiet_libraries()
    subject = find_subject(arguments.model)
    names = [name for name in arguments.tasks.split(",") if name]
    tasks = resolve_tasks(names or None, [arguments.suite], None)
    free = [task.name for task in tasks if task.kind == "text"]
    if free:
        raise UserError(f"{', '.join(free)}: free text is always generated; name closed tasks with --tasks")
    examples = {
        task.name: load_examples(task, "validation", data_dir=arguments.data_dir, limit=arguments.rows)
        for task in tasks
    }
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    text_model = load_text_model(
        subject, dtype=choose_dtype(subject, arguments.dtype, device), device=device, max_source_length=128,
        max_target_length=32,
    )  # fmt: skip
    found = score_speed(text_model, tasks, examples, batch_size=arguments.batch_size, rounds=arguments.rounds)
    rows = [
        [name, str(ratios[GENERATION]), str(ratios[PUBLISHED]), 1000 * ratios["likelihood"].seconds / arguments.rows]
        for name, ratios in found.items()
    ]
    medians = [float(np.median([r[way].median for r in found.values()])) for way in (GENERATION, PUBLISHED)]
    rows.append(["median", *(f"{value:.2f}" for value in medians), None])
    log.say(f"time over that of likelihood, median [quartiles] of {arguments.rounds} rounds, {device}")
    log.say(log.table(["task", "generation", "published", "ms a row"], rows))
    if arguments.output:
        document = {
            "settings": vars(arguments), "device": device, "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(), "versions": versions(),
            "scoring": {name: {way: asdict(r) for way, r in ratios.items()} for name, ratios in found.items()},
        }  # fmt: skip
        Path(arguments.output).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        log.say(f"written to {arguments.output}")


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="eval/speed.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", required=True, help="run directory, adapter folder, model folder or hub id")
    add("--suite", default="glue", help="of closed tasks")
    add("--tasks", default="", help="which of its tasks; default: all")
    add("--data_dir", help="folder with <suite>/<task>/<split>.jsonl.gz; default: the hub")
    add("--rows", type=cli.positive, default=64, help="of each task")
    add("--batch_size", type=cli.positive, default=32, help="examples per batch")
    add("--rounds", type=cli.positive, default=5, help="that count")
    add("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    add("--output", help="JSON file with everything that was measured")
    return parser


if __name__ == "__main__":
    sys.exit(main())
