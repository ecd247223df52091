"""The input in pieces: for any cut and any place to begin, the records that reading the whole file gives."""

import gzip
import io
import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_et.data import pieces as module
from megatron_et.data.pieces import DAMAGED, DAMAGED_ROWS, NOT_PARQUET, Piece, pieces
from megatron_et.data.reading import PrepareError, check_inputs
from megatron_et.data.records import records
from tests.unit.data.prepare_files import pyarrow_or_skip, write_parquet, zstd

pytestmark = pytest.mark.megatron_free

LIMIT = 120
BOM = b"\xef\xbb\xbf"


def read(path: Path, *, limit: int = LIMIT, key: str = "text") -> list[str]:
    """The texts of a file and, marked, the reasons for what gave none, piece by piece."""
    return [said for piece in pieces([path], key, limit) for said in read_piece(piece, limit, key)]


def read_piece(piece: Piece, limit: int = LIMIT, key: str = "text") -> list[str]:
    if piece.lost is not None:
        return [f"bad: {piece.lost[0]}"] * piece.lost[1]
    return [r if isinstance(r, str) else f"bad: {r}" for r in records(piece, key, limit)]


def naive(data: bytes, limit: int = LIMIT) -> list[str]:
    """The same from all bytes at once."""
    lines = data.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    return [naive_line(line, limit) for line in lines]


def naive_line(line: bytes, limit: int) -> str:
    if len(line) > limit:
        return f"bad: longer than {limit} bytes"
    line = line.removeprefix(BOM)
    if not line.strip():
        return "bad: empty"
    try:
        return json.loads(line)["text"]
    except ValueError:
        return "bad: invalid JSON"


def plain(data: bytes) -> bytes:
    return data


LINES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
    .filter(lambda text: text.strip())
    .map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()),
    st.sampled_from([b"", b"\r", b"{", BOM + b'{"text": "b"}', b'{"text": "crlf"}\r']),
    st.integers(LIMIT - 3, LIMIT + 30).map(lambda n: json.dumps({"text": "x" * (n - 12)}).encode()),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(LINES, max_size=12),
    last_ends=st.booleans(),
    piece_bytes=st.integers(1, 300),
    begin=st.floats(0, 0.99),
    suffix=st.sampled_from([".jsonl", ".jsonl.gz", ".jsonl.zst"]),
)
def test_any_cut_gives_the_records_of_the_whole_file_and_any_piece_can_be_the_first(
    tmp_path: Path, lines: list[bytes], last_ends: bool, piece_bytes: int, begin: float, suffix: str
) -> None:
    compress: Callable[[bytes], bytes] = {".gz": gzip.compress, ".zst": zstd}.get(suffix[6:], plain)
    data = b"\n".join(lines) + (b"\n" if last_ends and lines else b"")
    path = tmp_path / f"in{suffix}"
    path.write_bytes(compress(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_BYTES", piece_bytes)
        every = list(pieces([path], "text", LIMIT))
        said = [read_piece(piece) for piece in every]
        assert list(chain.from_iterable(said)) == naive(data)
        assert sum(piece.share for piece in every) == (path.stat().st_size if every else 0)
        if every:
            last = int(begin * len(every))
            again = [read_piece(p) for p in pieces([path], "text", LIMIT, every[last].next)]
            assert again == said[last + 1 :]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.none() | st.text(max_size=60), max_size=20),
    group_rows=st.integers(1, 8),
    piece_bytes=st.integers(1, 200),
    begin=st.floats(0, 0.99),
    kind=st.sampled_from(["string", "large_string", "dictionary"]),
)
def test_parquet_gives_its_rows_however_it_is_cut(
    tmp_path: Path, texts: list[str | None], group_rows: int, piece_bytes: int, begin: float, kind: str
) -> None:
    pa = pyarrow_or_skip()
    column = pa.array(texts, pa.large_string() if kind == "large_string" else pa.string())
    if kind == "dictionary":
        column = column.dictionary_encode()
    path = write_parquet(
        tmp_path / "in.parquet", {"other": list(range(len(texts))), "text": column}, group_rows
    )
    expected = []
    for text in texts:
        if text is None:
            expected.append("bad: with a 'text' that is not a string")
        elif len(text.encode()) > LIMIT:
            expected.append(f"bad: longer than {LIMIT} bytes")
        else:
            expected.append(text if text.strip() else "bad: empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_BYTES", piece_bytes)
        every = list(pieces([path], "text", LIMIT))
        said = [read_piece(piece) for piece in every]
        assert list(chain.from_iterable(said)) == expected
        assert sum(piece.share for piece in every) == (path.stat().st_size if texts else 0)
        if every:
            last = int(begin * len(every))
            again = [read_piece(p) for p in pieces([path], "text", LIMIT, every[last].next)]
            assert again == said[last + 1 :]


