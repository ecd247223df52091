"""Megatron's MoELayer with our router and dispatchers, against dense formulas and the invariants
(layers.py)."""

import re

import pytest

from tests.forked import forked
from tests.kernels.cuda_on_cpu import compiler
from tests.launch import TAIL, torchrun

pytestmark = pytest.mark.distributed

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
    (2, "batch_boundary"),
    (2, "recompute"),
    (2, "global_pool"),
    (4, "global_pool"),
    (2, "capacity"),
    (2, "fused_router"),
    (2, "fused_router cuda"),
    (2, "nonfinite_logits"),
    (1, "bfloat16"),
    (1, "padding_mask"),
    (1, "one_expert"),
    (1, "odd_sizes"),
    (1, "foreign_routers"),
]


def test_thresholds_do_not_depend_on_the_layout() -> None:
    """I3: one stream over 1, 2, 4 ranks, in 1 to 8 micro-batches, with and without recompute: equal bits."""
    layouts = [(1, "1"), (1, "8"), (2, "4"), (2, "3 yes"), (4, "1"), (4, "2 yes")]
    bits = {}
    for processes, split in layouts:
        command = ["-m", "tests.distributed.layers", "fixed_stream", *split.split()]
        run = forked(command, processes, timeout=120)
        assert run.returncode == 0, run.stdout[-TAIL:]
        bits[processes, split] = re.findall(r"^bits .*", run.stdout, re.MULTILINE)
    assert all(len(found) == 1 and "tokens 96" in found[0] for found in bits.values()), bits
    assert len({found[0] for found in bits.values()}) == 1, bits


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
def test_layer(processes: int, check: str) -> None:
    if check.endswith(" cuda") and compiler is None:
        pytest.skip("no C++ compiler")
    # Triton must be told to interpret before it is imported, and Megatron imports it.
    launch = torchrun if check.startswith("fused_router") else forked
    run = launch(["-m", "tests.distributed.layers", *check.split()], processes, timeout=120)
    assert run.returncode == 0, run.stdout[-TAIL:]
    assert run.stdout.count(f"check {check.split()[0]} passed") == processes
