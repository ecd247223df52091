"""The records of a piece as texts, or why one is none."""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from megatron_et.data.pieces import Piece, not_a_string, too_long, without_key
from megatron_et.data.reading import is_jsonl

_SKIP_BYTES = 1 << 20


class UnusableRecordError(Exception):
    """Why a record gives no document, in words that fit after a number."""


def records(piece: Piece, json_key: str, limit: int) -> Iterator[str | UnusableRecordError]:
    """The documents of a readable piece as text, in order, or what is wrong with them.

    A record of more than `limit` bytes is not even read to its end.
    """
    lines = is_jsonl(piece.path)
    encoding = "utf-8" if piece.lengths is not None else "utf-8-sig"
    raw: Iterator[bytes | None]
    if piece.lengths is not None:
        assert piece.data is not None
        raw = _rows(piece.data, piece.lengths.tolist())
    elif lines:
        raw = _lines(piece, limit)
    else:
        raw = iter([piece.path.read_bytes() if piece.data is None else piece.data])
    for data in raw:
        try:
            if data is None:
                raise UnusableRecordError(not_a_string(json_key))
            if len(data) > limit:
                raise UnusableRecordError(too_long(limit))
            # A byte order mark begins files, and so lines of files put together; a column has none.
            yield _text_of_line(data, json_key) if lines else _decode(data, encoding)
        except UnusableRecordError as error:
            yield error


def _rows(data: bytes, lengths: list[int]) -> Iterator[bytes | None]:
    start = 0
    for length in lengths:
        yield None if length < 0 else data[start : start + length]
        start += max(length, 0)


def _lines(piece: Piece, limit: int) -> Iterator[bytes]:
    """The lines of a block, or those that start in a range; of one over the limit only its beginning."""
    if piece.data is not None:
        yield from piece.data.removesuffix(b"\n").split(b"\n")
        return
    with piece.path.open("rb") as file:
        position = piece.start
        if position:
            # The rest of the line that the byte before belongs to: nothing if that byte ends it.
            file.seek(position - 1)
            position = _skip_line(file, position - 1, piece.stop)
        while position < piece.stop:
            line = file.readline(limit + 2)
            position += len(line)
            if not line.endswith(b"\n"):
                position = _skip_line(file, position, piece.stop)
            yield line.removesuffix(b"\n")


def _skip_line(file: BinaryIO, position: int, stop: int) -> int:
    """Reads on to the end of a line, but not past `stop`, where another piece begins; the new position."""
    while position < stop:
        rest = file.readline(min(_SKIP_BYTES, stop - position))
        position += len(rest)
        if rest.endswith(b"\n") or not rest:
            break
    return position


def _decode(data: bytes, encoding: str) -> str:
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        raise UnusableRecordError("not UTF-8") from None
    if not text or text.isspace():
        raise UnusableRecordError("empty")
    return text


def _text_of_line(line: bytes, json_key: str) -> str:
    try:
        record: Any = json.loads(_decode(line, "utf-8-sig"))
    except (ValueError, RecursionError):
        raise UnusableRecordError("invalid JSON") from None
    if not isinstance(record, dict):
        raise UnusableRecordError("not an object")
    if json_key not in record:
        raise UnusableRecordError(without_key(json_key))
    text = record[json_key]
    if not isinstance(text, str):
        raise UnusableRecordError(not_a_string(json_key))
    if not text or text.isspace():
        raise UnusableRecordError("empty")
    try:
        # An escape such as \ud800 on its own is valid JSON but no character.
        text.encode()
    except UnicodeEncodeError:
        raise UnusableRecordError("not UTF-8") from None
    return text
