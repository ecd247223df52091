"""`megatron-et check`: what it says of packages, Megatron, flags and sizes, and how it ends.

Sizes are compared with what the real classes keep and send. Megatron's parser and its own checks run here, in
this process; what binds the seams runs in one new process.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_et import cli, host
from megatron_et.check import flags, layers, packages, plugin, sizes
from megatron_et.check.child import Child, ChildError
from megatron_et.check.findings import NOTE, OK, PLAIN, REFUSED, Finding, Section, lines, refused
from megatron_et.config import ConfigError
from megatron_et.moe.compatibility import REFUSALS
from megatron_et.moe.synchronize import start_reduction
from megatron_et.rule.quantile import Histogram, kth_largest_of_parts
from megatron_et.rule.statistics import RouterStatistics
from tests.launch import free_port
from tests.megatron_here import HAS_TRAINING, absent, needs_training

# Megatron says at every import what is not installed.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ROOT = Path(__file__).parents[3]
GPT = (
    "--num-layers 6 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--micro-batch-size 1 --global-batch-size 8 --train-iters 5000 --lr 1e-3 --transformer-impl local "
    "--num-experts 8 --moe-router-topk 2 --no-rope-fusion --no-gradient-accumulation-fusion "
    "--no-persist-layer-norm --no-bias-swiglu-fusion --disable-bias-linear"
)
ET = f"{GPT} --moe-router-type expert-threshold"


# --- printing ---


def test_lines_fit_the_width_and_long_labels_have_their_own() -> None:
    text = "words of some length " * 9
    section = Section("seams", [Finding(OK, "layer", text), Finding(REFUSED, "", text)])
    flags_section = Section("flags", [Finding(PLAIN, "--moe-router-enable-expert-bias", text)])
    said = lines([section, flags_section], 80)
    assert max(map(len, said)) <= 80
    assert said[0] == "seams"
    assert said[1].startswith("  ok       layer  words of")
    assert said[2].startswith(" " * 18)
    first = said.index("flags")
    assert said[first - 1] == ""
    assert said[first + 1].strip() == "--moe-router-enable-expert-bias"
    assert said[first + 2].strip().startswith("words of")
    assert "".join("".join(said).split()).count("length") == 27
    assert refused([section, flags_section]) == 1


# --- the command ---


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], Path | None]]:
    """What `check` is asked; it answers that all is well."""
    calls: list[tuple[list[str], Path | None]] = []

    def check(words: Sequence[str], script: Path | None = None) -> list[Section]:
        calls.append((list(words), script))
        return [Section("flags", [Finding(OK, "", "fine")])]

    monkeypatch.setattr("megatron_et.check.command.check", check)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return calls


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--num-layers", "4"],
        ["--num-layers=4", "--", "--help"],
        ["-h", "--num-layers"],
        ["--hel"],
        ["--lr", "-1"],
    ],
)
def test_the_training_commands_words_arrive_as_they_are(words: list[str], asked: list[Any]) -> None:
    assert cli.main(["check", *words]) == 0
    assert asked == [(words, None)]


def test_a_leading_script_is_told_from_the_flags(asked: list[Any], tmp_path: Path) -> None:
    script = tmp_path / "pretrain_gpt.py"
    script.touch()
    assert cli.main(["check", str(script), "--num-layers", "4"]) == 0
    assert asked == [(["--num-layers", "4"], script)]


@pytest.mark.parametrize(
    ("words", "world_size", "sentence"),
    [
        (["torchrun", "pretrain_gpt.py"], "1", "torchrun is not a file: give your training script"),
        (["--num-layers", "4"], "many", "WORLD_SIZE is 'many' in the environment"),
        ([], "0", "WORLD_SIZE is '0' in the environment"),
    ],
)
def test_wrong_use_is_one_sentence(
    words: list[str],
    world_size: str,
    sentence: str,
    asked: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world_size)
    assert cli.main(["check", *words]) == 2
    assert asked == []
    assert capsys.readouterr().err.startswith(f"megatron-et check: {sentence}")


def test_help_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["check", "--help"])
    assert stop.value.code == 0
    assert "usage: megatron-et check [SCRIPT] [FLAGS OF YOUR TRAINING COMMAND ...]" in capsys.readouterr().out


# --- packages, each in a process of its own ---

APEX = {"apex/__init__.py": ""}
APEX_VERSION = ([d.version for d in importlib.metadata.distributions(name="apex")] or ["version unknown"])[0]
"""It has no `__version__`; in an NGC image a real one is installed beside the one made here."""
PACKAGES: dict[str, tuple[str, dict[str, str], str, str, str]] = {
    # what -> module, files, mark, label, words
    "DeepEP with HybridEP": (
        "deep_ep", {"deep_ep.py": "__version__ = '1.2'\nclass HybridEPBuffer: ..."}, OK, "HybridEP", "in it"
    ),
    "DeepEP without": ("deep_ep", {"deep_ep.py": "__version__ = '1.2'"}, PLAIN, "HybridEP", "not in this"),
    "DeepEP's version": ("deep_ep", {"deep_ep.py": "__version__ = '1.2'"}, OK, "DeepEP", "1.2"),
    "no DeepEP": ("deep_ep", {}, PLAIN, "DeepEP", "not installed"),
    "a folder called so": ("deep_ep", {"deep_ep/notes.txt": ""}, PLAIN, "DeepEP", "not installed"),
    "PyPI's apex": ("apex", APEX | {"apex/__init__.py": "import pyramid"}, NOTE, "Apex", "not NVIDIA's"),
    "NVIDIA's Apex": (
        "apex",
        APEX | {"apex/optimizers/__init__.py": "", "amp_C.py": ""}, OK, "Apex", f"NVIDIA's, {APEX_VERSION}"
    ),
    "Apex without kernels": (
        "apex", APEX | {"apex/optimizers/__init__.py": ""}, NOTE, "Apex", "without its compiled kernels"
    ),
    "Transformer Engine": (
        "transformer_engine",
        {"transformer_engine/__init__.py": "print('noise'); __version__ = '2.14'",
         "transformer_engine/pytorch.py": ""},
        OK, "Transformer Engine", "2.14"
    ),
}  # fmt: skip


def child(module: str, files: dict[str, str], folder: Path) -> Child:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return Child("package", [module], script=folder / "train.py")


@pytest.mark.parametrize("what", PACKAGES)
def test_packages_are_told_apart(what: str, tmp_path: Path) -> None:
    module, files, mark, label, words = PACKAGES[what]
    found = [Finding(*item) for item in child(module, files, tmp_path).answer(60)]
    (one,) = [finding for finding in found if finding.label == label]
    assert one.mark == mark
    assert words in one.text


@pytest.mark.parametrize(
    ("body", "timeout", "ending"),
    [
        ("raise OSError('libcuda.so.1: cannot open')", 60, r"OSError: libcuda\.so\.1: cannot open \(exit "),
        ("import os; os.abort()", 60, r"^killed by SIGABRT$"),
        ("import time; time.sleep(100)", 0.5, r"^no answer after 0 s$|^no answer after 1 s$"),
    ],
)
def test_an_import_that_fails_is_one_line(body: str, timeout: float, ending: str, tmp_path: Path) -> None:
    started = child("deep_ep", {"deep_ep.py": body}, tmp_path)
    with pytest.raises(ChildError, match=ending):
        started.answer(timeout)
    assert started._process.poll() is not None


def test_torch_is_described_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {finding.label: finding.text for finding in packages.probe("torch")}
    assert found["torch"].startswith(torch.__version__)
    assert found["GPU"].startswith("none visible")
    assert set(found) == {"torch", "GPU", "NCCL", "Triton", "cuda-bindings"}


# --- which Megatron, which seams ---


def folders(monkeypatch: pytest.MonkeyPatch, **where: str | None) -> list[Finding]:
    paths = {f"megatron.{name}": None if path is None else Path(path) for name, path in where.items()}
    monkeypatch.setattr(plugin, "_folder", paths.__getitem__)
    return plugin._which_megatron()


def test_two_halves_of_different_megatrons_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = folders(monkeypatch, core="/a/megatron/core", training="/b/megatron/training")
    (bad,) = [finding for finding in mixed if finding.mark == REFUSED]
    assert "/b/megatron/training, another Megatron than megatron.core" in bad.text
    whole = folders(monkeypatch, core="/a/megatron/core", training="/a/megatron/training")
    assert [finding.mark for finding in whole] == [OK, PLAIN, OK]
    own_loop = folders(monkeypatch, core="/a/megatron/core", training=None)
    assert [finding.mark for finding in own_loop] == [OK, PLAIN, NOTE]
    (gone,) = folders(monkeypatch, core=None, training=None)
    assert gone.mark == REFUSED


def test_a_version_that_nobody_checked_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin.versions, "megatron_version", lambda: "0.99.0")
    found = folders(monkeypatch, core="/a/megatron/core", training="/a/megatron/training")
    assert found[0].mark == NOTE
    assert found[0].text.startswith("0.99.0 was not run, nor any of its series: checked were 0.")
    monkeypatch.setattr(plugin.versions, "megatron_version", lambda: "0.19.7")
    found = folders(monkeypatch, core="/a/megatron/core", training="/a/megatron/training")
    assert found[0].mark == NOTE
    assert found[0].text.startswith("0.19.7 was not run, 0.19.2 of the same series was")


@needs_training
def test_without_megatron_training_only_the_layer_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"arguments", "checkpoint", "grads", "step", "logging"}
    assert training < set(host.seams())
    monkeypatch.setitem(sys.modules, "megatron.training", None)
    assert "layer" in host.seams()
    assert not training & set(host.seams())


def test_a_seam_that_does_not_bind_is_named_and_the_others_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_et.host import layer, wheel

    def gone() -> None:
        raise ImportError(
            "megatron.core.x.MoELayer is not in megatron-core 9: versions that have it are 0.19.x"
        )

    monkeypatch.setattr(layer, "install", gone)
    monkeypatch.setattr(wheel, "install", lambda: None)
    monkeypatch.setattr(host, "seams", lambda: ["layer", "wheel"])
    monkeypatch.setattr(plugin, "_has_training", lambda: False)
    missing, bound, own_loop = plugin.bind_seams()
    assert (missing.mark, missing.label) == (REFUSED, "layer")
    assert "versions that have it are 0.19.x" in missing.text
    assert "our router in every MoE layer" in missing.text
    assert (bound.mark, bound.label) == (OK, "wheel")
    assert (own_loop.mark, own_loop.label) == (NOTE, "your own loop")
    assert "megatron_et.finalize_thresholds(model)" in own_loop.text
    assert all(plugin._purpose(name) for name in ("arguments", "checkpoint", "grads", "step", "logging"))


def test_flags_without_megatron_training_cannot_be_checked() -> None:
    assert plugin._own_loop([]) == []
    assert refused(plugin._own_loop(["--num-layers", "4"])) == 1


# --- flags ---


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Finding]]:
    """Findings about a command line."""
    if not HAS_TRAINING:
        absent("megatron.training, whose parser it asks")
    monkeypatch.setattr(sys, "argv", ["x"])
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    # Megatron demands it of a Hopper with tensor parallelism.
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    def judged(line: str, *, script: str | None = None, world_size: int | None = None) -> list[Finding]:
        os.environ.pop("WORLD_SIZE", None)
        if world_size is not None:
            os.environ["WORLD_SIZE"] = str(world_size)
        return [finding for part in flags.judge(line.split(), script=script) for finding in part.findings]

    return judged


type Judge = Callable[..., list[Finding]]


def texts(found: list[Finding], mark: str) -> list[str]:
    return [finding.text for finding in found if finding.mark == mark]


def test_a_command_that_will_run(judge: Judge) -> None:
    found = judge(ET, world_size=1)
    assert texts(found, REFUSED) == []
    assert any(text.startswith("none refused by Megatron's own checks") for text in texts(found, OK))
    assert any("set at start-up: moe_router_score_function=sigmoid" in text for text in texts(found, OK))
    assert not any("moe-router-type" in text or "WORLD_SIZE" in text for text in texts(found, NOTE))


def test_all_refusals_come_at_once(judge: Judge) -> None:
    line = (
        f"{ET} --moe-router-fusion --moe-aux-loss-coeff 0.1 --moe-router-score-function softmax --bad-flag 3"
    )
    said = texts(judge(line), REFUSED)
    assert len(said) == 4
    for words in (
        "--moe-router-fusion cannot",
        "--moe-aux-loss-coeff cannot",
        "is 'softmax'",
        "--bad-flag: no",
    ):
        assert sum(words in text for text in said) == 1


def test_without_the_flag_it_is_checked_as_if(judge: Judge) -> None:
    found = judge(f"{GPT} --moe-router-fusion")
    assert any("no --moe-router-type: checked as if" in text for text in texts(found, NOTE))
    assert len(texts(found, REFUSED)) == 1


def test_top_k_is_judged_by_megatron_alone(judge: Judge) -> None:
    topk = f"{GPT} --moe-router-fusion --moe-router-type topk"
    found = judge(topk)
    assert texts(found, REFUSED) == []
    assert "none refused by Megatron's own checks" in texts(found, OK)
    assert len(texts(judge(f"{topk} --hidden-size 66"), REFUSED)) == 1


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--moe-et-pool planet", "argument --moe-et-pool: invalid choice: 'planet'"),
        ("--num-layers many", "argument --num-layers: invalid int value: 'many'"),
        ("--yaml-cfg run.yaml", "--yaml-cfg cannot be combined"),
        ("--moe-et-ema-decay 1", "--moe-et-ema-decay is 1.0"),
        ("--seq-length 3 --max-position-embeddings 4", "a micro-batch has 3 tokens on a rank"),
        ("--hidden-size 66", "Megatron's own checks, with this shell's environment variables: "),
        ("stray", "stray: belongs to no flag"),
    ],
)
def test_what_is_wrong_is_said_once(flag: str, sentence: str, judge: Judge) -> None:
    (said,) = texts(judge(f"{ET} {flag}"), REFUSED)
    assert said.startswith(sentence)


def test_a_map_that_cannot_be_padded_is_refused(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron takes the flag in FP8 only, and that with Transformer Engine only: a stand-in refuses here."""

    def refuse(_: argparse.Namespace) -> None:
        raise ConfigError("48 tokens cannot be padded")

    monkeypatch.setattr(flags.arguments, "check_padding", refuse)
    assert texts(judge(ET), REFUSED) == ["48 tokens cannot be padded"]


