"""The parts of benchmarks/prepare_throughput.py that need no Megatron-LM checkout."""

import csv
from pathlib import Path

import pytest

from benchmarks.prepare_throughput import (
    Case,
    Row,
    main,
    megatron_command,
    own_seconds,
    prepare_command,
    report,
    write_csv,
)
from megatron_et.data.dataset import DatasetSummary

pytestmark = pytest.mark.megatron_free


def rows() -> list[Row]:
    """Three rounds; Megatron makes 100, 200, 400 tokens/s, prepare three times as many."""
    return [
        Row("SentencePiece", 2, number, program, 1_000 / speed, 9.0 + number, cpu, 1_000, 4_000_000)
        for number, theirs in enumerate([100, 200, 400])
        for program, cpu, speed in (("Megatron", 5.0, theirs), ("prepare", 1.0, 3 * theirs))
    ]


def test_medians_and_ratios() -> None:
    line = next(line for line in report(rows(), {"CPU": "x"}).splitlines() if line.startswith("| Sentence"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    numbers = ["200", "600", "2.4", "3.00", "3.00 to 3.00", "5.0", "1.0", "10.0", "10.0"]
    assert cells == ["SentencePiece", "2", *numbers]
    assert "- CPU: x" in report(rows(), {"CPU": "x"})


def test_speeds_are_read_off_what_the_programs_say() -> None:
    theirs = "Time to startup: 3.1\nProcessed 40 documents (8.0 docs/s, 1.5 MB/s).\nmore"
    assert own_seconds(theirs, 40, 1_000) == 5.0
    summary = DatasetSummary(Path("a"), documents=40, tokens=1_000, bytes=9, records=40, seconds=4.0)
    assert own_seconds(f"{summary}\n", 40, 1_000) == 4.0
    with pytest.raises(SystemExit, match="no speed in what the program said"):
        own_seconds("Processed 39 documents (8.0 docs/s, 1.5 MB/s).", 40, 1_000)


def test_every_run_is_in_the_csv(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", rows())
    with (tmp_path / "a.csv").open() as file:
        read = list(csv.DictReader(file))
    assert len(read) == 6
    assert read[1]["program"] == "prepare"
    assert float(read[1]["cpu_seconds"]) == 1.0


def test_both_programs_get_the_same() -> None:
    case = Case("Hugging Face", Path("tokenizer"), 3)
    theirs = megatron_command(Path("Megatron-LM"), case, Path("in.jsonl"), Path("a"), 7)
    ours = prepare_command(case, Path("in.jsonl"), Path("b"))
    for command in (theirs, ours):
        for option, value in (
            ("--input", "in.jsonl"),
            ("--tokenizer-model", "tokenizer"),
            ("--workers", "3"),
        ):
            assert command[command.index(option) + 1] == value
    assert theirs[theirs.index("--tokenizer-type") + 1] == "HuggingFaceTokenizer"


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--megatron", str(tmp_path)])
    assert "has no tools/preprocess_data.py: give a checkout" in capsys.readouterr().err
