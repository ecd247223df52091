"""The model examples: what they would run, and that nothing differs but what is meant to."""

import argparse
import functools
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from examples.common import layout
from examples.common.layout import LayoutError
from examples.dry_run import EXAMPLES, NODES, ROUTERS, ExampleError, Expansion, Settings, expand
from tests.linters import linter
from tests.megatron_here import needs_training

README = EXAMPLES / "README.md"
MODELS = list(NODES)
FILES = [*sorted(EXAMPLES.glob("*.sh")), *sorted((EXAMPLES / "common").glob("*.sh"))]

# What a router may set, and nothing else may differ between two of them.
ROUTER_FLAGS = {
    "--moe-router-type", "--moe-et-warmup-steps", "--moe-et-pool", "--moe-et-ema-decay", "--moe-et-trace-dir",
    "--moe-et-capacity-factor", "--moe-router-score-function", "--moe-router-topk-scaling-factor",
    "--moe-router-load-balancing-type", "--moe-aux-loss-coeff", "--moe-router-enable-expert-bias",
    "--moe-router-bias-update-rate", "--moe-router-pre-softmax",
}  # fmt: skip

pytestmark = needs_training


@functools.cache
def expanded(model: str, *settings: tuple[str, Any], extra: tuple[str, ...] = ()) -> Expansion:
    """The command of an example, on the fewest nodes unless NNODES is given. Remembered: 0.3 s each."""
    return expand(model, {"NNODES": NODES[model][0], "RUN_DIR": "run", **dict(settings)}, extra)


