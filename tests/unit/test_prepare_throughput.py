"""The parts of benchmarks/prepare_throughput.py that need no Megatron-LM checkout."""

import csv
from pathlib import Path

import pytest

from benchmarks.prepare_throughput import (
    Case,
    Row,
    main,
    megatron_command,
    prepare_command,
    report,
    write_csv,
)


def rows() -> list[Row]:
    """Three rounds; without start-up Megatron makes 100, 200, 400 tokens/s, prepare three times as many."""
    return [
        Row("SentencePiece", 2, number, program, start_up + 1_000 / speed, start_up, 1_000, 4_000)
        for number, theirs in enumerate([100, 200, 400])
        for program, start_up, speed in (("Megatron", 5.0, theirs), ("prepare", 1.0, 3 * theirs))
    ]


def test_medians_ratios_and_whole_commands() -> None:
    line = next(line for line in report(rows(), {"CPU": "x"}).splitlines() if line.startswith("| Sentence"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["SentencePiece", "2", "200", "600", "0.0", "3.00", "3.00 to 3.00", "10.0", "2.7"]
    assert "- CPU: x" in report(rows(), {"CPU": "x"})


def test_every_run_is_in_the_csv(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", rows())
    with (tmp_path / "a.csv").open() as file:
        read = list(csv.DictReader(file))
    assert len(read) == 6
    assert read[1]["program"] == "prepare"
    assert float(read[1]["start_up_seconds"]) == 1.0


def test_both_programs_get_the_same() -> None:
    case = Case("Hugging Face", Path("tokenizer"), 3)
    theirs = megatron_command(Path("Megatron-LM"), case, Path("in.jsonl"), Path("a"))
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
