"""A SLURM cluster of two nodes on this machine, for as long as a test needs it.

Any user may start it: it asks nothing of the system but the programs ``slurmctld`` and ``slurmd``
(Debian and Ubuntu: ``apt install slurm-wlm``). The nodes are called by loopback addresses, so that
their names resolve. To look around: ``python -m tests.slurm.cluster``.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

FIRST_PORT = 23000
NODES = ("127.0.0.1", "127.0.0.2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
FirstJobId={first_job}
KillWait=20
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=127.0.0.[1-2] NodeHostname={host} NodeAddr=127.0.0.[1-2] Port=[{nodes}] CPUs=4
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Programs of SLURM that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]


class Cluster:
    """Two nodes and their controller.

    Args:
        folder: empty; configuration, state and logs go there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir()
        controller, first, second = _three_ports()
        conf = _CONF.format(
            host=socket.gethostname().split(".")[0],
            user=getpass.getuser(),
            folder=folder,
            controller=controller,
            first_job=controller - FIRST_PORT + 1,  # jobs derive a port from their number
            nodes=f"{first}-{second}",
        )
        (folder / "slurm.conf").write_text(conf)
        self._daemons = [self._start("slurmctld", "-c", "-D")]
        self._daemons += [self._start("slurmd", "-D", "-N", node) for node in NODES]
        self._wait_for_nodes()

    def run(self, *command: str, check: bool = True) -> str:
        """A SLURM command; what it writes to stdout."""
        done = subprocess.run(
            command, env=self.env, cwd=self.folder, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, script: str) -> str:
        """Hand in a batch script; the job's number."""
        path = self.folder / "job.sbatch"
        path.write_text(script)
        return self.run("sbatch", "--parsable", str(path))

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows about a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: str, *states: str, seconds: float = 240) -> dict[str, str]:
        """Wait until a job is in one of ``states``."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"{json.dumps(job)}\n{self.log()}"
            time.sleep(0.2)
        return job

    def log(self) -> str:
        """What the jobs have written."""
        return "\n".join(path.read_text() for path in self.folder.glob("*-[0-9]*.log"))

    def close(self) -> None:
        """End all jobs and daemons."""
        self.run("scancel", "--user", getpass.getuser(), check=False)
        deadline = time.monotonic() + 40
        while self.run("squeue", "--noheader", check=False) and time.monotonic() < deadline:
            time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            daemon.wait(20)

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{'-'.join(command)}.out").open("wb")
        return subprocess.Popen(command, env=self.env, stdout=log, stderr=subprocess.STDOUT)

    def _wait_for_nodes(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            states = self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()
            if states == ["idle", "idle"]:
                return
            time.sleep(0.2)
        self.close()
        raise AssertionError(f"the nodes do not come up; see {self.folder}")


def main() -> None:
    """Start a cluster, say how to use it, and end it at Ctrl-C."""
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder))
        print(f"export SLURM_CONF={folder}/slurm.conf  # Ctrl-C ends the cluster", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
        cluster.close()


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"


def _three_ports() -> tuple[int, int, int]:
    """A free port, and two free ones in a row."""
    for first in range(FIRST_PORT + 8 * (os.getpid() % 500), FIRST_PORT + 8000, 8):
        ports = (first, first + 1, first + 2)
        try:
            for port in ports:
                with socket.socket() as probe:
                    probe.bind(("", port))
        except OSError:
            continue
        return ports
    raise AssertionError("no free ports")


if __name__ == "__main__":
    main()
