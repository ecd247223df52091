"""`forked([script or module, *args], nproc)`: as `launch.torchrun`, for tests that start many runs.

The ranks of a torchrun import torch and Megatron once, wait, and fork for every run: it has processes, a
port, arguments, environment and output of its own and leaves no state behind, but none of the seconds in
which every rank imports. What a test says about starting a run (imports, launchers, errors of torchrun)
needs `launch.torchrun` itself.
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from benchmarks.processes import kill_tree
from tests.launch import ROOT, TAIL, cpu_environment, free_port, torchrun_command

POLL = 0.03
PRELOADED = (
    "megatron.core.models.gpt.moe_module_specs",
    "megatron.training.training",
    "megatron_et.run.gpt",
    "torch.utils.tensorboard",
)
"""What is there of these; 0.16 ships no megatron.training."""


def forked(
    words: Sequence[str], nproc: int, *, env: Mapping[str, str] | None = None, timeout: int = 300
) -> subprocess.CompletedProcess[str]:
    """Run a script or `["-m", module, ...]`; arguments and result as for `launch.torchrun`, the exit status
    that of the first rank that failed."""
    return _server(nproc).run([str(word) for word in words], env or {}, timeout)


@functools.cache
def _server(nproc: int) -> "Server":
    server = Server(nproc)
    atexit.register(server.stop)
    return server


class Server:
    """Ranks that wait for runs in a folder: N.run says what to run, N.RANK.out and N.RANK.status what came of
    it."""

    def __init__(self, nproc: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._nproc = nproc
        self._runs = 0
        self._log = Path(self._folder.name) / "server"
        command = torchrun_command(nproc, self._folder.name)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, "-m", "tests.forked", self._folder.name, str(os.getpid())],
                env=cpu_environment(),
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, words: list[str], env: Mapping[str, str], timeout: int) -> subprocess.CompletedProcess[str]:
        """One run."""
        folder, number = Path(self._folder.name), self._runs
        self._runs += 1
        order = {"words": words, "env": dict(env), "port": free_port(), "timeout": timeout}
        (folder / "order").write_text(json.dumps(order))
        (folder / "order").rename(folder / f"{number}.run")
        outputs = [folder / f"{number}.{rank}.out" for rank in range(self._nproc)]
        statuses = [path.with_suffix(".status") for path in outputs]
        # Ranks end a run themselves when its time is over; they may still be importing, too.
        deadline = time.monotonic() + timeout + 120
        while not all(path.is_file() for path in statuses):
            if self._process.poll() is not None or time.monotonic() > deadline:
                logs = [self._log, *sorted(folder.rglob("*.log"))]
                log = "\n".join(path.read_text(errors="replace") for path in logs)
                pytest.fail(f"{words} on {self._nproc} ranks: no answer; their logs end:\n{log[-TAIL:]}")
            time.sleep(POLL)
        said = "\n".join(path.read_text(errors="replace") for path in outputs)
        ended = [int(path.read_text()) for path in statuses]
        for path in (*outputs, *statuses):
            path.unlink()
        return subprocess.CompletedProcess(words, next((status for status in ended if status), 0), said)

    def stop(self) -> None:
        """End the ranks."""
        kill_tree(self._process.pid)
        self._process.wait()
        self._folder.cleanup()


def serve(folder: Path, owner: int) -> None:
    """In a rank: import, then fork for every run until the owner's process is gone."""
    from megatron_et.run import cpu

    cpu.install()
    for name in PRELOADED:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    number, rank = 0, os.environ["RANK"]
    while _alive(owner):
        file = folder / f"{number}.run"
        if not file.is_file():
            time.sleep(POLL)
            continue
        order = json.loads(file.read_text())
        threads = os.listdir("/proc/self/task")
        assert len(threads) == 1, f"{len(threads)} threads: a fork has only one of them"
        child = os.fork()
        if child == 0:
            _run(folder / f"{number}.{rank}.out", order)
        status = _status(child, order["timeout"])
        done = folder / f"{number}.{rank}.done"
        done.write_text(str(status))
        done.rename(folder / f"{number}.{rank}.status")
        number += 1


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _run(output: Path, order: dict[str, object]) -> NoReturn:
    """Be the run: torchrun's worker, as far as it can see."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    status = 1
    try:
        os.environ.update(order["env"])
        # A port of its own has a store of its own.
        os.environ |= {"MASTER_PORT": str(order["port"]), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        words = order["words"]
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as exit_:
        if isinstance(exit_.code, str):
            print(exit_.code, file=sys.stderr)
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _status(child: int, timeout: float) -> int:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(POLL)
    kill_tree(child)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
