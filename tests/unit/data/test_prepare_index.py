"""The index: byte by byte what Megatron's builder writes."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_et.data import index as module
from megatron_et.data.index import LENGTH, write_index


@pytest.mark.smoke
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    dtype=st.sampled_from([np.uint16, np.int32]),
    at_a_time=st.integers(1, 40),
)
def test_same_bytes_as_megatrons_builder(lengths: list[int], dtype: type[np.number], at_a_time: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_AT_A_TIME", at_a_time)
        tokens = np.arange(sum(lengths), dtype=dtype)
        builder = IndexedDatasetBuilder(f"{folder}/megatron.bin", dtype=dtype)
        start = 0
        for length in lengths:
            builder.add_document(tokens[start : start + length].tolist(), [length])
            start += length
        builder.finalize(f"{folder}/megatron.idx")

        Path(folder, "lengths").write_bytes(np.array(lengths, LENGTH).tobytes())
        Path(folder, "ours.bin").write_bytes(tokens.tobytes())
        with Path(folder, "ours.idx").open("wb") as file:
            write_index(Path(folder, "lengths"), file, dtype)
        for suffix in ("bin", "idx"):
            ours, theirs = (Path(folder, f"{name}.{suffix}").read_bytes() for name in ("ours", "megatron"))
            assert ours == theirs
        dataset = IndexedDataset(f"{folder}/ours")
        assert [len(dataset[i]) for i in range(len(dataset))] == lengths


def test_offsets_pass_two_to_the_32(tmp_path: Path) -> None:
    lengths = np.full(5, 2**31 - 1, LENGTH)
    (tmp_path / "lengths").write_bytes(lengths.tobytes())
    with (tmp_path / "idx").open("wb") as file:
        write_index(tmp_path / "lengths", file, np.int32)
    offsets = np.frombuffer((tmp_path / "idx").read_bytes(), "<i8", count=5, offset=34 + 5 * 4)
    assert offsets.tolist() == [i * (2**31 - 1) * 4 for i in range(5)]
