"""`torchrun -m megatron_et.pretrain_gpt` on one GPU with NCCL and Transformer Engine: training, FP8, the
top-k baseline, a bitwise resume.

Every run is a new process; on an H100 starting it takes most of its time.
"""

from pathlib import Path

import pytest

from benchmarks.fp8_loss import RECIPES
from tests.distributed.runs import Run, assert_same_tensors, checkpoint_tensors, pretrain, words
from tests.gpu.fp8_layers import missing
from tests.gpu.gpu_launch import GPU_ENV, needs_te

pytestmark = pytest.mark.gpu

# A dense first layer and seven MoE layers; Megatron's hidden dropout (0.1) stays on.
MODEL = words("""
    --num-layers 8 --hidden-size 256 --ffn-hidden-size 768 --num-attention-heads 4 --swiglu
    --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --seq-length 512 --max-position-embeddings 512 --attention-dropout 0
    --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 128
    --num-experts 16 --moe-router-topk 2 --moe-layer-freq [0,1,1,1,1,1,1,1]
    --moe-ffn-hidden-size 256 --moe-shared-expert-intermediate-size 256
    --mock-data --tokenizer-type NullTokenizer --vocab-size 1024 --split 90,5,5 --num-workers 0
    --micro-batch-size 4 --global-batch-size 8 --bf16 --use-distributed-optimizer
    --lr 1e-3 --lr-decay-style constant --lr-decay-iters 100 --override-opt-param-scheduler
    --save-interval 1000 --log-interval 1 --eval-interval 1000 --eval-iters 2
    --no-gradient-accumulation-fusion
""")  # the last flag: Megatron's output layer would fuse with a kernel of NVIDIA Apex
FAST = "--moe-grouped-gemm --moe-permute-fusion --moe-token-dispatcher-type alltoall "
WARMUP = 10
ET = words(f"--moe-router-type expert-threshold --moe-et-warmup-steps {WARMUP} --moe-et-ema-decay 0.9")

ITERATIONS = 30
EXPERTS, TOPK = 16, 2
TOKENS = 8 * 512
MOE_LAYERS = [str(number) for number in range(2, 9)]


def train(flags: str, *, folder: Path | None = None, et: list[str] = ET, iterations: int = ITERATIONS) -> Run:
    """One run on one GPU."""
    return pretrain(
        f"{flags} --train-iters {iterations}",
        processes=1,
        folder=folder,
        et=et,
        model=MODEL,
        env=GPU_ENV,
        timeout=280,
    )


def check_loss(run: Run, iterations: int = ITERATIONS) -> None:
    """The loss falls far, and evaluation, which routes by thresholds alone, agrees."""
    losses = [float(run.loss[step]) for step in range(1, iterations + 1)]
    assert losses[-1] < 0.5 * losses[0], losses
    assert len(run.evaluation) == 2
    assert all(float(loss) < 0.5 * losses[0] for loss in run.evaluation), (losses, run.evaluation)


def check_healthy(run: Run, iterations: int = ITERATIONS) -> None:
    """The loss falls; warm-up loads are on target; then thresholds route, and hold the loads near it."""
    check_loss(run, iterations)
    assert sorted(run.trace) == list(range(1, iterations + 1))
    for step, record in run.trace.items():
        assert record["tokens"] == TOKENS
        assert record["phase"] == ("warmup" if step <= WARMUP else "threshold")
        assert list(record["layers"]) == MOE_LAYERS
        for layer in record["layers"].values():
            assert sum(layer["fanout_histogram"]) == TOKENS
            assert all(value is not None for value in layer["cutoff"])
            if step > 1:
                assert all(value is not None for value in layer["threshold"])
            if step <= WARMUP:
                # Above the target by what ties at the cutoff: mock data repeats itself.
                target = TOPK / EXPERTS
                assert all(target <= usage <= 1.02 * target for usage in layer["usage"]), layer["usage"]
            elif step > iterations - 3:
                # The logits drift fast in so young a model, and thresholds follow: at the switch from Expert
                # Choice a layer may see a fan-out of 5, and ten steps later 2 to 3.
                assert 0.4 * TOPK < sum(layer["usage"]) < 2.2 * TOPK, layer["usage"]
                assert min(layer["usage"]) > 0.0


@needs_te
def test_bf16_grouped(tmp_path: Path) -> None:
    """Training: TEGroupedMLP, alltoall, permute fusion, bf16."""
    check_healthy(train(FAST, folder=tmp_path))


