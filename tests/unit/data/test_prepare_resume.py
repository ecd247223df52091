"""A run that is killed and started again gives the bytes of one that was not; nothing half-made shows."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_et.cli import main
from megatron_et.data import dataset, pieces
from megatron_et.data import draft as module
from megatron_et.data.dataset import write_dataset
from megatron_et.data.draft import Draft
from megatron_et.data.reading import PrepareError
from megatron_et.data.tokenizer import train_tokenizer
from tests.unit.data.prepare_files import write_jsonl

pytestmark = pytest.mark.megatron_free

ROOT = Path(__file__).resolve().parents[3]
TEXTS = [f"document {i}: " + "some words of text, " * (i % 23) for i in range(400)]
# Small pieces and a commit after each: a kill finds a run in all its states.
VICTIM = """
import sys
from pathlib import Path
from megatron_et.data import dataset, pieces
pieces.PIECE_BYTES = 300
dataset._COMMIT_SECONDS = 0.0
if __name__ == "__main__":
    source, prefix, model, workers = sys.argv[1:]
    dataset.write_dataset([Path(source)], Path(prefix), Path(model), workers=int(workers))
"""


class Killed(BaseException):
    """Ends a run in the middle of what it does, as far as that goes within a process."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_jsonl(tmp_path_factory.mktemp("source") / "in.jsonl", TEXTS)
    with path.open("a") as file:
        file.write('{"text": 1}\n\nnot JSON\n{"text": "last"}\n')
    return path


