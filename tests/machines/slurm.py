"""Training on two nodes of a real SLURM: preempted, requeued, a node lost, and the same bytes in the end.

make test-slurm     installs Debian's slurm-wlm and munge if need be; as root; a few minutes
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster
import pytest
from fault_runs import STEPS, make_place, outcome

from launch import slurm as script_writer

ROOT = Path(__file__).resolve().parents[2]
LONG = 60
"""Steps of a run that is to be hit in the middle."""
REBOOT_SECONDS = 70
"""A node that came back at once would still get the signals meant for the job that it had."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    cluster.install()
    with cluster.slurm(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def submit(place: Path, output: Path, *extra: str, steps: int = LONG) -> str:
    """Write a script for two nodes and submit it; returns the job's number."""
    script = output.with_suffix(".sbatch")
    flags = ["--output_dir", str(output), "--max_steps", str(steps), "--save_steps", "none", "--eval_steps", "20"]
    code = script_writer.main(
        [
            str(place / "recipe.yaml"), "--nodes", "2", "--gpus_per_node", "0", "--cpus_per_task", "1", "--time", "10",
            "--ds_config", str(place / "zero3.json"), "--python", sys.executable, "--to", str(script), "--", *flags,
            *extra,
        ]
    )  # fmt: skip
    assert code == 0
    # The names of virtual nodes are in no DNS.
    command = ["sbatch", "--parsable", f"--output={output}.log", "--export=ALL,MASTER_ADDR=127.0.0.1", str(script)]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=output.parent).stdout.strip()


def field(job: str, name: str) -> str:
    found = re.search(rf"\b{name}=(\S+)", cluster.run("scontrol", "show", "job", job))
    return found[1] if found else ""


def wait_for_step(output: Path, step: int) -> None:
    def reached() -> bool:
        path = output / "metrics.jsonl"
        return path.is_file() and f'"step": {step},' in path.read_text()

    wait(reached, output, f"step {step}")


def wait_for_end(job: str, output: Path) -> str:
    wait(lambda: field(job, "JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), output, "end")
    return field(job, "JobState")


def wait(condition: Any, output: Path, what: str, seconds: float = 240) -> None:
    try:
        cluster.wait_until(condition, seconds, what)
    except TimeoutError as error:
        log = Path(f"{output}.log")
        raise AssertionError(f"{error}:\n{log.read_text()[-4000:] if log.is_file() else 'no log'}") from error


def result(output: Path, steps: int = LONG) -> dict[str, Any]:
    """The bytes and scores of a run; a row of the log is cut where the run was."""
    found = outcome(output, steps)
    return {key: value for key, value in found.items() if key != "losses"}


@pytest.fixture(scope="module")
def whole(folder: Path, place: Path) -> dict[str, Any]:
    """A run that nobody disturbs."""
    output = place / "whole"
    assert wait_for_end(submit(place, output), output) == "COMPLETED", Path(f"{output}.log").read_text()
    assert "2 ranks on the CPU" in Path(f"{output}.log").read_text()
    return result(output)


def test_a_preempted_job_is_requeued_and_ends_with_the_same_bytes(place: Path, whole: dict[str, Any]) -> None:
    output = place / "preempted"
    job = submit(place, output)
    wait_for_step(output, 7)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as SLURM does before the end of the time
    wait(lambda: field(job, "Restarts") == "1", output, "restart")
    assert wait_for_end(job, output) == "COMPLETED", Path(f"{output}.log").read_text()
    log = Path(f"{output}.log").read_text()
    assert "stopped (SIGUSR1) and saved" in log  # srun may end another rank that is on its way out: 75 or 143
    assert "resumed from" in log
    assert result(output) == whole


def test_a_job_whose_node_goes_away_is_requeued_and_goes_on(folder: Path, place: Path, whole: dict[str, Any]) -> None:
    output = place / "lost"
    job = submit(place, output, "--save_steps", "5")
    wait_for_step(output, 12)
    cluster.fail_node(folder, "n2")
    wait(lambda: field(job, "JobState") == "PENDING" or field(job, "Restarts") == "1", output, "requeue")
    time.sleep(REBOOT_SECONDS)
    cluster.start_node(folder, "n2")
    assert wait_for_end(job, output) == "COMPLETED", Path(f"{output}.log").read_text()
    assert "resumed from" in Path(f"{output}.log").read_text()
    assert result(output) == whole


def test_a_mistake_is_not_requeued(folder: Path, place: Path) -> None:
    output = place / "mistake"
    job = submit(place, output, "--model", "./nowhere", steps=STEPS)
    assert wait_for_end(job, output) == "FAILED"
    assert field(job, "Restarts") == "0"  # srun's exit code is that of the rank that it ended for the other's sake
    assert "no model at ./nowhere" in Path(f"{output}.log").read_text()


def test_the_deepspeed_launcher_with_a_hostfile_starts_the_same_run(folder: Path, place: Path) -> None:
    """`deepspeed --launcher slurm` tells the ranks nothing; they ask SLURM."""
    hosts = place / "hosts"
    hosts.write_text("n1 slots=1\nn2 slots=1\n")
    output = place / "hostfile"
    command = [
        str(Path(sys.executable).with_name("deepspeed")), "-q", "--launcher", "slurm", "--hostfile", str(hosts),
        "--no_ssh_check", "--master_addr", "127.0.0.1", "--num_nodes", "2", "launch/train.py", "--recipe",
        str(place / "recipe.yaml"), "--ds_config", str(place / "zero2.json"), "--output_dir", str(output),
    ]  # fmt: skip
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks on the CPU" in done.stdout
    assert json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["step"] == STEPS
