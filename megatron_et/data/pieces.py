"""The input cut into pieces, always the same ones in the same order: what a worker encodes at a time.

Of a plain file a piece is a range of bytes, which the worker reads itself, so that one large file keeps all
workers busy. Compressed files and Parquet cannot be entered in the middle: the main process reads them, one
piece ahead of the workers, and the piece brings its data along. Decompression is tens of times faster than
tokenizing.

A piece knows where the next one starts (`next`), and `pieces` can begin there: that is how a run resumes.
"""

import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from megatron_et.data.reading import compression, is_jsonl, is_parquet

# Long enough to hide the cost of passing it to a process, short enough to hold many.
PIECE_BYTES = 1 << 20

DAMAGED = "damaged compressed data (the rest of the file is lost, what came just before may be wrong)"
DAMAGED_ROWS = "damaged Parquet data"
NOT_PARQUET = "not a Parquet file"


class Cursor(NamedTuple):
    """A place in the input: number of the file, then bytes (decompressed) or rows into it."""

    file: int
    position: int


START = Cursor(0, 0)


class Piece(NamedTuple):
    """Consecutive records of one file."""

    path: Path
    file: int
    start: int
    stop: int
    share: int
    """Bytes of the file that it stands for, for the progress bar."""
    data: bytes | None = None
    """Its records; None is the bytes [start, stop) of the file, of JSONL the lines that start there."""
    lengths: np.ndarray | None = None
    """Of Parquet: bytes of each record in `data`, -1 for a null."""
    lost: tuple[str, int] | None = None
    """A reason and how many records it cost: a piece that cannot be read."""

    @property
    def next(self) -> Cursor:
        """Where the following piece starts."""
        return Cursor(self.file, self.stop)


def too_long(limit: int) -> str:
    """The reason for leaving out a record of more than `limit` bytes."""
    return f"longer than {limit:,} bytes"


def pieces(inputs: Sequence[Path], json_key: str, limit: int, begin: Cursor = START) -> Iterator[Piece]:
    """All of the input from `begin` on, the end of an earlier piece. Records over `limit` bytes are lost.

    Which pieces there are depends on the input and on nothing else.
    """
    for file in range(begin.file, len(inputs)):
        start = begin.position if file == begin.file else 0
        yield from _pieces_of(inputs[file], file, json_key, limit, start)


def _pieces_of(path: Path, file: int, json_key: str, limit: int, start: int) -> Iterator[Piece]:
    if is_parquet(path):
        yield from _rows(path, file, json_key, start)
    elif is_jsonl(path) and compression(path):
        # From the beginning even when most is skipped: what a damaged file still gives must not depend on it.
        yield from (piece for piece in _compressed_lines(path, file, limit) if piece.stop > start)
    elif is_jsonl(path):
        size = path.stat().st_size
        for position in range(start, size, PIECE_BYTES):
            stop = min(position + PIECE_BYTES, size)
            yield Piece(path, file, position, stop, stop - position)
    elif start == 0:
        yield _whole_file(path, file, limit)


def _whole_file(path: Path, file: int, limit: int) -> Piece:
    """A text file: one record. An empty file too is one, so that it is counted."""
    size = path.stat().st_size
    lost = None
    data = None
    if compression(path):
        try:
            with closing(open_stream(path)) as stream:
                data = stream.read(limit + 1)
        except _DAMAGE as error:
            _raise_unless_damage(error)
            lost = (DAMAGED, 1)
    if (size if data is None else len(data)) > limit:
        data, lost = None, (too_long(limit), 1)
    return Piece(path, file, 0, 1, size, data, lost=lost)


_DAMAGE = (OSError, EOFError, zlib.error)


def _raise_unless_damage(error: Exception) -> None:
    """Raises what the operating system said: it is about the disk and not about the file's contents."""
    if isinstance(error, OSError) and error.errno:
        raise error


class _Compressed(NamedTuple):
    """A decompressing stream and the file below it, whose position is the progress."""

    stream: io.BufferedIOBase
    raw: io.BufferedReader

    def read(self, size: int) -> bytes:
        return self.stream.read(size)

    def close(self) -> None:
        self.stream.close()
        self.raw.close()


def open_stream(path: Path) -> _Compressed:
    """The decompressed bytes of a .gz or .zst file, of all its members or frames."""
    raw = path.open("rb")
    if compression(path) == ".gz":
        return _Compressed(gzip.GzipFile(fileobj=raw), raw)
    import pyarrow

    zstd = pyarrow.CompressedInputStream(raw, "zstd")
    return _Compressed(io.BufferedReader(cast(Any, zstd), PIECE_BYTES), raw)