def test_a_large_parquet_file_comes_in_pieces_of_about_the_wanted_size(tmp_path: Path) -> None:
    texts = [f"{i} " + "word " * (1 + i % 400) for i in range(5_000)]
    path = write_parquet(tmp_path / "in.parquet", {"text": texts}, 5_000)
    every = list(pieces([path], "text", 1 << 20))
    assert [text for piece in every for text in read_piece(piece, 1 << 20)] == texts
    assert len(every) > 3
    assert max(len(piece.data or b"") for piece in every) < 2 * module.PIECE_BYTES


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"body": ["a", "b"]}, "without the key 'text'"),
        ({"text": [1, 2]}, "with a 'text' that is not a string"),
    ],
)
def test_a_parquet_file_without_the_text_counts_all_its_rows(
    tmp_path: Path, columns: dict[str, Any], reason: str
) -> None:
    path = write_parquet(tmp_path / "in.parquet", columns, 1)
    assert read(path) == [f"bad: {reason}"] * 2
    (piece,) = pieces([path], "text", LIMIT)
    assert list(pieces([path], "text", LIMIT, piece.next)) == []


# Not flipped bits in .zst: frames need not have a checksum, and Arrow's have none.
@pytest.mark.parametrize(
    ("suffix", "damage"), [(".jsonl.gz", "cut"), (".jsonl.zst", "cut"), (".jsonl.gz", "flipped")]
)
def test_a_damaged_file_gives_what_comes_before_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, damage: str
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 1_000)
    # Text that hardly compresses, so that damage in the middle is not at the beginning.
    lines = [
        json.dumps({"text": f"{i * 7919 % 10_007:x} {i * 104_729 % 1_299_709:x}"}) for i in range(40_000)
    ]
    data = ("\n".join(lines) + "\n").encode()
    whole = gzip.compress(data) if suffix.endswith("gz") else zstd(data)
    broken = bytearray(whole[: len(whole) - 50] if damage == "cut" else whole)
    if damage == "flipped":
        broken[len(broken) // 2] ^= 0xFF
    path = tmp_path / f"in{suffix}"
    path.write_bytes(broken)
    every = list(pieces([path], "text", LIMIT))
    said = [said for piece in every for said in read_piece(piece)]
    # The checksum stands at the end: wrong bytes may come before the damage shows.
    good = len(said) - 1 if damage == "cut" else 10_000
    assert said[:good] == naive(data)[:good]
    assert said[-1] == f"bad: {DAMAGED}"
    assert len(said) > 10_000
    middle = every[len(every) // 2]
    again = [said for piece in pieces([path], "text", LIMIT, middle.next) for said in read_piece(piece)]
    assert again == [s for piece in every[len(every) // 2 + 1 :] for s in read_piece(piece)]


def test_gzip_members_and_zstd_frames_one_after_another(tmp_path: Path) -> None:
    first, second = b'{"text": "one"}\n', b'{"text": "two"}\n{"text": "three"}'
    for suffix, compress in ((".jsonl.gz", gzip.compress), (".ndjson.zst", zstd)):
        path = tmp_path / f"in{suffix}"
        path.write_bytes(compress(first) + compress(second))
        assert read(path) == ["one", "two", "three"]


def test_compressed_text_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(BOM + b"one\r\ntwo\n"))
    assert read(path) == ["one\r\ntwo\n"]
    path.write_bytes(gzip.compress(b"x" * (LIMIT + 1)))
    assert read(path) == [f"bad: longer than {LIMIT} bytes"]
    path.write_bytes(gzip.compress(b"x" * 100)[:-12])
    assert read(path) == [f"bad: {DAMAGED}"]


def test_a_text_file_over_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.txt"
    path.write_bytes(b"x" * (LIMIT + 1))
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read"))
    assert read(path) == [f"bad: longer than {LIMIT} bytes"]


def test_of_a_line_over_the_limit_no_more_than_a_piece_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 1_000)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "' + b"x" * 50_000 + b'"}\n{"text": "b"}\n')
    got: list[int] = []

    class Counting(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            count = super().readinto(buffer)
            got.append(count or 0)
            return count or 0

    monkeypatch.setattr(Path, "open", lambda p, _="rb": io.BufferedReader(Counting(p), 512))
    assert read(path) == ["a", f"bad: longer than {LIMIT} bytes", "b"]
    assert sum(got) < 2.5 * path.stat().st_size


def test_damaged_parquet_is_counted_by_its_rows(tmp_path: Path) -> None:
    pyarrow_or_skip()
    texts = [f"{i * 7919 % 10_007:x}" * 3 for i in range(4_000)]
    path = write_parquet(tmp_path / "in.parquet", {"text": texts}, 1_000)
    import pyarrow.parquet

    place = pyarrow.parquet.read_metadata(path).row_group(2).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[place : place + 40] = b"\xff" * 40
    path.write_bytes(data)
    expected = [*texts[:2_000], *[f"bad: {DAMAGED_ROWS}"] * 1_000, *texts[3_000:]]
    assert read(path, limit=1 << 20) == expected
    path.write_bytes(b"PAR1 is what a Parquet file begins with")
    assert read(path) == [f"bad: {NOT_PARQUET}"]
    (piece,) = pieces([path], "text", LIMIT)
    assert list(pieces([path], "text", LIMIT, piece.next)) == []


def test_without_pyarrow_the_files_that_need_it_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for name in ("a.parquet", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(PrepareError, match=f"{name} is read by pyarrow, .* pip install pyarrow"):
            check_inputs([tmp_path / name])
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    check_inputs([tmp_path / "a.jsonl.gz"])
