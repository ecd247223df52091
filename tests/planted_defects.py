"""Plants faults into the package, one at a time, and says which test notices each: a guard for clean-ups.

    python -m tests.planted_defects [NAME ...] [--tree DIR] [--list]

A defect is a snippet that stands in the package once, and what a tired hand might have made of it. It is
planted in a copy of the tree, where its tests are run until one fails. Exit status 1: one was not noticed, or
its snippet is not there any more (then mend the table below, where the code has changed). Half an hour on one
core; no GPU.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "test_kernels.py::test_kernels_in_the_interpreter"
LAYER = "test_layers.py::test_layer"


@dataclass(frozen=True)
class Defect:
    """One fault."""

    name: str
    right: str
    """In the package once."""
    wrong: str
    tests: str
    """Files of tests/ by name, or `file::test`, that should notice; `|` separates names before and after a
    move."""


DEFECTS = (
    # rule
    Defect(
        "rule: a token at its threshold stays out",
        "routing_map = logits >= applied",
        "routing_map = logits > applied",
        "test_routing.py",
    ),
    Defect(
        "rule: clamp from the wrong side",
        "torch.maximum(thresholds_E, lower_E)",
        "torch.minimum(thresholds_E, lower_E)",
        "test_routing.py",
    ),
    Defect(
        "rule: padding mask inverted",
        "routing_map &= ~padding_mask.unsqueeze(1)",
        "routing_map &= padding_mask.unsqueeze(1)",
        "test_routing.py",
    ),
    Defect(
        "rule: gates off the map",
        "gates = torch.where(routing_map, torch.sigmoid(logits), 0.0)",
        "gates = torch.sigmoid(logits)",
        "test_routing.py",
    ),
    Defect(
        "rule: the smallest fan-out kept",
        "best = selected_TE.sort(dim=1, descending=True",
        "best = selected_TE.sort(dim=1, descending=False",
        "test_routing.py",
    ),
    Defect(
        "rule: k without topk",
        "return num_tokens * topk // num_experts",
        "return num_tokens // num_experts",
        "test_quantile.py test_authors.py",
    ),
    Defect(
        "rule: k-th largest off by one",
        "row = (k_11 - 1).clamp(min=0)",
        "row = k_11.clamp(max=num_tokens - 1)",
        "test_quantile.py",
    ),
    Defect(
        "rule: histogram off by a bin",
        "inside_EQ = self.counts_EB.gather(-1, bin_EQ)",
        "inside_EQ = self.counts_EB.gather(-1, (bin_EQ - 1).clamp(min=0))",
        "test_histogram.py",
    ),
    Defect(
        "rule: no bias correction",
        "rate_LE = (decay - 1.0) / torch.expm1((updates - restarted_at).double() * log_decay)",
        "rate_LE = 1.0 - decay + 0.0 * (updates - restarted_at).double() + 0.0 * log_decay",
        "test_threshold.py",
    ),
    Defect(
        "rule: a batch without tokens moves thresholds",
        "torch.where(valid, new, now[name])",
        "torch.where(valid | True, new, now[name])",
        "test_threshold.py",
    ),
    Defect(
        "rule: the guard waits a batch longer",
        "violations.abs() >= PATIENCE",
        "violations.abs() > PATIENCE",
        "test_threshold.py",
    ),
    Defect(
        "rule: accumulators are not reset", "accumulator.zero_()", "accumulator.add_(0)", "test_statistics.py"
    ),
    Defect(
        "rule: padding has a fan-out",
        "now.fanout_F.index_add_(0, routing_map_TE.sum(dim=1), valid_T)",
        "now.fanout_F.index_add_(0, routing_map_TE.sum(dim=1), torch.ones_like(valid_T))",
        "test_statistics.py",
    ),
    # moe
    Defect(
        "moe: evaluation is counted",
        "counted = self.training and torch.is_grad_enabled()",
        "counted = torch.is_grad_enabled()",
        f"{LAYER}[batch_boundary-2p]|{LAYER}[batch_boundary-histogram-2p]",
    ),
    Defect(
        "moe: the first pass of a recompute is counted",
        "counted = self.training and torch.is_grad_enabled()",
        "counted = self.training",
        f"{LAYER}[recompute-2p]",
    ),
    Defect(
        "moe: send buffer of tokens * topk",
        "self.num_out_tokens = routing_map.sum()",
        "pass",
        f"{LAYER}[dense_formula-alltoall-3-2p]",
    ),
    Defect(
        "moe: DeepEP's empty slots hold experts",
        "experts_TS.masked_fill(empty_TS, -1)",
        "experts_TS",
        "test_flex.py",
    ),
    Defect(
        "moe: the other drop policy",
        'gates_TE if policy == "probs"',
        'gates_TE if policy != "probs"',
        "test_dispatchers.py|test_dropping.py",
    ),
    Defect(
        "moe: DeepEP's slots are not shared by shards",
        "DEEPEP_SLOTS // shards,",
        "DEEPEP_SLOTS,",
        "test_compatibility.py",
    ),
    Defect(
        "moe: a refusal is gone", '_get("moe_use_upcycling"),', "lambda _: False,", "test_compatibility.py"
    ),
    Defect(
        "moe: statistics summed over the wrong group",
        "group = routers[0].tp_dp_cp_group",
        "group = routers[0].tp_group",
        f"{LAYER}[batch_boundary-2p]|{LAYER}[batch_boundary-histogram-2p]",
    ),
    Defect(
        "moe: a skipped step keeps its counts",
        "router.statistics.reset()",
        "router.statistics.size()",
        "test_step.py",
    ),
    Defect(
        "moe: passes that warm up a graph are counted",
        "tensor.copy_(value)",
        "value.copy_(tensor)",
        "test_cuda_graph.py",
    ),
    Defect(
        "moe: NaN logits stop nobody",
        "    if nonfinite:\n        raise",
        "    if nonfinite < 0:\n        raise",
        "test_step.py",
    ),
    # host
    Defect(
        "host: a skipped step commits", "        if result[1]:", "        if not result[1]:", "test_step.py"
    ),
    Defect(
        "host: the reduction is never finished",
        "        finish_reduction(state.take_pending())\n",
        "",
        "test_step.py",
    ),
    Defect(
        "host: the checkpoint's flags win over the command line",
        "name not in explicit and hasattr",
        "hasattr",
        "test_arguments.py",
    ),
    Defect(
        "host: a pool without a token for an expert passes",
        "args.moe_router_topk, args.num_experts) < 1:",
        "args.moe_router_topk, args.num_experts) < 0:",
        "test_arguments.py",
    ),
    Defect(
        "host: Megatron's dispatchers stay",
        "chosen = ours if resolve_config(config).active else megatrons",
        "chosen = megatrons",
        f"{LAYER}[dense_formula-alltoall-3-2p]",
    ),
    Defect(
        "host: a top-k checkpoint is not noticed",
        "    if saved.active:\n        return None",
        "    if not saved.active:\n        return None",
        "test_migration.py::test_a_checkpoint_with_biases_starts_the_warmup",
    ),
    Defect(
        "host: every rank writes the log",
        "args.rank != args.world_size - 1:",
        "args.rank < 0:",
        "test_metrics.py",
    ),
    # kernels
    Defect(
        "kernels: Triton leaves a token at its threshold out",
        "chosen = (x >= applied[None, :])",
        "chosen = (x > applied[None, :])",
        KERNELS,
    ),
    Defect(
        "kernels: Triton's gradient of a sigmoid",
        "grad * (1.0 - gate) * gate",
        "grad * (1.0 + gate) * gate",
        KERNELS,
    ),
    Defect(
        "kernels: Triton counts the centre below", "above = distance >= 0", "above = distance > 0", KERNELS
    ),
    Defect(
        "kernels: CUDA leaves a token at its threshold out",
        "valid & (x[i] >= applied[i])",
        "valid & (x[i] > applied[i])",
        KERNELS,
    ),
    Defect("kernels: CUDA's scratch stays dirty", "if (thread == 0) arrived[stripe] = 0;", "", KERNELS),
    Defect(
        "kernels: radix selection forgets the second query",
        "(u32)(beginning == begins[1][i]) << 16",
        "0u",
        KERNELS,
    ),
)


def place_of(defect: Defect, tree: Path) -> Path:
    """The file that holds its snippet.

    Raises:
        LookupError: it is nowhere, or in several places.
    """
    files = [*(tree / "megatron_et").rglob("*.py"), *(tree / "megatron_et").rglob("*.cu")]
    found = [file for file in files for _ in range(file.read_text().count(defect.right))]
    if len(found) != 1:
        where = ", ".join(sorted({str(file.relative_to(tree)) for file in found})) or "nowhere"
        raise LookupError(f"{defect.name}: its snippet {defect.right!r} stands {len(found)} times ({where})")
    return found[0]


def tests_of(defect: Defect, tree: Path) -> list[str]:
    """Its tests as pytest takes them.

    Raises:
        LookupError: a file of tests that is not there.
    """
    found = []
    for words in (group.split() for group in defect.tests.split("|")):
        here = []
        for word in words:
            name, separator, test = word.partition("::")
            paths = [
                path for level in ("unit", "distributed") for path in (tree / "tests" / level).rglob(name)
            ]
            here += [f"{path.relative_to(tree)}{separator}{test}" for path in paths]
        if len(here) == len(words):
            found.append(here)
    if not found:
        raise LookupError(f"{defect.name}: no file of tests is called {defect.tests}")
    # Of alternatives, the first whose tests there are.
    for here in found[:-1]:
        if run(here, tree, "--collect-only")[0] == 0:
            return here
    return found[-1]


def run(tests: list[str], tree: Path, *options: str) -> tuple[int, str]:
    """pytest's exit status, and the first test that failed."""
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *options, *tests],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "CI": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    first = re.search(r"^(?:FAILED|ERROR) (\S+)", ran.stdout, re.MULTILINE)
    return ran.returncode, first.group(1) if first else ran.stdout.strip()[-200:]


def main() -> int:
    """Plant, run, tell."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of names; default: all")
    parser.add_argument("--tree", type=Path, default=ROOT, help="of the package and its tests")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    chosen = [d for d in DEFECTS if not options.names or any(name in d.name for name in options.names)]
    if options.list:
        print(*(defect.name for defect in chosen), sep="\n")
        return 0
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(
            options.tree, tree, ignore=shutil.ignore_patterns(".git", ".venv", ".layers", "runs", ".*cache")
        )
        for defect in chosen:
            started = time.monotonic()
            try:
                path, tests = place_of(defect, tree), tests_of(defect, tree)
            except LookupError as error:
                print(f"STALE    {error}", flush=True)
                unnoticed += 1
                continue
            right = path.read_text()
            path.write_text(right.replace(defect.right, defect.wrong))
            status, first = run(tests, tree)
            path.write_text(right)
            unnoticed += status != 1
            told = (
                f"noticed  by {first}" if status == 1 else f"UNNOTICED ({' '.join(tests)}: status {status})"
            )
            print(f"{told:60} {time.monotonic() - started:4.0f} s  {defect.name}", flush=True)
    print(f"{len(chosen) - unnoticed} of {len(chosen)} noticed")
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main())
