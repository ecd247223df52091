"""Input files and a tokenizer into a Megatron dataset, the same bytes for any number of workers.

    batches of records (records.py) -> workers -> in order into a part for each file -> all parts joined

Parts wait in PREFIX.parts until all are there. A part's name is a hash of all that decides its bytes: one
that is found is the right one, and for a changed input or setting none is found.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
import warnings
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megatron_et.data.files import PrepareError, byte_progress, staged
from megatron_et.data.records import Batch, batches, document, find_inputs, text_of
from megatron_et.data.tokenizer import read_tokenizer

_AHEAD = 4  # batches per worker that are read and not yet written: what bounds the memory
_ENOUGH = 1_000  # records that say something about the rest
# A part takes time of its own: so small files in a row share one, up to so many of them.
_SMALL_BYTES, _SMALL_FILES = 1 << 20, 200


@dataclass
class Summary:
    """What a dataset is made of; `first`: where the first record stands that was left out for a reason."""

    counts: Counter[str] = field(default_factory=Counter)
    """documents, tokens (eod among them), bytes (of text), input (bytes read)"""
    bad: Counter[str] = field(default_factory=Counter)  # records by reason
    first: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, other: "Summary") -> None:
        """Adds what comes next."""
        self.counts.update(other.counts)
        self.bad.update(other.bad)
        self.first = other.first | self.first

    def __str__(self) -> str:
        documents, tokens, size = (self.counts[name] for name in ("documents", "tokens", "bytes"))
        return f"{documents:,} documents, {tokens:,} tokens, {size:,} bytes of text in {self.seconds:.1f} s"

    def bad_records(self) -> str:
        """The bad ones in words."""
        reasons = (f"{count:,} {reason}, first at {self.first[reason]}" for reason, count in self.bad.items())
        records = self.bad.total() + self.counts["documents"]
        return f"{self.bad.total():,} of {records:,} records are bad ({'; '.join(reasons)})"

    def check(self, strict: bool, max_bad_share: float, *, complete: bool = False) -> None:
        """Raises PrepareError if the input is too bad to go on."""
        bad, good = self.bad.total(), self.counts["documents"]
        if bad and strict:
            raise PrepareError(f"{self.bad_records()}: correct them or leave out --strict")
        if not good and (complete or bad >= _ENOUGH):
            raise PrepareError(f"no document so far, {self.bad_records()}: check --json-key and the input")
        if bad > max_bad_share * (bad + good) and (complete or bad + good >= _ENOUGH):
            raise PrepareError(f"{self.bad_records()}, more than --max-bad-share {max_bad_share:g}")


# A batch's tokens end to end, how many each document has, counts.
Encoded = tuple[np.ndarray, list[int], Summary]
Encode = Callable[[Batch], Encoded]


def write_dataset(
    inputs: Sequence[str | Path],
    prefix: Path,
    tokenizer_model: Path,
    *,
    json_key: str = "text",
    append_eod: bool = True,
    special_tokens: bool = True,
    workers: int = 1,
    strict: bool = False,
    max_bad_share: float = 1.0,
) -> Summary:
    """Tokenizes the inputs, in order, into the Megatron dataset `prefix`.bin and `prefix`.idx.

    With more than one worker processes are spawned: the calling script needs `if __name__ == "__main__"`. If
    it raises, PrepareError or OSError, the dataset is as before, and the next call skips finished files.
    """
    paths, tokenizer = find_inputs(inputs), read_tokenizer(tokenizer_model, special_tokens)
    if append_eod and tokenizer.eod < 0:
        raise PrepareError(
            f"{tokenizer_model} has no eos, Megatron's eod: use --no-append-eod or another one"
        )
    dtype = _megatron().DType.optimal_dtype(tokenizer.vocab_size)
    encode = partial(_encode, tokenizer_model, special_tokens, json_key, append_eod, np.dtype(dtype).char)
    began, summary, folder, parts = time.perf_counter(), Summary(), Path(f"{prefix}.parts"), []
    try:
        with (
            staged(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), scratch=folder) as (tokens, index),
            _pool(workers) as pool,
            byte_progress("Tokenizing", sum(map(_size, paths))) as advance,
        ):
            for files in _groups(paths):
                settings = (
                    tokenizer.digest,
                    json_key,
                    append_eod,
                    [(p.absolute(), p.stat().st_size, p.stat().st_mtime_ns) for p in files],
                )
                parts.append(folder / hashlib.sha256(repr(settings).encode()).hexdigest()[:32])
                source = (batch for path in files for batch in batches(path, json_key))
                for more in _part(parts[-1], dtype, _in_order(pool, encode, source, _AHEAD * workers)):
                    summary.add(more)
                    summary.check(strict, max_bad_share)
                    advance(more.counts["input"])
            summary.check(strict, max_bad_share, complete=True)
            joined = _megatron().IndexedDatasetBuilder(str(tokens), dtype=dtype)
            for part in parts:
                joined.add_index(str(part))
            joined.finalize(str(index))
        shutil.rmtree(folder)
    except BrokenProcessPool:
        raise PrepareError("a worker was killed, perhaps for memory: use fewer --workers") from None
    finally:
        with suppress(OSError):
            folder.rmdir()  # where nothing is finished there is nothing to keep
    summary.seconds = time.perf_counter() - began
    return summary


def _megatron() -> Any:
    """Megatron's module of datasets. It imports torch, and talks of GPUs and ranks that nobody here needs."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", UserWarning)
    from megatron.core.datasets import indexed_dataset

    logging.disable(logging.NOTSET)
    return indexed_dataset


