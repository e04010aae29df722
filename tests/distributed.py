"""Ranks as forks of the test process: imports are paid once, a process group costs a tenth of a second."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import deepspeed
import torch

from more_ds.engine import Ranks, free_port

deepspeed.ops.__compatible_ops__  # noqa: B018  # found with compiler runs on first access: once, not in every fork

TIMEOUT_SECONDS = 180.0
COLLECTIVE_SECONDS = 20


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, timeout: float = TIMEOUT_SECONDS) -> list[Any]:
    """Call `function(ranks, *arguments)` on `world` connected ranks and return their results, in the order of ranks.

    The ranks inherit the test process as it is (patches too) and change nothing in it. Results are copied with pickle.

    Raises:
        RuntimeError: a rank raised (its traceback is in the message), died, or was not done in `timeout` seconds; the
            others are killed.
    """
    context, port = multiprocessing.get_context("fork"), free_port()
    processes, pipes = [], []
    for rank in range(world):
        here, there = context.Pipe(duplex=False)
        processes.append(context.Process(target=_rank, args=(function, rank, world, port, there, arguments)))
        pipes.append(here)
        processes[-1].start()
        there.close()
    try:
        return _collect(pipes, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [rank for rank in range(len(pipes)) if rank not in results]
        ready = wait([pipes[rank] for rank in waiting], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RuntimeError(f"ranks {waiting} were not done in time")
        for rank in waiting:
            if pipes[rank] in ready:
                results[rank] = _receive(rank, pipes[rank])
    return [results[rank] for rank in range(len(pipes))]


def _receive(rank: int, pipe: Connection) -> Any:
    try:
        succeeded, result = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise RuntimeError(f"rank {rank} died") from None
    if not succeeded:
        raise RuntimeError(f"rank {rank} raised\n{result}")
    return result


def _rank(
    function: Callable[..., Any], rank: int, world: int, port: int, pipe: Connection, arguments: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), MORE_DS_TIMEOUT=str(COLLECTIVE_SECONDS),
    )  # fmt: skip
    code = 1
    try:
        torch.set_num_threads(1)  # a fork makes its pool of threads anew; two loading threads at once get none
        ranks = Ranks()
        ranks.connect()
        pipe.send_bytes(pickle.dumps((True, function(ranks, *arguments))))
        code = 0
        torch.distributed.destroy_process_group()
    except BaseException:
        if code:
            pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        pipe.close()
        os._exit(code)  # the test process's exit handlers are not for its forks
