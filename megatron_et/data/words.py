"""BPE word by word: the tokenizer's ids, several times faster on text that repeats its words.

Where a text can be cut so that its ids are those of its parts end to end, a part seen before need not be
encoded again. Whether the ids are right is also looked at in passing, see `WordCache.encode`. Where to cut a
SentencePiece text says this file, byte_level.py does so for Hugging Face tokenizers.

Why it is exact: BPE merges two neighbours only into a piece of the vocabulary, best score first, and a merge
looks at nothing but its two neighbours. Where no piece of the vocabulary holds two characters a, b side by
side, no merge can ever reach across an "ab" in the text. `word_cache` searches the vocabulary for a rule of
where to cut that no piece contradicts.

It is not used where more than merges decides: unigram models (whose sums of scores are rounded along the
whole text), normalisation, vocabularies without byte fallback (where unknown characters in a row become one
id).
"""

import re
from array import array
from collections.abc import Callable

from megatron_et.data.reading import PrepareError

_BLANKS = " \u2581"  # SentencePiece writes a blank as U+2581, which is the same character to it
# Alphabets with letters, digits and signs in other classes than these: longer words, the same ids.
_LETTERS = ("A-Za-z\u00c0-\u1fff", "A-Za-z")

_MAX_WORDS = 1 << 18  # with their ids about 35 MB
_MAX_CHARS = 48  # longer ones hardly repeat
_SLICE_CHARS = 1 << 20
_CHECK_CHARS = 1000
_CHECK_EVERY = 1 << 20


class WordCache(dict[str, bytes]):
    """Word -> its ids as bytes, and the texts made of them."""

    def __init__(self, whole: Callable[[str], bytes], word: re.Pattern[str], prefix: str = "") -> None:
        """`whole` gives the ids of any text, `word` finds its words; `prefix` goes before every text."""
        super().__init__()
        self._whole = whole
        self._words = word.findall
        self._prefix = prefix
        self._chars_until_check = 0

    def __missing__(self, word: str) -> bytes:
        ids = self._whole(word)
        if len(word) <= _MAX_CHARS:
            if len(self) >= _MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids

    def _by_words(self, text: str) -> bytes:
        parts: list[bytes] = []
        start, length = 0, _SLICE_CHARS
        while start < len(text):
            # A list of all words of a very long text would take many times its memory.
            words = self._words(text, start, start + length)
            if start + length < len(text):
                # The last word may go on after the slice; a match of nothing may follow it.
                while words and not words[-1]:
                    words.pop()
                rest = len(words.pop())
                if rest == length:
                    length *= 2
                    continue
                start -= rest
            parts.append(b"".join(map(self.__getitem__, words)))
            start, length = start + length, _SLICE_CHARS
        return b"".join(parts)

    def encode(self, text: str) -> bytes:
        """The ids of a text, in bytes.

        The beginning of about one text in a million characters is encoded as a whole as well; raises
        PrepareError if that gives other ids, which no tokenizer is known to do.
        """
        text = self._prefix + text
        self._chars_until_check -= len(text)
        if self._chars_until_check < 0:
            self._chars_until_check = _CHECK_EVERY
            beginning = text[:_CHECK_CHARS]
            if self._by_words(beginning) != self._whole(beginning):
                raise PrepareError(
                    f"the ids of {beginning[:60]!r}... by words differ from those of the whole: please "
                    "report this tokenizer; megatron_et.data.words is wrong about it"
                )
        return self._by_words(text)


def word_cache(model: bytes, typecode: str) -> WordCache | None:
    """A cache for a serialised SentencePiece model, or None where words alone do not decide the ids."""
    try:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    except ImportError:  # the second needs protobuf, which sentencepiece does not require
        return None
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    simple = (
        trainer.model_type == trainer.BPE
        and trainer.byte_fallback
        and not trainer.treat_whitespace_as_suffix
        and normalizer.escape_whitespaces
        and not normalizer.remove_extra_whitespaces
        and not normalizer.precompiled_charsmap
        and not normalizer.normalization_rule_tsv
    )
    if not simple:
        return None
    kinds = proto.SentencePiece
    matched = (kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED)
    word = _rule([piece.piece for piece in proto.pieces if piece.type in matched])
    if word is None:
        return None
    # A blank put before the text is the model's own dummy prefix; before every word it would be wrong.
    prefix = " " if normalizer.add_dummy_prefix else ""
    normalizer.add_dummy_prefix = False
    processor = SentencePieceProcessor(model_proto=proto.SerializeToString())

    def whole(text: str) -> bytes:
        return array(typecode, processor.encode_as_ids(text)).tobytes()

    return WordCache(whole, word, prefix)


def _rule(vocabulary: list[str]) -> re.Pattern[str] | None:
    """The finest way to cut that no piece reaches across: letters from other signs, or at blanks only."""
    for letters in _LETTERS:
        across = f"[^{_BLANKS}][{_BLANKS}]|[{letters}][^{letters}{_BLANKS}]|[^{letters}{_BLANKS}][{letters}]"
        if not _any_holds(vocabulary, across):
            return re.compile(f"[{_BLANKS}]*(?:[{letters}]+|[^{letters}{_BLANKS}]+)|[{_BLANKS}]+")
    if not _any_holds(vocabulary, f"[^{_BLANKS}][{_BLANKS}]"):
        return re.compile(f"[{_BLANKS}]*[^{_BLANKS}]+|[{_BLANKS}]+")
    return None


def _any_holds(vocabulary: list[str], pattern: str) -> bool:
    return any(map(re.compile(pattern).search, vocabulary))
