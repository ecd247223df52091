"""`megatron-et prepare`: text or JSONL into a SentencePiece tokenizer and a Megatron .bin/.idx dataset.

    megatron-et prepare --input 'corpus/*.jsonl' --output runs/corpus --train-tokenizer --vocab-size 4096

A .jsonl or .json file holds one document a line, any other file is one document. The same inputs give the
same bytes for any number of workers.
"""

import argparse
import glob
import io
import json
import logging
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from megatron_et.data import byte_progress, staged

DEFAULT_SAMPLE_BYTES = 20_000_000

# What one task encodes: long enough to hide the cost of passing it to a process, short enough to hold many.
_WINDOW_BYTES = 1 << 20
# Tasks handed out per worker and not collected yet: bounds memory when writing is slower than encoding.
_TASKS_AHEAD = 4
# A sample of a large input is made of stretches this long, spread evenly over it.
_STRETCH_BYTES = 1 << 16
# SentencePiece drops longer sentences, so documents are cut; BPE looks at words, so a few cuts cost nothing.
_SENTENCE_CHARS = 4096
_UNK, _BOS, _EOS, _PAD = range(4)
_FIXED_PIECES = 4 + 256  # these and one for every byte


class PrepareError(Exception):
    """What is wrong with the input, the tokenizer or the output, in one sentence for the user."""


class BadRecord(NamedTuple):
    """A record that gives no document: its line, counted from 1 in its file or window, and the reason."""

    line: int
    reason: str


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `megatron-et prepare`."""
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE_OR_GLOB",
        help="text files (one document each) or .jsonl/.json files (one document a line); a file named twice "
        "is read once",
    )
    add("--output", required=True, type=Path, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--tokenizer-model", type=Path, metavar="MODEL.model", help="a SentencePiece model"
    )
    tokenizer.add_argument(
        "--train-tokenizer",
        action="store_true",
        help="train a lossless byte-fallback BPE tokenizer on the input",
    )
    add(
        "--vocab-size",
        type=_positive,
        metavar="N",
        help="pieces of the trained tokenizer, special ones included",
    )
    add(
        "--tokenizer-output",
        type=Path,
        metavar="PREFIX",
        help="the trained tokenizer goes to PREFIX.model (default: the output's PREFIX)",
    )
    add(
        "--sample-bytes",
        type=_positive,
        metavar="N",
        help=f"train on this many bytes, spread evenly over the input (default {DEFAULT_SAMPLE_BYTES:,})",
    )
    add("--json-key", default="text", metavar="KEY", help="where a JSONL record has its text (default text)")
    add("--no-append-eod", action="store_true", help="do not end every document with the tokenizer's eod")
    add("--workers", type=_positive, default=1, metavar="N", help="processes that encode (default 1)")
    add("--strict", action="store_true", help="stop at the first bad record instead of counting it")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit status, 2 after an error said in one sentence on stderr."""
    try:
        summary = _run(args)
    except PrepareError as error:
        return _fail(str(error))
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        return _fail(f"cannot read or write{place}: {error.strerror or error}")
    if summary.bad_records:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in summary.bad_records.items())
        print(f"skipped bad records: {reasons}; the first is {summary.first_bad_record}", file=sys.stderr)
    print(summary)
    return 0


def _run(args: argparse.Namespace) -> DatasetSummary:
    inputs = find_inputs(args.input)
    if args.train_tokenizer:
        if args.vocab_size is None:
            raise PrepareError("--train-tokenizer needs --vocab-size N, for example 4096 for a small corpus")
        model = train_tokenizer(
            inputs,
            args.tokenizer_output or args.output,
            args.vocab_size,
            json_key=args.json_key,
            sample_bytes=args.sample_bytes or DEFAULT_SAMPLE_BYTES,
        )
    else:
        for option in ("vocab_size", "tokenizer_output", "sample_bytes"):
            if getattr(args, option) is not None:
                flag = "--" + option.replace("_", "-")
                raise PrepareError(f"{flag} is for --train-tokenizer: leave it out with --tokenizer-model")
        model = args.tokenizer_model
    return write_dataset(
        inputs,
        args.output,
        model,
        json_key=args.json_key,
        append_eod=not args.no_append_eod,
        workers=args.workers,
        strict=args.strict,
    )


