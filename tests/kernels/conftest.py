"""Fixtures of the kernels' tests."""

from collections.abc import Iterator

import pytest

from tests.kernels.cuda_on_cpu import OnCpu, compiler


@pytest.fixture(scope="module")
def cuda_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnCpu]:
    """The CUDA kernels on the CPU."""
    if compiler is None:
        pytest.skip("no C++ compiler")
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield OnCpu(tmp_path_factory.mktemp("cuda"), monkeypatch)
