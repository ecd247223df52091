"""Megatron's MoELayer with our router and dispatchers, against dense formulas and the invariants
(layers.py)."""

import functools
import re
from collections.abc import Callable

import pytest

from tests.distributed.forked import Outcome, together
from tests.kernels.cuda_on_cpu import compiler
from tests.launch import TAIL

pytestmark = pytest.mark.distributed

LAYERS = "tests.distributed.layers"

SMOKE = {(2, "dense_formula alltoall"), (2, "dense_formula allgather"), (2, "recompute"), (1, "bfloat16")}
CHECKS = [
    (2, "dense_formula alltoall"),
    (2, "dense_formula allgather"),
    (1, "dense_formula alltoall"),
    (4, "dense_formula alltoall"),
    (2, "dense_formula alltoall 3"),
    (2, "dense_formula alltoall empty"),
    (2, "dense_formula alltoall 0 no"),
    (2, "dense_formula alltoall 0 overlap"),
    (2, "token_dropping alltoall probs pad"),
    (2, "token_dropping alltoall position drop"),
    (2, "token_dropping allgather probs drop"),
    (2, "token_dropping allgather probs pad"),
    (2, "padded_map"),
    (2, "expert_parallel_overlap"),
    (2, "host_syncs alltoall"),
    (2, "host_syncs allgather"),
    (2, "causality"),
    (2, "cold_experts"),
    (2, "empty_fused_permutation alltoall"),
    (2, "empty_fused_permutation allgather"),
    (2, "batch_boundary histogram"),
    (2, "batch_boundary kth-largest"),
    (2, "recompute"),
    (2, "global_pool"),
    (4, "global_pool"),
    (2, "capacity"),
    (2, "fused_router histogram"),
    (2, "fused_router kth-largest"),
    (2, "fused_router histogram cuda"),
    (2, "nonfinite_logits"),
    (1, "bfloat16"),
    (1, "padding_mask"),
    (1, "one_expert"),
    (1, "odd_sizes"),
    (1, "foreign_routers"),
]


FIXED_STREAM = {1: ["1", "8"], 2: ["4", "3 yes"], 4: ["1", "2 yes"]}
"""Processes -> micro-batches, and whether with recompute."""

type Outcomes = Callable[[int, str], Outcome]


@pytest.fixture(scope="module")
def outcome_of(request: pytest.FixtureRequest) -> Outcomes:
    """Runs everything selected that needs so many processes with the first of it."""
    selected: dict[int, list[str]] = {1: [], 2: [], 4: []}
    for item in request.session.items:
        if item.originalname == "test_layer" and can_run(item.callspec.params["check"]):
            selected[item.callspec.params["processes"]].append(item.callspec.params["check"])
        elif item.originalname == "test_thresholds_do_not_depend_on_the_layout":
            for processes, splits in FIXED_STREAM.items():
                selected[processes] += [f"fixed_stream {split}" for split in splits]

    @functools.cache
    def outcomes(processes: int) -> dict[str, Outcome]:
        # Triton reads it when it is imported, and Megatron imports it; nothing else here uses Triton.
        return together(LAYERS, processes, selected[processes], env={"TRITON_INTERPRET": "1"})

    return lambda processes, check: outcomes(processes)[check]


def test_thresholds_do_not_depend_on_the_layout(outcome_of: Outcomes) -> None:
    """I3: one stream over 1, 2, 4 ranks, in 1 to 8 micro-batches, with and without recompute: equal bits."""
    bits = {}
    for processes, splits in FIXED_STREAM.items():
        for split in splits:
            outcome = outcome_of(processes, f"fixed_stream {split}")
            assert outcome.statuses == [0] * processes, outcome.output[-TAIL:]
            bits[processes, split] = re.findall(r"^bits .*", outcome.output, re.MULTILINE)
    assert len(bits) == 6
    assert all(len(found) == 1 and "tokens 96" in found[0] for found in bits.values()), bits
    assert len({found[0] for found in bits.values()}) == 1, bits


def can_run(check: str) -> bool:
    return compiler is not None or not check.endswith(" cuda")


@pytest.mark.parametrize(
    ("processes", "check"),
    [
        pytest.param(
            *case,
            marks=[pytest.mark.smoke] if case in SMOKE else [],
            id=f"{case[1]}-{case[0]}p".replace(" ", "-"),
        )
        for case in CHECKS
    ],
)
def test_layer(processes: int, check: str, outcome_of: Outcomes) -> None:
    if not can_run(check):
        pytest.skip("no C++ compiler")
    outcome = outcome_of(processes, check)
    assert outcome.statuses == [0] * processes, outcome.output[-TAIL:]
    assert outcome.output.count(f"check {check.split()[0]} passed") == processes