def _fail(sentence: str) -> int:
    print(f"megatron-et prepare: {sentence}", file=sys.stderr)
    return 2


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


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
    _check_inputs(found)
    return list(found)


def _check_inputs(inputs: Iterable[Path]) -> None:
    for path in inputs:
        if path.is_dir():
            raise PrepareError(f"{path} is a folder: name files or a glob such as '{path}/**/*.txt'")
        if not path.exists():
            raise PrepareError(f"{path} does not exist")


# Reading


class _Window(NamedTuple):
    """The bytes [start, stop) of a file; of a JSONL file, the lines that start there."""

    path: Path
    start: int
    stop: int


def _is_jsonl(path: Path) -> bool:
    return path.suffix.lower() in {".jsonl", ".json"}


def _windows(inputs: Iterable[Path]) -> Iterator[_Window]:
    """All of the input: a text file in one window, a JSONL file in as many as it needs."""
    for path in inputs:
        size = path.stat().st_size
        step = _WINDOW_BYTES if _is_jsonl(path) else max(size, 1)
        for start in range(0, max(size, 1), step):
            yield _Window(path, start, min(start + step, size))


def _sample_windows(inputs: Sequence[Path], sample_bytes: int) -> Iterator[_Window]:
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
            yield _Window(inputs[i], max(start - ends[i], 0), min(stop - ends[i], size))


def _lines(window: _Window) -> Iterator[bytes]:
    """The lines that start in a window."""
    with window.path.open("rb") as file:
        if window.start:
            # The rest of the line that the byte before the window belongs to: nothing if that byte ends it.
            file.seek(window.start - 1)
            file.readline()
        while file.tell() < window.stop:
            yield file.readline()


def _records(window: _Window, json_key: str) -> Iterator[str | BadRecord]:
    """The documents of a window as text, or what is wrong with them."""
    jsonl = _is_jsonl(window.path)
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


# Tokenizer


def train_tokenizer(
    inputs: Sequence[Path],
    model_prefix: Path,
    vocab_size: int,
    *,
    json_key: str = "text",
    sample_bytes: int = DEFAULT_SAMPLE_BYTES,
    progress: bool = True,
) -> Path:
    """Trains a SentencePiece BPE model on a sample of the inputs and returns its path, `model_prefix`.model.

    The tokenizer is lossless (no normalisation, no added or removed blanks, bytes for rare characters),
    except that SentencePiece's own blank U+2581 decodes to a space. Ids 0 to 3 are unk, bos, eos and pad:
    Megatron's eod is eos, and it wants a pad that is no other special piece. The sample is `sample_bytes` of
    text spread evenly over all inputs; bad records are left out.

    Raises PrepareError if an input is missing, if there is no text, or if the text does not suit
    `vocab_size`; OSError if a file cannot be read or written. Then no file is written.
    """
    _check_inputs(inputs)
    model = Path(f"{model_prefix}.model")
    console = Console(stderr=True)
    note = f"Training a tokenizer of {vocab_size:,} pieces"
    with (
        staged(model) as (draft,),
        console.status(note) if progress and console.is_terminal else nullcontext(),
    ):
        sentences = list(_sample_sentences(inputs, json_key, sample_bytes))
        draft.write_bytes(_train_sentencepiece(sentences, vocab_size))
    return model


def _sample_sentences(inputs: Sequence[Path], json_key: str, sample_bytes: int) -> Iterator[str]:
    """Pieces of the documents, at most _SENTENCE_CHARS long, until they make `sample_bytes`."""
    left = sample_bytes
    for window in _sample_windows(inputs, sample_bytes):
        for text in _sample_texts(window, json_key):
            for start in range(0, len(text), _SENTENCE_CHARS):
                if left <= 0:
                    return
                sentence = text[start : start + _SENTENCE_CHARS]
                left -= len(sentence.encode())
                yield sentence


