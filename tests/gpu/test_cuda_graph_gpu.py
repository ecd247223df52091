"""The router inside real CUDA graphs: captured by torch, forward and backward, and by Megatron in a training.

What unit/moe/test_cuda_graph.py shows without a GPU, on the device: a capture lasts through all phases.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_et.moe.synchronize import finalize_thresholds, uncounted
from tests.captured import ANNEAL, EXPERTS, SCHEDULES, TOKENS, WARMUP, memory, router
from tests.distributed.runs import words
from tests.gpu.gpu_launch import needs_te
from tests.gpu.gpu_layers import gradient
from tests.gpu.test_training_gpu import FAST, check_loss, train
from tests.gpu.test_training_gpu import TOKENS as BATCH_TOKENS
from tests.gpu.test_training_gpu import WARMUP as TRAINING_WARMUP

pytestmark = pytest.mark.gpu

HIDDEN = 64
CAPTURED = SCHEDULES | {
    f"switch, kernels {kernels}": SCHEDULES["switch"] | {"kernels": kernels} for kernels in ("triton", "cuda")
}


def exact(seed: int, *shape: int, steps: int, scale: float) -> torch.Tensor:
    """Few bits a number, so that every GEMM of them is exact, whichever algorithm a graph captures."""
    drawn = torch.randint(-steps, steps + 1, shape, generator=torch.Generator().manual_seed(seed))
    return (drawn * scale).cuda()


def built(graph: bool, schedule: str) -> Any:
    """A router with gate weights that depend on nothing else."""
    one = router(graph, {"hidden_size": HIDDEN, "add_bias_linear": False}, **CAPTURED[schedule]).cuda()
    with torch.no_grad():
        one.weight.copy_(exact(0, EXPERTS, HIDDEN, steps=8, scale=2**-5))
    return one


@pytest.mark.parametrize("schedule", CAPTURED)
def test_captured_router(schedule: str) -> None:
    """Router captured as a CUDA graph in the warm-up, replayed through {schedule}: bitwise the eager one."""
    captured, eager = (built(graph, schedule) for graph in (True, False))
    with uncounted([captured]):
        # Runs forward and backward three times and then captures both.
        torch.cuda.make_graphed_callables(
            captured, (exact(1, TOKENS, 1, HIDDEN, steps=4, scale=1.0).requires_grad_(),)
        )
    assert not captured.statistics.counts.any()
    addresses = [tensor.data_ptr() for tensor in memory(captured)]
    for step in range(WARMUP + ANNEAL + 3):
        for micro_batch in range(2):
            x = exact(100 + 10 * step + micro_batch, TOKENS, 1, HIDDEN, steps=4, scale=1.0 + step % 3)
            results = []
            for one in (captured, eager):
                leaf = x.clone().requires_grad_()
                one.weight.grad = None
                gates_TE, map_TE = one(leaf)
                (gates_TE * torch.arange(EXPERTS, device="cuda")).sum().backward()
                # Copies: a graph's outputs are its own memory, and the next micro-batch's.
                results.append([t.clone() for t in (gates_TE, map_TE, gradient(leaf), gradient(one.weight))])
            (*routed, x_grad, weight_grad), (*wanted, wanted_x_grad, wanted_weight_grad) = results
            assert all(torch.equal(a, b) for a, b in zip(routed, wanted, strict=True))
            torch.testing.assert_close(x_grad, wanted_x_grad)
            torch.testing.assert_close(weight_grad, wanted_weight_grad)
        for one in (captured, eager):
            finalize_thresholds(one, skipped=step == 2)
        if step != 2:
            assert captured.last_batch.num_updates == eager.last_batch.num_updates
        assert all(torch.equal(a, b) for a, b in zip(memory(captured), memory(eager), strict=True))
        assert [tensor.data_ptr() for tensor in memory(captured)] == addresses


@pytest.fixture(scope="module")
def spelling() -> str:
    """The flag's name in this Megatron."""
    from megatron.core.transformer import TransformerConfig

    return "modules" if hasattr(TransformerConfig, "cuda_graph_modules") else "scope"


@needs_te
@pytest.mark.parametrize("scope", ["attn", "moe_router", "attn moe_router"])
def test_training(scope: str, spelling: str, tmp_path: Path) -> None:
    """Training with CUDA graphs of {scope} (transformer_engine), captured in the warm-up, against eager."""
    # Dropout would draw other numbers inside a graph.
    same = FAST + "--deterministic-mode --hidden-dropout 0 --te-rng-tracker --logging-level 20 "
    graph = (
        f"--cuda-graph-impl transformer_engine --cuda-graph-warmup-steps 3 --cuda-graph-{spelling} {scope}"
    )
    (tmp_path / "eager").mkdir()
    (tmp_path / "graph").mkdir()
    eager = train(same, folder=tmp_path / "eager")
    graphed = train(same + graph, folder=tmp_path / "graph")
    assert "CUDA Graphs capture" in graphed.output
    assert "CUDA Graphs capture" not in eager.output
    check_loss(graphed)
    for step, record in graphed.trace.items():
        # The passes that warm up the graphs count nothing, and each micro-batch of a replay counts once.
        assert record["tokens"] == BATCH_TOKENS
        assert record["phase"] == ("warmup" if step <= TRAINING_WARMUP else "threshold")
        assert record["phase"] == eager.trace[step]["phase"]
        wanted, found = float(eager.loss[step]), float(graphed.loss[step])
        # Equal where a graph captures the kernels that run eagerly; a GEMM may be another algorithm there.
        assert found == pytest.approx(wanted, rel=1e-2), f"step {step}"
    for step in (1, 2, 3):
        assert graphed.trace[step] == eager.trace[step]


@needs_te
def test_resume_after_the_warm_up(spelling: str, tmp_path: Path) -> None:
    """Training with a CUDA graph of moe_router, captured after a resume behind the warm-up."""
    flags = FAST + "--hidden-dropout 0 --te-rng-tracker --logging-level 20 "
    halfway = TRAINING_WARMUP + 2
    train(f"{flags} --save {tmp_path} --save-interval {halfway}", iterations=halfway)
    graph = words(
        f"--cuda-graph-impl transformer_engine --cuda-graph-warmup-steps 3 --cuda-graph-{spelling} moe_router"
    )
    run = train(f"{flags} --load {tmp_path} {' '.join(graph)}", folder=tmp_path, iterations=halfway + 10)
    assert "CUDA Graphs capture" in run.output
    assert {record["phase"] for record in run.trace.values()} == {"threshold"}
    assert all(record["tokens"] == BATCH_TOKENS for record in run.trace.values())