def test_megatrons_own_refusal_names_the_place(judge: Judge) -> None:
    (said,) = texts(judge(f"{ET} --hidden-size 66"), REFUSED)
    assert said.endswith(")")
    assert ".py:" in said


def test_a_scripts_own_flags_may_be_right(judge: Judge) -> None:
    found = judge(f"{ET} --team-flag 3", script="/x/pretrain_gpt.py")
    assert texts(found, REFUSED) == []
    assert any(
        "--team-flag: no flag of this Megatron. Right only if pretrain_gpt.py" in t
        for t in texts(found, NOTE)
    )


@pytest.mark.parametrize(
    ("flags_given", "sentence"),
    [
        (
            "--moe-et-ema-decays 0.9",
            "--moe-et-ema-decays: no flag of this Megatron or this package: did you mean --moe-et-ema-decay?",
        ),
        (
            "--num-expertz=3",
            "--num-expertz: no flag of this Megatron or this package: did you mean --num-experts?",
        ),
        ("--moe-et-speed 3", "--moe-et-speed: no flag of this Megatron or this package"),
        ("--moe-router-speed 3", "--moe-router-speed: no flag of this Megatron or this package"),
    ],
)  # fmt: skip
def test_a_misspelt_flag_is_refused_with_a_script_too(flags_given: str, sentence: str, judge: Judge) -> None:
    found = judge(f"{ET} --team-flag 3 {flags_given}", script="/x/pretrain_gpt.py")
    assert texts(found, REFUSED) == [sentence]
    assert sum("--team-flag: no flag" in text for text in texts(found, NOTE)) == 1


