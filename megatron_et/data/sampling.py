"""A sample of the input's text, spread evenly over all of it, without reading all of it.

Files are weighed by their text. Of a plain file it is stretches all over the file, of a Parquet file the
beginnings of row groups all over it, of a compressed file its beginning: there is no way into the middle.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from megatron_et.data.pieces import Cursor, Piece, column_bytes, pieces
from megatron_et.data.reading import compression, is_jsonl, is_parquet
from megatron_et.data.records import records

# A sample of a large input is made of stretches this long.
_STRETCH_BYTES = 1 << 16
# Bytes of text in a byte of a compressed file, about: it decides how much of a sample comes from which file.
_COMPRESSION_RATIO = 4
# Longer records are left out of a sample, as they are of a dataset by default.
MAX_RECORD_BYTES = 1 << 28


class _Stretch(NamedTuple):
    """Bytes [start, stop) of the text of a file, as `_text_bytes` weighs it."""

    path: Path
    start: int
    stop: int


def sample_texts(inputs: Sequence[Path], json_key: str, sample_bytes: int) -> Iterator[str]:
    """Texts that together have about `sample_bytes`, in the order of the input; all of it if that is less."""
    sizes = [_text_bytes(path, json_key) for path in inputs]
    if sum(sizes) <= sample_bytes:
        for path in inputs:
            yield from _texts_from(path, json_key, 0)
        return
    by_file: dict[Path, list[_Stretch]] = {}
    for stretch in _stretches(inputs, sizes, sample_bytes):
        by_file.setdefault(stretch.path, []).append(stretch)
    for path, stretches in by_file.items():
        if is_parquet(path):
            yield from _from_row_groups(path, json_key, stretches)
        elif compression(path):
            yield from _up_to(_texts_from(path, json_key, 0), sum(s.stop - s.start for s in stretches))
        else:
            for stretch in stretches:
                yield from _from_range(stretch, json_key)


def _stretches(inputs: Sequence[Path], sizes: Sequence[int], sample_bytes: int) -> Iterator[_Stretch]:
    """Evenly spaced stretches of the inputs laid end to end."""
    ends = list(accumulate(sizes, initial=0))
    total = ends[-1]
    count = math.ceil(sample_bytes / _STRETCH_BYTES)
    length = sample_bytes // count
    for start in (i * total // count for i in range(count)):
        stop = start + length
        for i in range(bisect_right(ends, start) - 1, len(inputs)):
            if ends[i] >= stop:
                break
            yield _Stretch(inputs[i], max(start - ends[i], 0), min(stop - ends[i], sizes[i]))


def _text_bytes(path: Path, json_key: str) -> int:
    """About how much text a file has."""
    if is_parquet(path):
        return _parquet_text_bytes(path, json_key)
    return path.stat().st_size * (_COMPRESSION_RATIO if compression(path) else 1)


def _parquet_text_bytes(path: Path, json_key: str) -> int:
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (OSError, pyarrow.ArrowException):
        return 0  # counted when the dataset is written
    return sum(column_bytes(metadata.row_group(i), json_key) for i in range(metadata.num_row_groups))


def _usable(piece: Piece, json_key: str) -> Iterator[str]:
    if piece.lost is None:
        yield from (r for r in records(piece, json_key, MAX_RECORD_BYTES) if isinstance(r, str))


def _from_range(stretch: _Stretch, json_key: str) -> Iterator[str]:
    if is_jsonl(stretch.path):
        yield from _usable(Piece(stretch.path, 0, stretch.start, stretch.stop, 0), json_key)
        return
    with stretch.path.open("rb") as file:
        file.seek(stretch.start)
        # A stretch may begin and end within a character.
        yield file.read(stretch.stop - stretch.start).decode("utf-8", errors="ignore")


def _up_to(texts: Iterator[str], size: int) -> Iterator[str]:
    """The first texts, the last one cut, that together have `size` characters."""
    for text in texts:
        if size <= 0:
            return
        yield text[:size]
        size -= len(text)


def _texts_from(path: Path, json_key: str, begin: int) -> Iterator[str]:
    for piece in pieces([path], json_key, MAX_RECORD_BYTES, Cursor(0, begin)):
        yield from _usable(piece, json_key)


def _from_row_groups(path: Path, json_key: str, stretches: list[_Stretch]) -> Iterator[str]:
    """From the beginning of each row group that a stretch starts in, as much as those stretches have."""
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(path)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    ends = list(accumulate((column_bytes(group, json_key) for group in groups), initial=0))
    first_rows = list(accumulate((group.num_rows for group in groups), initial=0))
    wanted = [0] * len(groups)
    for stretch in stretches:
        wanted[bisect_right(ends, stretch.start) - 1] += stretch.stop - stretch.start
    for first_row, size in zip(first_rows, wanted, strict=False):
        if size:
            yield from _up_to(_texts_from(path, json_key, first_row), size)
