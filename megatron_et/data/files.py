"""Files that appear whole or not at all, a progress bar over bytes, and the error that users read."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


class PrepareError(Exception):
    """What is wrong with the input, the tokenizer or the output, in one sentence for the user."""


@contextmanager
def staged(*targets: Path, scratch: Path | None = None) -> Iterator[list[Path]]:
    """Temporary paths for `targets`, in `scratch` or beside the first; named so when the block ends.

    If it raises, the targets are as they were. Where the last one is, the others are its own, also after a
    crash.
    """
    folder = scratch or targets[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".megatron-et-", dir=folder) as name:
        drafts = [Path(name, target.name) for target in targets]
        yield drafts
        for draft in drafts:
            _make_durable(draft)
        if len(targets) > 1:  # an older one must never stand beside new others
            targets[-1].unlink(missing_ok=True)
            _make_durable(targets[-1].parent)
        for draft, target in zip(drafts, targets, strict=True):
            os.replace(draft, target)
            _make_durable(target.parent)


def _make_durable(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextmanager
def byte_progress(description: str, total: int, *, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr over `total` bytes, shown only on a terminal; yields `advance(bytes)`."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    hidden = not (enabled and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(description, total=total)
        yield lambda step: bar.advance(task, step)
