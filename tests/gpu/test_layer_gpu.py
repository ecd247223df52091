"""Megatron's MoELayer with our router and dispatchers on a GPU (gpu_layers.py): Transformer Engine's experts
and kernels against a dense formula, cold experts, recompute, the batch boundary."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.gpu_launch import GPU_ENV, HAS_TE, needs_te
from tests.gpu.gpu_layers import CASES, Case
from tests.launch import TAIL, torchrun

pytestmark = pytest.mark.gpu

ENV = GPU_ENV | {
    # Transformer Engine lets fp32 GEMMs round to TF32; the comparison with the formula needs fp32.
    "NVIDIA_TF32_OVERRIDE": "0",
    # torch.use_deterministic_algorithms asks for it.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}

# More processes than this mean that all is broken: do not wait for every case to show it.
MAX_PROCESSES = 6

type Outcomes = dict[str, str | None]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Case -> None, or what went wrong, for all selected tests of this file.

    Starting a process takes longer than all cases together, so they share one. A case that takes the process
    down is charged with it, and the others go on in a new one.
    """
    folder = tmp_path_factory.mktemp("layers")
    items = [item for item in request.session.items if item.path == request.path]
    selected: list[Any] = [
        item.callspec.params["case"] for item in items if isinstance(item, pytest.Function)
    ]
    waiting = [case.id for case in selected if HAS_TE or not case.layout.needs_te]
    found: Outcomes = {}
    for attempt in range(MAX_PROCESSES):
        results = folder / f"{attempt}.jsonl"
        end = run(results, waiting)
        records = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        found |= {record["case"]: record["error"] for record in records}
        waiting = [case for case in waiting if case not in found]
        if not waiting:
            return found
        # A process also stops by itself, after a case that failed and took the GPU's context along.
        if not records or records[-1]["error"] is None:
            found[waiting.pop(0)] = f"the process ended in this case:\n{end}"
    return found | dict.fromkeys(waiting, f"not run, since {MAX_PROCESSES} processes broke before:\n{end}")


def run(results: Path, cases: list[str]) -> str:
    """Run cases in one process; returns the end of what it printed."""
    try:
        process = torchrun(["-m", "tests.gpu.gpu_layers", str(results), *cases], 1, env=ENV, timeout=240)
    except pytest.fail.Exception as hang:
        return str(hang)
    return process.stdout[-TAIL:]


def cases(check: str) -> pytest.MarkDecorator:
    """All cases of a check as the parameter `case`."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, marks=needs_te if case.layout.needs_te else (), id=name.partition("-")[2])
            for name, case in CASES.items()
            if case.check.__name__ == check
        ],
    )


def passes(case: Case, outcomes: Outcomes) -> None:
    error = outcomes[case.id]
    if error is not None:
        pytest.fail(error, pytrace=False)


@cases("dense_formula")
def test_dense_formula(case: Case, outcomes: Outcomes) -> None:
    """MoELayer against the dense formula: {case.layout}."""
    passes(case, outcomes)


@cases("cold_experts")
def test_cold_experts(case: Case, outcomes: Outcomes) -> None:
    """MoELayer, {case.variant} without tokens."""
    passes(case, outcomes)


@cases("recompute")
def test_recompute(case: Case, outcomes: Outcomes) -> None:
    """Activation recompute of {case.variant}, bitwise equal."""
    passes(case, outcomes)


@cases("batch_boundary")
def test_batch_boundary(case: Case, outcomes: Outcomes) -> None:
    """Global-batch boundary ({case.variant}): exact warm-up loads, thresholds bitwise the CPU's."""
    passes(case, outcomes)


@cases("no_host_synchronisation")
def test_no_host_synchronisation(case: Case, outcomes: Outcomes) -> None:
    """Router and reduction of the statistics without host synchronisation."""
    passes(case, outcomes)