def _compressed_lines(path: Path, file: int, limit: int) -> Iterator[Piece]:
    """Blocks of whole lines."""
    position = reported = 0

    def piece(size: int, data: bytes = b"", lost: tuple[str, int] | None = None) -> Piece:
        nonlocal position, reported
        start, before, reported = position, reported, compressed.raw.tell()
        position += size
        return Piece(path, file, start, position, reported - before, data, lost=lost)

    with closing(open_stream(path)) as compressed:
        try:
            while block := compressed.read(PIECE_BYTES):
                if not block.endswith(b"\n"):
                    block += compressed.stream.readline(limit + 1)
                start_of_last = block.rfind(b"\n", 0, len(block) - 1) + 1
                over = len(block) - start_of_last > limit + block.endswith(b"\n")
                if not over:
                    yield piece(len(block), block)
                    continue
                if start_of_last:
                    yield piece(start_of_last, block[:start_of_last])
                line_bytes = len(block) - start_of_last
                end = block
                while end and not end.endswith(b"\n"):
                    end = compressed.stream.readline(PIECE_BYTES)
                    line_bytes += len(end)
                yield piece(line_bytes, lost=(too_long(limit), 1))
        except _DAMAGE as error:
            _raise_unless_damage(error)
            # One byte further than all that came before it: a place of its own for the cursor.
            yield piece(1, lost=(DAMAGED, 1))


def _rows(path: Path, file: int, json_key: str, start: int) -> Iterator[Piece]:
    """The rows of a Parquet file from row `start` on, of one column, a part of a row group at a time."""
    import pyarrow
    import pyarrow.parquet

    size = path.stat().st_size
    try:
        # With a buffer a column is read page by page and not a whole row group at once.
        table = pyarrow.parquet.ParquetFile(path, buffer_size=PIECE_BYTES, pre_buffer=False)
    except (OSError, pyarrow.ArrowException) as error:
        _raise_unless_damage(error)
        if start == 0:
            yield Piece(path, file, 0, 1, size, lost=(NOT_PARQUET, 1))
        return
    with table:
        num_rows = table.metadata.num_rows
        fault = _column_fault(table.schema_arrow, json_key)
        if fault is not None:
            if start < num_rows:
                yield Piece(path, file, 0, num_rows, size, lost=(fault, num_rows))
            return
        end = 0
        for group in range(table.num_row_groups):
            begin, end = end, end + table.metadata.row_group(group).num_rows
            if end > start:
                for piece in _row_group(table, group, json_key, Piece(path, file, begin, end, size)):
                    if piece.stop > start:
                        yield piece


def _column_fault(schema: Any, json_key: str) -> str | None:
    """Why the column has no text, None if it has."""
    import pyarrow.types as kinds

    if json_key not in schema.names:
        return without_key(json_key)
    kind = schema.field(json_key).type
    if kinds.is_dictionary(kind):
        kind = kind.value_type
    if kinds.is_string(kind) or kinds.is_large_string(kind):
        return None
    return not_a_string(json_key)


def without_key(json_key: str) -> str:
    """The reason for leaving out a record that lacks the text's key."""
    return f"without the key {json_key!r}"


def not_a_string(json_key: str) -> str:
    """The reason for leaving out a record whose text is something else."""
    return f"with a {json_key!r} that is not a string"


def column_bytes(row_group: Any, json_key: str) -> int:
    """Bytes of a column of a row group, decompressed, as its metadata says."""
    columns = (row_group.column(i) for i in range(row_group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == json_key)


def _row_group(table: Any, group: int, json_key: str, whole: Piece) -> Iterator[Piece]:
    """A row group in pieces; `whole` is all of it, with the size of the file as its share."""
    import pyarrow

    num_rows, rows_of_file = whole.stop - whole.start, table.metadata.num_rows
    text_bytes = column_bytes(table.metadata.row_group(group), json_key)
    rows_at_a_time = max(1, num_rows * PIECE_BYTES // max(text_bytes, 1))
    position = whole.start

    def piece(rows: int, **content: Any) -> Piece:
        nonlocal position
        start, position = position, position + rows
        share = whole.share * position // rows_of_file - whole.share * start // rows_of_file
        return whole._replace(start=start, stop=position, share=share, **content)

    try:
        batches = table.iter_batches(
            rows_at_a_time, row_groups=[group], columns=[json_key], use_threads=False
        )
        for batch in batches:
            for data, lengths in _texts(batch.column(0)):
                yield piece(len(lengths), data=data, lengths=lengths)
    except (OSError, pyarrow.ArrowException) as error:
        _raise_unless_damage(error)
        yield piece(whole.stop - position, lost=(DAMAGED_ROWS, whole.stop - position))


def _texts(column: Any) -> Iterator[tuple[bytes, np.ndarray]]:
    """The strings of an Arrow array end to end and their lengths, in parts of about PIECE_BYTES."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    column = column.cast(pyarrow.large_binary())
    ends = np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]
    # Without copying them: the bytes of all strings, those of the array's neighbours too.
    strings = memoryview(column.buffers()[2] or b"")
    lengths = np.where(np.asarray(column.is_null()), -1, np.diff(ends))
    first = 0
    while first < len(column):
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + PIECE_BYTES, side="right")) - 1)
        yield bytes(strings[ends[first] : ends[last]]), lengths[first:last]
        first = last
