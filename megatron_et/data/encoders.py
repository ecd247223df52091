"""Texts into token ids, as bytes in the dataset's type: SentencePiece models and Hugging Face tokenizers.

The ids are those of Megatron's `--tokenizer-type SentencePieceTokenizer` and `HuggingFaceTokenizer` for the
same `--tokenizer-model`. No torch and no Megatron here: every worker loads an encoder.
"""

import hashlib
import importlib.util
import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_et.data.byte_level import words_of
from megatron_et.data.reading import PrepareError
from megatron_et.data.words import WordCache, word_cache

# Megatron stores ids in two bytes below this vocabulary size, in four from it on.
_SMALL_VOCABULARY = 65_500


class Encoder(Protocol):
    """What a dataset needs of a tokenizer."""

    vocab_size: int
    """As Megatron counts it: with added tokens."""
    eod: int | None
    """Megatron's end of document; None if the tokenizer has none."""
    no_eod: str
    """What the tokenizer lacks then, in words."""

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text, each id in `token_type(vocab_size)`; empty where the tokenizer drops all."""


def token_type(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """The type that Megatron's dataset builder takes for a vocabulary of this size."""
    return np.uint16 if vocab_size < _SMALL_VOCABULARY else np.int32


def _typecode(vocab_size: int) -> str:
    return np.dtype(token_type(vocab_size)).char


@dataclass(frozen=True)
class SentencePieceModel:
    """A SentencePiece model as read from its file: small enough to send to every worker."""

    model: bytes

    def encoder(self) -> Encoder:
        """A new encoder; called in the process that uses it."""
        return SentencePieceEncoder(self.model)


@dataclass(frozen=True)
class HuggingFaceModel:
    """A Hugging Face tokenizer as JSON, and what else decides its ids."""

    model: str
    eos_token: str | None
    special_tokens: bool

    def encoder(self) -> Encoder:
        """A new encoder; called in the process that uses it."""
        return HuggingFaceEncoder(self.model, self.eos_token, self.special_tokens)


Tokenizer = SentencePieceModel | HuggingFaceModel


def read_tokenizer(path: Path, *, special_tokens: bool = True) -> Tokenizer:
    """The tokenizer of a SentencePiece model file, or of a Hugging Face folder or its tokenizer.json.

    Without `special_tokens` a Hugging Face tokenizer adds none. Raises PrepareError if it is no tokenizer.
    """
    if path.is_dir() or path.suffix == ".json":
        return HuggingFaceModel(*_read_hugging_face(path), special_tokens)
    if not special_tokens:
        raise PrepareError(
            f"--tokenizer-hf-no-include-special-tokens is for Hugging Face tokenizers, and {path} is none"
        )
    return SentencePieceModel(_read_sentencepiece(path))


def digest(tokenizer: Tokenizer) -> str:
    """Which tokenizer it is, whatever its name: a hash of all that decides the ids."""
    return hashlib.sha256(repr(tokenizer).encode()).hexdigest()


# SentencePiece


def sentencepiece_package() -> Any:
    """The package, or PrepareError."""
    try:
        import sentencepiece
    except ImportError:
        raise PrepareError("sentencepiece is not installed: pip install sentencepiece") from None
    return sentencepiece


def _read_sentencepiece(path: Path) -> bytes:
    sentencepiece = sentencepiece_package()
    try:
        sentencepiece.SentencePieceProcessor(model_file=str(path))
        return path.read_bytes()
    except (OSError, RuntimeError):
        problem = "is not a SentencePiece model" if path.is_file() else "does not exist"
        raise PrepareError(
            f"the tokenizer {path} {problem}: give the .model file of a trained tokenizer, or the folder or "
            "the tokenizer.json of a Hugging Face one"
        ) from None


class SentencePieceEncoder:
    """A SentencePiece model; BPE models that allow it go word by word (words.py)."""

    no_eod = "no end-of-sentence piece"

    def __init__(self, model: bytes) -> None:
        self._processor = sentencepiece_package().SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._processor.get_piece_size()
        eos = self._processor.eos_id()
        self.eod: int | None = eos if eos >= 0 else None
        self._typecode = _typecode(self.vocab_size)
        self.words: WordCache | None = word_cache(model, self._typecode)

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """See Encoder."""
        if self.words is None:
            return [self._encode_whole(text) for text in texts]
        return [self.words.encode(text) for text in texts]

    def _encode_whole(self, text: str) -> bytes:
        return array(self._typecode, self._processor.encode_as_ids(text)).tobytes()


