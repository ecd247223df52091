"""Many checks in one torchrun: each rank imports Megatron once and forks for every check, which meets the
other ranks at a port of its own and leaves no state behind.

    outcome = together("tests.distributed.layers", 2, ["causality", "recompute"])["causality"]
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.launch import free_port, torchrun

SECONDS = 120
"""Of a check."""


@dataclass(frozen=True)
class Outcome:
    """What became of a check."""

    statuses: list[int]
    """Exit status by rank; negative: the signal that ended it."""
    output: str
    """Of all ranks, one after the other."""


def together(
    module: str, processes: int, checks: Sequence[str], env: Mapping[str, str] | None = None
) -> dict[str, Outcome]:
    """Run `module`, whose main is `run_each`, for all checks; each check is words, its name first."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "checks").write_text(json.dumps([[check.split(), free_port()] for check in checks]))
        run = torchrun(["-m", module, name], processes, env=env, timeout=60 + SECONDS * len(checks))

        def said(number: int, rank: int) -> str:
            file = folder / f"{number}.{rank}"
            return file.read_text(errors="replace") if file.is_file() else run.stdout

        def status(number: int, rank: int) -> int:
            file = folder / f"{number}.{rank}.status"
            return int(file.read_text()) if file.is_file() else run.returncode or 1

        ranks = range(processes)
        return {
            check: Outcome([status(i, r) for r in ranks], "\n".join(said(i, r) for r in ranks))
            for i, check in enumerate(checks)
        }


def run_each(folder: Path, check: Callable[[list[str]], None]) -> None:
    """In a rank: fork for every check of the folder and leave its output and exit status there."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # a port of its own has a store of its own
    for number, (words, port) in enumerate(json.loads((folder / "checks").read_text())):
        file = folder / f"{number}.{os.environ['RANK']}"
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.environ["MASTER_PORT"] = str(port)
            _run(file, lambda words=words: check(words))
        file.with_name(f"{file.name}.status").write_text(str(_status(child)))


def _run(file: Path, check: Callable[[], None]) -> None:
    output = os.open(file, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 1
    try:
        check()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _status(child: int) -> int:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, 9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
