"""Training that SLURM takes from its nodes again and again ends bitwise like training that was left alone.

    python -m tests.slurm.preempt_and_resume [--events preempt,limit,power,crash] [--folder DIR]

Both are `sbatch examples/slurm/train.sbatch` on the two nodes of cluster.py, one process each, CPU and gloo.
The exit status is 1 when a trace record, a printed number, or anything in the last checkpoint differs.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

from benchmarks.faults.comparison import (
    TRACE_FILE,
    Checkpoint,
    Printed,
    Trace,
    compare_checkpoints,
    compare_printed,
    compare_trace,
    latest_iteration,
)
from tests.slurm.cluster import Cluster, missing_programs

MODEL = "d12"
SAVE_INTERVAL = 6
LIFE = 400  # seconds that a life may take on a busy machine, its start-up and the wait for nodes included
FLAGS = f"--log-interval 1 --save-interval {SAVE_INTERVAL} --eval-interval 40 --eval-iters 1"


@dataclass
class Job:
    """A training job on the cluster, and the folder of its run."""

    cluster: Cluster
    run: Path
    steps: int
    number: str = ""

    def submit(self, *options: str) -> "Job":
        """`sbatch train.sbatch`, in CPU mode and on the loopback interface."""
        self.run.mkdir(parents=True)
        env = {
            "MODEL": MODEL,
            "RUN_DIR": str(self.run),
            "TRAIN_STEPS": str(self.steps),
            "NPROC_PER_NODE": "1",
            "MEGATRON_ET_CPU": "1",
            "OMP_NUM_THREADS": "1",
            "RDZV_HOST": "127.0.0.1",
            "PET_LOCAL_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHON": sys.executable,
            # Every parameter fills Megatron's alignment of 64: gaps hold, and save, whatever was in memory.
            "KV_CHANNELS": "64",
        }
        log = f"--output={self.run}/batch.log"
        self.number = self.cluster.submit(
            log, *options, "examples/slurm/train.sbatch", *FLAGS.split(), env=env
        )
        return self

    @property
    def state(self) -> str:
        """SLURM's word."""
        return self.cluster.job(self.number)["JobState"]

    @property
    def restarts(self) -> int:
        """How often SLURM has queued the job again."""
        return int(self.cluster.job(self.number)["Restarts"])

    @property
    def trace(self) -> Trace:
        """What the run has traced so far."""
        return Trace.read(next(self.run.rglob(TRACE_FILE), self.run / TRACE_FILE))

    def printed(self, restart: int) -> str:
        """The output of all ranks in one life."""
        return "".join(path.read_text() for path in sorted(self.run.glob(f"logs/*-restart{restart}-node*")))

    def saved(self, restart: int) -> list[int]:
        """Steps whose checkpoint a life has completed."""
        return [
            int(i)
            for i in re.findall(r"successfully saved checkpoint from iteration +(\d+)", self.printed(restart))
        ]

    def trained(self, restart: int) -> list[int]:
        """Steps that a life has trained."""
        return sorted(Printed.parse(self.printed(restart)).losses)

    def wait(self, until: Callable[[], bool], what: str, seconds: float = LIFE) -> None:
        """Poll. RuntimeError, with the logs' ends, when it takes too long or the job has ended otherwise."""
        end = time.monotonic() + seconds
        while True:
            state = self.state  # before the question: a job that has just ended may be the answer
            if until():
                return
            if time.monotonic() > end or state in ("FAILED", "CANCELLED", "TIMEOUT", "COMPLETED"):
                logs = sorted(self.run.rglob("*.log"), key=lambda log: log.stat().st_mtime)
                tails = "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in logs[-3:])
                raise RuntimeError(f"job {self.number} is {state}, waiting for: {what}\n{tails}")
            time.sleep(0.2)

    def wait_for_steps(self, number: int, restart: int) -> None:
        """Until a life has trained so many steps."""
        self.wait(lambda: len(self.trained(restart)) >= number, f"{number} steps of life {restart + 1}")

    def finish(self) -> None:
        """Until the job has ended in order."""
        self.wait(lambda: self.state == "COMPLETED", "the end")


def preempt(job: Job) -> None:
    """A job of the partition with the higher priority wants the same nodes."""
    urgent = job.cluster.submit(
        "--partition=high",
        "--nodes=2",
        "--exclusive",
        f"--output={job.run}/urgent.log",
        "--wrap=srun hostname",
    )
    job.wait(lambda: job.cluster.job(urgent)["JobState"] == "COMPLETED", "the job that preempts to have run")


def reach_the_limit(job: Job) -> None:
    """The time limit comes nearer than --signal's 600 seconds."""
    set_limit = ("scontrol", "update", f"JobId={job.number}")
    job.cluster.run(*set_limit, "TimeLimit=9")
    job.wait(lambda: job.state == "PENDING", "the job to be queued again")
    job.cluster.run(*set_limit, "TimeLimit=60")


def power_off(job: Job) -> None:
    """The second node and all that runs on it are gone; after a while it is back."""
    job.cluster.power_off("node2")
    job.wait(lambda: job.state != "RUNNING", "SLURM to notice the lost node")
    job.cluster.power_on("node2")


