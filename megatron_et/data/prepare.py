"""`megatron-et prepare`: text, JSONL or Parquet into a tokenizer and a Megatron .bin/.idx dataset."""

import argparse
import sys
from pathlib import Path

from megatron_et.data.dataset import Summary, write_dataset
from megatron_et.data.files import PrepareError
from megatron_et.data.tokenizer import SAMPLE_BYTES, train_tokenizer

_INPUT = (
    "JSONL (a document a line) and text files (one document), also as .gz or .zst; Parquet (a document a row)"
)
_MODEL = "a SentencePiece model, or the folder or the tokenizer.json of a Hugging Face tokenizer"
_SAMPLE = f"train on so much text from the beginnings of all files (default {SAMPLE_BYTES:,})"
_NO_SPECIAL = (
    "a Hugging Face tokenizer adds no special tokens, such as its bos (Megatron's flag of this name)"
)
_SHARE = "stop when more of the records are bad, from 1,000 records on and at the end (default 1: never)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `megatron-et prepare`."""
    add = parser.add_argument
    add("--input", nargs="+", action="extend", required=True, metavar="FILE_OR_GLOB", help=_INPUT)
    add("--output", required=True, type=Path, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx")
    tokenizer = parser.add_mutually_exclusive_group(required=True).add_argument
    tokenizer("--tokenizer-model", type=Path, metavar="MODEL", help=_MODEL)
    tokenizer("--train-tokenizer", action="store_true", help="train a lossless BPE tokenizer, PREFIX.model")
    add("--vocab-size", type=int, metavar="N", help="pieces of the trained tokenizer, special ones included")
    add("--sample-bytes", type=int, metavar="N", help=_SAMPLE)
    add("--json-key", default="text", metavar="KEY", help="of the text in JSONL, its column (default text)")
    add("--no-append-eod", action="store_true", help="do not end every document with the tokenizer's eod")
    add("--tokenizer-hf-no-include-special-tokens", action="store_true", help=_NO_SPECIAL)
    add("--workers", type=int, default=1, metavar="N", help="processes that encode (default 1)")
    add("--strict", action="store_true", help="stop at the first bad record instead of counting it")
    add("--max-bad-share", type=float, default=1.0, metavar="SHARE", help=_SHARE)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit status, 2 after an error said in one sentence on stderr."""
    try:
        summary = _run(args)
    except (PrepareError, ImportError, OSError) as error:
        print(f"megatron-et prepare: {error}", file=sys.stderr)
        return 2
    if summary.bad:
        print(f"left out: {summary.bad_records()}", file=sys.stderr)
    print(f"{args.output}: {summary}")
    return 0


def _run(args: argparse.Namespace) -> Summary:
    model, size = args.tokenizer_model, args.vocab_size
    if args.train_tokenizer != (size is not None) or (args.sample_bytes and not args.train_tokenizer):
        raise PrepareError("give --vocab-size N with --train-tokenizer, and it and --sample-bytes only then")
    if size is not None:
        model = train_tokenizer(
            args.input,
            args.output,
            size,
            json_key=args.json_key,
            sample_bytes=args.sample_bytes or SAMPLE_BYTES,
        )
    return write_dataset(
        args.input,
        args.output,
        model,
        append_eod=not args.no_append_eod,
        special_tokens=not args.tokenizer_hf_no_include_special_tokens,
        **{name: getattr(args, name) for name in ("json_key", "workers", "strict", "max_bad_share")},
    )
