"""`megatron-et prepare`: tokenizer and dataset as Megatron reads them, bad records, errors, workers."""

import argparse
import gzip
import importlib.util
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.tokenizers.text.text_tokenizer import MegatronTokenizerText

from megatron_et.cli import main
from megatron_et.data import pieces
from megatron_et.data.dataset import BadRecords, write_dataset
from megatron_et.data.reading import PrepareError, find_inputs
from megatron_et.data.tokenizer import _SENTENCE_CHARS, _sample_sentences, train_tokenizer
from tests.megatron_here import absent
from tests.unit.data.prepare_files import write_jsonl, write_parquet, zstd

VOCAB_SIZE = 512
# U+2581 is SentencePiece's own sign for a blank.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60)
CODE = "def f(x):\n\tif x:\n        return  'ä €  🙂'   \r\n\n\n    # trailing blanks  \n"


def stdlib_texts(pattern: str) -> list[str]:
    return [
        path.read_text(encoding="utf-8") for path in sorted(Path(sysconfig.get_path("stdlib")).glob(pattern))
    ]


def read_documents(prefix: Path, model: Path) -> list[str]:
    """The documents of a dataset as text, through Megatron's reader; the eod is checked and taken off."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    dataset = IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    documents = [dataset[i].tolist() for i in range(len(dataset))]
    assert all(ids[-1] == tokenizer.eos_id() for ids in documents)
    return [tokenizer.decode_ids(ids[:-1]) for ids in documents]


def first_tokens(prefix: Path) -> list[int]:
    """The first document's ids, copied while the reader is alive: its arrays are views of its memory map."""
    dataset = IndexedDataset(str(prefix))
    return dataset[0].tolist()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "code.jsonl", stdlib_texts("[a-d]*.py"))


