"""docs/troubleshooting.md quotes this package's messages as the code says them, and none of those that end a
start or a run is missing there."""

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.documents import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
PACKAGE = ROOT / "megatron_et"
VALUE = "\0"
"""Stands for a value in a message."""

# Messages of the commands prepare, report and check, and of functions called wrongly, speak for themselves.
OF_A_JOB = (
    "__main__.py",
    "launch.py",
    "gpt.py",
    "versions.py",
    "router.py",
    "synchronize.py",
    "config.py",
)
SPEAKS = (
    "ConfigError",
    "ImportError",
    "RuntimeError",
    "SystemExit",
    "NonFiniteLogitsError",
    "HookNotCalledError",
)
SAYS = ("say", "sys.exit", "warnings.warn")


@dataclass(frozen=True)
class Message:
    """A text of the code, with VALUE for what is put in."""

    file: Path
    text: str
    speaks: bool
    """Whether a job says it: raised, printed by `say`, or the reason of an exit."""


def _text(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
        return "".join(str(part) for part in parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return None if left is None and right is None else (left or VALUE) + (right or VALUE)
    return None


@cache
def messages() -> list[Message]:
    """All texts of the package."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        spoken: set[int] = set()
        nodes = list(ast.walk(ast.parse(file.read_text())))
        for node in nodes:
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = ast.unparse(call.func)
            if (isinstance(node, ast.Raise) and name in SPEAKS) or name in SAYS:
                spoken.add(id(call.args[0]))
        for node in nodes:
            if isinstance(node, ast.expr) and (text := _text(node)) is not None:
                found.append(Message(file, text, id(node) in spoken))
    return found


def quoted() -> list[str]:
    """The messages in the first column of the tables about this package's own."""
    text = PAGE.read_text().partition("## In the numbers")[0]
    first = re.findall(r"^\| (?!message|---)(.*?) \|", text, re.MULTILINE)
    return [span for cell in first for span in re.findall(r"`([^`]+)`", cell)]


def is_quote(quote: str, message: str) -> bool:
    """Whether the parts of the quote between its `...` stand in the message, in that order."""
    at = 0
    for part in re.sub(r"^\w+Error: ", "", quote).split("..."):
        at = message.find(part.strip(), at)
        if at < 0:
            return False
        at += len(part.strip())
    return True


FLAG = re.compile(r"--[a-z-]+( [\w.-]+)?|unrecognized arguments")


@pytest.mark.parametrize("quote", quoted())
def test_every_quoted_message_is_in_the_code(quote: str) -> None:
    if FLAG.fullmatch(quote):
        return  # part of a sentence
    longest = max(quote.split("..."), key=len).strip()
    assert len(longest) >= 8, "too little of the message to find it by"
    assert any(is_quote(quote, message.text) for message in messages()), f"no text of the code is {quote!r}"


def test_a_message_that_nobody_says_is_noticed() -> None:
    assert not any(is_quote("no GPU is invisible to this process", message.text) for message in messages())
    assert is_quote("a ... b", f"say a {VALUE} and b")
    assert not is_quote("b ... a", f"say a {VALUE} and b")


SPOKEN = [
    message
    for message in messages()
    if message.speaks
    and (message.file.name in OF_A_JOB or message.file.parent.name in ("host", "kernels"))
    and len(message.text.replace(VALUE, "")) > 12
]


@pytest.mark.parametrize("message", SPOKEN, ids=lambda message: message.text[:50].replace(VALUE, ""))
def test_every_message_of_a_job_is_on_the_page(message: Message) -> None:
    if message.text.startswith("megatron_et: " + VALUE):
        return
    found = [q for q in quoted() if not FLAG.fullmatch(q) and is_quote(q, message.text)]
    assert found, f"{message.file.name}: {message.text.replace(VALUE, '...')!r} is not in {PAGE.name}"
