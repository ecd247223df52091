"""The bundled corpus: deterministic, split by file, without duplicates or paths of the machine."""

import ast
import inspect
import json
import re
import sys
import sysconfig
from pathlib import Path

import pytest

from megatron_et.data.corpus import CorpusSummary, _read_code, build_corpus, is_held_out

pytestmark = pytest.mark.megatron_free

NAMES = ["code.train", "code.valid", "prose.train", "prose.valid"]
LIMIT = 600_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusSummary:
    return build_corpus(tmp_path_factory.mktemp("corpus"), max_bytes_per_domain=LIMIT, valid_percent=10)


def documents(corpus: CorpusSummary, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in corpus.paths[name].read_text(encoding="utf-8").splitlines()]


def file_of(source: str) -> str:
    return source.removesuffix(":docstrings")


def test_same_installation_same_bytes(corpus: CorpusSummary, tmp_path: Path) -> None:
    again = build_corpus(tmp_path, max_bytes_per_domain=LIMIT, valid_percent=10, progress=False)
    assert again.sizes == corpus.sizes
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.jsonl" for name in NAMES]
    for name in NAMES:
        assert again.paths[name].read_bytes() == corpus.paths[name].read_bytes()


def test_summary_counts_what_was_written(corpus: CorpusSummary) -> None:
    for name in NAMES:
        texts = [document["text"] for document in documents(corpus, name)]
        assert corpus.sizes[name].documents == len(texts)
        assert corpus.sizes[name].bytes == sum(len(text.encode()) for text in texts)


def test_limit_and_share_of_validation(corpus: CorpusSummary) -> None:
    for domain in ("code", "prose"):
        valid, train = (corpus.sizes[f"{domain}.{split}"].bytes for split in ("valid", "train"))
        assert 0.9 * LIMIT < valid + train <= LIMIT
        assert 0.05 * LIMIT < valid <= 0.1 * LIMIT


def test_no_file_is_on_both_sides(corpus: CorpusSummary) -> None:
    files = {name: {file_of(document["source"]) for document in documents(corpus, name)} for name in NAMES}
    valid = files["code.valid"] | files["prose.valid"]
    assert not valid & (files["code.train"] | files["prose.train"])
    assert all(is_held_out(file, 10) for file in valid)


def test_no_text_twice(corpus: CorpusSummary) -> None:
    texts = [document["text"] for name in NAMES for document in documents(corpus, name)]
    assert len(set(texts)) == len(texts)


def test_docstrings_of_held_out_files_are_not_in_training(corpus: CorpusSummary) -> None:
    train = {
        paragraph
        for document in documents(corpus, "prose.train")
        for paragraph in re.split(r"\n\n+", document["text"])
    }
    held_out = documents(corpus, "code.valid") + documents(corpus, "prose.valid")
    files = {file_of(d["source"]) for d in held_out if file_of(d["source"]).endswith(".py")}
    roots = {"stdlib": sysconfig.get_path("stdlib"), "site-packages": sysconfig.get_path("purelib")}
    checked = 0
    for file in sorted(files):
        label, _, relative = file.partition("/")
        for node in ast.walk(ast.parse(Path(roots[label], relative).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node) or ""
                if len(docstring) >= 80 and "\n\n" not in docstring:
                    assert docstring not in train
                    checked += 1
    assert checked > 10


def test_paragraphs_of_held_out_prose_are_not_in_training(corpus: CorpusSummary) -> None:
    train = "\n".join(document["text"] for document in documents(corpus, "prose.train"))
    held_out = [d for d in documents(corpus, "prose.valid") if not d["source"].endswith(":docstrings")]
    assert held_out
    for document in held_out:
        assert not [part for part in document["text"].split("\n\n") if len(part) >= 80 and part in train]


def test_code_is_byte_for_byte_the_file(corpus: CorpusSummary) -> None:
    stdlib = Path(sysconfig.get_path("stdlib"))
    for document in documents(corpus, "code.train"):
        path = stdlib / document["source"].removeprefix("stdlib/")
        assert document["text"].encode() == path.read_bytes()


def test_prose_is_docstrings_and_shipped_texts(corpus: CorpusSummary) -> None:
    sources = {document["source"]: document["text"] for document in documents(corpus, "prose.train")}
    assert any(source.startswith("stdlib/pydoc_data/topics.py:") for source in sources)
    assert any(source.endswith("METADATA") for source in sources)
    for source, text in sources.items():
        if source.startswith("stdlib/") and source.endswith(":docstrings"):
            path = Path(sysconfig.get_path("stdlib"), file_of(source).removeprefix("stdlib/"))
            first_lines = inspect.cleandoc(text).splitlines()
            assert first_lines[0].strip() in path.read_text(encoding="utf-8")


def test_sources_name_no_path_of_the_machine(corpus: CorpusSummary) -> None:
    for name in NAMES:
        for document in documents(corpus, name):
            assert document["source"].startswith(("stdlib/", "site-packages/"))
            assert ".." not in document["source"]
            assert sys.prefix not in document["text"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"valid_percent": 0}, "valid_percent is 0"),
        ({"valid_percent": 51}, "valid_percent is 51"),
        ({"max_bytes_per_domain": 0}, "max_bytes_per_domain is 0"),
        ({"max_bytes_per_domain": 100}, "leaves no document for code.valid"),
    ],
)
def test_numbers_out_of_range(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_corpus(tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_generated_tables_and_undecodable_files_are_left_out(tmp_path: Path) -> None:
    stdlib = Path(sysconfig.get_path("stdlib"))
    assert _read_code(stdlib / "encodings" / "cp437.py") == []
    assert _read_code(stdlib / "ast.py") == [(stdlib / "ast.py").read_text(encoding="utf-8")]
    table = tmp_path / "table.py"
    table.write_text("TABLE = [" + "0x1234, " * 100 + "]\n")
    latin = tmp_path / "latin.py"
    latin.write_bytes("# coding: latin-1\nname = 'é'\n".encode("latin-1"))
    assert _read_code(table) == _read_code(latin) == []
