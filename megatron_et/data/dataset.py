"""Input files and a tokenizer into a Megatron .bin/.idx dataset, the same bytes for any number of workers.

    pieces (pieces.py) -> workers (workers.py: records.py, encoders.py) -> in order into a draft (draft.py)

Workers import what is imported here: no torch and no Megatron.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_et.data.draft import Draft
from megatron_et.data.encoders import Tokenizer, digest, read_tokenizer, token_type
from megatron_et.data.pieces import Cursor, Piece, pieces
from megatron_et.data.progress import encoding_progress
from megatron_et.data.reading import PrepareError, check_inputs, has_numbered_records
from megatron_et.data.workers import Encoded, Options, encode

# A record is held whole, and a tokenizer needs many times its size.
MAX_RECORD_BYTES = 1 << 28
# Ids and lengths of a document must fit Megatron's 32 bits, at up to one token a byte.
_LARGEST_RECORD_BYTES = 1 << 30
# What a kill costs at most, and how often the disk has to keep up.
_COMMIT_SECONDS = 5.0
# So many bad records in a row at the very beginning are no accident.
_HOPELESS = 1_000


@dataclass
class BadRecords:
    """Bad records of one reason: how many, and the place of the first: its file, and line or row."""

    count: int
    first: str


@dataclass(frozen=True)
class DatasetSummary:
    """What `write_dataset` wrote: tokens (eod included), bytes of text in UTF-8, records good and bad.

    `seconds` are those of this run, `resumed_tokens` the tokens that an interrupted run before it had made.
    """

    prefix: Path
    documents: int
    tokens: int
    bytes: int
    records: int
    seconds: float
    bad_records: dict[str, BadRecords] = field(default_factory=dict)
    resumed_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Of this run."""
        return (self.tokens - self.resumed_tokens) / self.seconds

    def __str__(self) -> str:
        return (
            f"{self.prefix}: {self.documents:,} documents, {self.tokens:,} tokens, "
            f"{self.bytes:,} bytes of text in {self.seconds:.1f} s, {self.tokens_per_second:,.0f} tokens/s"
        )


def write_dataset(
    inputs: Sequence[Path],
    prefix: Path,
    tokenizer_model: Path,
    *,
    json_key: str = "text",
    append_eod: bool = True,
    special_tokens: bool = True,
    max_record_bytes: int = MAX_RECORD_BYTES,
    workers: int = 1,
    strict: bool = False,
    max_bad_share: float = 1.0,
    training: Mapping[str, int] | None = None,
    restart: bool = False,
    progress: bool = True,
) -> DatasetSummary:
    """Tokenizes the inputs, in order, into the Megatron dataset `prefix`.bin and `prefix`.idx.

    Token ids are those of Megatron's SentencePieceTokenizer or HuggingFaceTokenizer for the same model; with
    `append_eod` each document ends with its `eod`; without `special_tokens` a Hugging Face tokenizer adds
    none. Everything is read as a stream; one record, which in a text file is the whole file, has to fit into
    memory, and one of more than `max_record_bytes` is bad. With more than one worker, processes are spawned:
    the calling script needs its `if __name__ == "__main__"`.

    An interrupted call leaves `prefix`.partial, and the next one with the same arguments goes on from there
    (draft.py); `restart` makes it begin anew. `training` says how the tokenizer was made, if it was made for
    this dataset: for the comparison of the two calls.

    Raises PrepareError if an input or the tokenizer is unusable, if there is no document at all, if the input
    changed since an interrupted call, with `strict` at the first bad record, and if more than `max_bad_share`
    of the records are bad; OSError if a file cannot be read or written. Then the dataset is as it was before.
    """
    check_inputs(inputs)
    _check_numbers(workers, max_bad_share, max_record_bytes)
    tokenizer = read_tokenizer(tokenizer_model, special_tokens=special_tokens)
    encoder = tokenizer.encoder()
    if append_eod and encoder.eod is None:
        raise PrepareError(
            f"the tokenizer {tokenizer_model} has {encoder.no_eod}, which is Megatron's eod: "
            "use --no-append-eod or a tokenizer with one"
        )
    options = Options(json_key, append_eod, max_record_bytes)
    began = time.perf_counter()
    run = _run_settings(inputs, tokenizer, options) | dict(training or {})
    with Draft(prefix, run, restart=restart) as draft:
        tally = _Tally(inputs, draft.progress, strict=strict, max_bad_share=max_bad_share)
        tokens_before = tally.tokens
        tally.check()
        if not draft.finished:
            _encode_into(draft, tally, inputs, tokenizer, options, workers, progress)
        draft.finish(token_type(encoder.vocab_size))
    return DatasetSummary(
        prefix=prefix,
        documents=tally.documents,
        tokens=tally.tokens,
        bytes=tally.bytes,
        records=tally.records,
        seconds=time.perf_counter() - began,
        bad_records=tally.bad,
        resumed_tokens=tokens_before,
    )


