"""`megatron-et prepare`: text or JSONL into a SentencePiece tokenizer and a Megatron .bin/.idx dataset.

    megatron-et prepare --input 'corpus/*.jsonl' --output runs/corpus --train-tokenizer --vocab-size 4096

A .jsonl or .json file holds one document a line, any other file is one document. The same inputs give the
same bytes for any number of workers.
"""

import argparse
import sys
from pathlib import Path

from megatron_et.data.dataset import DatasetSummary, write_dataset
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
        help="text files (one document each) or .jsonl/.json files (one document a line); a file named twice "
        "is read once",
    )
    add("--output", required=True, type=Path, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--tokenizer-model", type=Path, metavar="MODEL.model", help="a SentencePiece model"
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
    add("--json-key", default="text", metavar="KEY", help="where a JSONL record has its text (default text)")
    add("--no-append-eod", action="store_true", help="do not end every document with the tokenizer's eod")
    add("--workers", type=_positive, default=1, metavar="N", help="processes that encode (default 1)")
    add("--strict", action="store_true", help="stop at the first bad record instead of counting it")


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
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in summary.bad_records.items())
        print(f"skipped bad records: {reasons}; the first is {summary.first_bad_record}", file=sys.stderr)
    print(summary)
    return 0


def _run(args: argparse.Namespace) -> DatasetSummary:
    inputs = find_inputs(args.input)
    if args.train_tokenizer:
        if args.vocab_size is None:
            raise PrepareError("--train-tokenizer needs --vocab-size N, for example 4096 for a small corpus")
        model = train_tokenizer(
            inputs,
            args.tokenizer_output or args.output,
            args.vocab_size,
            json_key=args.json_key,
            sample_bytes=args.sample_bytes or DEFAULT_SAMPLE_BYTES,
        )
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
        workers=args.workers,
        strict=args.strict,
    )


def _fail(sentence: str) -> int:
    print(f"megatron-et prepare: {sentence}", file=sys.stderr)
    return 2


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value
