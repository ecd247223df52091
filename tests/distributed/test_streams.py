"""What changes while a run goes on: batch size, sequence length, calls of a router in a micro-batch,
capacity."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_et.config import ExpertThresholdConfig
from megatron_et.rule.quantile import capacity_loads
from tests.distributed.runs import (
    GPT_ARGS,
    MOE_LAYERS,
    Run,
    assert_thresholds_replay,
    checkpoint_tensors,
    forked_pretrain,
    router_counters,
)
from tests.distributed.varying_pretrain import length
from tests.launch import words
from tests.megatron_here import needs_training
from tests.reference import capacity

pytestmark = [pytest.mark.distributed, needs_training]

EP2 = "--expert-model-parallel-size 2 "
PP2 = "--pipeline-model-parallel-size 2 "
EXPERTS, TARGET, WARMUP = 8, 2 / 8, 4


def assert_routes_well(run: Run, layers: list[str]) -> None:
    """Loads are exactly on target in the warm-up and near it afterwards."""
    for step, record in run.trace.items():
        assert list(record["layers"]) == layers
        for layer in record["layers"].values():
            if step <= WARMUP:
                assert layer["usage"] == [TARGET] * EXPERTS
            else:
                assert 0.5 * 2 < sum(layer["usage"]) < 1.6 * 2


def test_the_batch_size_ramps_up(tmp_path: Path) -> None:
    """Each step is one update of the thresholds, whatever its size; so it is when a run resumes in the ramp.

    Megatron 0.19.2 parses --rampup-batch-size and then ignores it; its schedule counts tokens.
    """
    sizes = [4, 4, 4, 8, 8, 12, 12, 12]
    model = [*GPT_ARGS]
    for flag in ("--lr-decay-iters", "--global-batch-size"):  # refused beside samples and a schedule
        at = model.index(flag)
        del model[at : at + 2]
    ramp = ["--step-batch-size-schedule", f"0:4 {12 * 64}:8 {28 * 64}:12", "--train-samples", str(sum(sizes))]
    args = [*words(f"{EP2} --save {tmp_path}/straight"), *ramp]
    run = forked_pretrain(args, folder=tmp_path, model=model)
    assert [record["tokens"] for record in run.trace.values()] == [64 * size for size in sizes]
    assert_routes_well(run, MOE_LAYERS)
    assert_thresholds_replay(run)
    tensors = checkpoint_tensors(tmp_path / "straight", len(sizes))
    assert router_counters(tensors) == {len(sizes)}

    # Megatron saves where the size changes: after 3 and after 5 steps.
    args = [*words(f"{EP2} --load {tmp_path}/straight --ckpt-step 3"), *ramp]
    resumed = forked_pretrain(args, folder=tmp_path / "resumed", model=model)
    assert resumed.trace == {step: run.trace[step] for step in range(4, len(sizes) + 1)}


@pytest.mark.parametrize("layout", [EP2, PP2], ids=["ep2", "pp2"])
def test_sequence_lengths_vary(layout: str, tmp_path: Path) -> None:
    """Every micro-batch is of another length, on every rank: real tokens count."""
    script = str(Path(__file__).parent / "varying_pretrain.py")
    run = forked_pretrain(
        f"{layout} --train-iters 8 --eval-iters 0",
        folder=tmp_path,
        command=("-m", "megatron_et", script),
    )
    tokens = [2 * sum(length(batch, index) for index in range(4)) for batch in range(8)]
    assert len(set(tokens)) > 4
    assert [record["tokens"] for record in run.trace.values()] == tokens
    assert_routes_well(run, MOE_LAYERS)
    assert_thresholds_replay(run)
    assert float(run.loss[8]) < float(run.loss[1])


HEADS = {
    "two-heads": (EP2, ["5", "6"], 1),
    "one-head-twice": (EP2 + "--mtp-use-repeated-layer", ["5"], 2),
    "one-head-twice-pp2": (PP2 + "--mtp-use-repeated-layer", ["5"], 2),
}


@pytest.mark.parametrize(("flags", "heads", "calls"), HEADS.values(), ids=HEADS.keys())
def test_two_tokens_are_predicted_ahead(flags: str, heads: list[str], calls: int, tmp_path: Path) -> None:
    """Megatron can call one head twice in a micro-batch: its router then sees every token twice."""
    run = forked_pretrain(f"{flags} --train-iters 6 --mtp-num-layers 2", folder=tmp_path)
    assert_routes_well(run, [*MOE_LAYERS, *heads])
    assert_thresholds_replay(run)
    for record in run.trace.values():
        assert record["tokens"] == 8 * 64
        for number, layer in record["layers"].items():
            assert sum(layer["fanout_histogram"]) == 8 * 64 * (calls if number in heads else 1)


def worst(run: Run, number: Callable[[dict[str, Any]], float]) -> list[float]:
    """Per step, the largest number of a layer."""
    return [max(map(number, record["layers"].values())) for record in run.trace.values()]


def load_error(layer: dict[str, Any]) -> float:
    """|mean load / target - 1|."""
    return abs(sum(layer["usage"]) / (TARGET * EXPERTS) - 1.0)


def violation(layer: dict[str, Any]) -> float:
    """max load / mean load - 1."""
    return max(layer["usage"]) / (sum(layer["usage"]) / EXPERTS) - 1.0


def changes(values: list[float]) -> list[float]:
    """From each step to the next."""
    return [b - a for a, b in pairwise(values)]


def threshold_changes(run: Run) -> list[float]:
    """From each step to the next, the largest |change| of a threshold; the first step has none."""
    return [
        max(
            abs(b - a)
            for layer in MOE_LAYERS
            for a, b in zip(*(record["layers"][layer]["threshold"] for record in records), strict=True)
        )
        for records in pairwise(list(run.trace.values())[1:])
    ]


def test_annealing_takes_the_jump_out_of_the_switch(tmp_path: Path) -> None:
    """From Expert Choice to thresholds that lag: at once, and over eight batches."""
    warmup, anneal, last, decay = 8, 8, 24, 0.97
    flags = f"{EP2} --train-iters {last} --eval-iters 0 --lr 1e-2 --moe-et-ema-decay {decay} "
    flags += f"--moe-et-warmup-steps {warmup} --moe-et-warmup-anneal-steps"
    hard, soft = (forked_pretrain(f"{flags} {n}", folder=tmp_path / str(n)) for n in (0, anneal))
    for run in (hard, soft):
        assert_thresholds_replay(run, decay=decay)
        numbers = {
            "load error": worst(run, load_error),
            "max violation": worst(run, violation),
            "threshold change": threshold_changes(run),
            "loss": [float(run.loss[step]) for step in range(1, last + 1)],
        }
        for name, values in numbers.items():
            print(f"{'hard' if run is hard else 'soft'} {name}:", *(f"{value:.3f}" for value in values))

    # The same run up to the switch; the thresholds of its first step were made before it.
    for step in range(1, warmup + 2):
        for layer in MOE_LAYERS:
            ours, theirs = (run.trace[step]["layers"][layer] for run in (hard, soft))
            assert ours["threshold"] == theirs["threshold"]
            assert step > warmup or ours == theirs
    phases = [record["phase"] for record in soft.trace.values()]
    assert phases == ["warmup"] * warmup + ["anneal"] * anneal + ["threshold"] * (last - warmup - anneal)

    # While annealing, the loads of four pools of 128 tokens are within C of k, at first exactly k.
    et = ExpertThresholdConfig(
        router_type="expert-threshold", warmup_steps=warmup, warmup_anneal_steps=anneal
    )
    for step in range(warmup + 1, warmup + anneal + 1):
        in_force = capacity(et, step - 1)
        assert in_force is not None
        fewest, most = capacity_loads(int(128 * TARGET), in_force)
        for layer in soft.trace[step]["layers"].values():
            assert 4 * fewest <= 512 * min(layer["usage"])
            assert 512 * max(layer["usage"]) <= 4 * most

    hard_errors, soft_errors = (worst(run, load_error) for run in (hard, soft))
    assert hard_errors[:warmup] == soft_errors[:warmup] == [0.0] * warmup
    assert soft_errors[warmup] == 0.0 < soft_errors[warmup + 1]
    assert hard_errors[warmup] > 0.2
    assert max(map(abs, changes(soft_errors))) < max(map(abs, changes(hard_errors))) / 2
    assert max(worst(soft, violation)) < max(worst(hard, violation)) / 2


JUMP, PATIENCE = 6, 3


def test_the_guard_brings_loads_back_after_a_jump(tmp_path: Path) -> None:
    """At beta 0.99, when every expert's logits shift: three batches later loads are back, in any layout."""

    def shifted(flags: str, processes: int, name: str) -> Run:
        args = f"{flags} --train-iters 14 --moe-et-ema-decay 0.99 --moe-et-warmup-steps 3"
        command = ("-m", "megatron_et", str(Path(__file__).parent / "fed_pretrain.py"))
        env = {"FED_JUMP": str(JUMP)}
        return forked_pretrain(args, processes=processes, folder=tmp_path / name, command=command, env=env)

    def load_error(run: Run, step: int) -> float:
        usage = [share for layer in run.trace[step]["layers"].values() for share in layer["usage"]]
        return sum(abs(share / TARGET - 1.0) for share in usage) / len(usage)

    free, guarded = shifted("", 1, "free"), shifted("--moe-et-guard 0.5", 1, "guarded")
    jumped = range(JUMP + 1, JUMP + 1 + PATIENCE)
    for step in range(1, JUMP + 1 + PATIENCE):
        assert guarded.trace[step] == free.trace[step]
    assert all(load_error(guarded, step) > 0.8 for step in jumped)
    after = range(jumped.stop, 15)
    # 128 tokens an expert and batch: the noise of one batch alone is some 8 %.
    assert all(load_error(guarded, step) < 0.25 for step in after)
    assert all(load_error(free, step) > 0.8 for step in after)
    assert "guard: EMA of " in guarded.output
    assert "guard: EMA of" not in free.output
    split = shifted(f"--moe-et-guard 0.5 {EP2} --micro-batch-size 1", 2, "split")
    # Left with two violations seen, and gone on with in another layout.
    halfway = f"--moe-et-guard 0.5 --save {tmp_path}/halfway"
    shifted(f"{halfway} --exit-interval {JUMP + 2}", 1, "halfway")
    resumed = shifted(f"{halfway} --load {tmp_path}/halfway --no-load-optim {EP2}", 2, "resumed")
    assert min(resumed.trace) == JUMP + 3
    violations = checkpoint_tensors(tmp_path / "halfway", JUMP + 2)
    assert all(v.abs().max() == 2 for k, v in violations.items() if k.endswith("violations"))
    for run in (split, resumed):
        for step in range(max(4, min(run.trace)), 15):
            for layer in MOE_LAYERS:
                for name in ("threshold", "cutoff", "usage"):
                    ours, theirs = (r.trace[step]["layers"][layer][name] for r in (run, guarded))
                    assert ours == theirs
