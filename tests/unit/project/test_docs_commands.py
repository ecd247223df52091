"""Every command of the documents is in one class: executed by a test that is named here, read by the program
that it starts (its parser takes the words, nothing runs), or marked as needing what this machine has not.

A new command that nothing here knows fails with a sentence that says what to do.
"""

import argparse
import ast
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_et import cli
from megatron_et.host import arguments
from tests.documents import FLAGS, NEEDS, PAGES, ROOT, Block, Command, blocks, commands, need
from tests.megatron_here import HAS_TRAINING

# Megatron says at every import what is not installed.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

# Command line -> test file that executes it, and words in that file which show it.
EXECUTED = {
    r"pip install --no-deps /path/to/megatron_et": (
        "tests/unit/project/test_docs_commands.py",
        "def test_the_package_installs_without_its_dependencies",
    ),
    r"torchrun --nproc-per-node 2 examples/own_loop\.py": (
        "tests/distributed/test_own_loop.py",
        "examples/own_loop.py",
    ),
    r"python examples/dry_run\.py": ("tests/unit/project/test_examples.py", 'EXAMPLES / "dry_run.py"'),
    r"git apply /path/to/this/repository/patches/core_v0\.19\.0\.patch": (
        "tests/unit/project/test_patches.py",
        "check.apply(trial.PATCHES",
    ),
}
TAKE_NO_WORDS = (ROOT / "docs" / "flags.py", ROOT / "docs" / "picture.py")
"""Scripts that parse nothing, so that running them would do their work."""
CHECKOUTS_SCRIPTS = ("pretrain_gpt.py", "pretrain_hybrid.py", "pretrain_mamba.py")


# --- the programs that commands start ---


class _Parsed(Exception):
    """The program's parser took the words."""


