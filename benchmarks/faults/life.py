"""One life of a training run: started under torchrun, watched through its output, ended by signals."""

import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Self

import psutil

ROOT = Path(__file__).resolve().parents[2]
MARK = "FAULT_INJECTION_LIFE"  # environment variable by which every process of a life is found again
POLL = 0.002  # seconds: a step takes about 100 ms, and kills are to fall anywhere in it
SILENCE = 300  # seconds without the expected line: the run hangs


class EndedEarly(Exception):
    """The run ended, or fell silent, before what was waited for."""


class Life:
    """A running `torchrun ...`; a context manager that leaves no process behind.

    Args:
        arguments: what follows `torchrun --nproc-per-node N`.
        processes: N.
        log: file for the output of all ranks.
    """

    def __init__(self, arguments: Sequence[str], processes: int, log: Path) -> None:
        self._log = log
        self._mark = uuid.uuid4().hex
        self._signalled: float | None = None
        log.parent.mkdir(parents=True, exist_ok=True)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        address = ["--master-addr", "127.0.0.1", "--master-port", str(_free_port())]
        cpu = {"MEGATRON_ET_CPU": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.started = datetime.now()
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [*launcher, *address, *arguments],
                env={**os.environ, **cpu, MARK: self._mark},
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()

    @property
    def output(self) -> str:
        """What all ranks have printed so far."""
        return self._log.read_text(errors="replace")

    def wait_for(self, pattern: str, within: float = math.inf) -> None:
        """Return when the output has the pattern, or when `within` seconds are over. Raises EndedEarly if it
        never comes."""
        enough = time.monotonic() + within
        size, deadline = -1, time.monotonic() + SILENCE
        while time.monotonic() < enough:
            running = self._process.poll() is None
            if (now := self._log.stat().st_size) != size:
                size, deadline = now, time.monotonic() + SILENCE
                if re.search(pattern, self.output):
                    return
            if not running:
                raise EndedEarly(f"ended with status {self._process.returncode} before {pattern!r}")
            if time.monotonic() > deadline:
                raise EndedEarly(f"said nothing for {SILENCE} s before {pattern!r}")
            time.sleep(POLL)

    def wait(self, limit: float) -> int | None:
        """Exit status of torchrun; None when it still runs after `limit` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(limit)
        return None

    def seconds_since_signal(self) -> float | None:
        """Since the first signal that was sent; None when there was none."""
        return None if self._signalled is None else time.monotonic() - self._signalled

    def kill_all(self) -> None:
        """SIGKILL every process of the run, as a machine's failure would."""
        self._note_signal()
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self._process.pid)
            for process in [*launcher.children(recursive=True), launcher]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.wait()
        # A process that was being forked a moment ago belongs to nobody now, but has its environment.
        while remaining := list(self.processes()):
            for process in remaining:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.01)

    def signal_workers(self, number: signal.Signals, choose: Callable[[int], bool] = lambda _: True) -> None:
        """Send a signal to the training processes whose rank is chosen."""
        self._note_signal()
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._process.pid).children():
                if choose(int(process.environ().get("RANK", -1))):
                    process.send_signal(number)

    def signal_launcher(self, number: signal.Signals) -> None:
        """Send a signal to torchrun alone, as a job scheduler does."""
        self._note_signal()
        self._process.send_signal(number)

    def processes(self) -> Iterator[psutil.Process]:
        """All living processes of this run, adopted ones too."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    yield process

    def left_behind(self, limit: float) -> list[str]:
        """Command lines of the processes that outlive torchrun by more than `limit` seconds."""
        deadline = time.monotonic() + limit
        while any(True for _ in self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        remaining = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                remaining.append(" ".join(process.cmdline()))
        return remaining

    def _note_signal(self) -> None:
        if self._signalled is None:
            self._signalled = time.monotonic()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
