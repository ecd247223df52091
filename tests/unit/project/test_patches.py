"""patches/: what the patches add, and the logic of the commands that check them on the user's Megatron-LM.

The sources that the patches are for are not in this repository: `make check-patches` applies them to those.
Here they are applied to a stand-in with the same lines at the same place.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from patches import check, trial

HOOK = """\
# Adds --moe-router-type expert-threshold. Not in checkpoint writers: they import this file again.
if __name__ == "__main__":
    from megatron_et.run.launch import prepare_process

    prepare_process()

"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FIELDS = re.compile(r"^@@ -(\d+),(\d+) \+(\d+),(\d+) @@$")


def test_the_readme_counts_the_lines() -> None:
    code = [line for line in HOOK.splitlines() if line and not line.startswith("#")]
    assert len(code) == 3
    readme = " ".join((trial.PATCHES / "README.md").read_text().split())
    assert "adds three lines of code under a comment" in readme
    assert "is three lines to put in by hand" in readme


def files_of(tag: str) -> dict[str, list[str]]:
    """File -> hunk lines with the @@ line first."""
    text = (trial.PATCHES / f"{tag}.patch").read_text()
    _, *files = re.split(r"^diff --git ", text, flags=re.MULTILINE)
    return {
        part.split()[0].removeprefix("a/"): [
            line for line in part.splitlines()[1:] if line.startswith(("@@", "+", "-", " "))
        ][2:]
        for part in files
    }


@pytest.mark.parametrize("tag", trial.TAGS)
def test_a_patch_adds_the_hook_and_nothing_else(tag: str) -> None:
    header, _, _ = (trial.PATCHES / f"{tag}.patch").read_text().partition("diff --git")
    assert re.search(rf"Megatron-LM {re.escape(tag)}, commit [0-9a-f]{{40}}\.", header)
    files = files_of(tag)
    hybrid = "pretrain_mamba.py" if tag < "core_v0.18" else "pretrain_hybrid.py"
    assert set(files) == {"pretrain_gpt.py", hybrid}
    for lines in files.values():
        assert len([line for line in lines if line.startswith("@@")]) == 1
        assert "".join(f"{line[1:]}\n" for line in lines if line.startswith("+")) == HOOK
        assert not [line for line in lines if line.startswith("-")]
        # Upstream's text: the empty line before and the first import of Megatron after, no more.
        before, after = (line[1:] for line in lines if line.startswith(" "))
        assert before == ""
        assert re.fullmatch(r"from (gpt|mamba|hybrid)_builders import \w+", after)


def stand_in(tag: str, folder: Path) -> None:
    """Scripts with the lines of context where a patch expects them; a neighbour shows sys.argv."""
    for name, lines in files_of(tag).items():
        header = FIELDS.match(lines[0])
        assert header is not None
        script = ["# filler"] * (int(header[1]) - 1) + [line[1:] for line in lines if line.startswith(" ")]
        (folder / name).write_text("\n".join(script) + "\n")
        builders, function = re.findall(r"from (\w+) import (\w+)", script[-1])[0]
        (folder / f"{builders}.py").write_text(f"import sys\nprint('ARGV', sys.argv)\n{function} = None\n")


