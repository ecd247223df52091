"""The pinned corpus (examples/corpus.py), in its small size."""

import json
from pathlib import Path

import pytest

from examples import corpus
from examples.corpus import NAMES, Corpus, build, differences, is_held_out

pytestmark = pytest.mark.megatron_free  # another version of Megatron is another source


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build(tmp_path_factory.mktemp("corpus"), "quickstart", progress=False)


def texts(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_byte_is_as_pinned(built: Corpus) -> None:
    """On every machine with the lock; `python examples/corpus.py OUT --write-hashes` after a new one."""
    assert built.differences == []
    assert str(built).startswith("corpus: as pinned, sha256 ")


def test_the_sizes_are_those_asked_for(built: Corpus) -> None:
    for domain in corpus.DOMAINS:
        both = built.bytes[f"{domain}.train"] + built.bytes[f"{domain}.valid"]
        assert 5_800_000 < both <= 6_000_000
    for name, path in built.paths.items():
        found = texts(path)
        assert len(found) == built.documents[name]
        assert sum(len(document["text"].encode()) for document in found) == built.bytes[name]


def test_files_are_held_out_whole(built: Corpus) -> None:
    for name, path in built.paths.items():
        for document in texts(path):
            file = document["source"].removesuffix(":docstrings")
            assert is_held_out(file) == name.endswith("valid")
    shares = [is_held_out(f"package/file{n}.py") for n in range(4000)]
    assert 0.04 < sum(shares) / len(shares) < 0.06


def test_no_long_piece_appears_twice(built: Corpus) -> None:
    seen: set[str] = set()
    for domain in corpus.DOMAINS:
        for split in ("valid", "train"):
            found = [document["text"] for document in texts(built.paths[f"{domain}.{split}"])]
            assert not seen & set(found)
            assert len(found) == len(set(found))
            seen |= set(found)


def test_code_is_no_copy_of_code(built: Corpus) -> None:
    """Of no document more than a third of the long lines stood in those before it, validation first."""
    before: set[str] = set()
    for split in ("valid", "train"):
        for document in texts(built.paths[f"code.{split}"]):
            lines = {line.strip() for line in document["text"].splitlines() if len(line.strip()) >= 20}
            assert len(lines & before) <= len(lines) / 3
            before |= lines


def test_another_byte_and_another_version_are_said(built: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = built.paths["code.valid"].parent
    path = built.paths["code.valid"]
    original = path.read_bytes()
    path.write_bytes(original + b" ")
    try:
        assert differences(folder, "quickstart") == ["code.valid.jsonl differs"]
        real = corpus.importlib.metadata.version
        monkeypatch.setattr(
            corpus.importlib.metadata, "version", lambda name: "0.1" if name == "numpy" else real(name)
        )
        said = differences(folder, "quickstart")
        assert said[0] == "code.valid.jsonl differs"
        assert said[1].startswith("numpy is 0.1 here and ")
        assert len(said) == 2
    finally:
        path.write_bytes(original)
    assert differences(folder, "quickstart") == []  # a version alone, with the same bytes, is no difference


def test_a_missing_folder_differs_everywhere(tmp_path: Path) -> None:
    assert differences(tmp_path, "full")[:4] == [f"{name}.jsonl differs" for name in NAMES]
