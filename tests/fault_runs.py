"""The training command on forked ranks that can be killed: a tiny model, two tasks, seconds from start to end."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from distributed import COLLECTIVE_SECONDS
from tiny_models import base_model, tokenizer

from launch import train
from more_ds.engine import free_port

TASKS = """
tasks:
  parity:
    files: {train: parity.jsonl, validation: parity.jsonl, test: parity.jsonl}
    prompt: "parity: {text}"
    labels: {0: even, 1: odd}
    metrics: [accuracy]
  copy:
    files: {train: copy.jsonl, validation: copy.jsonl, test: copy.jsonl}
    prompt: "copy: {text}"
    target: "{text}"
    metrics: [exact_match]
"""
STEPS = 7
FATAL_SECONDS = 90.0


def make_place(folder: Path) -> Path:
    """Write a model, two tasks and a recipe."""
    base_model("llama").save_pretrained(folder / "llama")
    tokenizer(False).save_pretrained(folder / "llama")
    for name, size in (("parity", 23), ("copy", 11)):
        texts = [format(7 * i + size, "b").replace("0", "a").replace("1", "b") for i in range(size)]
        rows = [{"text": text, "label": text.count("a") % 2} for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks.yaml").write_text(TASKS)
    recipe = {
        "model": str(folder / "llama"), "tasks_file": str(folder / "tasks.yaml"), "train_batch_size": 4,
        "per_device_train_batch_size": 1, "max_steps": STEPS, "warmup_steps": 2, "learning_rate": 0.01,
        "eval_steps": 3, "save_steps": 1, "logging_steps": 1, "eval_limit": 2, "eval_on_start": False, "test": False,
        "max_source_length": 24, "max_target_length": 12,
        "adapter": {"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    for stage in range(4):
        ds_config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": "auto"}}
        (folder / f"zero{stage}.json").write_text(json.dumps(ds_config))
    return folder


def argv(place: Path, output: Path, *extra: str, stage: int = 2) -> list[str]:
    """The command's arguments; they resume what is there."""
    return [
        "--recipe", str(place / "recipe.yaml"), "--ds_config", str(place / f"zero{stage}.json"),
        "--output_dir", str(output), "--resume", "auto", *extra,
    ]  # fmt: skip


@dataclass
class Job:
    """Ranks under way; what they print is in `log`."""

    ranks: list[BaseProcess]
    log: Path

    def signal(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to some ranks; None: to all."""
        for rank, process in enumerate(self.ranks):
            if (ranks is None or rank in ranks) and process.is_alive():
                os.kill(process.pid or 0, number)

    def wait(self, seconds: float = FATAL_SECONDS) -> list[int | None]:
        """Wait for all ranks and return their exit codes; a rank that is left over by a dead one is killed, as every
        launcher does.

        Raises:
            TimeoutError: they do not end.
        """
        deadline = time.monotonic() + seconds
        while any(process.is_alive() for process in self.ranks):
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise TimeoutError(f"ranks still run after {seconds} s:\n{self.log.read_text()[-3000:]}")
            if any(process.exitcode not in (None, 0) for process in self.ranks):
                time.sleep(0.3)
                self.signal(signal.SIGTERM)
                for process in self.ranks:
                    process.join(5)
                self.signal(signal.SIGKILL)
            time.sleep(0.01)
        return [process.exitcode for process in self.ranks]

    def wait_for(self, text: str, seconds: float = FATAL_SECONDS) -> None:
        """Wait until the ranks have printed `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.log.read_text():
            if time.monotonic() > deadline or not all(process.is_alive() for process in self.ranks):
                raise TimeoutError(f"'{text}' was not printed:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.01)


def start(arguments: list[str], log: Path, world: int = 2, patch: Any = None) -> Job:
    """Fork the ranks of a run; `patch(rank)` is called in each of them first."""
    context, port = multiprocessing.get_context("fork"), free_port()
    log.write_text("")
    ranks = [context.Process(target=_rank, args=(arguments, log, rank, world, port, patch)) for rank in range(world)]
    for process in ranks:
        process.start()
    return Job(list(ranks), log)


def _rank(arguments: list[str], log: Path, rank: int, world: int, port: int, patch: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), MORE_DS_TIMEOUT=str(COLLECTIVE_SECONDS),
    )  # fmt: skip
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    torch.set_num_threads(1)
    code = 99
    try:
        if patch is not None:
            patch(rank)
        code = train.main(arguments)
    finally:
        os._exit(code)


def outcome(output: Path, steps: int = STEPS) -> dict[str, Any]:
    """What a finished run amounts to: hashes of its adapter and optimizer, and the steps that it has logged."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    newest = output / "checkpoints" / f"step-{steps:08d}"
    files = [output / "last" / "adapter_model.safetensors", output / "best" / "adapter_model.safetensors"]
    return {
        **{str(f.relative_to(output)): sha256(f) for f in [*files, newest / "optimizer.safetensors"]},
        "losses": [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row],
        "scores": [(row["step"], row["mean_score"]) for row in rows if "mean_score" in row],
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
