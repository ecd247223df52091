"""Input files: names and globs, the formats they may have, and what is wrong with them.

A .jsonl, .ndjson or .json file holds one document a line, a .parquet file one a row; any other file is one
document. `.gz` or `.zst` after the name is decompressed. Workers import this module: no torch here.
"""

import glob
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

_LINE_SUFFIXES = {".jsonl", ".ndjson", ".json"}
_COMPRESSIONS = {".gz", ".zst"}


class PrepareError(Exception):
    """What is wrong with the input, the tokenizer or the output, in one sentence for the user."""


def compression(path: Path) -> str | None:
    """ ".gz" or ".zst" for a compressed file."""
    suffix = path.suffix.lower()
    return suffix if suffix in _COMPRESSIONS else None


def _format_suffix(path: Path) -> str:
    return (path.with_suffix("") if compression(path) else path).suffix.lower()


def is_jsonl(path: Path) -> bool:
    """Whether a file holds one document a line."""
    return _format_suffix(path) in _LINE_SUFFIXES


def is_parquet(path: Path) -> bool:
    """Whether a file holds one document a row. Parquet compresses by itself: .parquet.gz is no such file."""
    return path.suffix.lower() == ".parquet"


def has_numbered_records(path: Path) -> bool:
    """Whether a record of the file has a number, its line or row."""
    return is_jsonl(path) or is_parquet(path)


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
    check_inputs(found)
    return list(found)


def check_inputs(inputs: Iterable[Path]) -> None:
    """Raises PrepareError for a file that does not exist, is a folder, or needs a package that is missing."""
    for path in inputs:
        if path.is_dir():
            raise PrepareError(f"{path} is a folder: name files or a glob such as '{path}/**/*.txt'")
        if not path.exists():
            raise PrepareError(f"{path} does not exist")
        if is_parquet(path) or compression(path) == ".zst":
            _need_pyarrow(path)


def _need_pyarrow(path: Path) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise PrepareError(f"{path} is read by pyarrow, which is not installed: pip install pyarrow")
