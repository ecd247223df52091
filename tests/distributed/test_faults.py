"""benchmarks/fault_injection.py: a few kills lose nothing, and what it compares with would see a loss."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.faults.comparison import (
    Checkpoint,
    Printed,
    Trace,
    compare_checkpoints,
    compare_printed,
    compare_trace,
)
from tests.launch import ROOT, TAIL
from tests.megatron_here import needs_training

pytestmark = [pytest.mark.distributed, needs_training]

ITERATIONS = 12


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short experiment that found nothing: a kill in a checkpoint, one rank killed, a SIGTERM."""
    folder = tmp_path_factory.mktemp("faults")
    runs = ["--folder", str(folder / "runs"), "--output", str(folder)]
    command = [sys.executable, str(ROOT / "benchmarks" / "fault_injection.py"), *runs]
    result = subprocess.run(
        [*command, "--kills", "3", "--iterations", str(ITERATIONS)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout[-TAIL:]
    return folder


def test_a_killed_run_loses_nothing(killed: Path) -> None:
    report = (killed / "fault_injection.md").read_text()
    assert "nothing lost, nothing differs: 3 kills in 4 lives" in report
    assert "DIFFERS" not in report
    assert "WRONG" not in report
    assert str(killed) not in report
    lives = [line.split(" | ")[2] for line in report.splitlines() if " | right | " in line]
    assert lives == ["checkpoint", "one-rank", "sigterm", "finish"]
    # The script's own comparison aside: the victim has the reference's steps, some of them more than once.
    victim, reference = (
        Trace.read(killed / f"runs/{run}/et_trace.jsonl") for run in ("victim-1", "reference")
    )
    assert set(victim.records) == set(reference.records)
    assert len(victim.records) > len(reference.records) == ITERATIONS


def test_a_changed_trace_is_seen(killed: Path, tmp_path: Path) -> None:
    source = killed / "runs/reference/et_trace.jsonl"
    expected = dict(Trace.read(source).records)
    lines = source.read_text().splitlines()
    path = tmp_path / "et_trace.jsonl"

    def differences(*changed: str, end: str = "\n") -> list[str]:
        path.write_text("\n".join(changed) + end)
        return compare_trace(expected, Trace.read(path), complete_to=ITERATIONS)

    assert not differences(*lines)
    assert not differences(*lines, *lines[4:])
    assert not differences(*lines, lines[4][:100], end="")  # the next writer drops it

    record = json.loads(lines[4])
    threshold = record["layers"]["3"]["threshold"][5]
    record["layers"]["3"]["threshold"][5] = threshold * (1 + 2**-40)
    (seen,) = differences(*lines[:4], json.dumps(record), *lines[5:])
    assert "step 5" in seen
    assert "/layers/3/threshold/5" in seen
    (seen,) = differences(*lines, json.dumps(record))  # a repeated step
    assert "step 5" in seen
    assert differences(*lines[:4], *lines[5:]) == ["trace: steps [5] are missing, the checkpoint is at 12"]
    assert differences(lines[0], lines[1][:100], *lines[1:]) == ["line 2 of et_trace.jsonl is broken"]


def test_a_changed_checkpoint_is_seen(killed: Path) -> None:
    checkpoint = Checkpoint.read(killed / "runs/reference", ITERATIONS)
    again = Checkpoint.read(killed / "runs/victim-1", ITERATIONS)
    assert not compare_checkpoints(checkpoint, again)

    def with_tensor(key: str, value: torch.Tensor) -> Checkpoint:
        return replace(checkpoint, tensors={**checkpoint.tensors, key: value})

    state = checkpoint.router_state().tensors
    assert {key.rsplit(".", 1)[1] for key in state} == {
        *("value", "num_updates", "last_cutoff", "restarted_at", "violations")
    }
    assert len(state) == 3 * 5
    for key in [*state, next(key for key in checkpoint.tensors if "exp_avg_sq" in key)]:
        changed = checkpoint.tensors[key].clone()
        changed.view(torch.uint8)[0] ^= 1  # the last bit of the first number
        assert compare_checkpoints(checkpoint, with_tensor(key, changed)) == [f"checkpoint: {key} differs"]
    rng = next(key for key in checkpoint.objects if key.startswith("rng_state"))
    changed = replace(checkpoint, objects={**checkpoint.objects, rng: b""})
    assert compare_checkpoints(checkpoint, changed) == [f"checkpoint: {rng} differs"]
    lacking = replace(checkpoint, tensors={k: v for k, v in checkpoint.tensors.items() if "value" not in k})
    assert len(compare_checkpoints(checkpoint, lacking)) == 3


def test_a_changed_loss_is_seen(killed: Path) -> None:
    expected = Printed.parse((killed / "runs/logs/reference.log").read_text())
    assert sorted(expected.losses) == sorted(expected.grad_norms) == list(range(1, ITERATIONS + 1))
    assert sorted(expected.evaluations) == [
        "iteration 12 on test set",
        "iteration 12 on validation set",
        "iteration 7",
    ]
    assert not compare_printed(expected, expected, resumed_from=0)
    for name in ("losses", "grad_norms"):
        changed = replace(expected, **{name: {**getattr(expected, name), 8: "0.1"}})
        (seen,) = compare_printed(expected, changed, resumed_from=3)
        assert "of step 8: 0.1, in the reference " in seen
    # The mean that Megatron prints after a resume is left out, and nothing else.
    averaged = replace(expected, losses={**expected.losses, 5: "0.1"})
    assert not compare_printed(expected, averaged, resumed_from=3)
    assert compare_printed(expected, averaged, resumed_from=6)