@pytest.fixture(scope="module")
def model(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer([source], tmp_path_factory.mktemp("tokenizer") / "t", 300)


@pytest.fixture(scope="module")
def expected(source: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    prefix = tmp_path_factory.mktemp("expected") / "data"
    write_dataset([source], prefix, model)
    return dataset_files(prefix)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4_000)
    monkeypatch.setattr(dataset, "_COMMIT_SECONDS", 0.0)


def dataset_files(prefix: Path) -> dict[str, bytes]:
    """What stands beside the prefix, unfinished things too."""
    return {
        path.name: path.read_bytes() if path.is_file() else b""
        for path in prefix.parent.iterdir()
        if not path.name.endswith(".model")
    }


def stop_after(monkeypatch: pytest.MonkeyPatch, commits: int) -> None:
    """The next run is killed right after so many commits."""
    commit = Draft.commit
    count = 0

    def counting(draft: Draft, *arguments: object, **options: object) -> None:
        nonlocal count
        commit(draft, *arguments, **options)  # type: ignore[arg-type]
        count += 1
        if count == commits:
            raise Killed

    monkeypatch.setattr(Draft, "commit", counting)


@pytest.fixture
def interrupted(source: Path, model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a run that was interrupted after three commits; gives its prefix."""

    def make(**options: object) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, 3)
            with pytest.raises(Killed):
                write_dataset([source], tmp_path / "out" / "data", model, **options)  # type: ignore[arg-type]
        return tmp_path / "out" / "data"

    return make


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_again_and_again(
    source: Path, model: Path, expected: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    script = tmp_path / "victim.py"
    script.write_text(VICTIM)
    prefix = tmp_path / "out" / "data"
    command = [sys.executable, str(script), str(source), str(prefix), str(model), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    draw = random.Random(workers)
    progress = prefix.with_name("data.partial") / "progress.json"
    reached = kills = 0
    while True:
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        goal = reached + draw.randrange(40, 160)
        children: list[psutil.Process] = []
        while process.poll() is None and documents_in(progress) < goal:
            time.sleep(0.002)
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGKILL)
        status = process.wait()
        assert process.stderr is not None
        said = process.stderr.read()  # waits for the workers too: they have the pipe
        if status == 0:
            break
        assert status == -signal.SIGKILL, said
        assert not psutil.wait_procs(children, timeout=20)[1]
        kills += 1
        assert "data.idx" not in dataset_files(prefix)
        assert documents_in(progress) >= goal
        reached = documents_in(progress)
    assert kills >= 2
    assert dataset_files(prefix) == expected


def documents_in(progress: Path) -> int:
    try:
        return json.loads(progress.read_text())["documents"]
    except FileNotFoundError:
        return 0


def test_killed_at_every_rename(
    source: Path,
    model: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before each rename and after each; over an older dataset, which must not be mixed with the new one."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 20_000)
    old = write_jsonl(tmp_path / "old.jsonl", ["another text"])
    rename = os.replace
    left = 0

    def fragile(draft: Path, target: Path) -> None:
        nonlocal left
        for action in (lambda: None, lambda: rename(draft, target)):
            if left == 0:
                raise Killed
            left -= 1
            action()

    monkeypatch.setattr("megatron_et.data.os.replace", fragile)
    for survived in range(1_000):
        prefix = tmp_path / str(survived) / "data"
        left = 10_000
        write_dataset([old], prefix, model)
        before = dataset_files(prefix)
        left = survived
        try:
            write_dataset([source], prefix, model)
        except Killed:
            shown = dataset_files(prefix)
            pair = {name: shown.get(name) for name in before}
            assert pair["data.idx"] is None or pair in (before, expected)
            left = 10_000
            write_dataset([source], prefix, model)
            assert dataset_files(prefix) == expected
        else:
            break
    assert survived > 10
    assert dataset_files(prefix) == expected


def test_resuming_continues_and_reports_what_was_there(
    source: Path,
    model: Path,
    expected: dict[str, bytes],
    interrupted: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prefix = interrupted()
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["data.partial"]
    # What was written after the last commit is not there.
    with (prefix.with_name("data.partial") / "tokens").open("ab") as file:
        file.write(b"torn")
    before = documents_in(prefix.with_name("data.partial") / "progress.json")
    added: list[int] = []
    add = Draft.add
    monkeypatch.setattr(
        Draft, "add", lambda d, t, lengths: (added.append(len(lengths)), add(d, t, lengths))[1]
    )
    arguments = ["--input", str(source), "--output", str(prefix), "--tokenizer-model", str(model)]
    assert main(["prepare", *arguments]) == 0
    assert 0 < before < len(TEXTS)
    assert sum(added) == len(TEXTS) + 1 - before
    said = capsys.readouterr()
    assert "resumed an interrupted run after " in said.err
    assert f"{source}:{len(TEXTS) + 1}" in said.err  # numbered across the interruption
    assert said.out.startswith(f"{prefix}: {len(TEXTS) + 1} documents, ")
    assert dataset_files(prefix) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_may_change(
    source: Path, model: Path, expected: dict[str, bytes], interrupted: Callable[..., Path], workers: int
) -> None:
    prefix = interrupted(workers=3 - workers)
    write_dataset([source], prefix, model, workers=workers)
    assert dataset_files(prefix) == expected


def changed_tokenizer(source: Path, _: Path, prefix: Path) -> None:
    other = train_tokenizer([source], prefix.parent.parent / "other", 290)
    write_dataset([source], prefix, other)


CHANGES: dict[str, tuple[Callable[[Path, Path, Path], object], str]] = {
    "option": (
        lambda s, m, p: write_dataset([s], p, m, append_eod=False),
        "since then --no-append-eod changed from False to True",
    ),
    "key": (
        lambda s, m, p: write_dataset([s], p, m, json_key="body"),
        "since then --json-key changed from 'text' to 'body'",
    ),
    "tokenizer": (changed_tokenizer, "since then the tokenizer changed"),
    "more input": (
        lambda s, m, p: write_dataset([s, write_jsonl(p.parent / "b.jsonl", ["b"])], p, m),
        "since then the input has 1 more files",
    ),
    "other input": (
        lambda _, m, p: write_dataset([write_jsonl(p.parent / "b.jsonl", ["b"])], p, m),
        r"the input changed: .*b\.jsonl now stands in the place of .*in\.jsonl",
    ),
}


@pytest.mark.parametrize(("run", "sentence"), CHANGES.values(), ids=CHANGES)
def test_a_change_since_the_interruption_is_said(
    source: Path,
    model: Path,
    expected: dict[str, bytes],
    interrupted: Callable[..., Path],
    run: Callable[[Path, Path, Path], object],
    sentence: str,
) -> None:
    prefix = interrupted()
    partial = prefix.with_name("data.partial")
    before = {path.name: path.read_bytes() for path in partial.iterdir()}
    with pytest.raises(PrepareError, match=f"{sentence}.*--restart"):
        run(source, model, prefix)
    assert {path.name: path.read_bytes() for path in partial.iterdir()} == before
    write_dataset([source], prefix, model)
    assert {n: c for n, c in dataset_files(prefix).items() if n != "b.jsonl"} == expected


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes() + b"\n"),
            r"in\.jsonl changed from [\d,]+ to [\d,]+ bytes",
        ),
        (lambda path: os.utime(path, (1, 1)), r"in\.jsonl changed \(its time of modification\)"),
    ],
    ids=["size", "time"],
)
def test_a_changed_file_is_said_and_restart_begins_anew(
    source: Path,
    model: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    sentence: str,
) -> None:
    copy = tmp_path / "in.jsonl"
    copy.write_bytes(source.read_bytes())
    prefix = tmp_path / "out" / "data"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Killed):
            write_dataset([copy], prefix, model)
    change(copy)
    with pytest.raises(PrepareError, match=sentence):
        write_dataset([copy], prefix, model)
    summary = write_dataset([copy], prefix, model, restart=True)
    assert summary.resumed_tokens == 0
    assert dataset_files(prefix) == expected


def test_a_trained_tokenizer_is_not_trained_again(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["prepare", "--input", str(source), "--output", str(tmp_path / "out" / "data")]
    arguments += ["--train-tokenizer", "--vocab-size"]
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Killed):
            main([*arguments, "300"])
    monkeypatch.setattr("megatron_et.data.prepare.train_tokenizer", lambda *_, **__: pytest.fail("trained"))
    assert main([*arguments, "290"]) == 2
    assert "--vocab-size changed from 300 to 290" in capsys.readouterr().err
    assert main([*arguments, "300"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "data.bin",
        "data.idx",
        "data.model",
    ]


def test_one_process_at_a_time(source: Path, model: Path, tmp_path: Path) -> None:
    with Draft(tmp_path / "data", {"inputs": []}):
        with pytest.raises(PrepareError, match=r"another process is writing .*data: wait for it"):
            write_dataset([source], tmp_path / "data", model)
        assert (tmp_path / "data.partial").is_dir()
    assert not (tmp_path / "data.partial").exists()
    write_dataset([source], tmp_path / "data", model)


def test_a_draft_that_lost_bytes_is_refused(
    model: Path, source: Path, interrupted: Callable[..., Path]
) -> None:
    prefix = interrupted()
    for name in ("tokens", "lengths"):
        path = prefix.with_name("data.partial") / name
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(PrepareError, match=f"{name} is not as long as .* says: add --restart"):
            write_dataset([source], prefix, model)
        path.write_bytes(content)


def test_a_finished_draft_that_lost_its_bin_is_refused(
    source: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(Draft, "finish", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            write_dataset([source], prefix, model)
    (tmp_path / "data.partial" / "tokens").unlink()
    with pytest.raises(PrepareError, match=r"data\.bin is not as long as"):
        write_dataset([source], prefix, model)
    assert not (tmp_path / "data.bin").exists()
    write_dataset([source], prefix, model, restart=True)


def test_strict_after_an_interruption_stops_at_the_earlier_bad_record(
    source: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "in.jsonl"
    bad.write_bytes(b"{\n" + source.read_bytes())
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Killed):
            write_dataset([bad], tmp_path / "data", model)
    with pytest.raises(PrepareError, match=r"bad record at .*in\.jsonl:1: invalid JSON"):
        write_dataset([bad], tmp_path / "data", model, strict=True)
    assert write_dataset([bad], tmp_path / "data", model).documents == len(TEXTS) + 1


def test_ctrl_c_leaves_something_to_go_on_from(
    source: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    expected: dict[str, bytes],
) -> None:
    arguments = ["prepare", "--input", str(source), "--output", str(tmp_path / "out" / "data")]
    arguments += ["--tokenizer-model", str(model)]
    with monkeypatch.context() as patch:
        count = 0
        add = Draft.add

        def interrupted(draft: Draft, tokens: bytes, lengths: np.ndarray) -> None:
            nonlocal count
            count += 1
            if count == 4:
                raise KeyboardInterrupt
            add(draft, tokens, lengths)

        patch.setattr(Draft, "add", interrupted)
        assert main(arguments) == 130
    assert capsys.readouterr().err == "megatron-et prepare: interrupted\n"
    assert main(arguments) == 0
    assert dataset_files(tmp_path / "out" / "data") == expected
    assert module.draft_folder(tmp_path / "out" / "data").exists() is False
