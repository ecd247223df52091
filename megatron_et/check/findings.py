"""What the check found, as plain lines that read well on a terminal of 80 columns and in a file."""

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

PLAIN, OK, NOTE, REFUSED = "", "ok", "note", "REFUSED"
PIPE_WIDTH, WIDEST = 80, 110
LONGEST_LABEL = 20


class Finding(NamedTuple):
    """One thing that was found. A tuple of strings: it travels from the child process as JSON."""

    mark: str
    """REFUSED decides the exit status."""
    label: str
    text: str


class Section(NamedTuple):
    """Findings under a heading."""

    title: str
    findings: Sequence[Finding]


def refused(sections: Iterable[Section]) -> int:
    """How many findings stand in the way of a run."""
    return sum(finding.mark == REFUSED for section in sections for finding in section.findings)


def lines(sections: Iterable[Section], width: int) -> list[str]:
    """The sections as lines of at most `width` characters (a word that is longer is not broken)."""
    out: list[str] = []
    for section in sections:
        out += ["", section.title] if out else [section.title]
        longest = max((len(finding.label) for finding in section.findings), default=0)
        column = longest if longest <= LONGEST_LABEL else 0
        for mark, label, text in section.findings:
            head = f"  {mark:<{len(REFUSED)}}  "
            if column:
                head += f"{label:<{column}}  "
            elif label:  # labels as long as flags have a line of their own
                out.append(head + label)
                head = " " * (len(head) + 2)
            out += textwrap.wrap(
                text,
                width,
                initial_indent=head,
                subsequent_indent=" " * len(head),
                break_long_words=False,
                break_on_hyphens=False,
            )
    return out


def width() -> int:
    """Columns of the terminal, within reason; 80 where the output is a file or a pipe."""
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        return PIPE_WIDTH
    return max(PIPE_WIDTH // 2, min(shutil.get_terminal_size().columns, WIDEST))


def last_line(error: BaseException) -> str:
    """An exception in one line, as the end of a traceback has it."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
