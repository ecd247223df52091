"""Model examples train in their toy sizes: real pretraining on CPU, started by the examples themselves."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks.processes import kill_tree
from examples.common import layout
from examples.dry_run import EXAMPLES, parse
from tests.launch import TAIL, free_port
from tests.megatron_here import needs_training

pytestmark = [pytest.mark.distributed, needs_training]


def train(model: str, folder: Path, nodes: list[Mapping[str, object]], timeout: int = 150) -> list[str]:
    """Start an example once for each node of a job, on this machine; what each node printed.

    Args:
        model: the example's name.
        folder: of the run, and the working directory.
        nodes: environment variables of each node.
        timeout: seconds.
    """
    base = {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        "PYTHON": sys.executable,
        "MEGATRON_ET_CPU": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "RUN_DIR": str(folder),
    }
    logs = [folder / f"node{number}.log" for number in range(len(nodes))]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for node, log in zip(nodes, logs, strict=True):
            with log.open("w") as output:
                process = subprocess.Popen(
                    ["bash", EXAMPLES / f"{model}.sh"],
                    env=base | {name: str(value) for name, value in node.items()},
                    cwd=folder,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            processes.append(process)
        for process in processes:
            process.wait(timeout)
    finally:
        for process in processes:
            if process.poll() is None:
                kill_tree(process.pid)
                process.wait()
    printed = [log.read_text(errors="replace") for log in logs]
    for process, text in zip(processes, printed, strict=True):
        assert process.returncode == 0, text[-TAIL:]
    return printed


def losses(text: str) -> list[tuple[int, float]]:
    """(step, training loss) of what the last rank printed."""
    return [(int(i), float(x)) for i, x in re.findall(r" iteration +(\d+)/.* lm loss: (\S+) ", text)]


def test_expert_threshold_trains_on_two_nodes(tmp_path: Path) -> None:
    """Warm-up and thresholds of DeepSeek's proxy, prediction head included; its size is as it was said."""
    job = {"NNODES": 2, "NPROC_PER_NODE": 1, "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}", "TRAIN_STEPS": 4}
    first, second = train("deepseek_v3_proxy", tmp_path, [{**job, "NODE_RANK": rank} for rank in range(2)])
    assert [step for step, _ in losses(first + second)] == [1, 2, 3, 4]
    trace = [json.loads(line) for line in (tmp_path / "et_trace.jsonl").read_text().splitlines()]
    assert [record["phase"] for record in trace] == ["warmup", "warmup", "threshold", "threshold"]
    assert len(trace[0]["layers"]) == 3  # two of three layers, and the head
    assert (tmp_path / "checkpoints" / "iter_0000004").is_dir()
    assert any((tmp_path / "tensorboard").iterdir())

    assert "# layout" in first
    assert "# layout" not in second  # the first node's log is enough
    args = layout.parse(parse(first[: first.index("\n", first.index(" --save "))]).flags)
    said = layout.total_parameters(args)
    args.num_experts //= 2  # EP 2, and the router's rows are on both ranks
    of_a_rank = layout.total_parameters(args) + 3 * args.num_experts * args.hidden_size
    (built,) = re.findall(r"number of parameters on .* rank .*: (\d+)", first + second)
    assert of_a_rank == int(built) < said


def test_top_k_trains_on_one_node(tmp_path: Path) -> None:
    (text,) = train("qwen3_30b_a3b", tmp_path, [{"ROUTER": "topk-aux", "TRAIN_STEPS": 2}])
    assert [step for step, _ in losses(text)] == [1, 2]
    assert "global_load_balancing_loss" in text
    assert not (tmp_path / "et_trace.jsonl").exists()
