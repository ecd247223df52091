"""Input files and a tokenizer into a Megatron .bin/.idx dataset, the same bytes for any number of workers.

Workers import this module, so neither it nor what it imports at the top imports torch or Megatron.
"""

import logging
import multiprocessing
import signal
import time
import warnings
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_et.data import byte_progress, staged
from megatron_et.data.reading import BadRecord, PrepareError, Window, check_inputs, is_jsonl, records, windows
from megatron_et.data.tokenizer import load_tokenizer

# Tasks handed out per worker and not collected yet: bounds memory when writing is slower than encoding.
_TASKS_AHEAD = 4


@dataclass(frozen=True)
class DatasetSummary:
    """What `write_dataset` wrote: tokens (eod included), bytes of text in UTF-8, seconds to encode and write.

    `bad_records` counts what was left out by reason; `first_bad_record` names its file, and line in JSONL.
    """

    prefix: Path
    documents: int
    tokens: int
    bytes: int
    seconds: float
    bad_records: dict[str, int] = field(default_factory=dict)
    first_bad_record: str | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def __str__(self) -> str:
        return (
            f"{self.prefix}: {self.documents:,} documents, {self.tokens:,} tokens, "
            f"{self.bytes:,} bytes of text in {self.seconds:.1f} s, {self.tokens_per_second:,.0f} tokens/s"
        )


class _Encoded(NamedTuple):
    """The documents of a window: their tokens end to end, tokens per document, and what there was to read."""

    tokens: np.ndarray
    lengths: list[int]
    text_bytes: int
    lines: int
    bad: list[BadRecord]


class _Encoder:
    """Turns windows into tokens; made once in every process."""

    def __init__(
        self, tokenizer_model: Path, json_key: str, append_eod: bool, dtype: type[np.number]
    ) -> None:
        self._tokenizer = load_tokenizer(tokenizer_model)
        self._ending = [self._tokenizer.eos_id()] if append_eod else []
        self._json_key = json_key
        self._dtype = dtype

    def __call__(self, window: Window) -> _Encoded:
        documents: list[np.ndarray] = []
        bad: list[BadRecord] = []
        text_bytes = lines = 0
        for lines, record in enumerate(records(window, self._json_key), start=1):
            if isinstance(record, BadRecord):
                bad.append(record)
                continue
            ids = self._tokenizer.encode_as_ids(record)
            if not ids:  # a tokenizer that normalises may leave nothing of some characters
                bad.append(BadRecord(lines, "empty"))
                continue
            documents.append(np.array(ids + self._ending, dtype=self._dtype))
            text_bytes += len(record.encode())
        tokens = np.concatenate(documents) if documents else np.empty(0, self._dtype)
        return _Encoded(tokens, [len(document) for document in documents], text_bytes, lines, bad)


