"""`megatron-et prepare`: text in, Megatron's own bytes out."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_et import cli
from megatron_et.data import dataset, records
from megatron_et.data.dataset import write_dataset
from megatron_et.data.files import PrepareError, staged
from megatron_et.data.records import batches, find_inputs
from megatron_et.data.tokenizer import read_tokenizer, sample, train_tokenizer
from tests.megatron_here import needs_newest
from tests.unit.data.prepare_files import (
    byte_level_tokenizer,
    pyarrow_or_skip,
    write_jsonl,
    write_parquet,
    zstd,
)

TEXTS = [
    *(f"def f{n}(x):\n    return x * {n}  # {'é' * (n % 4)} word {n}" for n in range(300)),
    "  two  blanks\t\n\n and 😀 and \u0000 a null",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return train_tokenizer([write_jsonl(folder / "train.jsonl", TEXTS)], folder / "bpe", 340)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "in.jsonl", TEXTS)


def written(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


def documents(prefix: Path) -> list[list[int]]:
    """As Megatron reads them."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return [np.asarray(tokens).tolist() for tokens in IndexedDataset(str(prefix))]


def naive(texts: Sequence[str], model: Path, prefix: Path) -> None:
    """As tools/preprocess_data.py of Megatron-LM does: a document at a time, with Megatron's builder."""
    import sentencepiece
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    dtype = DType.optimal_dtype(tokenizer.vocab_size())
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for text in texts:
        ids = [*tokenizer.encode_as_ids(text), tokenizer.eos_id()]
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


# --- the bytes ---


@pytest.mark.parametrize("workers", [1, 2])
def test_the_bytes_are_megatrons(workers: int, source: Path, model: Path, tmp_path: Path) -> None:
    naive(TEXTS, model, tmp_path / "naive")
    summary = write_dataset([source], tmp_path / "ours", model, workers=workers)
    assert written(tmp_path / "ours") == written(tmp_path / "naive")
    assert summary.counts["documents"] == len(TEXTS)
    assert not summary.bad
    assert not Path(f"{tmp_path / 'ours'}.parts").exists()


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt", "txt.gz", "txt.zst"])
def test_every_form_of_input_has_the_same_documents(kind: str, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    # Several members, several frames.
    packed: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstd}
    form, _, packing = kind.partition(".")
    if form == "parquet":
        write_parquet(folder / "all.parquet", {"text": TEXTS, "other": [1] * len(TEXTS)}, 64)
    elif form == "jsonl":
        pack = packed.get(packing, lambda data: data)
        (folder / f"all.{kind}").write_bytes(pack(lines[:5000]) + pack(lines[5000:]))
    else:
        for number, text in enumerate(TEXTS):
            pack = packed.get(packing, lambda data: data)
            (folder / f"{number:04}.{kind}").write_bytes(pack(text.encode()))
    naive(TEXTS, model, tmp_path / "naive")
    write_dataset([str(folder / "*")], tmp_path / "ours", model)
    assert written(tmp_path / "ours") == written(tmp_path / "naive")


