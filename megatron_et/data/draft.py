"""A dataset being written: kept on disk, committed now and then, and found again by the next run.

Everything lies in the folder PREFIX.partial beside the dataset, under names that nothing takes for one:

    run.json        what is being made: inputs, tokenizer, options. A run that makes something else is refused
    tokens          the .bin as far as it is
    lengths         tokens of each document, 4 bytes each
    progress.json   how much of both is valid, and where in the input to go on; replaced in one step
    tokenizer       what the workers start with
    lock            held by the running process

A commit makes tokens and lengths durable before progress.json says so; what lies beyond it after a kill is
cut off. The finished files come under their names by renaming: .bin first, .idx last, and an older .idx goes
before either, so that no .idx ever stands beside a .bin that is not its own.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from megatron_et.data import check_targets, replace_durably, sync_folder
from megatron_et.data.index import LENGTH, write_index
from megatron_et.data.reading import PrepareError

_FORMAT = 1  # of the folder; a run is not resumed from one of another format


def draft_folder(prefix: Path) -> Path:
    """Where a run keeps what it has until it is finished."""
    return Path(f"{prefix}.partial")


def is_interrupted(prefix: Path) -> bool:
    """Whether an interrupted run for this dataset can be resumed."""
    return all((draft_folder(prefix) / name).is_file() for name in ("run.json", "progress.json"))


class Draft:
    """The unfinished dataset of one prefix, open in one process.

    `run` says what is made, by name; two runs with equal values make the same bytes. As a context manager it
    leaves the folder when there is something to resume, and removes it when there is not.
    """

    def __init__(self, prefix: Path, run: Mapping[str, Any], *, restart: bool = False) -> None:
        """Opens the draft, an earlier run's or a new one.

        Raises PrepareError if another process has it, or if an earlier run made something else and `restart`
        does not allow to drop it; OSError where it cannot be written.
        """
        self.prefix = prefix
        self.folder = draft_folder(prefix)
        self._bin, self._idx = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        check_targets(self._bin, self._idx)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        try:
            self.progress = self._begin(dict(run), restart)
        except BaseException:
            self._lock.close()
            raise
        self.resumed = bool(self.progress)
        self._open: tuple[BinaryIO, BinaryIO] | None = None
        if not self.finished:
            tokens = self._open_at("tokens", self.progress.get("token_bytes", 0))
            lengths = self._open_at("lengths", self.progress.get("documents", 0) * LENGTH.itemsize)
            self._open = tokens, lengths

    def _take_lock(self) -> BinaryIO:
        lock = (self.folder / "lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise PrepareError(
                f"another process is writing {self.prefix}: wait for it, or give another --output"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            # A file system without locks: nobody can be kept out.
        return lock

    def _begin(self, run: dict[str, Any], restart: bool) -> dict[str, Any]:
        """The progress of an earlier run that made the same, or {} after making room for a new one."""
        run["format"] = _FORMAT
        # Through JSON, as the earlier one went: tuples become lists.
        run = json.loads(json.dumps(run))
        earlier, progress = (_read_json(self.folder / name) for name in ("run.json", "progress.json"))
        if progress and earlier and not restart:
            changes = _changes(earlier, run)
            if not changes:
                return progress
            raise PrepareError(
                f"an interrupted run left {self.folder}, but since then {'; '.join(changes)}. Run it as "
                "before to go on from there, or add --restart to begin anew"
            )
        for name in ("progress.json", "tokens", "lengths", "index"):
            (self.folder / name).unlink(missing_ok=True)
        _write_json(self.folder / "run.json", run)
        return {}

    def _open_at(self, name: str, size: int) -> BinaryIO:
        """A file of the draft, cut to what was committed, to be appended to."""
        path = self.folder / name
        if size and _size(path) < size:
            raise self._damaged(path)
        file = path.open("r+b" if path.exists() else "w+b")
        file.truncate(size)
        file.seek(size)
        return file

    def _damaged(self, path: Path) -> PrepareError:
        return PrepareError(f"{path} is not as long as {self.folder} says: add --restart to begin anew")

    @property
    def finished(self) -> bool:
        """Whether all documents are in it, and only `finish` is left to do."""
        return bool(self.progress.get("finished"))

    def add(self, tokens: bytes, lengths: np.ndarray) -> None:
        """Appends documents: their tokens end to end, and the number of tokens of each."""
        assert self._open is not None
        self._open[0].write(tokens)
        self._open[1].write(lengths.astype(LENGTH).tobytes())

    def commit(self, progress: Mapping[str, Any], *, finished: bool = False) -> None:
        """Makes everything added so far durable, together with what the run needs to go on after it."""
        assert self._open is not None
        tokens, lengths = self._open
        for file in self._open:
            file.flush()
            os.fsync(file.fileno())
        self.progress = {
            **progress,
            "token_bytes": tokens.tell(),
            "documents": lengths.tell() // LENGTH.itemsize,
            "finished": finished,
        }
        _write_json(self.folder / "progress.json", self.progress)

    def finish(self, dtype: type[np.number]) -> None:
        """Gives the files their names. After `commit(finished=True)`; may be interrupted and repeated."""
        self._close()
        tokens = self.folder / "tokens"
        for path, size in (
            (tokens if tokens.exists() else self._bin, self.progress["token_bytes"]),
            (self.folder / "lengths", self.progress["documents"] * LENGTH.itemsize),
        ):
            if _size(path) != size:
                raise self._damaged(path)
        index = self.folder / "index"
        with index.open("wb") as file:
            write_index(self.folder / "lengths", file, dtype)
        if tokens.exists():
            self._idx.unlink(missing_ok=True)
            sync_folder(self._idx.parent)
            replace_durably(tokens, self._bin)
        replace_durably(index, self._idx)
        # From here on it is no longer the draft of a run.
        (self.folder / "run.json").unlink()
        self._remove()

    def _remove(self) -> None:
        self._lock.close()
        shutil.rmtree(self.folder)

    def _close(self) -> None:
        for file in self._open or ():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if self._lock.closed:
            return
        if self.progress:
            self._lock.close()
        else:
            self._remove()


def _size(path: Path) -> int:
    """Bytes of a file, -1 if there is none."""
    return path.stat().st_size if path.exists() else -1


def _changes(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two runs, in words."""
    changes = []
    for name in sorted(earlier.keys() | now.keys(), key=lambda name: (name == "inputs", name)):
        before, after = earlier.get(name), now.get(name)
        if before == after:
            continue
        if name == "inputs":
            changes.append(_changed_inputs(before or [], after or []))
        elif name in ("tokenizer", "format"):
            changes.append(f"the {'tokenizer' if name == 'tokenizer' else 'format of such folders'} changed")
        else:
            changes.append(f"{name} changed from {before!r} to {after!r}")
    return changes


def _changed_inputs(before: list[list[Any]], after: list[list[Any]]) -> str:
    for old, new in zip(before, after, strict=False):
        if old == new:
            continue
        if old[0] != new[0]:
            return f"the input changed: {new[0]} now stands in the place of {old[0]}"
        what = f"from {old[1]:,} to {new[1]:,} bytes" if old[1] != new[1] else "(its time of modification)"
        return f"{new[0]} changed {what}"
    more = len(after) - len(before)
    return f"the input has {abs(more):,} {'more' if more > 0 else 'fewer'} files"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(value), encoding="utf-8")
    replace_durably(new, path)