FLEX = f"{ET} --num-experts 256 --moe-token-dispatcher-type flex --moe-permute-fusion"
HYBRIDEP = " --moe-flex-dispatcher-backend hybridep"


@pytest.mark.parametrize(
    ("backend", "body", "mark", "words"),
    [
        ("", None, REFUSED, "needs DeepEP, and the package deep_ep is not installed here: Megatron stops"),
        (HYBRIDEP, None, REFUSED, "needs HybridEP, and the package deep_ep is not installed here"),
        (HYBRIDEP, "", REFUSED, "DeepEP that is installed here has no HybridEPBuffer"),
        ("", "hidden", NOTE, "DeepEP is installed and could not be imported here"),
        (HYBRIDEP, "class HybridEPBuffer: ...", None, ""),
        ("", "", None, ""),
    ],
)
def test_a_dispatcher_without_its_package(
    backend: str,
    body: str | None,
    mark: str | None,
    words: str,
    judge: Judge,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "deep_ep", raising=False)
    if body == "hidden":
        monkeypatch.setitem(sys.modules, "deep_ep", None)
    elif body is None:
        monkeypatch.setattr(packages, "installed", lambda _: False)
    else:
        (tmp_path / "deep_ep.py").write_text(body)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
    found = [
        finding for finding in judge(FLEX + backend) if "--moe-token-dispatcher-type flex" in finding.text
    ]
    monkeypatch.delitem(sys.modules, "deep_ep", raising=False)
    assert [finding.mark for finding in found] == ([mark] if mark else [])
    assert all(words in finding.text for finding in found)


