"""The .idx file of a Megatron dataset, written from the documents' lengths without holding them in memory.

Megatron's own builder keeps lists of Python integers for all documents. What is written is the same, byte by
byte; a test compares them.

    9 bytes   MMIDIDX and two zeros          8   version 1         1   code of the token type
    8         number of documents D          8   number of document boundaries, D + 1
    4 D       tokens of each document        8 D   where each begins in the .bin, in bytes
    8 (D + 1) the boundaries: 0, 1, ..., D   (every document is one sequence)
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

LENGTH = np.dtype("<i4")
_HEADER = b"MMIDIDX\x00\x00"
_VERSION = 1
_CODES = {np.dtype(np.uint16): 8, np.dtype(np.int32): 4}
_AT_A_TIME = 1 << 20


def write_index(lengths_file: Path, index: BinaryIO, dtype: type[np.number]) -> None:
    """Writes the index of documents whose token counts lie in `lengths_file`, LENGTH by LENGTH."""
    documents = lengths_file.stat().st_size // LENGTH.itemsize
    index.write(struct.pack("<9sQBQQ", _HEADER, _VERSION, _CODES[np.dtype(dtype)], documents, documents + 1))
    for lengths in _chunks(lengths_file):
        index.write(lengths.tobytes())
    start = 0
    for lengths in _chunks(lengths_file):
        ends = start + np.cumsum(lengths, dtype=np.int64) * np.dtype(dtype).itemsize
        index.write(np.concatenate(([start], ends[:-1])).astype("<i8").tobytes())
        start = int(ends[-1])
    for first in range(0, documents + 1, _AT_A_TIME):
        index.write(np.arange(first, min(first + _AT_A_TIME, documents + 1), dtype="<i8").tobytes())


def _chunks(lengths_file: Path) -> Iterator[np.ndarray]:
    with lengths_file.open("rb") as file:
        while data := file.read(_AT_A_TIME * LENGTH.itemsize):
            yield np.frombuffer(data, LENGTH)
