"""The progress bar of tokenizing: documents, tokens/s, MB/s, time left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


@contextmanager
def encoding_progress(
    total: int, done: int, documents: int, *, enabled: bool
) -> Iterator[Callable[[int, int, int, int], None]]:
    """A bar on stderr over `total` bytes of input, shown only on a terminal.

    `done` bytes with `documents` are an earlier run's: they count for the bar and not for the speed. Yields
    `advance(input bytes, documents, tokens, bytes of text)`.
    """
    console = Console(stderr=True)
    if not (enabled and console.is_terminal):
        yield lambda *_: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeRemainingColumn(),
    )
    began = time.perf_counter()
    tokens = text_bytes = 0
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("Tokenizing", total=total, completed=done, counts="")

        def advance(input_bytes: int, new_documents: int, new_tokens: int, new_text_bytes: int) -> None:
            nonlocal documents, tokens, text_bytes
            documents += new_documents
            tokens += new_tokens
            text_bytes += new_text_bytes
            seconds = time.perf_counter() - began
            counts = (
                f"{documents:,} documents, {tokens / seconds:,.0f} tokens/s, "
                f"{text_bytes / seconds / 1e6:,.1f} MB/s"
            )
            bar.update(task, advance=input_bytes, counts=counts)

        yield advance
