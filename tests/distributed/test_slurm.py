"""examples/slurm on a real SLURM: two nodes on this machine (tests/slurm/cluster.py). Without one, faster:
tests/unit/project/test_slurm_scripts.py."""

import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch import ROOT
from tests.megatron_here import needs_training
from tests.slurm.cluster import Cluster, missing_programs
from tests.slurm.preempt_and_resume import prove

MISSING = missing_programs()
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: install slurm-wlm and munge"),
]


@needs_training
def test_a_preempted_job_goes_on_bitwise(tmp_path: Path) -> None:
    """Real Megatron on two nodes; many steps, so that the preemption falls into them on any machine."""
    with Cluster() as cluster:
        assert prove(cluster, tmp_path, ["preempt"], steps=60) == []


# Behaves as a rank of Megatron towards the scripts, starts at once and takes no CPU.
TRAINER = """
import os, pathlib, signal, sys, time
tracker = pathlib.Path(os.environ["RUN_DIR"], "checkpoints", "latest_checkpointed_iteration.txt")
start = int(tracker.read_text()) if tracker.exists() else 0
stopped = []
signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
print("ready", flush=True)
crash = int(os.environ.get("CRASH_AT", "10000"))
for step in range(start + 1, 1000):
    time.sleep(0.1)
    if step >= crash and os.environ["NODE_RANK"] == "1":
        sys.exit(5)
    if stopped and crash < 10000:
        sys.exit(1)  # a rank of Megatron can't save without the others
    if (stopped or step % 10 == 0) and os.environ["NODE_RANK"] == "0":
        tracker.write_text(str(step))
    if stopped or os.path.exists("finish"):
        print("ended at", step, flush=True)
        break
"""


