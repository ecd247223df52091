"""Shared fixtures. The CPU backend is not installed in the pytest process: unit tests see torch as it is."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1234)