def test_small_batches_change_nothing(
    source: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset([source], tmp_path / "one", model)
    small = dataset.batches
    monkeypatch.setattr(dataset, "batches", lambda path, key: small(path, key, 200))
    write_dataset([source], tmp_path / "many", model)
    assert written(tmp_path / "many") == written(tmp_path / "one")


def test_a_trained_tokenizer_is_lossless_and_the_same_each_time(source: Path, tmp_path: Path) -> None:
    import sentencepiece

    first, second = (train_tokenizer([source], tmp_path / name, 330) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(first))
    for text in [*TEXTS[:-1], "never seen: 漢字 🎈\r\n"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()
    assert len(set(ids)) == 4
    assert min(ids) >= 0


def test_a_sample_is_of_all_files_by_their_sizes(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [str(n) * 100] * (n * 1000)) for n in (1, 3)]
    taken = list(sample(files, sample_bytes=40_000))
    sizes = [sum(len(sentence) for sentence in taken if sentence[0] == str(n)) for n in (1, 3)]
    assert sizes == [pytest.approx(10_000, rel=0.1), pytest.approx(30_000, rel=0.1)]
    assert len(list(sample(files, sample_bytes=10**9))) == 4000


@pytest.mark.parametrize("special", [True, False])
def test_hugging_face_tokenizers_have_their_own_ids(special: bool, source: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    folder = byte_level_tokenizer(tmp_path / "hf", TEXTS, eos_token="<|eos|>")
    write_dataset([source], tmp_path / "ours", folder, special_tokens=special)
    own = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    eod = own.token_to_id("<|eos|>")
    expected = [[*own.encode(text, add_special_tokens=special).ids, eod] for text in TEXTS]
    assert documents(tmp_path / "ours") == expected


@needs_newest
def test_hugging_face_ids_are_megatrons(tmp_path: Path) -> None:
    """With transformers, whose settings decide, as in Megatron."""
    transformers = pytest.importorskip("transformers")
    folder = byte_level_tokenizer(
        tmp_path / "hf", TEXTS, eos_token="<|eos|>", tokenizer_class="PreTrainedTokenizerFast"
    )
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    ours = read_tokenizer(folder)
    assert ours.eod == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)
    assert list(ours.encode(TEXTS[:20])) == [theirs(text)["input_ids"] for text in TEXTS[:20]]


# --- going on ---


def test_finished_files_are_skipped_and_a_killed_run_leaves_nothing(model: Path, tmp_path: Path) -> None:
    """SIGKILL in the second file: no dataset, and the first file is not read again."""
    first = write_jsonl(tmp_path / "a.jsonl", TEXTS * 40)
    second = write_jsonl(tmp_path / "b.jsonl", TEXTS * 400)
    assert first.stat().st_size < second.stat().st_size
    whole, prefix = tmp_path / "whole", tmp_path / "killed"
    code = "from megatron_et.cli import main; main()"
    words = ["prepare", "--input", first, second, "--output", prefix, "--tokenizer-model", model]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, words)], stdout=subprocess.PIPE
    )
    parts = Path(f"{prefix}.parts")
    while not list(parts.glob("*.json")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not Path(f"{prefix}.bin").exists()
    assert not Path(f"{prefix}.idx").exists()

    write_dataset([first, second], whole, model)
    read: list[Path] = []
    original = dataset.batches

    def seen(path: Path, key: str) -> Any:
        read.append(path)
        return original(path, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "batches", seen)
        summary = write_dataset([first, second], prefix, model)
    assert read == [second]
    assert written(prefix) == written(whole)
    assert summary.counts["documents"] == len(TEXTS) * 440
    assert not parts.exists()


@pytest.mark.parametrize("change", ["input", "setting", "tokenizer"])
def test_a_part_of_something_else_is_not_taken(
    change: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "_SMALL_BYTES", 0)  # each file its own part
    good = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    broken = tmp_path / "b.jsonl.gz"
    broken.write_bytes(gzip.compress(b"x" * 1000)[:-20])
    prefix = tmp_path / "out"
    with pytest.raises(PrepareError, match="cannot be read"):
        write_dataset([good, broken], prefix, model)
    assert len(list(Path(f"{prefix}.parts").glob("*.json"))) == 1
    eod = change != "setting"
    if change == "input":
        write_jsonl(good, TEXTS[:7])
    if change == "tokenizer":
        model = train_tokenizer([good], tmp_path / "other", 300)
    write_dataset([good], prefix, model, append_eod=eod)
    write_dataset([good], tmp_path / "anew", model, append_eod=eod)
    assert written(prefix) == written(tmp_path / "anew")


def test_a_full_disk_leaves_the_dataset_as_it_was(
    source: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tmp_path / "out"
    write_dataset([source], prefix, model)
    before = written(prefix)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_et.data.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_dataset([write_jsonl(tmp_path / "other.jsonl", ["other"])], prefix, model)
    assert written(prefix) == before


def test_staged_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    targets = [tmp_path / "a", tmp_path / "b"]

    def fails() -> None:
        with staged(*targets) as drafts:
            drafts[0].write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert list(tmp_path.iterdir()) == []
    with staged(*targets) as drafts:
        for draft in drafts:
            draft.write_text("whole")
    assert [target.read_text() for target in targets] == ["whole"] * 2


# --- bad input ---

BAD = [
    b'{"text": "good one"}',
    b"not json",
    b'{"other": 1}',
    b'{"text": 7}',
    b'"a string"',
    b'{"text": "\xff"}',
    b'{"text": "\\ud800"}',
    b'{"text": ""}',
    b"",
    b'{"text": "good two"}',
]


def test_bad_records_are_counted_by_reason_with_the_first(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(BAD))
    summary = write_dataset([path], tmp_path / "out", model)
    assert summary.counts["documents"] == len(documents(tmp_path / "out")) == 2
    assert summary.bad == {"invalid JSON": 1, "without a string 'text'": 3, "not UTF-8": 2, "empty": 2}
    assert summary.first["invalid JSON"] == f"{path}:2"
    assert "8 of 10 records are bad (1 invalid JSON, first at" in summary.bad_records()


def test_strict_and_a_share_stop(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(BAD))
    for settings, why in (
        ({"strict": True}, "leave out --strict"),
        ({"max_bad_share": 0.5}, "--max-bad-share"),
    ):
        with pytest.raises(PrepareError, match=why):
            write_dataset([path], tmp_path / "out", model, **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "out.bin").exists()
    write_dataset([path], tmp_path / "out", model, max_bad_share=0.8)


def test_a_wrong_key_stops_early(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", TEXTS * 20)
    small = dataset.batches
    read: list[int] = []

    def counted(path: Path, key: str) -> Any:
        for batch in small(path, key, 2000):
            read.append(len(batch.records))
            yield batch

    monkeypatch.setattr(dataset, "batches", counted)
    with pytest.raises(PrepareError, match="check --json-key"):
        write_dataset([path], tmp_path / "out", model, json_key="content")
    assert 1000 <= sum(read) < 2000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000)[:-20]),
        ("no.jsonl.gz", b"no gzip"),
        ("no.jsonl.zst", b"no zstd"),
        ("no.parquet", b"no parquet"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: bytes, model: Path, tmp_path: Path) -> None:
    if name.endswith(("zst", "parquet")):
        pyarrow_or_skip()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PrepareError, match=rf"{name} cannot be read .*leave it out"):
        write_dataset([tmp_path / name], tmp_path / "out", model)
    assert not (tmp_path / "out.bin").exists()


