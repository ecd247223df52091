"""Files that somebody else is writing: what is new in them since the last look.

A file may not exist yet, end in the middle of a line or record, shrink, or be replaced. Nothing is locked.
"""

import os
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

FIRST_LOOK = 64 << 20
"""Bytes at the end of a text file that the first look reads: the last hundred steps of 60 layers of 128
experts, and a second's work."""
ONE_LOOK = 64 << 20
"""Bytes that one look reads at most."""
_MARK = 64


@dataclass(frozen=True)
class News:
    """Whole lines that are new; `fresh`: the file is another one than before, forget the earlier lines."""

    lines: list[bytes]
    fresh: bool


class LineTail:
    """New whole lines of a growing text file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._inode: int | None = None
        # The bytes before the offset: a file that was written anew in place may be as long as it was.
        self._mark = b""

    def look(self) -> News:
        """What was written since the last look; nothing while there is no file."""
        try:
            with self.path.open("rb") as file:
                return self._read(file.fileno())
        except FileNotFoundError:
            return News([], fresh=False)

    def _read(self, file: int) -> News:
        status = os.fstat(file)
        known = self._inode is not None
        fresh = known and not self._is_continued(file, status)
        if fresh or not known:
            self._inode, self._offset, self._mark = status.st_ino, 0, b""
            if status.st_size > FIRST_LOOK:
                start = status.st_size - FIRST_LOOK
                # The line that began before is left out.
                self._offset = start + os.pread(file, FIRST_LOOK, start).find(b"\n") + 1
        data = os.pread(file, ONE_LOOK, self._offset)
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._mark = (self._mark + whole[-_MARK:])[-_MARK:]
        return News(whole.splitlines(), fresh)

    def _is_continued(self, file: int, status: os.stat_result) -> bool:
        if status.st_ino != self._inode or status.st_size < self._offset:
            return False
        before = os.pread(file, len(self._mark), self._offset - len(self._mark))
        return before == self._mark


class RecordTail:
    """New records of a growing TensorBoard event file, those that hold one of `needles`.

    A record is its length (8 bytes, little-endian), a checksum (4), the data, a checksum (4). Records are
    skipped without being parsed: most of a big run's are of no interest here.
    """

    def __init__(self, path: Path, needles: Sequence[bytes]) -> None:
        self.path = path
        self.needles = needles
        self.more = False
        """Whether the last look stopped before the end of what is there."""
        self._offset = 0

    def look(self, deadline: float) -> Iterator[bytes]:
        """Data of new records; stops after `deadline` (time.monotonic) and goes on at the next look."""
        try:
            with self.path.open("rb") as file:
                data = os.pread(file.fileno(), ONE_LOOK, self._offset)
        except FileNotFoundError:
            return
        self.more = len(data) == ONE_LOOK
        at = 0
        while at + 12 <= len(data):
            if time.monotonic() > deadline:
                self.more = True
                return
            (length,) = struct.unpack_from("<Q", data, at)
            end = at + 12 + length + 4
            if end > len(data):
                # Not written to its end yet; or longer than a look: damaged, and the next cannot be found.
                self.more &= end - at <= ONE_LOOK
                return
            record = data[at + 12 : end - 4]
            at = end
            self._offset += 16 + length
            if any(needle in record for needle in self.needles):
                yield record
