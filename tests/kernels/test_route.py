"""The routing kernels in Triton's interpreter, on the CPU: `TRITON_INTERPRET=1 pytest tests/kernels`.

`make test` runs it so (tests/unit/rule/test_kernels.py); without the variable there is nothing to run here.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

from megatron_et.rule.kernels.routed import try_out
from tests.kernels.cuda_on_cpu import OnCpu
from tests.kernels.route_cases import CUDA, NAMED, Case, check, check_every_sigmoid

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")


@pytest.mark.parametrize("case", NAMED.values(), ids=NAMED)
def test_named_cases(case: Case) -> None:
    check(case, "cpu")


@settings(max_examples=100, deadline=None)
@given(
    case=st.builds(
        Case,
        tokens=st.integers(0, 70),
        experts=st.integers(1, 40),
        seed=st.integers(0, 10_000),
        scale=st.sampled_from([0.0, 1e-30, 0.01, 1.0, 30.0, 1e30]),
        bounded=st.booleans(),
        padded=st.booleans(),
        max_fanout=st.none() | st.integers(1, 41),
        normalized=st.booleans(),
        transposed=st.booleans(),
    )
)
def test_any_case(case: Case) -> None:
    check(case, "cpu")


def test_every_sigmoid() -> None:
    check_every_sigmoid("cpu")


LEFT_TO_TRITON = {"not-multiple-of-8", "fan-out-bound", "normalized", "bf16", "not-contiguous", "no-token"}


@pytest.mark.parametrize("name", CUDA)
def test_cuda_kernel(name: str, cuda_on_cpu: OnCpu) -> None:
    before = cuda_on_cpu.launches["route.cu"]
    check(CUDA[name], "cpu", cuda=True)
    assert cuda_on_cpu.launches["route.cu"] - before == (0 if name in LEFT_TO_TRITON else 3)


@settings(max_examples=25, deadline=None)
@given(
    case=st.builds(
        Case,
        tokens=st.integers(1, 200),
        experts=st.sampled_from([8, 16, 40]),
        seed=st.integers(0, 10_000),
        scale=st.sampled_from([0.0, 1e-30, 0.01, 1.0, 30.0, 1e30]),
        bounded=st.booleans(),
        padded=st.booleans(),
    )
)
def test_cuda_kernel_in_any_case(case: Case, cuda_on_cpu: OnCpu) -> None:
    before = cuda_on_cpu.launches["route.cu"]
    check(case, "cpu", cuda=True)
    assert cuda_on_cpu.launches["route.cu"] - before == 3


@pytest.mark.parametrize(
    ("routes", "selects", "launches"),
    [
        (True, True, {"route.cu": 2, "select.cu": 3}),
        (False, True, {"select.cu": 3}),
        (False, False, {}),
    ],
)
def test_trying_out_runs_every_kernel(
    routes: bool, selects: bool, launches: dict[str, int], cuda_on_cpu: OnCpu
) -> None:
    before = cuda_on_cpu.launches.copy()
    try_out(torch.device("cpu"), routes, selects)
    assert cuda_on_cpu.launches - before == launches


def test_every_sigmoid_of_the_cuda_kernel(cuda_on_cpu: OnCpu) -> None:
    before = cuda_on_cpu.launches["route.cu"]
    check_every_sigmoid("cpu", cuda=True)
    assert cuda_on_cpu.launches["route.cu"] - before == 1
