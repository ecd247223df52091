"""What docs/migration.md says of checkpoints: from the loss-free bias to thresholds, and back to Megatron's
own routers. From top-k and back: test_training.py. One process: nothing here depends on the layout."""

from pathlib import Path

import pytest

from tests.distributed.runs import MOE_LAYERS, Run, checkpoint_tensors, pretrain
from tests.megatron_here import needs_training

pytestmark = [pytest.mark.distributed, needs_training]

HERE = Path(__file__).parent
BIAS = (
    "--moe-router-load-balancing-type none --moe-router-score-function sigmoid "
    "--moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-3 --moe-router-dtype fp32 "
)
AUX = "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 "


@pytest.fixture(scope="module")
def bias(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """Six steps of top-k with the loss-free bias."""
    folder = tmp_path_factory.mktemp("bias")
    return pretrain(f"{BIAS} --train-iters 6 --save {folder}", et=[], processes=1), folder


@pytest.fixture(scope="module")
def et(bias: tuple[Run, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """Four more from its checkpoint, all of them warm-up."""
    folder = tmp_path_factory.mktemp("et")
    flags = f"--train-iters 10 --load {bias[1]} --save {folder}"
    return pretrain(flags, processes=1, folder=folder), folder


def test_a_checkpoint_with_biases_starts_the_warmup(bias: tuple[Run, Path], et: tuple[Run, Path]) -> None:
    before, run = bias[0], et[0]
    assert run.output.count("holds no thresholds: they start fresh, and the warm-up of 4 global batches") == 1
    assert [run.trace[step]["phase"] for step in range(7, 11)] == ["warmup"] * 4
    # Weights and optimizer were taken over.
    assert float(run.loss[7]) < (float(before.loss[1]) + float(before.loss[6])) / 2
    names = {key for key in checkpoint_tensors(et[1], 10) if "expert_bias" in key}
    assert not names


def test_use_checkpoint_args_brings_the_bias_along_and_is_refused(bias: tuple[Run, Path]) -> None:
    flags = f"--train-iters 10 --load {bias[1]} --use-checkpoint-args"
    run = pretrain(flags, processes=1, succeeds=False)
    assert run.status != 0
    assert "megatron_et: --moe-router-enable-expert-bias cannot be combined with" in run.output


def test_finetuning_starts_no_second_warmup(et: tuple[Run, Path], tmp_path: Path) -> None:
    run = pretrain(f"--train-iters 1 --load {et[1]} --finetune", processes=1, folder=tmp_path)
    # Its steps count from 1 again, its global batches go on: four were committed, and that is the warm-up.
    assert run.trace[1]["phase"] == "threshold"
    assert all(None not in run.trace[1]["layers"][layer]["threshold"] for layer in MOE_LAYERS)


def test_back_to_the_bias_takes_a_flag(bias: tuple[Run, Path], et: tuple[Run, Path]) -> None:
    flags = f"{BIAS} --train-iters 11 --load {et[1]}"
    strict = pretrain(flags, et=[], processes=1, succeeds=False)
    assert strict.status != 0
    assert "expert_bias" in strict.output
    loose = pretrain(f"{flags} --dist-ckpt-strictness log_unexpected", et=[], processes=1)
    assert float(loose.loss[11]) < float(bias[0].loss[6])


def test_megatron_without_this_package_loads_a_checkpoint_with_thresholds(et: tuple[Run, Path]) -> None:
    from megatron_et.run.cpu import CPU_ARGS

    command = (str(HERE / "plain_pretrain.py"),)
    flags = [*CPU_ARGS, *f"{AUX} --train-iters 11 --load {et[1]}".split()]
    run = pretrain(flags, et=[], processes=1, command=command)
    assert float(run.loss[11]) < float(et[0].loss[7])