@pytest.mark.parametrize("tag", trial.TAGS)
def test_a_patch_applies_below_a_foreign_repository_too(tag: str, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    folder = tmp_path / "sources"
    folder.mkdir()
    stand_in(tag, folder)
    check.apply(trial.PATCHES / f"{tag}.patch", folder)
    for name in files_of(tag):
        *_, last = (folder / name).read_text().splitlines()
        assert (folder / name).read_text().endswith(f"\n{HOOK}{last}\n")


def test_a_patch_for_other_sources_is_named(tmp_path: Path) -> None:
    stand_in("main", tmp_path)
    script = tmp_path / "pretrain_gpt.py"
    script.write_text(script.read_text().replace("from ", "from other."))
    with pytest.raises(
        trial.TrialError, match=r"git apply main\.patch: error: patch failed: pretrain_gpt\.py"
    ):
        check.apply(trial.PATCHES / "main.patch", tmp_path)


def run_patched(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "MEGATRON_ET_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def patched(tmp_path: Path) -> Path:
    """A folder with a patched stand-in."""
    stand_in("core_v0.19.0", tmp_path)
    check.apply(trial.PATCHES / "core_v0.19.0.patch", tmp_path)
    return tmp_path


@pytest.mark.parametrize("launcher", [[], ["-m", "megatron_et"]], ids=["itself", "with the launcher"])
def test_a_patched_script_is_prepared_once_and_before_megatron(patched: Path, launcher: list[str]) -> None:
    ran = run_patched(patched, *launcher, "pretrain_gpt.py", "--num-workers", "2")
    assert ran.returncode == 0, ran.stderr[-3000:]
    (argv,) = [line for line in ran.stdout.splitlines() if line.startswith("ARGV")]
    assert argv.count("'--distributed-backend'") == 1
    assert argv.endswith("'--num-workers', '2']")


def test_a_checkpoint_writer_that_imports_a_patched_script_prepares_nothing(patched: Path) -> None:
    again = "import runpy, sys; runpy.run_path('pretrain_gpt.py', run_name='__mp_main__'); "
    ran = run_patched(patched, "-c", f"{again} print([m for m in sys.modules if m.startswith('mega')])")
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout == "ARGV ['pretrain_gpt.py']\n[]\n"


# ---- the commands ----------------------------------------------------------------------------------------


@pytest.fixture
def megatron(tmp_path: Path) -> Path:
    """A repository with the shape of Megatron-LM's, one tag, one branch, and work in progress."""
    folder = tmp_path / "Megatron-LM"
    files = {
        "pretrain_gpt.py": "committed\n",
        "pretrain_hybrid.py": "",
        "megatron/core/datasets/Makefile": "",
        "megatron/training/arguments.py": "add_argument('--hybrid-layer-pattern')\n",
        "docs/big.md": "",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for command in (
        ("init", "-q", "-b", "trunk"),
        ("add", "."),
        (*who, "commit", "-q", "-m", "first"),
        ("tag", "core_v0.19.0"),
        (*who, "commit", "-q", "--allow-empty", "-m", "second"),
        ("branch", "core_v0.18.2"),
    ):
        assert trial.git(folder, *command).returncode == 0
    (folder / "pretrain_gpt.py").write_text("work in progress\n")
    return folder


def revision(repository: Path, name: str) -> str:
    return trial.git(repository, "rev-parse", name).stdout.strip()


def test_tags_are_tags_and_main_is_what_the_user_says(megatron: Path) -> None:
    first, second = revision(megatron, "trunk~1"), revision(megatron, "trunk")
    assert trial.commit_of(megatron, "core_v0.19.0") == first
    assert trial.commit_of(megatron, "core_v0.18.2") is None  # a branch
    assert trial.commit_of(megatron, "main") == second  # HEAD
    assert trial.commit_of(megatron, "main", "trunk~1") == first
    assert trial.commit_of(megatron, "main", "nowhere") is None
    trial.git(megatron, "branch", "origin/main", first)
    assert trial.commit_of(megatron, "main") == second  # still HEAD
    trial.git(megatron, "branch", "main", first)
    assert trial.commit_of(megatron, "main") == first
    trial.git(megatron, "update-ref", "refs/remotes/origin/main", second)
    assert trial.commit_of(megatron, "main") == second


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands write their logs."""
    monkeypatch.setattr(trial, "ROOT", tmp_path)
    return tmp_path / "runs" / "a-check"


def test_every_tag_gets_its_line_and_one_failure_fails(
    megatron: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = {}

    def checked(folder: Path, tag: str, logs: Path) -> list[str]:
        seen[tag] = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        assert (folder / "pretrain_gpt.py").read_text() == "committed\n"
        assert trial.hybrid_args(folder)[3] == "--hybrid-layer-pattern"
        assert trial.hybrid_scripts(folder) == ["pretrain_hybrid.py"]
        assert logs == runs / tag
        return [] if tag == "main" else ["the loss rose", "it is late"]

    argv = ["--megatron", str(megatron), "--tags", "core_v0.18.2", "main"]
    assert trial.main("a-check", "", checked, argv) == 0
    assert trial.main("a-check", "", checked, [*argv, "core_v0.19.0"]) == 1
    said = capsys.readouterr().out.splitlines()
    skipped = f"core_v0.18.2   skipped: {megatron} has no core_v0.18.2"
    good = f"main           {revision(megatron, 'trunk')} ok"
    bad = f"core_v0.19.0   {revision(megatron, 'trunk~1')} FAILED: the loss rose; it is late (logs in "
    assert said[:4] == [skipped, good, skipped, good]
    assert said[4].startswith(bad)
    # The installed wheel's compiled helper took the Makefile's place; docs/ stayed behind.
    helper = [file for file in seen["main"] if file.startswith("megatron/core/datasets/helpers_cpp")]
    scripts = ["local_hybrid_spec.py", "pretrain_gpt.py", "pretrain_hybrid.py"]
    assert seen["main"] == sorted([*scripts, *helper, "megatron/training/arguments.py"])
    assert len(helper) == 1
    # The checkout is as it was.
    assert trial.git(megatron, "status", "--porcelain").stdout == " M pretrain_gpt.py\n"
    assert (megatron / "pretrain_gpt.py").read_text() == "work in progress\n"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "usage: make a-check MEGATRON=/path/to/Megatron-LM"),
        (["--megatron", "nowhere"], "MEGATRON=nowhere is not a folder\nusage: make a-check MEGATRON="),
        (["--megatron", "{empty}"], "is no git repository: fatal: not a git repository"),
        (["--megatron", "{megatron}", "--tags", "core_v0.17.1"], "nothing was checked: "),
    ],
)
def test_nothing_to_check_is_a_sentence(
    argv: list[str],
    sentence: str,
    megatron: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty = tmp_path_factory.mktemp("empty")
    filled = [arg.format(empty=empty, megatron=megatron) for arg in argv]
    assert trial.main("a-check", "", lambda *_: pytest.fail("checked"), filled) == 2
    assert sentence in capsys.readouterr().err


# ---- judging a run ---------------------------------------------------------------------------------------

SAID = "[megatron_et] CPU run: Megatron flags added: --distributed-backend gloo\n"
STEPS = " [now] iteration        1/       2 | loss |\n [now] iteration        2/       2 | loss |\n"
PHASES = "".join(
    f" [megatron_et] iteration        {i} | phase {phase} | fan-out mean 2.0\n"
    for i, phase in ((1, "warmup"), (2, "threshold"))
)
SAVED = b"x,decoder.layers.1.mlp.router.thresholds.num_updates y,mtp.layers.0.router.thresholds.num_updates"
GOOD = (0, SAID + STEPS + PHASES, SAVED)


@pytest.mark.parametrize(
    ("status", "output", "metadata", "problem"),
    [
        (*GOOD, None),
        (1, f"{GOOD[1]}[rank0]: ValueError: no experts\n", SAVED, "[rank0]: ValueError: no experts"),
        (7, GOOD[1], SAVED, "exit status 7"),
        (0, SAID + PHASES, SAVED, "logged iterations [] instead of 1 and 2"),
        (0, SAID + STEPS + PHASES.replace("threshold", "warmup"), SAVED, "instead of warmup and threshold"),
        (0, GOOD[1], b"", "0 routers saved thresholds instead of 2"),
        (0, SAID + GOOD[1], SAVED, "2 processes prepared themselves aloud instead of 1"),
    ],
)
def test_a_run_with_expert_threshold_routing(
    status: int, output: str, metadata: bytes, problem: str | None
) -> None:
    problems = trial.problems_of_et(trial.Run(status, output, metadata), 2)
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


@pytest.mark.parametrize(
    ("status", "output", "metadata", "problem"),
    [
        (0, STEPS, b"tensors", None),
        (2, "pretrain_gpt.py: error: wrong flag\n", b"", "pretrain_gpt.py: error: wrong flag"),
        (0, "", b"tensors", "logged iterations [] instead of 1 and 2"),
        (0, STEPS, b"", "saved no checkpoint"),
        (0, STEPS + PHASES, b"tensors", "routed by thresholds, unasked"),
        (0, STEPS, SAVED, "routed by thresholds, unasked"),
    ],
)
def test_a_run_with_topk(status: int, output: str, metadata: bytes, problem: str | None) -> None:
    assert trial.problems_of_topk(trial.Run(status, output, metadata)) == ([problem] if problem else [])


@pytest.mark.parametrize(
    ("status", "output", "problem"),
    [
        (
            1,
            "error: unrecognized arguments: --moe-router-type expert-threshold --moe-et-warmup-steps 1",
            None,
        ),
        (0, "", "--moe-router-type is known to the stock script"),
        (
            1,
            "ImportError: no torch",
            "it failed for another reason than the unknown flag: ImportError: no torch",
        ),
    ],
)
def test_a_run_without_the_patch(status: int, output: str, problem: str | None) -> None:
    assert check.problems_of_stock(trial.Run(status, output, b"")) == ([problem] if problem else [])
