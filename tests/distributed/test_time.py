"""I4 on real Megatron training: whatever interrupts a run leaves no trace in thresholds and counters.

Kills at any moment are test_faults.py's; the rerun state machine, evaluation, overflow, orderly exits and
changes of layout are here.
"""

import re
from pathlib import Path

import pytest

from tests.distributed.runs import (
    MOE_LAYERS,
    Run,
    assert_same_tensors,
    assert_thresholds_replay,
    checkpoint_tensors,
    forked_pretrain,
    pretrain,
    router_counters,
)
from tests.megatron_here import needs_training

pytestmark = [pytest.mark.distributed, needs_training]

EP2 = "--expert-model-parallel-size 2 "
EP4 = "--expert-model-parallel-size 4 "
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel "
VPP2 = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
END = 10
# Dropout's generators are test_training.py's resume; a rerun that was left advances them by a step.
QUIET = f"{EP2} --hidden-dropout 0 --attention-dropout 0 --eval-iters 0 --train-iters {END} "


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """Nothing interrupts this run; it saves at its end only."""
    folder = tmp_path_factory.mktemp("straight")
    return forked_pretrain(f"{QUIET} --save {folder}", folder=folder), folder


def goes_on_as(straight: tuple[Run, Path], resumed: Run, saved: Path, first: int) -> None:
    """The resumed run's steps and its final checkpoint are those of the straight one, to the bit."""
    run, folder = straight
    assert {s: resumed.trace[s] for s in range(first, END + 1)} == {
        s: run.trace[s] for s in range(first, END + 1)
    }
    assert resumed.grad_norm[END] == run.grad_norm[END]
    assert resumed.loss[END] == run.loss[END]
    assert_same_tensors(checkpoint_tensors(folder, END), checkpoint_tensors(saved, END))


def test_evaluation_leaves_no_trace(straight: tuple[Run, Path], tmp_path: Path) -> None:
    """In the warm-up, right before the switch and after it."""
    run = forked_pretrain(f"{QUIET} --eval-interval 2 --eval-iters 2 --save {tmp_path}", folder=tmp_path)
    assert run.output.count("validation loss at iteration") >= END // 2
    assert run.loss == straight[0].loss
    goes_on_as(straight, run, tmp_path, 1)


@pytest.mark.parametrize("interval", [3, 4])
def test_exit_interval_and_resume(straight: tuple[Run, Path], interval: int, tmp_path: Path) -> None:
    """Stopped inside the warm-up, and on the step that ends it."""
    stopped = forked_pretrain(f"{QUIET} --exit-interval {interval} --save {tmp_path}", folder=tmp_path)
    assert sorted(stopped.trace) == list(range(1, interval + 1))
    resumed = forked_pretrain(f"{QUIET} --load {tmp_path} --save {tmp_path}", folder=tmp_path)
    assert sorted(resumed.loss) == list(range(interval + 1, END + 1))
    goes_on_as(straight, resumed, tmp_path, 1)


def test_the_rerun_state_machine_leaves_no_trace(straight: tuple[Run, Path], tmp_path: Path) -> None:
    """A loss that Megatron distrusts is computed again, saved and left before the optimizer step."""
    distrust = "--rerun-mode validate_results --error-injection-rate 4 --error-injection-type correct_result"
    left = pretrain(f"{QUIET} --save {tmp_path} {distrust}", folder=tmp_path, succeeds=False)
    assert "First rerun: unexpected result is reproducible" in left.output
    assert re.search(r"exitcode *: 16 ", left.output), left.output[-3000:]
    done = max(left.loss)
    assert 1 <= done < END
    assert sorted(left.trace) == list(range(1, done + 1))
    saved = checkpoint_tensors(tmp_path, int((tmp_path / "latest_checkpointed_iteration.txt").read_text()))
    resumed = forked_pretrain(
        f"{QUIET} --load {tmp_path} --save {tmp_path} --rerun-mode disabled", folder=tmp_path
    )
    first = min(resumed.loss)
    assert router_counters(saved) == {first - 1}
    goes_on_as(straight, resumed, tmp_path, first)


