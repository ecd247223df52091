"""Input files and their records: read a batch at a time by the main process, made texts by the workers."""

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from megatron_et.data.files import PrepareError

BATCH_BYTES = 1 << 20  # long enough to hide the cost of passing it to a process
MAX_RECORD_BYTES = 1 << 28  # a record has to fit into memory, many times
# What gzip, zlib and Arrow raise about the contents of a file.
_UNREADABLE = (OSError, EOFError, ValueError, LookupError, NotImplementedError, zlib.error)


class Batch(NamedTuple):
    """Consecutive records of a file: each as bytes, or why it cannot be used."""

    path: Path
    first: int  # number of the first record, from 1
    records: list[bytes | str]
    share: int  # bytes of the file that were read for it


def find_inputs(patterns: Iterable[str | Path]) -> list[Path]:
    """The files that names and globs (`**` included) stand for, each once, the matches of a glob sorted."""
    found: dict[str, None] = {}
    for pattern in map(str, patterns):
        # A file may be called a[1].txt, so a name that exists is no glob.
        names = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not (matches := dict.fromkeys(filter(os.path.isfile, names))):
            raise PrepareError(f"no file matches {pattern!r}: name files, or a glob such as 'texts/**/*.txt'")
        found |= matches
    return [Path(name) for name in found]


@cache
def document(path: Path) -> str:
    """What a document is: a "row", a "line" or the whole "file"."""
    suffixes = [suffix.lower() for suffix in ["", *path.suffixes]]
    if suffixes[-1] == ".parquet":
        return "row"
    last = suffixes[-2] if suffixes[-1] in (".gz", ".zst") else suffixes[-1]
    return "line" if last in (".jsonl", ".ndjson", ".json") else "file"


def batches(path: Path, json_key: str, size: int = BATCH_BYTES) -> Iterator[Batch]:
    """The records of a file in order, about `size` bytes at a time. Raises PrepareError if it is damaged."""
    first, filled, reported = 1, 0, 0
    records: list[bytes | str] = []
    try:
        with path.open("rb") as raw:
            for record in _rows(raw, json_key) if document(path) == "row" else _stream(path, raw):
                fits = len(record) <= MAX_RECORD_BYTES
                records.append(record if fits else f"longer than {MAX_RECORD_BYTES:,} bytes")
                filled += len(records[-1]) + 64  # an empty one takes memory too
                if filled >= size:
                    position = max(raw.tell(), reported)  # Parquet begins with the end of the file
                    yield Batch(path, first, records, position - reported)
                    first, filled, reported, records = first + len(records), 0, position, []
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno:
            raise  # about the disk, not about what is in the file
        why = f"after {first + len(records) - 1:,} records: {error}"
        raise PrepareError(
            f"{path} cannot be read {why}; mend it or leave it out, check --json-key"
        ) from None
    yield Batch(path, first, records, path.stat().st_size - reported)


def _stream(path: Path, raw: Any) -> Iterator[bytes]:
    """The lines of a JSONL file, all of a text; of a record over the limit only its beginning."""
    if path.suffix.lower() == ".gz":  # all its members
        raw = io.BufferedReader(gzip.GzipFile(fileobj=raw), BATCH_BYTES)
    elif path.suffix.lower() == ".zst":  # all its frames
        import pyarrow

        raw = io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), BATCH_BYTES)
    if document(path) == "file":
        yield raw.read(MAX_RECORD_BYTES + 1)
        return
    while line := raw.readline(MAX_RECORD_BYTES + 1):
        yield line.removesuffix(b"\n")
        while line and not line.endswith(b"\n"):
            line = raw.readline(BATCH_BYTES)


def _rows(raw: Any, column: str) -> Iterator[bytes | str]:
    import pyarrow.parquet

    # With a buffer a column is read page by page and not a whole row group at once.
    file = pyarrow.parquet.ParquetFile(raw, buffer_size=BATCH_BYTES, pre_buffer=False)
    for rows in file.iter_batches(64, columns=[column], use_threads=False):
        texts = rows.column(column).cast(pyarrow.large_binary()).to_pylist()
        yield from ("null" if text is None else text for text in texts)


def text_of(batch: Batch, record: bytes | str, json_key: str) -> tuple[str, str]:
    """The text of a record, and why it cannot be used; "" where it can."""
    if isinstance(record, str):
        return "", record
    try:
        # A byte order mark begins files, and so lines of files put together; a column has none.
        text: Any = record.decode("utf-8" if document(batch.path) == "row" else "utf-8-sig")
        if document(batch.path) == "line" and text and not text.isspace():
            value = json.loads(text)
            text = value.get(json_key) if isinstance(value, dict) else None
            if not isinstance(text, str):
                return "", f"without a string {json_key!r}"
            text.encode()  # an escape such as \ud800 on its own is valid JSON but no character
    except UnicodeError:
        return "", "not UTF-8"
    except (ValueError, RecursionError):
        return "", "invalid JSON"
    return text, "" if text and not text.isspace() else "empty"
