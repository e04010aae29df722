"""A real SLURM of two virtual nodes on this machine, without systemd or control groups. Debian, as root."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PACKAGES = ("slurm-wlm", "munge")
CONF = """
ClusterName=test
SlurmctldHost={host}
SlurmUser=root
AuthType=auth/munge
# A job that is requeued waits until its credentials have expired: two minutes by default.
AuthInfo=cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldPort=16817
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdTimeout=10
SchedulerParameters=sched_interval=2,batch_sched_delay=1
NodeName=n1 NodeHostname={host} Port=17001 CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} Port=17002 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def install() -> None:
    """Get Debian's packages, if they are not there."""
    if shutil.which("slurmctld") and shutil.which("munged"):
        return
    subprocess.run(["apt-get", "update", "-qq"], check=True)
    subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES], check=True)


@contextmanager
def slurm(folder: Path) -> Iterator[Path]:
    """Start the daemons, with `SLURM_CONF` set; gives their folder, and stops them in the end."""
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().split(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=host, folder=folder))
    munge = start_munge(folder)
    os.environ["SLURM_CONF"] = str(conf)
    # Control groups of the second version are looked for even where no plugin uses them.
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\nConstrainCores=no\n")
    try:
        subprocess.run(["slurmctld", "-f", str(conf)], check=True)
        for node in ("n1", "n2"):
            start_node(folder, node)
        wait_until(lambda: run("sinfo", "-h", "-o", "%T %D").strip() == "idle 2", 30, "idle nodes")
        yield folder
    finally:
        subprocess.run(["scancel", "--user", "root"], check=False)
        time.sleep(1)
        for name in ("slurmd.n1", "slurmd.n2", "slurmctld"):
            stop(folder / f"{name}.pid")
        munge.terminate()


def start_munge(folder: Path) -> subprocess.Popen[bytes]:
    """Start the authentication daemon; its log and socket go where Debian has them."""
    for path in (Path("/run/munge"), Path("/var/log/munge"), Path("/etc/munge")):
        path.mkdir(parents=True, exist_ok=True)
        shutil.chown(path, "munge", "munge")
    key = Path("/etc/munge/munge.key")
    if not key.is_file():
        key.write_bytes(os.urandom(1024))
    shutil.chown(key, "munge", "munge")
    key.chmod(0o400)
    log = (folder / "munge.log").open("wb")
    process = subprocess.Popen(
        ["runuser", "-u", "munge", "--", "munged", "--foreground", "--force"], stdout=log, stderr=log
    )
    wait_until(lambda: subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0, 20, "munge")
    return process


def start_node(folder: Path, node: str) -> None:
    """Start the daemon of a node."""
    subprocess.run(["slurmd", "-f", str(folder / "slurm.conf"), "-N", node], check=True)


def fail_node(folder: Path, node: str) -> None:
    """Take a node away as a power cut does: its daemon, and all that it has started; none lives to tell of another."""
    found = {psutil.Process(int((folder / f"slurmd.{node}.pid").read_text()))}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("SLURMD_NODENAME") == node:
                steps = [parent for parent in process.parents() if parent.name().startswith("slurmstepd")]
                found |= {process, *steps}
    for act in (psutil.Process.suspend, psutil.Process.kill):
        for process in found:
            with suppress(psutil.NoSuchProcess):
                act(process)


def stop(pid_file: Path) -> None:
    if pid_file.is_file():
        with suppress(ProcessLookupError):
            os.kill(int(pid_file.read_text()), signal.SIGTERM)


def run(*command: str) -> str:
    """Output of a command that must succeed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def wait_until(condition, seconds: float, what: str) -> None:  # type: ignore[no-untyped-def]
    """Wait for something.

    Raises:
        TimeoutError: it does not come.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} in {seconds} s")
        time.sleep(0.3)
