"""The queue's jobs as forks of the test process, which has paid for the imports, and a tiny model for them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import distributed  # noqa: F401  # asks DeepSpeed once, not in every fork, which ops could be built
import torch
from tiny_models import base_model, tokenizer

from eval import run as eval_run
from launch import train, transfer
from more_ds.demo import prepare_data
from more_ds.study.jobs import Job

MAINS = {"launch/train.py": train.main, "launch/transfer.py": transfer.main, "eval/run.py": eval_run.main}


class Fork:
    """A process as the queue needs it."""

    def __init__(self, job: Job, output: Path) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 70
        try:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            torch.set_num_threads(1)
            stream = os.open(output, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            code = MAINS[job.script](list(job.arguments))
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code


def start(job: Job, output: Path, slot: int) -> Fork:
    return Fork(job, output)


def tiny(folder: Path) -> list[str]:
    """Flags for a tiny model with room for a hundred trained rows before the prompt, and for the demo's data."""
    base_model("llama").save_pretrained(folder / "model")
    tokenizer(False).save_pretrained(folder / "model")
    config = folder / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 512}))
    return ["--model", str(folder / "model"), "--data_dir", str(prepare_data(folder / "cache"))]