@pytest.fixture(scope="module")
def model(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(
        [corpus], tmp_path_factory.mktemp("tokenizer") / "bpe", VOCAB_SIZE, sample_bytes=300_000
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder for results, apart from the inputs."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def megatron_tokenizer(model: Path) -> MegatronTokenizerText:
    """What Megatron makes of --tokenizer-type SentencePieceTokenizer --tokenizer-model MODEL."""
    arguments = argparse.Namespace(
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=str(model),
        chat_template=None,
        tokenizer_sentencepiece_ignore_extra_whitespaces=True,
        tokenizer_sentencepiece_legacy=False,
        special_tokens=None,
        metadata_path=None,
        tokenizer_special_tokens=None,
        pad_vocab_size=False,
    )
    if importlib.util.find_spec("megatron.core.tokenizers.utils") is None:
        absent("tokenizers in megatron.core")
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    return build_tokenizer(arguments)


# What Megatron sees


def test_megatron_loads_the_tokenizer_with_four_distinct_special_ids(model: Path) -> None:
    tokenizer = megatron_tokenizer(model)
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.eod == tokenizer.eos
    assert len({tokenizer.unk, tokenizer.bos, tokenizer.eod, tokenizer.pad}) == 4
    assert min(tokenizer.unk, tokenizer.bos, tokenizer.eod, tokenizer.pad) >= 0
    assert tokenizer.detokenize(tokenizer.tokenize(CODE)) == CODE


def test_dataset_has_megatrons_tokens_and_its_eod(model: Path, tmp_path: Path) -> None:
    texts = [CODE, "  leading blanks", "</s> is text here"]
    summary = write_dataset([write_jsonl(tmp_path / "in.jsonl", texts)], tmp_path / "data", model)
    tokenizer = megatron_tokenizer(model)
    dataset = IndexedDataset(str(tmp_path / "data"))
    assert [dataset[i].tolist() for i in range(3)] == [[*tokenizer.tokenize(t), tokenizer.eod] for t in texts]
    assert dataset[0].dtype == np.uint16
    assert summary.documents == 3
    assert summary.tokens == sum(dataset.sequence_lengths)
    assert summary.bytes == sum(len(text.encode()) for text in texts)
    assert summary.bad_records == {}


def test_without_eod(model: Path, tmp_path: Path) -> None:
    write_dataset([write_jsonl(tmp_path / "in.jsonl", [CODE])], tmp_path / "data", model, append_eod=False)
    assert first_tokens(tmp_path / "data") == megatron_tokenizer(model).tokenize(CODE)


def test_megatron_builds_a_gpt_dataset(corpus: Path, model: Path, tmp_path: Path) -> None:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    write_dataset([corpus], tmp_path / "data", model)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=64,
        blend_per_split=[([str(tmp_path / "data")], None), None, None],
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=megatron_tokenizer(model),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [10, 0, 0], lambda: True, config).build()
    sample = train[0]
    assert sample["tokens"].shape == sample["labels"].shape == (64,)
    assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
    assert sample["loss_mask"].min() == 1  # no token of the text is taken for padding


# Round trip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS.filter(lambda text: text.strip()), min_size=1, max_size=5))
def test_any_text_comes_back(model: Path, texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = write_jsonl(Path(folder, "in.jsonl"), texts)
        write_dataset([source], Path(folder, "data"), model, progress=False)
        assert read_documents(Path(folder, "data"), model) == texts


def test_real_code_comes_back(corpus: Path, model: Path, tmp_path: Path) -> None:
    write_dataset([corpus], tmp_path / "data", model)
    assert read_documents(tmp_path / "data", model) == stdlib_texts("[a-d]*.py")


def test_blank_sign_of_sentencepiece_becomes_a_space(model: Path, tmp_path: Path) -> None:
    write_dataset([write_jsonl(tmp_path / "in.jsonl", ["a\u2581b"])], tmp_path / "data", model)
    assert read_documents(tmp_path / "data", model) == ["a b"]


def test_text_files_are_one_document_each_and_keep_their_line_ends(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n")
    (tmp_path / "b.md").write_bytes(b"\xef\xbb\xbf# three\n")
    write_dataset([tmp_path / "b.md", tmp_path / "a.txt"], tmp_path / "data", model)
    assert read_documents(tmp_path / "data", model) == ["# three\n", "one\r\ntwo\n"]


# Windows and workers


@pytest.mark.parametrize("window_bytes", [1, 7, 100])
def test_windows_split_jsonl_without_losing_lines(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_bytes: int
) -> None:
    texts = [f"line {i} " + "x" * (i % 5 * 20) for i in range(20)]
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    source.write_bytes(source.read_bytes().removesuffix(b"\n"))  # the last line need not end
    monkeypatch.setattr(pieces, "PIECE_BYTES", window_bytes)
    write_dataset([source], tmp_path / "data", model)
    assert read_documents(tmp_path / "data", model) == texts


def test_same_bytes_for_any_number_of_workers(
    corpus: Path, model: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "some.txt"
    text.write_text(CODE, encoding="utf-8")
    monkeypatch.setattr(pieces, "PIECE_BYTES", 10_000)
    one = write_dataset([corpus, text], out / "one", model, workers=1)
    two = write_dataset([corpus, text], out / "two", model, workers=2)
    assert (out / "one.bin").read_bytes() == (out / "two.bin").read_bytes()
    assert (out / "one.idx").read_bytes() == (out / "two.idx").read_bytes()
    assert (one.documents, one.tokens, one.bytes) == (two.documents, two.tokens, two.bytes)


def test_worker_errors_reach_the_caller(model: Path, tmp_path: Path, out: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "good"}\n{"text": 1}\n')
    with pytest.raises(PrepareError, match=r"in\.jsonl:2"):
        write_dataset([source], out / "data", model, workers=2, strict=True)
    assert contents(out) == {}


# Tokenizer training


def test_training_is_deterministic(corpus: Path, model: Path, out: Path) -> None:
    again = train_tokenizer([corpus], out / "bpe.v2", VOCAB_SIZE, sample_bytes=300_000, progress=False)
    assert again == out / "bpe.v2.model"
    assert again.read_bytes() == model.read_bytes()
    assert list(contents(out)) == ["bpe.v2.model"]


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_sample_is_spread_over_all_of_the_input(tmp_path: Path, suffix: str) -> None:
    files = []
    for letter in "abcde":
        lines = [json.dumps({"text": letter * 90}) if suffix == ".jsonl" else letter * 90] * 2_000
        files.append(tmp_path / (letter + suffix))
        files[-1].write_text("\n".join(lines))
    sentences = list(_sample_sentences(files, "text", 200_000))
    assert 150_000 < sum(map(len, sentences)) <= 200_000 + _SENTENCE_CHARS
    assert {letter for sentence in sentences for letter in sentence} >= set("abcd")
    everything = "".join(_sample_sentences(files, "text", 10**9))
    assert [everything.count(letter) for letter in "abcde"] == [180_000] * 5


# Bad records

BAD_LINES = [
    (b"{", "invalid JSON"),
    (b'{"text": "a"} trailing', "invalid JSON"),
    (b'{"text": ' + b"1" * 5_000 + b"}", "invalid JSON"),
    (b"[" * 100_000, "invalid JSON"),
    (b'["text"]', "not an object"),
    (b'{"content": "a"}', "without the key 'text'"),
    (b'{"text": null}', "with a 'text' that is not a string"),
    (b'{"text": ""}', "empty"),
    (b'{"text": " \\n"}', "empty"),
    (b"", "empty"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "\\ud800"}', "not UTF-8"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=lambda value: str(value)[:30])
def test_bad_records_are_counted_and_skipped(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes, reason: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "first"}\n' + line + b"\n" + line + b'\n{"text": "last"}\n')
    arguments = ["prepare", "--input", str(source), "--output", str(tmp_path / "data")]
    assert main([*arguments, "--tokenizer-model", str(model)]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"left out 2 bad records of 4:\n  2 {reason}, first at {source}:2\n"
    assert captured.out.startswith(f"{tmp_path / 'data'}: 2 documents, ")
    assert read_documents(tmp_path / "data", model) == ["first", "last"]


def test_strict_names_file_and_line(
    model: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 20)  # the line number counts the lines of earlier windows
    good = write_jsonl(tmp_path / "good.jsonl", ["a", "b"])
    bad = write_jsonl(tmp_path / "bad.jsonl", ["a", "b", "c", " "])
    with pytest.raises(PrepareError, match=re.escape(f"bad record at {bad}:4: empty")):
        write_dataset([good, bad], out / "data", model, strict=True)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(PrepareError, match=re.escape(f"bad record at {tmp_path / 'empty.txt'}: empty")):
        write_dataset([good, tmp_path / "empty.txt"], out / "data", model, strict=True)
    assert contents(out) == {}


def test_characters_that_a_tokenizer_drops_are_an_empty_record(tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("some words to learn from, some more words " * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "nfkc"),
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    source = write_jsonl(tmp_path / "in.jsonl", ["some words", "\x01\x02"])
    summary = write_dataset([source], tmp_path / "data", tmp_path / "nfkc.model")
    assert (summary.documents, summary.bad_records) == (1, {"empty": BadRecords(1, f"{source}:2")})


def test_bad_records_are_reported_by_reason_with_the_first_of_each(
    model: Path,
    tmp_path: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 30)
    lines = ['{"text": "good"}', "", "{", '{"text": 1}', "", '{"text": "good"}', "["]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("\n{")
    (tmp_path / "c.txt").write_text(" ")
    command = ["--input", str(tmp_path / "*"), "--tokenizer-model", str(model), "--workers", "2"]
    assert run_command(out, *command) == 0
    assert capsys.readouterr().err.splitlines() == [
        "left out 8 bad records of 10:",
        f"  4 empty, first at {tmp_path}/a.jsonl:2",
        f"  3 invalid JSON, first at {tmp_path}/a.jsonl:3",
        f"  1 with a 'text' that is not a string, first at {tmp_path}/a.jsonl:4",
    ]


def test_max_bad_share(model: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["good"] * 6_000 + [" "] * 1_500)
    summary = write_dataset([source], out / "data", model, max_bad_share=0.2)
    assert summary.documents == 6_000
    assert summary.bad_records["empty"].count == 1_500
    before = contents(out)
    with pytest.raises(
        PrepareError, match=r"1,500 of the first 7,500 records are bad .*--max-bad-share 0\.199"
    ):
        write_dataset([source], out / "data", model, max_bad_share=0.199)
    # Said as soon as 1,000 records are read, and not at the end.
    write_jsonl(source, ["good"] * 900 + [" "] * 300 + ["good"] * 100_000)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 5_000)
    with pytest.raises(PrepareError, match=r"of the first 1,[0-3]\d\d records are bad"):
        write_dataset([source], out / "data", model, max_bad_share=0.01)
    assert contents(out) == before
    with pytest.raises(PrepareError, match=r"1\.5 is not a share"):
        write_dataset([source], out / "data", model, max_bad_share=1.5)


def test_an_input_of_bad_records_only_is_found_at_its_beginning(
    model: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 5_000)
    source = write_jsonl(tmp_path / "in.jsonl", ["good"] * 20_000)
    with pytest.raises(PrepareError, match=r"all of the first 1,\d\d\d records are bad .*: check --json-key"):
        write_dataset([source], out / "data", model, json_key="content")
    assert contents(out) == {}


def test_records_over_the_limit_are_bad(model: Path, tmp_path: Path, out: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["short", "long " * 100])
    (tmp_path / "long.txt").write_text("long " * 100)
    summary = write_dataset([source, tmp_path / "long.txt"], out / "data", model, max_record_bytes=300)
    assert read_documents(out / "data", model) == ["short"]
    assert summary.bad_records == {"longer than 300 bytes": BadRecords(2, f"{source}:2")}
    with pytest.raises(PrepareError, match="records of up to 2,000,000,000 bytes cannot be indexed"):
        write_dataset([source], out / "data", model, max_record_bytes=2_000_000_000)


def test_progress_bar_on_a_terminal(
    corpus: Path, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich take anything for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(pieces, "PIECE_BYTES", 100_000)
    assert run_command(out, "--input", str(corpus), "--tokenizer-model", str(model)) == 0
    said = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", capsys.readouterr().err)
    assert re.search(r"Tokenizing .* \d+% [\d,]+ documents, [\d,]+ tokens/s, [\d.]+ MB/s \d:\d\d:\d\d", said)


def test_formats_give_the_same_dataset(corpus: Path, model: Path, tmp_path: Path, out: Path) -> None:
    texts = stdlib_texts("[a-d]*.py")
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    (tmp_path / "in.jsonl.zst").write_bytes(zstd(corpus.read_bytes()))
    write_parquet(tmp_path / "in.parquet", {"text": texts, "other": range(len(texts))}, 7)
    write_dataset([corpus], out / "data", model)
    expected = contents(out)
    for source in sorted(tmp_path.glob("in.*")):
        write_dataset([source], out / "data", model, workers=2)
        assert contents(out) == expected
    arguments = ["--input", str(tmp_path / "in.parquet"), "--train-tokenizer", "--vocab-size", "400"]
    assert run_command(out, *arguments) == 0
    assert read_documents(out / "data", out / "data.model") == texts


def test_megatrons_own_writer_gives_the_same_bytes(
    corpus: Path, model: Path, tmp_path: Path, out: Path
) -> None:
    """As tools/preprocess_data.py uses it; benchmarks/prepare_throughput.py compares the script itself."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = megatron_tokenizer(model)
    builder = IndexedDatasetBuilder(
        str(tmp_path / "data.bin"), dtype=DType.optimal_dtype(tokenizer.vocab_size)
    )
    for text in stdlib_texts("[a-d]*.py"):
        ids = [*tokenizer.tokenize(text), tokenizer.eod]
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "data.idx"))
    write_dataset([corpus], out / "data", model)
    for name in ("data.bin", "data.idx"):
        assert (out / name).read_bytes() == (tmp_path / name).read_bytes()


# The command


def test_command_trains_and_writes_under_exactly_the_given_names(
    corpus: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prepare", "--input", str(corpus.parent / "*.jsonl"), "--output", str(out / "my.data")]
    training = ["--train-tokenizer", "--vocab-size", "400", "--sample-bytes", "100000"]
    assert main([*arguments, *training]) == 0
    assert sorted(contents(out)) == ["my.data.bin", "my.data.idx", "my.data.model"]
    captured = capsys.readouterr()
    assert captured.err == ""
    assert re.fullmatch(
        rf"{re.escape(str(out))}/my\.data: [\d,]+ documents, [\d,]+ tokens, [\d,]+ bytes of text "
        r"in [\d.]+ s, [\d,]+ tokens/s\n",
        captured.out,
    )
    assert read_documents(out / "my.data", out / "my.data.model") == stdlib_texts("[a-d]*.py")


def test_command_passes_its_options_on(model: Path, tmp_path: Path, out: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"body": "some text"}\n{"body": 3}\n')
    arguments = ["prepare", "--input", str(source), "--output", str(out / "data"), "--json-key", "body"]
    assert main([*arguments, "--tokenizer-model", str(model), "--no-append-eod"]) == 0
    assert first_tokens(out / "data") == megatron_tokenizer(model).tokenize("some text")
    assert main([*arguments, "--tokenizer-model", str(model), "--strict"]) == 2
    training = ["--train-tokenizer", "--vocab-size", "268", "--tokenizer-output", str(out / "names" / "t")]
    assert main([*arguments, *training]) == 0
    assert (out / "names" / "t.model").is_file()


def test_globs_are_sorted_recursive_and_name_each_file_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", "d[1].txt", "sub.txt/x"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("text")
    found = find_inputs([str(tmp_path / "b.txt"), str(tmp_path / "**" / "*.txt"), str(tmp_path / "d[1].txt")])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["b.txt", "a.txt", "d[1].txt", "sub/c.txt"]


def run_command(out: Path, *arguments: str) -> int:
    output = [] if "--output" in arguments else ["--output", str(out / "data")]
    return main(["prepare", *arguments, *output])


ERRORS = {
    "missing input": ("--input {tmp}/none.txt --tokenizer-model {model}", r"none\.txt does not exist"),
    "glob without match": ("--input {tmp}/*.xyz --tokenizer-model {model}", r"no file matches '.*\*\.xyz'"),
    "folder as input": ("--input {tmp} --tokenizer-model {model}", r"is a folder: name files or a glob"),
    "missing tokenizer": ("--input {text} --tokenizer-model {tmp}/t.model", r"t\.model does not exist"),
    "broken tokenizer": ("--input {text} --tokenizer-model {text}", r"is not a SentencePiece model"),
    "no vocabulary size": ("--input {text} --train-tokenizer", r"needs --vocab-size N"),
    "vocabulary too large": (
        "--input {text} --train-tokenizer --vocab-size 100000",
        r"100000 pieces is too large for \d+ bytes .* at most \d+: lower --vocab-size",
    ),
    "vocabulary too small": ("--input {text} --train-tokenizer --vocab-size 265", r"265 pieces is too small"),
    "vocabulary below bytes": ("--input {text} --train-tokenizer --vocab-size 1", r"use at least 261"),
    "nothing to train on": ("--input {empty} --train-tokenizer --vocab-size 300", r"no usable record"),
    "no document": (
        "--input {blank} --tokenizer-model {model}",
        r"no document in the input \(1 empty, first at .*blank\.jsonl:1\)",
    ),
    "no line": (
        "--input {empty} --tokenizer-model {model}",
        r"no document .* \(the files are empty\)",
    ),
    "size for a given tokenizer": (
        "--input {text} --tokenizer-model {model} --vocab-size 300",
        r"--vocab-size is for --train-tokenizer",
    ),
    "output below a file": (
        "--input {text} --tokenizer-model {model} --output {text}/data",
        r"cannot read or write .*in\.txt: Not a directory",
    ),
    "output folder not writable": (
        "--input {text} --tokenizer-model {model} --output /proc/nowhere/data",
        r"cannot read or write /proc/nowhere: No such file",
    ),
    "tokenizer output is a folder": (
        "--input {text} --train-tokenizer --vocab-size 300 --tokenizer-output {tmp}/taken",
        r"cannot read or write .*taken\.model: Is a directory",
    ),
}


@pytest.mark.parametrize(("arguments", "sentence"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_are_one_sentence_and_leave_nothing(
    model: Path, tmp_path: Path, out: Path, capfd: pytest.CaptureFixture[str], arguments: str, sentence: str
) -> None:
    names = {"tmp": tmp_path, "model": model, "text": tmp_path / "in.txt"}
    names |= {"empty": tmp_path / "empty.jsonl", "blank": tmp_path / "blank.jsonl"}
    names["text"].write_text("A few words of text, ten characters at least.\n")
    names["empty"].write_text("")
    names["blank"].write_text("\n")
    (tmp_path / "taken.model").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert run_command(out, *(word.format(**names) for word in arguments.split())) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"megatron-et prepare: .*{sentence}.*\n", captured.err)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("option", ["--workers", "--vocab-size", "--sample-bytes"])
def test_counts_must_be_positive(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["prepare", "--input", "a", "--output", "b", "--train-tokenizer", option, "0"])
    assert exit_info.value.code == 2
    assert f"argument {option}: 0 is not a positive number" in capsys.readouterr().err


def test_a_tokenizer_without_eos_needs_no_append_eod(corpus: Path, tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn from"]),
        model_prefix=str(tmp_path / "no_eos"),
        vocab_size=30,
        hard_vocab_limit=False,
        eos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(PrepareError, match="no end-of-sentence piece, which is Megatron's eod"):
        write_dataset([corpus], tmp_path / "data", tmp_path / "no_eos.model")
    write_dataset([corpus], tmp_path / "data", tmp_path / "no_eos.model", append_eod=False)


def test_workers_of_the_api_must_be_positive(corpus: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="0 workers"):
        write_dataset([corpus], tmp_path / "data", model, workers=0)


def test_sentencepiece_not_installed(
    model: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert run_command(out, "--input", str(model), "--tokenizer-model", str(model)) == 2
    assert "pip install sentencepiece" in capsys.readouterr().err


def test_a_failed_run_keeps_the_earlier_dataset(model: Path, tmp_path: Path, out: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["first"])
    write_dataset([source], out / "data", model)
    before = contents(out)
    write_jsonl(source, ["second", ""])
    with pytest.raises(PrepareError):
        write_dataset([source], out / "data", model, strict=True)
    assert contents(out) == before


def test_installed_command_is_quiet_without_a_terminal(corpus: Path, model: Path, out: Path) -> None:
    command = [sys.executable, "-m", "megatron_et.cli", "prepare", "--input", str(corpus)]
    command += ["--output", str(out / "data"), "--tokenizer-model", str(model), "--workers", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 1