@contextmanager
def _parsed_only() -> Iterator[None]:
    """The program that runs inside ends when it has parsed its command line; it must do so first of all."""
    inside = False

    def then_end(name: str) -> Callable[..., Any]:
        original = getattr(argparse.ArgumentParser, name)

        def parse(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:  # parse_args calls parse_known_args, and that a subcommand's
                return original(*args, **kwargs)
            inside = True
            try:
                original(*args, **kwargs)
            finally:
                inside = False
            raise _Parsed

        return parse

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_known_args"):
            patch.setattr(argparse.ArgumentParser, name, then_end(name))
        # Scripts put the repository on it, and so on.
        patch.setattr(sys, "path", list(sys.path))
        with pytest.raises(_Parsed):
            yield


def _make(words: Sequence[str]) -> None:
    """The targets exist, and the programs that they would start take the words that they would get."""
    dry = subprocess.run(
        ["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert dry.returncode == 0, dry.stderr
    for line in dry.stdout.replace("\\\n", " ").splitlines():
        start = re.search(r"(?:\.venv/bin/python|python3) (?:-m [a-z.]+|[\w./]+\.py)( .*)?$", line)
        if start is not None and "pytest" not in start[0]:
            _python(shlex.split(start[0])[1:])


def _megatron_et(words: Sequence[str]) -> None:
    if words[:1] == ["check"]:
        script = words[1:2]
        if script and not script[0].startswith("-") and script[0] != FLAGS:
            assert Path(script[0]).name in CHECKOUTS_SCRIPTS, f"{script[0]} is no training script"
        _training_flags([word for word in words[1:] if word not in script])
        return
    if len(words) == 1 and words[0] in cli.COMMANDS:  # a sentence about the command
        return
    with _parsed_only():
        cli.main([word for word in words if word != FLAGS])


def _torchrun(words: Sequence[str]) -> None:
    from torch.distributed.run import get_args_parser

    words = [re.sub(r"\$\{?\w+\}?", "1", word) for word in words]
    if not any(re.search(r"\.py$|^[A-Z]+$|^megatron_et", word) for word in words):
        words = [*words, "pretrain_gpt.py"]  # a sentence about torchrun's own flags
    given = get_args_parser().parse_args(words)
    rest = [given.training_script, *given.training_script_args]
    _python(["-m", *rest] if given.module else rest)


def _python(words: Sequence[str]) -> None:
    words = list(words)
    if words == ["-m", "megatron_et"]:  # a sentence about the launcher
        return
    if words[:2] == ["-m", "megatron_et"]:
        script, *flags = words[2:]
        assert script.isupper() or Path(script).name in CHECKOUTS_SCRIPTS or (ROOT / script).is_file(), script
        _training_flags(flags)
    elif words[:2] == ["-m", "megatron_et.pretrain_gpt"]:
        _training_flags(words[2:])
    elif words[:2] == ["-m", "torch.distributed.run"]:
        _torchrun(words[2:])
    elif words[0] in CHECKOUTS_SCRIPTS:
        _training_flags(words[1:])
    elif words[:1] == ["-m"]:
        spec = importlib.util.find_spec(words[1])
        assert spec is not None, f"there is no module {words[1]}"
        package = f"{words[1]}.__main__" if spec.submodule_search_locations else words[1]
        origin = importlib.util.find_spec(package)
        assert origin is not None, f"{words[1]} is no program"
        _script(Path(str(origin.origin)), words[1:], lambda: runpy.run_module(words[1], run_name="__main__"))
    else:
        path = ROOT / words[0]
        assert path.is_file(), f"there is no {words[0]}"
        _script(path, words, lambda: runpy.run_path(str(path), run_name="__main__"))


def _script(path: Path, words: Sequence[str], run: Callable[[], object]) -> None:
    if path in TAKE_NO_WORDS:
        assert not words[1:], f"{path.name} takes no words"
        return
    with pytest.MonkeyPatch.context() as patch, _parsed_only():
        patch.setattr(sys, "argv", list(words))
        run()


@cache
def _megatrons_parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return arguments.add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def _training_flags(flags: Sequence[str]) -> None:
    """Megatron's own parser with our flags takes them, and our own rules do not refuse what is there."""
    if not HAS_TRAINING:
        pytest.skip("this megatron-core has no megatron.training, whose parser it asks")
    given = [word for word in flags if word != FLAGS]
    model = [] if "--num-experts" in given else ["--num-experts", "8", "--moe-router-topk", "2"]
    args = _megatrons_parser().parse_args([*model, *given])
    arguments.prepare(args, arguments.explicit_names(list(given)))


def _srun(words: Sequence[str]) -> None:
    """The options of SLURM are not read, what it starts is."""
    rest = list(words)
    while rest and rest[0].startswith("-"):
        rest.pop(0)
    reader = rest and READERS.get(Path(rest[0]).name)
    assert reader, f"srun starts {' '.join(rest[:1])!r}, which no test reads"
    reader(rest[1:])


def _bash(words: Sequence[str]) -> None:
    """The script is there and bash can read it; what follows an example's name are training flags."""
    script, *rest = words
    assert (ROOT / script).is_file(), f"there is no {script}"
    checked = subprocess.run(["bash", "-n", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    if (ROOT / script).parent == ROOT / "examples":
        _training_flags(rest)


def _harmless(words: Sequence[str]) -> None:
    assert words


READERS: dict[str, Callable[[Sequence[str]], None]] = {
    "make": _make,
    "megatron-et": _megatron_et,
    "torchrun": _torchrun,
    "python": _python,
    "python3": _python,
    "srun": _srun,
    "bash": _bash,
    "cd": _harmless,
    "mkdir": _harmless,
}


# --- classes ---


def reader(command: Command) -> Callable[[], None] | None:
    """What reads the command's words; None where nothing here can."""
    program, *words = command.words
    if program.startswith("--"):
        return lambda: _training_flags(command.words)
    # srun before a program that nothing reads is a command that nothing reads.
    name = Path(program).name
    starts = next((word for word in words if not word.startswith("-")), "") if name == "srun" else name
    read = READERS.get(name) if Path(starts).name in READERS else None
    return None if read is None else lambda: read(words)


def classes(command: Command) -> list[str]:
    """Names of the classes that the command is in."""
    if not command.words:  # NAME=value alone
        return ["assignment"]
    found = []
    if any(re.fullmatch(pattern, " ".join(command.words)) for pattern in EXECUTED):
        found.append("executed")
    elif reader(command) is not None:
        found.append("read")
    if command.needs is not None and not found:
        found.append("marked")
    return found


ALL = [command for page in PAGES for command in commands(page)]


@pytest.mark.parametrize("command", ALL, ids=str)
def test_every_command_is_in_a_class(command: Command) -> None:
    assert len(classes(command)) == 1, (
        f"{command.page}:{command.line}: nothing tests `{' '.join(command.words)}`. Name the test that "
        "executes it in EXECUTED, add a reader of its words to READERS, or put "
        f"<!-- needs ({'|'.join(NEEDS)}): what for --> above its block. A block without commands is ```text."
    )
    if classes(command) == ["read"]:
        read = reader(command)
        assert read is not None
        read()


def test_marks_are_well_formed_and_needed() -> None:
    for page in PAGES:
        for block in blocks(page):
            if "<!-- needs" in block.above:
                assert need(block) in NEEDS, f"{block.page}:{block.line - 2}: {block.above}"
            if need(block) is not None:
                marked = [
                    c for c in commands(page) if block.line <= c.line <= block.line + block.text.count("\n")
                ]
                assert any(classes(command) == ["marked"] for command in marked), (
                    f"{block.page}:{block.line}: every command of the block is tested, take its mark away"
                )


@pytest.mark.parametrize("pattern", EXECUTED)
def test_the_named_tests_execute_them(pattern: str) -> None:
    file, words = EXECUTED[pattern]
    assert words in (ROOT / file).read_text()
    assert any(re.fullmatch(pattern, " ".join(command.words)) for command in ALL), (
        "no document has it any more"
    )


# --- the classes themselves ---


def _commands(text: str, tmp_path: Path) -> list[Command]:
    page = tmp_path / "page.md"
    page.write_text(text)
    return commands(page)


def test_commands_are_found_in_blocks_and_in_text(tmp_path: Path) -> None:
    text = """
Run `make test`, not `make`, or
`A=1 megatron-et report
RUN`.

```
cd /x && B=2 torchrun \\
    -m megatron_et pretrain_gpt.py <your flags> "${MOE[@]}"   # a comment, 'odd
make check-patches [TAGS='a b'] ...
```

```text
not a command
```

<!-- needs a cluster: SLURM -->
```sh
sbatch --nodes=8 job.sh
```

```
--lr 1
--bf16
```

```
it's no command
```
"""
    found = {
        (command.line, command.words, command.environment, command.needs)
        for command in _commands(text, tmp_path)
    }
    assert found == {
        (2, ("make", "test"), (), None),
        (3, ("megatron-et", "report", "RUN"), ("A=1",), None),
        (7, ("cd", "/x"), (), None),
        (7, ("torchrun", "-m", "megatron_et", "pretrain_gpt.py", FLAGS, FLAGS), ("B=2",), None),
        (9, ("make", "check-patches", "TAGS=a b"), (), None),
        (18, ("sbatch", "--nodes=8", "job.sh"), (), "a cluster"),
        (22, ("--lr", "1", "--bf16"), (), None),
        (27, ("it's no command",), (), None),
    }  # fmt: skip


WRONG = {
    "target": "make no-such-target",
    "target's arguments": 'make quickstart QUICKSTART_ARGS="--no-such-option"',
    "subcommand": "megatron-et no-such-command RUN",
    "subcommand's option": "megatron-et report RUN --no-such-option",
    "benchmark": "python -m benchmarks run no-such-level",
    "script": "python benchmarks/no_such_script.py",
    "script's option": "python benchmarks/quantile_error.py --no-such-option",
    "module": "python -m no_such_module",
    "torchrun's option": "torchrun --no-such-option 2 examples/own_loop.py",
    "training script": "torchrun -m megatron_et no_such_script.py",
    "training flag": "torchrun -m megatron_et pretrain_gpt.py --no-such-flag 1",
    "refused flag": "srun torchrun pretrain_gpt.py --moe-router-type expert-threshold --moe-router-fusion",
    "flag of the CPU entry": "torchrun -m megatron_et.pretrain_gpt --moe-et-pool planet",
    "checked flag": "megatron-et check pretrain_gpt.py --no-such-flag",
    "flags alone": "--moe-et-ema-decay 0.9",
    "shell script": "bash examples/no_such_script.sh",
}


@pytest.mark.parametrize("line", WRONG.values(), ids=WRONG)
def test_a_wrong_command_fails(line: str, tmp_path: Path) -> None:
    (command,) = _commands(f"```\n{line}\n```\n", tmp_path)
    read = reader(command)
    assert read is not None
    with pytest.raises(BaseException) as failure:  # noqa: PT011, every way to refuse
        read()
    assert not isinstance(failure.value, KeyboardInterrupt)
    if isinstance(failure.value, pytest.skip.Exception):
        raise failure.value


@pytest.mark.parametrize(
    "line", ["sbatch job.sh", "srun --nodes=2 hostname", "kubectl get pods", "pip install x"]
)
def test_an_unknown_command_is_in_no_class_until_it_is_marked(line: str, tmp_path: Path) -> None:
    (unmarked,) = _commands(f"```\n{line}\n```\n", tmp_path)
    assert classes(unmarked) == []
    (marked,) = _commands(f"<!-- needs a cluster: SLURM -->\n```\n{line}\n```\n", tmp_path)
    assert classes(marked) == ["marked"]


# --- executed here ---


def test_the_package_installs_without_its_dependencies(tmp_path: Path) -> None:
    """As on a cluster: into a place of its own, from a copy, with nothing downloaded."""
    if importlib.util.find_spec("pip") is None or importlib.util.find_spec("setuptools") is None:
        pytest.skip("this environment has no pip and setuptools to build with")
    source, target = tmp_path / "megatron_et", tmp_path / "site"
    tracked = subprocess.run(
        ["git", "ls-files", "megatron_et", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet",
         "--disable-pip-version-check", "--target", str(target), str(source)],
        check=True, timeout=120,
    )  # fmt: skip
    code = "import megatron_et.cli as cli; print(cli.__file__); cli.main(['--help'])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(target)}, cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.stdout.startswith(str(target)), run.stderr
    assert all(name in run.stdout for name in cli.COMMANDS)
    assert {f"{name.removesuffix('.py')}.py" for name in tracked if name.endswith(".py")} == {
        str(path.relative_to(target)) for path in target.rglob("*.py")
    }
    assert (target / "megatron_et" / "py.typed").is_file()
    assert (target / "bin" / "megatron-et").is_file()


# --- Python ---

PYTHON = [block for page in PAGES for block in blocks(page) if block.info == "python"]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.page}:{block.line}")
def test_python_parses_and_names_of_this_package_exist(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_et"):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, name.name) for name in node.names)
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "megatron_et"
        ):
            assert hasattr(importlib.import_module("megatron_et"), node.attr), node.attr
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ExpertThresholdConfig":
            from megatron_et import ExpertThresholdConfig

            ExpertThresholdConfig(
                **{word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg}
            )