def _size(path: Path) -> int:
    return path.stat().st_size


def _groups(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """The files of each part."""
    small = [
        index // _SMALL_FILES if _size(path) <= _SMALL_BYTES else None for index, path in enumerate(paths)
    ]
    for _, group in groupby(
        zip(paths, small, strict=True), lambda file: file[0] if file[1] is None else file[1]
    ):
        yield [path for path, _ in group]


def _part(part: Path, dtype: Any, encoded: Iterator[Encoded]) -> Iterator[Summary]:
    """Writes a part unless it is there; gives its counts as they come."""
    targets = [part.with_suffix(suffix) for suffix in (".bin", ".idx", ".json")]
    if targets[-1].exists():
        done = json.loads(targets[-1].read_text())
        yield Summary(Counter(done["counts"]), Counter(done["bad"]), done["first"])
        return
    summary = Summary()
    with staged(*targets) as (tokens, index, counts):
        builder = _megatron().IndexedDatasetBuilder(str(tokens), dtype=dtype)
        for ids, lengths, more in encoded:
            for start, length in zip(np.cumsum(lengths) - lengths, lengths, strict=True):
                builder.add_document(ids[start : start + length], [length])
            summary.add(more)
            yield more
        builder.finalize(str(index))
        counts.write_text(json.dumps({"counts": summary.counts, "bad": summary.bad, "first": summary.first}))


def _in_order(pool: Executor, encode: Encode, source: Iterator[Batch], ahead: int) -> Iterator[Encoded]:
    """Batches encoded by workers that never run far ahead of the writer."""
    waiting: deque[Future[Encoded]] = deque()
    for batch in source:
        waiting.append(pool.submit(encode, batch))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    yield from (future.result() for future in waiting)


def _pool(workers: int) -> Executor:
    if workers < 2:
        return ThreadPoolExecutor(1)
    # Not Pool.imap, which reads ahead without limit and hangs when a worker is killed.
    context = multiprocessing.get_context("spawn")  # the parent has threads, which fork does not like
    return ProcessPoolExecutor(workers, context, initializer=_follow_parent)


def _follow_parent() -> None:
    """A worker leaves Ctrl-C to its parent, and ends with it where it would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sentinel = multiprocessing.parent_process().join  # type: ignore[union-attr]
    threading.Thread(target=lambda: os._exit(sentinel() or 1), daemon=True).start()


_tokenizer = lru_cache(maxsize=1)(read_tokenizer)  # once in each worker


def _encode(
    model: Path, special: bool, json_key: str, append_eod: bool, typecode: str, batch: Batch
) -> Encoded:
    """Runs in a worker."""
    tokenizer, summary = _tokenizer(model, special), Summary(Counter(input=batch.share))
    tokens, lengths = array(typecode), []
    found = [text_of(batch, record, json_key) for record in batch.records]
    encoded = tokenizer.encode([text for text, _ in found])
    for number, ((text, bad), ids) in enumerate(zip(found, encoded, strict=True), batch.first):
        if bad or not ids:  # a tokenizer may drop all the characters of a text
            place = f"{batch.path}" if document(batch.path) == "file" else f"{batch.path}:{number}"
            summary.bad[bad or "empty"] += 1
            summary.first.setdefault(bad or "empty", place)
            continue
        tokens.fromlist([*ids, tokenizer.eod] if append_eod else ids)
        lengths.append(len(ids) + append_eod)
        summary.counts["bytes"] += len(text.encode())
    summary.counts += Counter(documents=len(lengths), tokens=len(tokens))
    return np.array(tokens), lengths, summary
