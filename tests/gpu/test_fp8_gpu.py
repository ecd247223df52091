"""Megatron's MoELayer in FP8 on a GPU (fp8_layers.py): 0 to all tokens per expert, the padding, the router in
fp32, recompute. Whole training runs in FP8 are in test_training_gpu.py."""

import pytest

from tests.gpu.fp8_layers import CASES
from tests.gpu.gpu_cases import Outcomes, cases, passes
from tests.gpu.gpu_layers import Case

pytestmark = pytest.mark.gpu

CASES_OF = "tests.gpu.fp8_layers"  # read by the fixture `outcomes`


@cases(CASES, "fp8_counts")
def test_fp8_counts(case: Case, outcomes: Outcomes) -> None:
    """MoELayer in FP8 {case.variant}, 0 to all tokens per expert, router as in bf16: {case.layout}."""
    passes(case, outcomes)


@cases(CASES, "fp8_recompute")
def test_fp8_recompute(case: Case, outcomes: Outcomes) -> None:
    """Activation recompute of MoE layers in FP8 {case.variant}, bitwise equal."""
    passes(case, outcomes)
