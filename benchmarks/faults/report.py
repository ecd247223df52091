"""The table of lives, on the console while it grows and as Markdown in the end."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment

from .kinds import ASKED_TO_SAVE, FINISH, WHAT

INTRODUCTION = """
Written by `python benchmarks/fault_injection.py`. One row is one life of a training run that is killed and
started again; after each everything that it left is compared with an uninterrupted run, bit for bit.
"""
LEGEND = """
- back in s: from the launch to the first step. gone in s: from the signal until torchrun had ended.
- steps repeated: steps of this life that an earlier one had taken already. steps to repeat: logged steps
  after its newest complete checkpoint.
- trace: every record of et_trace.jsonl so far as text, those of repeated steps too; no line is broken, no
  step is missing. losses: every printed loss, gradient norm and evaluation; left out is the second loss after
  each resume, where Megatron prints the mean of the first two.
- router state: thresholds, last cutoffs and counters in the newest complete checkpoint. whole checkpoint: all
  its tensors and pickled objects (optimizer, RNG states); the saved command line is left out. The reference
  saved after every step.
- course: it resumed from the newest complete checkpoint with the step after it, no complete checkpoint was
  passed over, nothing hung, no rank was left running, and ends in order had exit status 0.
- incomplete: a checkpoint that this life began; nothing names it, and Megatron overwrites it later.
- did not save: torchrun forwards SIGTERM to whole process groups (os.killpg). That also ends the helper which
  Megatron starts at its first save (a multiprocessing.Manager, for the queue of the writers' results). The
  save of --exit-signal-handler then fails with a BrokenPipeError, and the run goes back to the checkpoint
  before. A life that gets its SIGTERM before its first save is not affected.
- helpers stayed: that helper does not notice when its rank is killed, nor does torchrun end it.
"""
SHOWN = 4  # differences of a kind
COMPARED = ("trace", "losses", "router", "checkpoint", "course")


@dataclass
class Row:
    """One life of the victim and what it left."""

    number: int
    round: int
    kind: str
    start: int
    """Iteration of the checkpoint that it resumed from."""
    launched: datetime = datetime.min
    came_back: float | None = None
    """Seconds from its launch to its first step; None if it had none."""
    last: int | None = None
    """The last step that it logged."""
    phase: str = "start-up"
    saved: int = 0
    """Iteration of the newest complete checkpoint after it."""
    steps: int = 0
    repeated: int = 0
    """Of its steps, those that an earlier life had taken already."""
    ended_in: float | None = None
    """Seconds from the first signal until torchrun had ended; None if it ended by itself."""
    unfinished: list[int] = field(default_factory=list)
    """Checkpoints that it began and did not complete."""
    helpers: int = 0
    """Helper processes that outlived the run."""
    torn_line: bool = False
    """Whether the trace's last line was left unfinished."""
    differences: dict[str, list[str]] = field(default_factory=dict)
    """By what was compared (COMPARED); a key is missing where there was nothing to compare."""

    @property
    def lost(self) -> int:
        """Logged steps that have to be repeated."""
        return 0 if self.last is None else self.last - self.saved

    @property
    def sentences(self) -> list[str]:
        """What differed, the first few of each kind: a wrong weight soon makes all others wrong."""
        sentences = []
        for name in COMPARED:
            found = self.differences.get(name, [])
            more = [f"{name}: {len(found) - SHOWN} more"] if len(found) > SHOWN else []
            sentences += [*found[:SHOWN], *more]
        return sentences


def _verdict(row: Row, name: str) -> str:
    if name not in row.differences:
        return "-"
    return "DIFFERS" if row.differences[name] else "same"


def _number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)


def _remarks(row: Row) -> str:
    remarks = [f"iter_{i:07d} incomplete" for i in row.unfinished]
    if row.kind in ASKED_TO_SAVE and row.lost > 0:
        remarks.append("did not save")
    if row.helpers:
        remarks.append(f"{row.helpers} helpers stayed")
    if row.torn_line:
        remarks.append("torn trace line")
    return ", ".join(remarks)