def write_dataset(
    inputs: Sequence[Path],
    prefix: Path,
    tokenizer_model: Path,
    *,
    json_key: str = "text",
    append_eod: bool = True,
    workers: int = 1,
    strict: bool = False,
    progress: bool = True,
) -> DatasetSummary:
    """Tokenizes the inputs, in order, into the Megatron dataset `prefix`.bin and `prefix`.idx.

    Token ids are those of Megatron's SentencePieceTokenizer for the same model; with `append_eod` each
    document ends with its `eod`. JSONL is read as a stream; a text file is one document and is read whole.
    With more than one worker, processes are spawned: the calling script needs its
    `if __name__ == "__main__"`.

    Raises PrepareError if an input or the tokenizer is unusable, if there is no document at all, and with
    `strict` at the first bad record; OSError if a file cannot be read or written. Then no file is written.
    """
    check_inputs(inputs)
    if workers < 1:
        raise PrepareError(f"{workers} workers cannot encode: use at least 1")
    tokenizer = load_tokenizer(tokenizer_model)
    if append_eod and tokenizer.eos_id() < 0:
        raise PrepareError(
            f"the tokenizer {tokenizer_model} has no end-of-sentence piece, which is Megatron's eod: "
            "use --no-append-eod or a tokenizer with one"
        )
    dataset_builder, dtype = _megatron_format(tokenizer.get_piece_size())
    began = time.perf_counter()
    encoder = (tokenizer_model, json_key, append_eod, dtype)
    tally = _Tally(strict)
    total = sum(path.stat().st_size for path in inputs)
    with (
        staged(Path(f"{prefix}.bin"), Path(f"{prefix}.idx")) as (bin_draft, idx_draft),
        closing(_encode(windows(inputs), encoder, workers)) as results,
        byte_progress("Tokenizing", total, enabled=progress) as advance,
    ):
        builder = dataset_builder(str(bin_draft), dtype=dtype)
        with closing(builder.data_file):
            for window, encoded in results:
                tally.add(window, encoded)
                start = 0
                for length in encoded.lengths:
                    builder.add_document(encoded.tokens[start : start + length], [length])
                    start += length
                advance(window.stop - window.start)
            if tally.documents == 0:
                raise PrepareError(f"no document in the input ({tally.describe_bad()}): nothing is written")
            builder.finalize(str(idx_draft))
    return DatasetSummary(
        prefix=prefix,
        documents=tally.documents,
        tokens=tally.tokens,
        bytes=tally.bytes,
        seconds=time.perf_counter() - began,
        bad_records=dict(tally.bad),
        first_bad_record=tally.first_bad,
    )


class _Tally:
    """Counts of a dataset being written; with `strict` the first bad record is an error."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._lines_before = 0
        self.documents = self.tokens = self.bytes = 0
        self.bad: Counter[str] = Counter()
        self.first_bad: str | None = None

    def add(self, window: Window, encoded: _Encoded) -> None:
        """Adds a window; those of one file must come in order, for its line numbers."""
        if window.start == 0:
            self._lines_before = 0
        for line, reason in encoded.bad:
            place = (
                f"{window.path}:{self._lines_before + line}" if is_jsonl(window.path) else str(window.path)
            )
            if self._strict:
                raise PrepareError(f"bad record at {place}: {reason}; correct it or leave out --strict")
            self.bad[reason] += 1
            self.first_bad = self.first_bad or place
        self._lines_before += encoded.lines
        self.documents += len(encoded.lengths)
        self.tokens += len(encoded.tokens)
        self.bytes += encoded.text_bytes

    def describe_bad(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in self.bad.items()) or "the files are empty"


def _megatron_format(vocab_size: int) -> tuple[Any, type[np.number]]:
    """Megatron's dataset builder and the token type it uses for this vocabulary.

    Imported late: workers do without torch, and whoever mistypes a file name need not wait for it.
    """
    # Notes about missing GPU extensions, which writing a dataset does not need.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    return IndexedDatasetBuilder, DType.optimal_dtype(vocab_size)


_EncoderArguments = tuple[Path, str, bool, type[np.number]]
_worker_encoder: _Encoder | None = None


def _start_worker(*arguments: Any) -> None:
    """Loads the tokenizer in a new process, which leaves Ctrl-C to the parent."""
    global _worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker_encoder = _Encoder(*arguments)


def _encode_in_worker(window: Window) -> _Encoded:
    assert _worker_encoder is not None
    return _worker_encoder(window)


def _encode(
    work: Iterator[Window], arguments: _EncoderArguments, workers: int
) -> Generator[tuple[Window, _Encoded], None, None]:
    """Every window with its tokens, in order; at most a few windows per worker are in memory."""
    if workers == 1:
        encoder = _Encoder(*arguments)
        yield from ((window, encoder(window)) for window in work)
        return
    # An executor rather than Pool.imap, which reads ahead without limit and hangs when a worker is killed.
    # Spawned rather than forked: the parent has the threads of torch and of the progress bar.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=arguments
    )
    waiting: deque[tuple[Window, Future[_Encoded]]] = deque()
    try:
        for window in work:
            waiting.append((window, pool.submit(_encode_in_worker, window)))
            if len(waiting) >= _TASKS_AHEAD * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool:
        raise PrepareError("a worker process was killed, perhaps for memory: use fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)