def test_the_bound_that_start_up_sets_is_shown(judge: Judge) -> None:
    (told,) = [text for text in texts(judge(FLEX), OK) if text.startswith("set at start-up: ")]
    assert "moe_router_score_function=sigmoid" in told
    assert "moe_et_max_fanout=32 (DeepEP has 32 slots a token)" in told


@pytest.mark.parametrize(
    ("parallel", "processes"),
    [
        ("", 1),
        ("--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2", 4),
        ("--expert-model-parallel-size 4 --pipeline-model-parallel-size 2", 8),
        ("--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 4"
         " --expert-tensor-parallel-size 1", 4),
    ],
)  # fmt: skip
def test_the_fewest_processes_are_assumed(parallel: str, processes: int, judge: Judge) -> None:
    found = judge(f"{ET} {parallel}")
    assert any(f"{processes} process" in text for text in texts(found, NOTE))
    assert texts(found, REFUSED) == []


def test_a_global_pool_counts_all_processes(judge: Judge) -> None:
    line = f"{ET} --seq-length 3 --max-position-embeddings 4 --moe-et-pool global"
    assert len(texts(judge(line, world_size=1), REFUSED)) == 1
    assert texts(judge(line, world_size=2), REFUSED) == []


def test_a_warmup_that_never_ends_is_a_note(judge: Judge) -> None:
    found = judge(ET.replace("5000", "100"))
    assert texts(found, REFUSED) == []
    assert any("the run ends after 100" in text for text in texts(found, NOTE))


