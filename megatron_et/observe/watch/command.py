"""`megatron-et watch`: a live terminal view of a run, from its trace and its TensorBoard files."""

import argparse
import contextlib
import os
import select
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from megatron_et.observe.watch import view
from megatron_et.observe.watch.state import Watched

PIPE_WIDTH = 120
SHORTEST_INTERVAL = 0.2
QUIT = "qQ"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megatron-et watch`."""
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="folder of the run; et_trace.jsonl and TensorBoard files are waited for in it and below",
    )
    parser.add_argument(
        "--tensorboard-dir", type=Path, metavar="DIR", help="look for TensorBoard files here instead"
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="read this trace instead")
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="SECONDS", help="time between two looks (default: 2)"
    )
    parser.add_argument("--once", action="store_true", help="print one frame and exit, for logs and scripts")


def run(args: argparse.Namespace) -> int:
    """Show the run until q or Ctrl-C; 0, or 2 with one sentence on stderr when that is impossible.

    With --once 0 when there is a logged step to show and 1 when there is none yet.
    """
    console = Console(highlight=False)
    if not args.interval >= SHORTEST_INTERVAL:
        return _refuse(f"--interval is {args.interval:g}: it must be at least {SHORTEST_INTERVAL:g} seconds")
    if args.run.exists() and not args.run.is_dir():
        return _refuse(f"{args.run} is not a folder: give the one that holds the run's logs, or will")
    state = Watched(args.run, args.tensorboard_dir, args.trace)
    try:
        if args.once:
            return _once(state, console)
        if not console.is_terminal:
            return _refuse("standard output is no terminal: give --once for a single frame")
        with contextlib.suppress(KeyboardInterrupt):
            _live(state, console, args.interval)
    except OSError as error:
        return _refuse(str(error))
    return 0


def _refuse(sentence: str) -> int:
    print(f"megatron-et watch: {sentence}", file=sys.stderr)
    return 2


def _once(state: Watched, console: Console) -> int:
    state.look()
    while state.more:
        state.look()
    size = (console.width, console.height) if console.is_terminal else (PIPE_WIDTH, None)
    for line in _lines(state, console, *size, footer=_files(state)):
        console.print(line, soft_wrap=True)
    return 0 if state.steps else 1


def _live(state: Watched, console: Console, interval: float) -> None:
    footer = f"q or Ctrl-C quits; looks every {interval:g} s"
    with _Keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            state.look()
            lines = _lines(state, console, console.width, console.height, footer=f"{footer}; {_files(state)}")
            live.update(Group(*lines), refresh=True)
            # Where files hold more than one look takes in, the next look follows at once.
            if keys.wait(0.0 if state.more else interval) in QUIT:
                return


def _lines(state: Watched, console: Console, width: int, height: int | None, *, footer: str) -> list[Text]:
    glyphs = view.UNICODE if console.encoding.startswith("utf") else view.ASCII
    return view.frame(state, width, height, now=time.time(), glyphs=glyphs, footer=footer)


def _files(state: Watched) -> str:
    names = [path.name for path in state.sources]
    shown = ", ".join(names[:1] + [f"{len(names) - 1} TensorBoard files"] * (len(names) > 1)) or "no file yet"
    return shown + (f"; {state.malformed} malformed lines skipped" if state.malformed else "")


class _Keys:
    """Single key presses, as long as it is entered; nothing is read where standard input is no terminal."""

    def __enter__(self) -> "_Keys":
        self._restore: list[Any] | None = None
        if sys.stdin.isatty():
            import termios
            import tty

            self._restore = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)
        return self

    def __exit__(self, *_: object) -> None:
        if self._restore is not None:
            import termios

            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._restore)

    def wait(self, seconds: float) -> str:
        """The next key, or a space when none was pressed in time."""
        if self._restore is None:
            time.sleep(seconds)
            return " "
        if not select.select([sys.stdin], [], [], seconds)[0]:
            return " "
        # Not sys.stdin.read: what it buffers select does not see. Nothing at all: the terminal is gone.
        return os.read(sys.stdin.fileno(), 1).decode(errors="replace") or QUIT[0]
