"""The CPU backend under torchrun: gloo's collectives, and Megatron's own top-k MoE GPT through pretrain()."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_et.run.cpu import CPU_ARGS
from tests.launch import TAIL, torchrun, words
from tests.megatron_here import needs_training

pytestmark = [pytest.mark.distributed, needs_training]

HERE = Path(__file__).parent


# A GPT of two layers with four experts, on random tokens. Megatron's default dropout stays on.
GPT_ARGS = words("""
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128 --swiglu
    --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --seq-length 64 --max-position-embeddings 64
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 --moe-token-dispatcher-type alltoall
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01
    --mock-data --tokenizer-type NullTokenizer --vocab-size 128 --split 90,5,5
    --micro-batch-size 2 --global-batch-size 8 --lr 1e-3 --lr-decay-style constant
    --log-interval 1 --eval-interval 100 --eval-iters 1 --use-distributed-optimizer
""")
EP2 = words("--expert-model-parallel-size 2")
NO_DROPOUT = words("--hidden-dropout 0 --attention-dropout 0")


class Log(NamedTuple):
    """What a run printed: the loss and the gradient norm of each iteration, and the final evaluations."""

    loss: dict[int, str]
    grad_norm: dict[int, str]
    evaluation: list[str]


def pretrain(*args: str | Path) -> Log:
    """Train on two processes; returns what was printed."""
    command = [HERE / "plain_pretrain.py", *GPT_ARGS, *CPU_ARGS, *args]
    result = torchrun([str(word) for word in command], nproc=2, timeout=120)
    assert result.returncode == 0, result.stdout[-TAIL:]
    steps = re.findall(r" iteration +(\d+)/.* lm loss: (\S+) .* grad norm: (\S+) ", result.stdout)
    return Log(
        loss={int(step): loss for step, loss, _ in steps},
        grad_norm={int(step): norm for step, _, norm in steps},
        evaluation=re.findall(r"on (?:validation|test) set \| lm loss value: (\S+)", result.stdout),
    )


def test_collectives() -> None:
    result = torchrun([str(HERE / "collectives.py")], nproc=2, timeout=60)
    assert result.returncode == 0, result.stdout[-TAIL:]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_equals_a_straight_one(precision: str, tmp_path: Path) -> None:
    """With the distributed optimizer over torch's AdamW and with dropout on."""
    args = [*EP2, "--train-iters", "10", *(["--bf16"] if precision == "bf16" else [])]
    straight = pretrain(*args, "--save", tmp_path, "--save-interval", "6")
    resumed = pretrain(*args, "--load", tmp_path, "--ckpt-step", "6")

    assert sorted(straight.loss) == list(range(1, 11))
    assert float(straight.loss[10]) < float(straight.loss[1]) - 0.4
    assert sorted(resumed.loss) == [7, 8, 9, 10]
    for step, norm in resumed.grad_norm.items():
        assert norm == straight.grad_norm[step]
    # The second loss that a run prints is the mean of its first two (training.py:training_log does not reset
    # its sums after a run's first iteration), so iteration 8 differs.
    assert [resumed.loss[step] for step in (7, 9, 10)] == [straight.loss[step] for step in (7, 9, 10)]
    assert len(resumed.evaluation) == 2
    assert resumed.evaluation == straight.evaluation


def test_a_checkpoint_resharded_to_sequence_parallelism_goes_on_alike(tmp_path: Path) -> None:
    """EP2 to EP2 x TP2: equal gradient norms need the norms' gradients summed over the TP group."""
    args = [*EP2, *NO_DROPOUT, "--train-iters", "10", "--dist-ckpt-optim-fully-reshardable"]
    # The vocabulary is padded to a multiple of this times the TP size: 256 in both layouts.
    pad = "--make-vocab-size-divisible-by"
    tp2 = words("--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1")
    straight = pretrain(*args, pad, "128", "--save", tmp_path, "--save-interval", "2")
    resharded = pretrain(*args, pad, "64", *tp2, "--load", tmp_path, "--ckpt-step", "2")

    # Without that sum the gradient norm of the last step is off by 4e-3, its loss by 5e-5.
    assert sorted(resharded.grad_norm) == list(range(3, 11))
    for step, norm in resharded.grad_norm.items():
        assert float(norm) == pytest.approx(float(straight.grad_norm[step]), abs=1.5e-3)
    assert float(resharded.loss[10]) == pytest.approx(float(straight.loss[10]), rel=5e-6)
    assert [float(loss) for loss in resharded.evaluation] == pytest.approx(
        [float(loss) for loss in straight.evaluation], rel=5e-6
    )


def test_virtual_pipeline_stages_and_tensorboard(tmp_path: Path) -> None:
    """PP2 x VPP2 through pretrain(), TensorBoard with memory statistics, evaluation."""
    layout = words(
        "--pipeline-model-parallel-size 2 --num-layers 4 --num-layers-per-virtual-pipeline-stage 1"
    )
    logs = ["--tensorboard-dir", tmp_path, "--log-memory-to-tensorboard"]
    log = pretrain(*layout, *logs, "--train-iters", "5")
    assert float(log.loss[5]) < float(log.loss[1]) - 0.15
    assert all(0.5 < float(norm) < 2 for norm in log.grad_norm.values())
    assert len(log.evaluation) == 2
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_uneven_experts_under_expert_tensor_parallelism() -> None:
    """TP2 with expert TP 2 gathers uneven parts (core/tensor_parallel/mappings.py)."""
    layout = words("--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2")
    log = pretrain(*layout, "--train-iters", "5")
    assert float(log.loss[5]) < float(log.loss[1]) - 0.15
