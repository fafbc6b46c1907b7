"""A real SLURM on this machine, of two nodes, for as long as a test module lasts.

Debian's packages slurm-wlm and munge do it all, as root: munged with a key of its own, slurmctld,
and a slurmd for each node. There is no accounting, so `sacct` knows nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from support import wait_for

PROGRAMS = ("sbatch", "scontrol", "slurmctld", "slurmd", "munged")
NODES = ("n1", "n2")

_CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a job waits that was queued again
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=5
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=8000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=8000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no SLURM can be started here, None if one can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    lacking = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if lacking:
        return f"no {', '.join(lacking)} here: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "slurmd needs root"


def processes(words: str, variable: str = "", program: str = "") -> list[int]:
    """Ids of processes by their command line, their environment, and what they begin with."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            line = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            if (
                words in line
                and line.startswith(program)
                and variable.encode() in (folder / "environ").read_bytes()
            ):
                found.append(int(folder.name))
    return found


class Slurm:
    """The cluster, and what one does to it.

    Args:
        folder: of its state and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }

    def __call__(self, *command: str) -> str:
        """What one of SLURM's commands says."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def start(self) -> None:
        """Start munged, the controller and both nodes, and wait until the nodes are idle."""
        sockets = [socket.socket() for _ in range(3)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        ports = [free.getsockname()[1] for free in sockets]
        for free in sockets:
            free.close()
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        conf = _CONF.format(host=socket.gethostname(), folder=self.folder, ports=ports)
        (self.folder / "slurm.conf").write_text(conf)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        places = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log"}
        given = [f"--{name}={self.folder}/munge.{end}" for name, end in places.items()]
        given += [f"--seed-file={self.folder}/munge.seed"]
        self("munged", "--force", *given)
        self("slurmctld")
        for node in NODES:
            self("slurmd", "-N", node)
        wait_for(lambda: self("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * len(NODES))

    def stop(self) -> None:
        """End all that was started."""
        with suppress(AssertionError):
            self("scancel", "--user=root")
            wait_for(lambda: not self("squeue", "-h"), 30)
        for file in ("slurmd-n1.pid", "slurmd-n2.pid", "slurmctld.pid", "munge.pid"):
            with suppress(OSError, ValueError):
                os.kill(int((self.folder / file).read_text()), signal.SIGTERM)

    def kill_node(self, node: str) -> None:
        """As if its power went: slurmd, and all that runs of its jobs, without a word."""
        jobs = [line.split()[0] for line in self("squeue", "-h", "-o", "%A %N").splitlines()
                if line.split()[1:] == [node]]  # fmt: skip
        os.kill(int((self.folder / f"slurmd-{node}.pid").read_text()), signal.SIGKILL)
        # the job's steps first: they would tell the controller of a task that was killed
        steps = [pid for job in jobs for pid in processes(f"slurmstepd: [{job}.")]
        tasks = [pid for job in jobs for pid in processes("", f"SLURM_JOB_ID={job}\0")]
        for pid in [*steps, *tasks]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def job(self, job: str) -> dict[str, str]:
        """What the controller knows of a job: JobState, Restarts, NodeList, ..."""
        told = self("scontrol", "show", "job", "-o", job)
        return dict(re.findall(r"(\S+?)=(\S*)", told))


@contextmanager
def running(folder: Path) -> Iterator[Slurm]:
    """A cluster for as long as the block lasts."""
    slurm = Slurm(folder)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
