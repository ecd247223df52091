"""`make gpu-check` without a GPU: which rows of docs/verified.md change, and what a JUnit report says."""

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.megatron_free

ROOT = Path(__file__).resolve().parents[3]


def load() -> ModuleType:
    """The script, which is in no package."""
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / ".ci" / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


gpu_check = load()
Row = gpu_check.Row

H100 = ("1 x H100, driver 580", "torch 2.11, no TE")
EMPTY = f"# Seen\n\nBefore.\n\n{gpu_check.BEGIN}\n{gpu_check.END}\n\nAfter | with a bar.\n"


def row(feature: str, result: str = "passed", *, hardware: str = H100[0], versions: str = H100[1]) -> Any:
    return Row(feature, hardware, versions, "2026-11-24", "abc1234", result)


def rows(document: str) -> list[Any]:
    return gpu_check.read_rows(gpu_check.table_of(document)[1])


def test_rows_survive_writing_and_reading() -> None:
    written = [row("fp8 | blockwise"), row("ties", "failed 1 of 2: a\n  b")]
    document = gpu_check.updated(EMPTY, written)
    assert rows(document) == [written[0], row("ties", "failed 1 of 2: a b")]
    assert document.startswith("# Seen\n\nBefore.\n\n")
    assert document.endswith("\n\nAfter | with a bar.\n")
    assert "| feature | hardware | versions | date | commit | result |\n| --- |" in document
    # A table needs an empty line before it.
    assert f"{gpu_check.BEGIN}\n\n| feature" in document


def test_a_row_seen_again_is_replaced_and_all_others_stay() -> None:
    other_gpu = row("rule", hardware="1 x A100, driver 550")
    other_torch = row("rule", versions="torch 2.10, no TE")
    document = gpu_check.updated(EMPTY, [other_gpu, row("rule"), other_torch, row("layer")])
    document = gpu_check.updated(document, [row("new"), row("rule", "failed 1 of 3: x")])
    assert rows(document) == [
        other_gpu,
        row("rule", "failed 1 of 3: x"),
        other_torch,
        row("layer"),
        row("new"),
    ]


def test_writing_the_same_rows_again_changes_nothing() -> None:
    once = gpu_check.updated(EMPTY, [row("rule"), row("layer")])
    assert gpu_check.updated(once, [row("layer"), row("rule")]) == once
    assert gpu_check.updated(once, []) == once


@pytest.mark.parametrize("document", ["", gpu_check.BEGIN, gpu_check.END + gpu_check.BEGIN, EMPTY + EMPTY])
def test_missing_or_doubled_markers_are_an_error(document: str) -> None:
    with pytest.raises(ValueError, match="one pair of lines"):
        gpu_check.updated(document, [row("rule")])


def test_the_document_has_the_markers() -> None:
    gpu_check.table_of(gpu_check.VERIFIED.read_text())


def case(name: str, feature: str | None, inside: str = "") -> str:
    properties = f'<properties><property name="feature" value="{feature}"/></properties>' if feature else ""
    return f'<testcase name="{name}">{properties}{inside}</testcase>'


def test_results_of_a_report() -> None:
    failure, error = '<failure message="x"/>', '<error message="y"/>'
    skipped = '<skipped message="no FP8"/>'
    report = ElementTree.fromstring(
        "<testsuites><testsuite>"
        + case("test_rule[a]", "rule")
        + case("test_rule[b]", "rule")
        + case("test_layer[a]", "layer")
        + case("test_layer[b]", "layer", failure)
        + case("test_layer[c]", "layer", error)
        + case("test_fp8", "FP8", skipped)
        + case("test_some[a]", "some", skipped)
        + case("test_some[b]", "some")
        + case("test_many", "many", failure) * 6
        + case("tests.gpu.test_broken", None, error)
        + "</testsuite></testsuites>"
    )
    assert gpu_check.results(report) == {
        "rule": "passed (2 tests)",
        "layer": "failed 2 of 3: b, c",
        "FP8": "skipped: no FP8",
        "some": "passed, 1 skipped: no FP8",
        "many": "failed 6 of 6: test_many, test_many, test_many, test_many and 2 more",
        "tests.gpu.test_broken": "failed 1 of 1: tests.gpu.test_broken",
    }


def test_without_a_gpu_it_says_so_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "verified.md"
    document.write_text(EMPTY)
    monkeypatch.setattr(gpu_check, "VERIFIED", document)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert document.read_text() == EMPTY
    assert "sees no CUDA GPU: nothing was run" in capsys.readouterr().err


PYTEST = """
import sys
from pathlib import Path
report = next(word for word in sys.argv if word.startswith("--junitxml=")).partition("=")[2]
Path(report).write_text(REPORT)
sys.exit(1)
"""