def test_a_record_that_is_too_long_is_left_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 100)
    summary = write_dataset(
        [write_jsonl(tmp_path / "in.jsonl", ["a", "b" * 500, "c"])], tmp_path / "o", model
    )
    assert summary.bad == {"longer than 100 bytes": 1}
    assert summary.counts["documents"] == 2


def test_the_reader_is_never_far_ahead(tmp_path: Path) -> None:
    """Bounded memory: at most so many batches are read and not yet written."""
    path = write_jsonl(tmp_path / "in.jsonl", TEXTS * 20)
    read = 0

    def counted() -> Any:
        nonlocal read
        for batch in batches(path, "text", 1000):
            read += 1
            yield batch

    with dataset._pool(1) as pool:
        for written_so_far, _ in enumerate(dataset._in_order(pool, lambda b: b, counted(), 4)):  # type: ignore[arg-type, return-value]
            assert read - written_so_far <= 4
    assert read > 50


def test_a_killed_worker_is_one_sentence(
    source: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures.process import BrokenProcessPool

    def broken(*_: Any) -> Any:
        raise BrokenProcessPool

    monkeypatch.setattr(dataset, "_in_order", broken)
    with pytest.raises(PrepareError, match="a worker was killed"):
        write_dataset([source], tmp_path / "out", model)


def test_inputs_are_found_once_and_sorted(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "a[1].txt"):
        (tmp_path / name).touch()
    found = find_inputs([tmp_path / "a[1].txt", str(tmp_path / "*.txt")])
    assert [path.name for path in found] == ["a[1].txt", "a.txt", "b.txt"]
    with pytest.raises(PrepareError, match="no file matches"):
        find_inputs([tmp_path / "*.jsonl"])


@pytest.mark.parametrize("made", ["nothing", "text", "empty folder"])
def test_a_tokenizer_that_is_none_is_refused(made: str, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer"
    if made == "text":
        path.write_text("no model")
    elif made == "empty folder":
        path.mkdir()
    with pytest.raises(PrepareError, match="no tokenizer can be read from"):
        write_dataset([source], tmp_path / "out", path)


# --- the command ---


def test_the_command_trains_and_writes(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "new" / "mine"
    words = ["prepare", "--input", source, "--output", prefix, "--train-tokenizer", "--vocab-size", 330]
    assert cli.main([str(word) for word in words]) == 0
    assert f"{prefix}: {len(TEXTS)} documents" in capsys.readouterr().out
    naive(TEXTS, Path(f"{prefix}.model"), tmp_path / "naive")
    assert written(prefix) == written(tmp_path / "naive")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--train-tokenizer", "give --vocab-size N with --train-tokenizer"),
        ("--train-tokenizer --vocab-size 3", "--vocab-size 3 does not suit the input"),
        ("--tokenizer-model nowhere.model", "no tokenizer can be read from nowhere.model"),
    ],
)
def test_wrong_use_is_one_sentence_and_status_2(
    words: str, sentence: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["prepare", "--input", str(source), "--output", str(tmp_path / "out"), *words.split()]
    assert cli.main(line) == 2
    error = capsys.readouterr().err
    assert error.startswith("megatron-et prepare: ")
    assert sentence in error
    assert error.count("\n") == 1


def test_it_needs_no_gpu_and_prints_no_noise(source: Path, model: Path, tmp_path: Path) -> None:
    code = "from megatron_et.cli import main; raise SystemExit(main())"
    words = ["prepare", "--input", source, "--output", tmp_path / "out", "--tokenizer-model", model]
    ran = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.count("\n") == 1
    assert ran.stdout.startswith(str(tmp_path / "out"))