def crash(job: Job) -> None:
    """A rank is killed, as by the kernel when memory runs out."""
    ranks = [
        p for p in job.cluster.processes() if "RANK" in _environment(p) and "--exit-signal" in p.cmdline()
    ]
    ranks[-1].kill()


def _environment(process: psutil.Process) -> dict[str, str]:
    with suppress(psutil.Error):
        return process.environ()
    return {}


EVENTS: dict[str, Callable[[Job], None]] = {
    "preempt": preempt,
    "limit": reach_the_limit,
    "power": power_off,
    "crash": crash,
}
SAME = "nothing differs: trace, losses, gradient norms, evaluations, everything in the last checkpoint"
IN_ORDER = ("preempt", "limit")  # the others leave no time to save


@dataclass(frozen=True)
class Life:
    """What one life of the interrupted run did."""

    event: str
    steps: list[int]
    saved: list[int]

    def __str__(self) -> str:
        trained = f"steps {self.steps[0]:>3} to {self.steps[-1]:>3}" if self.steps else "no step"
        saved = f"newest checkpoint of step {self.saved[-1]}" if self.saved else "saved nothing"
        return f"{trained}, {saved}, ended by: {self.event}"


def interrupt(job: Job, events: Sequence[str]) -> list[Life]:
    """Train to the end, with an event in each life but the last."""
    ended_by: dict[int, str] = {}
    for event in events:
        life = job.restarts
        # From its second save on a rank depends on Megatron's checkpoint helper.
        job.wait_for_steps(SAVE_INTERVAL + 2, life)
        EVENTS[event](job)
        job.wait(lambda: job.restarts > life, "SLURM to queue the job again")  # noqa: B023
        ended_by[life] = event
    job.finish()
    ended_by[job.restarts] = "the end"
    # SLURM may have ended it once more by itself: signals to a node that is off wait until it is back.
    return [
        Life(ended_by.get(life, "SLURM"), job.trained(life), job.saved(life))
        for life in range(job.restarts + 1)
    ]


def compare(straight: Job, victim: Job, lives: Sequence[Life]) -> list[str]:
    """All differences, in words."""
    reference = Printed.parse(straight.printed(0))
    differences, saved, steps = [], 0, straight.steps
    if sorted(reference.losses) != list(range(1, steps + 1)):
        differences.append(f"the reference has trained {len(reference.losses)} of {steps} steps")
    for restart, life in enumerate(lives):
        printed = Printed.parse(victim.printed(restart))
        differences += [f"life {restart + 1}: {line}" for line in compare_printed(reference, printed, saved)]
        if life.steps and life.steps[0] != saved + 1:
            differences.append(f"life {restart + 1} began with step {life.steps[0]}, saved was step {saved}")
        saved = max([saved, *life.saved])
        if life.event in IN_ORDER and saved != life.steps[-1]:
            differences.append(f"life {restart + 1} ended after step {life.steps[-1]} and saved {saved} only")
    differences += compare_trace(dict(straight.trace.records), victim.trace, steps)
    for job in (straight, victim):
        if (last := latest_iteration(job.run / "checkpoints")) != steps:
            return [*differences, f"the checkpoint in {job.run.name} is of step {last}, not {steps}"]
    left, right = (Checkpoint.read(job.run / "checkpoints", steps) for job in (straight, victim))
    return differences + compare_checkpoints(left, right)


def prove(cluster: Cluster, folder: Path, events: Sequence[str], steps: int) -> list[str]:
    """Both runs; what differs between them."""
    straight = Job(cluster, folder / "straight", steps).submit()
    straight.finish()
    print(f"straight: {steps} steps", flush=True)
    victim = Job(cluster, folder / "victim", steps).submit()
    lives = interrupt(victim, events)
    print("interrupted:", *lives, sep="\n  ", flush=True)
    return compare(straight, victim, lives)


def environment(cluster: Cluster) -> str:
    """What ran where."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    slurm = cluster.run("sbatch", "--version").strip()
    return f"{slurm}, {packages}, gloo, {MODEL} in its toy size, {os.cpu_count()} CPU cores"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prove it; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", default=",".join(EVENTS), help="in this order (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="time for all events (default: %(default)s)")
    parser.add_argument("--user-signal", action="store_true", help="preempt_send_user_signal")
    parser.add_argument("--folder", type=Path, help="for the runs; new, kept (default: temporary)")
    options = parser.parse_args(arguments)
    if missing := missing_programs():
        parser.error(f"{', '.join(missing)}: not found; install slurm-wlm and munge")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the cluster ends, too
    with tempfile.TemporaryDirectory() as temporary, Cluster(user_signal=options.user_signal) as cluster:
        print(environment(cluster), flush=True)
        folder = (options.folder or Path(temporary)).resolve()
        try:
            differences = prove(cluster, folder, options.events.split(","), options.steps)
        finally:
            for log in cluster.folder.glob("*.log"):
                shutil.copy(log, folder)
        print("log of the job script:")
        for line in (folder / "victim" / "batch.log").read_text().splitlines():
            print("  " + line.replace(str(folder), "RUNS"))
    print(*differences or [SAME], sep="\n")
    return int(bool(differences))


if __name__ == "__main__":
    sys.exit(main())
