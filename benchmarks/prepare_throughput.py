"""`megatron-et prepare` and Megatron-LM's tools/preprocess_data.py on the same input, side by side.

    python -m benchmarks.prepare_throughput --megatron /path/to/Megatron-LM [--megabytes 34] [--rounds 3]

The corpus is this Python's own sources and documentation (megatron_et/data/corpus.py), the tokenizers are
trained on it: a SentencePiece BPE model, and a byte-level BPE tokenizer for Megatron's HuggingFaceTokenizer
(if the package transformers is there). Both programs get the same file, tokenizer and number of workers, take
turns, and have to write the same bytes. Speed is by each program's own clock, which leaves out start-up
(Megatron's program imports PyTorch, which says nothing about a long run): Megatron's runs from its first
document to its last, ours also over the start of the workers and the writing of the index. Beside it stand
the whole command's wall and CPU time; the latter is what a busy machine disturbs least. Writes
prepare_throughput.csv and .md into benchmarks/results.
"""

import argparse
import csv
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.environment import ROOT, environment
from megatron_et.data.corpus import build_corpus
from megatron_et.data.encoders import token_type
from megatron_et.data.tokenizer import train_tokenizer

RESULTS = ROOT / "benchmarks" / "results"
VOCABULARY = 16_000
PROGRAMS = ("Megatron", "prepare")
_SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>"]


@dataclass(frozen=True)
class Case:
    """What both programs do."""

    tokenizer: str
    model: Path
    workers: int


@dataclass(frozen=True)
class Row:
    """One run of one program."""

    tokenizer: str
    workers: int
    round: int
    program: str
    seconds: float
    """By its own clock: of encoding, without start-up."""
    command_seconds: float
    """Of the whole command."""
    cpu_seconds: float
    """Of the whole command and all its processes."""
    tokens: int
    text_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Without start-up."""
        return self.tokens / self.seconds


def megatron_command(megatron: Path, case: Case, source: Path, prefix: Path, documents: int) -> list[str]:
    """Megatron's program, which is to say its speed at the last document."""
    kind = {"SentencePiece": "SentencePieceTokenizer", "Hugging Face": "HuggingFaceTokenizer"}
    return [
        *(sys.executable, str(megatron / "tools" / "preprocess_data.py"), "--append-eod"),
        *("--input", str(source), "--output-prefix", str(prefix), "--workers", str(case.workers)),
        *("--log-interval", str(documents)),
        *("--tokenizer-type", kind[case.tokenizer], "--tokenizer-model", str(case.model)),
    ]


def prepare_command(case: Case, source: Path, prefix: Path) -> list[str]:
    """Ours."""
    return [
        *(sys.executable, "-m", "megatron_et.cli", "prepare", "--tokenizer-model", str(case.model)),
        *("--input", str(source), "--output", str(prefix), "--workers", str(case.workers)),
    ]


