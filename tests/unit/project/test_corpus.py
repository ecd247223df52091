"""The pinned corpus (examples/corpus.py): the quickstart's size, and a toy of both sizes."""

import json
from pathlib import Path

import pytest

from examples import corpus
from examples.corpus import NAMES, Part, build, differences, is_held_out, other_versions, verdict

pytestmark = pytest.mark.megatron_free  # another version of Megatron is another source


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Part]:
    return build(tmp_path_factory.mktemp("corpus"), progress=False)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sizes of a few packages, so that both are built in a second."""
    monkeypatch.setattr(corpus, "SIZES", {"quickstart": 400_000, "full": None})
    monkeypatch.setattr(corpus, "SOURCES", ("networkx", "rich", "pytest"))


def texts(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_byte_is_as_pinned(built: dict[str, Part]) -> None:
    """On every machine with the lock; `python examples/corpus.py OUT --write-hashes` after a new one."""
    folder = built["code.train"].path.parent
    assert other_versions() == []
    assert differences(folder) == []
    assert verdict(folder).startswith("corpus: as pinned, sha256 ")


def test_the_sizes_are_those_asked_for(built: dict[str, Part]) -> None:
    for domain in corpus.DOMAINS:
        assert 5_800_000 < built[f"{domain}.train"].bytes + built[f"{domain}.valid"].bytes <= 6_000_000
    for part in built.values():
        found = texts(part.path)
        assert len(found) == part.documents
        assert sum(len(document["text"].encode()) for document in found) == part.bytes


def test_files_are_held_out_whole(built: dict[str, Part]) -> None:
    for name, part in built.items():
        for document in texts(part.path):
            file = document["source"].removesuffix(":docstrings")
            assert is_held_out(file) == name.endswith("valid")
    shares = [is_held_out(f"package/file{n}.py") for n in range(4000)]
    assert 0.04 < sum(shares) / len(shares) < 0.06


def test_no_text_appears_twice(built: dict[str, Part]) -> None:
    found = [document["text"] for part in built.values() for document in texts(part.path)]
    assert len(found) == len(set(found))


def assert_no_copies(code: list[dict[str, str]]) -> None:
    """Of no document more than a third of the long lines stood in those before it."""
    before: set[str] = set()
    for document in code:
        lines = {line.strip() for line in document["text"].splitlines() if len(line.strip()) >= 20}
        assert len(lines & before) <= len(lines) / 3, document["source"]
        before |= lines


def test_code_is_no_copy_of_code(built: dict[str, Part]) -> None:
    assert_no_copies(texts(built["code.valid"].path) + texts(built["code.train"].path))


@pytest.mark.usefixtures("toy")
def test_full_begins_with_the_quickstart(tmp_path: Path) -> None:
    small, full = (build(tmp_path / size, size, progress=False) for size in corpus.SIZES)
    for name in NAMES:
        assert full[name].documents > small[name].documents > 0
        assert full[name].path.read_bytes().startswith(small[name].path.read_bytes())
    found = [document["text"] for part in full.values() for document in texts(part.path)]
    assert len(found) == len(set(found))
    # In the order in which they were taken.
    names = ("code.valid", "code.train")
    first = [document for name in names for document in texts(small[name].path)]
    later = [document for name in names for document in texts(full[name].path)[small[name].documents :]]
    assert_no_copies(first + later)


@pytest.mark.usefixtures("toy")
def test_the_order_of_files_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = build(tmp_path / "one", "full", progress=False)
    found = list(corpus._sources())
    monkeypatch.setattr(corpus, "_sources", lambda: reversed(found))
    other = build(tmp_path / "other", "full", progress=False)
    for name in NAMES:
        assert one[name].path.read_bytes() == other[name].path.read_bytes()


def test_another_byte_and_another_version_are_said(
    built: dict[str, Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = built["code.valid"].path
    original = path.read_bytes()
    path.write_bytes(original + b" ")
    try:
        assert differences(path.parent) == [
            "code.valid.jsonl differs",
            f"its packages are as pinned: remove {path.parent} and build it again, with Python 3.12",
        ]
        real = corpus.importlib.metadata.version
        monkeypatch.setattr(
            corpus.importlib.metadata, "version", lambda name: "0.1" if name == "numpy" else real(name)
        )
        assert "NOT the pinned one" in verdict(path.parent)
        said = differences(path.parent)
        assert said[0] == "code.valid.jsonl differs"
        assert said[1].startswith("numpy is 0.1 here and ")
        assert len(said) == 2
    finally:
        path.write_bytes(original)
    assert differences(path.parent) == []  # a version alone, with the same bytes, is no difference


def test_a_missing_folder_differs_everywhere(tmp_path: Path) -> None:
    assert differences(tmp_path, "full")[:4] == [f"{name}.jsonl differs" for name in NAMES]
