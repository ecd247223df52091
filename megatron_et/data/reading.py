"""Input files as documents: names and globs, the windows that a file is read in, good and bad records.

A .jsonl or .json file holds one document a line, any other file is one document.
"""

import glob
import json
import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

# What one task encodes: long enough to hide the cost of passing it to a process, short enough to hold many.
_WINDOW_BYTES = 1 << 20
# A sample of a large input is made of stretches this long, spread evenly over it.
_STRETCH_BYTES = 1 << 16


class PrepareError(Exception):
    """What is wrong with the input, the tokenizer or the output, in one sentence for the user."""


class BadRecord(NamedTuple):
    """A record that gives no document: its line, counted from 1 in its file or window, and the reason."""

    line: int
    reason: str


def find_inputs(patterns: Iterable[str]) -> list[Path]:
    """The files that names and globs (`**` included) stand for, each once, the matches of a glob sorted.

    Raises PrepareError for a file that does not exist, a folder, or a glob without a match.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        # A file may be called a[1].txt, so a name that exists is not a glob.
        if os.path.exists(pattern) or not glob.has_magic(pattern):
            matches = [Path(pattern)]
        else:
            matches = [
                path for path in map(Path, sorted(glob.glob(pattern, recursive=True))) if path.is_file()
            ]
            if not matches:
                raise PrepareError(f"no file matches {pattern!r}: check the pattern and the current folder")
        found.update(dict.fromkeys(matches))
    check_inputs(found)
    return list(found)


def check_inputs(inputs: Iterable[Path]) -> None:
    """Raises PrepareError for a file that does not exist or is a folder."""
    for path in inputs:
        if path.is_dir():
            raise PrepareError(f"{path} is a folder: name files or a glob such as '{path}/**/*.txt'")
        if not path.exists():
            raise PrepareError(f"{path} does not exist")


class Window(NamedTuple):
    """The bytes [start, stop) of a file; of a JSONL file, the lines that start there."""

    path: Path
    start: int
    stop: int


def is_jsonl(path: Path) -> bool:
    """Whether a file holds one document a line."""
    return path.suffix.lower() in {".jsonl", ".json"}


def windows(inputs: Iterable[Path]) -> Iterator[Window]:
    """All of the input: a text file in one window, a JSONL file in as many as it needs."""
    for path in inputs:
        size = path.stat().st_size
        step = _WINDOW_BYTES if is_jsonl(path) else max(size, 1)
        for start in range(0, max(size, 1), step):
            yield Window(path, start, min(start + step, size))


def sample_windows(inputs: Sequence[Path], sample_bytes: int) -> Iterator[Window]:
    """Evenly spaced stretches of the inputs laid end to end: about `sample_bytes`, or all if that is less."""
    ends = list(accumulate((path.stat().st_size for path in inputs), initial=0))
    total = ends[-1]
    count = 1 if total <= sample_bytes else math.ceil(sample_bytes / _STRETCH_BYTES)
    length = min(total, sample_bytes) // count
    for start in (i * total // count for i in range(count)):
        stop = start + length
        for i in range(bisect_right(ends, start) - 1, len(inputs)):
            if ends[i] >= stop:
                break
            size = ends[i + 1] - ends[i]
            yield Window(inputs[i], max(start - ends[i], 0), min(stop - ends[i], size))


def _lines(window: Window) -> Iterator[bytes]:
    """The lines that start in a window."""
    with window.path.open("rb") as file:
        if window.start:
            # The rest of the line that the byte before the window belongs to: nothing if that byte ends it.
            file.seek(window.start - 1)
            file.readline()
        while file.tell() < window.stop:
            yield file.readline()


def records(window: Window, json_key: str) -> Iterator[str | BadRecord]:
    """The documents of a window as text, or what is wrong with them."""
    jsonl = is_jsonl(window.path)
    for line, data in enumerate(_lines(window) if jsonl else [window.path.read_bytes()], start=1):
        try:
            yield _json_text(data, json_key) if jsonl else _text(data)
        except _UnusableRecordError as error:
            yield BadRecord(line, str(error))


class _UnusableRecordError(Exception):
    """Why a record gives no document, in words that fit after a number."""


def _text(data: bytes, encoding: str = "utf-8-sig") -> str:
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        raise _UnusableRecordError("not UTF-8") from None
    if not text.strip():
        raise _UnusableRecordError("empty")
    return text


def _json_text(line: bytes, json_key: str) -> str:
    try:
        record: Any = json.loads(_text(line))
    except (ValueError, RecursionError):
        raise _UnusableRecordError("invalid JSON") from None
    if not isinstance(record, dict):
        raise _UnusableRecordError("not an object")
    if json_key not in record:
        raise _UnusableRecordError(f"without the key {json_key!r}")
    text = record[json_key]
    if not isinstance(text, str):
        raise _UnusableRecordError(f"with a {json_key!r} that is not a string")
    try:
        # An escape such as \ud800 on its own is valid JSON but no character.
        return _text(text.encode(), "utf-8")
    except UnicodeEncodeError:
        raise _UnusableRecordError("not UTF-8") from None
