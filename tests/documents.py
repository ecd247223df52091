"""The commands and code blocks of the documents, read as a shell would read them.

A fenced block is what its info string says: none, `sh` or `bash` is commands, one a line (or flags alone, if
it begins with `--`); `python` is Python; everything else (`text`, `json`) is neither. A comment in the line
above a block of commands says that no test can check them, and what they need:

    <!-- needs a cluster: SLURM and 64 GPUs -->
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "patches" / "README.md",
]

COMMANDS = ("", "sh", "bash")
NEEDS = ("a cluster", "a GPU", "a container engine", "root")
FLAGS = "<flags>"
"""Word that stands for flags that a document leaves to the reader."""

_MARK = re.compile(r"<!-- needs (.+?): (.+) -->")
_LEFT_OUT = (
    (re.compile(r"<[^<>|]*flags[^<>|]*>"), f" {FLAGS} "),
    (re.compile(r'"\$\{\w+\[@\]\}"|"\$@"'), f" {FLAGS} "),
    (re.compile(r"\[(\w+=(?:'[^']*'|\S+))\]"), r"\1"),  # [TAGS='...']: an option, given
)
_OPERATORS = {"&&", "||", "|", ";", "&"}


@dataclass(frozen=True)
class Command:
    """One simple command of a document, or flags alone."""

    page: str
    line: int
    words: tuple[str, ...]
    """Of the command, with FLAGS where flags were left out."""
    environment: tuple[str, ...] = ()
    """NAME=value words before it."""
    needs: str | None = None
    """What its block is marked as needing."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {' '.join([*self.environment, *self.words])[:70]}"


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    line: int
    """Of its first line of text."""
    info: str
    text: str
    above: str
    """The line above the fence."""


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    found: list[Block] = []
    name = str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name
    lines = page.read_text().splitlines()
    opened: int | None = None
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if opened is None:
            opened = number
            continue
        info = lines[opened].strip().removeprefix("```").strip()
        above = lines[opened - 1] if opened else ""
        found.append(Block(name, opened + 2, info, "\n".join(lines[opened + 1 : number]), above))
        opened = None
    assert opened is None, f"{name}: the block of line {opened} does not end"
    return found


def need(block: Block) -> str | None:
    """What the block's mark says that it needs."""
    mark = _MARK.fullmatch(block.above.strip())
    return mark[1] if mark else None


def commands(page: Path) -> list[Command]:
    """All commands of a page: those of its blocks, and those in its text that begin with a program's name."""
    found: list[Command] = []
    for block in blocks(page):
        if block.info in COMMANDS:
            found += _of_block(block)
    return found + _in_text(page)


def _of_block(block: Block) -> list[Command]:
    if block.text.startswith("--"):
        return [Command(block.page, block.line, tuple(_words(block.text.replace("\n", " "))))]
    found, pending, first = [], "", block.line
    for number, line in enumerate(block.text.splitlines(), block.line):
        first = first if pending else number
        pending += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        found += _of_line(pending, block.page, first, need(block))
        pending = ""
    return found


_PROGRAMS = r"(?:\.venv/bin/)?(?:make|megatron-et|torchrun|python3?|-m megatron_et[\w.]*)"
_IN_TEXT = re.compile(rf"`((?:[A-Z_]+=\S* )*{_PROGRAMS} [^`]+)`")


def _in_text(page: Path) -> list[Command]:
    found: list[Command] = []
    name = str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name
    # Line by line numbers stay right: fenced blocks become empty lines.
    text = re.sub(r"^ *```.*?^ *```", lambda m: "\n" * m[0].count("\n"), page.read_text(), flags=re.M | re.S)
    for match in _IN_TEXT.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        span = " ".join(match[1].split())
        found += _of_line(f"torchrun {span}" if span.startswith("-m ") else span, name, line, None)
    return found


def _of_line(line: str, page: str, number: int, needs: str | None) -> list[Command]:
    try:
        given = [*_words(line), ";"]
    except ValueError:  # no shell would read it
        return [Command(page, number, (line,), (), needs)]
    found = []
    words: list[str] = []
    for word in given:
        if word not in _OPERATORS:
            words.append(word)
            continue
        environment = []
        while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0], re.S):
            environment.append(words.pop(0))
        if words or environment:
            found.append(Command(page, number, tuple(words), tuple(environment), needs))
        words = []
    return found


def _words(line: str) -> list[str]:
    line = re.sub(r"(^|\s)#.*$", "", line, flags=re.M)
    for pattern, stand_in in _LEFT_OUT:
        line = pattern.sub(stand_in, line)
    line = line.replace("...", " ")  # "and so on"
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    lexer.commenters = ""
    return list(lexer)