@pytest.mark.smoke
def test_overflow_skipped_steps_leave_no_trace(tmp_path: Path) -> None:
    """fp16 with a loss scale that is far too large, and grows again into overflow every few steps."""
    steps = 16
    scale = "--fp16 --initial-loss-scale 4194304 --loss-scale-window 2 --hysteresis 1 --min-loss-scale 1"
    args = f"{EP2} {scale} --eval-iters 0 --train-iters {steps} --save {tmp_path} --save-interval 4"
    run = forked_pretrain(args, folder=tmp_path)
    log = re.findall(r" iteration +(\d+)/.*?number of skipped iterations: +(\d+)", run.output)
    skipped_until = {int(step): int(count) for step, count in log}
    # Megatron keeps the first step's sums once, so that step 2 prints those of both.
    counted = [s for s in range(3, steps + 1) if skipped_until[s] == 0]
    assert sorted(s for s in run.trace if s > 2) == counted
    assert any(skipped_until[s] for s in range(counted[0], steps + 1)), "no overflow after the first update"
    for iteration in range(4, steps + 1, 4):
        tensors = checkpoint_tensors(tmp_path, iteration)
        committed = sum(step <= iteration for step in run.trace)
        assert router_counters(tensors) == {committed}
    assert_thresholds_replay(run)
    for n, step in enumerate(sorted(run.trace)):
        assert run.trace[step]["phase"] == ("warmup" if n < 4 else "threshold")


def test_thresholds_survive_every_change_of_layout(tmp_path: Path) -> None:
    """One fed stream, a new layout every two steps: bitwise as if it had run in one process all along."""
    script = str(Path(__file__).parent / "fed_pretrain.py")
    common = "--make-vocab-size-divisible-by 64 --save-interval 2 --eval-iters 0 "
    # Optimizer states do not follow every change (Megatron's own limit, docs/troubleshooting.md).
    layouts = [(2, EP2), (4, EP4), (1, "--no-load-optim"), (2, TP2), (2, VPP2)]
    layouts.append((4, EP2 + TP2 + "--no-load-optim"))
    end = 2 * len(layouts)
    command = ("-m", "megatron_et", script)
    straight = forked_pretrain(
        f"{common} --train-iters {end}", processes=1, command=command, folder=tmp_path / "straight"
    )
    chain = f"{common} --dist-ckpt-optim-fully-reshardable --save {tmp_path}/chain "
    for n, (processes, flags) in enumerate(layouts):
        args = f"{chain} {flags} --train-iters {2 * n + 2} " + (f"--load {tmp_path}/chain" if n else "")
        run = forked_pretrain(args, processes=processes, command=command, folder=tmp_path / f"{n}")
        assert sorted(run.trace) == [2 * n + 1, 2 * n + 2]
        for step, record in run.trace.items():
            for layer in MOE_LAYERS:
                for name in ("threshold", "cutoff"):
                    assert record["layers"][layer][name] == straight.trace[step]["layers"][layer][name]
    tensors = checkpoint_tensors(tmp_path / "chain", end)
    assert router_counters(tensors) == {end}


CHANGES = {"ep2-ep4": ((2, EP2), (4, EP4)), "tp2-pp2": ((2, TP2), (2, VPP2))}


@pytest.mark.parametrize("routing", ["expert-threshold", "topk"])
@pytest.mark.parametrize(("before", "after"), CHANGES.values(), ids=CHANGES.keys())
def test_losses_go_on_in_another_layout(
    before: tuple[int, str], after: tuple[int, str], routing: str, tmp_path: Path
) -> None:
    """With the optimizer's state; to the tolerance that Megatron's top-k meets through the same change."""
    common = "--hidden-dropout 0 --attention-dropout 0 --eval-iters 0 --make-vocab-size-divisible-by 64 "
    common += "--dist-ckpt-optim-fully-reshardable "
    et = [] if routing == "topk" else ["--moe-router-type", routing, "--moe-et-warmup-steps", "4"]
    straight = forked_pretrain(
        f"{common} {before[1]} --train-iters {END} --save {tmp_path} --save-interval 6",
        processes=before[0],
        et=et,
    )
    changed = forked_pretrain(
        f"{common} {after[1]} --train-iters {END} --load {tmp_path} --ckpt-step 6",
        processes=after[0],
        et=et,
    )
    assert sorted(changed.loss) == list(range(7, END + 1))
    for step in (7, 9, 10):  # the second printed loss of a run is the mean of its first two
        assert float(changed.loss[step]) == pytest.approx(float(straight.loss[step]), rel=1e-5)