def _check_numbers(workers: int, max_bad_share: float, max_record_bytes: int) -> None:
    if workers < 1:
        raise PrepareError(f"{workers} workers cannot encode: use at least 1")
    if not 0 <= max_bad_share <= 1:
        raise PrepareError(f"{max_bad_share} is not a share of the records: give a number from 0 to 1")
    if not 1 <= max_record_bytes <= _LARGEST_RECORD_BYTES:
        raise PrepareError(
            f"records of up to {max_record_bytes:,} bytes cannot be indexed: give 1 to "
            f"{_LARGEST_RECORD_BYTES:,} bytes"
        )


def _run_settings(inputs: Sequence[Path], tokenizer: Tokenizer, options: Options) -> dict[str, Any]:
    """All that decides the bytes of a dataset, for `Draft`; a file is known by its size and modification."""
    status = [(path.absolute(), path.stat()) for path in inputs]
    return {
        "inputs": [(str(path), s.st_size, s.st_mtime_ns) for path, s in status],
        "tokenizer": digest(tokenizer),
        "--json-key": options.json_key,
        "--no-append-eod": not options.append_eod,
        "--max-record-bytes": options.max_record_bytes,
    }


def _encode_into(
    draft: Draft,
    tally: "_Tally",
    inputs: Sequence[Path],
    tokenizer: Tokenizer,
    options: Options,
    workers: int,
    progress: bool,
) -> None:
    """Appends all documents that the draft has not yet, committing now and then."""
    total = sum(path.stat().st_size for path in inputs)
    work = pieces(inputs, options.json_key, options.max_record_bytes, tally.cursor)
    committed = time.monotonic()
    with (
        closing(encode(work, tokenizer, options, workers, draft.folder / "tokenizer")) as results,
        encoding_progress(total, tally.input_bytes, tally.documents, enabled=progress) as advance,
    ):
        for piece, encoded in results:
            draft.add(encoded.tokens, encoded.lengths)
            new_tokens = tally.add(piece, encoded)
            advance(piece.share, len(encoded.lengths), new_tokens, encoded.text_bytes)
            tally.check()
            if time.monotonic() - committed >= _COMMIT_SECONDS:
                draft.commit(tally.state())
                committed = time.monotonic()
    tally.check(complete=True)
    draft.commit(tally.state(), finished=True)


class _Tally:
    """Counts of a dataset being written, and how much of the input they stand for."""

    def __init__(
        self, inputs: Sequence[Path], state: Mapping[str, Any], *, strict: bool, max_bad_share: float
    ) -> None:
        """Goes on from `state`, an earlier tally's; {} is the beginning."""
        self._inputs = inputs
        self._strict = strict
        self._max_bad_share = max_bad_share
        self.cursor = Cursor(*state.get("cursor", (0, 0)))
        self._records_of_file: int = state.get("records_of_file", 0)
        self.input_bytes: int = state.get("input_bytes", 0)
        self.records: int = state.get("records", 0)
        self.documents: int = state.get("documents", 0)
        self.tokens: int = state.get("tokens", 0)
        self.bytes: int = state.get("bytes", 0)
        self.bad = {reason: BadRecords(**bad) for reason, bad in state.get("bad", {}).items()}

    def state(self) -> dict[str, Any]:
        """What __init__ takes, for JSON."""
        return {
            "cursor": self.cursor,
            "records_of_file": self._records_of_file,
            "input_bytes": self.input_bytes,
            "records": self.records,
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "bad": {reason: asdict(bad) for reason, bad in self.bad.items()},
        }

    def add(self, piece: Piece, encoded: Encoded) -> int:
        """Adds a piece; they must come in order, for the line numbers. Returns its tokens."""
        if piece.file != self.cursor.file:
            self._records_of_file = 0
        for reason, (count, first) in encoded.bad.items():
            if reason in self.bad:
                self.bad[reason].count += count
            else:
                place = f"{piece.path}"
                if has_numbered_records(piece.path):
                    place += f":{self._records_of_file + first}"
                self.bad[reason] = BadRecords(count, place)
        tokens = int(encoded.lengths.sum())
        self.cursor = piece.next
        self._records_of_file += encoded.records
        self.input_bytes += piece.share
        self.records += encoded.records
        self.documents += len(encoded.lengths)
        self.tokens += tokens
        self.bytes += encoded.text_bytes
        return tokens

    def check(self, *, complete: bool = False) -> None:
        """Raises PrepareError if the input is too bad to go on, or has no document at all."""
        if self._strict and self.bad:
            reason, bad = next(iter(self.bad.items()))
            raise PrepareError(f"bad record at {bad.first}: {reason}; correct it or leave out --strict")
        count = sum(bad.count for bad in self.bad.values())
        if complete and self.documents == 0:
            raise PrepareError(f"no document in the input ({self._describe_bad()}): nothing is written")
        if self.documents == 0 and count >= _HOPELESS:
            raise PrepareError(
                f"all of the first {count:,} records are bad ({self._describe_bad()}): check --json-key and "
                "the input"
            )
        if (complete or self.records >= _HOPELESS) and count > self._max_bad_share * self.records:
            raise PrepareError(
                f"{count:,} of the first {self.records:,} records are bad ({self._describe_bad()}), more "
                f"than --max-bad-share {self._max_bad_share:g}: correct them, or raise it to go on"
            )

    def _describe_bad(self) -> str:
        if not self.bad:
            return "the files are empty"
        return ", ".join(f"{bad.count:,} {reason}, first at {bad.first}" for reason, bad in self.bad.items())
