"""A wheel of this package, used outside the tree: train, check, report."""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.runs import ET_ARGS, GPT_ARGS
from tests.launch import ROOT, TAIL, cpu_environment, free_port
from tests.megatron_here import needs_training

pytestmark = [pytest.mark.distributed, needs_training]

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Runs Python in an empty folder where the wheel's files, and none of the tree's, are imported."""
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: setuptools would leave its build folder, and an older one's files, in the tree.
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True)
    names = tracked.stdout.decode().splitlines() if tracked.returncode == 0 else []
    names = names or [str(path.relative_to(ROOT)) for path in (ROOT / "megatron_et").rglob("*.*")]
    for name in {*names, "pyproject.toml", "README.md", "LICENSE"}:
        if name.startswith("megatron_et/") or "/" not in name:
            source, copy = ROOT / name, folder / "tree" / name
            if source.is_file():
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(source.read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*pip, "-w", folder, folder / "tree"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-TAIL:]
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(folder / "installed")
    (folder / "work").mkdir()

    def python(*words: str) -> subprocess.CompletedProcess[str]:
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return subprocess.run(
            [sys.executable, "-W", "ignore", *words],
            cwd=folder / "work",
            env=cpu_environment() | rank | where | {"PYTHONPATH": str(folder / "installed")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
        )

    return python


def test_the_wheel_holds_all_that_the_tree_does(outside: Command) -> None:
    code = "import megatron_et, pathlib; root = pathlib.Path(megatron_et.__file__).parent;"
    code += "print(root); print(*sorted(str(p.relative_to(root)) for p in root.rglob('*.*')))"
    root, files = outside("-c", code).stdout.splitlines()[-2:]
    assert Path(root).parent.name == "installed"
    tree = {str(p.relative_to(ROOT / "megatron_et")) for p in (ROOT / "megatron_et").rglob("*.*")}
    of_python = {name for name in tree if "__pycache__" not in name}
    assert of_python == {name for name in files.split() if "__pycache__" not in name}
    assert "rule/kernels/route.cu" in of_python


def test_train_check_and_report_from_the_wheel(outside: Command) -> None:
    trained = outside(
        *("-m", "megatron_et.pretrain_gpt", *GPT_ARGS, *ET_ARGS, "--train-iters", "6", "--eval-iters", "0"),
        *("--moe-et-trace-dir", "run", "--tensorboard-dir", "run/tensorboard", "--mock-data"),
    )
    assert trained.returncode == 0, trained.stdout[-TAIL:]
    assert "kernels: torch (rank 0: there is no GPU" in trained.stdout
    checked = outside("-m", "megatron_et.cli", "check", *ET_ARGS, *GPT_ARGS)
    assert checked.returncode == 0, checked.stdout[-TAIL:]
    reported = outside("-m", "megatron_et.cli", "report", "run")
    assert reported.returncode == 0, reported.stdout[-TAIL:]
    assert "run/report/report.html" in reported.stdout