@needs_te
def test_bf16_sequential_allgather(tmp_path: Path) -> None:
    """Training: TE SequentialMLP, allgather, bf16."""
    check_healthy(train("--moe-token-dispatcher-type allgather", folder=tmp_path))


@needs_te
def test_shared_expert_overlap(tmp_path: Path) -> None:
    """Training: TEGroupedMLP, alltoall, shared expert overlap, bf16."""
    flags = "--moe-grouped-gemm --moe-token-dispatcher-type alltoall --moe-shared-expert-overlap"
    check_healthy(train(flags, folder=tmp_path))


def test_bf16_local(tmp_path: Path) -> None:
    """Training: --transformer-impl local, alltoall, bf16."""
    flags = (
        "--transformer-impl local --moe-token-dispatcher-type alltoall --attention-backend unfused "
        "--no-rope-fusion --no-persist-layer-norm --no-masked-softmax-fusion"
    )
    check_healthy(train(flags, folder=tmp_path))


@needs_te
def test_topk_baseline() -> None:
    """Training: Megatron's top-k with auxiliary loss on the same flags (baseline)."""
    topk = words("--moe-router-type topk --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01")
    check_loss(train(FAST + "--moe-router-dtype fp32", et=topk))


FP8 = {recipe: flags for recipe, flags in RECIPES.items() if flags}


@needs_te
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, marks=pytest.mark.skipif(bool(lacks), reason=lacks or ""))
        for recipe, lacks in ((recipe, missing(recipe)) for recipe in FP8)
    ],
)
def test_fp8(recipe: str, tmp_path: Path) -> None:
    """Training: TEGroupedMLP, alltoall, permute fusion, FP8 {recipe}."""
    check_healthy(train(FAST + FP8[recipe], folder=tmp_path))


@needs_te
@pytest.mark.skipif(bool(missing("tensorwise")), reason=missing("tensorwise") or "")
def test_fp8_parameters(tmp_path: Path) -> None:
    """Training: FP8 tensorwise with --fp8-param-gather and --first-last-layers-bf16."""
    flags = f"{FP8['tensorwise']} --fp8-param-gather --first-last-layers-bf16"
    check_healthy(train(FAST + flags, folder=tmp_path))


# In the default mode some kernels (the embedding's gradient, fused attention's) add in any order.
DETERMINISTIC = FAST + "--deterministic-mode "
LONG, HALF = 20, 14


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run in deterministic mode with checkpoints in the middle, after the warm-up, and at the end."""
    folder = tmp_path_factory.mktemp("straight")
    run = train(f"{DETERMINISTIC} --save {folder} --save-interval {HALF}", folder=folder, iterations=LONG)
    return run, folder


@needs_te
def test_deterministic_mode(straight: tuple[Run, Path]) -> None:
    """Training: --deterministic-mode."""
    check_healthy(straight[0], LONG)


@needs_te
def test_resume_is_bitwise(straight: tuple[Run, Path], tmp_path: Path) -> None:
    """Resume from a checkpoint, bitwise equal (--deterministic-mode)."""
    run, folder = straight
    resumed = train(
        f"{DETERMINISTIC} --load {folder} --ckpt-step {HALF} --save {tmp_path}",
        folder=tmp_path,
        iterations=LONG,
    )
    assert sorted(resumed.trace) == list(range(HALF + 1, LONG + 1))
    for step, record in resumed.trace.items():
        assert record == run.trace[step]
        assert resumed.grad_norm[step] == run.grad_norm[step]
        # The second loss that a run prints is the mean of its first two (training_log keeps its sums once).
        if step != HALF + 2:
            assert resumed.loss[step] == run.loss[step]
    assert resumed.evaluation == run.evaluation
    assert_same_tensors(checkpoint_tensors(folder, LONG), checkpoint_tensors(tmp_path, LONG))


@needs_te
def test_recompute_is_bitwise(straight: tuple[Run, Path], tmp_path: Path) -> None:
    """Training with recomputed MoE layers, bitwise equal (--deterministic-mode)."""
    run, _ = straight
    recompute = "--recompute-granularity selective --recompute-modules moe"
    recomputed = train(f"{DETERMINISTIC} {recompute}", folder=tmp_path, iterations=HALF)
    assert recomputed.trace == {step: run.trace[step] for step in range(1, HALF + 1)}
    assert recomputed.grad_norm == {step: run.grad_norm[step] for step in range(1, HALF + 1)}