# Hugging Face


def _read_hugging_face(path: Path) -> tuple[str, str | None]:
    """The tokenizer as JSON, and its end-of-sentence token."""
    if importlib.util.find_spec("tokenizers") is None:
        raise PrepareError(f"{path} needs the package tokenizers: pip install tokenizers")
    folder = path if path.is_dir() else path.parent
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise PrepareError(
            f"the tokenizer {file} does not exist: slow tokenizers without a tokenizer.json, and names of "
            "the Hugging Face hub, are not read"
        )
    has_config = file.name == "tokenizer.json" and (folder / "tokenizer_config.json").is_file()
    if has_config and importlib.util.find_spec("transformers") is not None:
        return _through_transformers(folder)
    model = file.read_text(encoding="utf-8")
    _tokenizer(model, file)
    # As Megatron does: a tokenizer without eos gives its sep.
    return model, _special_token(folder, "eos_token") or _special_token(folder, "sep_token")


def _through_transformers(folder: Path) -> tuple[str, str | None]:
    """The tokenizer as AutoTokenizer sets it up, which is what Megatron uses.

    Some settings of tokenizer_config.json change the ids (add_bos_token, add_prefix_space, ...), and which do
    depends on the version of transformers.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), use_fast=True, trust_remote_code=False, local_files_only=True
        )
        return tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token or tokenizer.sep_token
    except Exception as error:  # from_pretrained raises whatever its many loaders raise
        raise PrepareError(
            f"transformers cannot load a fast tokenizer from {folder}: {str(error).splitlines()[0]}"
        ) from None


def _special_token(folder: Path, name: str) -> str | None:
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        if not file.is_file():
            continue
        try:
            token = json.loads(file.read_text(encoding="utf-8")).get(name)
        except (ValueError, AttributeError):
            raise PrepareError(f"{file} is no JSON object: it should name the special tokens") from None
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            return str(token)
    return None


def _tokenizer(model: str, file: Path | str) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(model)
    except Exception as error:  # the package raises bare Exceptions
        raise PrepareError(f"{file} is not a tokenizer of the package tokenizers: {error}") from None


class HuggingFaceEncoder:
    """A tokenizer.json, through the package `tokenizers`."""

    no_eod = "no eos_token in its tokenizer_config.json"

    def __init__(self, model: str, eos_token: str | None, special_tokens: bool) -> None:
        # Each worker is a process of its own: threads inside it would only compete.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._tokenizer = _tokenizer(model, "tokenizer.json")
        # Both may be stored in tokenizer.json; Megatron neither cuts nor pads.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special_tokens = special_tokens
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.eod: int | None = None if eos_token is None else self._tokenizer.token_to_id(eos_token)
        self._typecode = _typecode(self.vocab_size)
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        if largest > np.iinfo(token_type(self.vocab_size)).max:
            raise PrepareError(
                f"the tokenizer has {self.vocab_size:,} tokens but ids up to {largest:,}: Megatron stores "
                "the ids of so small a vocabulary in 16 bits, which cannot hold them"
            )

        self.words: WordCache | None = None
        self._around = self._added_around()
        words = words_of(model)
        self._added = None if words is None else words.added
        if words is not None and self._around is not None:
            self.words = WordCache(lambda text: self._ids([text], special_tokens=False)[0], words.word)

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """See Encoder."""
        if self.words is None or self._around is None:
            return self._ids(texts, special_tokens=self._special_tokens)
        before, after = self._around
        return [
            self._ids([text], special_tokens=self._special_tokens)[0]
            if self._added is not None and self._added.search(text)
            else before + self.words.encode(text) + after
            for text in texts
        ]

    def _ids(self, texts: Sequence[str], *, special_tokens: bool) -> list[bytes]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=special_tokens)
        return [array(self._typecode, document.ids).tobytes() for document in encoded]

    def _added_around(self) -> tuple[bytes, bytes] | None:
        """The special tokens before and after a document; None if they are not the same for all."""
        if not self._special_tokens:
            return b"", b""
        texts = ["a", "b c"]
        (first, second), (first_bare, second_bare) = (
            self._ids(texts, special_tokens=special) for special in (True, False)
        )
        before, bare, after = first.partition(first_bare)
        if bare and second == before + second_bare + after:
            return before, after
        return None
