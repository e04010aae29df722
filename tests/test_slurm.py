"""What SLURM tells the ranks, and the scripts that are written for it; `make test-slurm` has a real one."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from launch import slurm
from more_ds import rendezvous
from more_ds.rendezvous import from_slurm

SCRIPTS = sorted(Path(slurm.TEMPLATES).glob("*.sbatch"))
STEP = {
    "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_STEP_NUM_TASKS": "11", "SLURM_STEP_ID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_STEP_NODELIST": "gpu[07-09]", "SLURM_JOB_ID": "1234567",
}  # fmt: skip


def test_a_rank_is_who_srun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def scontrol(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="gpu07\ngpu08\ngpu09\n")

    monkeypatch.setattr(rendezvous.subprocess, "run", scontrol)
    environment = dict(STEP)
    from_slurm(environment)
    assert asked == [["scontrol", "show", "hostnames", "gpu[07-09]"]]
    assert {name: value for name, value in environment.items() if name not in STEP} == {
        "RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "11", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(20_000 + 4567 + 97),
    }  # fmt: skip
    other = STEP | {"SLURM_NODEID": "1", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}
    from_slurm(other)
    assert (other["LOCAL_WORLD_SIZE"], other["MASTER_ADDR"], other["MASTER_PORT"]) == ("4", "head", "29500")
    assert len(asked) == 1


@pytest.mark.parametrize("environment", [{}, STEP | {"RANK": "0"}, {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}])
def test_another_launcher_is_left_alone(environment: dict[str, str]) -> None:
    before = dict(environment)
    from_slurm(environment)
    assert environment == before


def test_a_script_holds_what_was_asked_for(tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    given = [
        "--nodes",
        "4",
        "--gpus_per_node",
        "8",
        "--partition",
        "gpu,long",
        "--exclude",
        "n[1-3]",
        "--python",
        "/py",
    ]
    flags = ["--output_dir", "runs/a b", "--learning_rate", "1e-4", "--adapter.r", "16"]
    assert slurm.main(["llama2_7b_glue", *given, "--to", str(script), "--", *flags]) == 0
    text = script.read_text()
    options = dict(line.split(" ", 1)[1].split("=", 1) for line in text.splitlines() if re.match("#SBATCH --.*=", line))
    wanted = {
        "--nodes": "4", "--gpus-per-node": "8", "--ntasks-per-node": "8", "--partition": "gpu,long",
        "--exclude": "n[1-3]", "--job-name": "llama2_7b_glue", "--time": "24:00:00", "--signal": "B:USR1@300",
    }  # fmt: skip
    assert options.items() >= wanted.items()
    assert "#SBATCH --requeue\n" in text
    assert "\nPYTHON=/py\n" in text
    assert "ds_configs/zero3.json" in text
    assert text.endswith("--recipe llama2_7b_glue --output_dir 'runs/a b' --learning_rate 1e-4 --adapter.r 16\n")
    # SLURM reads options up to the first command only.
    assert max(m.start() for m in re.finditer("^#SBATCH", text, re.M)) < text.index("\nPYTHON=")
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_recipe", "--", "--output_dir", "x"], "no recipe 'no_recipe'"),
        (["demo", "--", "--learningrate", "1"], "did you mean 'learning_rate'?"),
        (["demo", "--", "--output_dir", "x", "--max_steps", "many"], "max_steps"),
        (["demo"], "give --output_dir after --"),
        (["demo", "--", "--resume", "none", "--output_dir", "x"], "the script sets it"),
        (["demo", "--partition", "gpu\n#SBATCH --uid=0", "--", "--output_dir", "x"], "it must be one word"),
        (["demo", "--nods", "2", "--", "--output_dir", "x"], "--nods"),
    ],
)
def test_a_mistake_is_found_before_the_queue(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert slurm.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", [*SCRIPTS, slurm.TEMPLATES / "requeue.sh"], ids=lambda path: path.name)
def test_the_scripts_are_bash(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert len(SCRIPTS) == 4


COMMANDS = {
    "srun": '[ "$1" != --overlap ] || exit "$DOWN"; shift; echo $$ > "$FAKE/pid"; exec "$@"',
    "scancel": 'echo "scancel $*"; kill -USR1 $(cat "$FAKE/pid")',
    "scontrol": 'echo "scontrol $*"',
}
WAITING = 'trap "exit {code}" USR1; echo ready; for i in $(seq 100); do sleep 0.05; done'


@pytest.mark.parametrize(
    ("step", "number", "restarts", "code", "requeued"),
    [
        ("exit 0", None, 0, 0, False),
        ("exit 75", None, 0, 0, True),
        ("exit 75", None, 3, 75, False),
        ("exit 2", None, 0, 2, False),
        ("exit 143", None, 0, 143, False),
        (WAITING.format(code=75), signal.SIGUSR1, 0, 0, True),
        (WAITING.format(code=137), signal.SIGTERM, 0, 0, True),
        (WAITING.format(code=0), signal.SIGUSR1, 0, 0, False),
    ],
)
def test_a_job_comes_back_only_if_it_was_stopped(
    step: str, number: int | None, restarts: int, code: int, requeued: bool, tmp_path: Path
) -> None:
    ended, printed = run_job(tmp_path, step, number, restarts)
    assert ended == code, printed
    assert ("scontrol requeue 7" in printed) == requeued
    assert ("scancel --signal=USR1 7" in printed) == (number is not None)


@pytest.mark.parametrize(
    ("step", "down", "code", "requeued"),
    [("exit 1", 0, 1, False), ("exit 143", 0, 143, False), ("exit 1", 1, 0, True), ("exit 0", 1, 0, False)],
)
def test_a_job_that_lost_a_node_comes_back(step: str, down: int, code: int, requeued: bool, tmp_path: Path) -> None:
    ended, printed = run_job(tmp_path, step, SLURM_JOB_NUM_NODES="2", DOWN=str(down))
    assert ended == code, printed
    assert ("scontrol requeue 7" in printed) == ("a node does not answer" in printed) == requeued


def run_job(
    tmp_path: Path, step: str, number: int | None = None, restarts: int = 0, **variables: str
) -> tuple[int, str]:
    """A job's exit code and what it prints, where SLURM's commands do nothing."""
    for name, body in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE": str(tmp_path), "SLURM_JOB_ID": "7", "MAX_RESTARTS": "3",
        "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": str(restarts), **variables,
    }  # fmt: skip
    script = f"set -eu; . {slurm.TEMPLATES / 'requeue.sh'}; run_step bash -c {shlex.quote(step)}"
    job = subprocess.Popen(["bash", "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    printed = ""
    if number is not None:
        while "ready" not in printed:
            printed += job.stdout.readline()
        job.send_signal(number)
    printed += job.stdout.read()
    return job.wait(20), printed