@pytest.fixture
def gpu_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of the project's layout in which `python -m pytest` writes a report with one failure."""
    report = "<testsuite>" + case("test_rule[a]", "rule", "<failure/>") + "</testsuite>"
    (tmp_path / "pytest.py").write_text(PYTEST.replace("REPORT", repr(report)))
    (tmp_path / "docs").mkdir()
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    for name in ("test_one.py", "test_two.py"):
        (tmp_path / "tests" / "gpu" / name).write_text("")
    (tmp_path / "docs" / "verified.md").write_text(EMPTY)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "VERIFIED", tmp_path / "docs" / "verified.md")
    monkeypatch.setattr(gpu_check, "REPORT", tmp_path / "runs" / "gpu-check.xml")
    monkeypatch.setattr(gpu_check, "why_no_gpu", lambda: None)
    monkeypatch.setattr(gpu_check, "hardware", lambda: H100[0])
    monkeypatch.setattr(gpu_check, "versions", lambda: H100[1])
    # An outer repository must not answer for this folder.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


def test_a_failure_is_recorded_and_is_the_exit_status(gpu_machine: Path) -> None:
    assert gpu_check.main(["--commit", "f00"]) == 1
    (found,) = rows((gpu_machine / "docs" / "verified.md").read_text())
    assert (found.feature, found.result, found.commit) == ("rule", "failed 1 of 1: a", "f00")


def test_every_file_is_recorded_when_it_has_ended(gpu_machine: Path) -> None:
    """The second file takes the process down: the first one's row stays."""
    script = gpu_machine / "pytest.py"
    script.write_text(
        "import sys\nif 'tests/gpu/test_two.py' in sys.argv: sys.exit(3)\n" + script.read_text()
    )
    assert gpu_check.main(["--commit", "f00"]) == 3
    assert [found.feature for found in rows((gpu_machine / "docs" / "verified.md").read_text())] == ["rule"]


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        ({"test_two.py": "os.kill(os.getpid(), 9)"}, -9),
        ({"test_two.py": "sys.exit(5)"}, 0),
        ({"test_one.py": "sys.exit(5)", "test_two.py": "sys.exit(5)"}, 5),
        ({"test_one.py": "sys.exit(2)", "test_two.py": "os.kill(os.getpid(), 9)"}, -9),
    ],
)
def test_the_exit_status_of_all_files(gpu_machine: Path, ends: dict[str, str], status: int) -> None:
    """A crash is no success, and neither is a run without any test; a file that -k leaves empty is fine."""
    lines = [f"if 'tests/gpu/{name}' in sys.argv: {end}" for name, end in ends.items()]
    (gpu_machine / "pytest.py").write_text("\n".join(["import os, sys", *lines, "sys.exit(0)"]))
    assert gpu_check.main(["--commit", "f00"]) == status


def test_reports_of_other_runs_are_recorded(gpu_machine: Path) -> None:
    reports = []
    for name in ("a", "b"):
        reports.append(gpu_machine / f"{name}.xml")
        reports[-1].write_text("<testsuite>" + case(f"test_rule[{name}]", "rule") + "</testsuite>")
    assert gpu_check.main(["--commit", "f00", "--record", *map(str, reports)]) == 0
    (found,) = rows((gpu_machine / "docs" / "verified.md").read_text())
    assert found.result == "passed (2 tests)"
    assert not (gpu_machine / "runs").exists()


def test_missing_markers_are_found_before_anything_runs(
    gpu_machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (gpu_machine / "docs" / "verified.md").write_text("no markers")
    assert gpu_check.main([]) == 1
    assert "one pair of lines" in capsys.readouterr().err
    assert not (gpu_machine / "runs").exists()


def test_commit_names_head_and_whether_the_tree_is_dirty(gpu_machine: Path) -> None:
    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org", *words]
        return subprocess.run(command, cwd=gpu_machine, check=True, capture_output=True, text=True).stdout

    assert gpu_check.commit() == "unknown"
    git("init", "-q")
    assert gpu_check.commit() == "unknown"
    git("add", ".")
    git("commit", "-qm", "all")
    head = git("rev-parse", "--short", "HEAD").strip()
    assert gpu_check.commit() == head
    (gpu_machine / "docs" / "verified.md").write_text("new rows")
    assert gpu_check.commit() == head
    (gpu_machine / "new.py").write_text("")
    assert gpu_check.commit() == f"{head}-dirty"


def test_gpu_tests_name_their_features_and_skip_without_a_gpu(tmp_path: Path) -> None:
    """The report that a machine without a GPU writes of the real tests."""
    report = tmp_path / "report.xml"
    options = ["-q", "-p", "no:cacheprovider", "-m", "gpu", "-o", "junit_family=xunit1"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", "tests/gpu"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    found = gpu_check.results(ElementTree.parse(report).getroot())
    assert all(result.startswith("skipped: ") for result in found.values()), found
    assert "Training: TEGroupedMLP, alltoall, permute fusion, FP8 blockwise" in found
    assert "MoELayer against the dense formula: TEGroupedMLP, alltoall, permute fusion" in found
    assert not [feature for feature in found if feature.startswith("test_") or "{" in feature]
