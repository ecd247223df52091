"""Which Megatron the tests run on: CI runs them on several (`make test-versions`)."""

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest

VERSION = importlib.metadata.version("megatron-core")
PINNED = re.search(
    r"^megatron-core==(\S+)",
    (Path(__file__).parent.parent / "constraints.txt").read_text(),
    re.MULTILINE,
)
NEWEST = PINNED is not None and PINNED[1] == VERSION
"""Whether this is the version that requirements.lock pins: there, nothing may be skipped for being absent."""

HAS_TRAINING = importlib.util.find_spec("megatron.training") is not None
needs_training = pytest.mark.skipif(
    not HAS_TRAINING,
    reason=f"the wheel of megatron-core {VERSION} has no megatron.training",
)
needs_newest = pytest.mark.skipif(
    not NEWEST, reason=f"about names that need not exist in megatron-core {VERSION}"
)


def absent(what: str) -> None:
    """Skip a test of something that this older Megatron does not have yet; on the pinned one it must."""
    assert not NEWEST, f"megatron-core {VERSION} has no {what}"
    pytest.skip(f"megatron-core {VERSION} has no {what}")
