"""A real SLURM on this machine: slurmctld, a slurmd for each of two nodes, and a munged of its own.

    python -m tests.slurm.cluster [COMMAND ...]

starts it, runs the command (a shell when left out) with SLURM's commands pointed at it, and takes it down
with everything that still runs in it. It needs slurm-wlm of Debian or Ubuntu (built with
--enable-multiple-slurmd) and munge. Nothing of the machine's configuration is read or written, all traffic is
on the loopback interface, and it runs as the user who calls it. Its GPUs are empty files: job scripts that
ask for GPUs are accepted.
"""

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import psutil

from tests.launch import ROOT, free_port

NODES = ("node1", "node2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
START = 30  # seconds until both nodes must be idle

# No cgroups, no accounting, no container of processes but the parents that /proc shows: that runs anywhere.
# Jobs of partition `high` preempt those of `low`, which are told, have GraceTime and are queued again.
# cred_expire is how long SLURM waits before it starts a job again (120 s by default).
SLURM_CONF = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_delay}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PlugStackConfig={folder}/plugstack.conf
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdTimeout=10
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
{user_signal}
KillWait={kill_wait}
GresTypes=gpu
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=96 RealMemory=1000 Gres=gpu:8\n"
)
PARTITIONS = """
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace} State=UP
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF State=UP
"""


def missing_programs() -> list[str]:
    """Programs of slurm-wlm and munge that are not on the PATH (munged and slurmd may be in /usr/sbin)."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Cluster:
    """Starts when entered, is gone when left; `run` runs SLURM's commands on it."""

    def __init__(self, *, grace: int = 60, kill_wait: int = 20, user_signal: bool = False) -> None:
        """Settings of slurm.conf.

        Args:
            grace: GraceTime, seconds between the notice of a preemption and the end.
            kill_wait: KillWait, seconds between SIGTERM and SIGKILL for a job that is ended.
            user_signal: preempt_send_user_signal, the notice is the job's own --signal instead of SIGTERM to
                all processes of its steps.
        """
        self._grace, self._kill_wait, self._user_signal = grace, kill_wait, user_signal
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Cluster":
        missing = missing_programs()
        if missing:
            raise RuntimeError(f"{', '.join(missing)}: not found; install slurm-wlm and munge")
        # Short: sockets in it have names of at most 108 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.env = {**os.environ, "PATH": _path(), "SLURM_CONF": str(self.folder / "slurm.conf")}
        try:
            self._configure()
            self._start()
        except BaseException as error:
            for log in self.folder.glob("*.out"):
                error.add_note(f"{log.name}: {log.read_text()[-2000:]}")
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while processes := self.processes():
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            for daemon in self._daemons:
                daemon.poll()  # a zombie of ours would be found again
        shutil.rmtree(self.folder)

    def processes(self, node: str | None = None) -> list[psutil.Process]:
        """The daemons and all that they started, or what belongs to one node."""
        mine = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                env = process.environ()
                if env.get("SLURM_CONF") != self.env["SLURM_CONF"]:
                    continue
                if node is None or env.get("SLURMD_NODENAME") == node or process.cmdline()[-1] == node:
                    mine.append(process)
                    parent = process.parent()  # slurmstepd clears its own environment
                    if parent is not None and parent.name().startswith("slurmstepd"):
                        mine.append(parent)
        return mine

    def power_off(self, node: str) -> None:
        """A node and all that runs on it vanish at once."""
        for process in self.processes(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                process.wait()
        self._daemons = [daemon for daemon in self._daemons if daemon.poll() is None]

    def power_on(self, node: str) -> None:
        """The node is back, with nothing running on it."""
        self._daemon("slurmd", "-D", "-N", node)
        self._wait(lambda: "idle" in self.node_states(), f"{node} to be back")

    def _configure(self) -> None:
        host = socket.gethostname()
        conf = SLURM_CONF.format(
            folder=self.folder,
            host=host,
            user=getpass.getuser(),
            port=free_port(),
            requeue_delay=5,
            kill_wait=self._kill_wait,
            user_signal="SlurmctldParameters=preempt_send_user_signal" if self._user_signal else "",
        )
        conf += "".join(NODE.format(name=name, host=host, port=free_port()) for name in NODES)
        (self.folder / "slurm.conf").write_text(conf + PARTITIONS.format(grace=self._grace))
        # SLURM complains that these are no devices, and counts them.
        for number in range(8):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.folder}/gpu[0-7]\n")
        (self.folder / "plugstack.conf").touch()
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))

    def _start(self) -> None:
        at = {
            f"--{name}": f"{self.folder}/munge.{name}"
            for name in ("socket", "pid-file", "log-file", "seed-file")
        }
        at["--key-file"] = f"{self.folder}/munge.key"
        # --force: the folder is ours alone, which munged thinks too narrow for a socket.
        self._daemon("munged", "--foreground", "--force", *(f"{k}={v}" for k, v in at.items()))
        self._wait((self.folder / "munge.socket").exists, "munged's socket")
        self._daemon("slurmctld", "-D")
        for name in NODES:
            self._daemon("slurmd", "-D", "-N", name)
        self._wait(lambda: self.node_states() == ["idle"] * len(NODES), "both nodes to be idle")

    def _daemon(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}-{len(self._daemons)}.out").open("wb")
        with log:
            self._daemons.append(
                subprocess.Popen(
                    command, env=self.env, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            )

    def _wait(self, until: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + START
        while not until():
            ended = [str(daemon.args) for daemon in self._daemons if daemon.poll() is not None]
            if ended or time.monotonic() > end:
                raise RuntimeError(f"waited {START} s for {what}; ended: {', '.join(ended) or 'no daemon'}")
            time.sleep(0.2)

    def run(self, *command: str, env: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
        """Run one of SLURM's commands; its output. RuntimeError when it fails."""
        done = subprocess.run(
            command,
            env={**self.env, **(env or {})},
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}: {done.stdout}")
        return done.stdout

    def node_states(self) -> list[str]:
        """State of each node in SLURM's words."""
        try:
            return self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T").split()
        except RuntimeError:  # slurmctld does not listen yet
            return []

    def submit(self, *arguments: str, env: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
        """`sbatch` from a folder, the repository's root when left out; the job's id."""
        return self.run("sbatch", "--parsable", *arguments, env=env, cwd=cwd).strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


def main(command: Sequence[str]) -> int:
    """Run a command, or a shell, on a cluster of its own."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the cluster ends, too
    with Cluster() as cluster:
        print(
            f"SLURM with {', '.join(NODES)}; partitions low (default) and high. Logs: {cluster.folder}",
            flush=True,
        )
        return subprocess.run(command or [os.environ.get("SHELL", "/bin/sh")], env=cluster.env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
