"""A SentencePiece tokenizer trained on a sample of the input files."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console

from megatron_et.data import staged
from megatron_et.data.encoders import sentencepiece_package
from megatron_et.data.reading import PrepareError, check_inputs
from megatron_et.data.sampling import sample_texts

DEFAULT_SAMPLE_BYTES = 20_000_000

# SentencePiece drops longer sentences, so documents are cut; BPE looks at words, so a few cuts cost nothing.
_SENTENCE_CHARS = 4096
_UNK, _BOS, _EOS, _PAD = range(4)
_FIXED_PIECES = 4 + 256  # these and one for every byte


def train_tokenizer(
    inputs: Sequence[Path],
    model_prefix: Path,
    vocab_size: int,
    *,
    json_key: str = "text",
    sample_bytes: int = DEFAULT_SAMPLE_BYTES,
    progress: bool = True,
) -> Path:
    """Trains a SentencePiece BPE model on a sample of the inputs and returns its path, `model_prefix`.model.

    The tokenizer is lossless (no normalisation, no added or removed blanks, bytes for rare characters),
    except that SentencePiece's own blank U+2581 decodes to a space. Ids 0 to 3 are unk, bos, eos and pad:
    Megatron's eod is eos, and it wants a pad that is no other special piece. The sample is `sample_bytes` of
    text spread evenly over all inputs (sampling.py); bad records are left out.

    Raises PrepareError if an input is missing, if there is no text, or if the text does not suit
    `vocab_size`; OSError if a file cannot be read or written. Then no file is written.
    """
    check_inputs(inputs)
    model = Path(f"{model_prefix}.model")
    console = Console(stderr=True)
    note = f"Training a tokenizer of {vocab_size:,} pieces"
    with (
        staged(model) as (draft,),
        console.status(note) if progress and console.is_terminal else nullcontext(),
    ):
        sentences = list(_sample_sentences(inputs, json_key, sample_bytes))
        draft.write_bytes(_train_sentencepiece(sentences, vocab_size))
    return model


def _sample_sentences(inputs: Sequence[Path], json_key: str, sample_bytes: int) -> Iterator[str]:
    """Pieces of the documents, at most _SENTENCE_CHARS long, until they make `sample_bytes`."""
    left = sample_bytes
    for text in sample_texts(inputs, json_key, sample_bytes):
        for start in range(0, len(text), _SENTENCE_CHARS):
            if left <= 0:
                return
            sentence = text[start : start + _SENTENCE_CHARS]
            left -= len(sentence.encode())
            yield sentence


def _train_sentencepiece(sentences: Sequence[str], vocab_size: int) -> bytes:
    """The trained model, serialised."""
    size = sum(len(sentence.encode()) for sentence in sentences)
    if size == 0:
        raise PrepareError("no text to train a tokenizer on: the input files have no usable record")
    if vocab_size <= _FIXED_PIECES:
        raise PrepareError(
            f"a vocabulary of {vocab_size} pieces is too small: use at least {_FIXED_PIECES + 1}"
        )
    model = io.BytesIO()
    try:
        sentencepiece_package().SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * _SENTENCE_CHARS,
            unk_id=_UNK,
            bos_id=_BOS,
            eos_id=_EOS,
            pad_id=_PAD,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise PrepareError(_vocabulary_error(str(error), vocab_size, size)) from None
    return model.getvalue()


def _vocabulary_error(message: str, vocab_size: int, size: int) -> str:
    """SentencePiece's message as a sentence about --vocab-size, if that is what it is about."""
    if largest := re.search(r"size too high .* value <= (\d+)", message):
        return (
            f"a vocabulary of {vocab_size} pieces is too large for {size:,} bytes of sample text, which give "
            f"at most {largest[1]}: lower --vocab-size or give more text"
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"a vocabulary of {vocab_size} pieces is too small: special pieces, bytes and the characters of "
            f"this text take {smallest[1]}: raise --vocab-size"
        )
    return f"SentencePiece cannot train a tokenizer of {vocab_size} pieces: {message}"