def test_without_flags_every_refusal_is_listed(judge: Judge) -> None:
    found = judge("")
    labels = {finding.label for finding in found}
    assert {rule.flag for rule in REFUSALS} <= labels
    assert {"--yaml-cfg", "--moe-et-pool global with a CUDA graph of moe_router"} <= labels
    (bound,) = [finding.text for finding in found if finding.label == "--moe-et-max-fanout"]
    assert "DeepEP has 32 slots a token" in bound
    assert texts(found, REFUSED) == []
    # The bins, its usage, its batches at a bound, odd logits and one more fan-out, of 4 bytes each.
    said = f"{4 * (Histogram(1).bins + 4)} bytes all-reduced per global batch (one call for all layers)"
    assert any(said in finding.text for finding in found)


# --- sizes ---


class Group:
    """A process group of two ranks."""

    def size(self) -> int:
        return 2


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every all-reduce."""
    calls: list[int] = []

    def all_reduce(tensor: torch.Tensor, **_: Any) -> None:
        calls.append(tensor.numel() * tensor.element_size())

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    return calls


@pytest.mark.parametrize(("experts", "routers"), [(8, 1), (33, 3)])
def test_the_traffic_is_what_the_reduction_sends(experts: int, routers: int, sent: list[int]) -> None:
    real: list[Any] = [
        SimpleNamespace(statistics=RouterStatistics(experts, 2), tp_dp_cp_group=Group())
        for _ in range(routers)
    ]
    start_reduction(real)
    assert sent == [sizes.router_bytes(experts, 2).reduced * routers]


@pytest.mark.parametrize("bounds", [1, 2])
def test_the_traffic_of_a_global_pool(bounds: int, sent: list[int]) -> None:
    logits_TE = torch.randn(20, 5)
    kth_largest_of_parts(logits_TE, lambda total: [total // 2] * bounds, torch.distributed.all_reduce)
    assert len(sent) == sizes.pool_calls()
    assert sum(sent) == sizes.pool_bytes(5, bounds)


# One real router, of Megatron's MoE layer: what it keeps, and which of it is saved.
ROUTER = """
import json
from megatron_et.run import cpu
cpu.install()
from tests.distributed import layers
layers.start()
router = layers.moe_layer(et={}).router
state = router.state_dict()
size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
held = {t.data_ptr(): t for part in (router.statistics, router.statistics._histogram)
        for t in vars(part).values() if hasattr(t, "data_ptr") and t.numel()}
