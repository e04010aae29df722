"""Ranks that SLURM started: `srun` says who they are in variables of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import MutableMapping

FIRST_PORT, PORTS = 20_000, 10_000


def from_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that torch and DeepSpeed read, in a task of `srun`; nothing where another launcher set them.

    The address is the first node of the step, where `srun` puts rank 0; the port follows from the job's number, so that
    jobs on one node do not meet. `MASTER_ADDR` and `MASTER_PORT` are kept where they are set.
    """
    if "RANK" in environment or "SLURM_PROCID" not in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return
    nodes = environment["SLURM_STEP_NODELIST"]
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=environment["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=environment["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=_on_this_node(environment["SLURM_STEP_TASKS_PER_NODE"], int(environment["SLURM_NODEID"])),
    )
    if "MASTER_ADDR" not in environment:
        hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        environment["MASTER_ADDR"] = hosts.stdout.split()[0]
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + (job + 97 * step) % PORTS))


def _on_this_node(tasks_per_node: str, node: int) -> str:
    """The tasks of a node, from what SLURM writes as `4(x2),3`: four on each of two nodes, three on the next."""
    counts: list[str] = []
    for part in tasks_per_node.split(","):
        count, _, times = part.partition("(x")
        counts += [count] * int(times.rstrip(")") or 1)
    return counts[node]