def run(command: Sequence[str]) -> tuple[str, float, float]:
    """Runs a command to its end: what it said, its wall and its CPU seconds, children included."""
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    calm = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env = {**os.environ, **calm, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    began, cpu_before = time.perf_counter(), cpu_of_children()
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    return result.stdout + result.stderr, seconds, cpu_of_children() - cpu_before


def cpu_of_children() -> float:
    """CPU seconds of all processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def own_seconds(said: str, documents: int, tokens: int) -> float:
    """How long encoding took by a program's own clock, from the speed that it prints at the end."""
    if theirs := re.search(rf"^Processed {documents} documents \(([\d.]+) docs/s", said, re.MULTILINE):
        return documents / float(theirs[1])
    if ours := re.search(r" s, ([\d,]+) tokens/s$", said, re.MULTILINE):
        return tokens / int(ours[1].replace(",", ""))
    raise SystemExit(f"no speed in what the program said:\n{said[-3000:]}")


def write_corpus(folder: Path, megabytes: float) -> Path:
    """Code and prose by turns, about so many MB of text, in one JSONL file."""
    summary = build_corpus(folder, max_bytes_per_domain=int(megabytes * 1e6 * 0.8), progress=False)
    path = folder / "corpus.jsonl"
    domains = [
        summary.paths[f"{d}.train"].read_text(encoding="utf-8").splitlines() for d in ("code", "prose")
    ]
    lines = [line for pair in zip_longest(*domains) for line in pair if line is not None]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def hugging_face_tokenizer(source: Path, folder: Path) -> Path:
    """A byte-level BPE tokenizer trained on the corpus."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with source.open(encoding="utf-8") as lines:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_SPECIAL[0]} $A", special_tokens=[(_SPECIAL[0], 0)]
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("bos_token", "eos_token", "pad_token"), _SPECIAL, strict=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def measure(
    case: Case, megatron: Path, source: Path, folder: Path, rounds: int, say: Callable[[str], None]
) -> list[Row]:
    """All runs of a case; raises SystemExit if the two programs' files differ."""
    with source.open(encoding="utf-8") as lines:
        sizes = [len(json.loads(line)["text"].encode()) for line in lines]
    theirs, ours = folder / "megatron", folder / "prepare"
    commands = {
        "Megatron": megatron_command(megatron, case, source, theirs, len(sizes)),
        "prepare": prepare_command(case, source, ours),
    }
    rows = []
    for number in range(rounds):
        for program in PROGRAMS:
            said, seconds, cpu = run(commands[program])
            size = Path(f"{theirs}_text_document.bin").stat().st_size
            tokens = size // np.dtype(token_type(VOCABULARY)).itemsize
            own = own_seconds(said, len(sizes), tokens)
            rows.append(
                Row(
                    case.tokenizer,
                    case.workers,
                    number,
                    program,
                    round(own, 3),
                    round(seconds, 3),
                    round(cpu, 3),
                    tokens,
                    sum(sizes),
                )
            )
            say(f"{case.tokenizer}, {case.workers} workers, {program}: {own:.1f} of {seconds:.1f} s")
    for suffix in (".bin", ".idx"):
        if Path(f"{theirs}_text_document{suffix}").read_bytes() != Path(f"{ours}{suffix}").read_bytes():
            raise SystemExit(f"the two {suffix} files differ ({case.tokenizer}, {case.workers} workers)")
    return rows


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Every run."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def report(rows: Sequence[Row], where: dict[str, str]) -> str:
    """The results page."""
    head = ["tokenizer", "workers", "Megatron tokens/s", "prepare tokens/s", "prepare MB/s", "ratio", "range"]
    head += ["CPU s of the command: Megatron", "prepare", "wall s of the command: Megatron", "prepare"]
    table = [head, ["---"] * len(head)]
    for case in dict.fromkeys((row.tokenizer, row.workers) for row in rows):
        groups = [
            [row for row in rows if (row.tokenizer, row.workers) == case and row.program == program]
            for program in PROGRAMS
        ]
        speeds = [statistics.median(row.tokens_per_second for row in group) for group in groups]
        ratios = [b.tokens_per_second / a.tokens_per_second for a, b in zip(*groups, strict=True)]
        text_share = groups[1][0].text_bytes / groups[1][0].tokens / 1e6
        table.append(
            [
                case[0],
                str(case[1]),
                *(f"{speed:,.0f}" for speed in speeds),
                f"{speeds[1] * text_share:.1f}",
                f"{statistics.median(ratios):.2f}",
                f"{min(ratios):.2f} to {max(ratios):.2f}",
                *(f"{statistics.median(row.cpu_seconds for row in group):.1f}" for group in groups),
                *(f"{statistics.median(row.command_seconds for row in group):.1f}" for group in groups),
            ]
        )
    rounds = len({row.round for row in rows})
    return "\n".join(
        [
            "# Throughput of `megatron-et prepare`",
            "",
            "Written by `python -m benchmarks.prepare_throughput`; every run is in prepare_throughput.csv.",
            "",
            f"One JSONL file of {rows[0].text_bytes / 1e6:.1f} MB of text, code and prose; vocabularies of "
            f"{VOCABULARY:,}. Both programs wrote the same .bin and .idx, byte by byte. Medians of {rounds} "
            "runs of each by turns. tokens/s by each program's own clock, without start-up; CPU and wall "
            "time of the whole command, start-up included. Words are learnt anew in every run and worker "
            "(docs/data.md): a longer input gains more.",
            "",
            *(f"| {' | '.join(cells)} |" for cells in table),
            "",
            *(f"- {name}: {value}" for name, value in where.items()),
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all cases and writes the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megatron", type=Path, required=True, help="a checkout of Megatron-LM")
    parser.add_argument(
        "--megabytes", type=float, default=34, help="text in the corpus (default 34, about all there is)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program (default 3)")
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the two files")
    options = parser.parse_args(argv)
    if not (options.megatron / "tools" / "preprocess_data.py").is_file():
        parser.error(f"{options.megatron} has no tools/preprocess_data.py: give a checkout of Megatron-LM")
    console = Console()
    load = [os.getloadavg()[0]]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = write_corpus(folder / "corpus", options.megabytes)
        models = {"SentencePiece": train_tokenizer([source], folder / "bpe", VOCABULARY, progress=False)}
        if importlib.util.find_spec("transformers") is not None:
            models["Hugging Face"] = hugging_face_tokenizer(source, folder / "hugging_face")
        else:
            console.print("no Hugging Face case: Megatron's HuggingFaceTokenizer needs transformers")
        for tokenizer, model in models.items():
            for workers in options.workers:
                case = Case(tokenizer, model, workers)
                rows += measure(case, options.megatron, source, folder, options.rounds, console.print)
    load.append(os.getloadavg()[0])
    packages = ("sentencepiece", "tokenizers", "transformers")
    versions = {
        name: importlib.metadata.version(name)
        for name in packages
        if importlib.util.find_spec(name) is not None
    }
    commit = subprocess.run(
        ["git", "-C", str(options.megatron), "describe", "--tags", "--always"], capture_output=True, text=True
    )
    where = (
        environment()
        | versions
        | {
            "Megatron-LM": commit.stdout.strip(),
            "load average before and after": " and ".join(f"{value:.1f}" for value in load),
        }
    )
    options.results.mkdir(parents=True, exist_ok=True)
    write_csv(options.results / "prepare_throughput.csv", rows)
    text = report(rows, where)
    (options.results / "prepare_throughput.md").write_text(text)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
