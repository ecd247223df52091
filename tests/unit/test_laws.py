"""Laws of the house that import-linter cannot say, read off the syntax trees: parts of packages that are not
ours, and modules named in strings. Who imports whom among our own wings is in pyproject.toml."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_et"
MOST_LINES, FITS_A_SCREEN = 410, 72
"""Of a file, and of a function."""

# wing -> what it must not name, as an import, an attribute or a module in a string.
FORBIDDEN = {
    "rule": r"megatron|torch\.distributed",
    "moe": r"megatron\.training",
    "observe": r"megatron|torch\.distributed",
    "data": r"megatron\.training|torch\.distributed",
}


MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+").fullmatch


def files(wing: str = "") -> list[Path]:
    return sorted((PACKAGE / wing).rglob("*.py"))


def docstrings(tree: ast.AST) -> set[int]:
    """Ids of the constants that are prose: docstrings, and strings that stand alone."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def named_modules(tree: ast.AST) -> Iterator[str]:
    """Dotted names that the code uses: imports, attributes, and strings that are nothing but a module."""
    prose = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and id(node) not in prose and MODULE(str(node.value)):
            yield node.value


@pytest.mark.parametrize("wing", FORBIDDEN)
def test_a_wing_names_nothing_that_is_not_its_own(wing: str) -> None:
    for file in files(wing):
        for name in named_modules(ast.parse(file.read_text())):
            assert not re.match(rf"({FORBIDDEN[wing]})(\.|$)", name), f"{file.name} names {name}"


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import torch.distributed as d", "torch.distributed"),
        ("from torch import distributed", "torch.distributed"),
        ("torch.distributed.all_reduce(x)", "torch.distributed.all_reduce"),
        ("find('megatron.training.training')", "megatron.training.training"),
        ("from megatron.training.global_vars import get_args", "megatron.training.global_vars.get_args"),
    ],
)
def test_what_is_named_is_found(code: str, name: str) -> None:
    assert name in named_modules(ast.parse(code))


def test_only_host_and_run_and_check_reach_megatrons_globals() -> None:
    for file in files():
        if file.relative_to(PACKAGE).parts[0] in ("host", "run", "check"):
            continue
        names = named_modules(ast.parse(file.read_text()))
        assert not [name for name in names if name.startswith("megatron.training")], file


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_and_functions_are_small(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            assert node.end_lineno - node.lineno < FITS_A_SCREEN, f"{node.name} in {file.name}"
