"""A child process for what may crash, hang or print: it answers one JSON value, or how it ended."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ANSWER = "MEGATRON_ET_CHECK_ANSWER"
"""Environment variable: the file descriptor that takes the answer. Standard output belongs to Megatron, which
prints."""
PATIENCE = 300.0
"""Seconds for an import. Cold ones from a cluster's file system take minutes."""


class ChildError(Exception):
    """A child process ended without an answer; says how, in one line."""


_START = """
import runpy, sys
script_folder, here = sys.argv[1:3]
del sys.argv[1:3]
sys.path[:0] = [script_folder] if script_folder else []
sys.path.append(here)
runpy.run_module("megatron_et.check", run_name="__main__")
"""
# The path of `torchrun -m megatron_et SCRIPT`: the script's folder, then (by -c, as by -m) the working
# directory. Last the place from which this process has megatron_et, which may be on no other.
_HERE = str(Path(__file__).resolve().parents[2])


class Child:
    """A task of __main__.py in a process of its own, started at once; `answer` waits for it.

    Args:
        task: one of __main__.TASKS.
        words: its arguments.
        script: the training script, whose folder goes first on the child's sys.path.
        env: variables set on top of this process's.
    """

    def __init__(
        self,
        task: str,
        words: Sequence[str] = (),
        *,
        script: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        # Files, not pipes: nobody reads while the child runs. `answer` closes them.
        self._answer: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._noise: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        descriptor = self._answer.fileno()
        # A rank's environment would make Megatron's messages, or its world, another rank's.
        inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK")}
        folder = "" if script is None else str(script.resolve().parent)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, folder, _HERE, task, *words],
            env=inherited | {**(env or {}), ANSWER: str(descriptor)},
            stdin=subprocess.DEVNULL,
            stdout=self._noise,
            stderr=self._noise,
            pass_fds=[descriptor],
        )

    def answer(self, timeout: float = PATIENCE) -> Any:
        """What the task returned. To be called once.

        Raises:
            ChildError: it raised, crashed or took longer than `timeout` seconds.
        """
        with self._answer, self._noise:
            try:
                status = self._process.wait(timeout)
            except subprocess.TimeoutExpired as error:
                raise ChildError(f"no answer after {timeout:.0f} s") from error
            finally:
                self.end()
            self._answer.seek(0)
            # Who answered and then died while it ended (libraries of GPUs do) has answered.
            if text := self._answer.read():
                return json.loads(text)
            raise ChildError(self._last_words(status))

    def end(self) -> None:
        """Stop the child if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _last_words(self, status: int) -> str:
        self._noise.seek(0)
        said = self._noise.read().strip().splitlines()
        how = f"exit status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"
        return f"{said[-1].strip()} ({how})" if said else how


def give(value: Any) -> None:
    """In the child: hand in the answer."""
    with os.fdopen(int(os.environ[ANSWER]), "w") as answer:
        json.dump(value, answer)
