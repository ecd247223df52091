"""The sample that a tokenizer is trained on comes from all over the input."""

import gzip
import json
from pathlib import Path

import pytest

from megatron_et.data import sampling as module
from megatron_et.data.sampling import sample_texts
from tests.unit.data.prepare_files import write_jsonl, write_parquet

pytestmark = pytest.mark.megatron_free


@pytest.fixture(autouse=True)
def _short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STRETCH_BYTES", 2_000)


def sample(paths: list[Path], size: int) -> list[str]:
    return list(sample_texts(paths, "text", size))


def test_of_parquet_it_comes_from_row_groups_all_over_the_file(tmp_path: Path) -> None:
    texts = [f"{group} " + f"{i} " * 20 for group in range(20) for i in range(200)]
    path = write_parquet(tmp_path / "in.parquet", {"text": texts}, 200)
    got = sample([path], 40_000)
    groups = [int(text.split()[0]) for text in got]
    assert set(groups) == set(range(20))
    assert 30_000 < sum(map(len, got)) < 50_000
    assert sum(map(len, sample([path], 10**9))) == sum(map(len, texts))


def test_of_compressed_files_it_comes_from_each_ones_beginning(tmp_path: Path) -> None:
    paths = []
    for letter in "abc":
        lines = [json.dumps({"text": f"{letter} {i:06} " + f"{i * 7919}" * 5}) for i in range(2_000)]
        paths.append(tmp_path / f"{letter}.jsonl.gz")
        paths[-1].write_bytes(gzip.compress("\n".join(lines).encode()))
    got = sample(paths, 30_000)
    for letter in "abc":
        of_file = [text for text in got if text.startswith(letter)]
        assert 7_000 < sum(map(len, of_file)) < 13_000
        numbers = [int(text.split()[1]) for text in of_file if len(text) > 8]
        assert numbers == list(range(len(numbers)))
    everything = sample(paths, 10**9)
    assert len(everything) == 6_000


def test_each_kind_of_file_gives_its_share(tmp_path: Path) -> None:
    texts = [f"{i} " * 50 for i in range(500)]
    plain = write_jsonl(tmp_path / "plain.jsonl", ["plain " + text for text in texts])
    table = write_parquet(tmp_path / "table.parquet", {"text": ["table " + text for text in texts]}, 50)
    text = tmp_path / "text.txt"
    text.write_text("".join("whole " + text for text in texts))
    got = sample([plain, table, text], 30_000)
    shares = [sum(len(t) for t in got if t.startswith(name)) for name in ("plain", "table")]
    shares.append(sum(map(len, got)) - sum(shares))
    assert all(5_000 < share < 16_000 for share in shares)


def test_unusable_files_and_records_give_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no Parquet")
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "c.jsonl").write_text('{"text": "good"}\n{"text": 1}\n')
    write_parquet(tmp_path / "d.parquet", {"body": ["a"]}, 1)
    assert sample(sorted(tmp_path.iterdir()), 1_000) == ["good"]
