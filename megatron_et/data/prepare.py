"""`megatron-et prepare`: text, JSONL or Parquet into a tokenizer and a Megatron .bin/.idx dataset.

    megatron-et prepare --input 'corpus/*.jsonl' --output runs/corpus --train-tokenizer --vocab-size 4096

A .jsonl, .ndjson or .json file holds one document a line, a .parquet file one a row, any other file is one
document; .gz and .zst are decompressed. The same inputs give the same bytes for any number of workers. An
interrupted run goes on where it was when it is started again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_et.data.dataset import MAX_RECORD_BYTES, DatasetSummary, write_dataset
from megatron_et.data.draft import is_interrupted
from megatron_et.data.reading import PrepareError, find_inputs
from megatron_et.data.tokenizer import DEFAULT_SAMPLE_BYTES, train_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `megatron-et prepare`."""
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE_OR_GLOB",
        help="text files (one document each), .jsonl/.ndjson/.json files (one document a line) or .parquet "
        "files (one document a row), text and JSONL also as .gz or .zst; a file named twice is read once",
    )
    add("--output", required=True, type=Path, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--tokenizer-model",
        type=Path,
        metavar="MODEL",
        help="a SentencePiece model, or the folder or the tokenizer.json of a Hugging Face tokenizer",
    )
    tokenizer.add_argument(
        "--train-tokenizer",
        action="store_true",
        help="train a lossless byte-fallback BPE tokenizer on the input",
    )
    add(
        "--vocab-size",
        type=_positive,
        metavar="N",
        help="pieces of the trained tokenizer, special ones included",
    )
    add(
        "--tokenizer-output",
        type=Path,
        metavar="PREFIX",
        help="the trained tokenizer goes to PREFIX.model (default: the output's PREFIX)",
    )
    add(
        "--sample-bytes",
        type=_positive,
        metavar="N",
        help=f"train on this many bytes, spread evenly over the input (default {DEFAULT_SAMPLE_BYTES:,})",
    )
    add(
        "--json-key",
        default="text",
        metavar="KEY",
        help="where a JSONL record has its text; a Parquet file's column (default text)",
    )
    add("--no-append-eod", action="store_true", help="do not end every document with the tokenizer's eod")
    add(
        "--tokenizer-hf-no-include-special-tokens",
        action="store_true",
        help="a Hugging Face tokenizer adds no special tokens, such as its bos, to a document (Megatron's "
        "flag of this name; Megatron-Core 0.16 does not add them by itself)",
    )
    add("--workers", type=_positive, default=1, metavar="N", help="processes that encode (default 1)")
    add("--strict", action="store_true", help="stop at the first bad record instead of counting it")
    add(
        "--max-bad-share",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="stop when more than this share of the records is bad, looked at from 1,000 records on and at "
        "the end (default 1: never)",
    )
    add(
        "--max-record-bytes",
        type=_positive,
        default=MAX_RECORD_BYTES,
        metavar="N",
        help=f"a longer record is bad: it has to fit into memory (default {MAX_RECORD_BYTES:,})",
    )
    add(
        "--restart",
        action="store_true",
        help="drop what an interrupted run left in PREFIX.partial instead of going on from there",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit status, 2 after an error said in one sentence on stderr."""
    try:
        summary = _run(args)
    except PrepareError as error:
        return _fail(str(error))
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        return _fail(f"cannot read or write{place}: {error.strerror or error}")
    if summary.bad_records:
        count = sum(bad.count for bad in summary.bad_records.values())
        print(f"left out {count:,} bad records of {summary.records:,}:", file=sys.stderr)
        for reason, bad in summary.bad_records.items():
            print(f"  {bad.count:,} {reason}, first at {bad.first}", file=sys.stderr)
    if summary.resumed_tokens:
        print(f"resumed an interrupted run after {summary.resumed_tokens:,} tokens", file=sys.stderr)
    print(summary)
    return 0


def _run(args: argparse.Namespace) -> DatasetSummary:
    inputs = find_inputs(args.input)
    training = None
    if args.train_tokenizer:
        if args.vocab_size is None:
            raise PrepareError("--train-tokenizer needs --vocab-size N, for example 4096 for a small corpus")
        sample_bytes = args.sample_bytes or DEFAULT_SAMPLE_BYTES
        training = {"--vocab-size": args.vocab_size, "--sample-bytes": sample_bytes}
        model = _trained_tokenizer(args, inputs, sample_bytes)
    else:
        for option in ("vocab_size", "tokenizer_output", "sample_bytes"):
            if getattr(args, option) is not None:
                flag = "--" + option.replace("_", "-")
                raise PrepareError(f"{flag} is for --train-tokenizer: leave it out with --tokenizer-model")
        model = args.tokenizer_model
    return write_dataset(
        inputs,
        args.output,
        model,
        json_key=args.json_key,
        append_eod=not args.no_append_eod,
        special_tokens=not args.tokenizer_hf_no_include_special_tokens,
        max_record_bytes=args.max_record_bytes,
        workers=args.workers,
        strict=args.strict,
        max_bad_share=args.max_bad_share,
        training=training,
        restart=args.restart,
    )


def _trained_tokenizer(args: argparse.Namespace, inputs: Sequence[Path], sample_bytes: int) -> Path:
    """The tokenizer of this run: an interrupted run has it already, and `write_dataset` compares the two."""
    prefix = args.tokenizer_output or args.output
    model = Path(f"{prefix}.model")
    if model.is_file() and is_interrupted(args.output) and not args.restart:
        return model
    return train_tokenizer(inputs, prefix, args.vocab_size, json_key=args.json_key, sample_bytes=sample_bytes)


def _fail(sentence: str) -> int:
    print(f"megatron-et prepare: {sentence}", file=sys.stderr)
    return 2


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value
