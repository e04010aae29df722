"""What a piece of work sends to the device, asks of it, and holds there at most."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_NO_WORK = {
    aten._local_scalar_dense,
    aten.empty,
    aten.new_empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty_strided,
}


class Kernels(TorchDispatchMode):
    """Counts operations.

    Attributes:
        sent: operations that compute something; views and empty tensors are none.
        asked: times that the host waited for a value of a tensor.
    """

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.sent = self.asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation, and run it."""
        alias = func._schema.returns[0].alias_info if func._schema.returns else None
        self.sent += (alias is None or alias.is_write) and func._overloadpacket not in _NO_WORK
        self.asked += func is aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def kernels(work: Callable[[], object]) -> Kernels:
    """The operations of `work`."""
    with Kernels() as found:
        work()
    return found


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that `work` holds beyond what is there before it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with without_stderr(), torch.profiler.profile(profile_memory=True) as profile:
        work()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), i, event.nbytes()) for i, event in enumerate(events) if event.name() == "[memory]"
    )
    return int(np.cumsum([change for _, _, change in changes]).max(initial=0))


@contextmanager
def without_stderr() -> Iterator[None]:
    """Keep what torch's profiler writes at every start and stop, past any setting, off the terminal."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
