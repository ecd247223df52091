"""SentencePiece models and Hugging Face tokenizers, with the ids of Megatron's own; training one.

No torch and no Megatron here: every worker reads the tokenizer.
"""

import hashlib
import importlib.util
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from megatron_et.data.files import PrepareError, staged
from megatron_et.data.records import BATCH_BYTES, batches, find_inputs, text_of

SAMPLE_BYTES = 20_000_000
_SENTENCE_CHARS = 4096  # SentencePiece drops longer sentences; BPE looks at words, so a few cuts cost nothing
# Lossless. Megatron's eod is eos, and it wants a pad that is no other special piece.
_OPTIONS = (
    "model_type=bpe byte_fallback=true split_digits=true normalization_rule_name=identity "
    "add_dummy_prefix=false remove_extra_whitespaces=false allow_whitespace_only_pieces=true "
    f"unk_id=0 bos_id=1 eos_id=2 pad_id=3 max_sentence_length={4 * _SENTENCE_CHARS} minloglevel=2"
)


class Tokenizer(NamedTuple):
    """What a dataset needs of a tokenizer."""

    vocab_size: int  # as Megatron counts: with added tokens
    eod: int  # -1: it has none
    encode: Callable[[Sequence[str]], Iterable[list[int]]]
    digest: str  # of all that decides the ids


def read_tokenizer(path: Path, special_tokens: bool = True) -> Tokenizer:
    """The tokenizer of a SentencePiece model, or of a Hugging Face folder or its tokenizer.json, which adds
    its special tokens or not."""
    is_hugging_face = path.is_dir() or path.suffix == ".json"
    try:
        return _hugging_face(path, special_tokens) if is_hugging_face else _sentencepiece(path)
    except ImportError:
        raise
    except Exception as error:  # the packages raise bare Exceptions, and whatever their loaders raise
        raise PrepareError(
            f"no tokenizer can be read from {path} ({str(error)[:200]}): give a SentencePiece model, or the "
            "folder of a Hugging Face tokenizer with its tokenizer.json; names of the hub are not read"
        ) from None


def _sentencepiece(path: Path) -> Tokenizer:
    import sentencepiece

    model, processor = path.read_bytes(), sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    eod, encode = processor.eos_id(), processor.encode_as_ids
    digest = hashlib.sha256(model).hexdigest()
    return Tokenizer(processor.get_piece_size(), eod, lambda texts: map(encode, texts), digest)


def _hugging_face(path: Path, special_tokens: bool) -> Tokenizer:
    import tokenizers

    file = path / "tokenizer.json" if path.is_dir() else path
    model, settings = file.read_text(encoding="utf-8"), file.with_name("tokenizer_config.json")
    if settings.is_file() and importlib.util.find_spec("transformers") is not None:
        # As Megatron does: settings such as add_bos_token change the ids, and how depends on its version.
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(str(file.parent), use_fast=True, local_files_only=True)
        model, eos = loaded.backend_tokenizer.to_str(), loaded.eos_token or loaded.sep_token
    else:
        files = [f for f in (file.with_name("special_tokens_map.json"), settings) if f.is_file()]
        named = {name: token for f in files for name, token in json.loads(f.read_text()).items() if token}
        eos = named.get("eos_token", named.get("sep_token"))
        eos = eos["content"] if isinstance(eos, dict) else eos
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads in each worker would only compete
    fast = tokenizers.Tokenizer.from_str(model)
    fast.no_truncation()  # both may be stored; Megatron neither cuts nor pads
    fast.no_padding()

    def encode(texts: Sequence[str]) -> Iterator[list[int]]:
        return (text.ids for text in fast.encode_batch_fast(texts, add_special_tokens=special_tokens))

    eod = None if eos is None else fast.token_to_id(eos)
    digest = hashlib.sha256(f"{special_tokens} {eos} {model}".encode()).hexdigest()
    return Tokenizer(fast.get_vocab_size(), -1 if eod is None else eod, encode, digest)


def train_tokenizer(inputs: Sequence[str | Path], prefix: Path, vocab_size: int, **sampling: Any) -> Path:
    """Trains a lossless SentencePiece BPE model on a sample of the inputs; returns its path, `prefix`.model.

    Only its own blank U+2581 comes back as a space. The same input gives the same bytes. `sampling`: see
    `sample`.
    """
    import sentencepiece

    train, model = sentencepiece.SentencePieceTrainer.train, io.BytesIO()
    options: dict[str, Any] = dict(option.split("=") for option in _OPTIONS.split())
    note = f"Training a tokenizer of {vocab_size:,} pieces"
    with staged(path := Path(f"{prefix}.model")) as (draft,), Console(stderr=True).status(note):
        sentences = list(sample(find_inputs(inputs), **sampling))  # a list: errors do not cross SentencePiece
        try:
            train(sentence_iterator=iter(sentences), model_writer=model, vocab_size=vocab_size, **options)
        except RuntimeError as error:
            why = str(error).split("] ")[-1] or "there is no text, or it is below 261"
            raise PrepareError(f"--vocab-size {vocab_size} does not suit the input: {why}") from None
        draft.write_bytes(model.getvalue())
    return path


def sample(inputs: Sequence[Path], json_key: str = "text", sample_bytes: int = SAMPLE_BYTES) -> Iterator[str]:
    """Sentences: `sample_bytes` from the beginnings of all files by their sizes; all, if there are fewer."""
    total = sum(path.stat().st_size for path in inputs)
    for path in inputs:
        left = -(-sample_bytes * path.stat().st_size // max(total, 1))
        for sentence in _sentences(path, json_key, min(left, BATCH_BYTES)):
            if left <= 0:
                break
            left -= len(sentence.encode())
            yield sentence


def _sentences(path: Path, json_key: str, size: int) -> Iterator[str]:
    for batch in batches(path, json_key, size):
        for text, bad in (text_of(batch, record, json_key) for record in batch.records):
            if not bad:  # those are counted when the dataset is written
                yield from (text[i : i + _SENTENCE_CHARS] for i in range(0, len(text), _SENTENCE_CHARS))
