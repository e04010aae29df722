"""Two hosts as network namespaces, with a cable between them that can be pulled.

    make test-network     as root; a minute

ZeRO-3 over the cable equals one host; a cut ends the job within its time-out, with one line; and the job resumes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_runs import argv, make_place, outcome

ROOT = Path(__file__).resolve().parents[2]
HOSTS = {"more-a": "10.77.0.1", "more-b": "10.77.0.2"}
STEPS = ("--max_steps", "12", "--eval_steps", "12")
TIMEOUT_SECONDS = 30


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=not check)


@pytest.fixture(scope="module", autouse=True)
def cable() -> Iterator[None]:
    """Two namespaces, joined by a pair of interfaces."""
    for host in HOSTS:
        ip("netns", "del", host, check=False)
    for host in HOSTS:
        ip("netns", "add", host)
    first, second = HOSTS
    ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
    for host, address in HOSTS.items():
        ip("-n", host, "addr", "add", f"{address}/24", "dev", "cable")
        for device in ("lo", "cable"):
            ip("-n", host, "link", "set", device, "up")
    yield
    for host in HOSTS:
        ip("netns", "del", host)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("network"))


def start(place: Path, output: Path, *extra: str) -> list[subprocess.Popen[bytes]]:
    """A rank on each host; what they print is in `<output>-<rank>.log`."""
    ranks = []
    for rank, host in enumerate(HOSTS):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "29500",
            "MASTER_ADDR": HOSTS["more-a"], "GLOO_SOCKET_IFNAME": "cable", "MORE_DS_TIMEOUT": str(TIMEOUT_SECONDS),
        }  # fmt: skip
        command = ["ip", "netns", "exec", host, sys.executable, "-u", "launch/train.py"]
        command += argv(place, output, *extra, stage=3)
        with Path(f"{output}-{rank}.log").open("wb") as log:
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    return ranks


def wait(ranks: list[subprocess.Popen[bytes]], seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    try:
        return [rank.wait(max(0.1, deadline - time.monotonic())) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def log_of(output: Path, rank: int) -> str:
    return Path(f"{output}-{rank}.log").read_text()


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, Any]:
    output = place / "whole"
    assert wait(start(place, output, *STEPS), 240) == [0, 0], log_of(output, 0) + log_of(output, 1)
    return outcome(output, 12)


def test_a_cut_cable_ends_the_job_in_time_and_it_resumes(place: Path, whole: dict[str, Any]) -> None:
    output = place / "cut"
    ranks = start(place, output, *STEPS)
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.is_file() and '"step": 4,' in metrics.read_text()):
        assert time.monotonic() < deadline, log_of(output, 0)
        time.sleep(0.1)
    ip("-n", "more-a", "link", "set", "cable", "down")
    try:
        codes = wait(ranks, 4 * TIMEOUT_SECONDS)
    finally:
        ip("-n", "more-a", "link", "set", "cable", "up")
    assert codes == [1, 1]
    for rank in (0, 1):
        errors = [line for line in log_of(output, rank).splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, log_of(output, rank)
        assert "lost touch with the other ranks" in errors[0]
    assert wait(start(place, output, *STEPS), 240) == [0, 0], log_of(output, 0) + log_of(output, 1)
    assert "resumed from" in log_of(output, 0)
    assert outcome(output, 12) == whole