del held[router.statistics._histogram.centers_E.data_ptr()]  # the thresholds' cutoffs, once it counts
answer = [size(state[key] for key in router.state_keys("")), size(held.values())]
print("ANSWER", layers.EXPERTS, layers.TOPK, json.dumps(answer))
"""


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a new process on the CPU backend."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        env={**inherited, "MEGATRON_ET_CPU": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_the_memory_is_what_a_router_keeps() -> None:
    world = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ran = run("-c", ROUTER, **world)
    assert ran.returncode == 0, ran.stderr[-3000:]
    _, experts, topk, answer = ran.stdout[ran.stdout.index("ANSWER") :].split(" ", 3)
    said = sizes.router_bytes(int(experts), int(topk))
    assert [said.saved, said.accumulated] == json.loads(answer)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (8200, "8.01 KiB"), (3 * 2**30, "3 GiB")]
)
def test_sizes_are_readable(size: int, text: str) -> None:
    assert sizes.readable(size) == text


# --- layers ---


def args_of(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"num_layers": None, "moe_layer_freq": 1} | given)


@pytest.mark.parametrize(
    ("given", "decoder", "heads"),
    [
        ({"num_layers": 3}, [1, 1, 1], 0),
        ({"num_layers": 5, "moe_layer_freq": 2, "mtp_num_layers": 2}, [1, 0, 1, 0, 1], 2),
        ({"num_layers": 3, "moe_layer_freq": [0, 1, 0], "mtp_num_layers": 2}, [0, 1, 0], 0),
        ({"num_layers": 2, "mtp_num_layers": 3, "mtp_use_repeated_layer": True}, [1, 1], 1),
        ({"hybrid_override_pattern": "M*E-"}, [0, 0, 1, 0], 0),
        ({"hybrid_layer_pattern": "ME|*E/EE/EE", "mtp_num_layers": 2}, [0, 1, 0, 1], 4),
    ],
)
def test_moe_layers_are_counted(given: dict[str, Any], decoder: list[int], heads: int) -> None:
    args = args_of(**given)
    assert layers.known(args)
    assert layers.decoder(args) == list(map(bool, decoder))
    assert layers.prediction_heads(args) == heads


def test_without_layers_nothing_is_known() -> None:
    assert not layers.known(args_of())


@pytest.mark.parametrize(
    "settings",
    [
        {"pipeline_model_parallel_size": 1},
        {"pipeline_model_parallel_size": 3},
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3},
        {"pipeline_model_parallel_size": 3, "num_layers_in_first_pipeline_stage": 2},
    ],
)
@pytest.mark.parametrize("frequency", [1, 2, [0, 0, 0, 1, 0, 1, 1, 1, 0, 0, 1, 1]])
def test_stages_hold_what_megatron_builds(settings: dict[str, Any], frequency: int | list[int]) -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    depth = 12
    config = TransformerConfig(
        num_layers=depth, hidden_size=16, num_attention_heads=2, num_moe_experts=8, moe_layer_freq=frequency,
        moe_ffn_hidden_size=16, pipeline_dtype=torch.float32, add_bias_linear=False, **settings,
    )  # fmt: skip
    expected = []
    for stage in range(config.pipeline_model_parallel_size):
        built = 0
        for vp_stage in range(config.virtual_pipeline_model_parallel_size or 1):
            virtual = vp_stage if config.virtual_pipeline_model_parallel_size else None
            block = get_gpt_decoder_block_spec(config, False, vp_stage=virtual, pp_rank=stage)
            built += sum(MoELayer is _module(layer.submodules.mlp) for layer in block.layer_specs)
        expected.append(built)
    assert layers.per_stage(args_of(num_layers=depth, moe_layer_freq=frequency), config) == expected


@pytest.mark.parametrize(
    ("layout", "virtual", "expected"),
    [("Et*7|t*5L", None, [4, 2]), ("Ett|ttt|ttt|ttttmL", 2, [3, 4]), ("Ett|ttt|tttm|ttttL", 2, [4, 3])],
)
def test_a_layout_says_where_layers_and_heads_are(
    layout: str, virtual: int | None, expected: list[int]
) -> None:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    parsed = PipelineParallelLayerLayout.from_str(layout, 2)
    config = SimpleNamespace(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_model_parallel_layout=parsed,
    )
    frequency = [1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 1, 1]
    args = args_of(num_layers=12, moe_layer_freq=frequency, mtp_num_layers=1 if "m" in layout else None)
    assert layers.per_stage(args, config) == expected


def _module(spec: Any) -> Any:
    """What a spec builds; a partial function in later versions."""
    return getattr(spec, "module", None) or getattr(spec, "func", spec)


def test_hybrid_segments_take_turns() -> None:
    config = SimpleNamespace(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        pipeline_model_parallel_layout=None,
    )
    args = args_of(hybrid_layer_pattern="ME|EE|MM|E*/E", mtp_num_layers=1)
    assert layers.per_stage(args, config) == [1, 4]


# --- all of it ---


@needs_training
def test_the_whole_command() -> None:
    """From the shell, on the CPU backend, with one refusal: the exit status, and no traceback."""
    ran = run(
        "-m", "megatron_et.cli", "check", *GPT.split(), "--moe-et-pool", "global", "--moe-router-fusion"
    )
    assert ran.stderr == ""
    assert ran.returncode == 1
    said = ran.stdout.splitlines()
    assert [line for line in said if line and not line.startswith(" ")] == [
        "environment", "Megatron", "seams", "flags", "statistics", "1 finding(s) marked REFUSED",
    ]  # fmt: skip
    assert max(len(line) for line in said if "/" not in line) <= 80
    words = " ".join(ran.stdout.split())
    assert "--moe-router-fusion cannot be combined with Expert Threshold routing" in words
    assert "ok layer MoELayer.__init__," in words
    assert "ok step training.train_step" in words
    reduced = sizes.readable(6 * sizes.router_bytes(8, 2).reduced)
    assert f"over tensor, context and data parallel ranks: {reduced} in one call" in words
