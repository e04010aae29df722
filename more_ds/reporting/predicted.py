"""What the planner says of a run that has been made, beside what was measured."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from more_ds.config import build
from more_ds.ds_config import BatchSizes
from more_ds.errors import UserError
from more_ds.planner.hardware import gpu_like
from more_ds.planner.search import Candidate, Cluster, Subject
from more_ds.reporting.record import RunRecord


def measured(record: RunRecord) -> dict[str, float]:
    """Seconds of a step, tokens per second (medians over the logged intervals) and peak memory in GB."""
    rows = record.with_key("loss")
    if not rows:
        return {}
    batch = record.config["train_batch_size"]
    return {
        "seconds a step": batch / median(row["examples_per_second"] for row in rows),
        "tokens per second": float(median(row["tokens_per_second"] for row in rows)),
        "peak memory, GB": max(row["peak_memory_gb"] for row in rows),
    }


def predicted(record: RunRecord) -> dict[str, float]:
    """The same by the planner: time for rows of the mean length that was seen, memory for the longest that may come.

    Raises:
        UserError: the device has no data sheet, or the model's shape is not to be had.
    """
    plan = record.plan
    gpu = gpu_like(plan["device"], plan["device_memory_gb"] or math.inf)
    if gpu is None:
        raise UserError(f"the planner has no data sheet of this device: {plan['device']}")
    ranks = int(plan["ranks"])
    nodes = math.ceil(ranks / gpu.per_node)
    cluster = Cluster(gpu, ranks, nodes if ranks % nodes == 0 else 1)
    prompt, answer = _lengths(record)
    longest, usual = (_candidate(record, cluster, *lengths) for lengths in ((None, None), (prompt, answer)))
    seconds = usual.time.seconds
    return {
        "seconds a step": seconds,
        "tokens per second": (prompt + answer) * record.config["train_batch_size"] / seconds,
        "peak memory, GB": longest.memory.total / 1e9,
    }


def _candidate(record: RunRecord, cluster: Cluster, prompt: int | None, answer: int | None) -> Candidate:
    plan = record.plan
    config: dict[str, Any] = {**record.config, "dtype": plan["dtype"]}
    subject = Subject(build(config, f"the run {record.path}"), prompt, answer)
    sizes = BatchSizes(record.config["train_batch_size"], plan["micro_batch"], plan["accumulation"], plan["ranks"])
    return subject.candidate(cluster, str(record.path / "ds_config.json"), sizes)


def _lengths(record: RunRecord) -> tuple[int, int]:
    """Mean tokens of a prompt and of an answer."""
    parts = [part for row in record.with_key("loss") for part in row["tasks"].values()]
    examples, tokens, labels = (sum(part[key] for part in parts) for key in ("examples", "tokens", "label_tokens"))
    if not examples:
        raise UserError("no step has been logged")
    return max(1, round((tokens - labels) / examples)), max(1, round(labels / examples))
