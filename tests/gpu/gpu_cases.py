"""Cases of a module like gpu_layers.py as tests: which can run here; all of a test file in one process."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.gpu.gpu_launch import GPU_ENV, HAS_TE
from tests.gpu.gpu_layers import Case
from tests.launch import TAIL, torchrun

ENV = GPU_ENV | {
    # Transformer Engine lets fp32 GEMMs round to TF32; the comparison with the formula needs fp32.
    "NVIDIA_TF32_OVERRIDE": "0",
    # torch.use_deterministic_algorithms asks for it.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}

# More processes than this mean that all is broken: do not wait for every case to show it.
MAX_PROCESSES = 6

type Outcomes = dict[str, str | None]
"""Case -> None, or what went wrong."""


def missing(case: Case) -> str | None:
    """Why the case cannot run here."""
    if case.layout.needs_te and not HAS_TE:
        return "Transformer Engine is not installed"
    return case.missing


def cases(all_cases: Mapping[str, Case], check: str) -> pytest.MarkDecorator:
    """All cases of a check as the parameter `case`."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(
                case,
                marks=pytest.mark.skipif(missing(case) is not None, reason=missing(case) or ""),
                id=name.partition("-")[2],
            )
            for name, case in all_cases.items()
            if case.check.__name__ == check
        ],
    )


def run_cases(module: str, selected: Sequence[Case], folder: Path) -> Outcomes:
    """Run what can run of the selected cases of a module.

    Starting a process takes longer than all cases together, so they share one. A case that takes the process
    down is charged with it, and the others go on in a new one.
    """
    waiting = [case.id for case in selected if missing(case) is None]
    found: Outcomes = {}
    for attempt in range(MAX_PROCESSES):
        results = folder / f"{attempt}.jsonl"
        end = _run(module, results, waiting)
        records = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        found |= {record["case"]: record["error"] for record in records}
        waiting = [case for case in waiting if case not in found]
        if not waiting:
            return found
        # A process also stops by itself, after a case that failed and took the GPU's context along.
        if not records or records[-1]["error"] is None:
            found[waiting.pop(0)] = f"the process ended in this case:\n{end}"
    return found | dict.fromkeys(waiting, f"not run, since {MAX_PROCESSES} processes broke before:\n{end}")


def _run(module: str, results: Path, names: Sequence[str]) -> str:
    """Run cases in one process; returns the end of what it printed."""
    try:
        process = torchrun(["-m", module, str(results), *names], 1, env=ENV, timeout=240)
    except pytest.fail.Exception as hang:
        return str(hang)
    return process.stdout[-TAIL:]


def passes(case: Case, outcomes: Outcomes) -> None:
    """Fail the test with what went wrong."""
    error = outcomes[case.id]
    if error is not None:
        pytest.fail(error, pytrace=False)
