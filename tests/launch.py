"""Start torchrun from a test: `torchrun([script, *args], nproc)` with the CPU backend's environment."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

import pytest

from benchmarks.processes import kill_tree

ROOT = Path(__file__).resolve().parent.parent
TAIL = 10_000  # characters of output to show when a run fails: two ranks' tracebacks and torchrun's own


def words(line: str) -> list[str]:
    """A command line as it is typed."""
    return line.split()


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun_command(nproc: int, logs: str) -> list[str]:
    """torchrun up to what it runs; its ranks write to files below `logs`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(nproc)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    return [*command, "--redirects", "3", "--log-dir", logs]


def cpu_environment() -> dict[str, str]:
    """This process's, for the CPU backend, which refuses to run where a GPU is visible."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MEGATRON_ET_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(
    script_or_module_args: Sequence[str],
    nproc: int,
    *,
    env: Mapping[str, str] | None = None,
    timeout: int = 300,
    cwd: str | Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `torchrun --nproc-per-node nproc ARGS` and return it with stdout and stderr together in `.stdout`.

    Args:
        script_or_module_args: a script and its arguments, or `["-m", module, ...]`.
        nproc: processes, all on this machine.
        env: variables set on top of `cpu_environment()`.
        timeout: seconds; then every process of the run is killed and the test fails with the output's tail.
        cwd: working directory, the repository root when left out.

    The exit status is the caller's to check: `assert run.returncode == 0, run.stdout[-TAIL:]`.
    """
    # Files, not pipes: a forgotten grandchild that holds a pipe open would keep us waiting for ever. One for
    # each rank: torchrun starts its workers unbuffered, so print() writes a line and its end one after the
    # other, with room between them for another rank.
    with tempfile.TemporaryDirectory() as logs, tempfile.TemporaryFile("w+", errors="replace") as output:
        command = [*torchrun_command(nproc, logs), *map(str, script_or_module_args)]
        process = subprocess.Popen(
            command,
            env=cpu_environment() | (env or {}),
            cwd=cwd or ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout)
        except BaseException as error:
            kill_tree(process.pid)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise  # Ctrl-C, pytest-timeout
            pytest.fail(
                f"{' '.join(command)} ran past {timeout} s; its output ends:\n{_said(output, logs)[-TAIL:]}"
            )
        return subprocess.CompletedProcess(command, process.returncode, _said(output, logs))


def _said(launcher: TextIO, logs: str) -> str:
    """torchrun's own output, then that of its ranks, one after the other."""
    launcher.seek(0)
    files = sorted(Path(logs).rglob("*.log"), key=lambda file: (file.parent, file.name))
    return "\n".join([launcher.read(), *(file.read_text(errors="replace") for file in files)])
