"""examples/slurm without SLURM: what the scripts decide, with stand-ins for srun, scontrol and scancel that
record how they are called. On a real SLURM: tests/distributed/test_slurm.py."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.linters import linter

pytestmark = pytest.mark.megatron_free

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ROOT / "examples" / "slurm"
TRACKER = "latest_checkpointed_iteration.txt"
RUNNING = "JobId=7 JobState=RUNNING PreemptTime=None"
PREEMPTED = "JobId=7 JobState=RUNNING PreemptTime=2026-01-01T00:00:00"

# Each writes its arguments into calls, a line each; what srun and scontrol do is in the test's hands.
STAND_INS = {
    "srun": 'echo "srun $*" >> calls; eval "$STEP"',
    "scancel": 'echo "scancel $*" >> calls',
    "scontrol": 'echo "scontrol $*" >> calls; [[ $* != *show* ]] || echo "$SHOWN"',
}


class Site:
    """A folder with the scripts, an example, and a PATH with the stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(SCRIPTS, folder / "examples" / "slurm")
        (folder / "examples" / "model.sh").touch()
        for name, body in STAND_INS.items():
            program = folder / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(f"#!/bin/bash\n{body}\n")
            program.chmod(0o755)
        self.env = {
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "MODEL": "model",
            "RUN_DIR": "run",
            "SLURM_SUBMIT_DIR": str(folder),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "96",
            "STEP": "exit 0",
            "SHOWN": RUNNING,
            "STOP_FILE": str(folder / "stopped"),
        }

    def start(self, script: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Start a script from the folder; variables in `env` that are empty are unset."""
        return subprocess.Popen(
            ["bash", f"examples/slurm/{script}", *arguments],
            env={key: value for key, value in {**self.env, **env}.items() if value},
            cwd=self.folder,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, script: str, *arguments: str, **env: str) -> tuple[int, str]:
        """Run a script to its end: status and output."""
        process = self.start(script, *arguments, **env)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def requeued(self) -> bool:
        return "scontrol requeue incomplete 7" in self.calls

    def checkpoint(self, step: int, tracker: str | None = None) -> Path:
        """A complete checkpoint, and the file that names it."""
        folder = self.folder / "run" / "checkpoints"
        (folder / f"iter_{step:07d}").mkdir(parents=True)
        (folder / f"iter_{step:07d}" / "metadata.json").touch()
        (folder / TRACKER).write_text(str(step) if tracker is None else tracker)
        return folder / TRACKER


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


SAVES = f"echo 30 > run/checkpoints/{TRACKER}; "


@pytest.mark.parametrize(
    ("step", "shown", "status", "requeued", "said"),
    [
        (SAVES + "exit 0", RUNNING, 0, False, "finished; the newest checkpoint is of step 30"),
        (
            "exit 0",
            PREEMPTED,
            0,
            True,
            "stopped, the job is preempted: exit status 0, the newest checkpoint is of step 20",
        ),
        ("exit 1", PREEMPTED, 0, True, "stopped, the job is preempted: exit status 1"),
        (
            ': > "$STOP_FILE"; exit 0',
            RUNNING,
            0,
            True,
            "stopped, SLURM sent SIGTERM to a node: exit status 0",
        ),
        (': > "$STOP_FILE"; exit 9', RUNNING, 9, False, "exit status 9 and saved nothing after step 20"),
        ("exit 9", RUNNING, 9, False, "exit status 9 and saved nothing after step 20: not tried again"),
        (SAVES + "exit 9", RUNNING, 0, True, "exit status 9, but saved step 30 after step 20: trying again"),
        ("exit 1", "JobState=CANCELLED PreemptTime=None", 1, False, "SLURM has ended the job (CANCELLED)"),
        ("exit 1", "JobState=PENDING PreemptTime=None", 1, False, "SLURM has ended the job (PENDING)"),
    ],
    ids=[
        "finished",
        "preempted",
        "preempted-unsaved",
        "told",
        "failed-and-told",
        "failed",
        "failed-after-progress",
        "cancelled",
        "node-lost",
    ],
)
def test_what_comes_after_a_life(
    site: Site, step: str, shown: str, status: int, requeued: bool, said: str
) -> None:
    site.checkpoint(20)
    ended, output = site.run("train.sbatch", STEP=step, SHOWN=shown)
    assert said in output
    assert (ended, site.requeued) == (status, requeued), output


def test_usr1_reaches_the_nodes_and_the_job_is_queued_again(site: Site) -> None:
    process = site.start("train.sbatch", STEP="sleep 2", SLURM_RESTART_COUNT="3")
    _wait_for(lambda: site.calls)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "scancel --signal=USR1 7" in site.calls
    assert "restart 3] stopped, USR1 came" in output
    assert site.requeued


@pytest.mark.parametrize(("restarts", "runs"), [("2", True), ("3", False)])
def test_requeues_are_bounded(site: Site, restarts: str, runs: bool) -> None:
    status, output = site.run("train.sbatch", SHOWN=PREEMPTED, SLURM_RESTART_COUNT=restarts, MAX_REQUEUES="2")
    assert status == 1
    assert f"restarted {restarts} times, MAX_REQUEUES is 2" in output
    assert any(call.startswith("srun") for call in site.calls) == runs
    assert not site.requeued


def test_a_task_of_an_array_signals_and_requeues_itself_only(site: Site) -> None:
    status, output = site.run(
        "train.sbatch", SHOWN=PREEMPTED, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1"
    )
    assert status == 0
    assert "[job 7_1, restart 0]" in output
    assert [call for call in site.calls if not call.startswith("srun")] == [
        "scontrol --oneliner show job 7_1",
        "scontrol requeue incomplete 7_1",
    ]


@pytest.mark.parametrize("content", ["", "\n", "12x"])
def test_a_broken_tracker_is_written_again(site: Site, content: str) -> None:
    site.checkpoint(9)
    tracker = site.checkpoint(108, tracker=content)
    (tracker.parent / "iter_0000120").mkdir()  # unfinished
    status, output = site.run("train.sbatch")
    assert status == 0
    assert tracker.read_text() == "108\n"
    assert "written again, the newest complete checkpoint is of step 108" in output
    assert "from step 108 on 2 nodes" in output


def test_a_tracker_broken_in_a_life_hides_no_progress(site: Site) -> None:
    site.checkpoint(20)
    save = "mkdir -p run/checkpoints/iter_0000030; touch run/checkpoints/iter_0000030/metadata.json; "
    status, output = site.run("train.sbatch", STEP=f"{save} : > run/checkpoints/{TRACKER}; exit 9")
    assert "saved step 30 after step 20: trying again" in output
    assert status == 0
    assert site.requeued


def test_a_broken_tracker_without_a_checkpoint_is_set_aside(site: Site) -> None:
    tracker = site.checkpoint(9, tracker="")
    (tracker.parent / "iter_0000009" / "metadata.json").unlink()
    status, output = site.run("train.sbatch")
    assert status == 0
    assert "training starts from the beginning" in output
    assert not tracker.exists()


@pytest.mark.parametrize("content", ["40", "release\n"])
def test_a_whole_tracker_is_left_alone(site: Site, content: str) -> None:
    tracker = site.checkpoint(40, tracker=content)
    site.run("train.sbatch")
    assert tracker.read_text() == content


def test_a_step_has_its_options_and_the_flags_of_the_user(site: Site) -> None:
    site.run("train.sbatch", "--lr", "1e-4", SLURM_RESTART_COUNT="2")
    (call,) = (call for call in site.calls if call.startswith("srun"))
    assert call.endswith("bash examples/slurm/node.sh --lr 1e-4")
    assert "--kill-on-bad-exit=1" in call
    assert "--cpus-per-task=96" in call
    assert f"--output={site.folder}/run/logs/7-restart2-node%n-%N.log" in call
    assert "container" not in call


def test_container_form(site: Site) -> None:
    site.run("train.sbatch", CONTAINER_IMAGE="nvcr.io#nvidia/pytorch:x", CONTAINER_MOUNTS="/data:/data:ro")
    (call,) = (call for call in site.calls if call.startswith("srun"))
    here = site.folder
    assert "--container-image=nvcr.io#nvidia/pytorch:x " in call
    assert f"--container-mounts={here}:{here},{here}/run:{here}/run,/data:/data:ro " in call
    assert f"--container-workdir={here} --no-container-mount-home bash examples/slurm/node.sh" in call


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"SLURM_SUBMIT_DIR": ""}, "submit this script with sbatch"),
        ({"SLURM_SUBMIT_DIR": "/"}, "submit from the repository's root"),
        ({"MODEL": "gpt5"}, "MODEL=gpt5: there is no examples/gpt5.sh"),
        ({"SLURM_GPUS_ON_NODE": ""}, "ask for GPUs, or set NPROC_PER_NODE"),
    ],
)
def test_wrong_use_is_said(site: Site, env: dict[str, str], said: str) -> None:
    status, output = site.run("train.sbatch", **env)
    assert status != 0
    assert said in output
    assert not site.calls


def test_sweep_shows_its_grid(site: Site) -> None:
    site.checkpoint(20)
    (site.folder / "run").rename(site.folder / "b-seed1")
    status, output = site.run("sweep.sbatch", ROUTERS="a b", SEEDS="1 2", SWEEP_DIR=".", SLURM_JOB_ID="")
    assert status == 0
    header, *rows, last = output.splitlines()
    assert header.split() == ["index", "router", "seed", "step", "folder"]
    assert [row.split() for row in rows] == [
        ["0", "a", "1", "0", "./a-seed1"],
        ["1", "a", "2", "0", "./a-seed2"],
        ["2", "b", "1", "20", "./b-seed1"],
        ["3", "b", "2", "0", "./b-seed2"],
    ]
    assert last.endswith("sbatch --array=0-3%2 examples/slurm/sweep.sbatch")
    assert not site.calls


def test_a_run_of_the_sweep_trains_its_router_and_seed(site: Site) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "ROUTERS": "a b", "SEEDS": "1 2"}
    status, output = site.run("sweep.sbatch", "--lr", "1", STEP='echo "$ROUTER in $RUN_DIR"', **array)
    assert status == 0
    assert f"b in {site.folder}/runs/sweep-model/b-seed1\n" in output
    assert site.calls[0].endswith("bash examples/slurm/node.sh --seed 1 --lr 1")
    status, output = site.run("sweep.sbatch", **(array | {"SLURM_ARRAY_TASK_ID": "4"}))
    assert status == 2
    assert "index 4: the grid has runs 0 to 3" in output


def test_interactive(site: Site) -> None:
    site.run(
        "interactive.sh", "--partition=debug", "--", "bash", "examples/model.sh", CONTAINER_IMAGE="x.sqsh"
    )
    site.run("interactive.sh", "--time=10")
    first, second = site.calls
    assert "--nodes=1 " in first
    assert "--partition=debug --container-image=x.sqsh" in first
    assert first.endswith("--no-container-mount-home bash examples/model.sh")
    assert second.endswith("--time=10 bash")  # without a terminal no --pty


RANK = """
import multiprocessing, os, signal, subprocess, sys, time
heard = []
def tell(): print("heard", len(heard), os.environ["PET_SIGNALS_TO_HANDLE"], sys.argv[1:], flush=True)
assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
helper = subprocess.Popen(["sleep", "60"])
time.sleep(float(os.environ["DEAF"]))
signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
print("ready", flush=True)
while not heard: time.sleep(0.01)
time.sleep(1.5)  # a save
assert helper.poll() is None, "the helper died"
helper.kill()
tell()
sys.exit(int(os.environ.get("ENDS_WITH", "0")))
"""


@pytest.mark.parametrize(("name", "deaf"), [("TERM", "0"), ("USR1", "1.5")])
def test_a_node_turns_a_signal_to_all_its_processes_into_one_for_the_ranks(
    site: Site, name: str, deaf: str
) -> None:
    """As SLURM does it: the signal goes to every process of the step, also when a rank is still starting."""
    (site.folder / "rank.py").write_text(RANK)
    (site.folder / "examples" / "model.sh").write_text(f'"{sys.executable}" rank.py "$@"\nexit $?\n')
    process = site.start("node.sh", "--lr", "1", DEAF=deaf, ENDS_WITH="3")
    if deaf == "0":
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    else:
        _wait_for(lambda: len(_below(process.pid)) >= 3)  # shell, rank, helper
        time.sleep(0.5)
    for pid in [*_below(process.pid), process.pid]:
        os.kill(pid, getattr(signal, f"SIG{name}"))
    output, _ = process.communicate(timeout=60)
    flags = ["--exit-signal-handler", "--exit-signal", "SIGINT", "--lr", "1"]
    assert f"heard 1 SIGHUP,SIGQUIT {flags}" in output
    assert process.returncode == 3
    assert (site.folder / "stopped").exists()


def _below(pid: int) -> list[int]:
    children = [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [pid for child in children for pid in _below(child)]


def _wait_for(condition, seconds: float = 30) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_shellcheck_is_clean() -> None:
    files = sorted(map(str, SCRIPTS.iterdir()))
    command = [linter("shellcheck"), "-x", "-P", str(SCRIPTS), *files]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stdout
