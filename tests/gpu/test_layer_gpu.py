"""Megatron's MoELayer with our router and dispatchers on a GPU (gpu_layers.py): Transformer Engine's experts
and kernels against a dense formula, cold experts, recompute, the batch boundary."""

import pytest

from tests.gpu.gpu_cases import Outcomes, cases, passes
from tests.gpu.gpu_layers import CASES, Case

pytestmark = pytest.mark.gpu

CASES_OF = "tests.gpu.gpu_layers"  # read by the fixture `outcomes`


@cases(CASES, "dense_formula")
def test_dense_formula(case: Case, outcomes: Outcomes) -> None:
    """MoELayer against the dense formula: {case.layout}."""
    passes(case, outcomes)


@cases(CASES, "cold_experts")
def test_cold_experts(case: Case, outcomes: Outcomes) -> None:
    """MoELayer, {case.variant} without tokens."""
    passes(case, outcomes)


@cases(CASES, "delayed_weight_gradients")
def test_delayed_weight_gradients(case: Case, outcomes: Outcomes) -> None:
    """Delayed weight gradients with {case.variant} without tokens, bitwise equal."""
    passes(case, outcomes)


@cases(CASES, "recompute")
def test_recompute(case: Case, outcomes: Outcomes) -> None:
    """Activation recompute of {case.variant}, bitwise equal."""
    passes(case, outcomes)


@cases(CASES, "batch_boundary")
def test_batch_boundary(case: Case, outcomes: Outcomes) -> None:
    """Global-batch boundary ({case.variant}): exact warm-up loads, thresholds bitwise the CPU's."""
    passes(case, outcomes)


@cases(CASES, "no_host_synchronisation")
def test_no_host_synchronisation(case: Case, outcomes: Outcomes) -> None:
    """Router and reduction of the statistics without host synchronisation."""
    passes(case, outcomes)
