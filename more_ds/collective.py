"""Work that one rank does for all, so that all end alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from more_ds.errors import TrainingError, UserError


def on_rank_zero(work: Callable[[], Any], device: torch.device, failure: str) -> Any:
    """Do `work` on rank 0 and return its result, plain JSON, on every rank; an error there is an error everywhere.

    Raises:
        UserError: `work` raised it.
        TrainingError: `work` raised something else; the message begins with `failure`.
    """
    outcome: dict[str, Any] = {}
    cause: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome = {"value": work()}
        except UserError as error:
            outcome, cause = {"user": str(error)}, error
        except Exception as error:
            outcome, cause = {"error": f"{failure}: {str(error) or type(error).__name__}"}, error
    outcome = _broadcast(outcome, device)
    if "user" in outcome:
        raise UserError(outcome["user"]) from cause
    if "error" in outcome:
        raise TrainingError(outcome["error"]) from cause
    return outcome["value"]


def _broadcast(content: Any, device: torch.device) -> Any:
    """Rank 0's `content`, sent as JSON: torch's own object broadcast unpickles."""
    encoded = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8, device=device)
    size = torch.tensor(len(encoded), device=device)
    dist.broadcast(size, src=0)
    if dist.get_rank() != 0:
        encoded = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(encoded, src=0)
    return json.loads(bytes(encoded.tolist()))