@dataclass
class Site:
    """A folder from which jobs are submitted, with the scripts and the trainer."""

    cluster: Cluster
    folder: Path

    def submit(self, *options: str, script: str = "train.sbatch", **env: str) -> str:
        """`sbatch`; the job's id. Its log is batch-JOB.log."""
        env = {"MODEL": "trainer", "RUN_DIR": f"{self.folder}/run", "RDZV_HOST": "127.0.0.1", **env}
        log = f"--output={self.folder}/batch-%j.log"
        return self.cluster.submit(log, *options, f"examples/slurm/{script}", env=env, cwd=self.folder)

    def restarts(self, job: str) -> int:
        return int(self.cluster.job(job)["Restarts"])

    def state(self, job: str) -> str:
        return self.cluster.job(job)["JobState"]

    def wait(self, until: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + 120
        while not until():
            logs = "\n".join(log.read_text() for log in self.folder.rglob("*.log"))
            assert time.monotonic() < end, f"waited for {what}\n{logs}"
            time.sleep(0.2)

    def ready(self, job: str, *, nodes: int = 2, restart: int = 0) -> None:
        """Until the trainer runs on all nodes."""
        logs = f"logs/{job}-restart{restart}-node*.log"
        self.wait(
            lambda: sum("ready" in log.read_text() for log in self.folder.glob(f"*/{logs}")) == nodes, logs
        )

    def log(self, job: str) -> str:
        return (self.folder / f"batch-{job}.log").read_text()

    def saved(self) -> int:
        return int((self.folder / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """No GraceTime: SIGTERM is followed by SIGKILL after KillWait."""
    with Cluster(grace=0) as running:
        yield running


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path) -> Iterator[Site]:
    shutil.copytree(ROOT / "examples" / "slurm", tmp_path / "examples" / "slurm")
    (tmp_path / "examples" / "trainer.sh").write_text(f"exec {sys.executable} trainer.py")
    (tmp_path / "trainer.py").write_text(TRAINER)
    yield Site(cluster, tmp_path)
    cluster.run("scancel", "--me")


def urgent(site: Site) -> None:
    """A short job that preempts the others."""
    site.cluster.submit(
        "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true", cwd=site.folder
    )


def test_without_grace_the_save_fits_into_kill_wait(site: Site) -> None:
    job = site.submit()
    site.ready(job)
    urgent(site)
    site.ready(job, restart=1)
    assert "SLURM has ended the job" in site.log(job)
    assert f"restart 1] trainer from step {saved_at_stop(site, job)} on 2 nodes" in site.log(job)


def test_the_signal_before_the_time_limit(site: Site) -> None:
    """--signal=B:USR1: SLURM sends it to the batch script, as done here by hand."""
    job = site.submit()
    site.ready(job)
    site.cluster.run("scancel", "--batch", "--signal=USR1", job)
    site.ready(job, restart=1)
    stopped = saved_at_stop(site, job)
    assert "restart 0] stopped, USR1 came: the time limit is near, or it was sent: exit status 0" in site.log(
        job
    )
    assert f"restart 1] trainer from step {stopped} on 2 nodes" in site.log(job)


def saved_at_stop(site: Site, job: str) -> int:
    """The step at which the first node ended in order in the job's first life."""
    (log,) = site.folder.glob(f"run/logs/{job}-restart0-node0-*.log")
    found = re.search(r"ended at (\d+)", log.read_text())
    assert found, log.read_text()
    return int(found[1])


def test_a_cancelled_job_saves_and_stays_cancelled(site: Site) -> None:
    job = site.submit()
    site.ready(job)
    site.cluster.run("scancel", job)
    site.wait(lambda: site.state(job) == "CANCELLED" and "SLURM has ended" in site.log(job), "the end")
    time.sleep(1)
    assert (site.state(job), site.restarts(job)) == ("CANCELLED", 0)
    assert site.saved() == saved_at_stop(site, job)


def test_sigint_saves_and_ends_for_good(site: Site) -> None:
    job = site.submit()
    site.ready(job)
    site.cluster.run("scancel", "--signal=INT", job)
    site.wait(lambda: site.state(job) == "COMPLETED", "the end")
    assert site.restarts(job) == 0
    assert f"finished; the newest checkpoint is of step {site.saved()}" in site.log(job)
    assert site.saved() == saved_at_stop(site, job)


def test_a_job_that_fails_is_tried_again_while_it_gets_on(site: Site) -> None:
    """The second node fails at step 15: the first life has saved step 10, the second one saves nothing."""
    job = site.submit(CRASH_AT="15")
    site.wait(lambda: site.state(job) == "FAILED", "the end")
    assert site.restarts(job) == 1
    assert site.cluster.job(job)["ExitCode"] == "5:0"
    assert "restart 0] failed with exit status 5, but saved step 10 after step 0: trying again" in site.log(
        job
    )
    assert "restart 1] failed with exit status 5 and saved nothing after step 10: not tried" in site.log(job)


def test_a_sweep_restarts_the_task_that_was_told(site: Site) -> None:
    array = site.submit(
        "--array=0-1", script="sweep.sbatch", ROUTERS="a", SEEDS="1 2", SWEEP_DIR=f"{site.folder}"
    )
    for task in (0, 1):
        site.ready(f"{array}_{task}", nodes=1)
    site.cluster.run("scancel", "--batch", "--signal=USR1", f"{array}_1")
    site.ready(f"{array}_1", nodes=1, restart=1)
    assert [site.restarts(f"{array}_{task}") for task in (0, 1)] == [0, 1]
    (site.folder / "finish").touch()
    for task in (0, 1):
        site.wait(lambda task=task: site.state(f"{array}_{task}") == "COMPLETED", f"the end of task {task}")


def test_interactive_has_the_node(site: Site) -> None:
    shown = site.cluster.run(
        "bash", "examples/slurm/interactive.sh", "--", "bash", "-c",
        "echo $SLURM_NNODES $SLURM_GPUS_ON_NODE $SLURM_CPUS_ON_NODE", cwd=site.folder,
    )  # fmt: skip
    assert "1 8 96" in shown


def test_preemption_by_the_jobs_own_signal(site: Site) -> None:
    """preempt_send_user_signal: the batch script is told, and no process gets SIGTERM."""
    with Cluster(grace=60, user_signal=True) as other:
        site = Site(other, site.folder)
        job = site.submit()
        site.ready(job)
        urgent(site)
        site.ready(job, restart=1)
        assert "restart 0] stopped, the job is preempted: exit status 0" in site.log(job)
        assert "CANCELLED AT" not in (next(site.folder.glob(f"run/logs/{job}-restart0-node0-*"))).read_text()