def values(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Flag -> its values; a later one wins, as in Megatron."""
    found: dict[str, tuple[str, ...]] = {}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag, found[word] = word, ()
        else:
            found[flag] = (*found[flag], word)
    return found


def refusal(model: str, settings: Settings, extra: Sequence[str] = ()) -> str:
    with pytest.raises(ExampleError) as refused:
        expand(model, settings, extra)
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"examples/{model}.sh: ")
    return line.partition(": ")[2]


# --- what is expanded ---


def test_every_file_is_known() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.sh")} == set(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_routers_differ_in_the_routers_flags_only(model: str) -> None:
    seen = []
    for router in ROUTERS:
        expansion = expanded(model, ("ROUTER", router))
        flags = values(expansion.flags)
        assert [flag for flag in expansion.flags if flag.startswith("--")] == list(flags), "a flag twice"
        own = {flag: flags.pop(flag) for flag in ROUTER_FLAGS & flags.keys()}
        seen.append((expansion.environment, expansion.launcher, flags))
        assert own["--moe-router-type"] != ("topk",) or not any("moe-et" in flag for flag in own)
        assert {"et": ("expert-threshold",), "ec": ("expert-choice",)}.get(router, ("topk",)) == own[
            "--moe-router-type"
        ]
    assert all(one == seen[0] for one in seen)
    assert "--moe-router-topk" in seen[0][2]


@pytest.mark.parametrize("model", MODELS)
def test_a_precision_adds_its_flags_only(model: str) -> None:
    bf16, fp8 = (values(expanded(model, ("PRECISION", precision)).flags) for precision in ("bf16", "fp8"))
    assert {flag: fp8[flag] for flag in fp8.keys() - bf16.keys()} == {
        "--fp8-format": ("e4m3",),
        "--fp8-recipe": ("blockwise",),
    }
    assert all(fp8[flag] == bf16[flag] for flag in bf16)


@pytest.mark.parametrize(
    ("model", "scores", "loss"),
    [
        ("d12", {"sigmoid"}, ("aux_loss", "1e-3")),
        ("mixtral_8x7b", {"softmax"}, ("aux_loss", "2e-2")),
        ("qwen3_235b_a22b", {"softmax"}, ("global_aux_loss", "1e-3")),
        ("deepseek_v3_proxy", {"sigmoid", "2.5"}, ("seq_aux_loss", "3e-3")),
    ],
)
def test_top_k_as_the_models_authors_have_it(model: str, scores: set[str], loss: tuple[str, str]) -> None:
    flags = values(expanded(model, ("ROUTER", "topk-aux")).flags)
    score_flags = ("--moe-router-score-function", "--moe-router-topk-scaling-factor")
    assert {value for flag in score_flags for value in flags.get(flag, ())} == scores
    assert (flags["--moe-router-load-balancing-type"] + flags["--moe-aux-loss-coeff"]) == loss
    quantile = values(expanded(model, ("ROUTER", "quantile-balancing")).flags)
    assert all(quantile.get(flag) == flags.get(flag) for flag in score_flags)


def test_sizes_come_from_the_environment_first() -> None:
    flags = values(expanded("d20", ("NUM_LAYERS", 7), ("HIDDEN_SIZE", 256), ("LR", "1e-5")).flags)
    assert flags["--num-layers"] == ("7",)
    assert flags["--moe-layer-freq"] == ("([0]*1+[1]*6)",)
    assert flags["--hidden-size"] == ("256",)
    assert flags["--lr"] == ("1e-5",)


def test_further_flags_come_last_as_they_are() -> None:
    extra = ("--seed", "7", "--lr", "0.5", "--wandb-exp-name", "two words, $HOME 'and' \"more\"")
    assert tuple(expanded("mixtral_8x7b", extra=extra).flags[-6:]) == extra


def test_a_shared_expert_is_added_to_every_router_or_to_none() -> None:
    flag = "--moe-shared-expert-intermediate-size"
    for router in ROUTERS:
        plain = expanded("mixtral_8x7b", ("ROUTER", router))
        assert flag not in plain.flags
        assert ("SHARED_EXPERT=1" in plain.text) == (router in ("et", "ec"))
        shared = expanded("mixtral_8x7b", ("ROUTER", router), ("SHARED_EXPERT", 1))
        assert values(shared.flags)[flag] == ("14336",)
        assert "SHARED_EXPERT=1" not in shared.text


def test_data_of_ones_own() -> None:
    own = {"DATA_PATH": "0.7 code 0.3 prose", "TOKENIZER_MODEL": "org/name", "NNODES": 1}
    flags = values(expand("d12", own).flags)
    assert flags["--data-path"] == ("0.7", "code", "0.3", "prose")
    assert flags["--tokenizer-type"] == ("HuggingFaceTokenizer",)
    assert "--mock-data" not in flags
    assert values(expand("d12", own | {"TOKENIZER_MODEL": README}).flags)["--tokenizer-type"] == (
        "SentencePieceTokenizer",
    )
    assert "DATA_PATH is unset: Megatron's mock data" in expanded("d12").text
    assert "TOKENIZER_MODEL is not" in refusal("d12", {"DATA_PATH": "x"})


def test_a_short_run_has_a_short_warm_up() -> None:
    flags = values(expanded("qwen3_30b_a3b", ("TRAIN_STEPS", 100)).flags)
    assert flags["--moe-et-warmup-steps"] == ("25",)
    assert flags["--lr-warmup-iters"] == ("10",)


# --- what is refused ---


@pytest.mark.parametrize(
    ("model", "settings", "sentence"),
    [
        ("d12", {"ROUTER": "topk"}, "ROUTER=topk: choose one of et ec topk-aux"),
        ("d12", {"PRECISION": "fp4"}, "PRECISION=fp4: choose bf16 or fp8"),
        ("d12", {"FP8_RECIPE": "best", "PRECISION": "fp8"}, "FP8_RECIPE=best: choose one of"),
        ("d12", {"OPTIMIZER": "sgd"}, "OPTIMIZER=sgd: choose adam or muon"),
        ("d12", {"OPTIMIZER": "muon", "OFFLOAD": 1}, "OFFLOAD=1 goes with OPTIMIZER=adam only"),
        ("d12", {"DISPATCHER": "ncclep"}, "DISPATCHER=ncclep: choose one of"),
        ("d12", {"RECOMPUTE": "some"}, "RECOMPUTE=some: choose none, selective or full"),
        ("d12", {"DRY_RUN": "yes"}, "DRY_RUN=yes: choose 1 or command"),
        ("d12", {"NNODES": "two"}, "NNODES is 'two': it must be a whole number"),
        ("d12", {"NNODES": "0"}, "NNODES=0 x NPROC_PER_NODE=8 is no process"),
        ("d12", {"MEGATRON": "/nowhere"}, "MEGATRON=/nowhere holds no pretrain_gpt.py"),
        ("d12", {"MEGATRON_ET_CPU": 1, "PRECISION": "fp8"}, "fp8 needs Transformer Engine and a GPU"),
        ("d12", {"NNODES": 64}, "1 x DP 512 = 512 does not divide the global batch size, 256"),
        ("mixtral_8x7b", {"EP": 3}, "x EP 3 x PP 1 = 3 does not divide the number of processes, 8"),
        ("mixtral_8x7b", {"NNODES": 2, "EP": 16}, "EP 16 does not divide the number of experts, 8"),
        ("mixtral_8x7b", {"TP": 3, "NPROC_PER_NODE": 24}, "TP 3 does not divide the number of att"),
        ("mixtral_8x7b", {"GLOBAL_BATCH_SIZE": 100}, "size 1 x DP 8 = 8 does not divide the global"),
        ("mixtral_8x7b", {"OFFLOAD": 0}, "optimizer state take 106 GiB on a GPU of 80 GiB: more GPUs"),
        ("mixtral_8x7b", {"NNODES": 8, "PP": 8, "VPP": 3}, "PP 8 x 3 virtual stages = 24 does not divide"),
        ("qwen3_235b_a22b", {"NNODES": 8, "GLOBAL_BATCH_SIZE": 12}, "PP 8 with virtual stages does not"),
        ("qwen3_30b_a3b", {"CP": 2, "SEQ_LENGTH": 4098}, "2 x CP 2 = 4 does not divide the sequence length"),
        (
            "deepseek_v3_proxy",
            {"ROUTER": "quantile-balancing", "SEQ_LENGTH": 4, "NUM_EXPERTS": 64},
            "quantile balancing: E 64 does not divide tokens x topk of a micro-batch, 32",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_sentence(model: str, settings: Settings, sentence: str) -> None:
    assert sentence in refusal(model, settings)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--tensor-model-parallel-size", "2"], "TP 2 with experts: Megatron trains it with --seq"),
        (["--num-layers", "5"], "names 32 layers, --num-layers is 5"),
    ],
)  # fmt: skip
def test_further_flags_are_judged_with_the_rest(flags: list[str], sentence: str) -> None:
    settings = {"NNODES": 1, "GLOBAL_BATCH_SIZE": 1024}
    assert sentence in refusal("mixtral_8x7b", settings, [*flags, "--moe-layer-freq", "[1]*32"])


# --- where it runs ---

# Stands for Python: what torchrun would be given is written down, all else runs.
FAKE_PYTHON = f"""#!/usr/bin/env bash
if [[ $1 == -m && $2 == torch.distributed.run ]]; then
  env -0 >"$RECORD.environment"
  printf '%s\\0' "$0" "$@" >"$RECORD"
else
  exec {sys.executable} "$@"
fi
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
[[ $1 == show && $2 == hostnames ]] && printf '%s\\n' "node${3##*-}" other
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def start(model: str, folder: Path, *extra: str, **settings: object) -> tuple[str, list[str], dict[str, str]]:
    """Start an example for real, up to torchrun: what it printed, torchrun's command, its environment."""
    python = executable(folder / "python", FAKE_PYTHON)
    executable(folder / "scontrol", FAKE_SCONTROL)
    record = folder / "record"
    base = {"PATH": f"{folder}:/usr/bin:/bin", "PYTHON": python, "RECORD": record, "NPROC_PER_NODE": 8}
    ran = subprocess.run(
        ["bash", EXAMPLES / f"{model}.sh", *extra],
        env={name: str(value) for name, value in (base | settings).items()},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = (folder / "record.environment").read_text().strip("\0").split("\0")
    environment = dict(line.split("=", 1) for line in lines)
    return ran.stdout, record.read_text().strip("\0").split("\0"), environment


def test_what_is_printed_is_what_runs(tmp_path: Path) -> None:
    """A shell that is given the printed lines starts the same command in the same environment."""
    printed, command, environment = start("mixtral_8x7b", tmp_path, "--seed", "a b")
    assert command[-2:] == ["--seed", "a b"]
    assert "-m megatron_et.pretrain_gpt" in " ".join(command)
    (tmp_path / "record").unlink()
    known = {"PATH": environment["PATH"], "RECORD": environment["RECORD"]}
    subprocess.run(["bash", "-c", printed], env=known, cwd=tmp_path, check=True)
    assert (tmp_path / "record").read_text().strip("\0").split("\0") == command
    again = dict(
        line.split("=", 1) for line in (tmp_path / "record.environment").read_text().strip("\0").split("\0")
    )
    for name in ("PYTHONPATH", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS"):
        assert again[name] == environment[name]


def test_revisions_are_logged(tmp_path: Path) -> None:
    printed, *_ = start("d12", tmp_path)
    assert re.search(r"^# megatron_et: ([0-9a-f]{40}( with changes)?|not a git checkout)$", printed, re.M)
    assert re.search(r"^# Megatron-Core \d+\.\d+\.\d+: /.*/megatron$", printed, re.M)


def test_nodes_of_a_slurm_job(tmp_path: Path) -> None:
    slurm = {
        "SLURM_NNODES": 4,
        "SLURM_JOB_NODELIST": "list-7",
        "SLURM_JOB_ID": 123456,
        "SLURM_GPUS_ON_NODE": 2,
    }
    printed, command, _ = start("d12", tmp_path, **slurm, SLURM_NODEID=0, NPROC_PER_NODE="")
    torchrun = values(command[3 : command.index("-m", 2)])
    assert torchrun == {
        "--nproc-per-node": ("2",),
        "--nnodes": ("4",),
        "--rdzv-backend": ("c10d",),
        "--rdzv-endpoint": ("node7:23456",),
        "--rdzv-id": ("123456",),
    }
    assert "#   8 processes, 2 a node" in printed
    printed, command, _ = start("d12", tmp_path, **slurm, SLURM_NODEID=1)
    assert printed == ""


def test_our_variables_go_before_slurms(tmp_path: Path) -> None:
    slurm = {"SLURM_NNODES": 4, "SLURM_JOB_NODELIST": "list-7", "SLURM_JOB_ID": 9, "SLURM_NODEID": 3}
    ours = {"NNODES": 2, "NODE_RANK": 0, "RDZV_ENDPOINT": "head:1234", "RDZV_ID": "mine"}
    printed, command, _ = start("d12", tmp_path, **slurm, **ours)
    torchrun = values(command[3 : command.index("-m", 2)])
    assert torchrun["--nnodes"] == ("2",)
    assert torchrun["--rdzv-endpoint"] == ("head:1234",)
    assert torchrun["--rdzv-id"] == ("mine",)
    assert printed


def test_nodes_without_a_meeting_point_are_refused() -> None:
    assert "FIRST_NODE:29500" in expanded("d12", ("NNODES", 2)).text  # a dry run has a stand-in
    assert "2 nodes need RDZV_ENDPOINT=host:port" in refusal("d12", {"NNODES": 2, "DRY_RUN": 0})


# --- which Megatron ---


def checkout(folder: Path, version: str, flags: str) -> Path:
    """What the examples look at of a Megatron-LM checkout."""
    for package in ("megatron/core", "megatron/training"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").touch()
    (folder / "megatron/core/package_info.py").write_text(f"__version__ = {version!r}")
    (folder / "megatron/training/arguments.py").write_text(flags)
    (folder / "pretrain_gpt.py").touch()
    return folder


def test_a_checkouts_own_script_runs(tmp_path: Path) -> None:
    megatron = checkout(tmp_path / "with space", "0.16.1+0123abc", "--muon-use-nesterov")
    old = {"MEGATRON": megatron, "NNODES": 1, "OPTIMIZER": "muon"}
    expansion = expand("d12", old)
    assert expansion.launcher[-3:] == ["-m", "megatron_et", str(megatron / "pretrain_gpt.py")]
    assert expansion.environment["PYTHONPATH"].split(":")[:2] == [str(EXAMPLES.parent), str(megatron)]
    assert "# Megatron-Core 0.16.1: " in expansion.text
    flags = values(expansion.flags)
    assert flags["--optimizer"] == ("dist_muon",)
    assert "--muon-use-nesterov" in flags
    assert "--use-distributed-optimizer" not in flags
    assert "Muon as dist_muon" in expansion.text
    assert "needs Megatron-Core 0.19 or newer, this is 0.16.1" in refusal(
        "d12", old | {"ROUTER": "quantile-balancing"}
    )


def test_muon_of_newer_versions(tmp_path: Path) -> None:
    megatron = checkout(tmp_path, "0.20.0", "--muon-nesterov quantile_balancing")
    flags = values(expand("d20", {"MEGATRON": megatron, "NNODES": 1, "OPTIMIZER": "muon"}).flags)
    assert flags["--optimizer"] == ("muon",)
    assert {"--use-distributed-optimizer", "--muon-nesterov"} <= flags.keys()
    assert flags["--lr"] == ("2.8e-3",)


def test_a_wheel_without_training_is_refused(tmp_path: Path) -> None:
    folder = checkout(tmp_path, "0.16.1", "")
    (folder / "megatron/training/arguments.py").unlink()
    assert "0.16.1 has no megatron.training: set MEGATRON" in refusal("d12", {"MEGATRON": folder})


def test_adam_stands_in_for_muon_and_says_so() -> None:
    have = subprocess.run(
        [sys.executable, "-c", "import emerging_optimizers"], capture_output=True, check=False
    )
    assert ("AdamW and not the paper's Muon" in expanded("d12").text) == (have.returncode != 0)


# --- size and layout ---

# All of it; the layout is nobody's, so let the GPUs be large.
DEEPSEEK_V3 = {"NUM_LAYERS": 61, "DENSE_LAYERS": 3, "NUM_EXPERTS": 256, "GPU_MEMORY_GIB": 9999}


@pytest.mark.parametrize(
    ("model", "settings", "total", "active"),
    [
        ("d12", {}, 575e6, None),
        ("d20", {}, 2.43e9, 0.56e9),
        ("mixtral_8x7b", {}, 46.7e9, 12.9e9),
        ("qwen3_30b_a3b", {}, 30.5e9, 3.3e9),
        ("qwen3_235b_a22b", {}, 235e9, 22e9),
        ("deepseek_v3_proxy", {**DEEPSEEK_V3, "MTP_LAYERS": 0}, 671e9, 37e9),
    ],
)
def test_sizes_are_those_that_the_authors_give(
    model: str, settings: dict[str, Any], total: float, active: float | None
) -> None:
    expansion = expanded(model, *settings.items())
    args = layout.parse(expansion.flags)
    assert layout.total_parameters(args) == pytest.approx(total, rel=0.005)
    if active is not None:
        assert layout.active_parameters(args) == pytest.approx(active, rel=0.03)


def row(model: str, nodes: int) -> str:
    """A layout's row in the README."""
    args = layout.parse(expanded(model, ("NNODES", nodes)).flags)
    found = layout.layout(args, 8 * nodes)
    virtual = args.num_virtual_stages_per_pipeline_rank
    host = f" + {found.offloaded / layout.GIB:.1f} in host memory" if found.offloaded else ""
    cells: list[object] = [
        *(model, 8 * nodes, args.tensor_model_parallel_size),
        f"{args.pipeline_model_parallel_size}{f' ({virtual})' * (virtual > 1)}",
        *(args.expert_model_parallel_size, found.dp, found.edp, found.accumulation, f"{found.tokens:,}"),
        f"{found.state / layout.GIB:.1f}{host}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


@pytest.mark.parametrize(("model", "nodes"), [(model, nodes) for model in MODELS for nodes in NODES[model]])
def test_layouts_in_the_readme(model: str, nodes: int) -> None:
    assert row(model, nodes) in README.read_text().splitlines()


def test_the_example_in_the_readme_is_what_is_printed() -> None:
    text = README.read_text()
    block = text[text.index("# layout\n") :].partition("\n```")[0]
    assert block in expanded("mixtral_8x7b", ("NNODES", 8)).text


def test_the_readme_knows_every_variable() -> None:
    table = README.read_text().partition("## Variables")[2].partition("## Layouts")[0]
    cells = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    known = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", " ".join(cell for pair in cells for cell in pair)))
    given = r"\$\{([A-Z][A-Z0-9_]+):[=-]"
    used = {name for path in FILES for name in re.findall(given, path.read_text())}
    elsewhere = {"PYTHONPATH", "OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF"}
    assert {name for name in used if not name.startswith("SLURM_")} - elsewhere == known


def args_of(flags: str) -> argparse.Namespace:
    base = "--num-layers 4 --hidden-size 8 --num-attention-heads 2 --seq-length 8 --vocab-size 100"
    return layout.parse(f"{base} --micro-batch-size 1 --global-batch-size 8 {flags}".split())


def test_stages_take_turns() -> None:
    args = args_of("--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2")
    assert layout._stages(args) == [[0, 2], [1, 3]]
    ends = "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split"
    args = args_of(f"--num-layers 6 --pipeline-model-parallel-size 4 {ends}")
    assert layout._stages(args) == [[0], [1, 2], [3, 4], [5]]


def test_state_of_the_fullest_rank() -> None:
    """By hand: 6 bytes a parameter that a rank holds, and 12 spread over its replicas."""
    args = args_of(
        "--num-experts 4 --moe-ffn-hidden-size 16 --expert-model-parallel-size 2 --bf16 "
        "--use-distributed-optimizer --untie-embeddings-and-output-weights"
    )
    found = layout.layout(args, 8)
    embedding, attention, router, expert = 128 * 8, 4 * 64 + 2 * 8, 4 * 8, 2 * 8 * 16
    dense = 2 * embedding + 8 + 4 * (attention + router)
    experts = 4 * 2 * expert
    assert layout.total_parameters(args) == dense + 2 * experts
    assert (found.dp, found.edp, found.experts) == (8, 4, 2)
    assert found.state == dense * 6 + dense * 12 // 8 + experts * 6 + experts * 12 // 4
    args.optimizer_cpu_offload = True
    offloaded = layout.layout(args, 8)
    assert offloaded.state == (dense + experts) * 6
    assert offloaded.offloaded == found.state - offloaded.state


def test_layers_of_a_list_and_of_a_number() -> None:
    assert layout.moe_layers(args_of("--num-experts 2 --moe-layer-freq 2")) == [True, False, True, False]
    assert layout.moe_layers(args_of("--num-experts 2 --moe-layer-freq ([0]+[1,0]*1+[1]*1)")) == [
        False, True, False, True,
    ]  # fmt: skip
    assert layout.moe_layers(args_of("")) == [False] * 4
    with pytest.raises(LayoutError, match="EP 2 without experts"):
        layout.layout(args_of("--expert-model-parallel-size 2"), 2)


# --- what Megatron says ---


def test_megatron_accepts_an_example_and_refuses_what_is_wrong() -> None:
    """One example in all routers and precisions; `make examples-dry-run` does it for all."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", EXAMPLES / "dry_run.py", "deepseek_v3_proxy"],
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"^13 commands, 0 refused, [03] skipped", ran.stdout, re.MULTILINE)


def test_a_dry_run_judges_the_flags() -> None:
    settings = {"NNODES": 1, "DRY_RUN": 1, "CUDA_VISIBLE_DEVICES": ""}
    with pytest.raises(ExampleError, match="something is REFUSED above") as refused:
        expand("d12", settings, ["--moe-router-fusion"])
    assert "--moe-router-fusion cannot be combined" in " ".join(refused.value.printed.split())


# --- the scripts themselves ---


def test_shellcheck_has_nothing_to_say() -> None:
    entries = [path for path in FILES if path.parent == EXAMPLES]
    ran = subprocess.run(
        [linter("shellcheck"), "-x", "-a", *entries],
        capture_output=True,
        text=True,
        check=False,
        cwd=EXAMPLES,
    )
    assert ran.stdout + ran.stderr == ""