def _sample_texts(window: _Window, json_key: str) -> Iterator[str]:
    if _is_jsonl(window.path):
        yield from (record for record in _records(window, json_key) if isinstance(record, str))
        return
    with window.path.open("rb") as file:
        file.seek(window.start)
        # A stretch may begin and end within a character.
        yield file.read(window.stop - window.start).decode("utf-8", errors="ignore")


def _train_sentencepiece(sentences: Sequence[str], vocab_size: int) -> bytes:
    """The trained model, serialised."""
    size = sum(len(sentence.encode()) for sentence in sentences)
    if size == 0:
        raise PrepareError("no text to train a tokenizer on: the input files have no usable record")
    if vocab_size <= _FIXED_PIECES:
        raise PrepareError(
            f"a vocabulary of {vocab_size} pieces is too small: use at least {_FIXED_PIECES + 1}"
        )
    model = io.BytesIO()
    try:
        _sentencepiece().SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * _SENTENCE_CHARS,
            unk_id=_UNK,
            bos_id=_BOS,
            eos_id=_EOS,
            pad_id=_PAD,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise PrepareError(_vocabulary_error(str(error), vocab_size, size)) from None
    return model.getvalue()


def _vocabulary_error(message: str, vocab_size: int, size: int) -> str:
    """SentencePiece's message as a sentence about --vocab-size, if that is what it is about."""
    if largest := re.search(r"size too high .* value <= (\d+)", message):
        return (
            f"a vocabulary of {vocab_size} pieces is too large for {size:,} bytes of sample text, which give "
            f"at most {largest[1]}: lower --vocab-size or give more text"
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"a vocabulary of {vocab_size} pieces is too small: special pieces, bytes and the characters of "
            f"this text take {smallest[1]}: raise --vocab-size"
        )
    return f"SentencePiece cannot train a tokenizer of {vocab_size} pieces: {message}"


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError:
        raise PrepareError("sentencepiece is not installed: pip install sentencepiece") from None
    return sentencepiece


def _load_tokenizer(path: Path) -> Any:
    """The SentencePieceProcessor of a model file; PrepareError if it is none."""
    sentencepiece = _sentencepiece()
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        problem = "is not a SentencePiece model" if path.is_file() else "does not exist"
        raise PrepareError(
            f"the tokenizer {path} {problem}: give the .model file of a trained tokenizer"
        ) from None


# Dataset


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
        self._tokenizer = _load_tokenizer(tokenizer_model)
        self._ending = [self._tokenizer.eos_id()] if append_eod else []
        self._json_key = json_key
        self._dtype = dtype

    def __call__(self, window: _Window) -> _Encoded:
        documents: list[np.ndarray] = []
        bad: list[BadRecord] = []
        text_bytes = lines = 0
        for lines, record in enumerate(_records(window, self._json_key), start=1):
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
    _check_inputs(inputs)
    if workers < 1:
        raise PrepareError(f"{workers} workers cannot encode: use at least 1")
    tokenizer = _load_tokenizer(tokenizer_model)
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
        closing(_encode(_windows(inputs), encoder, workers)) as results,
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

    def add(self, window: _Window, encoded: _Encoded) -> None:
        """Adds a window; those of one file must come in order, for its line numbers."""
        if window.start == 0:
            self._lines_before = 0
        for line, reason in encoded.bad:
            place = (
                f"{window.path}:{self._lines_before + line}" if _is_jsonl(window.path) else str(window.path)
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


def _encode_in_worker(window: _Window) -> _Encoded:
    assert _worker_encoder is not None
    return _worker_encoder(window)


def _encode(
    windows: Iterator[_Window], arguments: _EncoderArguments, workers: int
) -> Generator[tuple[_Window, _Encoded], None, None]:
    """Every window with its tokens, in order; at most a few windows per worker are in memory."""
    if workers == 1:
        encoder = _Encoder(*arguments)
        yield from ((window, encoder(window)) for window in windows)
        return
    # An executor rather than Pool.imap, which reads ahead without limit and hangs when a worker is killed.
    # Spawned rather than forked: the parent has the threads of torch and of the progress bar.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=arguments
    )
    waiting: deque[tuple[_Window, Future[_Encoded]]] = deque()
    try:
        for window in windows:
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
