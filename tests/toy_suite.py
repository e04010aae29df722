"""A suite of four toy tasks, one of each kind, its data, a model trained on nothing, and processes to run it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from tiny_models import base_model, text_model, tokenizer

from more_ds.evaluate import evaluate
from more_ds.results import TaskResult
from more_ds.tasks import Task
from more_ds.tasks.render import Example, render
from more_ds.text_model import TextModel

SUITE = """
suite: toy
tasks:
  accept:
    prompt: "accept: {text}"
    labels: {0: bad, 1: good}
    metrics: [matthews, accuracy]
    extra_tests: [test_hard]
  grade:
    prompt: "grade: {text}"
    labels: {range: [0.0, 2.0, 0.5]}
    metrics: [pearson, spearman]
  choose:
    prompt: "choose: {text}"
    options: ["{a}", "{b}", "it is {b}"]
    metrics: [accuracy]
  tell:
    prompt: "tell: {text}"
    references: said
    metrics: [exact_match]
    max_new_tokens: 6
"""
WORDS = ["red", "green", "a blue one", "x", "something longer", "no"]
NAMES = ["accept", "grade", "choose", "tell"]
IDS = {name: i for i, name in enumerate(NAMES)}


def toy_row(task: str, i: int) -> dict[str, Any]:
    text = " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 2 + i % 4))
    label: Any = {"accept": i % 2, "grade": (i % 5) / 2, "choose": i % 3}.get(task, 0)
    return {"text": text, "label": label, "a": WORDS[i % 6], "b": WORDS[(i + 2) % 6] + "!", "said": [text, "no"]}


def write_toy(path: Path) -> Path:
    """Write the tasks file, the data, a base model and an adapter for it (`adapter/`)."""
    (path / "toy.yaml").write_text(SUITE)
    for task in NAMES:
        (path / "toy" / task).mkdir(parents=True)
        for split, rows in (("train", 9), ("test", 11), ("test_hard", 5)):
            lines = [json.dumps(toy_row(task, i + len(split))) for i in range(rows)]
            (path / "toy" / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    base_model("llama").save_pretrained(path / "base")
    tokenizer(False).save_pretrained(path / "base")
    model = text_model("llama", NAMES)
    model.peft.peft_config["default"].base_model_name_or_path = str(path / "base")
    model.peft.save_pretrained(str(path / "adapter"))
    return path


def toy_examples(tasks: Sequence[Task], count: int = 11) -> dict[str, list[Example]]:
    return {task.name: [render(task, toy_row(task.name, i), i) for i in range(count)] for task in tasks}


def toy_scores(
    model: TextModel, tasks: Sequence[Task], batch_size: int, count: int = 11, **options: Any
) -> list[TaskResult]:
    examples = toy_examples(tasks, count)
    return evaluate(model, tasks, examples, task_ids=IDS, batch_size=batch_size, label=None, **options)


def assert_same(one: Sequence[TaskResult], other: Sequence[TaskResult]) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a.task, a.metrics, a.n, a.unparsable) == (b.task, b.metrics, b.n, b.unparsable)
        for x, y in zip(a.records, b.records, strict=True):
            assert {k: v for k, v in x.items() if k != "scores"} == {k: v for k, v in y.items() if k != "scores"}
            assert x["scores"] == (y["scores"] and pytest.approx(y["scores"], abs=1e-4))


def copy_adapter(adapter: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Copy an adapter, with its tensors changed in place by `change`."""
    target.mkdir(parents=True)
    (target / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors")
    return target


def _worker(rank: int, world: int, port: int, job: Callable[[int], Any], queue: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        queue.put((rank, job(rank)))
    except BaseException as error:
        queue.put((rank, repr(error)))
        raise


def on_ranks(world: int, job: Callable[[int], Any]) -> list[Any]:
    """Run `job(rank)` in forked processes, and return what they give, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_worker, args=(r, world, port, job, queue)) for r in range(world)]
    for worker in workers:
        worker.start()
    try:
        found = dict(queue.get(timeout=60) for _ in workers)
    finally:
        for worker in workers:
            worker.join(timeout=20)
            worker.kill()
    return [found[r] for r in range(world)]
