"""Memory does not grow with the input, and readers wait for a slow writer."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_et.data import workers as module
from megatron_et.data.encoders import read_tokenizer
from megatron_et.data.pieces import PIECE_BYTES, Piece
from megatron_et.data.tokenizer import train_tokenizer
from megatron_et.data.workers import Options, encode
from tests.unit.data.prepare_files import write_jsonl, write_parquet

pytestmark = pytest.mark.megatron_free

ROOT = Path(__file__).resolve().parents[3]
SMALL, LARGE = 8, 32  # pieces
MEASURE = """
import re, sys
from pathlib import Path
from megatron_et.data.dataset import write_dataset
if __name__ == "__main__":
    source, prefix, model, workers = sys.argv[1:]
    write_dataset([Path(source)], Path(prefix), Path(model), workers=int(workers))
    # Not getrusage: its peak is that of the process which started this one, if that was larger.
    print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
TEXT = " ".join(f"word{i % 97} and{i % 13}" for i in range(600))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer([write_jsonl(folder / "in.jsonl", [TEXT])], folder / "t", 280)


def write(path: Path, pieces: int) -> Path:
    texts = [f"{i} {TEXT}" for i in range(pieces * PIECE_BYTES // len(TEXT))]
    if path.suffix == ".parquet":
        # One row group, as some writers make them: it must not be read at once.
        return write_parquet(path, {"text": texts}, len(texts))
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize(("name", "workers"), [("in.jsonl", 1), ("in.jsonl.gz", 2), ("in.parquet", 1)])
def test_four_times_the_input_takes_the_same_memory(
    model: Path, tmp_path: Path, name: str, workers: int
) -> None:
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    peaks: list[int] = []
    for pieces in (SMALL, LARGE):
        source = write(tmp_path / name, pieces)
        command = [sys.executable, str(script), str(source), str(tmp_path / "data"), str(model), str(workers)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        peaks.append(int(result.stdout) * 1024)
        source.unlink()
    # The input grew by 24 pieces, its tokens by about as many bytes.
    assert peaks[1] - peaks[0] < 6 * PIECE_BYTES, peaks


def test_pieces_are_not_read_far_ahead_of_the_writer(model: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["text"] * 40)
    read = 0

    def counted() -> Iterator[Piece]:
        nonlocal read
        size = source.stat().st_size // 40
        for i in range(40):
            read += 1
            yield Piece(source, 0, i * size, (i + 1) * size, size)

    workers = 2
    results = encode(
        counted(), read_tokenizer(model), Options("text", True, 1_000), workers, tmp_path / "setup"
    )
    for written, (piece, encoded) in enumerate(results):
        assert piece.start == written * piece.share
        assert encoded.lengths.tolist() == [len(encoded.tokens) // 2]
        assert read - written <= module._PIECES_AHEAD * workers
    assert read == written + 1 == 40
