"""Run Megatron's own MoE unit tests against our router and dispatchers: `make upstream-tests MEGATRON=...`.

    python -m tests.upstream.run /path/to/Megatron-LM [--processes 8] [--plain] [--only PATTERN]

Starts torchrun once for each way of running them (et_conformance/table.py), and once more with plain Megatron
for the tests that failed. Nothing is written into the checkout. docs/conformance.md says what was seen.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_et.host.versions import is_checked
from tests.launch import free_port

from .et_conformance.outcome import Outcome, Summary, combine, judge
from .et_conformance.settings import FOLDER, Settings
from .et_conformance.table import WAYS, Way, matches

HERE = Path(__file__).resolve().parent
UPSTREAM_PROCESSES = 8  # most of Megatron's parametrizations are made for one node of 8 GPUs
USAGE = 2


def megatron_version(checkout: Path) -> str:
    """Version of a checkout, read without importing it."""
    return str(runpy.run_path(str(checkout / "megatron/core/package_info.py"))["__version__"])


class Runs:
    """Launches of test processes, with their records below one folder."""

    def __init__(self, checkout: Path, pattern: str, processes: int, out: Path) -> None:
        self.checkout, self.pattern, self.processes, self.out = checkout, pattern, processes, out
        self.launches = 0
        self.collected: list[str] = []

    def run(self, way: Way, only: Sequence[str] = ()) -> dict[str, Outcome]:
        """All tests of a way, or those named; again with the rest when one of them ends the processes.

        Raises:
            SystemExit: the processes end before they run a test.
        """
        outcomes: dict[str, Outcome] = {}
        while True:
            out = self.out / f"launch{self.launches}"
            self.launches += 1
            print(f"{way} ...", flush=True)
            out.mkdir(parents=True)
            settings = Settings(self.checkout, out, way, self.pattern, tuple(only), frozenset(outcomes))
            status = self._launch(settings)
            ranks = [_read(out / f"rank{rank}.jsonl") for rank in range(self.processes)]
            self.collected = self.collected or next(
                (record["collected"] for record in ranks[0] if "collected" in record), []
            )
            new = combine(ranks)
            outcomes.update(new)
            if status == 0 and all(any("finished" in record for record in rank) for rank in ranks):
                return outcomes
            print(f"{way}: the processes ended (status {status}), again from the next test", flush=True)
            if not new:
                tail = (out / "output.txt").read_text(errors="replace")[-6000:]
                raise SystemExit(f"{tail}\nThe test processes ended (status {status}) before any test ran.")

    def _launch(self, settings: Settings) -> int:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(self.processes)),
            *("--master-addr", "127.0.0.1", "--master-port", str(free_port())),
            *("-m", "pytest", "-p", "et_conformance.plugin", "-c", str(HERE / "pytest.ini")),
            *("--rootdir", str(self.checkout), "-p", "no:cacheprovider", "-p", "no:timeout"),
            *("-q", "--continue-on-collection-errors", str(self.checkout / FOLDER)),
        ]
        environment = {
            **os.environ,
            **settings.to_environment(),
            "PYTHONPATH": os.pathsep.join([str(self.checkout), str(HERE)]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DEBUG_TEMPROOT": str(settings.out),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        with (settings.out / "output.txt").open("w") as output:
            return subprocess.run(
                command, env=environment, cwd=settings.out, stdout=output, stderr=subprocess.STDOUT
            ).returncode


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="upstream-tests", description=__doc__.split("\n\n")[0])
    parser.add_argument("checkout", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument(
        "--processes",
        type=int,
        default=min(torch.cuda.device_count(), UPSTREAM_PROCESSES) or UPSTREAM_PROCESSES,
        help="ranks, all on this machine; default: one for each GPU, at most 8, and 8 on CPU",
    )
    parser.add_argument("--plain", action="store_true", help="the same tests on plain Megatron, without us")
    parser.add_argument("--only", default="*", help="tests whose name matches, as in table.py: * is anything")
    parser.add_argument("--json", type=Path, help="write every outcome here")
    parser.add_argument("--out", type=Path, help="keep the processes' output in this folder, which is new")
    arguments = parser.parse_args(argv)
    if not (arguments.checkout / FOLDER).is_dir():
        parser.exit(
            USAGE,
            f"{arguments.checkout} is no checkout of Megatron-LM: it has no folder {FOLDER}. "
            "Use: make upstream-tests MEGATRON=/path/to/Megatron-LM\n",
        )
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, and return the exit status: 0 when nothing failed because of us and, on a Megatron that
    the plug-in is checked on, no test is unclassified; 2 for a usage error."""
    arguments = _arguments(argv)
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out.absolute() if arguments.out else Path(temporary)
        runs = Runs(arguments.checkout.resolve(), arguments.only, arguments.processes, out)
        return _run(arguments, runs)


def _run(arguments: argparse.Namespace, runs: Runs) -> int:
    version = megatron_version(runs.checkout)
    where = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "CPU and gloo"
    print(f"Megatron {version}, {runs.processes} processes, {where}", flush=True)
    ways: tuple[Way, ...] = ("plain",) if arguments.plain else WAYS
    outcomes = {way: runs.run(way) for way in ways}
    if not arguments.plain:
        plain = runs.run("plain", failed) if (failed := _failed(outcomes)) else {}
        outcomes = {way: judge(way, outcomes[way], plain) for way in ways}
    summary = Summary([test for test in runs.collected if matches(arguments.only, test)], outcomes)
    print(summary.text())
    if arguments.json:
        arguments.json.write_text(json.dumps(summary.record(version), indent=1) + "\n")
    checked = is_checked(version)
    if summary.unclassified() and not checked:
        print(
            f"(Megatron {version} is none that megatron_et is checked on: unclassified tests do not count.)"
        )
    return 0 if summary.good(version_checked=checked) else 1


def _failed(outcomes: Mapping[Way, Mapping[str, Outcome]]) -> list[str]:
    """Tests that failed one way or another."""
    return sorted(
        {test for way in outcomes.values() for test, outcome in way.items() if outcome.status == "failed"}
    )


if __name__ == "__main__":
    raise SystemExit(main())