#: Heading, width on the console, cell.
COLUMNS: list[tuple[str, int, Callable[[Row], str]]] = [
    ("#", 2, lambda row: str(row.number)),
    ("round", 5, lambda row: str(row.round)),
    ("kind", 16, lambda row: row.kind),
    ("resumed from", 7, lambda row: str(row.start) if row.start else "scratch"),
    ("back in s", 5, lambda row: _number(row.came_back)),
    ("steps repeated", 8, lambda row: str(row.repeated)),
    ("ended after step", 5, lambda row: _number(row.last, "d")),
    ("phase", 9, lambda row: row.phase),
    ("gone in s", 5, lambda row: _number(row.ended_in)),
    ("newest checkpoint", 10, lambda row: str(row.saved or "-")),
    ("steps to repeat", 8, lambda row: str(row.lost)),
    ("trace", 7, lambda row: _verdict(row, "trace")),
    ("losses", 7, lambda row: _verdict(row, "losses")),
    ("router state", 7, lambda row: _verdict(row, "router")),
    ("whole checkpoint", 10, lambda row: _verdict(row, "checkpoint")),
    ("course", 7, lambda row: _verdict(row, "course").replace("same", "right").replace("DIFFERS", "WRONG")),
    ("remarks", 24, _remarks),
]


def make_console() -> Console:
    """Wide enough for the table, where the output is a file too."""
    return Console(width=max(Console().width, sum(width + 1 for _, width, _ in COLUMNS)))


def print_row(console: Console, row: Row) -> None:
    """One line of the table, the heading before the first one, and what differed."""
    table = Table(box=None, show_header=row.number == 1, padding=(0, 1, 0, 0), header_style="bold")
    for heading, width, _ in COLUMNS:
        table.add_column(heading, width=width)
    cells = [cell(row) for _, _, cell in COLUMNS]
    colours = {"same": "green", "right": "green", "DIFFERS": "bold red", "WRONG": "bold red"}
    table.add_row(*(f"[{colours[cell]}]{cell}[/]" if cell in colours else cell for cell in cells))
    console.print(table)
    for sentence in row.sentences:
        console.print(f"    {sentence}", style="red", markup=False)


def summary(rows: Sequence[Row]) -> str:
    """One sentence."""
    kills = [row for row in rows if row.kind != FINISH]
    steps, repeated = sum(row.steps for row in rows), sum(row.repeated for row in rows)
    compared = sum("checkpoint" in row.differences for row in rows)
    wrong = sum(bool(row.sentences) for row in rows)
    verdict = f"{wrong} LIVES DIFFER FROM THE REFERENCE" if wrong else "nothing lost, nothing differs"
    return (
        f"{verdict}: {len(kills)} kills in {len(rows)} lives and {rows[-1].round} round(s); {steps} steps, "
        f"{repeated} of them repeated, and {compared} checkpoints compared with the uninterrupted run"
    )


def write_report(path: Path, rows: Sequence[Row], run: dict[str, str]) -> None:
    """The results file; `run` is what was run, name -> value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    heads = [heading for heading, _, _ in COLUMNS]
    lines = [
        "# Fault injection: a training run killed again and again",
        "",
        INTRODUCTION.strip(),
        "",
        f"**{summary(rows)}.**",
        "",
        *_markdown(["", ""], [[name, value] for name, value in (environment() | run).items()]),
        "",
        "## By kind",
        "",
        *_markdown(*_by_kind(rows)),
        "",
        "## By phase",
        "",
        *_markdown(*_by_phase(rows)),
        "",
        "## Every life",
        "",
        *_markdown(heads, [[cell(row) for _, _, cell in COLUMNS] for row in rows]),
        "",
        LEGEND.strip(),
        "",
    ]
    differing = [f"- life {row.number}: {text}" for row in rows for text in row.sentences]
    if differing:
        lines += ["## What differed", "", *differing, ""]
    path.write_text("\n".join(lines))


def _by_kind(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    head = ["kind", "what happens", "lives", "steps to repeat, mean", "most", "gone in s, longest"]
    head += ["checkpoint left incomplete", "differing"]
    table = []
    for kind, what in WHAT.items():
        of_kind = [row for row in rows if row.kind == kind]
        if not of_kind:
            continue
        lost = [row.lost for row in of_kind]
        gone = [row.ended_in for row in of_kind if row.ended_in is not None]
        numbers = [f"{statistics.mean(lost):.1f}", str(max(lost)), _number(max(gone, default=None))]
        incomplete, differing = (sum(map(bool, x)) for x in _outcomes(of_kind))
        table.append([kind, what, str(len(of_kind)), *numbers, str(incomplete), str(differing)])
    return head, table


def _outcomes(rows: Sequence[Row]) -> tuple[list[list[int]], list[list[str]]]:
    return [row.unfinished for row in rows], [row.sentences for row in rows]


def _by_phase(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    killed = [row for row in rows if row.kind != FINISH]
    phases = ("start-up", "warm-up", "switch", "threshold")
    table = [
        [phase, str(len(lives)), str(sum(bool(row.sentences) for row in lives))]
        for phase in phases
        for lives in [[row for row in killed if row.phase == phase]]
    ]
    return ["phase", "kills", "differing"], table


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
