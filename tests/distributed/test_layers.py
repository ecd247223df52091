"""Megatron's MoELayer with our router and dispatchers, against dense formulas and the invariants
(layers.py)."""

import pytest

from tests.launch import TAIL, torchrun

pytestmark = pytest.mark.distributed

CHECKS = [
    (2, "dense_formula alltoall"),
    (2, "dense_formula allgather"),
    (1, "dense_formula alltoall"),
    (4, "dense_formula alltoall"),
    (2, "dense_formula alltoall 3"),
    (2, "dense_formula alltoall 0 no"),
    (2, "causality"),
    (2, "cold_experts"),
    (2, "batch_boundary"),
    (2, "recompute"),
    (2, "capacity"),
    (2, "nonfinite_logits"),
    (1, "bfloat16"),
    (1, "padding_mask"),
    (1, "one_expert"),
    (1, "odd_sizes"),
]


@pytest.mark.parametrize(
    ("processes", "check"), CHECKS, ids=[f"{c}-{p}p".replace(" ", "-") for p, c in CHECKS]
)
def test_layer(processes: int, check: str) -> None:
    run = torchrun(["-m", "tests.distributed.layers", *check.split()], processes, timeout=120)
    assert run.returncode == 0, run.stdout[-TAIL:]
    assert run.stdout.count(f"check {check.split()[0]} passed") == processes
