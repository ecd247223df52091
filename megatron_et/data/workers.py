"""Pieces into tokens, by processes that never run far ahead of the writer.

Workers import this module, so neither it nor what it imports at the top imports torch or Megatron.
"""

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_et.data.encoders import Tokenizer, token_type
from megatron_et.data.pieces import Piece
from megatron_et.data.reading import PrepareError
from megatron_et.data.records import records

# Pieces handed out per worker and not written yet: what bounds the memory. More only hides uneven pieces.
_PIECES_AHEAD = 4


class Options(NamedTuple):
    """What decides the tokens of a piece, apart from the tokenizer."""

    json_key: str
    append_eod: bool
    max_record_bytes: int


class Encoded(NamedTuple):
    """The documents of a piece: their tokens end to end, tokens per document, and what there was to read."""

    tokens: bytes
    lengths: np.ndarray
    text_bytes: int
    records: int
    bad: dict[str, tuple[int, int]]
    """Reason -> how many, and the number of the first one, counted from 1 in the piece."""


class PieceEncoder:
    """Turns pieces into tokens; made once in every process."""

    def __init__(self, tokenizer: Tokenizer, options: Options) -> None:
        self._options = options
        self._encoder = tokenizer.encoder()
        self._dtype = np.dtype(token_type(self._encoder.vocab_size))
        self._ending = b""
        if options.append_eod:
            assert self._encoder.eod is not None
            self._ending = np.array([self._encoder.eod], self._dtype).tobytes()

    def __call__(self, piece: Piece) -> Encoded:
        bad: dict[str, tuple[int, int]] = {}

        def leave_out(reason: str, record: int) -> None:
            count, first = bad.get(reason, (0, record))
            bad[reason] = count + 1, first

        if piece.lost is not None:
            reason, count = piece.lost
            return Encoded(b"", np.empty(0, np.int32), 0, count, {reason: (count, 1)})
        texts: list[str] = []
        numbers: list[int] = []
        number = 0
        for number, record in enumerate(
            records(piece, self._options.json_key, self._options.max_record_bytes), start=1
        ):
            if isinstance(record, str):
                texts.append(record)
                numbers.append(number)
            else:
                leave_out(str(record), number)
        documents: list[bytes] = []
        text_bytes = 0
        for text, number_of_text, ids in zip(texts, numbers, self._encoder.encode(texts), strict=True):
            if ids:
                documents.append(ids + self._ending)
                text_bytes += len(text.encode())
            else:  # a tokenizer that normalises may leave nothing of some characters
                leave_out("empty", number_of_text)
        lengths = np.array([len(ids) // self._dtype.itemsize for ids in documents], np.int32)
        first_first = dict(sorted(bad.items(), key=lambda item: item[1][1]))
        return Encoded(b"".join(documents), lengths, text_bytes, number, first_first)


_worker_encoder: PieceEncoder | None = None


def _start_worker(setup: Path) -> None:
    """Loads the tokenizer in a new process, which leaves Ctrl-C to the parent and ends with it."""
    global _worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_encoder = PieceEncoder(*pickle.loads(setup.read_bytes()))


def _end_with_parent() -> None:
    """Without it a worker whose parent was killed waits for ever: it holds the queue's other end itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(piece: Piece) -> Encoded:
    assert _worker_encoder is not None
    return _worker_encoder(piece)


def encode(
    work: Iterator[Piece], tokenizer: Tokenizer, options: Options, workers: int, setup: Path
) -> Generator[tuple[Piece, Encoded], None, None]:
    """Every piece with its tokens, in order; at most a few pieces per worker are in memory.

    `setup` is a file for what the workers start with. Raises PrepareError if one of them ends by itself.
    """
    if workers == 1:
        encoder = PieceEncoder(tokenizer, options)
        yield from ((piece, encoder(piece)) for piece in work)
        return
    # By a file: multiprocessing waits for ever for a process that dies before it has read large arguments.
    setup.write_bytes(pickle.dumps((tokenizer, options)))
    # An executor rather than Pool.imap, which reads ahead without limit and hangs when a worker is killed.
    # Spawned rather than forked: the parent has the threads of the progress bar.
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(setup,),
    )
    waiting: deque[tuple[Piece, Future[Encoded]]] = deque()
    try:
        for piece in work:
            # What a piece brings along is the worker's now: kept here it would be in memory twice.
            waiting.append((piece._replace(data=None, lengths=None), pool.submit(_encode_in_worker, piece)))
            if len(waiting) >= _PIECES_AHEAD * workers:
                oldest, future = waiting.popleft()
                yield oldest, future.result()
        while waiting:
            oldest, future = waiting.popleft()
            yield oldest, future.result()
    except BrokenProcessPool:
        raise PrepareError(
            "a worker process was killed, perhaps for memory (use fewer --workers or a smaller "
            "--max-record-bytes), or could not start"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
