"""examples/own_loop.py, a loop without megatron.training, as its documentation promises it."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch import ROOT, TAIL, torchrun

pytestmark = pytest.mark.distributed

TOKENS = 2 * 2 * 4 * 64  # ranks, micro-batches, sequences, sequence length
WARMUP = 3


@dataclass
class Loop:
    """What a run printed."""

    steps: dict[int, str]
    """Step -> the rest of its line: loss, metrics, fingerprint of the thresholds."""
    evaluation: str
    ranks: dict[int, str]
    """Rank -> fingerprint of its thresholds at the end."""

    def number(self, name: str) -> dict[int, float]:
        """Step -> a number of its line; skipped steps have only a loss."""
        found = {step: re.search(rf"{name} ([\d.]+)", line) for step, line in self.steps.items()}
        return {step: float(match[1]) for step, match in found.items() if match}

    def thresholds(self, step: int) -> str:
        """Fingerprint after a step."""
        return self.steps[step].split()[-1]


def loop(*args: object) -> Loop:
    run = torchrun([str(ROOT / "examples" / "own_loop.py"), f"--warmup-steps={WARMUP}", *map(str, args)], 2)
    assert run.returncode == 0, run.stdout[-TAIL:]
    steps = {int(step): line for step, line in re.findall(r"^step +(\d+)  (.*)$", run.stdout, re.MULTILINE)}
    evaluation = re.findall(r"^evaluation loss (\S+)$", run.stdout, re.MULTILINE)
    found = re.findall(r"^rank (\d): thresholds ([0-9a-f]{8})$", run.stdout, re.MULTILINE)
    ranks = {int(rank): digits for rank, digits in found}
    assert len(evaluation) == 1, run.stdout[-TAIL:]
    return Loop(steps, evaluation[0], ranks)


def test_learns_by_threshold_and_resumes_bitwise(tmp_path: Path) -> None:
    """Loss falls, loads follow the thresholds, ranks agree, and a checkpoint goes on bit by bit."""
    straight = loop("--steps", 14, "--save", tmp_path, "--save-step", 7)
    loss, fanout = straight.number("loss"), straight.number("fan-out")
    assert list(loss) == list(range(1, 15))
    assert loss[14] < loss[1] - 1.0
    assert abs(loss[14] - float(straight.evaluation)) < 0.3
    # Expert Choice fills every expert alike; thresholds fill them on average only.
    assert all(fanout[step] == 2.0 for step in range(1, WARMUP + 1))
    assert all(1.0 < fanout[step] < 4.0 for step in range(WARMUP + 1, 15))
    assert len({fanout[step] for step in range(WARMUP + 1, 15)}) > 5
    assert len({straight.thresholds(step) for step in straight.steps}) == 14
    # Evaluation and other ranks' batches: counted never and once.
    assert set(straight.number("tokens").values()) == {TOKENS}
    assert straight.ranks == dict.fromkeys((0, 1), straight.thresholds(14))

    resumed = loop("--steps", 14, "--load", tmp_path)
    assert resumed.steps == {step: line for step, line in straight.steps.items() if step > 7}
    assert resumed.evaluation == straight.evaluation
    assert resumed.ranks == straight.ranks


def test_skipped_steps_leave_no_trace() -> None:
    """fp16 whose first loss scales overflow: thresholds stand still, and the warm-up has not begun."""
    run = loop("--steps", 10, "--fp16")
    skipped = [step for step, line in run.steps.items() if "skipped" in line]
    assert skipped == list(range(1, len(skipped) + 1))
    assert 1 <= len(skipped) <= 6
    assert len({run.thresholds(step) for step in skipped}) == 1
    first = len(skipped) + 1
    assert run.thresholds(first) != run.thresholds(first - 1)
    # A skipped batch that stayed in the accumulators would be counted here.
    assert set(run.number("tokens").values()) == {TOKENS}
    # Half-precision ties may add a token to an expert's quota.
    fanout = run.number("fan-out")
    assert all(abs(fanout[step] - 2.0) < 0.01 for step in range(first, first + WARMUP))
    assert abs(fanout[first + WARMUP] - 2.0) > 0.01
    assert run.ranks == dict.fromkeys((0, 1), run.thresholds(10))


def test_install_needs_no_megatron_training() -> None:
    """As on megatron-core 0.16's wheel: megatron.training cannot be imported, megatron.core is bound."""
    code = (
        "import sys; sys.modules['megatron.training'] = None; "
        "from megatron_et.run import cpu; cpu.install(); "
        "import megatron_et; megatron_et.install(); from megatron_et.host import bound; print(*bound())"
    )
    env = {**os.environ, "MEGATRON_ET_CPU": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-TAIL:]
    names = run.stdout.splitlines()[-1].split()
    assert "megatron.core.transformer.moe.moe_layer.MoELayer.__init__" in names
    assert all(name.startswith("megatron.core.") for name in names), names
