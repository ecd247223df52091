"""Text in, Megatron datasets out; this file holds what the modules share: safe output, progress bars."""

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


def check_targets(*targets: Path) -> None:
    """Raises OSError if a file to be written is a folder, or the folder it goes to is a file."""
    for target in targets:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    folder = targets[0].parent
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def replace_durably(draft: Path, target: Path) -> None:
    """Renames a file such that after a crash of the machine `target` is either whole or as it was."""
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(draft, target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def staged(*targets: Path) -> Iterator[list[Path]]:
    """Temporary paths for `targets`, renamed to them when the block ends; all in one folder, made if missing.

    If the block raises, the targets are untouched and nothing is left behind. Raises OSError where the folder
    cannot be written, before the block runs.
    """
    check_targets(*targets)
    folder = targets[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    # Inside the target's folder: a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=".megatron-et-", dir=folder) as scratch:
        drafts = [Path(scratch, target.name) for target in targets]
        yield drafts
        for draft, target in zip(drafts, targets, strict=True):
            replace_durably(draft, target)


@contextmanager
def byte_progress(description: str, total: int, *, enabled: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr over `total` bytes, shown only on a terminal; yields `advance(bytes)`."""
    console = Console(stderr=True)
    if not (enabled and console.is_terminal):
        yield lambda _: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda step: bar.advance(task, step)
